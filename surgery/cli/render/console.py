"""The console: output to terminals and pipes, the choice of a progress display, sizes in bytes."""

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
BROKEN_PIPE = 141  # exit code in a shell of a command whose reader closed the pipe


CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class _Console(Console):
    def render(self, renderable, options=None):
        """Replace control characters: a recipe, a text or a model's answer must not control the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(CONTROLS), segment.style)

    def on_broken_pipe(self) -> None:
        """The reader has closed the pipe (`surgery ls | head -1`), which is not an error."""
        reader_left()


def reader_left() -> None:
    """Exit silently after the reader of stdout has closed the pipe."""
    discard_stdout()
    raise SystemExit(BROKEN_PIPE)


def discard_stdout() -> None:
    """Redirect stdout to the null device; otherwise Python prints an error when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(stderr: bool = False) -> Console:
    """A console that wraps nothing in a pipe, colours only a terminal, and prints a user's [text] unchanged."""
    output = sys.stderr if stderr else sys.stdout
    piped, plain = not output.isatty(), {"highlight": False, "markup": False, "emoji": False}
    return _Console(file=output, soft_wrap=piped, width=1000 if piped else None, **plain)


def progress_bar(quiet: bool) -> Stages:
    """The progress display on stderr, a context manager: a bar for each stage in a terminal, lines in a pipe."""
    from surgery.cli.render.stages import StageBars, StageLines, Stages

    if quiet:
        return Stages()
    return StageBars(console(stderr=True)) if sys.stderr.isatty() else StageLines()


def labelled(label: str, words: str | Text, *, copied: bool = False) -> None:
    """Print "label:   words" on stdout; in a terminal, further lines begin below the words.

    Args:
        copied: the words are for copying. The terminal wraps them, so that the copy has no line end in it.
    """
    out = console()
    head, text = Text(f"{label}:".ljust(LABEL)), Text(words) if isinstance(words, str) else words
    if copied or out.soft_wrap or out.width <= 2 * LABEL:
        return out.print(head + text, soft_wrap=True)
    for line in text.wrap(out, out.width - len(head)):
        out.print(head + line)
        head = Text(" " * len(head))
