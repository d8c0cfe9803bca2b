"""The gate: compares measured figures with a recipe's limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery.errors import RecipeError, nearest
from surgery.evaluation import probes
from surgery.evaluation.probes.base import UNASKED


def gate(evaluation: dict, limits: dict) -> tuple[str, list[str]]:
    """Compare a report's `evaluation` with a recipe's limits.

    Args:
        limits: name of a limit (see `surgery.evaluation.probes.limits`) -> its value; None is no limit.

    Returns:
        ("passed" | "failed" | "not run", reasons). A figure that is NaN fails. A figure that was not measured
        makes the gate "not run", never "passed".

    Raises:
        SurgeryError: a limit is unknown or not a number.
    """
    known = probes.limits()
    for name, limit in limits.items():
        if name not in known:
            raise RecipeError(
                f"no limit {name!r}",
                exists=", ".join(known),
                fix=f"use {nearest(name, known) or next(iter(known))}",
            )
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit)):
            raise RecipeError(f"{name} is {limit!r}, not a number", fix=f"{name}: 0.5")
    if evaluation.get("status") != "done":
        return "not run", [evaluation.get("reason") or "the evaluation was not run"]

    failed = [fault for cls, result in probes.done(evaluation) for fault in cls.faults(result)]
    missing = []
    for name, limit in limits.items():
        cls, bound = known[name]
        result = probes.record_of(evaluation, cls)
        if limit is None or result.get("status") == UNASKED:
            continue
        if evaluation.get("base") is None:
            missing.append(f"{name} needs the base model to compare with")
        elif reason := cls.missing(result):
            missing.append(f"{name}: {reason}")
        elif not finite(value := bound.figure(result)):
            failed.append(f"{name}: the figure is not a number")
        elif value < limit if bound.at_least else value > limit:
            failed.append(f"{name}: {value:.4g}, the limit is {limit:g}")
    return ("failed" if failed else "not run" if missing else "passed"), failed + missing


@dataclass(frozen=True)
class Comparison:
    """A figure and its limit."""

    words: str
    value: float
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        """The comparison as "KL 0.502 ≤ 1.0" or "KL 1.32 > 1.0"."""
        sign = ("≥" if self.passed else "<") if self.at_least else ("≤" if self.passed else ">")
        shown = f"{self.value:.3f}"
        if not self.passed and abs(self.value - self.limit) < 0.001:  # three decimals would hide the difference
            shown = f"{self.value:.6g}"
        return f"{self.words} {shown} {sign} {self.limit}"


def comparisons(evaluation: dict | None, limits: dict) -> list[Comparison]:
    """Every measured figure that has a limit, with this limit; limits and evaluation are as for `gate`."""
    known, found = probes.limits(), []
    for name, limit in limits.items():
        if limit is None or name not in known or not evaluation or evaluation.get("status") != "done":
            continue
        cls, bound = known[name]
        record = probes.record_of(evaluation, cls)
        if record.get("status") == UNASKED or evaluation.get("base") is None or cls.missing(record):
            continue
        if finite(value := bound.figure(record)):
            found.append(Comparison(bound.words or name, value, limit, bound.at_least))
    return found


def damage(evaluation: dict | None) -> list[str]:
    """Reasons why a model is not usable, from every probe that was run, as clauses of a sentence.

    Args:
        evaluation: the evaluation in a report; if it is None or was not run, nothing is known and the result is [].
    """
    if not evaluation or evaluation.get("status", "done") != "done":
        return []
    return [cost for cls, result in probes.done(evaluation) for cost in cls.damage(result)]


def finite(value: object) -> bool:
    """Whether a value is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)
