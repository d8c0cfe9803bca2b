"""Carries out a plan: converts a model folder into a new folder with either engine, or edits a model in memory."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy, stored_dtypes
from surgery.architecture.edit import own_config, snapshot
from surgery.architecture.surgery_block import export, layer_entries
from surgery.config.options import RunOptions
from surgery.conversion.estimate import measuring_bytes, use_of
from surgery.conversion.plan import Plan, Step, make_plan, planned_change, problems_after, problems_of
from surgery.conversion.preflight import preflight, unhealed_folder, uses_streaming_engine
from surgery.conversion.streaming import LayerStream, convert_shards
from surgery.errors import RecipeMismatchError, SurgeryError, shown
from surgery.io.earlier_keys import add_earlier_keys, with_earlier_keys
from surgery.io.files import read_json, utf8, write_json, write_text
from surgery.io.model_folder import carry_files, read_config_json, refuse_links_out
from surgery.io.model_in_memory import refuse_wrapped
from surgery.io.output_folder import OutputFolder, output_path, weight_files
from surgery.io.pickle import readable
from surgery.io.resume import SUFFIX
from surgery.io.safetensors import TORCH_NAMES, WEIGHT_INDEX, Checkpoint, header_table
from surgery.machine.placement import AUTO, current, measured_in_place
from surgery.machine.progress import begin
from surgery.operations.base import SURGICAL, ApplyContext
from surgery.operations.rewrite import checked_record, rewrite_steps
from surgery.report.lineage import history_of
from surgery.report.report import MEASURED_IN, Report, new_report

if TYPE_CHECKING:
    from surgery.config.recipe import Recipe
    from surgery.io.hub import ResolvedModel


@dataclass(frozen=True)
class Conversion:
    """A base on this machine and the plan for it, after the preflight.

    Attributes:
        plan: the plan of the whole recipe, including its healing.
        source: the base; `source.path` is its folder.
        checkpoint: the base's weights, in safetensors.
    """

    plan: Plan
    source: ResolvedModel
    checkpoint: Checkpoint


@contextmanager
def prepared(recipe: Recipe, model: str, output: str | Path, options: RunOptions) -> Iterator[Conversion]:
    """Find the base, plan the recipe for it and run the preflight.

    A base that must be downloaded is first planned from its headers, so that a refusal costs no download.
    """
    from surgery.io.hub import resolve

    source = resolve(model, weights=False)
    refuse_links_out(source.path)
    read_config_json(source.path)  # before any weight is read, so that simple mistakes get simple errors
    remote = source.headers is not None
    if remote:
        anatomy = Anatomy.of(source.path, header_table(source.headers))
        plan = _with_base_notes(make_plan(recipe, anatomy, source.name, source.path), _cache_kinds(source.path))
        preflight(plan, source.path, output, options)
        fetched = resolve(f"{source.hub_id}@{source.revision}")  # the planned commit; the branch may have moved
        source = replace(fetched, name=source.name)
    with readable(source.path, output, options.allow_pickle) as weights:
        checkpoint = Checkpoint(weights)
        anatomy = Anatomy.of(source.path, {n: (i.dtype, i.shape) for n, i in checkpoint.tensors.items()})
        plan = _with_base_notes(make_plan(recipe, anatomy, source.name, source.path), _cache_kinds(source.path))
        if not remote:
            preflight(plan, source.path, output, options)
        yield Conversion(plan, source, checkpoint)


def convert(recipe: Recipe, model: str, output: str | Path, options: RunOptions | None = None) -> tuple[Report, Path]:
    """Write the converted checkpoint; arguments as for `surgery.apply`.

    A recipe that heals is planned and preflighted as a whole, but only the model before its healing is written, into
    OUT.unhealed.

    Returns:
        The report, saved in the folder, and the base's folder.
    """
    options = options or RunOptions()
    with prepared(recipe, model, output, options) as work:
        folder = Path(output)
        if recipe.heal is not None:
            folder = unhealed_folder(output_path(output))
            work = replace(work, plan=replace(work.plan, recipe=work.plan.recipe.model_copy(update={"heal": None})))
        return _write(work, folder, options), work.source.path


def _write(work: Conversion, output: Path, options: RunOptions) -> Report:
    plan, checkpoint, base = work.plan, work.checkpoint, work.source.path
    streaming, fingerprint = uses_streaming_engine(plan, options.engine), checkpoint.fingerprint()
    dtype = AUTO if plan.streams else current().dtype  # in which it is measured: no run goes on from one of another
    plan_hash = plan.hash(fingerprint + ("" if streaming else "loaded") + ("" if dtype == AUTO else dtype))
    out = OutputFolder(output, base, plan_hash, resume=options.resume, overwrite=options.overwrite)
    if options.resume and not options.overwrite and out.is_same_conversion():  # it was stopped during check or scores
        return Report.of(out.out)
    with out.opened(plan.output_bytes) as partial:
        write = _convert_streamed if streaming else _convert_loaded
        files, records, measured_in = write(plan, checkpoint, base, partial, out, options.progress)
        read = {shard.file for shard in checkpoint.shards} | ({WEIGHT_INDEX} if checkpoint.index else set())
        left_behind = carry_files(base, partial, read)
        if plan.base_notes:
            _drop_cache_kind(partial)
        data = new_report(
            plan,
            work.source,
            Anatomy.of(partial),
            overrides=plan.recipe.overrides,
            engine="streaming" if streaming else "loaded",
            fingerprint=fingerprint,
            records=records,
        )
        data |= {"plan_hash": plan_hash, "files": files, "left_behind": left_behind, "history": history_of(base)}
        if streaming and current().dtype != AUTO:  # it is scored in this dtype
            measured_in = {"dtype": current().dtype}
        data |= {MEASURED_IN: measured_in} if measured_in else {}
        for state in partial.glob(f"*{SUFFIX}"):  # state of measurements; the records hold their results now
            state.unlink()
        Report(data, partial).save(list_files=True)
    return Report.of(out.out)


def edit_model(recipe: Recipe, model, tokenizer, options: RunOptions) -> Report:
    """Apply a recipe to a loaded model, in place; arguments as for `surgery.apply`.

    An error leaves the model unchanged, with one exception: if an operation raises after another one has rewritten
    weights, that rewrite stays.
    """
    from surgery.io.hub import ResolvedModel

    refuse_wrapped(model)
    own_config(model)
    generation = getattr(model, "generation_config", None)
    kinds = {"generation_config": getattr(generation, "cache_implementation", None)}
    plan = _with_base_notes(make_plan(recipe, Anatomy.of(model), type(model).__name__), kinds)
    if options.on_plan:
        options.on_plan(plan)
    steps = [
        (step.operation, ApplyContext(step.change, step.before, options.progress, tokenizer)) for step in plan.steps
    ]
    rewrites = list(takewhile(lambda step: step[0].streams, steps))
    records = rewrite_steps(model, rewrites) if rewrites else []
    if later_steps := plan.steps[len(rewrites) :]:
        ready_steps = _ready_steps(later_steps, later_steps[0].before, model, options.progress, tokenizer)
        restore = snapshot(model)
        try:
            for operation, context in ready_steps:
                records.append(checked_record(operation, operation.apply(model, context)))
                if operation.term is None:  # it rewrote weights, some of them in place
                    restore = snapshot(model)
        except BaseException:
            restore()
            raise
    if plan.base_notes:
        for key in CACHE_SETTINGS:
            setattr(generation, key, None)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    local = Path(name).exists()
    hub_id = name if name.count("/") == 1 and not local else None
    source = ResolvedModel(Path(), utf8(Path(name).name) if local else name, hub_id=hub_id, base_model=hub_id)
    details = {"overrides": recipe.overrides, "engine": "loaded", "fingerprint": ""}
    return Report(new_report(plan, source, Anatomy.of(model), **details, records=records))


def _convert_streamed(plan: Plan, checkpoint: Checkpoint, base: Path, partial: Path, out: OutputFolder, progress):
    if len(out.records or ()) != len(plan.steps):  # a file counts as finished only with its layers' records
        out.done, out.records = {}, None
    stream = LayerStream(plan, checkpoint, out.records)

    def finished(file: str, info: dict) -> None:
        out.finished(file, info, stream.records)

    files = convert_shards(checkpoint, plan, stream, partial, out.done, finished, progress)
    _remove_weights(partial, files)
    _write_config(base, partial, plan)
    return files, stream.records, {}


def _remove_weights(partial: Path, but: Container[str]) -> None:
    """Remove weight files that an earlier run or somebody else left: they would become part of OUT."""
    for path in partial.rglob("*.safetensors"):
        if path.relative_to(partial).as_posix() not in but:
            path.unlink()


def _convert_loaded(plan: Plan, checkpoint: Checkpoint, base: Path, partial: Path, out: OutputFolder, progress):
    import torch

    from surgery.io.loading import load_model, read_tokenizer
    from surgery.machine.transformers_logging import quiet_transformers

    begin(progress, "loading the model")
    dtype = getattr(torch, TORCH_NAMES[stored_dtypes(plan.before)[0]])  # config.json may name another
    model = load_model(base, allow_pickle=checkpoint.folder != base, dtype=dtype)  # equal: the base is in safetensors
    try:
        tokenizer = None if plan.streams else read_tokenizer(base)
    except SurgeryError as error:  # raised later, and only if an operation needs the tokenizer
        tokenizer = error
    measured = measured_in_place(model, use=use_of(plan), beside=measuring_bytes(plan))
    with nullcontext({}) if plan.streams else measured as measured_in:
        records = [
            checked_record(operation, operation.apply(model, context))
            for operation, context in _ready_steps(plan.steps, Anatomy.of(model), model, progress, tokenizer, partial)
        ]
    begin(progress, "writing")
    _remove_weights(partial, ())
    with quiet_transformers():
        model.save_pretrained(partial)
    add_earlier_keys(partial)
    return weight_files(partial), records, measured_in


class _Context(ApplyContext):
    """The context of an operation. The tokenizer may be an error, which an operation that needs a tokenizer raises."""

    def tokenizer_for(self, what: str, where: str, otherwise: str = ""):
        if isinstance(error := self.tokenizer, SurgeryError):
            fix = f"copy the base's tokenizer files there{otherwise}"
            raise SurgeryError(f"{where}: {what}: {error.what}", where=error.where, fix=fix, code=error.code)
        return super().tokenizer_for(what, where, otherwise)


def _ready_steps(steps: tuple[Step, ...], current: Anatomy, model, progress, tokenizer, folder: Path | None = None):
    """Yield each operation with its context, which is made after the operations before it were carried out.

    Args:
        current: anatomy of the model in memory; its tensors may have other names than those on disk.
        tokenizer: the tokenizer, or the error that reading it raised.

    Raises:
        SurgeryError: an operation does not fit the model that an earlier one left after its measurement.
    """
    for index, step in enumerate(steps):
        if problems := problems_of(step.operation, "problems", current):
            raise RecipeMismatchError(problems[0], where=type(model).__name__)
        change = planned_change(step.operation, current)
        context = _Context(change, current, progress, tokenizer, folder=folder, number=index)
        yield step.operation, context
        measured = Anatomy.of(model) if context.change.measured else context.change.after
        current = context.after or measured
        if problems := problems_after(steps[:index], current):
            raise RecipeMismatchError(problems[0], where=type(model).__name__)


def _write_config(base: Path, partial: Path, plan: Plan) -> None:
    config = plan.after.edit_config(read_json(base / "config.json"))
    for own in ("_name_or_path", "_attn_implementation"):  # from the writing machine; Transformers drops them too
        config.pop(own, None)
    names = [{name: plan.shapes[f"{layer.path}.{name}"] for name in layer.tensor_names} for layer in plan.after.layers]
    if entries := layer_entries(plan.after, names):
        config = export(config, plan.after, entries, partial)
    else:
        config = with_earlier_keys(config)
    write_text(partial / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


# A surgical model generates with its own cache. Of the kinds of cache that a generation config may name, it accepts
# only these (`_prepare_cache_for_generation` in runtime/modeling_surgery.py). Old checkpoints have such settings in
# config.json, and Transformers still reads them there.
CACHES, CACHE_FILES = (None, "dynamic", "offloaded"), ("generation_config.json", "config.json")
CACHE_SETTINGS = ("cache_implementation", "cache_config")


def _cache_kinds(folder: Path) -> dict[str, object]:
    """File -> the kind of cache that it names, or None; files that are not JSON are left out."""
    kinds = {}
    for name in CACHE_FILES:
        with suppress(SurgeryError):
            kinds[name] = read_json(folder / name).get("cache_implementation")
    return kinds


def _with_base_notes(plan: Plan, kinds: dict[str, object]) -> Plan:
    """The plan with a note for each kind of cache that the base names and the result does not accept."""
    notes = (
        f"the base's cache_implementation {shown(kind)} in {name} is left out: a surgical model has a cache of its own"
        for name, kind in kinds.items()
        if plan.tier == SURGICAL and kind not in CACHES
    )
    return replace(plan, base_notes=tuple(notes))


def _drop_cache_kind(folder: Path) -> None:
    """Remove the base's kind of cache from a surgical folder, because the model would refuse to generate with it."""
    for name in [name for name, kind in _cache_kinds(folder).items() if kind not in CACHES]:
        settings = read_json(folder / name)
        for key in CACHE_SETTINGS:
            settings.pop(key, None)
        write_json(folder / name, settings)
