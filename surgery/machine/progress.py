"""The type of a progress callback, by which long work reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

# It is called with the number done, the total and a label; the text after a colon in a label may change between calls.
Progress = Callable[[int, int, str], None]
