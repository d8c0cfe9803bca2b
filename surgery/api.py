"""The public API. The command line calls it; a fine-tuning script can call it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.arguments import (
    base_on_disk,
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
from surgery.conversion.fit import anatomy_of
from surgery.conversion.plan import Plan, make_plan
from surgery.data.text import Text
from surgery.engines.run import export as export
from surgery.errors import CheckError, SurgeryError, shown
from surgery.evaluation.comparison.run import compare as compare
from surgery.evaluation.evaluate import evaluate as evaluate
from surgery.evaluation.evaluate import evaluate_choices as evaluate_choices
from surgery.evaluation.evaluate import evaluate_needles as evaluate_needles
from surgery.evaluation.run import refuse_unknown_items
from surgery.io.safetensors import header_table
from surgery.machine.placement import Placement, current, placed, refuse_for_loaded
from surgery.machine.progress import Progress
from surgery.report.report import FILE as REPORT
from surgery.report.report import Report
from surgery.search.fit import fit as fit
from surgery.search.sweep import sweep as sweep

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.config.heal import Heal
    from surgery.healing.plan import HealPlan
    from surgery.io.hub import Pushed
    from surgery.report.reproduction import Reproduction

    AnyModel = str | Path | PreTrainedModel  # a folder, a name, a Hub id or a loaded model
    AnyRecipe = str | Path | dict[str, Any] | recipes.Recipe  # a name, a path, plain data, or a `Recipe`
    AnyText = str | Path | Text  # "builtin", a text file, or a text
    AnyTokenizer = PreTrainedTokenizerBase


@placed
def plan(
    recipe: AnyRecipe,
    model: AnyModel,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    **fields: Any,
) -> Plan:
    """Work out what a recipe would do. No weight is read.

    Args:
        recipe: name, path or data of a recipe.
        model: a folder, `smollm2-135m`, a Hub id (`org/name@revision`), or a loaded model.
        overrides: changes to the recipe as "key=value" texts.
        device, dtype: as for `apply`; the plan's estimate is for them.
        fields: changes to the recipe as keywords (`kv_heads=1`).

    Raises:
        SurgeryError: the recipe is at fault, or it does not fit this model; the error lists every reason.
        MachineError: the device that was named is not there, or has no room.
    """
    refuse_swapped(recipe, model)
    resolved = recipes.load(recipe, texts(overrides), **fields)
    if resolved.evaluate is not None:
        refuse_unknown_items(resolved.evaluate.asked, resolved.evaluate.limits)
    if not isinstance(model, str | Path):
        refuse_for_loaded()
        return make_plan(resolved, anatomy_of(model), type(model).__name__)
    from surgery.io.hub import resolve

    source = resolve(str(model), weights=False)
    made = make_plan(resolved, Anatomy.of(source.path, header_table(source.headers)), source.name, source.path)
    if made.before.tensors and current() != Placement():
        made.estimate  # noqa: B018 - it is kept, and after this call the device is no longer known
    return made


@placed
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
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    **fields: Any,
) -> Report:
    """Apply a recipe to a model.

    A loaded model is edited in place and nothing is written; `surgery.save(model, folder, report)` writes it. The
    edit replaces parameters, so make the optimiser afterwards. A model given as a name or folder is converted into
    `output`. The new folder is checked in a fresh process, scored against the base, and documented.

    Args:
        recipe, model, overrides, fields: as for `plan`.
        output: the folder to make; required for a name or folder, refused for a loaded model.
        tokenizer: the tokenizer of a loaded model; operations that measure the model need it.
        engine: "streaming" (layer by layer, no model is built), "loaded", or "auto" (streaming where possible).
            A loaded model refuses `engine`, `resume`, `overwrite` and `allow_pickle`.
        check, evaluate, gate: check the result, score it, judge it by the recipe's limits; a skipped gate is recorded.
            None of them holds for a loaded model, which `surgery.evaluate(model, base, report=report)` scores.
        resume, overwrite, allow_pickle: continue an unfinished run; replace an output; read .bin weights.
        device, dtype: where and how a folder's model is measured: "cpu", "cuda:1", "mps"; "float32", "bfloat16".
        progress, on_plan: called with done, total and a label; called with the plan before anything is done.

    Returns:
        The report. `report.gate` is the result of the recipe's gate, `report.passed` that of the check. Where a recipe
        heals in several processes (accelerate launch), all but the first return None.

    Raises:
        SurgeryError: the recipe or the model is at fault; nothing was changed or written.
        MachineError: disk, permission or network; `resume=True` continues the run.
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
    refuse_folder_settings("edited", **settings, engine=engine != "auto")
    refuse_no_model(model)
    return pipeline.apply_in_memory(resolved, model, tokenizer, options)


