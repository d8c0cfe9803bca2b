"""The result of a search: a row for each option, which one was chosen, and why the others were not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.evaluation.paired import HALF_95
from surgery.io.printing import Block, Printed, Table, count
from surgery.search.budget import GOALS

if TYPE_CHECKING:
    from surgery.report.report import Report
    from surgery.search.budget import Budget, Option
    from surgery.search.trials import Damage


@dataclass
class Tried:
    """An option and what it lost.

    Attributes:
        name: the recipe, and what was set in it.
        share: what it leaves of the base's KV cache.
        tier: of its result.
        first, whole: what it lost in a quick first trial, and as its recipe says; None: not tried so.
        why: why it was not chosen, or "chosen".
    """

    name: str
    share: float
    tier: str
    first: Damage | None = None
    whole: Damage | None = None
    why: str = ""

    def beside(self, best: Tried) -> str:
        """Why another one was chosen."""
        if self.whole is None or best.whole is None:
            return ""
        if best.whole.speed is not None:
            return "slower"
        return "lost more" if self.whole.worse_than(best.whole) else "within the interval of the chosen one"

    @property
    def last(self) -> Damage | None:
        """The more thorough trial."""
        return self.whole or self.first

    def to_dict(self) -> dict[str, Any]:
        trials = {name: each.to_dict() for name in ("first", "whole") if (each := getattr(self, name)) is not None}
        return {"option": self.name, "share": self.share, "tier": self.tier, **trials, "why": self.why}


@dataclass(repr=False)
class Fitted(Printed):
    """What a search found.

    Attributes:
        base: name of the base.
        budget: what the result may take.
        rows: option -> what it lost.
        left_out: recipe -> why it was not tried, of recipes that can make the cache smaller.
        others: recipe -> why it was not considered.
        options: the options, by name.
        chosen: name of the option that was applied; "": none was.
        report: the record of the result, if one was written.
        notes: remarks for the reader.
    """

    base: str
    budget: Budget
    rows: dict[str, Tried]
    left_out: dict[str, str]
    others: dict[str, str]
    options: dict[str, Option] = field(default_factory=dict)
    chosen: str = ""
    report: Report | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def order(self) -> list[Option]:
        """The options that were tried as their recipes say, the best for the goal first."""
        whole = [(self._rank(row), name) for name, row in self.rows.items() if row.whole is not None]
        return [self.options[name] for _, name in sorted(whole) if name in self.options]

    @property
    def best(self) -> str:
        """Name of the option that was chosen, or would be."""
        return self.chosen or (self.order[0].name if self.order else "")

    def settle(self, name: str, words: str) -> None:
        """Say which option is the best one, and of the others why they are not."""
        for other, row in self.rows.items():
            row.why = words if other == name else row.why or row.beside(self.rows[name])

    def headline(self) -> str:
        return f"{self.best or 'nothing'} for {self.budget.share:.0%} of the KV cache of {self.base}"

    def blocks(self) -> list[Block]:
        words = (
            "damage: KL from the base on plain text, and 0.1 times what answers lose, in nats a token",
            f"kept: passkeys repeated from a text of {self.budget.context:,} tokens, of those that the base repeats",
        )
        notes = [f"not tried: {name}: {reason}" for name, reason in self.left_out.items()]
        if self.others:
            notes.append(
                f"not considered: {count(len(self.others), 'recipe')}, which train or leave the cache as it is"
            )
        notes += [f"note: {note}" for note in self.notes]
        return [self.table(), "", *words, "", ("best", self.best or "none"), *notes]

    def table(self) -> Table:
        """A row for each option, the least damage first."""
        rows = []
        timed = self.budget.goal != GOALS[0]
        for row in sorted(self.rows.values(), key=self._rank):
            trial = row.last
            figures = ["", "", "", "", ""]
            if trial is not None:
                kept = f"{trial.kept}/{trial.asked}"
                interval = f"{trial.total:.3f} ± {HALF_95 * trial.error:.3f}"
                figures = [
                    "whole" if row.whole else "first",
                    interval,
                    f"{trial.kl:.3f}",
                    kept,
                    f"{trial.seconds:.0f} s",
                ]
            speed = [f"{trial.speed:.2f}x" if trial is not None and trial.speed else ""] * timed
            rows.append([row.name, f"{row.share:.0%}", *figures, *speed, row.why])
        return Table(("option", "KV", "trial", "damage", "KL", "kept", "time", *[self.budget.goal] * timed, ""), rows)

    def _rank(self, row: Tried) -> tuple[bool, float]:
        """Sorts what was tried as a whole before the rest, and the best for the goal first."""
        if row.last is None:
            return True, float("inf")
        return row.whole is None, -row.last.speed if row.last.speed is not None else row.last.total

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        budget = {"share": self.budget.share, "context": self.budget.context}
        budget |= {"native_only": self.budget.native, "engine": self.budget.engine}
        budget |= {"goal": self.budget.goal}
        rows = [row.to_dict() for row in sorted(self.rows.values(), key=self._rank)]
        return {
            "base": self.base, "budget": budget, "best": self.best, "options": rows, "left_out": self.left_out,
            "others": self.others, "notes": self.notes,
        }  # fmt: skip

    def plot(self, path: str | Path) -> Path:
        """Draw what each option leaves of the cache against its damage; a filled marker was tried as a whole.

        Errors are those of `surgery.report.plots.points`.
        """
        from surgery.report.plots import Point, points

        marks = {
            row.name: Point(row.share, row.last.total, filled=row.whole is not None)
            for row in self.rows.values()
            if row.last is not None
        }
        return points(
            path,
            marks,
            x_label=f"KV cache at {self.budget.context:,} tokens, share of the base's",
            y_label="damage, nats a token",
            title=f"{self.base}: what was tried for {self.budget.share:.0%} of the cache",
            kinds=("tried as its recipe says", "tried with less calibration"),
        )
