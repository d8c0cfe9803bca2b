"""Is a saved checkpoint what it says it is, and does it load and run for somebody who does not have this package?

What does not fit in memory is recorded as *not run*, never as passed; a layer-wise check that does fit stands in.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.evaluation.check_code import FOREIGN, look_at_code
from surgery.evaluation.check_layers import FAILED, NOT_RUN, PASSED, compare_shapes, run_layers
from surgery.io.files import sha256
from surgery.io.loading import no_class
from surgery.io.safetensors import Checkpoint
from surgery.machine.device import too_big
from surgery.report.report import Report

PROBE_LENGTH, GENERATED = 24, 8
PACKAGE = str(Path(__file__).parents[2])  # where door 1 finds this package
MEASURED = "measured"  # a figure to read: what is too much is the gate's business


@dataclass(frozen=True)
class Item:
    """One thing that was looked at."""

    name: str
    status: str
    detail: str = ""


def check_folder(
    folder: str | Path, base: str | Path | None = None, *, memory: int | None = None, progress=None
) -> list[Item]:
    """All checks of one saved checkpoint.

    Args:
        folder: the checkpoint.
        base: the model it was made from; adds the difference of the logits.
        memory: bytes that may be used; default what is free now.

    Returns:
        The items, in the order in which they were looked at.
    """
    folder = Path(folder)
    report = Report.of(folder)
    items = [check_hashes(report, folder, progress)]
    return [without_path(item, folder, base) for item in items + _look_into(folder, base, memory, progress)]


def check_report(report: Report, base: str | Path | None = None, *, memory: int | None = None, progress=None) -> None:
    """Check the report's folder and keep the result in the report, unsaved; arguments as for `check_folder`."""
    report.data["check"] = to_dict(check_folder(report.folder, base, memory=memory, progress=progress))


def without_path(item: Item, *folders: str | Path | None) -> Item:
    """The item with folders by their own names: it is published with the card."""
    detail = item.detail
    for folder in filter(None, folders):
        for path in (Path(folder).resolve(), Path(folder)):
            detail = detail.replace(str(path), path.name or str(path))
    return replace(item, detail=detail)


def _look_into(folder: Path, base: str | Path | None, memory: int | None, progress) -> list[Item]:
    items: list[Item] = []
    try:
        checkpoint = Checkpoint(folder)
        anatomy = Anatomy.of(folder)
    except SurgeryError as error:
        return [Item("structure", FAILED, str(error))]
    items.append(check_finite(checkpoint, progress))
    items.append(Item("shapes against config", *compare_shapes(folder, anatomy, checkpoint)))
    own = True
    if anatomy.surgical:
        status, detail = look_at_code(folder)
        items.append(Item("runtime files", status, detail))
        own = status == PASSED
    needed = max(checkpoint.size, Checkpoint(base).size if base is not None else 0)
    reason = no_class(folder) or too_big(needed, memory)
    if not reason:
        return items + check_door(folder, anatomy, base, own)
    items.append(Item("loads with stock Transformers", NOT_RUN, reason))
    items.append(Item("generates", NOT_RUN, reason))
    if base is not None:
        items.append(Item("logits against base", NOT_RUN, reason))
    return [*items, Item("layers one by one", *run_layers(folder, anatomy, checkpoint))]


def passed(items: list[Item]) -> bool:
    """No fault was found. Something may not have been run: the items say so."""
    return all(item.status != FAILED for item in items)


def to_dict(items: list[Item]) -> dict:
    return {"passed": passed(items), "items": [asdict(item) for item in items]}


def check_hashes(report: Report, folder: Path, progress=None) -> Item:
    files = report.data.get("files") or {}
    if not files:
        return Item("hashes", FAILED, "surgery.json lists no weight files")
    for number, (name, facts) in enumerate(files.items()):
        path = folder / name
        if not path.is_file():
            return Item("hashes", FAILED, f"{name} is missing")
        if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            return Item("hashes", FAILED, f"{name} is not the file that was written")
        if progress:
            progress(number + 1, len(files), "hashes")
    return Item("hashes", PASSED, f"{len(files)} file{'s' * (len(files) > 1)}, sha256")


def check_finite(checkpoint: Checkpoint, progress=None) -> Item:
    """No NaN or infinite value in any floating-point tensor, a piece in memory at a time."""
    import torch

    from surgery.io.safetensors import TORCH_NAMES

    bad, seen = [], 0
    for number, info in enumerate(checkpoint.tensors.values()):
        if info.dtype in TORCH_NAMES:
            dtype = getattr(torch, TORCH_NAMES[info.dtype])
            pieces = (torch.frombuffer(piece, dtype=dtype) for piece in checkpoint.chunks(info))
            if not all(bool(piece.isfinite().all()) for piece in pieces):
                bad.append(info.name)
            seen += 1
        if progress:
            progress(number + 1, len(checkpoint.tensors), "finite values")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return Item("finite values", FAILED, f"NaN or infinite values in {', '.join(bad[:3])}{more}")
    return Item("finite values", PASSED, f"{seen} tensors")


