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
from surgery.evaluation.comparison.result import ROW as BASE
from surgery.evaluation.comparison.result import Comparison


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
    """A number of six decimals; what is counted as {"count", "of"}; None: it was not measured, or nothing counts."""
    number, of = comparison.number(model, measure, column), comparison.whole(model, measure, column)
    if number is None:
        return None
    return round(number, 6) if of is None else {"count": number, "of": of}


def table(comparison: Comparison, commands: list[str], machine: str) -> dict:
    """A results file (see results.py), with the columns that have a figure."""
    columns: list[Any] = [comparison.base]
    rows: dict[str, list[Any]] = {BASE: [BASE]} | {model: [f"`{Path(model).name}`"] for model in comparison.records}
    for measure, column in comparison.columns:
        cells = {model: cell(comparison, model, measure, column) for model in rows}
        if any(figure is not None for figure in cells.values()):
            columns.append({"name": column.title, "format": "{count} of {of}" if column.of else column.form})
            for model, row in rows.items():
                row.append(cells[model])
    return {"command": commands, "machine": machine, "columns": columns, "rows": [*rows.values()]}


def main() -> None:
    results.write_from(__doc__, lambda folder, *rest: table(read(folder), *rest), "compare", "of the comparison")


if __name__ == "__main__":
    main()
