"""One set of keys for all heads of a layer, by a soft vote, kept while consecutive queries are alike (TokenSelect).

Each query head votes for the keys with its attention weights, so that no head outvotes the others by larger scores.
The set is reused while the cosine between this step's query and that of the choice is above `similarity`.

Source: Wu et al. 2024, "TokenSelect", arXiv 2411.02886.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_read import DecodingStep
from .surgery_kv_read_recycled import Remembering


@dataclass
class TokenSelectReader(Remembering):
    """The best keys for all heads of the layer together.

    Attributes:
        similarity: cosine of the queries above which the last choice is used again.
    """

    similarity: float = 0.9

    def choose(self, step: DecodingStep) -> torch.Tensor:
        batch, kv_heads = step.keys.shape[:2]
        query, state, age = step.query.flatten(1), step.store.state, self.age(step)
        anew = torch.ones(batch, dtype=torch.bool, device=query.device)
        if age is not None:
            alike = torch.nn.functional.cosine_similarity(query, state["query"], dim=-1) > self.similarity
            anew = ~alike | (age >= self.every)
        chosen = state.get("chosen")
        if bool(anew.any()):
            votes = self.of_group(step.weights(step.query, step.keys))  # [batch, KV heads, N]
            votes = votes.sum(1, keepdim=True) if self.group == "sum" else votes.amax(1, keepdim=True)
            chosen = self.best(step, votes, self.keys).expand(-1, kv_heads, -1)
            state["query"] = torch.where(anew[:, None], query, state["query"]) if age is not None else query
        return self.remember(step, chosen, anew)

    def problem(self) -> str:
        if type(self.similarity) not in (int, float) or not -1 <= self.similarity <= 1:
            return f"similarity is {self.similarity!r}; it is a cosine, from -1 to 1"
        return super().problem()


READER = TokenSelectReader
