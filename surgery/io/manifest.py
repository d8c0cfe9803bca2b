"""The manifest of an output folder: every file that surgery wrote or copied, and whether it has changed since.

surgery.json lists the files as path -> sha256 and bytes: weights in `files`, all others in `other_files`. The entry of
a config has one more hash, of what stays the same when the model is saved again (`stable`). The list does not hold
surgery.json itself; its `record_sha256` is the hash of the rest of the record. The entry for the card leaves out the
owner's notes. A record of an earlier version lists only the weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Collection
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from surgery.errors import SurgeryError
from surgery.io.card_text import without_notes
from surgery.io.files import CARD, PROGRESS, REPORT, sha256
from surgery.io.identity import CONFIGS, greedy_settings, stable_config, stable_hash
from surgery.io.model_folder import is_carried

# Never part of a checkpoint: training states, hidden files, and files that are still being written.
TRAINERS = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json")
UNLISTED = (
    *TRAINERS, PROGRESS, REPORT, "*.partial*", "*.unfinished", "*.lock", "*.state", ".*", "*/.*", "*__pycache__/*",
    "healing/runs/*",
)  # fmt: skip
UNFINISHED = re.compile(r"\.[0-9a-f]{8}\.unfinished$")  # what `write_text` leaves if it is killed
OF_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
# What a model computes follows from these and from its weights.
COMPUTES = (*CONFIGS, "*.py", "*.safetensors.index.json")
# Files that Transformers looks for.
LOADED = (
    "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json", "adapter_model.*",
    "adapter_config.json",
)  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def paths_in(folder: Path) -> dict[str, Path]:
    """Path in a folder -> the file or link, for everything that its manifest should list."""
    found = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in names.items() if not any(fnmatch(name, pattern) for pattern in UNLISTED)}


def entry(path: Path) -> dict:
    """The manifest entry of a file (sha256, bytes, of a config `stable`); for a card, without its owner's notes."""
    if path.name == CARD:
        return entry_of_card(path.read_bytes())
    stable = {"stable": stable_hash(path)} if path.name in CONFIGS else {}
    return {"sha256": sha256(path), "bytes": path.stat().st_size} | stable


def entry_of_card(content: bytes) -> dict:
    """The manifest entry of a card, without its owner's notes."""
    with suppress(UnicodeDecodeError):  # surgery writes UTF-8: this card was changed
        content = without_notes(content.decode("utf-8")).encode("utf-8")
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def other_files(folder: Path, weights: Collection[str]) -> dict[str, dict]:
    """The manifest entries of all files that are in a folder now, except its weights."""
    return {name: entry(path) for name, path in paths_in(folder).items() if name not in weights}


def listed(record: dict) -> dict[str, dict]:
    """Every file that a record lists."""
    return record["files"] | (record.get("other_files") or {})


def is_complete(record: dict) -> bool:
    """Whether a record lists all files; a record of an earlier version lists only the weights."""
    return isinstance(record.get("other_files"), dict)


def record_hash(record: dict) -> str:
    """The hash of a record, without `timing` and without the `record_sha256` in which this hash is stored."""
    data = {key: value for key, value in record.items() if key not in ("record_sha256", "timing")}
    data = json.loads(json.dumps(data))  # as it will be read back: keys that are numbers become text
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def is_intact(record: dict) -> bool:
    """Whether a record that was just read is unchanged.

    True for a record of an earlier version, which has no hash. The versions that list all files write one.
    """
    known = record.get("record_sha256")
    return not is_complete(record) if known is None else known == record_hash(record)


def added(folder: Path, record: dict) -> list[str]:
    """Files of a folder that its record does not list; only weights, if the record lists only weights."""
    known = listed(record)
    names = [name for name in paths_in(folder) if name not in known]
    return names if is_complete(record) else [name for name in names if name.endswith(WEIGHTS)]


def strangers(folder: Path) -> list[str]:
    """Files of an output folder that surgery did not write, including hidden files and training states.

    If the record lists only weights or cannot be read, these are the files of kinds that surgery never writes.
    """
    try:
        record = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        known = set(listed(record)) if is_complete(record) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        known = None
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if known is None:
        weights = (".safetensors", ".safetensors.index.json")
        ours = [name for name in names if is_carried(name) or name.endswith(weights)]
        ours += [name for name in names if name.startswith(("healing/", "adapter/"))]
    else:
        ours = [name for name in names if name in known or name.startswith("healing/runs/")]
    own = {*ours, REPORT, PROGRESS, *OF_THE_SYSTEM}
    return [name for name in names if name not in own and not UNFINISHED.search(name)]


