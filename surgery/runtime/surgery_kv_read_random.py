"""Read random keys: the control for readers that choose.

A key's place in the order is drawn from the seed, its layer, its KV head and its position. So a head reads the same
keys at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_config import is_whole
from .surgery_kv_random import drawn
from .surgery_kv_read import DecodingStep, SomeKeys


@dataclass
class RandomReader(SomeKeys):
    """A random sample of the keys.

    Attributes:
        seed: another seed draws other keys.
    """

    seed: int = 0

    def choose(self, step: DecodingStep) -> torch.Tensor:
        batch, kv_heads, end, _ = step.keys.shape
        positions = step.positions[:, None].expand(batch, kv_heads, end)
        return self.best(step, drawn(self.seed, step.layer, step.kv_heads, positions), self.keys)

    def problem(self) -> str:
        return super().problem() or ("" if is_whole(self.seed, 0) else f"seed is {self.seed!r}, and must be from 0")


READER = RandomReader