def check_door(folder: Path, anatomy: Anatomy, base: str | Path | None, own: bool = True) -> list[Item]:
    """Load and generate in a fresh process with stock Transformers, and compare logits with the base there.

    Args:
        own: the code in a surgical folder is this version's; else it is not run, and the package's is.
    """
    import torch

    longest = getattr(anatomy.config, "max_position_embeddings", None) or PROBE_LENGTH
    used = [(part, layer.entry) for layer in anatomy.layers for part in layer.parts.values()]
    reach = max([PROBE_LENGTH, *(part.probe_length(entry, PROBE_LENGTH) for part, entry in used)])
    length = min(reach, longest - GENERATED)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(anatomy.config.vocab_size, (1, length), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as scratch:

        def job(path, name: str, **door) -> dict:
            facts = {"folder": str(path), "tokens": tokens, "generate": GENERATED}
            return facts | door | {"logits": os.path.join(scratch, name)}

        door_1 = job(folder, "package", package=PACKAGE)
        jobs = [job(folder, "new", trust=anatomy.surgical) if own else door_1]
        if base is not None:
            jobs.append(job(base, "base"))
        results = load_in_fresh_process(jobs)
        name = "loads with trust_remote_code" if anatomy.surgical else "loads with stock Transformers"
        items = [] if own else [Item(name, NOT_RUN, FOREIGN)]
        items += _door_items(results[0], name if own else "loads with surgery.load")
        if anatomy.surgical and own:
            items.append(_same([*load_in_fresh_process([door_1]), results[0]], [door_1["logits"], jobs[0]["logits"]]))
        if base is not None:
            items.append(_compare(results, [job["logits"] for job in jobs]))
    return items


def load_in_fresh_process(jobs: list[dict], timeout: float | None = None) -> list[dict]:
    """Run `fresh_process.py` on a list of jobs in one fresh process, models one after the other.

    Args:
        timeout: seconds for all of them.

    Returns:
        What fresh_process.py answered, a job's error as {"error": text}.
    """
    env = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as modules:  # code that is run comes from the folder, not from an old copy
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(Path(__file__).with_name("fresh_process.py"))],
                input=json.dumps(jobs),  # and no terminal: no question can wait for an answer
                capture_output=True,
                text=True,
                encoding="utf-8",
                env=env | {"HF_MODULES_CACHE": modules},
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return [{"error": f"no answer within {timeout:g} seconds"}] * len(jobs)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lost = {"error": f"the process ended with {done.returncode}: {done.stderr.strip()[-500:]}"}
    return results + [lost] * (len(jobs) - len(results))


def _door_items(result: dict, name: str) -> list[Item]:
    if "no_class" in result:
        return [Item(name, NOT_RUN, result["no_class"]), Item("generates", NOT_RUN, result["no_class"])]
    if "error" in result:
        return [Item(name, FAILED, result["error"]), Item("generates", NOT_RUN, "it did not load")]
    faults = {kind: result[kind] for kind in ("missing", "unexpected", "mismatched") if result[kind]}
    if faults:
        text = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in faults.items())
        loads = Item(name, FAILED, text)
    else:
        loads = Item(name, PASSED, f"{result['class']} in a fresh process, every tensor used")
    if not result["finite"]:
        return [loads, Item("generates", FAILED, "the logits hold NaN or infinite values")]
    return [loads, Item("generates", PASSED, f"{len(result['generated'])} tokens, logits finite")]


def _same(results: list[dict], files: list[str]) -> Item:
    """Door 1 (this package) and door 2 (the code in the folder), in processes of their own: equal to the bit."""
    import torch

    name = "both doors agree"
    if errors := [result["error"] for result in results if "error" in result]:
        return Item(name, FAILED, errors[0])
    one, two = (torch.load(file, weights_only=True) for file in files)
    if torch.equal(one, two) and results[0]["generated"] == results[1]["generated"]:
        return Item(name, PASSED, "logits equal to the bit, same tokens generated")
    return Item(name, FAILED, f"logits differ by {(one - two).abs().max().item():.3g}")


def _compare(results: list[dict], files: list[str]) -> Item:
    import torch

    name = "logits against base"
    if errors := [r.get("error") or r["no_class"] for r in results if "error" in r or "no_class" in r]:
        return Item(name, NOT_RUN, errors[0])
    new, old = (torch.load(file, weights_only=True).double() for file in files)
    if new.shape != old.shape:
        return Item(name, FAILED, f"shapes differ: {list(new.shape)}, base {list(old.shape)}")
    difference, scale = (new - old).abs().max().item(), old.std().item()
    status = MEASURED if math.isfinite(difference) else FAILED
    return Item(name, status, f"largest difference {difference:.3g} (base's spread {scale:.3g}), random tokens")
