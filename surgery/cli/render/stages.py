"""Progress of a run on stderr: a bar for each stage in a terminal, lines elsewhere.

A stage is identified by the name that a progress callback receives (`surgery.machine.progress`). Where the stages of a
run are known before it begins, they are numbered: "2/5 merging layers".
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

from surgery.cli.render.durations import about, clock, lasted
from surgery.machine.progress import PERCENT

SILENCE = 30.0  # seconds after which a running stage is reported again in a pipe
MANY = 100_000  # a total beyond this (bytes) says less than a percentage
UNITS = {  # stage -> what its count counts, where its name does not say it; lines have room for it, bars do not
    "measuring heads": "steps",
    "scoring": "windows",
    "scoring the base": "windows",
    "scoring the converted model": "windows",
}
LEAST = 8  # columns of a bar
WIDE, BAR = 120, 40  # a terminal of WIDE columns has a bar of BAR columns; a narrower one, what is left


@dataclass
class Stage:
    """One stage of a run; times are in seconds of the monotonic clock.

    Attributes:
        label: its name, with its number where the stages of the run are known.
        done, total, detail: as in the last call; a total of 0 means that it is not known.
        done_before: `done` when it began; not 0 if a resumed run begins where an earlier one stopped.
        began: the time at which it began.
        updated: the time at which `done` last changed.
    """

    name: str
    label: str
    total: int = 0
    done: int = 0
    detail: str = ""
    done_before: int = 0
    began: float = field(default_factory=time.monotonic)
    updated: float = 0.0

    def update(self, done: int, total: int, detail: str) -> None:
        if done != self.done:
            self.updated = time.monotonic()
        self.done, self.total, self.detail = done, total, detail

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    @property
    def remaining(self) -> float | None:
        """Seconds that it will still take at the pace so far; None: not known yet."""
        worked = self.done - self.done_before
        if worked <= 0 or self.done >= self.total:
            return None
        needed = (self.total - self.done) * (self.updated - self.began) / worked
        return max(0.0, needed - (time.monotonic() - self.updated))

    @property
    def count(self) -> str:
        """ "10 of 30", or "31 %" where numbers say less; "" where the total is not known."""
        if not self.total:
            return ""
        if self.total == PERCENT or self.total > MANY:
            return f"{self.done / self.total:.0%}".replace("%", " %")
        return f"{self.done:,} of {self.total:,}"


class Stages:
    """A progress callback that shows nothing, and the base class of those that show something.

    It is a context manager: the last stage ends with the block.
    """

    def __init__(self) -> None:
        self.stage: Stage | None = None
        self._expected: list[str] = []
        self._numbered, self._position = False, 0
        self._lock = threading.RLock()

    def expect(self, names: Sequence[str]) -> None:
        """Number the stages, which will come in this order. A stage of another name is inserted when it begins."""
        self._expected, self._numbered, self._position = list(names), len(names) > 1, 0

    def __call__(self, done: int, total: int, label: str) -> None:
        name, _, detail = label.partition(":")
        with self._lock:
            if self.stage is None or self.stage.name != name:
                self._end()
                self.stage = Stage(name, self._label(name), total, done, detail.strip(), done)
                self.began(self.stage)
            self.stage.update(done, total, detail.strip())
            self.moved(self.stage)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        with self._lock:
            if kind is None:
                self._end()
            self.stage = None
        self.closed()

    def began(self, stage: Stage) -> None:
        """A stage has begun."""

    def moved(self, stage: Stage) -> None:
        """A stage has come further."""

    def ended(self, stage: Stage) -> None:
        """A stage is complete."""

    def closed(self) -> None:
        """Nothing more will come."""

    def _end(self) -> None:
        if self.stage is not None:
            self.ended(self.stage)
            self.stage = None

    def _label(self, name: str) -> str:
        if not self._numbered:
            return name
        if name in self._expected[self._position :]:
            self._position = self._expected.index(name, self._position)
        else:
            self._expected.insert(self._position, name)
        self._position += 1
        return f"{self._position}/{len(self._expected)} {name}"


class StageLines(Stages):
    """A line on stderr when a stage begins, when it ends, and at least every 30 seconds between the two."""

    def __init__(self) -> None:
        super().__init__()
        self._closed, self._spoke = threading.Event(), 0.0
        self._thread: threading.Thread | None = None

    def began(self, stage: Stage) -> None:
        self._say(stage.label)
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat, name="surgery progress", daemon=True)
            self._thread.start()

    def ended(self, stage: Stage) -> None:
        self._say(f"{stage.label}: done in {lasted(stage.elapsed)}")

    def closed(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _repeat(self) -> None:
        while not self._closed.wait(max(0.05, self._spoke + SILENCE - time.monotonic())):
            with self._lock:
                if self.stage is not None and time.monotonic() - self._spoke >= SILENCE:
                    self._say(f"{self.stage.label}: {_state(self.stage)}")

    def _say(self, words: str) -> None:
        self._spoke = time.monotonic()
        with suppress(OSError, ValueError):  # stderr is closed or full: the work goes on
            print(f"[{time.strftime('%H:%M:%S')}] {words}", file=sys.stderr, flush=True)


def _state(stage: Stage) -> str:
    """ "10 of 30 windows, about 3 min left"."""
    left = stage.remaining
    count = f"{stage.count} {UNITS.get(stage.name, '')}".strip()
    words = [count, stage.detail, f"about {about(left)} left" if left is not None else ""]
    if not stage.total:
        words.append(f"{lasted(stage.elapsed)} so far")
    return ", ".join(filter(None, words))


class StageBars(Stages):
    """One bar in a terminal, for the stage that runs; the bar disappears when the stage ends."""

    def __init__(self, console: Console):
        super().__init__()
        columns = (TextColumn("{task.description}"), _Bar(BAR if console.width >= WIDE else None), _Count(), _Time())
        # Other output on stderr appears above the bar. stdout is for results and is not redirected.
        options: dict[str, Any] = {"console": console, "transient": True, "redirect_stdout": False}
        self._bars = Bars(*columns, expand=console.width < WIDE, **options)
        self._task: Any = None

    def began(self, stage: Stage) -> None:
        self._task = self._bars.add_task(stage.label, total=stage.total or None, stage=stage)
        self._bars.start()

    def moved(self, stage: Stage) -> None:
        self._bars.update(self._task, completed=stage.done, total=stage.total or None)

    def ended(self, stage: Stage) -> None:
        self._bars.remove_task(self._task)

    def closed(self) -> None:
        self._bars.stop()


class _Bar(BarColumn):
    """A bar, or a spinner for a stage without a count."""

    def __init__(self, width: int | None):
        super().__init__(bar_width=width, table_column=Column(ratio=1, min_width=LEAST))
        self._spinner = Spinner("line")

    def render(self, task: BarTask) -> Any:
        return super().render(task) if task.total else self._spinner.render(task.get_time())


class _Count(ProgressColumn):
    """ "75 %, asked 18 of 24"; a narrow terminal shows its beginning."""

    def render(self, task: BarTask) -> Text:
        stage = task.fields["stage"]
        return Text(", ".join(filter(None, (stage.count, stage.detail))), overflow="ellipsis")


class _Time(ProgressColumn):
    """ "1:12 elapsed, about 4:50 left"; the estimate appears as soon as one step is done. It is never cut off."""

    def __init__(self):
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: BarTask) -> Text:
        stage = task.fields["stage"]
        left = f", about {clock(stage.remaining)} left" if stage.remaining is not None else ""
        return Text(f"{clock(stage.elapsed)} elapsed{left}", no_wrap=True)
