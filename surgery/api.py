"""The public API: the command line calls it, and so may a fine-tuning script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.options import RunOptions
from surgery.config.overrides import as_text
from surgery.conversion.fit import fits
from surgery.conversion.plan import Plan, make_plan
from surgery.errors import CheckError, SurgeryError, shown
from surgery.io.safetensors import header_table
from surgery.machine.device import made_on_cpu
from surgery.machine.progress import Progress
from surgery.report.report import FILE as REPORT
from surgery.report.report import Report

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from surgery.config.heal import Heal
    from surgery.evaluation.probes.base import Probe, Result
    from surgery.healing.plan import HealPlan

    AnyModel = str | Path | PreTrainedModel  # a folder, a name or a Hub id, or a loaded model
    AnyRecipe = str | Path | dict[str, Any] | recipes.Recipe  # a name, a path, plain data, or a recipe


def plan(recipe: AnyRecipe, model: AnyModel, *, overrides: Sequence[str] = (), **fields: Any) -> Plan:
    """Work out what a recipe would do; no weight is read.

    Args:
        recipe: name, path or data of a recipe.
        model: a folder, `smollm2-135m`, a Hub id (`org/name@revision`), or a loaded model.
        overrides: "key=value" texts; `fields` are the same as keywords (`kv_heads=1`).

    Raises:
        SurgeryError: with all faults of the recipe, or all reasons why it does not fit this model.
    """
    resolved = recipes.load(recipe, _texts(overrides), **fields)
    if not isinstance(model, str | Path):
        return make_plan(resolved, anatomy_of(model), type(model).__name__)
    from surgery.io.hub import resolve

    source = resolve(str(model), weights=False)
    return make_plan(resolved, Anatomy.of(source.path, header_table(source.headers)), source.name, source.path)


def anatomy_of(model: AnyModel | PretrainedConfig) -> Anatomy:
    """The anatomy of a folder, a name, a Hub id, a loaded model or a config; no weight is read."""
    if not isinstance(model, str | Path):
        if not hasattr(model, "config") and not hasattr(model, "get_text_config"):
            raise _no_model(model)
        return Anatomy.of(model)
    from surgery.io.hub import resolve

    source = resolve(str(model), weights=False)
    return Anatomy.of(source.path, header_table(source.headers))


def fitting_recipes(anatomy: Anatomy) -> dict[str, list[str]]:
    """Shipped recipe -> why it cannot be applied to such a model (empty: it can)."""
    return {fit.entry.name: list(fit.problems) for fit in fits(anatomy)}


@made_on_cpu()
def apply(
    recipe: AnyRecipe,
    model: AnyModel,
    *,
    output: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overrides: Sequence[str] = (),
    engine: str = "auto",
    check: bool = True,
    evaluate: bool = True,
    gate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    **fields: Any,
) -> Report:
    """Carry out a recipe.

    A loaded model is edited in place (parameters are replaced: make the optimiser afterwards) and nothing is
    written; `surgery.save(model, folder, report)` does that. A name or folder is converted into `output`, checked
    in a fresh process, scored against the base, and documented.

    Args:
        recipe, model, overrides, fields: as for `plan`.
        output: the folder to make; needed for a name or folder, not allowed for a loaded model.
        tokenizer: of a loaded model, for operations that measure it.
        engine: "streaming" (layer by layer, no model is built), "loaded", or "auto" (streaming where it can). This,
            resume, overwrite and allow_pickle apply to conversion into a folder, and are refused for a loaded model.
        check, evaluate, gate: what is done with the result; a skipped gate is recorded as skipped.
        resume, overwrite: what to do with an unfinished or finished earlier output.
        allow_pickle: read .bin weights (with `weights_only=True`).
        progress: called with done, total and a label.
        on_plan: called with the plan before anything is done.

    Returns:
        The report. `report.gate` says whether the recipe's gate was passed; `report.data["check"]` what was checked.
        None only where a recipe heals in several processes (accelerate launch), in all but the first.

    Raises:
        SurgeryError: the recipe or the model is at fault; nothing was changed or written.
        MachineError: disk, permission, network; `resume=True` goes on.
    """
    from surgery import pipeline

    _refuse_no_path("output", output)
    _refuse_no_tokenizer(tokenizer)
    _refuse_no_function(progress=progress, on_plan=on_plan)
    resolved = recipes.load(recipe, _texts(overrides), **fields)
    options = RunOptions(check, evaluate, gate, resume, overwrite, allow_pickle, engine, progress, on_plan)
    if isinstance(model, str | Path):
        return cast("Report", pipeline.apply_to_folder(resolved, str(model), output, options))
    settings = {"output": output, "resume": resume, "overwrite": overwrite, "allow_pickle": allow_pickle}
    _refuse_folder_settings("edited", **settings, engine=engine == "streaming")
    _refuse_no_model(model)
    return pipeline.apply_in_memory(resolved, model, tokenizer, options)


@made_on_cpu()
def heal(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    output: str | Path | None = None,
    settings: Heal | dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    check: bool = True,
    evaluate: bool = True,
    gate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[HealPlan], None] | None = None,
    **fields: Any,
) -> Report:
    """Train a converted model, and say how much of the damage came back.

    A folder that `surgery.apply` wrote becomes a new folder, `output`: checked, compared with base and converted model
    on the text of its recipe, and documented. A model in memory is trained in place; `surgery.save` writes it. If that
    fails it is left as it was: main memory holds a copy of what trains and of what updates are merged into.

    Args:
        model: the folder, or a model that `surgery.apply` edited.
        base: what it was made from: folder, name or Hub id, or of a loaded model a loaded one (which is left frozen);
            default what its record names.
        settings: as the `heal:` block of a recipe; default the block of its own recipe.
        overrides: "key=value" texts; `fields` are the same as keywords (`method="full", tokens=1e6`).
        tokenizer: of a model in memory.
        check, evaluate, gate: what is done with the result.
        resume: continue from the last complete checkpoint of an unfinished run of the same settings, data and models.
        overwrite: replace OUT, and start an unfinished run again; text that the base wrote for it is used.
        progress, on_plan: as for `apply`; `on_plan` gets what will train.

    Returns:
        The report; None in all processes but the first, where several train.

    Raises:
        SurgeryError: settings, data or models are at fault.
        TrainingError: it cannot go on (NaN, other data than before); checkpoints are kept.
        MachineError: disk or memory; `resume=True` goes on.
    """
    from surgery import pipeline
    from surgery.healing.heal import heal_model

    _refuse_no_path("output", output)
    _refuse_no_tokenizer(tokenizer)
    _refuse_no_base(base)
    options = RunOptions(check, evaluate, gate, resume, overwrite, progress=progress, on_plan=on_plan)
    _refuse_no_function(progress=progress, on_plan=on_plan)
    typed = [*_texts(overrides), *(as_text(key, value) for key, value in fields.items())]
    if not isinstance(model, str | Path):
        _refuse_folder_settings("healed", output=output, resume=resume, overwrite=overwrite)
        return heal_model(model, base, settings, typed, tokenizer, options)
    return cast("Report", pipeline.heal_to_folder(model, _base_on_disk(base), output, settings, typed, options))


@made_on_cpu()
def check(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a saved checkpoint and record the result in its surgery.json and card.

    Args:
        folder: a folder that surgery wrote.
        base: model it was made from; adds the difference of the logits.
        memory: bytes that may be used (default: what is free); what does not fit is recorded as not run.

    Returns:
        The report; `report.data["check"]` has `passed` and the `items`.
    """
    from surgery.evaluation.check import check_report

    _refuse_no_path("folder", folder, needed=True)
    _refuse_no_function(progress=progress)
    try:
        report = Report.of(folder)
    except SurgeryError as error:
        if not (Path(folder) / REPORT).is_file():
            raise
        raise CheckError(error.what, where=error.where, exists=error.exists, fix=error.fix) from None  # damaged
    check_report(report, None if base is None else _folder(base), memory=memory, progress=progress)
    report.save()
    return report


