"""Sparse prefill by pooled keys and a threshold: blocks with at least a share of the largest block's mass are kept.

surgery_estimate_pooled.py defines the masses; by default each query head has its own. The published score sums
exp(scale * q_i.m_J) over the queries (`queries: all`), so that one query of large norm decides for its whole block. By
default every query has one vote (`queries: each`). The diagonal block is always kept, and the threshold ignores its
mass.

The published method also computes the last query blocks densely. Here that is `last_rows_dense`, a setting of every
method.
"""

from __future__ import annotations

import torch

from .surgery_block_selection import Blocks, block_means, keep, reduce_groups, widen
from .surgery_estimate_pooled import block_mass
from .surgery_estimators import FROM_ONE, Estimator


def max_threshold(
    query,
    key,
    scale: float,
    block: int,
    *,
    alpha: float = 0.12,
    queries: str = "each",
    reduce: str = "none",
    first: int = 2,
    local: int = 4,
) -> torch.Tensor:
    """Blocks with at least `alpha` times the largest mass of the blocks before the diagonal one.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        alpha: from 0 (all blocks) to 1.
        first, local: how many blocks at the beginning, and how many of the nearest blocks (including the diagonal
            one), are kept.
        queries, reduce: as for `pooled`.

    Returns:
        bool [batch, heads or KV heads, query blocks, key blocks].

    Source:
        The block score and the threshold of FlashPrefill (github.com/qhfan/FlashPrefill), derived independently.
    """
    blocks = Blocks.of(query, key, block)
    bias = blocks.counts(key.device).to(widen(key[:0]).dtype).log()[None, None, None]
    mass = block_mass(query, block_means(key, block), scale, blocks, queries, bias)
    mass = reduce_groups(mass.masked_fill_(blocks.distance(key.device) == 0, 0.0), key.shape[1], reduce)
    return keep(mass, blocks, blocks.forced(first, local, device=key.device), None, None, alpha)


ESTIMATORS = {
    "max_threshold": Estimator(max_threshold, chunk_exact=True, head_lists=True, settings={"first": FROM_ONE})
}
