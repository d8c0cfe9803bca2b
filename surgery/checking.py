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

from .anatomy import Anatomy
from .checkpoint import Checkpoint
from .errors import SurgeryError
from .output import sha256
from .report import Report

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
PROBE_LENGTH, GENERATED = 24, 8
LOAD_OVERHEAD = 1.3  # memory of a loaded model over its bytes on disk, with room for activations


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
    items.append(check_shapes(folder, anatomy, checkpoint))
    needed = int(checkpoint.size * LOAD_OVERHEAD)
    if base is not None:
        needed = max(needed, int(Checkpoint(base).size * LOAD_OVERHEAD))
    if (reason := too_big(needed, memory)) is None:
        return items + check_door(folder, anatomy, base)
    items.append(Item("loads with stock Transformers", NOT_RUN, reason))
    items.append(Item("generates", NOT_RUN, reason))
    if base is not None:
        items.append(Item("logits against base", NOT_RUN, reason))
    return [*items, check_layers(folder, anatomy, checkpoint)]


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

    from .checkpoint import TORCH_NAMES

    bad, seen = [], 0
    for number, info in enumerate(checkpoint.tensors.values()):
        if info.dtype in TORCH_NAMES:
            dtype = getattr(torch, TORCH_NAMES[info.dtype])
            pieces = (torch.frombuffer(piece, dtype=dtype) for piece in checkpoint.pieces(info))
            if not all(bool(piece.isfinite().all()) for piece in pieces):
                bad.append(info.name)
            seen += 1
        if progress:
            progress(number + 1, len(checkpoint.tensors), "finite values")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return Item("finite values", FAILED, f"NaN or infinite values in {', '.join(bad[:3])}{more}")
    return Item("finite values", PASSED, f"{seen} tensors")


def check_shapes(folder: Path, anatomy: Anatomy, checkpoint: Checkpoint) -> Item:
    """Every stored tensor has the shape that the config gives its module, on a model without memory.

    Attention was verified when the anatomy was read. Names that Transformers renames on load (experts that it
    fuses) are counted, not compared: loading compares those.
    """
    name, layer = "shapes against config", anatomy.layers[0]
    try:
        wanted = {key: tuple(tensor.shape) for key, tensor in empty_model(folder).state_dict().items()}
    except Exception as error:  # a config that Transformers accepts and its model class does not
        return Item(name, FAILED, f"no model can be made from this config: {error}"[:500])
    known = [key for key in checkpoint.tensors if key in wanted]
    for key in known:
        if checkpoint.tensors[key].shape != wanted[key]:
            shapes = f"{list(checkpoint.tensors[key].shape)}, the config says {list(wanted[key])}"
            return Item(name, FAILED, f"{key} has shape {shapes}")
    heads = (
        f"{len(anatomy.layers)} layers, {layer.heads} query heads, KV heads {layer.kv_heads}, size {layer.head_dim}"
    )
    return Item(name, PASSED, f"{len(known)} of {len(checkpoint.tensors)} tensors compared; {heads}")


def empty_model(folder: Path):
    """The folder's model on the meta device: shapes and code, no memory."""
    import torch

    from .folder import load_config
    from .scoring import auto_class

    with torch.device("meta"):
        return auto_class(folder).from_config(load_config(folder))