@placed
def reproduce(
    out: str | Path,
    base: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Reproduction:
    """Run the recipe of a checkpoint again on its base, and compare the result with the checkpoint.

    The weights are compared by hash. Where they differ, as where another number of threads decides the last bits, the
    tensors are compared, and the loss if the checkpoint has a score. Nothing is kept.

    Args:
        out: a folder or a Hub id with a surgery.json.
        base: the base; default: the recorded one, at its revision.
        device, dtype: as for `apply`; other ones than the first time may give other last bits.
        progress: called with done, total and a label.

    Returns:
        What differs; `result.reproduced` is the verdict.

    Raises:
        SurgeryError: there is no record, the base is not the recorded one, or this version lacks an operation.
        MachineError: disk, memory or network.
    """
    from surgery import pipeline

    refuse_no_function(progress=progress)
    named = None if base is None else str(base)
    return pipeline.reproduce(str(out), named, RunOptions(progress=progress))


def applied(
    recipe: AnyRecipe,
    model: PreTrainedModel,
    *,
    tokenizer: AnyTokenizer | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    **fields: Any,
) -> AbstractContextManager[Report]:
    """Apply a recipe to a loaded model for the length of a `with` block, and undo it at its end.

        with surgery.applied("duo-attention", model, tokenizer=tokenizer) as report:
            ...  # the converted model

    Afterwards the model is as before, also if the block raises: weights, config, class, hooks, attention and
    generation config. Blocks may be nested. If a recipe rewrites weights, those of all layers are kept in memory twice
    inside the block. A model that was trained or moved inside stays converted: nothing is undone by halves. What
    is written through `weight.data` may not be seen, and is then kept.

    Args:
        recipe, model, tokenizer, overrides, progress, fields: as for `apply`; the model is loaded and in eval mode.

    Raises:
        SurgeryError: on entry, as for `apply`; or the model is in training mode, or the recipe heals. At the end of
            the block: the weights were trained or moved inside, or an inner block is still open; the model then stays
            converted.
    """
    from surgery import pipeline
    from surgery.conversion.applied_block import AppliedBlock

    refuse_swapped(recipe, model)
    refuse_no_tokenizer(tokenizer)
    refuse_no_function(progress=progress)
    if isinstance(model, str | Path):
        raise SurgeryError(
            "a block converts a loaded model, and this is a name", where="model", fix=f"surgery.load({str(model)!r})"
        )
    refuse_no_model(model)
    resolved = recipes.load(recipe, texts(overrides), **fields)
    options = RunOptions(progress=progress)
    return AppliedBlock(resolved, model, partial(pipeline.apply_in_memory, resolved, model, tokenizer, options))


@placed
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
    device: str = "auto",
    progress: Progress | None = None,
    on_plan: Callable[[HealPlan], None] | None = None,
    **fields: Any,
) -> Report:
    """Train a converted model, and report how much of the damage was recovered.

    A folder that `surgery.apply` wrote is healed into a new folder, `output`. The new folder is checked, compared with
    the base and the converted model on the text of its recipe, and documented. A model in memory is trained in place;
    `surgery.save` writes it. If that fails, it is restored from a copy of the weights that change.

    Args:
        model: a folder that `surgery.apply` wrote, or a model that it edited.
        base: the model that was converted: a folder, name or Hub id. With a loaded model it may be a loaded model too,
            which is left frozen. Default: the base that the record names.
        settings: the settings, as in the `heal:` block of a recipe; default: that block of the model's own recipe.
        overrides, fields: changes to the settings as "key=value" texts, and as keywords (`method="full"`).
        tokenizer: the tokenizer of a model in memory.
        check, evaluate, gate: as for `apply`.
        resume: continue from the last complete checkpoint of an unfinished run; settings, data and models must match.
        overwrite: replace `output`, and restart an unfinished run. Text that the base wrote for that run is reused.
        device: where a folder is healed and scored: the first GPU ("cuda"), or "cpu".
        progress, on_plan: as for `apply`; `on_plan` gets a `HealPlan`.

    Returns:
        The report. Where several processes train, all but the first return None.

    Raises:
        SurgeryError: settings, data or models are at fault.
        TrainingError: the training cannot continue (NaN, or other data than before); checkpoints are kept.
        MachineError: disk or memory; `resume=True` continues the run.
    """
    from surgery import pipeline
    from surgery.healing.heal import heal_model

    refuse_no_path("output", output)
    refuse_no_tokenizer(tokenizer)
    refuse_no_base(base)
    refuse_no_function(progress=progress, on_plan=on_plan)
    options = RunOptions(check, evaluate, gate, resume, overwrite, progress=progress, on_plan=on_plan)
    typed = [*texts(overrides), *(as_text(key, value) for key, value in fields.items())]
    if not isinstance(model, str | Path):
        refuse_folder_settings("healed", output=output, resume=resume, overwrite=overwrite)
        refuse_no_model(model)
        return heal_model(model, base, settings, typed, tokenizer, options)
    return cast("Report", pipeline.heal_to_folder(model, base_on_disk(base), output, settings, typed, options))


