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
        return drawn(self.seed, kept.layer, kept.kv_heads, kept.positions)

    def problem(self) -> str:
        return super().problem() or ("" if is_whole(self.seed, 0) else f"seed is {self.seed!r}, and must be from 0")


def drawn(seed: int, layer: int, kv_heads: list[int], positions: torch.Tensor) -> torch.Tensor:
    """A number for each position, float64 [batch, KV heads, n].

    Args:
        positions: long [batch, KV heads, n].
    """
    heads = torch.tensor(kv_heads, device=positions.device)[:, None]
    state = _mixed(heads + 1009 * _mixed(torch.full_like(heads, (seed * 7919 + layer) & BITS)))
    return _mixed(positions + state).double()


def _mixed(state: torch.Tensor) -> torch.Tensor:
    """Whole numbers of 31 bits whose bits depend on all bits of the given ones (a hash by shifts and products)."""
    state = state & BITS
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        state = ((state ^ (state >> 16)) * multiplier) & BITS
    return state ^ (state >> 16)


POLICY = RandomPolicy
