"""The console: what a pipe gets, a progress bar, sizes in bytes."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

from rich.console import Console

STATUS_STYLE = {
    "passed": "green",
    "failed": "bold red",
    "measured": "cyan",
    "noted": "yellow",
    "not run": "yellow",
    "skipped": "yellow",
}
BROKEN_PIPE = 141  # what a shell gives for a command whose reader went away


class _Console(Console):
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


@contextmanager
def progress_bar(quiet: bool):
    """A callback(done, total, label) that draws a bar on stderr once two seconds have passed, in a terminal only.

    What a label says after a colon may change from call to call; the bar is the same one.
    """
    import time

    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>14}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True)
    tasks, began, shown = {}, time.monotonic(), False

    def update(done: int, total: int, label: str) -> None:
        nonlocal shown
        if not shown and time.monotonic() - began > 2:
            bar.start()
            shown = True
        name = label.partition(":")[0]
        if name not in tasks:
            tasks[name] = bar.add_task(label, total=total)
        bar.update(tasks[name], description=label, completed=done, total=total, visible=done < total)

    try:
        yield update
    finally:
        if shown:
            bar.stop()


def size(count: float) -> str:
    """Bytes for people: 520.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
