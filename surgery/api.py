"""The public API: what the command line calls, and what a fine-tuning script would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.conversion.plan import Plan, make_plan
from surgery.errors import SurgeryError
from surgery.io.safetensors import header_table
from surgery.machine.progress import Progress
from surgery.report.report import FILE as REPORT
from surgery.report.report import Report

if TYPE_CHECKING:
    from surgery.evaluation.probes.base import Probe, Result


def plan(recipe: str | Path | dict | recipes.Recipe, model, *, overrides: Sequence[str] = (), **fields) -> Plan:
    """Work out what a recipe would do; no weight is read.

    Args:
        recipe: name, path or data of a recipe.
        model: a folder, `smollm2-135m`, a Hub id (`org/name@revision`), or a loaded model.
        overrides: "key=value" texts; `fields` are the same as keywords (`kv_heads=1`).

    Raises:
        SurgeryError: with all faults of the recipe, or all reasons why it does not fit this model.
    """
    resolved = recipes.load(recipe, overrides, **fields)
    if not isinstance(model, str | Path):
        return make_plan(resolved, anatomy_of(model), type(model).__name__)
    from surgery.io.hub import resolve

    source = resolve(str(model), weights=False)
    return make_plan(resolved, Anatomy.of(source.path, header_table(source.headers)), source.name)


def anatomy_of(model) -> Anatomy:
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
    fits = {}
    for name in recipes.shipped():
        try:
            make_plan(recipes.load(name), anatomy, "")
            fits[name] = []
        except SurgeryError as error:
            fits[name] = [fault.what for fault in (error, *error.others)]
    return fits


def apply(
    recipe: str | Path | dict | recipes.Recipe,
    model,
    *,
    output: str | Path | None = None,
    tokenizer=None,
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
    **fields,
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
            resume, overwrite and allow_pickle are of the way from folder to folder, and refused for a loaded model.
        check, evaluate, gate: what is done with the result; a skipped gate is recorded as skipped.
        resume, overwrite: what to do with an unfinished or finished earlier output.
        allow_pickle: read .bin weights (with `weights_only=True`).
        progress: called with done, total and a label.
        on_plan: called with the plan before anything is done.

    Returns:
        The report. `report.gate` says whether the recipe's gate was passed; `report.data["check"]` what was checked.

    Raises:
        SurgeryError: the recipe or the model is at fault; nothing was changed or written.
        MachineError: disk, permission, network; `resume=True` goes on.
    """
    resolved = recipes.load(recipe, overrides, **fields)
    if not isinstance(model, str | Path):
        given = {"output": output, "resume": resume, "overwrite": overwrite, "allow_pickle": allow_pickle}
        _refuse_folder_settings([name for name in given if given[name]] + ["engine"] * (engine == "streaming"))
        return _apply_in_memory(resolved, model, tokenizer, progress, on_plan)
    if output is None:
        raise SurgeryError("no output folder was named", fix="output='out'")
    if engine not in ("auto", "streaming", "loaded"):
        raise SurgeryError(f"unknown engine {engine!r}", exists="auto, streaming, loaded")
    from surgery.conversion.convert import convert
    from surgery.evaluation.run import evaluate_report, refuse_unscorable

    scored = resolved.evaluate if evaluate else None
    refuse = None if scored is None else lambda folder: refuse_unscorable(folder, scored)
    how = {"engine": engine, "resume": resume, "overwrite": overwrite, "allow_pickle": allow_pickle}
    how |= {"progress": progress, "on_plan": on_plan, "refuse": refuse}
    if resolved.heal is not None:
        from surgery.pipeline import apply_and_heal

        return apply_and_heal(resolved, str(model), output, **how, check=check, evaluate=evaluate, gate=gate)
    report, base = convert(resolved, str(model), output, overrides=resolved.overrides, **how)
    if check:
        _check(report, None, progress=progress)
        report.save()
    if scored is not None and (not check or report.data["check"]["passed"]):
        evaluate_report(report, base, scored, progress, allow_pickle)
    if not gate and report.data["gate"]["limits"]:
        report.data["gate"]["status"] = "skipped"
    report.save()
    return report


def check(folder: str | Path, base: str | Path | None = None, *, memory: int | None = None, progress=None) -> Report:
    """Check a saved checkpoint and record the result in its surgery.json and card.

    Args:
        folder: a folder that surgery wrote.
        base: model it was made from; adds the difference of the logits.
        memory: bytes that may be used (default: what is free); what does not fit is recorded as not run.

    Returns:
        The report; `report.data["check"]` has `passed` and the `items`.
    """
    report = Report.of(folder)
    _check(report, _folder_of(base), memory=memory, progress=progress)
    report.save()
    return report


