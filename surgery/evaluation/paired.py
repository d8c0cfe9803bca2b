"""Runs the same cases on a model and on its base, one after the other, and computes shares with intervals.

Each model runs the cases as it is. After that it may run them again with changes that are made at run time, such as
heads that are switched off.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from surgery.errors import ModelError
from surgery.evaluation.footprint import footprint
from surgery.evaluation.result import Result
from surgery.io.loading import loaded, refuse_pickle
from surgery.io.printing import count
from surgery.machine.device import too_big

if TYPE_CHECKING:
    from surgery.io.loading import ModelSource

LABELS = ("base", "out")
HALF_95 = 1.959964  # standard errors on each side of a 95% interval
REPORTABLE = 48  # cases from which a share says something: the 95% interval of a half is 36% to 64%
MODELS = {"base": "the base", "out": "the converted model"}  # label -> the model that runs, in progress
NAMES = {"base": "base", "out": "converted"}  # label -> name of the model in results


def sides(out: ModelSource, base: ModelSource | None) -> dict[str, ModelSource]:
    """The models by label, the base first."""
    return dict(zip(LABELS, (base, out), strict=True)) if base is not None else {"out": out}


@dataclass(repr=False)
class CaseResult(Result):
    """The outcomes of one or two models on the same cases.

    Attributes:
        status: "done" or "not run". If it was not run, `reason` says why and there are no outcomes.
        settings: the source of the cases (title and sha256 of a text), and how they were drawn.
        cases: the cases, in the order of the outcomes.
        outcomes: "base" (if one was given) and "out" -> one outcome for each case.
        changed: for the same labels: the outcomes of this model with a change made at run time, by the change's name.
        running: the label of the model that runs now.
        notes: remarks for the reader, such as figures that could not be determined.
        COUNT: key of the number of cases in the JSON.
        COMPARISON: key of the result of `compare` in the JSON.
    """

    status: str
    settings: dict
    cases: list
    outcomes: dict[str, list] = field(default_factory=dict)
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    changed: dict[str, dict[str, list]] = field(default_factory=dict)
    running: str = ""

    COUNT: ClassVar[str] = "number"
    COMPARISON: ClassVar[str] = "kept"

    def about(self) -> dict:
        """Figures about the cases themselves, for JSON."""
        return {}

    def side(self, label: str) -> dict:
        """The figures of one model over all cases."""
        raise NotImplementedError

    def change_figures(self) -> dict:
        """The figures of the models with changes made at run time, for JSON; {} if there were none."""
        return {}

    def compare(self) -> dict | None:
        """The comparison of both models' outcomes, case by case; None without a base."""
        raise NotImplementedError

    def case(self, index: int) -> dict:
        """One case with its outcomes, for JSON."""
        return {label: vars(outcomes[index]) for label, outcomes in self.outcomes.items()}

    def alone(self) -> str:
        """Hits and number of cases of a model that was run without a base."""
        figures = self.side("out")
        return f"{self.PROBE.replace('_', ' ')}: {next(iter(figures.values()))} of {figures['of']}"

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data for JSON; NaN becomes None."""
        data: dict[str, Any] = {"status": self.status} | ({"reason": self.reason} if self.reason else {})
        data |= {"settings": self.settings, self.COUNT: len(self.cases)} | self.about()
        data |= {label: self.side(label) for label in self.outcomes}
        if self.outcomes:
            data |= self.change_figures() | {self.COMPARISON: self.compare()}
            data["cases"] = [self.case(index) for index in range(len(self.cases))]
        return finite(data | ({"notes": self.notes} if self.notes else {}))


class Runs(Protocol):
    """What `run_base_then_model` runs: a probe (see `probes.base.CaseProbe`)."""

    @property
    def cases_are(self) -> str: ...
    def run(self, model: Any, result: Any, progress: Callable[[int], None]) -> list: ...
    def count_changes(self, label: str) -> int: ...
    def changes(self, label: str, model: Any, result: Any) -> Mapping[str, AbstractContextManager]: ...
    def extra_bytes(self, cases: list, kv_bytes: int) -> int: ...
    def logits_at_once(self, result: Any, positions: int) -> int: ...
    def is_broken(self, outcome: Any) -> bool: ...


def run_base_then_model(
    result: CaseResult,
    sources: dict[str, ModelSource],
    probe: Runs,
    progress: Callable[[int, int, str], None] | None = None,
    allow_pickle: bool = False,
    keep: Callable[[list], None] | None = None,
) -> None:
    """Run the cases on each model with one model in memory at a time. If one does not fit, record that instead.

    Args:
        result: gets `outcomes` and `changed` by label, and `notes`; if nothing was run, `status` "not run" and a
            `reason`.
        sources: label ("base", "out") -> folder or loaded model, in the order in which they run.
        probe: the probe whose cases they are.
        progress: called after each case as progress(done, total, text); the text says how far the running model is,
            and is "" if the cases run only once.
        allow_pickle: whether the base may have .bin weights only.
        keep: called with the base's outcomes before another model runs, which may fail.

    Raises:
        SurgeryError: a folder has no safetensors, or the base gives NaN.
    """
    pickled = {label: allow_pickle and label == "base" for label in sources}
    for label, source in sources.items():
        if isinstance(source, str | Path) and not pickled[label]:
            refuse_pickle(Path(source))
    needs = {label: _bytes_needed(result, label, source, probe) for label, source in sources.items()}
    if reason := next(filter(None, (too_big(weights, extra=more) for weights, more in needs.values())), ""):
        result.status, result.reason = "not run", reason
        return
    cases, passes = len(result.cases), {label: 1 + probe.count_changes(label) for label in sources}
    total, before = cases * sum(passes.values()), 0
    for label, source in sources.items():

        def tick(done: int, before: int = before, which: str = MODELS[label]) -> None:
            if progress:
                words = f"asked {before + done} of {total}, now {which}" if total > cases else ""
                progress(before + done, total, words)

        tick(0)
        result.running = label
        with loaded(source, allow_pickle=pickled[label], beside=needs[label][1]) as model:
            result.outcomes[label] = probe.run(model, result, tick)
            _report_broken(result, label, probe)
            if keep and label == "base":
                keep(result.outcomes[label])
            for index, (name, change) in enumerate(probe.changes(label, model, result).items(), start=1):
                named = partial(tick, before=before + index * cases, which=f"{MODELS[label]} ({name})")
                with change:
                    result.changed.setdefault(label, {})[name] = probe.run(model, result, named)
            if len(result.changed.get(label, {})) + 1 < passes[label]:  # there was less to change than there might be
                tick(cases, before=before + (passes[label] - 1) * cases)
        del model
        gc.collect()  # otherwise a model in a reference cycle would stay in memory during the next run
        before += cases * passes[label]


def _bytes_needed(result: CaseResult, label: str, source: ModelSource, probe: Runs) -> tuple[int, int]:
    """Bytes to load a model (0 if it is loaded), and bytes in addition; notes on its size go to the result."""
    size, on_disk = footprint(source, label, result.notes), isinstance(source, str | Path)
    more = probe.extra_bytes(result.cases, size.kv_bytes_unfilled)
    more += probe.logits_at_once(result, size.positions) * size.logit_bytes
    return size.load_bytes if on_disk else 0, more


def _report_broken(result: CaseResult, label: str, probe: Runs) -> None:
    """Raise if the base gave NaN, and note it if the converted model did."""
    wrong, cases = sum(map(probe.is_broken, result.outcomes[label])), len(result.cases)
    if wrong and label == "base":
        raise ModelError(
            f"the base model itself gives NaN or infinite values ({probe.cases_are}: {wrong} of {cases})",
            fix="check that the base generates; a float16 overflow needs bfloat16 or float32 weights",
        )
    if wrong:
        result.notes.append(f"out gives NaN or infinite values for {wrong} of {cases} {probe.cases_are}: misses")


def share_of(name: str, hits: Iterable[bool], nlls: Iterable[float]) -> dict:
    """One model over all cases: hits (under the key `name`), number of cases, their share with its 95% interval, mean
    NLL.
    """
    hits, nlls = list(hits), list(nlls)
    low, high = wilson(sum(hits), len(hits))
    figures = {"of": len(hits), "accuracy": sum(hits) / len(hits), "low": low, "high": high}
    return {name: sum(hits)} | figures | {"nll": math.fsum(nlls) / len(nlls)}


def kept_of(pairs: Iterable[tuple[bool, bool]]) -> dict:
    """Of the cases that the base gets right, how many the model gets right too, and their share with a 95% interval.

    A pair is (base right, model right). The share is NaN if the base gets none right.
    """
    hits = [out for base, out in pairs if base]
    low, high = wilson(sum(hits), len(hits))
    share = sum(hits) / len(hits) if hits else math.nan
    return {"of": len(hits), "kept": sum(hits), "share": share, "low": low, "high": high}


def few_words(cells: Sequence[int], case: str, remedy: str) -> str:
    """A note on cells with too few cases for a share of their own; "" if all have enough.

    Args:
        cells: how many cases each cell has.
        case: what a case is ("needle"). remedy: what to set for enough of them ("samples=48").
    """
    fewest = min(cells, default=REPORTABLE)
    if fewest >= REPORTABLE:
        return ""
    if len(cells) == 1:
        few = f"{count(fewest, case)} {'is' if fewest == 1 else 'are'} few"
        return f"{few}: {REPORTABLE} make the share reportable ({remedy})."
    return f"A cell of {count(fewest, case)} has no share of its own: {REPORTABLE} make it reportable ({remedy})."


def percent(figures: dict) -> str:
    """Figures of `share_of` or `kept_of` as "75.0%, 95% interval 30.1% to 95.4%"."""
    share = figures.get("share", figures.get("accuracy"))
    return f"{share:.1%}, 95% interval {figures['low']:.1%} to {figures['high']:.1%}"


def kept_words(what: str, record: dict) -> str:
    """ "WHAT kept 3 of 4" for the record of a probe that compares case by case; "" where nothing was compared."""
    kept = record.get("kept") or {}
    return f"{what} kept {kept['kept']} of {kept['of']}" if kept.get("of") else ""


def wilson(hits: int, of: int, z: float = HALF_95) -> tuple[float, float]:
    """Interval of a share (Wilson 1927), 95% by default; (0, 1) if there were no cases.

    Its ends are the two shares p that lie z standard errors sqrt(p (1 - p) / of) away from hits / of.
    """
    if not of:
        return 0.0, 1.0
    share, spread = hits / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def finite(value):
    """The same structure with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
