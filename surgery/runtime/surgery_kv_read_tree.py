"""A tree search over the keys: the cost of finding them grows with log N (HiP, in decoding).

The tokens between sinks and recent ones are cut into blocks, and the blocks into as many chunks as blocks will be
read. In every round each chunk is cut in two, the middle key of each half stands for it, and the halves with the
largest q.k enter the next round, until a chunk is a block. A key that differs from all its neighbours is found only by
luck.

Source: Lee et al. 2024, "HiP", arXiv 2406.09827.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_config import is_whole
from .surgery_kv_read import DecodingStep, SomeKeys
from .surgery_stores import rows_at


@dataclass
class TreeReader(SomeKeys):
    """The tokens of the blocks that the search finds.

    Attributes:
        block: tokens of a block; `keys` tokens are read in whole blocks.
    """

    block: int = 16

    def choose(self, step: DecodingStep) -> torch.Tensor:
        batch, kv_heads, end, _ = step.keys.shape
        start = end - 1 - step.now  # [1 or batch], the slot of a row's first real token
        first, last = (start + self.sinks)[:, None, None], end - self.recent
        blocks = -(-(last - first).clamp(min=0) // self.block)  # the last one may be cut
        top = self.keys // self.block
        cuts = torch.arange(top + 1, device=start.device) * blocks // top
        cuts = cuts.expand(batch, kv_heads, -1)
        low, high = cuts[..., :-1], cuts[..., 1:]  # blocks of each chunk
        longest = (high - low).amax(-1, keepdim=True)  # a row's chunks are equally long, but for one block
        while int(longest.max()) > 1:
            half = (low + high) // 2
            lows, highs = torch.cat([low, half], -1), torch.cat([half, high], -1)
            middle = (first + (lows + highs) * self.block // 2).clamp(max=last - 1)
            keys = rows_at(step.keys, middle)
            scores = step.scores(step.query, keys).amax(2).masked_fill(highs <= lows, -torch.inf)
            best = scores.topk(top, dim=-1).indices
            splits = longest > 1  # rows of fewer tokens have done so earlier
            low = torch.where(splits, lows.gather(-1, best), low)
            high = torch.where(splits, highs.gather(-1, best), high)
            longest = torch.where(splits, (longest + 1) // 2, longest)
        tokens = (first + low * self.block)[..., None] + torch.arange(self.block, device=start.device)
        tokens = tokens.masked_fill((high <= low)[..., None] | (tokens >= last), -1).flatten(2)
        return torch.cat([self.near(step)[:, None].expand(-1, kv_heads, -1), tokens], dim=-1)

    def problem(self) -> str:
        if not is_whole(self.block, 1) or (is_whole(self.keys, 1) and self.block > self.keys):
            return f"block is {self.block!r}; it is whole, and from 1 to the {self.keys} keys"
        if is_whole(self.keys, 1) and self.keys % self.block:
            return f"keys is {self.keys}, which is no whole number of blocks of {self.block}"
        return super().problem()


READER = TreeReader
