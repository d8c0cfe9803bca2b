"""The least damage within a budget of KV cache: every recipe is planned, the promising ones are tried, one is kept.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): every option is converted with little calibration
text and measured on few texts. The better half, and what is not told apart from the best one, goes on: it is converted
as its recipe says and measured on more texts. Pairs of the two best recipes take part. Everything that was measured is
kept with its seconds, so that the same call goes on after it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.config.arguments import no_model, refuse_no_function, refuse_no_path
from surgery.config.options import RunOptions
from surgery.data.text import load_text
from surgery.engines import find
from surgery.errors import OutputExistsError, RecipeMismatchError, SettingError, SurgeryError
from surgery.evaluation.paired import HALF_95
from surgery.io.files import REPORT, read_json, write_json
from surgery.io.hub import resolve
from surgery.io.identity import model_identity
from surgery.io.loading import read_tokenizer
from surgery.io.output_folder import OutputFolder, overlap, refuse_to_replace, remove_own, used_alone
from surgery.machine.placement import current, placed
from surgery.pipeline import convert_only, finish
from surgery.report.card_sections import FITTED
from surgery.report.report import Report
from surgery.search.budget import GOALS, Budget, Model, Option, Options, options, pairs
from surgery.search.fitted import Fitted, Tried
from surgery.search.trials import FIRST, WHOLE, Damage, Judge, Round, tried
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.machine.progress import Progress

PLAN = "fit"  # in an output that is not finished
FILE, PICTURE, TRIAL, BEST = "fit.json", FITTED, "trial", "best"  # in the folder of a search
CONTEXT = 8192
JUDGE = 2  # raise it when options are judged otherwise: kept figures are then of another search
OTHER_KEEP = "name another folder: --keep FOLDER"
BEST_AT = {"quality": "loses least", "decode": "decodes fastest", "prefill": "reads prompts fastest"}
LEAST_CONTEXT = 1024  # tokens: fewer hold no passkeys and a window
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
    if minutes is not None and (not _is_number(minutes) or minutes < 0):
        raise SettingError(f"minutes is {minutes!r}, and a number from 0 on is wanted", fix="--minutes 30")
    source, budget = _asked(model, kv, Budget(1.0, context, native_only, engine, goal))
    _refuse_folders(output, Path(folder), source.folder, overwrite)
    found = options(source, budget)
    if not found.found:
        raise _nothing(budget, found.nearest, found.left_out)
    search = _Search(str(model), source, budget, str(text), Path(folder))
    search.until = time.monotonic() + 60 * minutes if minutes is not None else None
    search.progress, search.on_trial, search.thorough = progress, on_trial, thorough
    with search.locked():
        result = search.run(found)
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
    elif not _is_number(kv) or not 0 < kv < 1:
        what = (
            "no share of the KV cache is named" if kv is None else f"kv is {kv}, and a share between 0 and 1 is wanted"
        )
        raise SettingError(what, fix="--kv 0.5")
    if type(budget.context) is not int or budget.context < LEAST_CONTEXT:
        what = f"context is {budget.context!r}, and at least {LEAST_CONTEXT} tokens are wanted"
        raise SettingError(what, fix=f"--context {CONTEXT}")
    if budget.engine:
        find(budget.engine)  # raises for another name
    if not isinstance(model, str | Path):
        raise no_model(model)
    source = resolve(str(model))
    anatomy = Anatomy.of(source.path)
    if anatomy.surgical or (source.path / "surgery.json").is_file():
        fix = "give the base that it was made from"
        raise RecipeMismatchError("this model was converted already", where=source.name, fix=fix)
    context = min(budget.context, anatomy.positions or budget.context)
    chats = bool(read_tokenizer(source.path).chat_template)
    return Model(anatomy, source.name, source.path, chats), replace(budget, share=float(kv), context=context)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_folders(output: str | Path | None, keep: Path, base: Path, overwrite: bool) -> None:
    """Raise where the figures or the result may not be put. Only what surgery wrote is ever replaced."""
    if overlap(keep, base):
        raise SettingError("the figures may not lie in the model's folder or hold it", where=str(keep), fix=OTHER_KEEP)
    if keep.exists() and not keep.is_dir():
        raise SettingError("this is a file, and a folder is needed", where=str(keep), fix=OTHER_KEEP)
    if taken := [name for name in (TRIAL, BEST) if (keep / name).exists() and not (keep / FILE).is_file()]:
        what = f"a search needs the name {taken[0]!r} in this folder, and did not write what is there"
        raise SettingError(what, where=str(keep), fix=OTHER_KEEP)
    if output is None:
        return
    folder = OutputFolder(output, base, PLAN, overwrite=overwrite, resume=not overwrite)
    out = folder.out
    if overlap(out, keep):
        raise SettingError("the output and the figures may not lie in one another", where=str(out), fix="-o OUT")
    folder.refuse_unfinished()
    if os.path.lexists(out):
        if not overwrite:
            raise OutputExistsError("OUT exists", where=str(out), fix="choose another name, or add --overwrite")
        refuse_to_replace(out)


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
        self.text, self.made = text, ""
        digest, place = load_text(text, "held-out").sha256, current()
        self.identity = {
            "base": model_identity(model.folder), "text": digest, "context": budget.context, "version": __version__,
            "judge": JUDGE, "device": place.device, "dtype": place.dtype,
        }  # fmt: skip
        self.known: dict[str, dict] = {}
        self.judges: dict[str, Judge] = {}
        self.notes: list[str] = []
        self.failed: list[SurgeryError] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other search uses the folder, and the figures of an earlier run are known."""
        with used_alone(self.folder, OTHER_KEEP):
            self.known = self._read()
            self._write()
            yield

    def run(self, asked: Options) -> Fitted:
        """Try the options, those that promise most last and most thoroughly."""
        rows = {option.name: Tried(option.name, option.share, option.plan.tier) for option in asked.found}
        result = Fitted(self.model.name, self.budget, rows, asked.left_out, asked.others, notes=self.notes)
        result.options = {option.name: option for option in asked.found}
        first = self._all(asked.found, FIRST, rows)
        if not first and self.failed:
            raise self.failed[0]
        for option in pairs(_two_best(first), self.model, self.budget):
            rows[option.name] = Tried(option.name, option.share, option.plan.tier)
            result.options[option.name] = option
            first += self._all([option], FIRST, rows)
        first.sort(key=_total)
        going = [option for option, _ in first] if self.thorough or not first else _survivors(first)
        for option, _ in first:
            if option not in going:
                rows[option.name].why = "lost more in the first trial"
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
            if self.until is not None and time.monotonic() > self.until and any(row.last for row in rows.values()):
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
            remove_own(self.folder / BEST)
            (self.folder / TRIAL).rename(self.folder / BEST)
            write_json(note, {"key": self.made})
            self.made = ""

    def conclude(self, result: Fitted, output: str | Path | None, overwrite: bool) -> None:
        """Write the best result, if an output is named, and say of each option why it is not the best one.

        Raises:
            SurgeryError: nothing was tried as its recipe says, and a result is wanted.
        """
        if output is None:
            if result.order:
                result.settle(result.order[0].name, BEST_AT[self.budget.goal])
            return
        if not result.order:
            if self.failed:
                raise self.failed[0]
            fix = "more --minutes: the same command goes on from what was measured"
            raise SettingError("no option was tried as its recipe says", where=str(self.folder), fix=fix)
        option, report = self._best(result)
        result.settle(option.name, "chosen")
        result.chosen = option.name
        out = OutputFolder(output, self.model.folder, PLAN, overwrite=overwrite, resume=not overwrite)
        with out.opened(option.plan.output_bytes) as partial:
            out.empty()  # an earlier run may have begun to copy another option
            shutil.copytree(report.folder, partial, dirs_exist_ok=True)
        result.report = Report.of(out.out)
        result.report.data["fit"] = result.to_dict()
        with suppress(SurgeryError):  # without matplotlib the table is all
            result.plot(out.out / PICTURE)
        result.report.save(list_files=True)
        for name in (TRIAL, BEST):
            remove_own(self.folder / name)

    def _best(self, result: Fitted) -> tuple[Option, Report]:
        """The best option that keeps what is asked from far back, and passes its check and gate; else the best of all.

        Its result is in the folder `BEST`, checked and scored.
        """
        for option in self._candidates(result):
            row = result.rows[option.name]
            if row.whole is not None and not row.whole.keeps:
                row.why = f"it repeats {row.whole.kept} of the {row.whole.asked} passkeys that the base repeats"
                continue
            try:
                report = self._finished(option)
            except SurgeryError as error:
                row.why = f"it could not be finished: {error.what}"
                continue
            if report.passed and (report.gate == "passed" or not report.data["gate"]["limits"]):
                return option, report
            reasons = "; ".join(report.data["gate"].get("reasons", []))
            row.why = f"its gate failed: {reasons}" if report.passed else "its check failed"
        result.notes.append("no option keeps enough: this is the one that loses least")
        return result.order[0], self._finished(result.order[0])

    def _candidates(self, result: Fitted) -> Iterator[Option]:
        """What was tried as its recipe says, the best first; then the others, which are tried so when asked for."""
        yield from result.order
        for row in sorted(result.rows.values(), key=lambda row: row.first.total if row.first else inf):
            option = result.options[row.name]
            if row.first and not row.whole and self._trial(option, WHOLE, result.rows) is not None:
                yield option

    def _finished(self, option: Option) -> Report:
        """The result of an option in the folder `BEST`, checked and scored; it is made again if it was not kept."""
        kept, note, key = self.folder / BEST, self.folder / f"{BEST}.json", self._key(option, WHOLE)
        if not (note.is_file() and read_json(note).get("key") == key and (kept / REPORT).is_file()):
            note.unlink(missing_ok=True)
            convert_only(option.recipe, self.name, kept, self.progress)
            write_json(note, {"key": key})
        return finish(kept, self.model.folder, option.recipe, RunOptions(progress=self.progress))

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
            raise SettingError(what, where=str(self.folder), fix=OTHER_KEEP)
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
