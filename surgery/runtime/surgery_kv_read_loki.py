"""Rank the keys in a few directions, and read those that come first (Loki).

Keys have few strong directions, even after RoPE. `surgery_read_basis` has the strongest ones of each KV head, found on
a calibration text. A projection of each key on them stands beside the key in the cache. A step ranks all keys by the
product of the projections, and reads the best in full. (The paper stores the keys themselves in a whole basis, which
saves the projections. Here the keys stay as they are, so that the rounding of a basis changes no score.)

Source: Singhania et al. 2024, "Loki: Low-rank Keys for Efficient Sparse Attention", arXiv 2406.02542.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_config import is_whole
from .surgery_kv_read import BASIS, DecodingStep, RankedKeys


@dataclass
class LokiReader(RankedKeys):
    """The best keys by the scores of their projections.

    Attributes:
        dims: number of directions.
    """

    dims: int = 16

    def noted(self, keys: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"low": keys @ parameters["basis"].to(keys.dtype)}

    def choose(self, step: DecodingStep) -> torch.Tensor:
        query = step.query @ step.parameters["basis"].to(step.query.dtype)
        return self.best(step, self.of_group(step.weights(query, step.store.notes["low"])), self.keys)

    def parameter_shapes(self, kv_heads: int, head_dim: int) -> dict[str, list[int]]:
        return {BASIS: [kv_heads, head_dim, min(self.dims, head_dim)]}

    def problem(self) -> str:
        if not is_whole(self.dims, 1):
            return f"dims is {self.dims!r}, and must be whole and from 1"
        return super().problem()


READER = LokiReader
