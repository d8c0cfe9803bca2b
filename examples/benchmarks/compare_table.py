"""Writes the table of a comparison (`surgery compare` or `surgery sweep`) to results/compare-NAME.json.

    python examples/benchmarks/compare_table.py FOLDER NAME --machine "..." --command "..." [--command "..."]

FOLDER is where the comparison keeps its figures. The commands are those that made the models and measured them. The
row of a model has the name of its folder.
"""

import json
from pathlib import Path
from typing import Any

import results

from surgery.evaluation.comparison.measures import MEASURES, Column, Measure
from surgery.evaluation.comparison.result import ROW, Comparison

BASE = "the base"


def read(folder: Path) -> Comparison:
    """The finished comparison in a folder.

    Raises:
        SystemExit: the comparison was not finished.
    """
    data = json.loads((folder / "compare.json").read_text(encoding="utf-8")).get("comparison")
    if data is None:
        raise SystemExit(f"{folder}: this comparison was not finished")
    measured = {name for records in data["records"].values() for name in records}
    return Comparison(data["base"], tuple(m for m in MEASURES if m.name in measured), data["records"])


def cell(comparison: Comparison, model: str, measure: Measure, column: Column) -> Any:
    """A number; what is counted as {"count", "of"}; None where it was not measured, and where nothing counts."""
    number, of = comparison.number(model, measure, column), comparison.whole(model, measure, column)
    return number if number is None or of is None else {"count": number, "of": of}


def table(comparison: Comparison, commands: list[str], machine: str) -> dict:
    """A results file (see results.py)."""
    columns: list[Any] = [comparison.base]
    for _, column in comparison.columns:
        columns.append({"name": column.title, "format": "{count} of {of}" if column.of else column.form})
    rows = [
        [
            BASE if model == ROW else f"`{Path(model).name}`",
            *(cell(comparison, model, *each) for each in comparison.columns),
        ]
        for model in (ROW, *comparison.records)
    ]
    return {"command": commands, "machine": machine, "columns": columns, "rows": rows}


def main() -> None:
    results.write_from(__doc__, lambda folder, *rest: table(read(folder), *rest), "compare", "of the comparison")


if __name__ == "__main__":
    main()
