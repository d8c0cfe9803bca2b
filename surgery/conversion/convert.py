"""Carrying a plan out: from a model folder to a converted folder with either engine, or on a model in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from surgery.architecture.anatomy import Anatomy, stored_dtypes
from surgery.architecture.surgery_block import export, layer_entries
from surgery.conversion.plan import Plan, Step, make_plan, problems_after
from surgery.conversion.streaming import LayerStream, convert_shards
from surgery.errors import SurgeryError
from surgery.io.files import read_json, write_text
from surgery.io.loading import refuse_wrapped
from surgery.io.model_folder import carry_files
from surgery.io.output_folder import OutputFolder, weight_files
from surgery.io.pickle import readable
from surgery.io.resume import SUFFIX
from surgery.io.safetensors import TORCH_NAMES, WEIGHT_INDEX, Checkpoint, header_table
from surgery.operations.base import ApplyContext
from surgery.operations.rewrite import rewrite_steps
from surgery.report.report import Report, history_of, new_report


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
    source = _source(recipe, model, engine, on_plan, refuse)
    base = source.path
    with readable(base, output, allow_pickle) as weights:
        checkpoint = Checkpoint(weights)
        anatomy = Anatomy.of(base, {n: (i.dtype, i.shape) for n, i in checkpoint.tensors.items()})
        plan = make_plan(recipe, anatomy, source.name)
        streaming = streams(plan, engine)
        if source.headers is None:  # of a model that had to be fetched, this was done before that
            _announce(plan, base, on_plan, refuse)
        fingerprint = checkpoint.fingerprint()
        plan_hash = plan.hash(fingerprint + ("" if streaming else "loaded"))
        out = OutputFolder(output, base, plan_hash, resume=resume, overwrite=overwrite)
        if resume and not overwrite and out.is_same_conversion():  # stopped while it was checked or scored
            return Report.of(out.out), base
        with out.opened(plan.output_bytes) as partial:
            write = _stream if streaming else _load_and_write
            files, records = write(plan, checkpoint, base, partial, out, progress)
            read = {shard.file for shard in checkpoint.shards} | ({WEIGHT_INDEX} if checkpoint.index else set())
            left = carry_files(base, partial, read)
            data = new_report(
                plan,
                source,
                overrides=overrides,
                engine="streaming" if streaming else "loaded",
                fingerprint=fingerprint,
                records=records,
            )
            data |= {"plan_hash": plan_hash, "files": files, "left_behind": left, "history": history_of(base)}
            for state in partial.glob(f"*{SUFFIX}"):  # of measurements, which are in the records now
                state.unlink()
            Report(data, partial).save()
    return Report.of(out.out), base


def _source(recipe, model: str, engine: str, on_plan, refuse):
    """The base on this machine; one that must be fetched is planned first, so that what is refused costs no download.

    Returns:
        The `hub.Source`; its `headers` say that the plan was made and announced from them.
    """
    from surgery.io.hub import resolve

    source = resolve(model, weights=False)
    read_json(source.path / "config.json")  # before any weight: the plainest mistakes get the plainest errors
    if source.headers is None:
        return source
    plan = make_plan(recipe, Anatomy.of(source.path, header_table(source.headers)), source.name)
    streams(plan, engine)
    _announce(plan, source.path, on_plan, refuse)
    fetched = resolve(f"{source.hub_id}@{source.revision}")  # the commit that was planned, if the branch has moved
    return replace(fetched, name=source.name, headers=source.headers)


def _announce(plan: Plan, base: Path, on_plan, refuse) -> None:
    if on_plan:
        on_plan(plan)
    if refuse:
        refuse(base)


def streams(plan: Plan, engine: str) -> bool:
    """Whether the streaming engine converts; refuses an engine that cannot, or that would change a dtype."""
    streaming = plan.streams if engine == "auto" else engine == "streaming"
    if streaming and not plan.streams:
        raise SurgeryError("an operation of this recipe needs the loaded engine", fix="leave --engine out")
    dtypes = stored_dtypes(plan.before)
    if not streaming and len(dtypes) > 1:
        raise SurgeryError(
            f"the loaded engine would store all weights in one dtype, and this checkpoint has {', '.join(dtypes)}",
            where=plan.source,
            fix="use the streaming engine (leave --engine out)"
            if plan.streams
            else "this recipe needs the loaded engine: store the model in one dtype first "
            "(from_pretrained(..., dtype=...), save_pretrained)",
        )
    return streaming


def edit_model(recipe, model, overrides=(), progress=None, on_plan=None, tokenizer=None) -> Report:
    """Carry out a recipe on a loaded model, in place; arguments as for `surgery.apply`.

    An error leaves the model as it was, with one exception: where a surgical operation (which measures the model as
    the weight rewrites before it left it) raises, those rewrites stay.
    """
    from surgery.io.hub import Source

    refuse_wrapped(model)
    plan = make_plan(recipe, Anatomy.of(model), type(model).__name__)
    if on_plan:
        on_plan(plan)
    steps = [(step.operation, ApplyContext(step.change, step.before, progress, tokenizer)) for step in plan.steps]
    together = list(takewhile(lambda step: step[0].streams, steps))
    records = rewrite_steps(model, together) if together else []
    if rest := plan.steps[len(together) :]:
        for operation, context in _in_turn(rest, rest[0].before, model, progress, tokenizer):
            records.append(operation.apply(model, context))
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    local = Path(name).exists()
    hub_id = name if name.count("/") == 1 and not local else None
    source = Source(Path(), Path(name).name if local else name, hub_id=hub_id, base_model=hub_id)
    return Report(new_report(plan, source, overrides=overrides, engine="loaded", fingerprint="", records=records))


def _stream(plan: Plan, checkpoint: Checkpoint, base: Path, partial: Path, out: OutputFolder, progress):
    stream = LayerStream(plan, checkpoint, out.records)

    def finished(file: str, facts: dict) -> None:
        out.finished(file, facts, stream.records)

    files = convert_shards(checkpoint, plan, stream, partial, out.done, finished, progress)
    _write_config(base, partial, plan)
    return files, stream.records


def _load_and_write(plan: Plan, checkpoint: Checkpoint, base: Path, partial: Path, out: OutputFolder, progress):
    import torch

    from surgery.io.loading import load_model, read_tokenizer
    from surgery.machine.transformers_logging import quiet_in_pipes

    dtype = getattr(torch, TORCH_NAMES[stored_dtypes(plan.before)[0]])  # config.json may name another
    model = load_model(base, allow_pickle=checkpoint.folder != base, dtype=dtype)  # else it is in safetensors already
    tokenizer = None if plan.streams else read_tokenizer(base)
    records = [
        operation.apply(model, context)
        for operation, context in _in_turn(plan.steps, Anatomy.of(model), model, progress, tokenizer, partial)
    ]
    with quiet_in_pipes():
        model.save_pretrained(partial)
    return weight_files(partial), records


def _in_turn(steps: tuple[Step, ...], current: Anatomy, model, progress, tokenizer, folder: Path | None = None):
    """Operations with their context, made when those before it were carried out.

    Args:
        current: of the model in memory, whose tensors may have other names than those on disk.

    Raises:
        SurgeryError: an operation does not fit what one before it left, which was known only when that had measured.
    """
    for number, step in enumerate(steps):
        if problems := step.operation.problems(current):
            raise SurgeryError(problems[0], where=type(model).__name__)
        change = step.operation.plan(current)
        context = ApplyContext(change, current, progress, tokenizer, folder=folder, number=number)
        yield step.operation, context
        measured = Anatomy.of(model) if context.change.measured else context.change.after
        current = context.after or measured
        if problems := problems_after(steps[:number], current):
            raise SurgeryError(problems[0], where=type(model).__name__)


def _write_config(base: Path, partial: Path, plan: Plan) -> None:
    raw = plan.after.edit_config(read_json(base / "config.json"))
    names = [{name: plan.shapes[f"{layer.path}.{name}"] for name in layer.tensor_names} for layer in plan.after.layers]
    if entries := layer_entries(plan.after, names):
        raw = export(raw, plan.after, entries, partial)
    write_text(partial / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
