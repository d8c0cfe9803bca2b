"""Attention of a prompt where each query of each head reads key blocks of its own.

Key block J holds keys J * block to J * block + block - 1. A query reads the keys of its own block up to itself, and
all keys of the earlier blocks that it chose. Queries are brought together by the block that they read: a tile is one
key block of one KV head, and the queries of all its query heads that chose this block. Their outputs are merged by
log-sum-exps. So the work is that of the blocks that are read, and there are never more scores than one tile's.

The backward pass computes the scores again, tile by tile: of the forward, only the inputs, the choice, the output and
the log-sum-exp stay in memory. No Triton kernel does this; every device runs the code below.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from .surgery_block_selection import CELLS


def attend_choices(query, keys, values, chosen, block: int, scale: float, softcap=None) -> tuple:
    """Causal attention of each query to its own block and to the earlier blocks that it chose.

    Args:
        query: [1, heads, n, head_dim], the last n of N tokens.
        keys, values: [1, KV heads, N, head_dim], all of real tokens.
        chosen: bool [1, heads, n, key blocks]; a query's own block is always read, later blocks are not.
        block: tokens in a block.
        scale: factor on q.k.
        softcap: cap on the scores, or None.

    Returns:
        [1, heads, n, head_dim] and the natural log-sum-exp [1, heads, n], both with a gradient.
    """
    wide = torch.promote_types(values.dtype, torch.float32)  # half precision would round scores and each tile's output
    query, keys, wide_values = (each[0].to(wide) for each in (query, keys, values))
    out, lse = _Tiled.apply(query, keys, wide_values, chosen[0], (block, scale, softcap))
    return out[None].to(values.dtype), lse[None]


class _Tiled(torch.autograd.Function):
    """`attend_choices` for one row of the batch, float32 or wider; its backward pass holds no scores."""

    @staticmethod
    def forward(ctx, query, keys, values, chosen, settings):
        block, scale, softcap = settings
        (heads, length, size), kv_heads = query.shape, keys.shape[0]
        rows = query.reshape(kv_heads, -1, size)
        out = torch.zeros_like(rows)
        lse = rows.new_full(rows.shape[:2], -torch.inf)
        with torch.autocast(query.device.type, enabled=False):
            for head, near, ids, seen in _tiles(chosen, kv_heads, keys.shape[1], block):
                scores, _ = _scores(rows[head, ids], keys[head, near], seen, scale, softcap)
                more_lse, here_lse = scores.logsumexp(-1), lse[head, ids]
                more = (scores - more_lse[:, None]).exp() @ values[head, near]
                total = torch.logaddexp(here_lse, more_lse)
                here = out[head, ids] * (here_lse - total).exp()[:, None]
                out[head, ids] = here + more * (more_lse - total).exp()[:, None]
                lse[head, ids] = total
        ctx.save_for_backward(query, keys, values, chosen, out, lse)
        ctx.settings = settings
        return out.reshape(heads, length, size), lse.reshape(heads, length)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient, lse_gradient):
        query, keys, values, chosen, out, lse = ctx.saved_tensors
        block, scale, softcap = ctx.settings
        rows = query.reshape(len(keys), -1, query.shape[-1])
        # A score's gradient is its weight times (its value.out_gradient - out.out_gradient + lse_gradient).
        above = out_gradient.reshape(out.shape)
        level = (out * above).sum(-1) - lse_gradient.reshape(lse.shape)
        found = [torch.zeros_like(tensor) for tensor in (rows, keys, values)]
        with torch.autocast(query.device.type, enabled=False):
            for head, near, ids, seen in _tiles(chosen, len(keys), keys.shape[1], block):
                own, its, from_above = rows[head, ids], keys[head, near], above[head, ids]
                scores, slope = _scores(own, its, seen, scale, softcap)
                weights = (scores - lse[head, ids][:, None]).exp()
                found[2][head, near] += weights.mT @ from_above
                slopes = weights * (from_above @ values[head, near].mT - level[head, ids][:, None])
                slopes = (slopes if slope is None else slopes * slope).mul_(scale)
                found[0][head, ids] += slopes @ its
                found[1][head, near] += slopes.mT @ own
        return found[0].reshape(query.shape), *found[1:], None, None


def _scores(rows, keys, seen, scale: float, softcap) -> tuple:
    """The scores of a tile, -inf where unseen, and the slope of the soft-cap, or None."""
    scores, slope = (rows @ keys.mT) * scale, None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf), slope


def _tiles(chosen, kv_heads: int, end: int, block: int) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """The pairs of queries and keys that are computed together; every pair that is read is in one tile.

    Args:
        chosen: bool [heads, n, key blocks].
        end: N.

    Yields:
        The KV head, the keys, the indices of queries among the group * n of the KV head, and the mask [queries, keys]
        or None where all keys are seen. A query's own block comes first, so that it has a finite log-sum-exp from
        then on.
    """
    device, (heads, length, columns) = chosen.device, chosen.shape
    past, group = end - length, heads // kv_heads
    of_heads = torch.arange(group, device=device)[:, None] * length
    for index in range(past // block, columns):
        begin, stop = max(index * block, past), min(index * block + block, end)
        step = max(1, CELLS // (group * (stop - index * block)))
        for low in range(begin, stop, step):
            places = torch.arange(low, min(low + step, stop), device=device)
            near = slice(index * block, int(places[-1]) + 1)
            seen = torch.arange(near.start, near.stop, device=device) <= places[:, None]
            ids, seen = (of_heads + places - past).flatten(), seen.repeat(group, 1)
            for head in range(kv_heads):
                yield head, near, ids, seen
    own = torch.arange(past, end, device=device) // block
    before = chosen & (torch.arange(columns, device=device) < own[:, None])
    before = before.reshape(kv_heads, group * length, columns).mT
    counts = before.sum(-1).flatten().tolist()
    for place, ids in enumerate(before.nonzero()[:, 2].split(counts)):
        head, index = divmod(place, columns)
        for some in ids.split(max(1, CELLS // block)):
            if len(some):
                yield head, slice(index * block, index * block + block), some, None
