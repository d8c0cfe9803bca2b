"""Sparse prefill by antidiagonals: every stride x stride tile of scores is weighed by the mean of its antidiagonal.

Tokens form groups of `stride`. The score of query group I and key group J is the mean of q.k over the pairs
(query I * stride + stride - 1 - c, key J * stride + c): one product of vectors of stride * head_dim elements. Every
row and every column of the tile crosses the antidiagonal once. A softmax over J <= I follows, and the shares of the
groups are added up in each block. In the tile on the diagonal, only pairs whose key is not later than the query count.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import pad

from .surgery_block_selection import Blocks, by_group, keep, reduce_groups, shares, widen
from .surgery_estimators import STEP, Estimator
from .surgery_kernels import kernel_for


def xattention(
    query,
    key,
    scale: float,
    block: int,
    *,
    gamma: float | None = 0.9,
    density: float | None = None,
    alpha: float | None = None,
    stride: int = 16,
    reduce: str = "none",
) -> torch.Tensor:
    """The blocks with the largest sums of antidiagonal shares.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        gamma, density, alpha: one of the rules of `surgery_block_selection.keep`; the others are None.
        stride: tokens of a group; it divides the block. The cost is 1/stride of the cost of all scores.
        reduce: "none", or "sum" or "max" over the query heads of a KV head.

    Returns:
        bool [batch, heads or KV heads, query blocks, key blocks].

    Raises:
        ValueError: the stride does not divide the block.

    Source:
        Xu et al. 2025 (XAttention, arXiv 2503.16428).
    """
    if block % stride:
        raise ValueError(f"the stride of xattention must divide the block: {block} is no multiple of {stride}")
    blocks, mass = Blocks.of(query, key, block), antidiagonal_mass(query, key, scale, block, stride)
    forced = blocks.forced(device=key.device)
    return keep(reduce_groups(mass, key.shape[1], reduce), blocks, forced, gamma, density, alpha)


def antidiagonal_mass(query, key, scale: float, block: int, stride: int) -> torch.Tensor:
    """The shares of the key blocks, added up over the query groups of a block.

    Returns:
        [batch, heads, query blocks, key blocks], float32 or wider.
    """
    by_pytorch = partial(_antidiagonal_mass, query, key, scale, block, stride)
    if (kernel := kernel_for("estimators", query, key, shape=(block, stride))) is None:
        return by_pytorch()
    return kernel.antidiagonal_mass(query, key, scale, block, stride, by_pytorch)


def _antidiagonal_mass(query, key, scale: float, block: int, stride: int) -> torch.Tensor:
    """`antidiagonal_mass` by PyTorch."""
    groups, side, device = Blocks.of(query, key, stride), block // stride, key.device
    cells = Blocks(groups.rows, groups.columns, side)  # blocks of `side` groups, as if a group were a token
    tail = groups.columns * stride - groups.keys
    key_groups = pad(widen(key), (0, 0, 0, tail)).unflatten(2, (-1, stride))  # [batch, KV heads, groups, stride, x]
    wide = key_groups.flatten(3).mT
    mass = wide.new_zeros(*query.shape[:2], cells.rows, cells.columns)
    for rows, part, seen in cells.pieces(query.shape[0] * query.shape[1] * side * side):
        end = min(seen * side, groups.columns)
        tokens = slice(groups.place(part.start), groups.place(part.stop))
        backward = groups.fold(widen(query[:, :, tokens]), part, 0.0).flip(-2)
        backward = by_group(backward.flatten(-2), key.shape[1])  # [batch, KV heads, group, query groups, stride * x]
        scores = (backward.flatten(2, 3) @ wide[..., :end]).unflatten(2, backward.shape[2:4])
        numbers = torch.arange(part.start, part.stop, device=device) + groups.first
        own = key_groups[:, :, numbers].flatten(3)[:, :, None]
        products = (backward * own).unflatten(-1, (stride, -1)).sum(-1)  # [..., query groups, stride]
        places = numbers[:, None] * stride + torch.arange(stride - 1, -1, -1, device=device)  # of the queries
        real = (places >= groups.start) & (places < groups.keys)
        early = real & (torch.arange(stride, device=device) * 2 < stride)
        scores *= scale / real.sum(-1, keepdim=True)
        # A tile without any pair gets -inf, not the mean of nothing (NaN).
        on = (products * early).sum(-1) * scale / early.sum(-1)
        scores[..., torch.arange(len(numbers), device=device), numbers] = on.masked_fill(~early.any(-1), -torch.inf)
        scores.masked_fill_(torch.arange(end, device=device) > numbers[:, None], -torch.inf)
        found = pad(shares(scores), (0, seen * side - end)).unflatten(-1, (seen, side)).sum(-1)
        mass[:, :, rows, :seen] = cells.fold(found, rows, 0.0).sum(-2).flatten(1, 2)
    return mass


ESTIMATORS = {"xattention": Estimator(xattention, chunk_exact=True, head_lists=True, settings={"stride": STEP})}