@placed
def check(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    memory: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Check a saved checkpoint and record the result in its surgery.json and card.

    Args:
        folder: a folder that surgery wrote.
        base: the model that it was made from; adds a comparison of the logits.
        memory: bytes that may be used (default: the free memory). A check that does not fit is recorded as not run.

    Returns:
        The report; its `passed` and `checks` hold the result.
    """
    from surgery.evaluation.check import check_report
    from surgery.io.hub import folder_of

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
        raise CheckError(error.what, where=error.where, exists=error.exists, fix=error.fix) from None  # damaged record
    check_report(report, None if base is None else folder_of(base), memory=memory, progress=progress)
    report.save()
    return report


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint as a Transformers model, native or surgical, in the dtype of the file.

    Args:
        folder: a folder, `smollm2-135m` (the demo model), or a Hub id (`org/name@revision`).
        kwargs: passed to `from_pretrained` (`dtype`, `device_map`, ...). No code of the checkpoint is run.

    Raises:
        SurgeryError: there is no such model, or it cannot be loaded.
    """
    from surgery.io.hub import folder_of
    from surgery.io.loading import load_model

    refuse_no_path("folder", folder, needed=True)
    return load_model(folder_of(folder), **kwargs)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Arguments and errors are those of `load`; no weight is fetched."""
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
    """Windows of a text as tokens, to try a training or a measurement with. They do not overlap.

    Args:
        tokenizer: the model's tokenizer.
        text: "builtin" (Python's language reference), the path of a UTF-8 text file, or a `Text`.
        part: which part of the built-in text: "calibration", or "held-out", which `evaluate` scores.
        length: tokens in a window.
        count: number of windows.

    Returns:
        LongTensor [count, length].

    Raises:
        SurgeryError: the text is missing, is not text, or is too short.
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
    """Save a model that `apply` edited in memory, with its report and card.

    The folder appears only when it is complete, as with `apply` into an output. Licence, notices and card of the base
    are copied if the model was loaded from a folder that has them.

    Returns:
        The report; its `folder` is the new folder.

    Raises:
        SurgeryError: the report belongs to another model (class, family, layers or heads differ).
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
    """Upload a checked checkpoint to the Hub in one commit. Repeating an interrupted call resumes it.

    Args:
        folder: a folder that passed `check`.
        repo: "owner/name", or "name" for your own namespace.
        public: make a new repository public instead of private; an existing one keeps its visibility.
        dry_run: list what would be sent; needs neither token nor network.
        message: the commit's message.
        revision: the branch to commit to (default main); it is created if missing.

    Raises:
        SurgeryError: the folder is not a checked output, or the name is not valid.
        MachineError: the network fails, or the token has no right to write.
    """
    from surgery.io.hub import push as send

    refuse_no_path("folder", folder, needed=True)
    refuse_no_text("repo", repo)
    return send(folder, repo, public=public, dry_run=dry_run, message=message, revision=revision)
