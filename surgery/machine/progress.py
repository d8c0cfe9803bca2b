"""How far long work is: the callback that reports it, and a clock that notes how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable

# It is called with the number done, the total and a label. A total of 0 means that nobody knows how much there is to
# do. A label is the name of a stage; what it says after a colon may change between calls. A stage begins with a call
# that has 0 done, and lasts until the next one begins.
Progress = Callable[[int, int, str], None]

PERCENT = 100  # a total for work whose items differ too much to be counted


def begin(progress: Progress | None, stage: str, total: int = 0) -> None:
    """Report that a stage begins.

    Args:
        total: how much there is to do; 0: nobody knows.
    """
    if progress is not None:
        progress(0, total, stage)


def stage_of(label: str) -> str:
    """The stage that a label names."""
    return label.partition(":")[0]


class StageClock:
    """A progress callback that passes every call on, and notes the wall seconds of each stage.

    What comes before the first stage counts as "planning".

    Args:
        progress: gets every call; None: nobody asks.
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
        """Stage -> wall seconds until now, to a tenth, in the order in which the stages began."""
        self._end_stage()
        return {stage: round(seconds, 1) for stage, seconds in self._seconds.items()}

    def _end_stage(self) -> None:
        now = time.monotonic()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._began
        self._began = now


def renamed(progress: Progress | None, stage: str) -> Progress | None:
    """A callback that reports what it gets as another stage; None where nobody asks."""
    if progress is None:
        return None
    return lambda done, total, label: progress(done, total, stage)
