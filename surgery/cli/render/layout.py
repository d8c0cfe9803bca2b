"""How lines are laid out: tables without trailing blanks, texts with hanging indents, in a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.text import Text

NARROW = 40  # columns below which a hanging indent leaves no room for words
PIPED = 1000  # the width of a console that wraps nothing, see `console`


def show(out: Console, renderable: RenderableType) -> None:
    """Print a table or tree; in a pipe without the blanks that pad its lines."""
    if out.is_terminal:
        out.print(renderable)
        return
    with out.capture() as capture:
        out.print(renderable)
    for line in capture.get().splitlines():
        out.print(line.rstrip(), soft_wrap=True)


def hanging(out: Console, label: Text | str, words: str, indent: int, style: str = "") -> None:
    """Print a label and words; further lines of the words are indented. In a pipe, everything is one line.

    Args:
        label: shown unchanged; the words begin at column `indent`, or after a longer label.
        indent: columns before each further line.
        style: the style of the words.
    """
    label = Text(label) if isinstance(label, str) else label.copy()
    least = 1 if words and label.plain and not label.plain.endswith(" ") else 0
    label.append(" " * max(least, indent - label.cell_len))
    width = out.width
    indent = indent if width >= indent + NARROW else min(4, indent)
    lines = wrapped(words, width, first=label.cell_len, rest=indent)
    out.print(Text.assemble(label, (lines[0], style), end="\n"), soft_wrap=True)
    for line in lines[1:]:
        out.print(Text.assemble(" " * indent, (line, style)), soft_wrap=True)


def wrapped(words: str, width: int, first: int = 0, rest: int = 0) -> list[str]:
    """The words in lines that fit after indents of `first` and `rest` columns; the lines do not hold the indents."""
    if width >= PIPED or not words.strip():
        return [words]
    narrow = textwrap.TextWrapper(max(width, 10 + rest), subsequent_indent=" " * rest, break_on_hyphens=False)
    if first > rest and first + len(words.split()[0]) > width:  # no room for a word: all begin below
        narrow.initial_indent = " " * rest
        return ["", *(line[rest:] for line in narrow.wrap(words))]
    narrow.initial_indent = " " * first
    lines = narrow.wrap(words)
    return [lines[0][first:], *(line[rest:] for line in lines[1:])]


def columns(out: Console, rows: Iterable[Sequence[Text | str]], gap: int = 2, cut: bool = False) -> None:
    """Print rows in aligned columns; the last cell wraps inside its column, or is cut at the terminal's edge."""
    rows = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in column) + gap for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, last in rows:
        head = Text.assemble(
            *(Text.assemble(cell, " " * (width - cell.cell_len)) for cell, width in zip(cells, widths, strict=True))
        )
        if cut and head.cell_len + last.cell_len > out.width > head.cell_len:
            last = last.copy()
            last.truncate(out.width - head.cell_len, overflow="ellipsis")
        hanging(out, head, last.plain, head.cell_len, str(last.style or ""))
