"""Sparse prefill where every query picks key blocks by the mean of their keys.

A query picks its own block and the earlier blocks with the largest q.m_J, k in all; m_J is the mean of the keys in
block J, after RoPE. Of equal ones the earlier is picked. What is read follows in one of two ways:

- As in MoBA (`exact`): each query of each query head reads the blocks that it picked and no other. The first block has
  no special place. No query picks an incomplete block, which can only be its own.
- By blocks of queries: a block of queries reads the key blocks that at least one of its queries picked, or a share of
  them (`votes`), and the first one. The queries of a block read the same list, so that a query may also read a block
  that only a neighbour picked. This is no MoBA, and block-sparse kernels can compute it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .surgery_block_selection import Blocks, block_means, by_group, keep_top, widen
from .surgery_estimators import Estimator, Setting, is_number


def block_topk(
    query, key, scale: float, block: int, *, top=8, votes: float = 0.0, exact: bool = False
) -> torch.Tensor:
    """The key blocks that enough queries of a query block have among their `top`.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        top: how many blocks a query picks, including its own; one number, or a list with one for each query head.
        votes: share of a block's queries that must pick a key block; at least one must.
        exact: must be false; otherwise there is no list of a query block (`picks_of_queries`).

    Returns:
        bool [batch, heads, query blocks, key blocks].

    Raises:
        ValueError: `exact` is true.

    Source:
        The gate of Lu et al. 2025 (MoBA, arXiv 2502.13189).
    """
    if exact:
        raise ValueError("block_topk with exact: true chooses for each query, and has no lists of query blocks")
    blocks, device = Blocks.of(query, key, block), key.device
    picked = query.new_zeros(
        *query.shape[:2], blocks.rows, blocks.columns, dtype=torch.promote_types(key.dtype, torch.float32)
    )
    for rows, _, chosen in _picks(query, key, blocks, top):
        votes_of_rows = blocks.fold(chosen.to(picked.dtype), rows, 0.0).sum(-2).flatten(1, 2)
        picked[:, :, rows, : chosen.shape[-1]] = votes_of_rows
    begin = blocks.row_numbers(device) * block
    queries = (begin + block).clamp_max(blocks.keys) - begin.clamp_min(blocks.start)  # [rows, 1]
    kept = (picked >= votes * queries) & (picked > 0)
    return (kept | blocks.forced(device=device)) & blocks.causal(device)


def picks_of_queries(query, key, block: int, *, top=8, **settings) -> torch.Tensor:
    """The key blocks that each query reads, its own among them: MoBA's gate.

    Args:
        query, key, top: as for `block_topk`; its other settings have no effect.

    Returns:
        bool [batch, heads, n, key blocks], at most `top` for each query.
    """
    blocks = Blocks.of(query, key, block)
    found = query.new_zeros(*query.shape[:3], blocks.columns, dtype=torch.bool)
    for _, tokens, chosen in _picks(query, key, blocks, top):
        found[:, :, tokens, : chosen.shape[-1]] = chosen.flatten(1, 2)
    return found


def _picks(query, key, blocks: Blocks, top) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield some rows at a time, their queries, and what these pick, bool [batch, KV heads, group, b, seen]."""
    device, kv_heads = key.device, key.shape[1]
    means = block_means(key, blocks.size)
    top = torch.as_tensor(top, device=device).expand(query.shape[1]).view(kv_heads, -1, 1, 1)
    for rows, tokens, seen in blocks.pieces(query.shape[0] * query.shape[1] * blocks.size):
        part = by_group(widen(query[:, :, tokens]), kv_heads)
        gate = (part.flatten(2, 3) @ means[:, :, :seen].mT).unflatten(2, part.shape[2:4])
        distance = blocks.distance(device)[blocks.row_of(tokens, device), :seen]
        gate.masked_fill_(distance == 0, torch.inf).masked_fill_(distance < 0, -torch.inf)
        yield rows, tokens, keep_top(gate, top) & (distance >= 0)


VOTES = Setting("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
EXACT = Setting("true or false", lambda value: isinstance(value, bool))
ESTIMATORS = {
    "block_topk": Estimator(
        block_topk,
        chunk_exact=True,
        head_lists=True,
        by_head=("top",),
        settings={"votes": VOTES, "exact": EXACT},
        by_query=picks_of_queries,
    )
}
