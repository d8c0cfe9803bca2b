"""The public API: the command line calls it, and so may a fine-tuning script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.arguments import (
    no_model,
    refuse_folder_settings,
    refuse_no_base,
    refuse_no_function,
    refuse_no_model,
    refuse_no_path,
    refuse_no_text,
    refuse_no_tokenizer,
    refuse_swapped,
    texts,
)
from surgery.config.options import RunOptions
from surgery.config.overrides import as_text
from surgery.conversion.fit import fits
from surgery.conversion.plan import Plan, make_plan
from surgery.data.text import Text
from surgery.errors import CheckError, SurgeryError, shown
from surgery.evaluation.evaluate import evaluate as evaluate
from surgery.evaluation.evaluate import evaluate_choices as evaluate_choices
from surgery.evaluation.evaluate import evaluate_needles as evaluate_needles
from surgery.io.safetensors import header_table
from surgery.machine.device import made_on_cpu
from surgery.machine.progress import Progress
from surgery.report.report import FILE as REPORT
from surgery.report.report import Report

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from surgery.config.heal import Heal
    from surgery.healing.plan import HealPlan
    from surgery.io.hub import Pushed

    AnyModel = str | Path | PreTrainedModel  # a folder, a name or a Hub id, or a loaded model
    AnyRecipe = str | Path | dict[str, Any] | recipes.Recipe  # a name, a path, plain data, or a recipe
    AnyText = str | Path | Text  # "builtin", a text file, or a text
    AnyTokenizer = PreTrainedTokenizerBase


def plan(recipe: AnyRecipe, model: AnyModel, *, overrides: Sequence[str] = (), **fields: Any) -> Plan:
    """Work out what a recipe would do; no weight is read.

    Args:
        recipe: name, path or data of a recipe.
        model: a folder, `smollm2-135m`, a Hub id (`org/name@revision`), or a loaded model.
        overrides: "key=value" texts; `fields` are the same as keywords (`kv_heads=1`).

    Raises:
        SurgeryError: with all faults of the recipe, or all reasons why it does not fit this model.
    """
    refuse_swapped(recipe, model)
    resolved = recipes.load(recipe, texts(overrides), **fields)
    if not isinstance(model, str | Path):
        return make_plan(resolved, anatomy_of(model), type(model).__name__)
    from surgery.io.hub import resolve

    source = resolve(str(model), weights=False)
    return make_plan(resolved, Anatomy.of(source.path, header_table(source.headers)), source.name, source.path)


def anatomy_of(model: AnyModel | PretrainedConfig) -> Anatomy:
    """The anatomy of a folder, a name, a Hub id, a loaded model or a config; no weight is read."""
    if not isinstance(model, str | Path):
        if not hasattr(model, "config") and not hasattr(model, "get_text_config"):
            raise no_model(model)
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
    tokenizer: AnyTokenizer | None = None,
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
        The report. `report.gate` says whether the recipe's gate was passed, `report.passed` whether the check was.
        None only where a recipe heals in several processes (accelerate launch), in all but the first.

    Raises:
        SurgeryError: the recipe or the model is at fault; nothing was changed or written.
        MachineError: disk, permission, network; `resume=True` goes on.
    """
    from surgery import pipeline

    refuse_swapped(recipe, model)
    refuse_no_path("output", output)
    refuse_no_tokenizer(tokenizer)
    refuse_no_function(progress=progress, on_plan=on_plan)
    resolved = recipes.load(recipe, texts(overrides), **fields)
    options = RunOptions(check, evaluate, gate, resume, overwrite, allow_pickle, engine, progress, on_plan)
    if isinstance(model, str | Path):
        return cast("Report", pipeline.apply_to_folder(resolved, str(model), output, options))
    settings = {"output": output, "resume": resume, "overwrite": overwrite, "allow_pickle": allow_pickle}
    refuse_folder_settings("edited", **settings, engine=engine == "streaming")
    refuse_no_model(model)
    return pipeline.apply_in_memory(resolved, model, tokenizer, options)


