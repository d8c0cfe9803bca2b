"""Sparse prefill by sampled rows: the exact attention of a few queries of a block gives its key blocks their mass.

    mass(I, J) = sum over the sampled queries i of I and the keys j of J of softmax_j(scale * q_i.k_j)

Every `every`-th query is sampled, which includes the last one of each block; so is the last token. No key is pooled:
rotary positions do not cancel in a mean, and a single key with much attention is found. Keys that only the other
queries of a block attend to are missed. The cost is 1/every of the cost of all scores.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .surgery_block_selection import Blocks, by_group, keep, reduce_groups, widen
from .surgery_estimators import STEP, Estimator


def sampled(
    query,
    key,
    scale: float,
    block: int,
    *,
    gamma: float | None = 0.9,
    density: float | None = None,
    alpha: float | None = None,
    every: int = 32,
    reduce: str = "sum",
    local: int = 2,
) -> torch.Tensor:
    """Blocks with most of the attention of the sampled queries.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        gamma, density, alpha: one of the rules of `surgery_block_selection.keep`; the others are None.
        every: distance between sampled queries; it divides the block.
        reduce: "sum" or "max" over the query heads of a KV head, or "none": a list for each query head.
        local: how many of the nearest blocks are kept, including the diagonal one.

    Returns:
        bool [batch, KV heads or heads, query blocks, key blocks].

    Raises:
        ValueError: `every` does not divide the block.

    Source:
        Sampled rows are from Zhu et al. 2024 (SampleAttention, arXiv 2406.15486). There they choose columns for the
        whole prompt; here each block of queries has its own sampled rows.
    """
    if block % every:
        raise ValueError(f"every must divide the block: {block} is no multiple of {every}")
    blocks, kv_heads, device = Blocks.of(query, key, block), key.shape[1], key.device
    wide = widen(key).mT
    mass = wide.new_zeros(*query.shape[:2], blocks.rows, blocks.columns)
    for _, tokens, seen in blocks.pieces(query.shape[0] * query.shape[1] * block * block // every):
        places = torch.arange(tokens.start, tokens.stop, device=device) + blocks.start
        places = places[(places % every == every - 1) | (places == blocks.keys - 1)]
        part = by_group(widen(query[:, :, places - blocks.start]) * scale, kv_heads)
        end = min(seen * block, blocks.keys)
        scores = part.flatten(2, 3) @ wide[..., :end]
        scores = scores.unflatten(2, part.shape[2:4]).flatten(1, 2)  # [batch, heads, places, keys]
        scores.masked_fill_(torch.arange(end, device=device) > places[:, None], -torch.inf)
        found = pad(scores.softmax(-1), (0, seen * block - end)).unflatten(-1, (seen, block)).sum(-1)
        mass[..., :seen].index_add_(2, places // block - blocks.first, found)
    forced = blocks.forced(local=local, device=device)
    return keep(reduce_groups(mass, kv_heads, reduce), blocks, forced, gamma, density, alpha)


ESTIMATORS = {"sampled": Estimator(sampled, chunk_exact=True, settings={"every": STEP})}
