"""Sparse prefill by position alone: the first tokens and a window (A-shape), or these and dense last rows (tri-shape).

The text has no influence. A block is kept if any of its queries sees any of its keys: a query at position p sees the
key at position j <= p if j < sinks or p - j < window.
"""

from __future__ import annotations

import torch

from .surgery_block_selection import Blocks
from .surgery_estimators import Estimator


def streaming(query, key, scale, block: int, *, sinks=128, window=4096) -> torch.Tensor:
    """The blocks that sinks + window reach.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        block: tokens of a block.
        sinks, window: numbers of tokens; the window includes the query itself. Either may be a list with one number
            for each query head.

    Returns:
        bool [batch, KV heads (query heads where a list is given), query blocks, key blocks].

    Source:
        Xiao et al. 2023 (arXiv 2309.17453); as a pattern of prefill, Jiang et al. 2024 (arXiv 2407.02490).
    """
    blocks, device = Blocks.of(query, key, block), key.device
    sinks, window = (torch.as_tensor(tokens, device=device).view(-1, 1, 1) for tokens in (sinks, window))
    begin = torch.arange(blocks.columns, device=device) * block < sinks
    distance = blocks.distance(device)
    near = (distance - 1) * block + 1 < window  # the first query of a block and the last key of the other
    kept = (begin | near | blocks.forced(device=device)) & blocks.causal(device)
    heads = query.shape[1] if len(kept) > 1 else key.shape[1]
    return kept.expand(query.shape[0], heads, -1, -1)


def tri_shape(query, key, scale, block: int, *, sinks=128, window=4096, last: int = 128) -> torch.Tensor:
    """The blocks of `streaming`, and all blocks for the query blocks that hold the `last` tokens.

    The last tokens are those of the call: where a prompt comes in chunks, the end of every chunk is dense.

    Source:
        Li et al. 2024 (arXiv 2412.10319).
    """
    dense = Blocks.of(query, key, block).forced(last_rows_dense=last, device=key.device)
    return streaming(query, key, scale, block, sinks=sinks, window=window) | dense


LISTS = ("sinks", "window")
ESTIMATORS = {
    "streaming": Estimator(streaming, chunk_exact=True, reads_text=False, by_head=LISTS),
    "tri_shape": Estimator(tri_shape, chunk_exact=False, reads_text=False, by_head=LISTS),
}
