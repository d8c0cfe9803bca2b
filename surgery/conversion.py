"""Carrying a plan out: from a model folder to a converted folder with either engine, or on a model in memory."""

from __future__ import annotations

import json
from pathlib import Path

from .anatomy import Anatomy
from .checkpoint import Checkpoint
from .engines import LayerStream
from .errors import SurgeryError
from .folder import read_json
from .operation import Context
from .output import OutputFolder, carry_files, weight_files, write_text
from .pickled import readable
from .planning import Plan, make_plan
from .report import Report, history_of, new_report
from .shards import convert_shards


def convert(
    recipe,
    model: str,
    output: str | Path,
    *,
    overrides=(),
    engine="auto",
    resume=False,
    overwrite=False,
    allow_pickle=False,
    progress=None,
    on_plan=None,
    refuse=None,
) -> tuple[Report, Path]:
    """Write the converted checkpoint; arguments as for `surgery.apply`.

    Args:
        refuse: called with the base's folder before anything is written; may raise.

    Returns:
        The report, saved with the folder, and the base's folder.
    """
    from .hub import resolve

    source = resolve(model)
    base = source.path
    read_json(base / "config.json")  # before any weight: the plainest mistakes get the plainest errors
    with readable(base, output, allow_pickle) as weights:
        checkpoint = Checkpoint(weights)
        anatomy = Anatomy.of(base, {n: (i.dtype, i.shape) for n, i in checkpoint.tensors.items()})
        plan = make_plan(recipe, anatomy, source.name)
        streaming = plan.streams if engine == "auto" else engine == "streaming"
        if streaming and not plan.streams:
            raise SurgeryError("an operation of this recipe needs the loaded engine", fix="leave --engine out")
        if on_plan:
            on_plan(plan)
        if refuse:
            refuse(base)
        fingerprint = checkpoint.fingerprint()
        out = OutputFolder(
            output, base, plan.hash(fingerprint + ("" if streaming else "loaded")), resume=resume, overwrite=overwrite
        )
        with out.opened(plan.output_bytes) as partial:
            write = _stream if streaming else _load_and_write
            files, records = write(plan, checkpoint, base, partial, out, progress)
            left = carry_files(base, partial, {shard.file for shard in checkpoint.shards})
            data = new_report(
                plan,
                source,
                overrides=overrides,
                engine="streaming" if streaming else "loaded",
                fingerprint=fingerprint,
                records=records,
            )
            Report(data | {"files": files, "left_behind": left, "history": history_of(base)}, partial).save()
    return Report.of(out.out), base


def edit_model(recipe, model, overrides=(), progress=None, on_plan=None, tokenizer=None) -> Report:
    """Carry out a recipe on a loaded model, in place; arguments as for `surgery.apply`."""
    from .hub import Source

    refuse_wrapped(model)
    plan = make_plan(recipe, Anatomy.of(model), type(model).__name__)
    if on_plan:
        on_plan(plan)
    records = [
        step.operation.apply(model, Context(step.change, step.before, progress, tokenizer)) for step in plan.steps
    ]
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    local = Path(name).exists()
    hub_id = name if name.count("/") == 1 and not local else None
    source = Source(Path(), Path(name).name if local else name, hub_id=hub_id, base_model=hub_id)
    return Report(new_report(plan, source, overrides=overrides, engine="loaded", fingerprint="", records=records))


def refuse_wrapped(model) -> None:
    """Only a plain Transformers model can be edited: not one with adapters, compiled, wrapped or offloaded."""
    adapters = hasattr(model, "peft_config") or any(
        type(module).__module__.startswith("peft.") for module in model.modules()
    )
    if adapters:
        raise SurgeryError(
            "the model carries adapters, which would no longer fit the new weights",
            where=type(model).__name__,
            fix="merge them first: model = model.merge_and_unload()",
        )
    if not hasattr(model, "config") or hasattr(model, "_orig_mod"):
        raise SurgeryError(
            "this is not a plain Transformers model",
            where=type(model).__name__,
            fix="pass the model inside the wrapper",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SurgeryError(
            "some weights are not in memory (offloaded, or never loaded)",
            where=type(model).__name__,
            fix="load the model without device_map, or convert the folder: surgery.apply(recipe, folder, output=...)",
        )


def _stream(plan: Plan, checkpoint: Checkpoint, base: Path, partial: Path, out: OutputFolder, progress):
    stream = LayerStream(plan, checkpoint, out.records)

    def finished(file: str, facts: dict) -> None:
        out.finished(file, facts, stream.records)

    files = convert_shards(checkpoint, plan, stream, partial, out.done, finished, progress)
    _write_config(base, partial, plan)
    return files, stream.records


def _load_and_write(plan: Plan, checkpoint: Checkpoint, base: Path, partial: Path, out: OutputFolder, progress):
    from .api import load
    from .scoring import read_tokenizer

    model = load(base)
    tokenizer = None if plan.streams else read_tokenizer(base)
    records = [
        step.operation.apply(model, Context(change, before, progress, tokenizer))
        for step, before, change in _steps_in_memory(plan, model)
    ]
    model.save_pretrained(partial)
    return weight_files(partial), records


def _steps_in_memory(plan: Plan, model):
    """The plan's steps with the names that tensors have in memory, which differ from those on disk."""
    current = Anatomy.of(model)
    for step in plan.steps:
        change = step.operation.plan(current)
        yield step, current, change
        current = change.after


def _write_config(base: Path, partial: Path, plan: Plan) -> None:
    raw = plan.after.edit_config(read_json(base / "config.json"))
    write_text(partial / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
