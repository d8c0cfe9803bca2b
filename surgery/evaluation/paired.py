"""Runs the same cases on a model and on its base, one after the other, and computes shares with intervals."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.errors import ModelError
from surgery.evaluation.footprint import footprint
from surgery.evaluation.result import Result
from surgery.io.loading import loaded, refuse_pickle
from surgery.machine.device import too_big

if TYPE_CHECKING:
    from surgery.io.loading import ModelSource

LABELS = ("base", "out")
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

    COUNT: ClassVar[str] = "number"
    COMPARISON: ClassVar[str] = "kept"

    def about(self) -> dict:
        """Figures about the cases themselves, for JSON."""
        return {}

    def side(self, label: str) -> dict:
        """The figures of one model over all cases."""
        raise NotImplementedError

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
            data |= {self.COMPARISON: self.compare(), "cases": [self.case(i) for i in range(len(self.cases))]}
        return finite(data | ({"notes": self.notes} if self.notes else {}))


def run_base_then_model(
    result: CaseResult,
    sources: dict[str, ModelSource],
    run_cases: Callable,
    *,
    what: str,
    extra: Callable[[int], int],
    broken: Callable,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Run the cases on each model with one model in memory at a time. If one does not fit, record that instead.

    Args:
        result: gets `outcomes` by label and `notes`; if nothing was run, `status` "not run" and a `reason`.
        sources: label ("base", "out") -> folder or loaded model, in the order in which they run.
        run_cases: called with a model and a callback(done); returns one outcome for each case.
        what: the name of the cases in messages.
        extra: bytes needed in addition to the weights, as a function of the model's KV bytes per token.
        broken: whether an outcome is NaN or infinite.
        progress: called after each case as progress(done, total, text); the text says how far the running model is,
            and is "" if there is only one model.

    Raises:
        SurgeryError: a folder has no safetensors, or the base gives NaN.
    """
    needs, cases = [], len(result.cases)
    for label, source in sources.items():
        size = footprint(source, label, result.notes)
        on_disk = isinstance(source, str | Path)
        if on_disk:
            refuse_pickle(Path(source))
        needs.append((size.load_bytes if on_disk else 0, extra(size.kv_bytes_per_token or 0)))
    if reason := next(filter(None, (too_big(weights, extra=more) for weights, more in needs)), ""):
        result.status, result.reason = "not run", reason
        return
    for index, (label, source) in enumerate(sources.items()):

        def tick(done: int, before: int = index * cases, which: str = MODELS[label]) -> None:
            if progress:
                words = f"asked {which} {done} of {cases}" if len(sources) > 1 else ""
                progress(before + done, len(sources) * cases, words)

        tick(0)
        with loaded(source) as model:
            result.outcomes[label] = run_cases(model, tick)
        del model
        gc.collect()  # otherwise a model in a reference cycle would stay in memory during the next run
        wrong = sum(map(broken, result.outcomes[label]))
        if wrong and label == "base":
            raise ModelError(
                f"the base model itself gives NaN or infinite values ({what}: {wrong} of {cases})",
                fix="check that the base generates; a float16 overflow needs bfloat16 or float32 weights",
            )
        if wrong:
            result.notes.append(f"out gives NaN or infinite values for {wrong} of {cases} {what}: misses")


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


def percent(figures: dict) -> str:
    """Figures of `share_of` or `kept_of` as "75.0%, 95% interval 30.1% to 95.4%"."""
    share = figures.get("share", figures.get("accuracy"))
    return f"{share:.1%}, 95% interval {figures['low']:.1%} to {figures['high']:.1%}"


def wilson(hits: int, of: int, z: float = 1.959964) -> tuple[float, float]:
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
