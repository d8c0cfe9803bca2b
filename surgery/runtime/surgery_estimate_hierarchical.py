"""Sparse prefill by a tree search over the keys: the cost grows with log N for a block of queries, not with N.

For each query block, the blocks before it are cut into `top` chunks. In every round each chunk is cut in two, and one
vector r represents the keys of each half. A half's score is the largest q.r of the block's queries. The best `top`
halves enter the next round, until a chunk is a block. A key that differs from all its neighbours is found only if the
vectors of the chunks that contain it show the difference.
"""

from __future__ import annotations

import torch

from .surgery_block_selection import CELLS, Blocks, block_means, keep_top, widen
from .surgery_estimators import Estimator, Setting


def hierarchical(
    query, key, scale: float, block: int, *, top: int = 16, representative: str = "mean", local: int = 1
) -> torch.Tensor:
    """The blocks that a search with `top` branches finds.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        top: how many blocks are searched for a query block, apart from the first and the nearest ones.
        representative: the vector r of a chunk: the "mean" of its keys, or its "middle" key.
        local: how many of the nearest blocks are kept, including the diagonal one.

    Returns:
        bool [batch, heads, query blocks, key blocks].

    Source:
        Lee et al. 2024 (HiP, arXiv 2406.09827), from the paper.
    """
    blocks, device = Blocks.of(query, key, block), key.device
    kept = torch.zeros(*query.shape[:2], blocks.rows, blocks.columns, dtype=torch.bool, device=device)
    sums = block_means(key, block) * block  # an incomplete last block does no harm: it is before no query block
    stands = widen(key) if representative == "middle" else torch.cat([sums[:, :, :1] * 0, sums.cumsum(2)], dim=2)
    step = max(1, CELLS // (query.shape[0] * query.shape[1] * 2 * top * block))
    for begin in range(0, blocks.rows, step):
        rows = slice(begin, min(begin + step, blocks.rows))
        low, high = _search(query, stands, blocks, rows, top, representative == "middle")
        found = torch.zeros_like(kept[:, :, rows], dtype=torch.int)
        kept[:, :, rows] = found.scatter_add_(-1, low, (high > low).int()) > 0
    return (kept | blocks.forced(local=local, device=device)) & blocks.causal(device)


def _search(query, stands, blocks: Blocks, rows: slice, top: int, middle: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks that remain at the end: first block and end of each, [batch, heads, rows, top]; some are empty.

    Args:
        stands: with `middle`, the keys [batch, KV heads, N, x], from which a chunk's middle key is taken. Otherwise
            [batch, KV heads, columns + 1, x], the sums of all keys before each block, which give a chunk's mean.
    """
    size, device, (batch, heads) = blocks.size, query.device, query.shape[:2]
    tokens = slice(blocks.place(rows.start), blocks.place(rows.stop))
    queries = blocks.fold(widen(query[:, :, tokens]), rows, 0.0)
    absent = blocks.fold(queries.new_zeros(tokens.stop - tokens.start, 1), rows, 1.0).bool()  # positions of no query
    numbers = blocks.row_numbers(device)[rows]
    cuts = torch.arange(top + 1, device=device) * numbers // top
    low, high = (cuts[:, part].expand(batch, heads, -1, -1) for part in (slice(top), slice(1, top + 1)))
    row = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.arange(heads, device=device)[:, None, None] // (heads // stands.shape[1])
    for _ in range(max(-(-int(numbers[-1]) // top) - 1, 0).bit_length()):
        half = (low + high) // 2
        low, high = torch.stack([low, half], -1).flatten(-2), torch.stack([half, high], -1).flatten(-2)
        if middle:
            vectors = stands[row, head, (low + high) * size // 2]
        else:
            vectors = stands[row, head, high] - stands[row, head, low]
            vectors /= ((high - low) * size).clamp_min(1)[..., None]
        scores = (queries @ vectors.mT).masked_fill_(absent, -torch.inf).amax(-2)
        best = keep_top(scores.masked_fill_(high == low, -torch.inf), top)
        order = (~best).byte().sort(dim=-1, stable=True).indices[..., :top]  # the best, in order of position
        low, high = low.gather(-1, order), high.gather(-1, order)
    return low, high


REPRESENTATIVE = Setting("mean or middle", lambda value: value in ("mean", "middle"))
ESTIMATORS = {
    "hierarchical": Estimator(
        hierarchical, chunk_exact=True, head_lists=True, settings={"representative": REPRESENTATIVE}
    )
}
