"""The steps of a run, in order: convert, score, heal, check, score again.

A recipe that heals keeps the converted model in OUT.unhealed until OUT is complete. A run that was stopped resumes
from there. The folder stays if the recipe keeps the adapter, because the adapter loads on that model.

Healing modules are imported only where something is trained: the import takes seconds, which a conversion should not
wait for.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import snapshot
from surgery.config import recipe as recipes
from surgery.config.heal_overrides import published
from surgery.config.heal_overrides import settings as read_settings
from surgery.config.options import RunOptions
from surgery.conversion.convert import convert, edit_model
from surgery.conversion.in_memory import note_origin
from surgery.conversion.plan import make_plan
from surgery.conversion.preflight import preflight_in_memory, refuse_output_and_engine, refuse_taken, unhealed_folder
from surgery.data.text import BUILTIN, CALIBRATION_TEXTS
from surgery.errors import CheckError, ModelMismatchError, RecipeError, RecordError, SurgeryError, TextError
from surgery.evaluation.check import check_report
from surgery.evaluation.run import evaluate_report
from surgery.io.files import published_recipe, write_text
from surgery.io.hub import resolve
from surgery.io.loading import loaded, read_tokenizer
from surgery.io.manifest import entry, is_complete
from surgery.io.model_in_memory import version_of
from surgery.io.output_folder import output_path, remove_own
from surgery.machine.device import note_devices_from_now
from surgery.machine.placement import AUTO, current, placed_on, refuse_for_loaded
from surgery.machine.progress import StageClock, begin
from surgery.operations.base import Operation, WeightRewrite
from surgery.report import reproduction
from surgery.report.lineage import another_base, recorded_base
from surgery.report.page import FILE as PAGE
from surgery.report.page import Answers, render_page
from surgery.report.report import Report, measured_dtype
from surgery.report.reproduction import Reproduction
from surgery.report.timing import KEY, timing

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.config.recipe import Evaluate, Recipe
    from surgery.evaluation.conversation import Reply
    from surgery.healing.heal import HealedFolder
    from surgery.io.loading import ModelSource
    from surgery.machine.progress import Progress


def apply_to_folder(recipe: Recipe, model: str, output: str | Path | None, options: RunOptions) -> Report | None:
    """Apply a recipe to a model given by name or folder, and write a folder. All processes but the first get None."""
    refuse_output_and_engine(output, model, options)
    options = _timed(options)
    if recipe.heal is not None:
        return _convert_and_heal(recipe, model, output_path(output), options)
    report, base = convert(recipe, model, output, options)
    if _check(report, options) and options.evaluate:
        _score(report, base, _judged_by(recipe, base), options)
    return _close(report, options)


def _convert_and_heal(recipe: Recipe, model: str, out: Path, options: RunOptions) -> Report | None:
    from surgery.healing.distributed import Ranks
    from surgery.healing.heal import heal_folder

    ranks, unhealed = Ranks(), unhealed_folder(out)
    if options.resume and not options.overwrite and (done := _finished(out, unhealed, recipe, model)):
        return done if ranks.first else None
    if ranks.first:
        converted, base = convert(recipe, model, out, options)
        if converted.data["evaluation"] is None and _score(converted, base, _judged_by(recipe, base), options):
            converted.save()
    ranks.wait()
    if not ranks.first:
        converted, base = Report.of(unhealed), None
    judged_by = _judged_by(recipe, converted.folder)
    base_name = str(base) if base is not None else model
    shown = replace(options, on_plan=None)  # the plan of the whole recipe was shown already
    healed = heal_folder(converted, base_name, recipe.heal, judged_by, out, shown)
    if healed.report is None:
        return None
    _judge_healed(healed, converted, judged_by, options)
    if not recipe.heal.keeps_adapter:
        remove_own(unhealed)
    return healed.report


def convert_only(recipe: Recipe, model: str, out: Path, progress: Progress | None) -> None:
    """Apply a recipe, in place of an earlier result in `out`. The result is neither checked nor scored."""
    apply_to_folder(
        recipe, model, out, RunOptions(check=False, evaluate=False, gate=False, overwrite=True, progress=progress)
    )


def finish(folder: Path, base: Path, recipe: Recipe, options: RunOptions) -> Report:
    """Check and score a folder that `convert_only` wrote."""
    options, report = _timed(options), Report.of(folder)
    if _check(report, options):
        _score(report, base, _judged_by(recipe, base), options)
    return _close(report, options)


def heal_to_folder(
    folder: str | Path,
    base: str | Path | None,
    output: str | Path | None,
    settings: Heal | dict | None,
    overrides: Sequence[str],
    options: RunOptions,
) -> Report | None:
    """Heal a folder that surgery wrote, and write a new folder. All processes but the first get None."""
    from surgery.healing.heal import heal_folder

    if output is None:
        raise SurgeryError("no output folder was named", fix="output='healed'")
    refuse_taken(output_path(output), options)
    options = _timed(options)
    report = Report.of(folder)
    heal, evaluate = read_settings(report.data["recipe"], settings, overrides)
    with placed_on(current().device, measured_dtype(report.data)):  # figures of two dtypes are not compared
        healed = heal_folder(report, base, heal, evaluate, output, options, overrides)
        if healed.report is not None:
            _judge_healed(healed, report, evaluate, options)
    return healed.report


def apply_in_memory(recipe: Recipe, model: Any, tokenizer: Any, options: RunOptions) -> Report:
    """Apply a recipe to a loaded model, in place."""
    from surgery.calibration.gradients import with_gradients

    class_before, base = type(model).__name__, None
    refuse_for_loaded()
    if recipe.heal is not None:
        base = preflight_in_memory(recipe.heal, _judged_by(recipe, model), model, tokenizer)
    with with_gradients():  # a weight that is made in a script's inference mode could never train
        report = edit_model(recipe, model, tokenizer, options)
    note_origin(report, model, class_before)
    if recipe.heal is not None:
        from surgery.healing.heal import heal_model

        heal_model(model, base, recipe.heal, (), tokenizer, replace(options, on_plan=None))
    return report


def reproduce(out: str, base: str | None, options: RunOptions) -> Reproduction:
    """Run the recipe of a checkpoint again on its base, and compare; see `surgery.reproduce`."""
    import torch

    folder = resolve(out).path
    report = Report.of(folder)
    record, threads = report.data, torch.get_num_threads()
    recorded_threads = record.get("threads") if type(record.get("threads")) is int else threads
    dtype = measured_dtype(record) if current().dtype == AUTO else current().dtype
    source, recipe = _recorded_base(record, base, out), recipes.load(record["recipe"])
    if not record["files"]:
        raise RecordError("surgery.json lists no weights to compare with", where=out, fix="surgery check")
    if other := [name for name, same in reproduction.hashes(record, folder).items() if not same]:
        what = f"{other[0]} is not the file that its surgery.json lists, so that there is nothing to compare with"
        raise CheckError(what, where=out, fix=f"surgery check {out}")
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        again = Path(temporary) / "again"
        try:
            torch.set_num_threads(max(1, recorded_threads))  # they may decide the last bits
            quiet = replace(options, check=False, evaluate=False, gate=False)
            with placed_on(current().device, dtype):
                made = apply_to_folder(recipe, source, again, quiet)
        except TextError as error:
            fix = "run the command in the folder that has this file: surgery.json knows its name alone"
            raise TextError(error.what, where=error.where, fix=fix) from error
        finally:
            torch.set_num_threads(threads)
        found = Reproduction(out, source, reproduction.hashes(record, again))
        found.config = reproduction.differing_config(folder, again)
        if found.same_bits or made is None:
            return found
        found.machine = reproduction.differing_machine(record, made.data)
        found.tensors = reproduction.differing_tensors(folder, again)
        then = reproduction.main_figures(record["evaluation"])
        if then and recipe.evaluate is not None:
            try:
                with placed_on(current().device, dtype):
                    scored_again = recipe.evaluate.main.measure(again, resolve(source).path, progress=options.progress)
                now = reproduction.main_figures(scored_again.to_dict())
            except TextError as error:
                found.notes.append(f"the loss was not compared: {error.where}: {error.what}")
                now = {}
            found.figures = {name: (value, now[name]) for name, value in then.items() if name in now}
        return found


def _recorded_base(record: dict, base: str | None, out: str) -> str:
    """The base of a record as a name that can be resolved: the one that a user named, or the recorded one.

    Raises:
        SurgeryError: none is recorded, or it is not the recorded one.
    """
    if record.get("in_memory"):
        what = "it was saved from a model in memory, and what was done to that model before and after is not recorded"
        raise RecordError(
            what, where=out, fix="surgery apply with a recipe and a folder, whose result can be repeated"
        )
    name = base or recorded_base(record)
    if not name:
        raise RecordError("its surgery.json names no base", where=out, fix="--base MODEL")
    if reason := another_base(record, name):
        raise ModelMismatchError(f"{name}: {reason}", where=out, fix="--base with the model that it was made from")
    return str(name)


TEXT_FIELDS = {"text", "calibration_text"}  # of operations
PROMPTS = ("Hello!", "What is the capital of France?", "Write one sentence about the sea.")  # of the page's answers


def write_page(
    out: str | Path,
    base: str | Path | None = None,
    *,
    prompts: Sequence[str] = PROMPTS,
    file: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one self-contained HTML page about a checkpoint: no script, nothing that is fetched.

    Args:
        out: a folder with a surgery.json.
        base: its base; both then answer the prompts, and the page has them side by side. It is also needed for the
            plan as a tree, unless the recorded base is on this machine.
        prompts: what both are asked.
        file: the file to write; default: report.html in the folder, which surgery.json then lists.
        progress: called with done, total and a label.

    Raises:
        SurgeryError: there is no record, or the base is not the recorded one.
        MachineError: the file cannot be written.
    """
    from surgery.conversion.plan_tree import lines
    from surgery.evaluation.conversation import reply

    report, named = Report.of(out), None if base is None else str(base)
    folder, record = Path(out), report.data
    try:
        source = resolve(_recorded_base(record, named, str(out)), cached_only=True)
        recipe = recipes.load(_with_texts(record["recipe"]))
        plan = lines(make_plan(recipe, Anatomy.of(source.path), source.name, source.path))
    except SurgeryError as error:  # the base is not here, or an operation is of another version
        plan = [f"not shown: {'; '.join(filter(None, (error.what, error.fix)))}"]  # no path: pages are passed on
    models: dict[str, Path] = {}
    if named is not None:
        models = {"the base": resolve(_recorded_base(record, named, str(out))).path, "this model": folder}
    replies: dict[str, dict[str, Reply]] = {prompt: {} for prompt in prompts if models}
    for name, path in models.items():
        begin(progress, f"answers of {name}", len(replies))
        tokenizer = read_tokenizer(path)
        with loaded(path) as model:
            for done, prompt in enumerate(replies, start=1):
                replies[prompt][name] = reply(model, prompt, tokenizer=tokenizer)
                if progress:
                    progress(done, len(replies), f"answers of {name}")
        del model  # before the next one is loaded
    answers = [Answers(prompt, found) for prompt, found in replies.items()]
    page = Path(file or folder / PAGE)
    write_text(page, render_page(record, folder, plan, answers))
    if page.parent.resolve() == folder.resolve() and is_complete(record):
        record["other_files"][page.name] = entry(page)
        report.save()
    return page


