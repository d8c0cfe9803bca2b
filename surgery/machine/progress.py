"""The progress of long work: the callback that reports it, and a clock that measures the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable

# The callback gets the number done, the total and a label. A total of 0 means that the amount of work is unknown. A
# label is the name of a stage; the part after a colon may change between calls. A stage begins with a call that has 0
# done, and lasts until the next stage begins.
Progress = Callable[[int, int, str], None]

PERCENT = 100  # the total for work whose items differ too much to be counted


def begin(progress: Progress | None, stage: str, total: int = 0) -> None:
    """Report that a stage begins.

    Args:
        total: the amount of work; 0 if it is unknown.
    """
    if progress is not None:
        progress(0, total, stage)


def stage_of(label: str) -> str:
    """The stage that a label names."""
    return label.partition(":")[0]


class StageClock:
    """A progress callback that passes every call on, and measures the wall time of each stage.

    The time before the first stage counts as "planning".

    Args:
        progress: the callback that gets every call, or None.
    """

    def __init__(self, progress: Progress | None = None):
        self._progress, self._stage, self._began = progress, "planning", time.monotonic()
        self._seconds: dict[str, float] = {}

    def __call__(self, done: int, total: int, label: str) -> None:
        if (stage := stage_of(label)) != self._stage:
            self._end_stage()
            self._stage = stage
        if self._progress is not None:
            self._progress(done, total, label)

    def seconds(self) -> dict[str, float]:
        """Stage -> wall seconds until now, rounded to a tenth, in the order in which the stages began."""
        self._end_stage()
        return {stage: round(seconds, 1) for stage, seconds in self._seconds.items()}

    def _end_stage(self) -> None:
        now = time.monotonic()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._began
        self._began = now


def within(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """A callback for one of several equal parts of a stage, from 0: it reports the share of the whole in percent.

    The stage's own beginning is reported by the first part alone.
    """
    if progress is None:
        return None

    def report(done: int, total: int, label: str) -> None:
        if done or not part:
            progress(round(PERCENT * (part + (done / total if total else 0)) / parts), PERCENT, label)

    return report


def renamed(progress: Progress | None, stage: str) -> Progress | None:
    """A callback that reports all calls as another stage; None where `progress` is None."""
    if progress is None:
        return None
    return lambda done, total, label: progress(done, total, stage)
