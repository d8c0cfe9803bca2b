"""Read everything at some steps, and in between what weighed most at the last of them (Recycled Attention).

Source: Xu et al. 2024, "Recycled Attention: Efficient inference for long-context language models", arXiv 2411.05787.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_config import is_whole
from .surgery_kv_read import DecodingStep, RankedKeys


@dataclass
class Remembering(RankedKeys):
    """A reader whose choice serves for the steps that follow, along with every newer token.

    Attributes:
        every: a choice is made anew before it is so many tokens old.
    """

    every: int = 32

    def remember(self, step: DecodingStep, chosen: torch.Tensor, anew: torch.Tensor) -> torch.Tensor:
        """Keep a choice, in the rows where it is new, and return the slots of the choice that holds now.

        Args:
            chosen: long [batch, KV heads, m], slots; -1 for none.
            anew: bool [batch].
        """
        state, end = step.store.state, step.keys.shape[2]
        if "chosen" in state:
            old = torch.nn.functional.pad(state["chosen"], (0, chosen.shape[-1] - state["chosen"].shape[-1]), value=-1)
            chosen = torch.where(anew[:, None, None], chosen, old)
            at = torch.where(anew, end, state["at"])
        else:
            at = torch.full_like(anew, end, dtype=torch.long)
        short = anew & (step.now < self.least)  # a row of so few tokens reads all: that is no choice for later
        state |= {"chosen": chosen, "at": torch.where(short, end - self.every, at)}
        newer = at[:, None] + torch.arange(self.every, device=at.device)  # [batch, every]
        newer = newer.masked_fill(newer >= end, -1)[:, None].expand(-1, chosen.shape[1], -1)
        return torch.cat([chosen, newer], dim=-1)

    def age(self, step: DecodingStep) -> torch.Tensor | None:
        """How many tokens ago the last choice was made, long [batch]; None: never."""
        at = step.store.state.get("at")
        return None if at is None else step.keys.shape[2] - at

    def problem(self) -> str:
        if not is_whole(self.every, 1):
            return f"every is {self.every!r}, and must be whole and from 1"
        return super().problem()


@dataclass
class RecycledReader(Remembering):
    """Rows read all at positions that are multiples of `every`, and at their first step."""

    def choose(self, step: DecodingStep) -> torch.Tensor | None:
        batch, kv_heads, end, _ = step.keys.shape
        age = self.age(step)
        anew = (step.now % self.every == 0).expand(batch)
        anew = torch.ones_like(anew) if age is None else anew | (age >= self.every)
        if not bool(anew.any()):
            return self.remember(step, step.store.state["chosen"], anew)
        weights = self.of_group(step.weights(step.query, step.keys))
        slots = self.remember(step, self.best(step, weights, self.keys), anew)
        if bool(anew.all()):
            return None
        every = torch.arange(end, device=slots.device).expand(batch, kv_heads, -1)
        every = every.masked_fill((step.positions < 0)[:, None], -1)
        slots = torch.nn.functional.pad(slots, (0, max(end - slots.shape[-1], 0)), value=-1)
        every = torch.nn.functional.pad(every, (0, slots.shape[-1] - end), value=-1)
        return torch.where(anew[:, None, None], every, slots)


READER = RecycledReader
