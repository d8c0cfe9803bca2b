"""Keep the keys that were attended to most often (least frequently attended goes first).

Source: Yang and Hua 2024, "Attendre", arXiv 2401.04881.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_evict import AttendedTo
from .surgery_kv_policy import Kept, Votes


@dataclass
class LfaPolicy(AttendedTo):
    """A key's score is the number of queries so far that gave it a weight of at least `threshold`."""

    def add_votes(self, votes: Votes, kept: Kept) -> None:
        times = self.attended(votes).sum(2).int()
        kept.notes["times"] = kept.notes["times"] + times if "times" in kept.notes else times

    def scores(self, kept: Kept) -> torch.Tensor:
        return kept.notes.get("times", torch.zeros_like(kept.positions)).double()


POLICY = LfaPolicy