def _with_texts(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe whose operations read the built-in text in place of files that are not here.

    No plan depends on the words of a text, and a record does not say in which folder its author kept it.
    """

    def here(fields: dict[str, Any]) -> dict[str, Any]:
        gone = {key for key in fields.keys() & TEXT_FIELDS if isinstance(fields[key], str)}
        gone = {key for key in gone if fields[key] not in CALIBRATION_TEXTS and not Path(fields[key]).is_file()}
        inside = {key: here(value) for key, value in fields.items() if isinstance(value, dict)}
        return fields | inside | dict.fromkeys(gone, BUILTIN)

    return recorded | {"operations": [here(operation) for operation in recorded["operations"]]}


SAMPLED = 16  # values of a weight, from which a change of it is told
APPLIED = "_surgery_applied"  # attribute of a model: the blocks of `applied` that are open, the outermost first


class AppliedBlock(AbstractContextManager["Report"]):
    """A recipe that is applied to a loaded model for the length of a `with` block; see `surgery.applied`."""

    def __init__(self, recipe: Recipe, model: Any, tokenizer: Any, options: RunOptions):
        self._recipe, self._model, self._tokenizer, self._options = recipe, model, tokenizer, options
        self._entered = False

    def __enter__(self) -> Report:
        model, where = self._model, type(self._model).__name__
        if self._entered:
            fix = "call surgery.applied again"
            raise SurgeryError("this block was entered already, which is possible only once", where=where, fix=fix)
        if model.training:
            fix = "model.eval() first; to train a converted model, use surgery.apply"
            raise SurgeryError("the model is in training mode", where=where, fix=fix)
        if self._recipe.heal is not None:
            raise RecipeError("a healing is not undone", where="heal", fix="heal=null, or surgery.apply")
        self._entered = True
        self._restore = snapshot(model, _rewritten(self._recipe, model))
        self._generation = getattr(model, "generation_config", None)
        self._kept = deepcopy(vars(self._generation)) if self._generation is not None else {}
        try:
            report = apply_in_memory(self._recipe, model, self._tokenizer, self._options)
            self._weights = _state_of_weights(model)
        except BaseException:
            self._undo()
            raise
        setattr(model, APPLIED, (*getattr(model, APPLIED, ()), self))
        return report

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: Any) -> None:
        model, where = self._model, type(self._model).__name__
        if raised is None and getattr(model, APPLIED, ())[-1:] != (self,):
            what = "a block of surgery.applied that was opened later is still open"
            raise SurgeryError(what, where=where, fix="leave the inner block first")
        if _state_of_weights(model) != self._weights:
            what = "the weights were trained or moved inside the block, which is not undone: the model stays converted"
            if raised is not None:  # which is the error to see; half of the model would be undone
                return raised.add_note(f"surgery.applied: {what}")
            fix = "to train a converted model, use surgery.apply; move it to its device and dtype before the block"
            raise SurgeryError(what, where=where, fix=fix)
        self._undo()

    def _undo(self) -> None:
        self._restore()
        if self._generation is not None:
            vars(self._generation).clear()
            vars(self._generation).update(self._kept)


def _rewritten(recipe: Recipe, model: Any) -> list[Any]:
    """The weights that a recipe may change in place: those of all layers, if any operation rewrites weights."""
    if all(map(_keeps_weights, recipe.operations)):
        return []
    layers = {layer.path.rpartition(".")[0] for layer in Anatomy.of(model).layers}
    return [weight for path in layers for weight in model.get_submodule(path).parameters()]


def _keeps_weights(operation: Operation) -> bool:
    """Whether an operation leaves all weights as they are."""
    return operation.term is not None or (isinstance(operation, WeightRewrite) and not operation.rewritten_projections)


def _state_of_weights(model: Any) -> list[tuple]:
    """What changes where a weight is trained, cast, moved or written: a few of its values, among others."""
    return [(id(w), version_of(w), w.dtype, w.device, _sample(w)) for w in model.parameters()]


def _sample(weight: Any) -> list[float]:
    """Some values of a weight, evenly spaced."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)].tolist()


def _judge_healed(healed: HealedFolder, converted: Report, evaluate: Evaluate | None, options: RunOptions) -> None:
    """Check the healed folder, score it against the base and the converted model, record the results, report them."""
    from surgery.healing.heal import compare

    gc.collect()  # a reference cycle may hold the trained model and its base
    report, base, trackers = healed
    with closing(trackers) if trackers else nullcontext():
        if _check(report, options) and base is not None and _score(report, base, evaluate, options):
            compare(report, converted.folder, base, evaluate, options)
        _skip_gate(report, options)
        if trackers:
            trackers.report(report.data)
    if trackers and trackers.faults:
        report.data["heal"]["tracker_faults"] = trackers.faults
    _close(report, options)


def _judged_by(recipe: Recipe, model: ModelSource) -> Evaluate | None:
    """The recipe's evaluation, with windows and prompts cut to what the model takes, as in its plan."""
    from surgery.io.loading import read_config

    return recipe.cut_to(read_config(model))[0].evaluate if recipe.evaluate else None


def _check(report: Report, options: RunOptions) -> bool:
    """Check a folder, if the options ask for it; False: the check failed, so the folder is not scored."""
    if not options.check:
        return True
    check_report(report, progress=options.progress)
    report.save()
    return report.data["check"]["passed"]


def _score(report: Report, base: Path, evaluate: Evaluate | None, options: RunOptions) -> bool:
    """Score a folder against its base, if recipe and options ask for it; returns whether it was scored."""
    if not options.evaluate or evaluate is None:
        return False
    evaluate_report(report, base, evaluate, options.progress, options.allow_pickle)
    return True


def _skip_gate(report: Report, options: RunOptions) -> None:
    if not options.gate and report.data["gate"]["limits"]:
        report.data["gate"]["status"] = "skipped"


def _close(report: Report, options: RunOptions) -> Report:
    _skip_gate(report, options)
    if isinstance(options.progress, StageClock):
        report.data[KEY] = timing(options.progress)
    report.save()
    return report


def _timed(options: RunOptions) -> RunOptions:
    """The options with a clock that records how long each stage takes; the run's devices are noted from now on."""
    note_devices_from_now()
    return replace(options, progress=StageClock(options.progress))


def _finished(out: Path, unhealed: Path, recipe: Recipe, model: str) -> Report | None:
    """The report of `out`, if this very recipe made it from this model and nothing is left to do; else None."""
    if unhealed.exists() or not (out / "surgery.json").is_file():
        return None
    report = Report.of(out)
    from surgery.io.loading import read_config

    recipe, _ = recipe.cut_to(read_config(out))
    expected = published_recipe(recipe.identity()) | {"heal": published(recipe.heal)}
    same = report.data["recipe"] == expected and not another_base(report.data, model)
    return report if same else None
