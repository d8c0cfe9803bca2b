"""The command that started this process, for the records of its results."""

from __future__ import annotations

from contextvars import ContextVar

# The arguments after `surgery` on the command line; None in a script, which no command line can repeat.
typed: ContextVar[tuple[str, ...] | None] = ContextVar("typed", default=None)
