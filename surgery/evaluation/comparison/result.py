"""The result of a comparison: a row for each model, the base first. It can be printed, drawn and written as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.evaluation.comparison.measures import CHAT, MEASURES, NONE, RECALL, Column, Measure
from surgery.evaluation.paired import few_words
from surgery.evaluation.probes.recall import floor_words
from surgery.io.printing import Block, Printed, Table, count

BASE, ROW = "base", "the base"  # its side of a record, and the name of its row
ENOUGH = 0.9  # share of the needles from which a marker is filled
DRAWN = ("cache", "loss-2048")  # the picture has the cache of the one against the KL of the other


@dataclass
class Comparison(Printed):
    """Several models beside their base.

    Attributes:
        base: name of the base.
        measures: what was measured.
        records: model -> measurement -> its record; in each the base beside the model.
        names: model -> its name in table, notes and picture, where that is another one.
        taken: model -> the measurements whose figures stood in its surgery.json.
        settings: text and machine.
        notes: remarks for the reader.
    """

    base: str
    measures: tuple[Measure, ...]
    records: dict[str, dict[str, dict]]
    names: dict[str, str] = field(default_factory=dict)
    taken: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[tuple[Measure, Column]]:
        """The columns of the table, with their measurements."""
        every = [(measure, column) for measure in self.measures for column in measure.columns]
        shown = [each for each in every if any(self.cell(model, *each) for model in self.records)]
        return [each for each in every if not each[1].of_some or each in shown]

    def cell(self, model: str, measure: Measure, column: Column) -> str:
        """The text of a cell; of the base the first record that has its figure."""
        cells = (column.cell(record, side) for record, side in self._sides(model, measure))
        return next(filter(None, cells), "")

    def _sides(self, model: str, measure: Measure) -> list[tuple[dict | None, str]]:
        """The records of a row, with the side of them that is meant: one of a model; of the base those beside it."""
        if model != ROW:
            return [(self.records[model].get(measure.name), "out")]
        return [(records.get(measure.name), BASE) for records in self.records.values()]

    @property
    def shown(self) -> dict[str, str]:
        """Row -> its name in table, notes and picture."""
        return {ROW: ROW} | {model: self.names.get(model, model) for model in self.records}

    @property
    def tables(self) -> list[tuple[str, Table, list[str]]]:
        """What the models can do, then what they cost: a heading, a row for each model, and lines on the columns."""
        found = []
        for heading, is_cost in (("What the models can do", False), ("What they cost", True)):
            if columns := [each for each in self.columns if each[0].is_cost == is_cost]:
                titles = ("", *(column.title for _, column in columns))
                rows = [[name, *(self.cell(model, *each) for each in columns)] for model, name in self.shown.items()]
                lines = [f"{column.title}: {column.what}" for _, column in columns]
                if any(NONE in row[1:] for row in rows):
                    lines.append(f"{NONE}: the base answers no prompt that counts for this model")
                found.append((heading, Table(titles, rows), lines))
        return found

    def headline(self) -> str:
        return f"{count(len(self.records), 'model')} beside {self.base}"

    def blocks(self) -> list[Block]:
        tables = [block for _, table, lines in self.tables for block in (table, "", *lines, "")]
        return [*tables, *(f"note: {note}" for note in self.all_notes)]

    @property
    def all_notes(self) -> list[str]:
        """The notes, those of the measurements, why some were not run, and what was taken from surgery.json."""
        shown = self.shown
        why: dict[tuple[str, str], list[str]] = {}  # measurement and reason -> the models
        for model, records in self.records.items():
            for measure in self.measures:
                if (record := records[measure.name]).get("status") != "done":
                    reason = record.get("reason") or "no reason was recorded"
                    why.setdefault((measure.what, reason), []).append(shown[model])
        unmeasured = (f"{what} of {', '.join(models)}: not run: {reason}" for (what, reason), models in why.items())
        said: dict[str, list[str]] = {}  # note -> the models of whose measurement it is
        for model, records in self.records.items():
            for measure in self.measures:
                for note in records[measure.name].get("notes") or []:
                    said.setdefault(f"{measure.what}: {note}", []).append(shown[model])
        whose = ("" if len(models) == len(self.records) else f" ({', '.join(models)})" for models in said.values())
        notes = [*self.notes, *(f"{note}{of}" for note, of in zip(said, whose, strict=True))]
        notes += [f"{what}: {words}: its column proves nothing" for what, words in self._floors()]
        notes += self._few()
        taken = [f"{shown[model]} ({', '.join(names)})" for model, names in self.taken.items() if names]
        return [*notes, *sorted(unmeasured), *([f"taken from surgery.json: {'; '.join(taken)}"] if taken else [])]

    def _floors(self) -> Iterator[tuple[str, str]]:
        """The measurements in which the base answers no more than a guess does, and these words."""
        for measure in self.measures:
            for records in self.records.values():
                if words := floor_words(records[measure.name], "the base"):
                    yield measure.what, words
                    break

    def _few(self) -> Iterator[str]:
        """Short requests are too few for a share of their own; `compare` asks no others."""
        sides = (records.get(CHAT, {}).get(BASE) for records in self.records.values())
        asked = [side["of"] for side in sides if side]
        if few := few_words(asked[:1], "short request", f"surgery eval OUT --base BASE --probe {CHAT} requests=FILE"):
            yield few.removesuffix(".")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: the rows of the table as numbers, and the records that they come from."""
        rows = [
            {"model": model, "name": name}
            | {column.title: self.number(model, measure, column) for measure, column in self.columns}
            for model, name in self.shown.items()
        ]
        data = {"base": self.base, "settings": self.settings, "rows": rows, "records": self.records}
        return data | ({"taken": self.taken} if any(self.taken.values()) else {}) | {"notes": self.all_notes}

    def number(self, model: str, measure: Measure, column: Column) -> float | None:
        """The number of a cell; None where it was not measured, and for a count out of nothing."""
        return self._figure(model, measure, column.value)

    def whole(self, model: str, measure: Measure, column: Column) -> int | None:
        """What the number of a cell is a count out of; None if it is no count."""
        return self._figure(model, measure, column.of) if column.of else None

    def _figure(self, model: str, measure: Measure, value: Callable[[dict, str], Any]) -> Any:
        """A value from a model's record; for the base from the first record that has it."""
        for record, side in self._sides(model, measure):
            if record and record.get("status", "done") == "done" and (found := value(record, side)) is not None:
                return found
        return None

    def plot(self, path: str | Path) -> Path | None:
        """Draw what each model saves and loses: its cache at 8,192 tokens against its KL from the base.

        A filled marker: it keeps nine tenths of the needles that the base finds. Errors are those of
        `surgery.report.plots.points`.

        Returns:
            The file; None, and nothing is drawn, if cache and KL were not both measured.
        """
        from surgery.report.plots import Point, points

        (cache,), (loss,) = ([m for m in MEASURES if m.name == name] for name in DRAWN)
        x_axis, y_axis = (cache, cache.columns[-1]), (loss, loss.columns[-1])
        whole, marks, shown = self.number(ROW, *x_axis), {}, self.shown
        asked = any(self._kept(model) is not None for model in self.records)
        for model in self.records:
            x, y, kept = self.number(model, *x_axis), self.number(model, *y_axis), self._kept(model)
            filled = not asked or (kept is not None and kept >= ENOUGH)
            if whole and x is not None and y is not None:
                marks[shown[model]] = Point(x / whole, y, filled)
        if not marks:
            return None
        return points(
            path,
            marks | {ROW: Point(1.0, 0.0)},
            x_label="KV cache at 8,192 tokens, share of the base's",
            y_label="KL from the base, nats a token",
            title=f"{self.base}: what is saved, and what is lost",
            kinds=(f"keeps {ENOUGH:.0%} of the needles", self._hollow()) if asked else None,
        )

    def _hollow(self) -> str:
        """What a hollow marker may mean in this picture: fewer needles, or why there is no share of them."""
        unknown = [self.records[model].get(RECALL) or {} for model in self.records if self._kept(model) is None]
        why = {"none counts" if record.get("kept") else "not measured" for record in unknown}
        return ", or ".join(["fewer", *sorted(why)])

    def _kept(self, model: str) -> float | None:
        """The share of needles that a model keeps; None: it was not asked."""
        return ((self.records[model].get(RECALL) or {}).get("kept") or {}).get("share")
