"""Sparse prefill by columns and diagonals: the last queries choose keys and distances for all queries.

A column is a key, and a diagonal is a distance. Each gets its mean attention weight over the last queries. The blocks
that the largest columns and diagonals of each head cross are kept. The last queries decide for all queries, so the
choice differs where a prompt comes in chunks.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .surgery_block_selection import Blocks, by_group, keep_top, widen
from .surgery_estimators import FROM_NONE, Estimator


def vertical_slash(
    query,
    key,
    scale: float,
    block: int,
    *,
    vertical=1000,
    slash=6096,
    last: int = 64,
    sinks: int = 30,
    nearest: int = 100,
) -> torch.Tensor:
    """The blocks that the chosen columns and diagonals cross.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        vertical, slash: how many columns and diagonals (in tokens) a query head keeps; one number, or a list with one
            for each query head.
        last: how many queries at the end decide.
        sinks, nearest: how many first columns and nearest diagonals are always chosen; they count towards `vertical`
            and `slash`.

    Returns:
        bool [batch, heads, query blocks, key blocks].

    Source:
        Jiang et al. 2024 (MInference, arXiv 2407.02490).
    """
    blocks, heads = Blocks.of(query, key, block), query.shape[1]
    columns, diagonals = columns_and_diagonals(last_weights(query, key, scale, last))
    columns[..., :sinks] = diagonals[..., :nearest] = torch.inf
    most = [torch.as_tensor(k, device=key.device).expand(heads)[:, None] for k in (vertical, slash)]
    columns = keep_top(columns, most[0].clamp_min(sinks))
    diagonals = keep_top(diagonals, most[1].clamp_min(nearest))
    between = diagonals & (torch.arange(blocks.keys, device=key.device) % block > 0)
    return crossing(*(by_block(chosen, block) > 0 for chosen in (columns, diagonals, between)), blocks)


def last_weights(query: torch.Tensor, key: torch.Tensor, scale: float, last: int) -> torch.Tensor:
    """Attention weights of the last queries: [batch, heads, min(last, n), N], float32 or wider."""
    rows = by_group(widen(query[:, :, -last:]) * scale, key.shape[1])
    scores = (rows.flatten(2, 3) @ widen(key).mT).unflatten(2, rows.shape[2:4]).flatten(1, 2)
    count, keys = scores.shape[2:]
    later = torch.ones(count, count, dtype=torch.bool, device=key.device).triu(1)
    scores[..., keys - count :].masked_fill_(later, -torch.inf)
    return scores.softmax(-1)


def columns_and_diagonals(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weight of each key and of each distance.

    Args:
        weights: [..., r, N], of the last r queries.

    Returns:
        [..., N] by key, and [..., N] by distance, 0 first.
    """
    count, keys = weights.shape[-2:]
    # Row i of the flipped rows, moved i places to the right, has its key at distance d in column keys - 1 - d.
    skewed = pad(weights.flip(-2), (0, count)).flatten(-2)[..., :-count].unflatten(-1, (count, keys + count - 1))
    return weights.mean(-2), skewed.mean(-2)[..., :keys].flip(-1)


def by_block(values: torch.Tensor, size: int) -> torch.Tensor:
    """Sums over blocks of the last dimension: [..., N] to [..., blocks]."""
    return pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def crossing(columns, near, far, blocks: Blocks) -> torch.Tensor:
    """The blocks that the chosen columns and diagonals cross.

    Args:
        columns: bool [batch, heads, columns], the blocks of the chosen columns.
        near: bool [batch, heads, columns], by distance of blocks: a diagonal at a distance of d tokens crosses the
            blocks at distance d // size.
        far: bool of the same shape, for the chosen diagonals whose d is not a multiple of the size: they also cross
            the blocks at distance d // size + 1.

    Returns:
        bool [batch, heads, rows, columns].
    """
    near = near | pad(far, (1, 0))[..., :-1]
    distance = blocks.distance(columns.device)
    kept = columns[:, :, None] | near[:, :, distance.clamp_min(0)]
    return (kept | blocks.forced(device=columns.device)) & (distance >= 0)


ESTIMATORS = {
    "vertical_slash": Estimator(
        vertical_slash,
        chunk_exact=False,
        head_lists=True,
        by_head=("vertical", "slash"),
        settings=dict.fromkeys(("vertical", "slash", "nearest"), FROM_NONE),
    )
}
