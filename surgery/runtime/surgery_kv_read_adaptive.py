"""Read the far keys only where a Gaussian model of their scores says that they matter (QAdA).

A KV head keeps the mean m and the covariance C of its far keys, those between sinks and recent tokens. For a query q
with the scale s their joint weight is estimated as N * exp(s q.m + s^2 q.C.q / 2), against the exact weight of the
keys that every step reads. Where the estimated share of the far keys is above `share` for one of its query heads, the
KV head reads all; else it reads sinks and recent tokens alone.

Source: Donhauser et al. 2025, "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification",
arXiv 2502.09647.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_kv_read import DecodingStep, Reader
from .surgery_stores import rows_at


@dataclass
class AdaptiveReader(Reader):
    """All keys, or those that every step reads.

    Attributes:
        share: of the weight; the far keys are read where more is expected of them.
    """

    share: float = 0.1

    def choose(self, step: DecodingStep) -> torch.Tensor | None:
        batch, kv_heads, end, _ = step.keys.shape
        near = self.near(step)[:, None].expand(-1, kv_heads, -1)  # [batch, KV heads, m]
        keys = rows_at(step.keys, near.clamp(min=0))
        own = step.scores(step.query, keys).masked_fill((near < 0)[:, :, None], -torch.inf).logsumexp(-1)
        count, mean, covariance = self._moments(step)
        query = step.query.to(mean.dtype) * step.scoring.scale
        spread = torch.einsum("bkgd,bkde,bkge->bkg", query, covariance, query)
        far = count.log()[:, None, None] + (query * mean[:, :, None]).sum(-1) + spread / 2
        needs = ((far - own.to(far.dtype)).sigmoid() > self.share).any(2)  # [batch, KV heads]
        if not bool(needs.any()):
            return near
        if bool(needs.all()):
            return None
        every = torch.arange(end, device=near.device).masked_fill(step.positions < 0, -1)[:, None]
        near = torch.nn.functional.pad(near, (0, end - near.shape[-1]), value=-1)
        return torch.where(needs[..., None], every.expand(batch, kv_heads, -1), near)

    def _moments(self, step: DecodingStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Number of the far keys [batch], their mean [batch, KV heads, d] and covariance [batch, KV heads, d, d]."""
        state, (batch, _, end, _) = step.store.state, step.keys.shape
        wide = torch.promote_types(step.keys.dtype, torch.float32)
        first = int(state["until"][0]) if "until" in state else 0
        last = max(end - self.recent, first)  # slots before it are far, or sinks
        keys, positions = step.keys[:, :, first:last].to(wide), step.positions[:, first:last].expand(batch, -1)
        new = (positions >= self.sinks).to(wide)
        keys = keys * new[:, None, :, None]
        sums = {"count": new.sum(1), "sum": keys.sum(2), "square": keys.mT @ keys}
        for name, more in sums.items():
            state[name] = state[name] + more if name in state else more
        state["until"] = torch.full((batch,), last, device=keys.device)
        count = state["count"]
        many = count.clamp(min=1)[:, None, None]
        mean = state["sum"] / many
        return count, mean, state["square"] / many[..., None] - mean[..., None] * mean[..., None, :]

    def problem(self) -> str:
        if type(self.share) not in (int, float) or not 0 <= self.share <= 1:
            return f"share is {self.share!r}; it is from 0 to 1"
        return super().problem()


READER = AdaptiveReader
