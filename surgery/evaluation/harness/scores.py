"""The scores of one or two models on tasks: totals, groups, and the drop of each task with its interval.

A task has one metric that judges it: normalised accuracy where it has that, or accuracy, or the first of its own. The
`drop` is how much worse the converted model is by that metric. Its 95% interval is of the differences of the items,
since both models read the same ones: for scores from 0 to 1 that of Agresti and Min (2005), which adds half an item
each way and so is not empty where no item differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from surgery.evaluation.harness.task_set import RULER, ItemScore, TaskSet
from surgery.evaluation.paired import HALF_95, CaseResult


@dataclass(repr=False)
class TaskResult(CaseResult):
    """The result of the probe. A case is (task, number of the item); an outcome is an `ItemScore`.

    Attributes:
        tasks, tokenizer: what is run. A result is not stored with them.
        answers: label -> file with the answers of an interrupted run; {} for loaded models.
        by_others: the outcomes of `out` by lm-eval's own command; [] if it was not run.
        manner: how the items were asked, for the record of each task.
    """

    tasks: TaskSet | None = None
    tokenizer: Any = None
    answers: dict[str, Path] = field(default_factory=dict)
    by_others: list[ItemScore] = field(default_factory=list)
    manner: dict[str, Any] = field(default_factory=dict)

    PROBE: ClassVar[str] = "tasks"
    COUNT: ClassVar[str] = "items"
    COMPARISON: ClassVar[str] = "tasks"

    def by_task(self, label: str) -> dict[str, list[ItemScore]]:
        """The outcomes of one model: task -> those of its items; {} if it was not run."""
        found: dict[str, list[ItemScore]] = {}
        for (name, _), score in zip(self.cases, self.outcomes.get(label, ()), strict=label in self.outcomes):
            found.setdefault(name, []).append(score)
        return found

    def side(self, label: str) -> dict:
        """Every metric of one model: task -> metric -> value."""
        return {
            name: {metric: self.tasks.total(name, metric, scores) for metric in self.tasks.metrics(name, scores)}
            for name, scores in self.by_task(label).items()
        }

    def compare(self) -> dict:
        """What each task and group says, by name: its metric, the models' values, and the drop with its interval."""
        base, out = self.by_task("base"), self.by_task("out")
        rows = {key: row for name in out for key, row in self._rows(name, base.get(name), out[name]).items()}
        for group, names in self.tasks.groups().items():
            if pooled := self._pooled(group, [name for name in names if name in rows], base, out):
                rows[group] = pooled
        return rows

    def _rows(self, name: str, base: list[ItemScore] | None, out: list[ItemScore]) -> dict[str, dict]:
        """The record of a task; in RULER one for each length of the prompts."""
        metrics, about = self.tasks.metrics(name, out), self.tasks.about(name) | self.manner
        if not (name in RULER and self.tasks.lengths):
            return {name: self._row(name, metrics[0], base, out) | about}
        return {f"{name} {metric}": self._row(name, metric, base, out) | about for metric in metrics}

    def _row(self, name: str, metric: str, base: list[ItemScore] | None, out: list[ItemScore]) -> dict:
        higher = self.tasks.higher_is_better(name, metric)
        numbers = [score.number(metric) for score in out]
        of = sum(number is not None for number in numbers) or len(out)
        row = {"metric": metric, "higher_is_better": higher, "of": of, "out": self.tasks.total(name, metric, out)}
        if base is None:
            return row
        row["base"] = self.tasks.total(name, metric, base)
        row["drop"] = (row["base"] - row["out"]) if higher else (row["out"] - row["base"])
        paired = zip((score.number(metric) for score in base), numbers, strict=True)
        drops, interval = _paired([(one, two) for one, two in paired if one is not None and two is not None], higher)
        if drops and math.isclose(math.fsum(drops) / len(drops), row["drop"], abs_tol=1e-9):  # a mean over the items
            row |= interval
            row["worse"], row["better"] = sum(drop > 0 for drop in drops), sum(drop < 0 for drop in drops)
        return row

    def _common_metric(self, names: list[str], out: dict, rules: dict[str, bool]) -> str | None:
        """The metric of a group: the one that judges its tasks, or one that the group names; None: there is none."""
        judging = {self.tasks.metrics(name, out[name])[0] for name in names}
        if not rules or (len(judging) == 1 and next(iter(judging)).partition(",")[0] in rules):
            return judging.pop() if len(judging) == 1 else None
        known = [self.tasks.metrics(name, out[name]) for name in names]
        shared = (metric for metric in (known[0] if known else ()) if all(metric in each for each in known))
        return next((metric for metric in shared if metric.partition(",")[0] in rules), None)

    def _pooled(self, group: str, names: list[str], base: dict, out: dict) -> dict | None:
        """The row of a group: the mean over all items of its tasks, if they have one metric that is such a mean; or
        over its tasks, where the group says so. lm-eval reports the same.
        """
        rules = self.tasks.aggregates(group)
        metric = self._common_metric(names, out, rules)
        if metric is None:
            return None
        sides = {"out": out} | ({"base": base} if base else {})
        numbers = {
            label: [score.number(metric) for name in names for score in side[name]] for label, side in sides.items()
        }
        if any(number is None for each in numbers.values() for number in each):
            return None
        higher, of = self.tasks.higher_is_better(names[0], metric), len(numbers["out"])
        row: dict[str, Any] = {"metric": metric, "higher_is_better": higher, "of": of, "tasks": len(names)}
        by_size = rules.get(metric.partition(",")[0], True)
        if by_size:
            totals = {label: math.fsum(each) / len(each) for label, each in numbers.items()}
        else:
            means = {
                label: [self.tasks.total(name, metric, side[name]) for name in names] for label, side in sides.items()
            }
            totals = {label: math.fsum(each) / len(each) for label, each in means.items()}
        row |= totals | self.manner
        if not base:
            return row
        if not by_size:
            return row | {"drop": (row["base"] - row["out"]) * (1 if higher else -1)}
        drops, interval = _paired(list(zip(numbers["base"], numbers["out"], strict=True)), higher)
        return row | {"drop": math.fsum(drops) / of} | interval

    def about(self) -> dict:
        """Tasks that were left out, and whether lm-eval's own command agrees."""
        data: dict[str, Any] = {}
        if self.tasks and self.tasks.left_out:
            data["left_out"] = self.tasks.left_out
        if self.by_others:
            pairs = zip(self.outcomes["out"], self.by_others, strict=True)
            same = sum((one.values, one.prompt) == (two.values, two.prompt) for one, two in pairs)
            data["by_others"] = {"same": same, "of": len(self.by_others)}
        return data

    def case(self, index: int) -> dict:
        """One item: its task, its number and what each model scored."""
        name, number = self.cases[index]
        return {"task": name, "item": number} | {
            label: {key: value for key, value in outcomes[index].values.items() if isinstance(value, int | float)}
            for label, outcomes in self.outcomes.items()
        }

    def alone(self) -> str:
        return ", ".join(f"{name}: {row['metric']} {row['out']:.4g}" for name, row in self.compare().items())


