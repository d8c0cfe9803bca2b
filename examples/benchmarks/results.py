"""The figures of results/*.json: the only place where a measured figure is written down.

A results file is an object:

    command   the command that printed the figures, or a list of commands
    machine   the class of machine that they were measured on
    columns   names; or {"name": ..., "align": "left" | "right", "format": ...}. The first column is aligned left, the
              others right, unless they say otherwise
    rows      a list of rows, each of which is a list of cells

A cell is a text, which is printed unchanged; null, which is printed as nothing; a number, which is printed with the
column's `format` (a Python format string; without one, as 12,934 or 0.5); or an object of numbers, which is printed
with the column's format or with its own "format" ("{ratio:.2f}x ({low:.2f} to {high:.2f})"). Each figure is written
once. Elsewhere a cell refers to it:

    {"from": NAME, "row": FIRST CELL, "column": NAME}    to one cell; "format" may be added where it is an object
    {"from": NAME, "row": FIRST CELL, "format": ...}     to cells of that row by number ("{1:.2f}", "{3[kept]}")
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
KEYS = {"command", "machine", "columns", "rows"}


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, its alignment ("left" or "right") and the format of its numbers."""

    name: str
    align: str
    format: str = "{:,}"


@dataclass(frozen=True)
class Results:
    """A results file.

    Attributes:
        name: the name of the file, without .json.
        commands: the commands that printed the figures.
        machine: the class of machine.
        columns: the columns of the table.
        rows: the rows of cells, as in the file.
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
            row: one of `rows`.
            column: the name of the column.
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
        SystemExit: there is no such file, or it does not have the form that is described at the top of this module.
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


def write(path: Path, command: str | list[str], machine: str, columns: list[Any], rows: list[list[Any]]) -> None:
    """Write a results file; the arguments are its keys, which are described at the top of this module.

    A column and a row are one line each, so that a change of a figure is a change of its row.
    """
    page = {"command": command, "machine": machine, "columns": columns, "rows": rows}
    written = []
    for key, value in page.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(each, ensure_ascii=False)}" for each in value)
            text = f"[\n{lines}\n ]"
        written.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(written) + "\n}\n", encoding="utf-8")


def write_from(
    description: str | None, table: Callable[[Path, list[str], str], dict[str, Any]], kind: str, folder: str
) -> None:
    """The command line of a script that writes what stands in a folder to results/KIND-NAME.json.

    Args:
        description: of the script.
        table: computes a results file from the folder, the commands and the machine.
        folder: what the folder is.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=folder)
    parser.add_argument("name", help=f"of the results: {kind}-NAME")
    parser.add_argument("--machine", required=True, help="class of machine of the measurement")
    parser.add_argument("--command", action="append", required=True, help="a command that printed the figures")
    options = parser.parse_args()
    path = FOLDER / f"{kind}-{options.name}.json"
    write(path, **table(options.folder, options.command, options.machine))
    print(path)


def names() -> list[str]:
    """The names of all results."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def referred(cell: Any) -> Any:
    """The cell to which `cell` refers by row and column, or `cell` itself where it refers to none."""
    if not (isinstance(cell, dict) and "column" in cell):
        return cell
    found = read(cell["from"])
    row, names = found.row(cell["row"]), [column.name for column in found.columns]
    if cell["column"] not in names:
        raise SystemExit(f"results/{found.name}.json has no column {cell['column']!r}; it has {', '.join(names)}")
    target = referred(row[names.index(cell["column"])])
    return {**target, "format": cell["format"]} if isinstance(target, dict) and "format" in cell else target


def printed(cell: Any, format: str) -> str:
    """The printed text of a cell; `format` is the format of its column."""
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
    """The Markdown table of the results called `name`, and below it the commands that printed it and the machine."""
    found = read(name)
    rules = ["---:" if column.align == "right" else "---" for column in found.columns]
    lines = markdown([[column.name for column in found.columns], rules, *found.texts()])
    commands = " · ".join(f"`{command}`" for command in found.commands)
    return f"{lines}\nPrinted by {commands}, on {found.machine}.\n"


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table; the first two rows are its head."""
    return "".join(
        "|" + "".join(f" {cell.replace('|', chr(92) + '|')} |" if cell else " |" for cell in row) + "\n"
        for row in rows
    )