def too_big(needed: int, memory: int | None) -> str | None:
    """Why a model that needs so many bytes is not loaded, or None."""
    from .scoring import free_memory

    free = memory if memory is not None else free_memory()
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def check_door(folder: Path, anatomy: Anatomy, base: str | Path | None) -> list[Item]:
    """Load and generate in a fresh process with stock Transformers, and compare logits with the base there."""
    import torch

    layer, longest = anatomy.layers[0], getattr(anatomy.config, "max_position_embeddings", None) or PROBE_LENGTH
    length = min(PROBE_LENGTH + layer.sinks + layer.streaming_window, longest - GENERATED)  # beyond the window
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(anatomy.config.vocab_size, (1, length), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as scratch:

        def job(path, name: str, **door) -> dict:
            return (
                {"folder": str(path), "tokens": tokens, "generate": GENERATED}
                | door
                | {"logits": os.path.join(scratch, name)}
            )

        jobs = [job(folder, "new", trust=anatomy.surgical)]
        if base is not None:
            jobs.append(job(base, "base"))
        results = run_doors(jobs)
        items = _door_items(results[0], anatomy.surgical)
        if anatomy.surgical:
            package = job(folder, "package", package=str(Path(__file__).parents[1]))
            items.append(_same([*run_doors([package]), results[0]], [package["logits"], jobs[0]["logits"]]))
        if base is not None:
            items.append(_compare(results, [job["logits"] for job in jobs]))
    return items


def run_doors(jobs: list[dict]) -> list[dict]:
    """Run `door.py` on a list of jobs in one fresh process, models one after the other."""
    env = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("door.py"))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=env,
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lost = {"error": f"the process ended with {done.returncode}: {done.stderr.strip()[-500:]}"}
    return results + [lost] * (len(jobs) - len(results))


def _door_items(result: dict, surgical: bool) -> list[Item]:
    name = "loads with trust_remote_code" if surgical else "loads with stock Transformers"
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
    if errors := [result["error"] for result in results if "error" in result]:
        return Item(name, NOT_RUN, errors[0])
    new, old = (torch.load(file, weights_only=True).double() for file in files)
    if new.shape != old.shape:
        return Item(name, FAILED, f"shapes differ: {list(new.shape)}, base {list(old.shape)}")
    difference, scale = (new - old).abs().max().item(), old.std().item()
    # A number to read, not a fault: what difference is too much is the gate's business. NaN is a fault.
    status = PASSED if math.isfinite(difference) else FAILED
    return Item(name, status, f"largest difference {difference:.3g} (base's spread {scale:.3g}), random tokens")


def check_layers(folder: Path, anatomy: Anatomy, checkpoint: Checkpoint) -> Item:
    """Run every attention layer alone, one in memory at a time, on random input: the forward accepts its weights."""
    import inspect

    import torch

    name = "layers one by one"
    try:
        model = empty_model(folder)
        memory_path = anatomy.layers[0].layout.layers
        if anatomy.composite:
            memory_path = "model.language_model.layers"
        owner = model.get_submodule(memory_path.rpartition(".")[0])
        rotary = type(owner.rotary_emb)(anatomy.config) if hasattr(owner, "rotary_emb") else None
        for layer in anatomy.layers:
            module = model.get_submodule(f"{memory_path}.{layer.index}.{layer.layout.attn}")
            accepted = inspect.signature(module.forward).parameters
            if rotary is None or "position_embeddings" not in accepted:
                return Item(name, NOT_RUN, f"{anatomy.model_type}'s attention does not run on its own")
            module.to_empty(device="cpu")
            prefix = f"{layer.path}."
            state = {n[len(prefix) :]: checkpoint.read(n) for n in checkpoint.tensors if n.startswith(prefix)}
            module.load_state_dict(state)
            dtype = next(module.parameters()).dtype
            module.to(torch.float32)
            x = torch.randn(1, 16, anatomy.config.hidden_size, generator=torch.Generator().manual_seed(layer.index))
            kinds = getattr(anatomy.config, "layer_types", None)
            extra = [kinds[layer.index]] if "layer_type" in inspect.signature(rotary.forward).parameters else []
            embeddings = rotary(x, torch.arange(16)[None], *extra)
            with torch.no_grad():
                out = module(hidden_states=x, position_embeddings=embeddings, attention_mask=None)[0]
            if not out.isfinite().all():
                return Item(name, FAILED, f"layer {layer.index} gives NaN or infinite values")
            module.to("meta")
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        return Item(name, FAILED, f"{type(error).__name__}: {error}"[:500])
    return Item(name, PASSED, f"{len(anatomy.layers)} attention layers run in fp32 (stored as {dtype})")
