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
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.heal_overrides import published
from surgery.config.heal_overrides import settings as read_settings
from surgery.config.options import RunOptions
from surgery.conversion.convert import convert, edit_model
from surgery.conversion.in_memory import note_origin
from surgery.conversion.plan import make_plan
from surgery.conversion.preflight import preflight_in_memory, refuse_output_and_engine, refuse_taken, unhealed_folder
from surgery.data.text import BUILTIN, CALIBRATION_TEXTS
from surgery.errors import CheckError, ModelMismatchError, RecordError, SurgeryError, TextError
from surgery.evaluation.check import check_report
from surgery.evaluation.run import evaluate_report
from surgery.io.files import published_recipe, refuse_unwritable, write_text
from surgery.io.hub import ResolvedModel, resolve
from surgery.io.identity import CONFIGS
from surgery.io.loading import loaded, read_tokenizer
from surgery.io.manifest import entry, is_complete, model_differences
from surgery.io.output_folder import output_path, remove_own
from surgery.machine.device import note_devices_from_now
from surgery.machine.placement import AUTO, current, placed_on, refuse_for_loaded
from surgery.machine.progress import StageClock, begin
from surgery.operations.base import missing_text
from surgery.report import reproduction
from surgery.report.lineage import another_base, recorded_base
from surgery.report.page import FILE as PAGE
from surgery.report.page import SUFFIXES, Answers, render_page
from surgery.report.report import MEASURED_IN, Report
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
    with placed_on(current().device, _measured_dtype(report.data)):  # figures of two dtypes are not compared
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
    dtype = _measured_dtype(record) if current().dtype == AUTO else current().dtype
    _base_of(record, base, out)  # raises
    source, recipe = base or str(recorded_base(record)), recipes.load(record["recipe"])
    if not record["files"]:
        raise RecordError("surgery.json lists no weights to compare with", where=out, fix="surgery check")
    if changed := model_differences(folder, record, leave_out=CONFIGS[:1]):  # its keys are compared
        what = f"the model is not the one in surgery.json ({changed[0]}), so that there is nothing to compare with"
        raise CheckError(what, where=out, fix=f"surgery check {out}")
    if gone := [text for operation in record["recipe"]["operations"] for text in _missing_texts(operation)]:
        raise TextError("no such text file", where=gone[0], fix=KEPT_BY_NAME)
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        again = Path(temporary) / "again"
        try:
            torch.set_num_threads(max(1, recorded_threads))  # they may decide the last bits
            quiet = replace(options, check=False, evaluate=False, gate=False)
            with placed_on(current().device, dtype):
                made = apply_to_folder(recipe, source, again, quiet)
        except TextError as error:
            raise TextError(error.what, where=error.where, fix=KEPT_BY_NAME) from error
        finally:
            torch.set_num_threads(threads)
        found = Reproduction(
            out, source, reproduction.hashes(record, again), notes=[report.edited] if report.edited else []
        )
        if code := reproduction.differing_code(record, again):
            found.notes.append(f"the code in the folder is of another version: {', '.join(code)}")
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


def _base_of(record: dict, base: str | None, out: str, *, cached_only: bool = False) -> ResolvedModel:
    """The base of a record: the one that a user named, or the recorded one.

    Args:
        cached_only: fetch nothing.

    Raises:
        SurgeryError: none is recorded, it cannot be found, or it is not the recorded one.
    """
    if record.get("in_memory"):
        what = "it was saved from a model in memory, and what was done to that model before and after is not recorded"
        raise RecordError(
            what, where=out, fix="surgery apply with a recipe and a folder, whose result can be repeated"
        )
    name = base or recorded_base(record)
    if not name:
        raise RecordError("its surgery.json names no base", where=out, fix="--base MODEL")
    source = resolve(name, cached_only=cached_only)
    if reason := another_base(record, source):
        raise ModelMismatchError(f"{name}: {reason}", where=out, fix="--base with the model that it was made from")
    return source


TEXT_FIELDS = {"text", "calibration_text"}  # of operations
KEPT_BY_NAME = "run the command in the folder that has this file: surgery.json knows its name alone"
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
            plan as a tree, unless the recorded base is on this machine; nothing is fetched for the tree.
        prompts: what both are asked.
        file: the file to write; default: report.html in the folder, which surgery.json then lists.
        progress: called with done, total and a label.

    Raises:
        SurgeryError: there is no record, the base is not the recorded one, or the file lies in no folder.
        MachineError: the file cannot be written.
    """
    from surgery.evaluation.conversation import reply

    report, folder = Report.of(out), Path(out)
    record, page = report.data, Path(file or folder / PAGE)
    refuse_unwritable(page, "the page", SUFFIXES)
    source = None if base is None else _base_of(record, str(base), str(out))
    plan = _plan_lines(record, source, str(out))
    models = {"the base": source.path, "this model": folder} if source else {}
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
    write_text(page, render_page(record, folder, plan, answers, report.edited))
    if page.parent.resolve() == folder.resolve() and is_complete(record):
        record["other_files"][page.name] = entry(page)
        report.save()
    return page


def _plan_lines(record: dict, base: ResolvedModel | None, out: str) -> list[str]:
    """The plan of a record as a tree; where it cannot be drawn, what changed, and why there is no tree.

    Args:
        base: the base, if a user named it; None: the recorded one, if it is on this machine.
    """
    from surgery.conversion.plan_tree import lines

    fix = "" if record.get("in_memory") else "surgery report OUT --base MODEL"
    try:
        base = base or _base_of(record, None, out, cached_only=True)
        recipe = recipes.load(_with_texts(record["recipe"]))
        return lines(make_plan(recipe, Anatomy.of(base.path), base.name, base.path))
    except SurgeryError as error:  # the base is not here, a file of the recipe is not, or an operation has changed
        why = "; ".join(filter(None, (error.what, error.fix if base else fix)))  # no path: pages are passed on
        return [*map(str, record["plan"].get("changes") or []), "", f"The plan as a tree is not shown: {why}"]


def _with_texts(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe whose operations read the built-in text in place of files that are not here.

    No plan depends on the words of a text, and a record does not say in which folder its author kept it.
    """

    def here(fields: dict[str, Any]) -> dict[str, Any]:
        inside = {key: here(value) for key, value in fields.items() if isinstance(value, dict)}
        return fields | inside | dict.fromkeys(_fields_without_file(fields), BUILTIN)

    return recorded | {"operations": [here(operation) for operation in recorded["operations"]]}


def _missing_texts(fields: dict[str, Any]) -> list[str]:
    """The text files that an operation of a record names, and that are not here."""
    inside = [text for value in fields.values() if isinstance(value, dict) for text in _missing_texts(value)]
    return [*(fields[key] for key in _fields_without_file(fields)), *inside]


def _fields_without_file(fields: dict[str, Any]) -> list[str]:
    """Which of these fields of an operation name a text file that is not here."""
    texts = [key for key in fields if key in TEXT_FIELDS and isinstance(fields[key], str)]
    return [key for key in texts if missing_text(fields[key], CALIBRATION_TEXTS)]


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


def _measured_dtype(data: dict) -> str:
    """The dtype in which the model of a record was measured; "auto": that of its weights."""
    measured_in = data.get(MEASURED_IN)
    return str(measured_in.get("dtype", AUTO)) if isinstance(measured_in, dict) else AUTO
