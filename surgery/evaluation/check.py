"""Checks that a saved checkpoint matches its record, and that it loads and runs for a user without this package.

A check that does not fit in memory is recorded as *not run*, never as passed. A layer-wise check replaces it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.errors import MachineError, SurgeryError
from surgery.evaluation.check_code import FOREIGN, check_runtime_code
from surgery.evaluation.check_layers import FAILED, NOT_RUN, PASSED, compare_shapes, run_layers
from surgery.io import manifest
from surgery.io.loading import no_class
from surgery.io.safetensors import Checkpoint
from surgery.machine.device import NO_MEMORY, note_device, too_big
from surgery.machine.placement import AUTO, DTYPES, current, device_for, refuse_for_quantised
from surgery.machine.progress import PERCENT, begin
from surgery.operations.base import NATIVE, SURGICAL
from surgery.report.report import Report

if TYPE_CHECKING:
    import torch

PROBE_LENGTH, GENERATED = 24, 8
STEPS = 4  # last tokens of the text that are also read one by one, where decoding is computed in a way of its own
STEP_LIMITS = {"float32": 1e-3, "bfloat16": 0.2}  # dtype -> largest difference of logits, as a share of their spread
LONGEST_WINDOW = 1024  # a check reads a text that is longer than the window of a layer, up to this window
FILES, FRESH = "checking files", "checking in a fresh process"  # stages
FILES_SHARE = 50  # percent of the stage FILES that hashing takes, roughly; the test for NaN takes the rest
PACKAGE = str(Path(__file__).parents[2])  # the folder from which a fresh process imports this package
MEASURED = "measured"  # status of a figure that no check judges: the gate does


@dataclass(frozen=True)
class Item:
    """The result of one check."""

    name: str
    status: str
    detail: str = ""


def check_folder(
    folder: str | Path, base: str | Path | None = None, *, memory: int | None = None, progress=None
) -> list[Item]:
    """Run all checks of one saved checkpoint.

    Args:
        folder: the checkpoint.
        base: the model that it was made from; adds a comparison of the logits.
        memory: bytes that may be used; default: the free memory.

    Returns:
        The items, in the order of the checks.
    """
    folder = Path(folder)
    report = Report.of(folder)
    begin(progress, FILES, PERCENT)
    items = [check_hashes(report, folder, progress)]
    items += [*check_record(report, folder), *_check_contents(folder, base, memory, progress)]
    return [without_path(item, folder, base) for item in items]


def check_report(report: Report, base: str | Path | None = None, *, memory: int | None = None, progress=None) -> None:
    """Check the report's folder and put the result in the report, unsaved. Arguments are those of `check_folder`."""
    report.data["check"] = to_dict(check_folder(report.folder, base, memory=memory, progress=progress))


def without_path(item: Item, *folders: str | Path | None) -> Item:
    """The item with the last name of each folder in place of its full path, because the card publishes the item."""
    detail = item.detail
    for folder in filter(None, folders):
        for path in (Path(folder).resolve(), Path(folder)):
            detail = detail.replace(str(path), path.name or str(path))
    return replace(item, detail=detail)


def _check_contents(folder: Path, base: str | Path | None, memory: int | None, progress) -> list[Item]:
    items: list[Item] = []
    try:
        checkpoint = Checkpoint(folder)
        anatomy = Anatomy.of(folder)
    except SurgeryError as error:
        return [Item("structure", FAILED, str(error))]
    items.append(check_finite(checkpoint, progress))
    items.append(Item("shapes against config", *compare_shapes(folder, anatomy, checkpoint)))
    own_code = True
    if anatomy.surgical:
        status, detail = check_runtime_code(folder)
        items.append(Item("runtime files", status, detail))
        own_code = status == PASSED
    refuse_for_quantised(anatomy.config)
    sides = [checkpoint] if base is None else [checkpoint, Checkpoint(base)]
    weights = max(map(_loaded_bytes, sides))
    reason = no_class(folder) or too_big(weights, memory)
    if not reason:
        begin(progress, FRESH)
        return items + check_loading(folder, anatomy, base, own_code, _place(weights))
    items.append(Item("loads with stock Transformers", NOT_RUN, reason))
    items.append(Item("generates", NOT_RUN, reason))
    if base is not None:
        items.append(Item("logits against base", NOT_RUN, reason))
    return [*items, Item("layers one by one", *run_layers(folder, anatomy, checkpoint))]