@made_on_cpu()
def heal(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    output: str | Path | None = None,
    settings: Heal | dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    tokenizer: AnyTokenizer | None = None,
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

    refuse_no_path("output", output)
    refuse_no_tokenizer(tokenizer)
    refuse_no_base(base)
    options = RunOptions(check, evaluate, gate, resume, overwrite, progress=progress, on_plan=on_plan)
    refuse_no_function(progress=progress, on_plan=on_plan)
    typed = [*texts(overrides), *(as_text(key, value) for key, value in fields.items())]
    if not isinstance(model, str | Path):
        refuse_folder_settings("healed", output=output, resume=resume, overwrite=overwrite)
        refuse_no_model(model)
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
        The report: `passed` and `checks` say what was found.
    """
    from surgery.evaluation.check import check_report

    refuse_no_path("folder", folder, needed=True)
    refuse_no_path("base", base)
    refuse_no_function(progress=progress)
    if memory is not None and (type(memory) is not int or memory < 0):
        raise SurgeryError(f"{shown(memory)} is no number of bytes", where="memory", fix="give a whole number, from 0")
    try:
        report = Report.of(folder)
    except SurgeryError as error:
        if not (Path(folder) / REPORT).is_file():
            raise
        raise CheckError(error.what, where=error.where, exists=error.exists, fix=error.fix) from None  # damaged
    check_report(report, None if base is None else _folder(base), memory=memory, progress=progress)
    report.save()
    return report


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint as a Transformers model, native or surgical, in the dtype of the file.

    Args:
        folder: a folder, `smollm2-135m` (the demo model), or a Hub id (`org/name@revision`).
        kwargs: for `from_pretrained` (`dtype`, `device_map`, ...). No code of the checkpoint is run.

    Raises:
        SurgeryError: no such model, or one that cannot be loaded.
    """
    from surgery.io.loading import load_model

    refuse_no_path("folder", folder, needed=True)
    return load_model(_folder(folder), **kwargs)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; arguments and errors as for `load`, and no weight is fetched."""
    from surgery.io.hub import resolve
    from surgery.io.loading import read_tokenizer

    refuse_no_path("folder", folder, needed=True)
    return cast("PreTrainedTokenizerBase", read_tokenizer(resolve(str(folder), weights=False).path))


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: AnyText = "builtin",
    *,
    part: str = "calibration",
    length: int = 512,
    count: int = 8,
) -> Tensor:
    """Windows of a text as tokens, to try a training or a measurement with: they do not overlap.

    Args:
        tokenizer: of the model.
        text: "builtin" (Python's language reference), the path of a UTF-8 text file, or a `Text`.
        part: of the built-in text: "calibration", or "held-out", which `evaluate` scores.
        length, count: tokens in a window, and windows.

    Returns:
        LongTensor [count, length].

    Raises:
        SurgeryError: the text is missing, no text, or too short.
    """
    from surgery.data.text import load_text, windows

    refuse_no_tokenizer(tokenizer)
    return windows(load_text(text, part=part), tokenizer, length=length, count=count)


def save(
    model: PreTrainedModel,
    folder: str | Path,
    report: Report,
    *,
    tokenizer: AnyTokenizer | None = None,
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

    refuse_no_path("folder", folder, needed=True)
    refuse_no_tokenizer(tokenizer)
    return save_model(model, folder, report, tokenizer=tokenizer, overwrite=overwrite)


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    revision: str | None = None,
) -> Pushed:
    """Put a checked checkpoint on the Hub: private unless `public`, one commit, resumable by repeating it.

    Args:
        folder: a folder that `check` has passed.
        repo: "owner/name", or "name" for your own namespace.
        public: make a new repository public; one that exists stays as it is.
        dry_run: list what would be sent; needs neither token nor network.
        message, revision: of the commit: its message, and the branch (default main; made if missing).

    Raises:
        SurgeryError: not a checked output, or a bad name. MachineError: the network, or no right to write.
    """
    from surgery.io.hub import push as send

    refuse_no_path("folder", folder, needed=True)
    refuse_no_text("repo", repo)
    return send(folder, repo, public=public, dry_run=dry_run, message=message, revision=revision)


def _base_on_disk(base: AnyModel | None) -> str | Path | None:
    if base is None or isinstance(base, str | Path):
        return base
    raise SurgeryError(
        f"base is a loaded {type(base).__name__}, and a folder is healed beside a base on disk",
        fix="name its folder or Hub id; or load the model too: surgery.load(folder)",
    )


def _folder(model: str | Path) -> Path:
    """The folder of a name."""
    from surgery.io.hub import resolve

    return resolve(str(model)).path
