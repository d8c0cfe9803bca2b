"""Keep the keys that were attended to most often (least frequently attended goes first).

Source: Yang and Hua 2024, "Attendre", arXiv 2401.04881.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_evict import Voting
from .surgery_kv_lra import threshold_problem
from .surgery_kv_policy import Kept, Votes


@dataclass
class LfaPolicy(Voting):
    """A key's score is the number of queries so far that gave it a weight of at least `threshold`.

    Attributes:
        observe: the queries before a decision that are looked at.
        group: a query head's vote counts if it reaches the threshold (max), or with those of its group (sum).
    """

    observe: int = 256
    group: str = "max"
    threshold: float = 0.01

    def notes_of(self, readers: int) -> int:
        return 1

    def add_votes(self, votes: Votes, kept: Kept) -> None:
        times = (self.of_group(votes.weights) >= self.threshold).sum(2).int()
        kept.notes["times"] = kept.notes["times"] + times if "times" in kept.notes else times

    def scores(self, kept: Kept) -> torch.Tensor:
        return kept.notes.get("times", torch.zeros_like(kept.positions)).double()

    def problem(self) -> str:
        return super().problem() or threshold_problem(self.threshold)


POLICY = LfaPolicy
