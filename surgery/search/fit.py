"""The least damage within a budget of KV cache: every recipe is planned, the promising ones are tried, one is kept.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): every option is converted with little calibration
text and measured on few texts. The better half, and what is not told apart from it, goes on: it is converted as its
recipe says and measured on more texts. So do pairs of the two best recipes. Everything that was measured is kept with
its seconds, so that the same call goes on after it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.config.arguments import refuse_no_function, refuse_no_path
from surgery.config.options import RunOptions
from surgery.data.text import load_text
from surgery.engines import find
from surgery.errors import OutputExistsError, RecipeMismatchError, SettingError, SurgeryError
from surgery.io.files import REPORT, read_json, write_json
from surgery.io.hub import resolve
from surgery.io.identity import model_identity
from surgery.io.loading import read_tokenizer
from surgery.io.output_folder import output_path, overlap
from surgery.machine.placement import placed
from surgery.pipeline import finish
from surgery.report.report import Report
from surgery.search.budget import GOALS, Budget, Model, Option, Options, options, pairs
from surgery.search.fitted import Fitted, Tried
from surgery.search.trials import FIRST, HALF_95, WHOLE, Damage, Judge, Round, tried
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.machine.progress import Progress

FILE, PICTURE, TRIAL, BEST = "fit.json", "fit.png", "trial", "best"  # in the folder of a search
CONTEXT = 8192
BEST_AT = {"quality": "loses least", "decode": "decodes fastest", "prefill": "reads prompts fastest"}
LEAST_CONTEXT = 64  # tokens: fewer hold no passkey
# An option that loses so many times what the best one loses is not tried as a whole. It is assumed that four times the
# calibration text do not make up for that.
HOPELESS = 4


@placed
def fit(
    model: str | Path,
    kv: float | None = None,
    *,
    output: str | Path | None = None,
    context: int = CONTEXT,
    native_only: bool = False,
    engine: str = "",
    goal: str = GOALS[0],
    thorough: bool = False,
    minutes: float | None = None,
    text: str = "builtin",
    folder: str | Path = "fit",
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    on_trial: Callable[[str, Damage], None] | None = None,
) -> Fitted:
    """Find the recipe that loses least within a budget of KV cache, and apply it.

    Args:
        model: folder, name or Hub id of a base.
        kv: share of the base's KV cache that the result may take, above 0 and below 1; may be left out for the goal
            "prefill".
        output: the folder that gets the best result; None: none is written, and the table says which is best.
        context: tokens of the text whose cache is counted; answers are asked from so far back. It is cut to what the
            model takes.
        native_only: only stock checkpoints.
        engine: "llama.cpp" or "vllm": only results that it can run.
        goal: "quality": what loses least. "decode", "prefill": of the options that are tried as their recipes say and
            pass their gates, the fastest at decoding behind a text of `context` tokens, or at such a prompt.
        thorough: try every option as its recipe says, and not the better half alone.
        minutes: no further option is tried after so many; None: all are.
        text: "builtin" (its held-out part) or a text file, on which options are judged.
        folder: holds the finished figures; the same call goes on from them.
        overwrite: replace `output`.
        device, dtype, progress: as for `surgery.apply`.
        on_trial: called with an option's name and what it lost.

    Raises:
        SurgeryError: nothing reaches the budget, or an argument is at fault.
    """
    refuse_no_path("folder", folder)
    refuse_no_function(progress=progress, on_trial=on_trial)
    source, budget = _asked(model, kv, Budget(1.0, context, native_only, engine, goal))
    if output is not None:
        _refuse_taken(output_path(output), source.folder, overwrite)
    found = options(source, budget)
    if not found.found:
        raise _nothing(budget, found.nearest, found.left_out)
    search = _Search(str(model), source, budget, str(text), Path(folder))
    search.until = time.monotonic() + 60 * minutes if minutes is not None else None
    search.progress, search.on_trial, search.thorough = progress, on_trial, thorough
    result = search.run(found)
    if result.order:
        search.conclude(result, output, overwrite)
    return result


def _asked(model: str | Path, kv: float | None, budget: Budget) -> tuple[Model, Budget]:
    """The model, and the budget with its share.

    Raises:
        SurgeryError: an argument is at fault, or the model was converted before.
    """
    if budget.goal not in GOALS:
        raise SettingError(f"there is no goal {budget.goal!r}", exists=", ".join(GOALS), fix=f"--goal {GOALS[0]}")
    if kv is None and budget.goal == "prefill":
        kv = 1.0
    elif not isinstance(kv, int | float) or isinstance(kv, bool) or not 0 < kv < 1:
        what = (
            "no share of the KV cache is named" if kv is None else f"kv is {kv}, and a share between 0 and 1 is wanted"
        )
        raise SettingError(what, fix="--kv 0.5")
    if budget.context < LEAST_CONTEXT:
        what = f"context is {budget.context}, and at least {LEAST_CONTEXT} tokens are wanted"
        raise SettingError(what, fix=f"--context {CONTEXT}")
    if budget.engine:
        find(budget.engine)  # raises for another name
    source = resolve(str(model))
    anatomy = Anatomy.of(source.path)
    if anatomy.surgical or (source.path / "surgery.json").is_file():
        fix = "give the base that it was made from"
        raise RecipeMismatchError("this model was converted already", where=source.name, fix=fix)
    context = min(budget.context, anatomy.positions or budget.context)
    chats = bool(read_tokenizer(source.path).chat_template)
    return Model(anatomy, source.name, source.path, chats), replace(budget, share=float(kv), context=context)


def _refuse_taken(out: Path, base: Path, overwrite: bool) -> None:
    """Raise where the result may not be put: only an earlier result of ours is replaced, and only if that is asked."""
    if overlap(out, base):
        raise SettingError("the output and the model's folder lie in one another", where=str(out), fix="-o OUT")
    if os.path.lexists(out) and not (overwrite and (out / REPORT).is_file()):
        ours = (out / REPORT).is_file()
        fix = "choose another name, or add --overwrite" if ours else "choose another name"
        raise OutputExistsError("OUT exists", where=str(out), fix=fix)


def _nothing(budget: Budget, nearest: tuple[float, str] | None, left_out: dict[str, str]) -> RecipeMismatchError:
    """The error that no recipe reaches a budget."""
    what = f"nothing leaves {budget.share:.0%} of the KV cache at {budget.context:,} tokens, or less"
    wanted = [*["a stock checkpoint"] * budget.native, *[f"a result for {budget.engine}"] * bool(budget.engine)]
    what += f", as {' and '.join(wanted)}" if wanted else ""
    fix = f"the nearest is {nearest[1]} with {nearest[0]:.2f}: --kv {nearest[0] + 0.005:.2f}" if nearest else ""
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
    return RecipeMismatchError(what, fix=fix or f"surgery inspect says what fits this model ({shown})")


class _Search:
    """A search in a folder.

    Args:
        name: the model, as the user named it.
        text: on which options are judged.
        folder: keeps figures, the result of the trial that runs, and the best result.
    """

    def __init__(self, name: str, model: Model, budget: Budget, text: str, folder: Path):
        self.name, self.model, self.budget, self.folder = name, model, budget, folder
        self.until: float | None = None
        self.thorough = False
        self.progress: Progress | None = None
        self.on_trial: Callable[[str, Damage], None] | None = None
        self.text, self.written, self.made = text, None, ""
        folder.mkdir(parents=True, exist_ok=True)
        digest = load_text(text, "held-out").sha256
        self.identity = {
            "base": model_identity(model.folder), "text": digest, "context": budget.context, "version": __version__
        }  # fmt: skip
        self.known = self._read()
        self.judges: dict[str, Judge] = {}
        self.notes: list[str] = []
        self.failed: list[SurgeryError] = []

    def run(self, asked: Options) -> Fitted:
        """Try the options, those that promise most last and most thoroughly."""
        rows = {option.name: Tried(option.name, option.share, option.plan.tier) for option in asked.found}
        result = Fitted(self.model.name, self.budget, rows, asked.left_out, asked.others, notes=self.notes)
        first = self._all(asked.found, FIRST, rows)
        if not first and self.failed:
            raise self.failed[0]
        for option in pairs(_two_best(first), self.model, self.budget):
            rows[option.name] = Tried(option.name, option.share, option.plan.tier)
            first += self._all([option], FIRST, rows)
        first.sort(key=_total)
        going = [option for option, _ in first] if self.thorough else _survivors(first)
        for option, _ in first:
            if option not in going:
                rows[option.name].why = "lost more in the first trial"
        result.options = {option.name: option for option in going}
        for option in going:
            if self._trial(option, WHOLE, rows) is not None and result.order[0] is option:
                self._keep(option)
        return result

    def _all(self, found: list[Option], stage: Round, rows: dict[str, Tried]) -> list[tuple[Option, Damage]]:
        """The options that could be tried in the time, with what they lost; the least first."""
        lost = ((option, self._trial(option, stage, rows)) for option in found)
        return sorted(((option, trial) for option, trial in lost if trial is not None), key=_total)

    def _trial(self, option: Option, stage: Round, rows: dict[str, Tried]) -> Damage | None:
        """What an option lost, from the figures that are kept or from a trial; None: no time was left."""
        key = self._key(option, stage)
        if key not in self.known:
            if self.until is not None and time.monotonic() > self.until and self.known:
                rows[option.name].why = "not tried: the time was over"
                return None
            try:
                to = self.folder / TRIAL, stage, self._judge(stage), self._said(option)
                trial = tried(option.recipe, self.name, *to)
            except SurgeryError as error:  # of this option; the others may do
                rows[option.name].why = f"not tried: {error.what}"
                self.failed.append(error)
                return None
            self.known[key], self.made = trial.to_dict(), key
            self._write()
        trial = Damage(**self.known[key])
        setattr(rows[option.name], stage.name, trial)
        if self.on_trial is not None:
            self.on_trial(option.name, trial)
        return trial

    def _judge(self, stage: Round) -> Judge:
        if stage.name not in self.judges:
            timed = self.budget.goal if stage is WHOLE and self.budget.goal != GOALS[0] else ""
            self.judges = {stage.name: Judge(self.model.folder, self.text, self.budget.context, stage.texts, timed)}
        return self.judges[stage.name]

    def _said(self, option: Option) -> Callable[[str], Progress | None]:
        """Gives the callback of a stage: everything inside is reported as this stage of this option."""

        def stage(name: str) -> Progress | None:
            if self.progress is None:
                return None
            told = self.progress
            return lambda done, total, label: told(done, total, f"{name} {option.name}: {label.replace(':', ',')}")

        return stage

    def _keep(self, option: Option) -> None:
        """Keep the result of the last trial as the best one, if it is there."""
        if self.made == self._key(option, WHOLE):  # and not of another option, before this run was stopped
            note = self.folder / f"{BEST}.json"
            note.unlink(missing_ok=True)
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
            (self.folder / TRIAL).rename(self.folder / BEST)
            write_json(note, {"key": self.made})
            self.made = ""

    def conclude(self, result: Fitted, output: str | Path | None, overwrite: bool) -> None:
        """Write the best result, if an output is named, and say of each option why it is not the best one."""
        if output is None:
            result.settle(result.order[0].name, BEST_AT[self.budget.goal])
        else:
            asked = RunOptions(overwrite=overwrite, progress=self.progress)
            result.report = self.take_best(result, output_path(output), asked)

    def take_best(self, result: Fitted, out: Path, asked: RunOptions) -> Report:
        """Put the best result that passes its recipe's gate in the folder `out`; if none does, the best of all."""
        order = result.order
        for option in order:
            report = self._finished(option, out, asked)
            if report.gate != "failed":
                break
            result.rows[option.name].why = f"its gate failed: {'; '.join(report.data['gate'].get('reasons', []))}"
        else:
            result.notes.append("no option passes the gate of its recipe: this is the one that loses least")
            option = order[0]
            report = self._finished(option, out, asked) if len(order) > 1 else report
        result.chosen = option.name
        result.settle(option.name, "chosen")
        report.data["fit"] = result.to_dict()
        report.save()
        shutil.rmtree(self.folder / TRIAL, ignore_errors=True)
        return report

    def _finished(self, option: Option, out: Path, asked: RunOptions) -> Report:
        """The result of an option in the folder `out`, checked and scored."""
        if self.written is None:  # it may have appeared during this run
            _refuse_taken(out, self.model.folder, asked.overwrite)
        self._put(option, out, asked)
        self.written = out
        return finish(out, self.model.folder, option.recipe, asked)

    def _put(self, option: Option, out: Path, asked: RunOptions) -> None:
        """The result of an option in the folder `out`: the one that was kept, or made again."""
        from surgery.pipeline import apply_to_folder

        kept, note = self.folder / BEST, self.folder / f"{BEST}.json"
        if out.exists():
            shutil.rmtree(out)
        if kept.is_dir() and note.is_file() and read_json(note).get("key") == self._key(option, WHOLE):
            shutil.copytree(kept, out)
            return
        quiet = RunOptions(check=False, evaluate=False, gate=False, progress=asked.progress)
        apply_to_folder(option.recipe, self.name, out, quiet)

    def _key(self, option: Option, stage: Round) -> str:
        """Identifies a trial of an option among the kept figures."""
        timed = [self.budget.goal] * (stage is WHOLE and self.budget.goal != GOALS[0])
        data = json.dumps([option.recipe.to_dict()["operations"], stage, *timed], sort_keys=True)
        return f"{option.name}, {stage.name} {hashlib.sha256(data.encode()).hexdigest()[:12]}"

    def _read(self) -> dict[str, dict]:
        """The finished figures of an earlier run of this search."""
        file = self.folder / FILE
        if not file.is_file():
            return {}
        data = read_json(file)
        if data.get("identity") != self.identity:
            what = "this folder holds a search with another model, text or context, or of another version"
            raise SettingError(what, where=str(self.folder), fix="name another folder: --keep FOLDER")
        return data["trials"]

    def _write(self) -> None:
        write_json(self.folder / FILE, {"identity": self.identity, "trials": self.known})


def _total(each: tuple[Option, Damage]) -> float:
    return each[1].total


def _two_best(ranked: list[tuple[Option, Damage]]) -> list[Option]:
    """The two best options that are one operation each, and not the same one; [] if there are none."""
    single = [option for option, _ in ranked if len(option.recipe.operations) == 1]
    others = [each for each in single if each.recipe.operations[0].op != single[0].recipe.operations[0].op]
    return [single[0], others[0]] if others else []


def _survivors(ranked: list[tuple[Option, Damage]]) -> list[Option]:
    """The better half, and what does not lose more than the best one beyond the interval; nothing that is hopeless."""
    half, best = (len(ranked) + 1) // 2, ranked[0][1]
    most = HOPELESS * (best.total + HALF_95 * best.error)
    return [
        option
        for place, (option, lost) in enumerate(ranked)
        if lost.total <= most and (place < half or not lost.worse_than(best))
    ]