def _loaded_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's weights in the dtype of this run."""
    dtype = current().dtype
    if dtype == AUTO:
        return checkpoint.size
    return sum(DTYPES[dtype] * prod(each.shape) for each in checkpoint.tensors.values())


def _place(weights: int) -> dict[str, str]:
    """Device and dtype of a job (`fresh_process`); the CPU where a model of so many bytes does not fit as a whole."""
    try:
        device = device_for(weights)
        note_device(device)
    except MachineError:
        device = "cpu"
    return {"device": str(device), "dtype": current().dtype}


def passed(items: list[Item]) -> bool:
    """Whether no check failed. Some checks may not have been run; their items say so."""
    return all(item.status != FAILED for item in items)


def to_dict(items: list[Item]) -> dict:
    """The items as surgery.json keeps them."""
    return {"passed": passed(items), "items": [asdict(item) for item in items]}


def check_hashes(report: Report, folder: Path, progress=None) -> Item:
    """Check that the folder holds the files that surgery.json lists, with their sizes and sha256, and no others."""
    if not report.data["files"]:
        return Item("hashes", FAILED, "surgery.json lists no weight files")

    def tick(done: int, total: int) -> None:
        if progress:
            progress(done * FILES_SHARE // total, PERCENT, FILES)

    if faults := manifest.differences(folder, report.data, report.intact, tick):
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        return Item("hashes", FAILED, f"{'; '.join(faults[:3])}{more}")
    count = len(manifest.listed(report.data))
    if manifest.is_complete(report.data):
        return Item("hashes", PASSED, f"{count} files, sha256")
    weights = f"{count} weight file{'s' * (count > 1)}, sha256"
    return Item("hashes", PASSED, f"{weights}; an earlier version wrote this, and listed no other files")


def check_record(report: Report, folder: Path) -> list[Item]:
    """Check that surgery.json and config.json agree on tier and cache; [] if the config cannot be read."""
    name, data = "surgery.json against config", report.data
    try:
        anatomy = Anatomy.of(folder)
    except SurgeryError:
        return []
    wanted = SURGICAL if anatomy.surgical else NATIVE
    if data.get("tier") != wanted:
        what = f"surgery.json says that this is a {data.get('tier')} checkpoint, config.json that it is {wanted}"
        return [Item(name, FAILED, what)]
    # Earlier versions counted the base's own sliding windows as if they kept all tokens.
    unbounded = replace(anatomy, layers=tuple(replace(layer, window=None) for layer in anatomy.layers))
    for key, words in (("kv_bytes_per_token", "KV bytes per token"), ("kv_bytes_fixed", "KV bytes held always")):
        planned = (data["plan"].get(key) or {}).get("after")
        real = getattr(anatomy, key)
        if planned is not None and planned not in (real, getattr(unbounded, key)):
            return [Item(name, FAILED, f"{words}: {planned:,} in surgery.json, {real:,} by config.json")]
    return [Item(name, PASSED, f"tier {wanted}, cache as planned")]


def check_finite(checkpoint: Checkpoint, progress=None) -> Item:
    """Check that no floating-point tensor holds NaN or infinity, with one chunk in memory at a time."""
    import torch

    from surgery.io.safetensors import TORCH_NAMES

    bad, checked = [], 0
    for index, info in enumerate(checkpoint.tensors.values()):
        if info.dtype in TORCH_NAMES:
            dtype = getattr(torch, TORCH_NAMES[info.dtype])
            chunks = (torch.frombuffer(chunk, dtype=dtype) for chunk in checkpoint.chunks(info))
            if not all(bool(chunk.isfinite().all()) for chunk in chunks):
                bad.append(info.name)
            checked += 1
        if progress:
            done = (PERCENT - FILES_SHARE) * (index + 1) // len(checkpoint.tensors)
            progress(FILES_SHARE + done, PERCENT, FILES)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return Item("finite values", FAILED, f"NaN or infinite values in {', '.join(bad[:3])}{more}")
    return Item("finite values", PASSED, f"{checked} tensors")


def check_loading(
    folder: Path,
    anatomy: Anatomy,
    base: str | Path | None,
    own_code: bool = True,
    place: dict[str, str] | None = None,
) -> list[Item]:
    """Load and generate in a fresh process with stock Transformers, and compare the logits with the base's.

    Args:
        own_code: whether the code in a surgical folder is this version's. Other code is not run: the folder is then
            loaded with the package only.
        place: device and dtype of a job (`fresh_process`); default: the CPU and the dtype of the weights.
    """
    import torch

    length = _probe_length(anatomy, torch.device((place or {}).get("device", "cpu")))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(anatomy.config.vocab_size, (1, length), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as scratch:

        def job(path, name: str, **options) -> dict:
            inputs = {"folder": str(path), "tokens": tokens, "generate": GENERATED}
            inputs |= place or {}
            return inputs | options | {"logits": os.path.join(scratch, name)}

        steps = {"steps": STEPS} if anatomy.surgical and anatomy.latent else {}  # no other decodes in its own way
        with_package = job(folder, "package", package=PACKAGE, **steps)
        jobs = [job(folder, "new", trust=anatomy.surgical, **steps) if own_code else with_package]
        if base is not None:
            jobs.append(job(base, "base"))
        results = load_in_fresh_process(jobs)
        name = "loads with trust_remote_code" if anatomy.surgical else "loads with stock Transformers"
        items = [] if own_code else [Item(name, NOT_RUN, FOREIGN)]
        items += _loading_items(results[0], name if own_code else "loads with surgery.load")
        if anatomy.surgical and own_code:
            both = [*load_in_fresh_process([with_package]), results[0]]
            items.append(_compare_both_ways(both, [with_package["logits"], jobs[0]["logits"]]))
        if base is not None:
            items.append(_compare_with_base(results, [job["logits"] for job in jobs]))
    return items


def _probe_length(anatomy: Anatomy, device: torch.device) -> int:
    """Tokens of the text that a check reads: enough to show what each part of the model does."""
    used_parts = [(part, layer.entry) for layer in anatomy.layers for part in layer.parts.values()]
    lengths = [PROBE_LENGTH, *(part.probe_length(entry, PROBE_LENGTH) for part, entry in used_parts)]
    windows = {layer.window for layer in anatomy.layers} - {None}
    lengths += [window + GENERATED for window in windows if window <= LONGEST_WINDOW]
    if device.type == "cuda" and any("gate" in entry for _, entry in used_parts):
        import torch

        from surgery.kernels.surgery_triton import unsupported
        from surgery.runtime.surgery_gated_compute import ROWS

        if unsupported(device, torch.float16, 64) is None:
            lengths.append(ROWS)  # in a shorter text a gate leaves no row out, and its kernel is not launched
    return min(max(lengths), (anatomy.positions or PROBE_LENGTH) - GENERATED)


def load_in_fresh_process(jobs: list[dict], timeout: float | None = None) -> list[dict]:
    """Run `fresh_process.py` on a list of jobs in one fresh process, one model after the other.

    Args:
        timeout: seconds for all jobs together.

    Returns:
        One answer of fresh_process.py for each job; {"error": text} for a job that failed.
    """
    env = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as modules:  # so that code is run from the folder, not from an old copy
        try:
            process = subprocess.run(
                [sys.executable, "-P", str(Path(__file__).with_name("fresh_process.py"))],
                input=json.dumps(jobs),  # stdin is no terminal, so no question can wait for an answer
                capture_output=True,
                text=True,
                encoding="utf-8",
                env=env | {"HF_MODULES_CACHE": modules},
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return [{"error": f"no answer within {timeout:g} seconds"}] * len(jobs)
    results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    failure = {"error": f"the process ended with {process.returncode}: {process.stderr.strip()[-500:]}"}
    return results + [failure] * (len(jobs) - len(results))


def _loading_items(result: dict, name: str) -> list[Item]:
    if "no_class" in result:
        return [Item(name, NOT_RUN, result["no_class"]), Item("generates", NOT_RUN, result["no_class"])]
    if any(words in result.get("error", "") for words in NO_MEMORY):
        return [Item(name, NOT_RUN, result["error"]), Item("generates", NOT_RUN, "it did not load")]
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
    words = f"{len(result['generated'])} tokens, logits finite{_by_kernels(result)}"
    return [loads, Item("generates", PASSED, words), *_steps(result)]


def _steps(result: dict) -> list[Item]:
    """Whether decoding, which is computed in another way than a prompt, gives what a prompt gives."""
    found = result.get("step_difference")
    if found is None:
        return []
    most = STEP_LIMITS.get(result["dtype"], max(STEP_LIMITS.values()))
    words = f"logits differ by {found:.1e} of their spread, {most:g} at most"
    return [Item("decodes what it reads", PASSED if found <= most else FAILED, words)]


def _by_kernels(result: dict) -> str:
    """What computed a surgical model's attention on a GPU, to end a sentence; "" elsewhere."""
    if not result["kernels"] and (result["device"] == "cpu" or not result["class"].startswith("Surgery")):
        return ""
    names = ", ".join(sorted(result["kernels"]))
    failed = f"; PyTorch in place of a kernel: {'; '.join(result['kernel_faults'])}" if result["kernel_faults"] else ""
    return f"; attention of these tokens by {f'the kernels {names}' if names else 'PyTorch'}{failed}"


def _compare_both_ways(results: list[dict], files: list[str]) -> Item:
    """Compare the logits of the two ways to load, with the package and with trust_remote_code: all bits must agree.

    Args:
        results: the answer for each way; each came from its own process.
        files: the file with the logits for each way.
    """
    import torch

    name = "both ways to load agree"
    if reasons := [result["no_class"] for result in results if "no_class" in result]:
        return Item(name, NOT_RUN, reasons[0])
    if errors := [result["error"] for result in results if "error" in result]:
        return Item(name, FAILED, errors[0])
    with_package, with_trust = (torch.load(file, weights_only=True) for file in files)
    if torch.equal(with_package, with_trust) and results[0]["generated"] == results[1]["generated"]:
        return Item(name, PASSED, "logits bit-identical, same tokens")
    return Item(name, FAILED, f"logits differ by {(with_package - with_trust).abs().max().item():.3g}")


def _compare_with_base(results: list[dict], files: list[str]) -> Item:
    import torch

    name = "logits against base"
    if errors := [
        result.get("error") or result["no_class"] for result in results if "error" in result or "no_class" in result
    ]:
        return Item(name, NOT_RUN, errors[0])
    logits, base_logits = (torch.load(file, weights_only=True).double() for file in files)
    if logits.shape != base_logits.shape:
        return Item(name, FAILED, f"shapes differ: {list(logits.shape)}, base {list(base_logits.shape)}")
    difference, scale = (logits - base_logits).abs().max().item(), base_logits.std().item()
    status = MEASURED if math.isfinite(difference) else FAILED
    return Item(name, status, f"largest difference {difference:.3g} on random tokens (base's spread {scale:.3g})")
