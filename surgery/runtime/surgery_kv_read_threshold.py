"""Leave out the keys whose weight is far below that of the heaviest key.

Every key is read to compute its score. What a step saves is the values, and what it changes is that many small weights
do not add up. In the source the model is trained so (Opper et al. 2025, "Threshold Relative Attention", arXiv
2503.23174), and distances count the keys that stay; neither is done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_read import DecodingStep, Reader


@dataclass
class ThresholdReader(Reader):
    """The keys with at least a part of the largest weight, for one of the query heads.

    Attributes:
        threshold: that part; 0 reads all.
    """

    threshold: float = 0.001

    def choose(self, step: DecodingStep) -> torch.Tensor:
        weights = step.weights(step.query, step.keys)
        wanted = (weights >= self.threshold * weights.amax(-1, keepdim=True)).any(2)  # [batch, KV heads, N]
        wanted = (wanted | self.always(step)[:, None]) & (step.positions >= 0)[:, None]
        most = int(wanted.sum(-1).max())
        found = wanted.int().topk(most, dim=-1)
        return found.indices.masked_fill(found.values == 0, -1)

    def problem(self) -> str:
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold < 1:
            return f"threshold is {self.threshold!r}; it is from 0, and below 1"
        return super().problem()


READER = ThresholdReader
