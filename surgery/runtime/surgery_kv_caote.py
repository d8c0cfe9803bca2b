"""Keep the keys without which the output of attention would change most (CAOTE).

Without key j, whose weight is a, the output o of a head is o + a / (1 - a) * (o - v_j). This is exact for one key. A
set S of keys leaves (o - sum of a_j v_j) / (1 - sum of a_j). `greedy` drops one key after the other by this formula.
With `output` the change is measured behind the output projection W of the head: |W (o - v_j)|.

Source: Goel et al. 2025, "CAOTE", arXiv 2504.14051.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_call import in_groups
from .surgery_kv_evict import MeanVote
from .surgery_kv_policy import Kept, Votes

LEAST = 1e-6  # of 1 - a, where one key has all of the weight


@dataclass
class CaotePolicy(MeanVote):
    """A query's vote for a key is the squared change of its output without that key.

    Attributes:
        output: name of the output projection in the attention module; "": the change is measured before it.
        fast: the mean of the values that the query sees stands in for o (the paper's FastCAOTE).
        greedy: drop one key after the other; after each, weights and outputs are those of the keys that are left. The
            weights of `observe` queries are noted with each key. Virtual keys count as keys whose value is 0.
    """

    output: str = ""
    fast: bool = False
    greedy: bool = False

    needs_outputs = True

    def vote(self, votes: Votes, kept: Kept) -> torch.Tensor:
        weights, values, outputs = votes.weights, kept.values.to(votes.weights.dtype), votes.outputs
        gram = self._gram(kept).to(weights.dtype) if self.output else None
        most, heaviest = weights.max(-1, keepdim=True)
        others = weights.scatter(-1, heaviest, 0.0)
        left = (1 - weights.sum(-1, keepdim=True)) + others.sum(-1, keepdim=True)  # 1 - a, where a is nearly 1
        left = left.clamp(min=LEAST)
        value = values[:, :, None].expand(*weights.shape[:3], -1, -1)
        value = value.gather(3, heaviest.expand(*heaviest.shape[:-1], values.shape[-1]))
        if self.fast:
            past = kept.positions[:, :, None] <= votes.positions[:, None, :, None]
            seen = past & (kept.positions >= 0)[:, :, None]
            mean = seen.to(values.dtype) @ values / seen.sum(-1, keepdim=True).clamp(min=1)
            outputs = mean[:, :, None].expand_as(outputs)
            change = most / left * (outputs - value)
        else:
            # For the heaviest key, o - v is a small difference of large numbers: the rest is summed anew.
            rest = in_groups(others, values) + (outputs - in_groups(weights, values))
            change = most * (rest / left - value)
        votes_of_all = (weights / (1 - weights).clamp(min=LEAST)).square() * distances(
            outputs, values, gram, self._squares(kept, values, gram)
        )
        own = change.square().sum(-1) if gram is None else ((change @ gram[None]) * change).sum(-1)
        return votes_of_all.scatter(-1, heaviest, own[..., None])

    def _squares(self, kept: Kept, values: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
        """v.v of each key behind the projection of each query head, [batch, KV heads, group or 1, kept].

        Behind a projection they are noted: only those of the last `interval` keys can be new.
        """
        if gram is None:
            return values.square().sum(-1)[:, :, None]
        old = kept.notes.get("squares")
        new = slice(0 if old is None or self.interval is None else max(values.shape[2] - self.interval, 0), None)
        fresh = values[:, :, None, new]
        fresh = ((fresh @ gram) * fresh).sum(-1).mT.float()
        kept.notes["squares"] = fresh if old is None else torch.cat([old[:, :, : new.start], fresh], dim=2)
        return kept.notes["squares"].mT.to(values.dtype)

    @staticmethod
    def _gram(kept: Kept) -> torch.Tensor:
        """The output projection of each query head times its transpose, [KV heads, group, head_dim, head_dim]."""
        projection = kept.projection()
        return projection @ projection.mT

    def forget(self, notes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().forget(notes) | {name: notes[name] for name in ("squares",) if name in notes}

    def add_votes(self, votes: Votes, kept: Kept) -> None:
        if not self.greedy:
            super().add_votes(votes, kept)
            return
        weights, voted = votes.weights, votes.voting.any(2).any(1)  # [batch, n]
        place = torch.arange(self.observe, device=weights.device)  # consecutive queries have different places
        there = (votes.positions % self.observe)[..., None].eq(place) & voted[..., None]  # [batch, n, observe]
        new = torch.einsum("bkgnj,bnp->bkjgp", weights, there.to(weights.dtype))
        old = kept.notes.get("weights")
        known = there.any(1)[:, None, None, None]
        kept.notes["weights"] = torch.where(known, new, 0.0 if old is None else old.to(new.dtype))

    def survivors(self, kept: Kept) -> torch.Tensor:
        if not self.greedy or "weights" not in kept.notes:
            return super().survivors(kept)
        safe, others = self.safe_and_others(kept)
        weights = kept.notes["weights"].permute(0, 1, 3, 4, 2)  # [batch, KV heads, group, observe, kept]
        values, gram = kept.values.to(weights.dtype), self._gram(kept).to(weights.dtype) if self.output else None
        rest, out = torch.ones_like(weights[..., :1]), in_groups(weights, values)  # of the keys that are left
        squares = self._squares(kept, values, gram)
        seen = (weights > 0).any(2).sum(2)  # queries that saw the key, [batch, KV heads, kept]
        left = others.sum(-1)
        for _ in range(max(int(left.max()) - self.keys, 0)):
            change = (weights / (rest - weights).clamp(min=LEAST)).square() * distances(
                out / rest, values, gram, squares
            )
            loss = self.of_group(change).sum(2) / seen.clamp(min=1)
            gone = loss.masked_fill(~others, torch.inf).argmin(-1, keepdim=True)  # [batch, KV heads, 1]
            gone = torch.zeros_like(others).scatter(-1, gone, True) & (left > self.keys)[..., None]
            others, left = others & ~gone, left - (left > self.keys).int()
            lost = weights * gone[:, :, None, None]
            rest = (rest - lost.sum(-1, keepdim=True)).clamp(min=LEAST)
            out = out - in_groups(lost, values)
        return safe | others

    def notes_of(self, readers: int) -> int:
        squares = readers if self.output else 0
        return squares + (readers * self.observe if self.greedy else super().notes_of(readers))

    def problem(self) -> str:
        if self.greedy and (self.fast or self.memory):
            return "greedy drops keys by the weights since the last decision: not with fast, nor with memory"
        return super().problem()


def distances(
    outputs: torch.Tensor, values: torch.Tensor, gram: torch.Tensor | None, squares: torch.Tensor
) -> torch.Tensor:
    """Squared distances of outputs and values behind the output projection.

    Args:
        outputs: [batch, KV heads, group, n, d].
        values: [batch, KV heads, kept, d].
        gram: [KV heads, group, d, d], the projection times its transpose; None: no projection.
        squares: [batch, KV heads, group or 1, kept], of each value to 0.

    Returns:
        [batch, KV heads, group, n, kept].
    """
    weighed = outputs if gram is None else outputs @ gram
    own = (weighed * outputs).sum(-1)[..., None]
    return (own + squares[..., None, :] - 2 * in_groups(weighed, values.mT)).clamp(min=0)


POLICY = CaotePolicy
