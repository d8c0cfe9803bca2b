"""How objects print: one line for `repr`, lines and tables for `str`, escaped HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

GUTTER = "  "  # between the columns of a table, as the command line prints it


@dataclass(frozen=True)
class Table:
    """A table for a terminal or a notebook; `justify` ("left" or "right") applies to every column."""

    headers: tuple[str, ...]
    rows: list[list[str]]
    justify: str = "left"


def count(number: int, noun: str) -> str:
    """ "1 sample", "3 samples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def byte_size(count: float) -> str:
    """Bytes for people: 520.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


Block = str | Table | tuple[str, str]  # a line, a table, or a line with a label in front of it


class Printed:
    """Base class of objects that users print. A subclass gives a headline and the blocks of its content."""

    def headline(self) -> str:
        """One line that describes the object, without its class name."""
        raise NotImplementedError

    def blocks(self) -> Sequence[Block]:
        """What `print` shows, from top to bottom."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.headline()}>"

    def __str__(self) -> str:
        return as_text(self.blocks())

    def _repr_html_(self) -> str:
        return as_html(self.headline(), self.blocks())


def as_text(blocks: Sequence[Block]) -> str:
    """Blocks as plain text: labels and the columns of a table are aligned, and no line ends in blanks."""
    width = max((len(block[0]) for block in blocks if isinstance(block, tuple)), default=0) + 1
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Table):
            lines += _aligned(block)
        elif isinstance(block, tuple):
            label, text = block
            lines.append(f"{label + ':':<{width}} {text}")
        else:
            lines.append(block)
    return "\n".join(line.rstrip() for line in lines)


def _aligned(table: Table) -> list[str]:
    rows = [list(table.headers), *table.rows] if any(table.headers) else table.rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    place = str.rjust if table.justify == "right" else str.ljust
    return [GUTTER.join(place(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """Blocks as HTML without scripts and styles; every text is escaped. Successive labelled lines make one table."""
    parts, labelled = [f"<p><strong>{escape(title)}</strong></p>"], []
    for block in (*blocks, ""):
        if isinstance(block, tuple):
            labelled.append(f"<tr><th>{escape(block[0])}</th><td>{escape(block[1])}</td></tr>")
            continue
        if labelled:
            parts.append(f"<table>{''.join(labelled)}</table>")
            labelled = []
        if isinstance(block, Table):
            parts.append(as_html_table(block))
        elif block:
            parts.append(f"<pre>{escape(block)}</pre>" if "\n" in block else f"<p>{escape(block)}</p>")
    return f"<div>{''.join(parts)}</div>"


def as_html_table(table: Table) -> str:
    """A table as HTML; every text is escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.headers) if any(table.headers) else ""
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{rows}</tbody></table>"
