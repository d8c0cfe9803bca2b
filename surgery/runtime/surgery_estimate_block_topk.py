"""Sparse prefill where every query picks key blocks by the mean of their keys.

A query picks its own block and the earlier blocks with the largest q.m_J, k in all; m_J is the mean of the keys in
block J. A block of queries keeps the key blocks that at least one of its queries picked, or a share of them (`votes`).
The queries of a block read the same list, so that a query may also read a block that only a neighbour picked.
"""

from __future__ import annotations

import torch

from .surgery_block_selection import Blocks, block_means, by_group, keep_top, widen
from .surgery_estimators import Estimator, Setting, is_number


def block_topk(query, key, scale: float, block: int, *, top=8, votes: float = 0.0) -> torch.Tensor:
    """The key blocks that enough queries of a query block have among their `top`.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        top: how many blocks a query picks, including its own; one number, or a list with one for each query head.
        votes: share of a block's queries that must pick a key block; at least one must.

    Returns:
        bool [batch, heads, query blocks, key blocks].

    Source:
        The gate of Lu et al. 2025 (MoBA, arXiv 2502.13189).
    """
    blocks, device, kv_heads = Blocks.of(query, key, block), key.device, key.shape[1]
    means = block_means(key, block)
    top = torch.as_tensor(top, device=device).expand(query.shape[1]).view(kv_heads, -1, 1, 1)
    picked = means.new_zeros(*query.shape[:2], blocks.rows, blocks.columns)
    for rows, tokens, seen in blocks.pieces(query.shape[0] * query.shape[1] * block):
        part = by_group(widen(query[:, :, tokens]), kv_heads)
        gate = (part.flatten(2, 3) @ means[:, :, :seen].mT).unflatten(2, part.shape[2:4])
        distance = blocks.distance(device)[blocks.row_of(tokens, device), :seen]
        gate.masked_fill_(distance == 0, torch.inf).masked_fill_(distance < 0, -torch.inf)
        chosen = keep_top(gate, top) & (distance >= 0)
        picked[:, :, rows, :seen] = blocks.fold(chosen.to(picked.dtype), rows, 0.0).sum(-2).flatten(1, 2)
    begin = blocks.row_numbers(device) * block
    queries = (begin + block).clamp_max(blocks.keys) - begin.clamp_min(blocks.start)  # [rows, 1]
    kept = (picked >= votes * queries) & (picked > 0)
    return (kept | blocks.forced(device=device)) & blocks.causal(device)


VOTES = Setting("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
ESTIMATORS = {
    "block_topk": Estimator(block_topk, chunk_exact=True, head_lists=True, by_head=("top",), settings={"votes": VOTES})
}
