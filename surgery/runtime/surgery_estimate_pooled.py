"""Sparse prefill by pooled keys: a block of keys is weighed as if all its keys were their mean.

For query block I and key block J of one query head, with the mean key m_J and c_J keys in the block:

    queries: each   mass(I, J) = sum over the queries i of I of softmax_J(scale * q_i.m_J + log c_J)
    queries: all    mass(I, J) = softmax_J(log of the sum over i of exp(scale * q_i.m_J) + log c_J)
    queries: mean   mass(I, J) = softmax_J(scale * (mean q of I).m_J + log c_J)

over the blocks J <= I. `each` is the attention that the block's queries would have if all keys of a key block were
equal. In `all`, a query of large norm outvotes the others. By default the masses of the query heads of a KV head are
added up, so that all of them read the same blocks. A mean hides the differences between a block's keys: `similarity`
keeps blocks with unlike keys, whatever their mass.

All queries of a block choose its key blocks, so that later queries affect which blocks a row reads. What the row reads
is causal.
Sources: the parts are in Jiang et al. 2024 (arXiv 2407.02490, mean pooling), Zhang et al. 2025 (SpargeAttn, arXiv
2502.18137, similarity), Yuan et al. 2025 (NSA, arXiv 2502.11089, one list for a KV head).
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import normalize

from .surgery_block_selection import Blocks, block_means, by_group, keep, reduce_groups, widen
from .surgery_estimators import Estimator, Setting, is_number
from .surgery_kernels import kernel_for


def pooled(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    block: int,
    *,
    gamma: float | None = 0.9,
    density: float | None = None,
    alpha: float | None = None,
    queries: str = "each",
    reduce: str = "sum",
    similarity: float | None = None,
    local: int = 1,
) -> torch.Tensor:
    """Blocks with the largest masses by pooled keys.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        scale: factor on q.k.
        block: tokens of a block.
        gamma, density, alpha: one of the rules of `surgery_block_selection.keep`; the others are None.
        queries: "each", "all" or "mean", see above.
        reduce: "sum" or "max" over the query heads of a KV head, or "none": a list for each query head.
        similarity: key blocks whose normalised keys have a mean product below this are kept, and get no mass.
        local: how many of the nearest blocks are kept, including the diagonal one.

    Returns:
        bool [batch, KV heads or heads, query blocks, key blocks].
    """
    blocks = Blocks.of(query, key, block)
    bias = blocks.counts(key.device).to(widen(key[:0]).dtype).log()[None, None]
    forced = blocks.forced(local=local, device=key.device)
    if similarity is not None:
        unlike = block_means(normalize(widen(key), dim=-1), block).square().sum(-1) < similarity
        bias = bias.masked_fill(unlike, torch.finfo(bias.dtype).min / 2)  # -inf could give rows of NaN
        unlike = unlike if reduce != "none" else unlike.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        forced = forced | (unlike[:, :, None] & blocks.causal(key.device))
    mass = block_mass(query, block_means(key, block), scale, blocks, queries, bias[:, :, None])
    return keep(reduce_groups(mass, key.shape[1], reduce), blocks, forced, gamma, density, alpha)


def block_mass(query, means, scale: float, blocks: Blocks, queries: str, bias: torch.Tensor) -> torch.Tensor:
    """The masses that the module's docstring defines.

    Args:
        query: [batch, heads, n, head_dim].
        means: the mean key of each block, [batch, KV heads, columns, head_dim], float32 or wider.
        queries: "each", "all" or "mean".
        bias: log of the number of keys in a block: [batch or 1, KV heads or 1, 1, columns].

    Returns:
        [batch, heads, rows, columns], 0 for later keys. A row sums to 1, with "each" to its number of queries.
    """
    kv_heads = means.shape[1]
    later, bias = ~blocks.causal(means.device), bias[:, :, None]
    if queries == "mean":
        scores = by_group(block_means(query, blocks.size, blocks.start), kv_heads) @ means[:, :, None].mT * scale
        return (scores + bias).masked_fill_(later, -torch.inf).softmax(-1).flatten(1, 2)
    by_pytorch = partial(_block_mass, query, means, scale, blocks, queries, bias)
    if (kernel := kernel_for("estimators", query)) is None:
        return by_pytorch()
    given = scale, blocks.size, blocks.keys, queries
    return kernel.pooled_mass(query, means, bias.flatten(2), *given, fallback=by_pytorch)


def _block_mass(query, means, scale: float, blocks: Blocks, queries: str, bias: torch.Tensor) -> torch.Tensor:
    """`block_mass` for "each" and "all" by PyTorch; `bias`: [batch or 1, KV heads or 1, 1, 1, columns]."""
    (kv_heads, columns), later = means.shape[1:3], ~blocks.causal(means.device)
    mass = means.new_full((*query.shape[:2], blocks.rows, columns), 0.0 if queries == "each" else -torch.inf)
    for rows, tokens, seen in blocks.pieces(query.shape[0] * query.shape[1] * blocks.size):
        part = by_group(widen(query[:, :, tokens]) * scale, kv_heads)
        scores = (part.flatten(2, 3) @ means[:, :, :seen].mT).unflatten(2, part.shape[2:4])
        if queries == "each":
            scores += bias[..., :seen]
            if rows.stop - rows.start > 1:
                scores.masked_fill_(later[blocks.row_of(tokens, means.device), :seen], -torch.inf)
            found = blocks.fold(scores.softmax(-1), rows, 0.0).sum(-2)
        else:
            found = blocks.fold(scores, rows, -torch.inf).logsumexp(-2) + bias[..., :seen]
        mass[:, :, rows, :seen] = found.flatten(1, 2)
    return mass if queries == "each" else mass.masked_fill_(later, -torch.inf).softmax(-1)


SIMILARITY = Setting("a number from -1 to 1", lambda value: is_number(value) and -1 <= value <= 1, optional=True)
ESTIMATORS = {"pooled": Estimator(pooled, chunk_exact=True, settings={"similarity": SIMILARITY})}
