"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with what is done, the total, and a label: what a label says after a colon may change from call to call.
Progress = Callable[[int, int, str], None]