def _paired(pairs: Sequence[tuple[float, float]], higher: bool) -> tuple[list[float], dict[str, float]]:
    """How much worse each item is than the base's, and the interval of their mean; {} without items.

    Args:
        pairs: scores of the base and of the model.
        higher: whether a higher score is better.
    """
    drops = [(one - two) if higher else (two - one) for one, two in pairs]
    if not drops:
        return drops, {}
    low, high = paired_interval(drops, all(0 <= value <= 1 for pair in pairs for value in pair))
    return drops, {"low": low, "high": high}


def paired_interval(drops: Sequence[float], shares: bool) -> tuple[float, float]:
    """The 95% interval of a mean of differences; `shares`: whether each is between two scores from 0 to 1.

    For shares, the formula of Agresti and Min (Statistics in Medicine 24, 2005): to the four cells of the table (both
    right, one, other, neither) half an item each is added; no difference is larger than 1. Otherwise the normal
    interval of a mean.
    """
    number, total, squares = len(drops), math.fsum(drops), math.fsum(drop * drop for drop in drops)
    if shares:
        number, squares = number + 2, squares + 1
    mean = total / number
    degrees = number if shares else max(1, number - 1)
    spread = math.sqrt(max(0.0, squares - number * mean * mean) / degrees / number)
    low, high = mean - HALF_95 * spread, mean + HALF_95 * spread
    return (max(-1.0, low), min(1.0, high)) if shares else (low, high)
