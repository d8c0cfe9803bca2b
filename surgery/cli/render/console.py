"""The console: what a pipe gets, what shows how far a run is, sizes in bytes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

if TYPE_CHECKING:
    from surgery.cli.render.stages import Stages

STATUS_STYLE = {
    "passed": "green",
    "failed": "bold red",
    "measured": "cyan",
    "noted": "yellow",
    "not run": "yellow",
    "skipped": "yellow",
}
LABEL = 11  # columns of a label with its colon
BROKEN_PIPE = 141  # what a shell gives for a command whose reader went away


CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class _Console(Console):
    def render(self, renderable, options=None):
        """What is shown of a recipe, a text or a model's answer does not steer the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(CONTROLS), segment.style)

    def on_broken_pipe(self) -> None:
        """The reader has seen enough (`surgery ls | head -1`): no fault of anybody's."""
        reader_left()


def reader_left() -> None:
    """End quietly where stdout is a pipe that nobody reads any more."""
    discard_stdout()
    raise SystemExit(BROKEN_PIPE)


def discard_stdout() -> None:
    """Lead stdout nowhere, or Python complains when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(stderr: bool = False) -> Console:
    """A console that wraps nothing in a pipe, colours only a terminal, and prints a user's [text] as it is."""
    output = sys.stderr if stderr else sys.stdout
    piped, plain = not output.isatty(), {"highlight": False, "markup": False, "emoji": False}
    return _Console(file=output, soft_wrap=piped, width=1000 if piped else None, **plain)


def progress_bar(quiet: bool) -> Stages:
    """What shows on stderr how far a run is: a bar for each stage in a terminal, lines in a pipe; `with` it."""
    from surgery.cli.render.stages import StageBars, StageLines, Stages

    if quiet:
        return Stages()
    return StageBars(console(stderr=True)) if sys.stderr.isatty() else StageLines()


def labelled(label: str, words: str | Text, *, copied: bool = False) -> None:
    """Print "label:   words" on stdout; in a terminal, further lines begin below the words.

    Args:
        copied: the words are for copying: the terminal breaks them, and what is copied has no line end in it.
    """
    out = console()
    head, text = Text(f"{label}:".ljust(LABEL)), Text(words) if isinstance(words, str) else words
    if copied or out.soft_wrap or out.width <= 2 * LABEL:
        return out.print(head + text, soft_wrap=True)
    for line in text.wrap(out, out.width - len(head)):
        out.print(head + line)
        head = Text(" " * len(head))


def size(count: float) -> str:
    """Bytes for people: 520.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
