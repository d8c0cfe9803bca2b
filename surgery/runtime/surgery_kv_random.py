"""Keep random keys: the control for policies that choose.

A key's score is a number drawn from the seed, its layer, its KV head and its position. So a text keeps the same keys
in any batch, in chunks and without a cache, and each head keeps others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_config import is_whole
from .surgery_kv_evict import Evict
from .surgery_kv_policy import Kept

BITS = (1 << 31) - 1


@dataclass
class RandomPolicy(Evict):
    """Keep a random sample of the keys.

    Attributes:
        seed: another seed draws other keys.
    """

    seed: int = 0

    def scores(self, kept: Kept) -> torch.Tensor:
        heads = torch.tensor(kept.kv_heads, device=kept.positions.device)[:, None]
        state = _mixed(heads + 1009 * _mixed(torch.full_like(heads, self.layer_seed(kept.layer))))
        return _mixed(kept.positions + state).double()

    def layer_seed(self, layer: int) -> int:
        return (self.seed * 7919 + layer) & BITS

    def problem(self) -> str:
        return super().problem() or ("" if is_whole(self.seed, 0) else f"seed is {self.seed!r}, and must be from 0")


def _mixed(state: torch.Tensor) -> torch.Tensor:
    """Whole numbers of 31 bits whose bits depend on all bits of the given ones (a hash by shifts and products)."""
    state = state & BITS
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        state = ((state ^ (state >> 16)) * multiplier) & BITS
    return state ^ (state >> 16)


POLICY = RandomPolicy
