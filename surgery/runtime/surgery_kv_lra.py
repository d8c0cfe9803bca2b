"""Keep the keys that were attended to last (least recently attended goes first).

Source: Yang and Hua 2024, "Attendre", arXiv 2401.04881.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_evict import Voting
from .surgery_kv_policy import Kept, Votes


@dataclass
class LraPolicy(Voting):
    """A key's score is the position of the last query that gave it a weight of at least `threshold`.

    A key counts as attended to by its own token.

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
        attended = self.of_group(votes.weights) >= self.threshold  # [batch, KV heads, n, kept]
        last = torch.where(attended, votes.positions[:, None, :, None] + 1, 0).amax(2).int()  # 0: never
        old = kept.notes.get("last")
        kept.notes["last"] = last if old is None else torch.maximum(old, last)

    def scores(self, kept: Kept) -> torch.Tensor:
        own = kept.positions + 1
        return (torch.maximum(own, kept.notes["last"]) if "last" in kept.notes else own).double()

    def problem(self) -> str:
        return super().problem() or threshold_problem(self.threshold)


def threshold_problem(threshold: float) -> str:
    """The error in a threshold of weights, "" if there is none."""
    valid = type(threshold) in (int, float) and 0 < threshold < 1
    return "" if valid else f"threshold is {threshold!r}; it is between 0 and 1"


POLICY = LraPolicy
