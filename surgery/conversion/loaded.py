"""The two engines: both call the same pure `rewrite` on the same canonical layer, and agree to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
