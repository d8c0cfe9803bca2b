"""Keep every key of the KV heads whose output is far from the other heads', chosen anew for each text (Task-KV).

Of each query head, z is the mean output for the last `observe` queries, and the center is the mean of z over the heads
under the policy. The `full_heads` KV heads with the largest |z - center| keep every key from then on. The others keep
sinks, recent tokens, and the `keys` others that queries attend to most. So the number of such heads is fixed, and
which ones they are differs from text to text, and among the rows of a batch. They are chosen where the first key would
be dropped.

Source: He et al. 2025, "Task-KV", arXiv 2501.15113. Its abstract says that the distance to the center decides, and
that the other heads keep sinks, recent tokens and "middle activations". Which outputs, which distance and which keys
in the middle are ours: it was not checked against the paper's text or code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_config import HeadCost, is_whole
from .surgery_kv_attention import AttentionPolicy
from .surgery_kv_evict import SLOT
from .surgery_kv_policy import Kept, Votes

OUTPUTS, COUNTS = "outputs", "counts"  # in a store's state: sums of outputs [batch, KV heads, group, d], and how many


@dataclass
class TaskPolicy(AttentionPolicy):
    """Some heads of each row keep every key; in the others a key's score is its mean attention weight.

    Attributes:
        full_heads: KV heads of a layer that keep every key.
        output: name of the output projection in the attention module: outputs are compared behind it; "": before it.
    """

    full_heads: int = 1
    output: str = ""

    needs_outputs = True

    def add_votes(self, votes: Votes, kept: Kept) -> None:
        super().add_votes(votes, kept)
        if self._has_chosen(kept):
            return
        voting = votes.voting[..., None]
        more = {
            OUTPUTS: torch.where(voting, votes.outputs, 0).sum(3),
            COUNTS: voting.expand(*votes.outputs.shape[:4], 1).sum(3).to(votes.outputs.dtype),
        }
        kept.state.update({name: kept.state[name] + one if name in kept.state else one for name, one in more.items()})

    @staticmethod
    def _has_chosen(kept: Kept) -> bool:
        """Whether every row has chosen its heads: only then are there no outputs after a decision."""
        return kept.whole is not None and OUTPUTS not in kept.state

    def whole_heads(self, kept: Kept, leaving: torch.Tensor) -> torch.Tensor:
        if self._has_chosen(kept):
            return kept.whole
        whole = kept.whole
        if whole is None:
            whole = torch.full((len(leaving), self.full_heads), -1, device=leaving.device)
        now = leaving.any(2).any(1, keepdim=True) & (whole < 0)
        farthest = self._distances(kept).argsort(dim=-1, descending=True, stable=True)[:, : self.full_heads]
        return torch.where(now, farthest.sort(dim=-1).values, whole)

    def _distances(self, kept: Kept) -> torch.Tensor:
        """How far each KV head's outputs are from the center, [batch, KV heads]; heads without a vote do not count."""
        counts = kept.state[COUNTS]
        outputs, real = kept.state[OUTPUTS] / counts.clamp(min=1), counts > 0  # [batch, KV heads, group, 1]
        if self.output:
            outputs = (outputs[:, :, :, None] @ kept.projection().to(outputs.dtype)[None])[:, :, :, 0]
        center = (outputs * real).sum((1, 2), keepdim=True) / real.sum((1, 2), keepdim=True).clamp(min=1)
        return self.of_group(((outputs - center) * real).norm(dim=-1))

    def forget_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(state[name]) for name in (OUTPUTS, COUNTS) if name in state}

    def archive_costs(self) -> list[HeadCost]:
        if self.most is None:
            return []
        return [HeadCost(1, -self.left, SLOT)] * self.full_heads

    def problem(self) -> str:
        if fault := super().problem():
            return fault
        if not is_whole(self.full_heads, 1):
            return f"full_heads is {self.full_heads!r}, and must be whole and from 1"
        return ""

    def problem_of_heads(self, groups: list[int]) -> str:
        if len(groups) == 1:
            return "task_kv needs two KV heads at least, one that keeps every key and one that does not: there is one"
        if len(groups) <= self.full_heads:
            count = len(groups)
            return (
                f"full_heads is {self.full_heads} of {count} KV heads, so that none drops a key: at most {count - 1}"
            )
        return "" if len({*groups}) == 1 else "task_kv needs KV heads with equally many query heads, to compare them"


POLICY = TaskPolicy