def differences(
    folder: Path, record: dict, intact: bool, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """How the files of a folder differ from its record, one clause for each ("config.json is missing").

    Args:
        intact: the result of `is_intact` when the record was read; the caller may have changed the record since.
        progress: called with the number of files done and the number of all files.
    """
    known, found = listed(record), [] if intact else [f"{REPORT} is not as surgery wrote it"]
    for index, (name, info) in enumerate(known.items()):
        found += [f"{name} {fault}" for fault in [_fault(folder, name, info)] if fault]
        if progress:
            progress(index + 1, len(known))
    return found + [f"{name} was added: move it away" for name in added(folder, record)]


def model_differences(
    folder: Path, record: dict, leave_out: Collection[str] = (), digest: Callable[[Path], str] = sha256
) -> list[str]:
    """How the weights, configs and code of a folder differ from its record, one clause for each.

    Reading takes a second a gigabyte. Other files, the card among them, may differ, and files may be links. Of files
    that were added, those count that Transformers would load.

    Args:
        leave_out: names of files that are not compared.
        digest: gives the hash of a file.
    """
    known = record["files"] | {
        name: info
        for name, info in (record.get("other_files") or {}).items()
        if any(fnmatch(name, pattern) for pattern in COMPUTES)
    }
    asked = (name for name in known if name not in leave_out and ("/" not in name or _outside(name)))
    faults = ((name, _content_fault(folder, name, known[name], digest)) for name in asked)
    found = [f"{name} {fault}" for name, fault in faults if fault]
    more = [name for name in added(folder, record) if "/" not in name and name not in leave_out]
    return found + [f"{name} was added" for name in more if _is_loaded(folder / name)]


def refuse_unchecked(folder: Path, record: dict, *, passed: bool, intact: bool) -> None:
    """Raise unless a folder passed `surgery check` and has not changed since.

    Args:
        passed: whether its record says that it passed.
        intact: the result of `is_intact` when the record was read.
    """
    what = "" if passed else "this folder has not passed `surgery check`"
    if passed and (changed := differences(folder, record, intact)):
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        what = f"changed since it was checked: {'; '.join(changed[:4])}{more}"
    if what:
        fix = f"run `surgery check {shlex.quote(str(folder))}`"
        raise SurgeryError(what, where=str(folder), fix=fix, code="unchecked-output")


def _is_loaded(file: Path) -> bool:
    """Whether Transformers loads a file that was added, and this says more than config.json."""
    if file.name == CONFIGS[1]:
        with suppress(SurgeryError, AttributeError):
            config, generation = (stable_config(file.parent, name) for name in CONFIGS)
            return greedy_settings(generation, config) != greedy_settings(None, config)
        return True
    return any(fnmatch(file.name, pattern) for pattern in LOADED)


def _outside(name: str) -> bool:
    """Whether a listed name leads out of its folder."""
    pure = PurePosixPath(name)
    return pure.is_absolute() or ".." in pure.parts or "\\" in name


def _content_fault(folder: Path, name: str, info: dict, digest: Callable[[Path], str]) -> str:
    """How what a file computes differs from its entry, or "". A config may have other keys that say nothing."""
    path = folder / name
    if _outside(name):
        return "is listed, and is not in this folder"
    if not path.is_file():
        return "is missing"
    same = path.stat().st_size == info["bytes"] and digest(path) == info["sha256"]
    if not same and "stable" in info:
        same = stable_hash(path) == info["stable"]
    return "" if same else "is not the file that was written"


def _fault(folder: Path, name: str, info: dict) -> str:
    if _outside(name):
        return "is listed, and is not in this folder"
    path = folder / name
    if path.is_symlink():
        return "is a link"
    if not path.is_file():
        return "is missing"
    if path.name != CARD and path.stat().st_size != info["bytes"]:
        return "is not the file that was written"
    here = entry(path)
    same = all(here[key] == info[key] for key in ("sha256", "bytes"))
    aside = " (only what stands between its two `notes` lines may be edited)" if name == CARD else ""
    return "" if same else f"is not the file that was written{aside}"
