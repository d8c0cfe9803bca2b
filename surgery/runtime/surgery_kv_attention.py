"""Keep the keys that queries attend to most.

Sources: Oren et al. 2024, "Transformers are Multi-State RNNs" (TOVA), arXiv 2401.06104: `observe: 1`; Zhang et al.
2023, "H2O", arXiv 2306.14048: `memory: true` and `observe` as the interval, with means in place of its sums; Li et al.
2024, "SnapKV", arXiv 2404.14469: `when: prompt_end`, without its pooling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_evict import MeanVote
from .surgery_kv_policy import Kept, Votes


@dataclass
class AttentionPolicy(MeanVote):
    """A query's vote for a key is its attention weight."""

    def vote(self, votes: Votes, kept: Kept) -> torch.Tensor:
        return votes.weights


POLICY = AttentionPolicy
