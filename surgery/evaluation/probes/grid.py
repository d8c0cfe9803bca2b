"""A recall test over prompt lengths and depths: its figures by cell, as a table and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from surgery.evaluation.ablation import HeadAblation
from surgery.evaluation.paired import NAMES, REPORTABLE, few_words
from surgery.evaluation.probes.base import Table
from surgery.evaluation.probes.recall import RecallResult, hits_of


@dataclass(repr=False)
class NeedleResult(RecallResult):
    """The result of the recall test. `cases` are needles; an outcome is an `Outcome`.

    Attributes:
        settings: lengths, depths, samples, seed, secret, form, text (title, sha256), chance (that a guess is right).
        ablation: the query heads of `out` that were switched off, if any; `changed` has the outcomes.
    """

    ablation: HeadAblation | None = None

    PROBE: ClassVar[str] = "needles"
    COUNT: ClassVar[str] = "needles"

    def cell(self, label: str, length: int, depth: float) -> tuple[int, int]:
        """Hits and needles of one cell of the grid."""
        rows = zip(self.cases, self.outcomes[label], strict=True)
        hits = [outcome.hit for needle, outcome in rows if (needle.length, needle.depth) == (length, depth)]
        return sum(hits), len(hits)

    def grid(self, label: str) -> list[list[float]]:
        """Share of hits [depths][lengths]; NaN for a cell without needles."""
        return [
            [hits / total if total else math.nan for hits, total in (self.cell(label, n, depth) for n in self.lengths)]
            for depth in self.depths
        ]

    @property
    def lengths(self) -> list[int]:
        """Prompt lengths in tokens, the columns of the grid."""
        return self.settings["lengths"]

    @property
    def depths(self) -> list[float]:
        """Depths as shares of the text, the rows of the grid."""
        return self.settings["depths"]

    def side(self, label: str) -> dict:
        """The figures of one model: hits, accuracy with its 95% interval, mean NLL, and the grid."""
        return super().side(label) | {"grid": self.grid(label)}

    def change_figures(self) -> dict:
        """The figures of `out` with query heads off; {} if there were none."""
        if self.ablation is None:
            return {}
        sides = [hits_of(run) for run in self.changed["out"].values()]
        return {"without": self.ablation.to_dict(sides)}

    def case(self, index: int) -> dict:
        """See `RecallResult.case`; and whether it was found with query heads off."""
        off = [run[index].hit for run in self.changed.get("out", {}).values()]
        return super().case(index) | ({"without": off} if off else {})


def hits_table(result: NeedleResult) -> Table:
    """Depth x length: hits of each model. A star: streaming heads see the needle."""
    labels, starred = list(result.outcomes), _inside(result)
    rows = []
    for depth in result.depths:
        cells = []
        for length in result.lengths:
            hits = [result.cell(label, length, depth) for label in labels]
            star = "* " if (length, depth) in starred else ""
            cells.append(f"{star}{' → '.join(str(hit) for hit, _ in hits)} of {hits[0][1]}")
        rows.append([f"{depth:.2f}", *cells])
    return Table(("depth", *(f"prompts of {length:,} tokens" for length in result.lengths)), rows, justify="right")


def too_few(result: NeedleResult) -> str:
    """A note on cells with too few needles for a share of their own; "" if all have enough."""
    figures = [result.cell(next(iter(result.outcomes)), n, depth) for n in result.lengths for depth in result.depths]
    few = few_words([of for _, of in figures], "needle", f"samples={REPORTABLE}")
    return f"{few} The lines below are over all cells." if few and len(figures) > 1 else few


def heat_map(result: NeedleResult) -> dict:
    """Arguments of `surgery.report.plots.heat_maps`: the share of hits of each model, with counts in the cells."""
    starred = _inside(result)
    inside = [[(length, depth) in starred for length in result.lengths] for depth in result.depths]
    panels = {}
    for label in result.outcomes:
        side = result.side(label)
        counts = [[result.cell(label, length, depth) for length in result.lengths] for depth in result.depths]
        texts = [[f"{hits}/{of}" if of else "" for hits, of in row] for row in counts]
        name = NAMES[label] if len(result.outcomes) > 1 else "model"
        panels[f"{name}: {side['hits']} of {side['of']} found"] = {
            "values": side["grid"],
            "texts": texts,
            "hatched": inside,
        }
    kept = result.compare()
    title = "recall test: needles answered exactly"
    if kept and kept["of"]:
        interval = f"95% interval {kept['low']:.1%} to {kept['high']:.1%}"
        title += f"\nkept {kept['kept']} of {kept['of']} that the base finds\n({interval})"
    return {
        "panels": panels,
        "rows": [f"{depth:.2f}" for depth in result.depths],
        "columns": [f"{length:,}" for length in result.lengths],
        "row_label": "depth of the needle",
        "column_label": "tokens of the prompt",
        "value_label": "share of the needles found",
        "title": title,
        "limits": (0.0, 1.0),
        "hatch_label": "within sinks or window: proves nothing",
    }


def _inside(result: NeedleResult) -> set[tuple[int, float]]:
    """The cells with needles that streaming heads see."""
    return {(needle.length, needle.depth) for needle in result.cases if not result.counts(needle)}
