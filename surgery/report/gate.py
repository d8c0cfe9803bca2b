"""The gate: compares measured figures with a recipe's limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
        _refuse_no_number(name, limit, known[name][1].by_item is not None)
    if evaluation.get("status") != "done":
        return "not run", [evaluation.get("reason") or "the evaluation was not run"]

    failed = [fault for cls, result in probes.done(evaluation) for fault in cls.faults(result)]
    missing = []
    for bounded in _bounded(evaluation, limits):
        if bounded.missing:
            missing.append(bounded.missing)
        elif bounded.comparison is None:
            failed.append(f"{bounded.name}: the figure is not a number")
        elif not bounded.comparison.passed:
            failed.append(f"{bounded.name}: {bounded.comparison.value:.4g}, the limit is {bounded.comparison.limit:g}")
    return ("failed" if failed else "not run" if missing else "passed"), failed + missing


def _refuse_no_number(name: str, limit: object, by_item: bool) -> None:
    """Raise unless a limit is a number or None; `by_item`: unless it is a dict of numbers."""
    limits = limit.values() if isinstance(limit, dict) else [limit]
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) and not math.isnan(n) for n in limits)
    if limit is None or (numbers and isinstance(limit, dict) == by_item):
        return
    what = f"{name} is {limit!r}, not {'a number for each item' if by_item else 'a number'}"
    raise RecipeError(what, fix=f"{name}: {'{piqa: 0.01}' if by_item else 0.5}")


@dataclass(frozen=True)
class LimitedFigure:
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


def comparisons(evaluation: dict | None, limits: dict) -> list[LimitedFigure]:
    """Every measured figure that has a limit, with this limit; limits and evaluation are as for `gate`."""
    if not evaluation or evaluation.get("status") != "done":
        return []
    return [bounded.comparison for bounded in _bounded(evaluation, limits) if bounded.comparison]


class _Bounded(NamedTuple):
    """A limit with its figure.

    Attributes:
        missing: the reason why there is no figure; "" if there is one.
        comparison: None where the figure is missing or not a number.
    """

    name: str
    missing: str
    comparison: LimitedFigure | None


def _bounded(evaluation: dict, limits: dict) -> Iterator[_Bounded]:
    """Every known limit that a probe should answer, in the order of `limits`; of a dict of limits, each."""
    known = probes.limits()
    for name, limit in limits.items():
        if limit is None or name not in known:
            continue
        cls, bound = known[name]
        record = probes.record_of(evaluation, cls)
        if record.get("status") == UNASKED:
            continue
        missing = "" if evaluation.get("base") is not None else " needs the base model to compare with"
        missing = missing or (f": {reason}" if (reason := cls.missing(record)) else "")
        figure = None if missing else bound.figure(record)
        for item, most in limit.items() if bound.by_item else [("", limit)]:
            key, words = f"{name} {item}".rstrip(), f"{bound.words or name} {item}".rstrip()
            value, absent = figure, missing
            if bound.by_item and not missing:
                value = figure.get(item)
                absent = "" if item in figure else f": not measured; measured: {', '.join(figure)}"
            compared = LimitedFigure(words, value, most, bound.at_least) if not absent and finite(value) else None
            yield _Bounded(key, f"{key}{absent}" if absent else "", compared)


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