def evaluate(
    model: Any,
    base: Any = None,
    *,
    probe: str | Probe | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Measure a model, alone or against its base.

    Args:
        model, base: folder, name or loaded model (then with `tokenizer`).
        probe: what is measured: a name of `surgery.evaluation.probes`. The default is the one that every recipe is
            judged by: perplexity, KL to the base, top-1 agreement, KV bytes and load size.
        settings: of the probe, as in `surgery eval --probe NAME key=value` (text, windows and length of the default
            one: "builtin" or a text file, and how much of it is scored).
        progress: called with done, total and a label.

    A checkpoint of ours that was not scored yet (`--no-eval`) keeps the result of the default probe in its
    surgery.json and card, and the gate is held against it, if text and base are those that its recipe and record
    name. Where it is not recorded, a note of the result says why.

    Returns:
        The probe's result: `status`, `notes`, `to_dict()`, and figures of its own.

    Raises:
        SurgeryError: no such probe, bad settings, or models that cannot be measured so.
    """
    from surgery.evaluation import probes
    from surgery.evaluation.probes.base import Probe
    from surgery.evaluation.probes.settings import make
    from surgery.report.lineage import unrecordable

    if model is None:
        raise _no_model(model)
    if isinstance(probe, Probe) and settings:
        raise SurgeryError(f"this probe has its settings already: {', '.join(settings)}", fix="give its name instead")
    asked = probe if isinstance(probe, Probe) else make(probe or probes.main().name, settings)
    out: Any = _folder_of(model)
    result = asked.measure(out, _folder_of(base), tokenizer=tokenizer, progress=progress)
    if asked.main and isinstance(out, Path) and base is not None and (out / REPORT).is_file():
        report = Report.of(out)
        if reason := unrecordable(report.data, base, asked):
            result.notes.append(f"not recorded in surgery.json and card: {reason}")
        else:
            report.record_evaluation(result.to_dict())
            report.save()
    return result


def evaluate_needles(model: Any, base: Any = None, **settings: Any) -> Result:
    """Which hidden secrets a model finds, alone or beside its base: `evaluate(..., probe="needles")`."""
    return evaluate(model, base, probe="needles", **settings)


def evaluate_choices(model: Any, base: Any = None, **settings: Any) -> Result:
    """Which of several answers a model chooses, alone or beside its base: `evaluate(..., probe="choices")`."""
    return evaluate(model, base, probe="choices", **settings)


def load(folder: str | Path, **kwargs):
    """A saved checkpoint as a Transformers model, in the dtype of the file unless `dtype=` says otherwise."""
    from surgery.io.loading import load_model

    return load_model(_folder_of(folder), **kwargs)


def save(model, folder: str | Path, report: Report, *, tokenizer=None, overwrite: bool = False) -> Report:
    """Save a model that `apply` edited in memory, with its report and card; as atomic as `apply` with an output.

    Licence, notices and card of the base travel along if the model was loaded from a folder that has them.

    Returns:
        The report, now of the folder.

    Raises:
        SurgeryError: the report is plainly of another model (class, family, layers or heads differ).
    """
    from surgery.conversion.in_memory import save_model

    return save_model(model, folder, report, tokenizer=tokenizer, overwrite=overwrite)


def push(folder: str | Path, repo: str, *, public: bool = False, dry_run: bool = False, **kwargs) -> dict:
    """Put a checked checkpoint on the Hub: private unless `public`, one commit, resumable by repeating it."""
    from surgery.io.hub import push as send

    return send(folder, repo, public=public, dry_run=dry_run, **kwargs)


def _apply_in_memory(recipe: recipes.Recipe, model, tokenizer, progress, on_plan) -> Report:
    from surgery.conversion.convert import edit_model
    from surgery.conversion.in_memory import note_origin
    from surgery.io.loading import is_model

    if not is_model(model):
        raise _no_model(model)
    was, base = type(model).__name__, None
    if recipe.heal is not None:
        from surgery.healing.validate import base_of_memory, refuse_early

        base = base_of_memory(model, recipe.heal)
        if tokenizer is None:
            raise SurgeryError("healing needs the tokenizer", fix="surgery.apply(recipe, model, tokenizer=tokenizer)")
        refuse_early(recipe.heal, model, tokenizer)
    report = edit_model(recipe, model, recipe.overrides, progress, on_plan, tokenizer)
    note_origin(report, model, was)
    if recipe.heal is not None:
        from surgery.healing.heal import heal

        heal(model, base, settings=recipe.heal, tokenizer=tokenizer, progress=progress)
    return report


def _refuse_folder_settings(names: list[str]) -> None:
    if names:
        raise SurgeryError(
            f"{', '.join(names)}: for a name or folder, and this is a loaded model, which is edited in place",
            fix="leave it out, and surgery.save(model, folder, report) afterwards; or give the model's folder",
        )


def _no_model(model) -> SurgeryError:
    kind = "None" if model is None else f"a {type(model).__name__}"
    fix = "give a folder, a Hub id, smollm2-135m, or a model loaded with from_pretrained"
    return SurgeryError(f"{kind} is not a model", fix=fix)


def _folder_of(model):
    """A folder for a name; a loaded model as it is."""
    if not isinstance(model, str | Path):
        if model is not None and not hasattr(model, "config"):
            raise _no_model(model)
        return model
    from surgery.io.hub import resolve

    return resolve(str(model)).path


def _check(report: Report, base: Path | None, memory: int | None = None, progress=None) -> None:
    from surgery.evaluation.check import check_folder, to_dict

    report.data["check"] = to_dict(check_folder(report.folder, base, memory=memory, progress=progress))