@made_on_cpu()
def evaluate(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    probe: str | Probe | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Measure a model, by itself or compared with its base.

    Args:
        model, base: folder, name or loaded model (then with `tokenizer`).
        probe: what is measured: a name of `surgery.evaluation.probes`. The default is the one that every recipe is
            judged by: perplexity, KL to the base, top-1 agreement, KV bytes and load size.
        settings: of the probe, as in `surgery eval --probe NAME key=value` (text, windows and length of the default
            one: "builtin" or a text file, and how much of it is scored).
        progress: called with done, total and a label.

    A checkpoint of ours that was not scored yet (`--no-eval`) keeps the result of the default probe in its
    surgery.json and card, and the gate is compared with it, if text and base are those that its recipe and record
    name. Where it is not recorded, a note of the result says why.

    Returns:
        The probe's result: `status`, `notes`, `to_dict()`, and figures of its own.

    Raises:
        SurgeryError: no such probe, bad settings, or models that cannot be measured so.
    """
    from surgery.evaluation import probes
    from surgery.evaluation.probes.base import Probe
    from surgery.evaluation.probes.settings import make
    from surgery.report.lineage import KEPT, unrecordable

    if model is None:
        raise _no_model(model)
    _refuse_no_tokenizer(tokenizer)
    _refuse_no_function(progress=progress)
    if isinstance(probe, Probe) and settings:
        raise SurgeryError(f"this probe has its settings already: {', '.join(settings)}", fix="give its name instead")
    chosen = probe if isinstance(probe, Probe) else make(probe or probes.main().name, settings)
    out: Any = _folder_of(model)
    result = chosen.measure(out, _folder_of(base), tokenizer=tokenizer, progress=progress)
    if chosen.main and isinstance(out, Path) and base is not None and (out / REPORT).is_file():
        report = Report.of(out)
        recipe = recipes.recorded(report.data)
        if recipe and (short := recipe.too_short(chosen.length, "windows", "length")):
            result.notes.append(short)
        if reason := unrecordable(report.data, base, chosen):
            result.notes.append(f"not added to the card{', ' if reason == KEPT else ': '}{reason}")
        else:
            report.record_evaluation(result.to_dict())
            report.save()
    return result


def evaluate_needles(model: AnyModel, base: AnyModel | None = None, **settings: Any) -> Result:
    """Which hidden secrets a model finds, compared with its base if given: `evaluate(..., probe="needles")`."""
    return evaluate(model, base, probe="needles", **settings)


def evaluate_choices(model: AnyModel, base: AnyModel | None = None, **settings: Any) -> Result:
    """Which of several answers a model chooses, compared with its base if given: `evaluate(..., probe="choices")`."""
    return evaluate(model, base, probe="choices", **settings)


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A saved checkpoint as a Transformers model, in the dtype of the file unless `dtype=` says otherwise."""
    from surgery.io.loading import load_model

    _refuse_no_path("folder", folder, needed=True)
    return load_model(_folder(folder), **kwargs)


def save(
    model: PreTrainedModel,
    folder: str | Path,
    report: Report,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Report:
    """Save a model that `apply` edited in memory, with its report and card; as atomic as `apply` with an output.

    Licence, notices and card of the base travel along if the model was loaded from a folder that has them.

    Returns:
        The report, now of the folder.

    Raises:
        SurgeryError: the report is plainly of another model (class, family, layers or heads differ).
    """
    from surgery.conversion.in_memory import save_model

    _refuse_no_path("folder", folder, needed=True)
    _refuse_no_tokenizer(tokenizer)
    return save_model(model, folder, report, tokenizer=tokenizer, overwrite=overwrite)


def push(
    folder: str | Path, repo: str, *, public: bool = False, dry_run: bool = False, **kwargs: Any
) -> dict[str, Any]:
    """Put a checked checkpoint on the Hub: private unless `public`, one commit, resumable by repeating it."""
    from surgery.io.hub import push as send

    _refuse_no_path("folder", folder, needed=True)
    return send(folder, repo, public=public, dry_run=dry_run, **kwargs)


def _refuse_folder_settings(done: str, **settings: object) -> None:
    if names := [name for name, value in settings.items() if value]:
        raise SurgeryError(
            f"{', '.join(names)}: for a name or folder, and this is a loaded model, which is {done} in place",
            fix="leave it out, and surgery.save(model, folder, report) afterwards; or give the model's folder",
        )


def _refuse_no_path(name: str, value: object, needed: bool = False) -> None:
    if not isinstance(value, str | Path) and (needed or value is not None):
        raise SurgeryError(f"{shown(value)} is not a path", where=name, fix="give a text or a pathlib.Path")


def _refuse_no_tokenizer(tokenizer: object) -> None:
    if tokenizer is not None and not callable(tokenizer):
        fix = "give a loaded one: transformers.AutoTokenizer.from_pretrained(MODEL)"
        raise SurgeryError(f"{shown(tokenizer)} is not a tokenizer", where="tokenizer", fix=fix)


def _refuse_no_function(**callbacks: object) -> None:
    for name, value in callbacks.items():
        if value is not None and not callable(value):
            raise SurgeryError(f"{shown(value)} is not a function", where=name, fix="give one that can be called")


def _texts(overrides: Any) -> tuple[str, ...]:
    """Overrides, each of them a text."""
    if isinstance(overrides, str):
        what = f"{shown(overrides)} is one text, and a list of them is wanted"
        raise SurgeryError(what, where="overrides", fix=f"write overrides=[{shown(overrides)}]")
    listed = isinstance(overrides, Iterable) and not isinstance(overrides, bytes)
    texts: tuple[Any, ...] = tuple(overrides) if listed else (overrides,)
    if wrong := [each for each in texts if not isinstance(each, str)]:
        raise SurgeryError(f"{shown(wrong[0])} is not a text", where="overrides", fix='write overrides=["key=value"]')
    return texts


def _refuse_no_model(model: object) -> None:
    from surgery.io.loading import is_model

    if not is_model(model):
        raise _no_model(model)


def _refuse_no_base(base: object) -> None:
    if base is not None and not isinstance(base, str | Path):
        _refuse_no_model(base)


def _base_on_disk(base: AnyModel | None) -> str | Path | None:
    if base is None or isinstance(base, str | Path):
        return base
    raise SurgeryError(
        f"base is a loaded {type(base).__name__}, and a folder is healed beside a base on disk",
        fix="name its folder or Hub id; or load the model too: surgery.load(folder)",
    )


def _no_model(model: object) -> SurgeryError:
    kind = "None" if model is None else type(model).__name__
    fix = "give a folder, a Hub id, smollm2-135m, or a model loaded with from_pretrained"
    return SurgeryError(f"{kind} is not a model", fix=fix)


def _folder_of(model: Any) -> Any:
    """A folder for a name; a loaded model as it is."""
    if isinstance(model, str | Path):
        return _folder(model)
    if model is not None and not hasattr(model, "config"):
        raise _no_model(model)
    return model


def _folder(model: str | Path) -> Path:
    """The folder of a name."""
    from surgery.io.hub import resolve

    return resolve(str(model)).path
