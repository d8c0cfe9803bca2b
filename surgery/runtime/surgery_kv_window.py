"""Keep the newest keys: the control for policies that choose.

Sinks and a window alone are cheaper as a head split (surgery_visibility.HeadSplit). This policy keeps as many keys,
and drops them at the same positions, as the policies that it stands beside in a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_evict import Evict
from .surgery_kv_policy import Kept


@dataclass
class WindowPolicy(Evict):
    """A key's score is its position."""

    def scores(self, kept: Kept) -> torch.Tensor:
        return kept.positions.double()


POLICY = WindowPolicy
