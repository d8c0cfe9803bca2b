"""The command that this process was started with, for the record of what it makes."""

from __future__ import annotations

from contextvars import ContextVar

# What follows `surgery` on the command line; None: a script runs, which no line repeats.
typed: ContextVar[tuple[str, ...] | None] = ContextVar("typed", default=None)
