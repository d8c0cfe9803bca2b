"""Read the keys with the largest attention weights, found by an exact search of all keys.

An index of the keys would find them without looking at all (Liu et al. 2024, "RetrievalAttention", arXiv 2409.10516).
This reader is what such an index comes near to: it reads every key once to rank it, and the values of the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_read import DecodingStep, RankedKeys


@dataclass
class IndexReader(RankedKeys):
    """The best keys for a KV head's query heads together."""

    def choose(self, step: DecodingStep) -> torch.Tensor:
        return self.best(step, self.of_group(step.weights(step.query, step.keys)), self.keys)


READER = IndexReader
