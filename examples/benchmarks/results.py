"""The figures of results/*.json: the only place where a measured figure is written down.

A results file is an object:

    command   the command that printed the figures, or a list of commands
    machine   the class of machine that they were taken on
    columns   names; or {"name": ..., "align": "left" | "right", "format": ...}. The first column is aligned left, the
              others right, unless they say otherwise
    rows      a list of cells each

A cell is a text, which is printed as it is; null, which is printed as nothing; a number, printed by the column's
`format` (a Python format string; with none as 12,934 or 0.5); an object of numbers, whose keys the format names
("{ratio:.2f}x ({low:.2f} to {high:.2f})"), or its own "format". A figure is written once; elsewhere a cell refers:

    {"from": NAME, "row": FIRST CELL, "column": NAME}    to a cell of another file; an object may get a "format"
    {"from": NAME, "row": FIRST CELL, "format": ...}     to cells of that row by number ("{1:.2f}", "{3[kept]}")
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
KEYS = {"command", "machine", "columns", "rows"}


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, its side ("left" or "right") and how a number in it is printed."""

    name: str
    align: str
    format: str = "{:,}"


@dataclass(frozen=True)
class Results:
    """A results file.

    Attributes:
        name: of the file, without .json.
        commands: what printed the figures.
        machine: the class of machine.
        columns: of the table.
        rows: cells as in the file.
    """

    name: str
    commands: tuple[str, ...]
    machine: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def texts(self) -> list[list[str]]:
        """The table's cells as they are printed, without the columns' names."""
        return [
            [printed(cell, column.format) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]

    def row(self, first: str) -> tuple[Any, ...]:
        """The row with this first cell, cells as in the file.

        Raises:
            SystemExit: there is none.
        """
        first_cells = [printed(row[0], self.columns[0].format) for row in self.rows]
        if first not in first_cells:
            raise SystemExit(f"results/{self.name}.json has no row {first!r}; it has {', '.join(first_cells)}")
        return self.rows[first_cells.index(first)]

    def number(self, row: tuple[Any, ...], column: str, key: str = "") -> float | None:
        """A number of a row, or None where it was not measured.

        Args:
            row: of `rows`.
            column: name of the column.
            key: which number, where the cell is an object of numbers.

        Raises:
            SystemExit: there is no such column, or the cell holds no such number.
        """
        names = [each.name for each in self.columns]
        if column not in names:
            raise SystemExit(f"results/{self.name}.json has no column {column!r}; it has {', '.join(names)}")
        cell = referred(row[names.index(column)])
        value = cell.get(key) if isinstance(cell, dict) else cell
        if value is None or value == "":
            return None
        if not isinstance(value, int | float):
            raise SystemExit(f"results/{self.name}.json: {cell!r} below {column!r} is no number")
        return float(value)


def read(name: str) -> Results:
    """The results called `name`.

    Raises:
        SystemExit: there is no such file, or it is not as the top of this module says.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"no results {name}: there is {', '.join(names())}")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.keys() != KEYS:
        raise SystemExit(f"{path.name}: its keys should be {', '.join(sorted(KEYS))}; it has {', '.join(found)}")
    columns = []
    for place, column in enumerate(found["columns"]):
        fields = {"name": column} if isinstance(column, str) else column
        columns.append(Column(**({"align": "right" if place else "left"} | fields)))
    for row in found["rows"]:
        if len(row) != len(columns):
            raise SystemExit(f"{path.name}: a row of {len(row)} cells under {len(columns)} columns: {row[0]}")
    commands = [found["command"]] if isinstance(found["command"], str) else found["command"]
    return Results(name, tuple(commands), found["machine"], tuple(columns), tuple(map(tuple, found["rows"])))


def names() -> list[str]:
    """The names of all results."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def referred(cell: Any) -> Any:
    """The cell to which a cell refers by row and column; a cell that does not is itself."""
    if not (isinstance(cell, dict) and "column" in cell):
        return cell
    found = read(cell["from"])
    row, names = found.row(cell["row"]), [column.name for column in found.columns]
    if cell["column"] not in names:
        raise SystemExit(f"results/{found.name}.json has no column {cell['column']!r}; it has {', '.join(names)}")
    target = referred(row[names.index(cell["column"])])
    return {**target, "format": cell["format"]} if isinstance(target, dict) and "format" in cell else target


def printed(cell: Any, format: str) -> str:
    """A cell as it is printed; `format`: the column's."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    if isinstance(cell, dict) and "from" in cell:
        if "column" in cell:
            return printed(referred(cell), cell.get("format", format))
        return cell["format"].format(*map(referred, read(cell["from"]).row(cell["row"])))
    if isinstance(cell, dict):
        return cell.get("format", format).format(**{key: value for key, value in cell.items() if key != "format"})
    return format.format(cell)


def table(name: str) -> str:
    """The Markdown table of the results called `name`, a line a row, and below it what printed it on which machine."""
    found = read(name)
    rules = ["---:" if column.align == "right" else "---" for column in found.columns]
    lines = markdown([[column.name for column in found.columns], rules, *found.texts()])
    commands = " · ".join(f"`{command}`" for command in found.commands)
    return f"{lines}\nPrinted by {commands}, on {found.machine}.\n"


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table, the first two being its head."""
    return "".join(
        "|" + "".join(f" {cell.replace('|', chr(92) + '|')} |" if cell else " |" for cell in row) + "\n"
        for row in rows
    )
