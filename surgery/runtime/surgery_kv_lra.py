"""Keep the keys that were attended to last (least recently attended goes first).

Source: Yang and Hua 2024, "Attendre", arXiv 2401.04881.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_evict import AttendedTo
from .surgery_kv_policy import Kept, Votes


@dataclass
class LraPolicy(AttendedTo):
    """A key's score is the position of the last query that gave it a weight of at least `threshold`.

    A key counts as attended to by its own token.
    """

    def add_votes(self, votes: Votes, kept: Kept) -> None:
        last = torch.where(self.attended(votes), votes.positions[:, None, :, None] + 1, 0).amax(2).int()  # 0: never
        old = kept.notes.get("last")
        kept.notes["last"] = last if old is None else torch.maximum(old, last)

    def scores(self, kept: Kept) -> torch.Tensor:
        own = kept.positions + 1
        return (torch.maximum(own, kept.notes["last"]) if "last" in kept.notes else own).double()


POLICY = LraPolicy
