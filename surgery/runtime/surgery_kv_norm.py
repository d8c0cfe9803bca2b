"""Keep the keys of the smallest norm, which heads tend to attend to.

Source: Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_evict import Evict
from .surgery_kv_policy import Kept


@dataclass
class NormPolicy(Evict):
    """A key's score is its negative Euclidean norm. It needs no votes, and no notes."""

    def scores(self, kept: Kept) -> torch.Tensor:
        return -kept.keys.to(torch.promote_types(kept.keys.dtype, torch.float32)).norm(dim=-1)


POLICY = NormPolicy
