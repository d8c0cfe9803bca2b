"""A policy that drops nothing and counts, for each KV head, the keys that queries saw and the largest number held.

In a layer's entry: {"policy": {"name": "log"}}. `counts(model)` gives the counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .surgery_kv_policy import Kept, Policy


@dataclass
class Counts:
    """The counts of one KV head, over all rows of all calls since the model was made.

    Attributes:
        queries: number of queries of real tokens.
        seen: number of keys that these queries saw, summed over the queries.
        held: the largest number of keys that a row held.
    """

    queries: int = 0
    seen: int = 0
    held: int = 0


@dataclass
class Log(Policy):
    """A policy that keeps and counts all keys."""

    keeps_first = True
    heads: dict[int, Counts] = field(default_factory=dict, init=False)

    def survivors(self, kept: Kept) -> None:
        real = kept.positions >= 0
        query_positions = kept.positions[:, :, -kept.queries.shape[2] :]  # the call's own tokens, by their positions
        seen = ((kept.positions[:, :, None] <= query_positions[..., None]) & real[:, :, None]).sum((0, 2, 3)).tolist()
        queries, held = query_positions.ge(0).sum((0, 2)).tolist(), real.sum(-1).amax(0).tolist()
        for head, *added in zip(kept.kv_heads, queries, seen, held, strict=True):
            old = self.heads.get(head, Counts())
            self.heads[head] = Counts(old.queries + added[0], old.seen + added[1], max(old.held, added[2]))


def counts(model) -> dict[int, dict[int, Counts]]:
    """The counts of a model: layer -> KV head -> its `Counts`."""
    policies = (getattr(module, "surgery_keepers", {}).get("policy") for module in model.modules())
    logs = {each.layer: each.policy for each in policies if each is not None and hasattr(each.policy, "heads")}
    return {layer: log.heads for layer, log in logs.items()}


POLICY = Log
