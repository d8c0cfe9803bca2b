"""Sparse prefill with budgets that follow from the weights: columns and diagonals, or also blocks by pooled queries.

As in surgery_estimate_vertical_slash.py, the last queries stand for all queries; here they are one block of queries.
Each head keeps, in blocks, the largest columns and diagonals that hold the share `gamma` of their weights. Pooling is
trusted where the mean of these queries and the means of the key blocks give nearly the queries' true distribution.
Such a head keeps only `min_budget` columns and diagonals. It adds its largest blocks by pooled queries and keys, which
hold the share `gamma` of their mass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .surgery_block_selection import Blocks, block_means, by_group, keep_by_coverage, keep_top, widen
from .surgery_estimate_pooled import block_mass
from .surgery_estimate_vertical_slash import by_block, columns_and_diagonals, crossing, last_weights
from .surgery_estimators import FROM_NONE, FROM_ONE, Estimator, Setting, is_number


def flexprefill(
    query,
    key,
    scale: float,
    block: int,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
) -> torch.Tensor:
    """The blocks of the largest columns and diagonals, and pooled blocks for the heads where pooling is accurate.

    Args:
        query: [batch, heads, n, head_dim], the last n of the N tokens.
        key: [batch, KV heads, N, head_dim].
        gamma: share of the weight that is kept; 1 keeps all.
        tau: a head also gets pooled blocks if the root of the Jensen-Shannon divergence (in nats) between its pooled
            and its true distribution is below this.
        min_budget, max_budget: bounds on a head's columns and on its diagonals, in tokens, rounded up to blocks.

    Returns:
        bool [batch, heads, query blocks, key blocks].

    Source:
        Lai et al. 2025 (FlexPrefill, arXiv 2502.20766).
    """
    blocks, kv_heads = Blocks.of(query, key, block), key.shape[1]
    weights = last_weights(query, key, scale, block)
    columns, diagonals = columns_and_diagonals(weights)
    means, bias = block_means(key, block), blocks.counts(key.device).to(weights.dtype).log()
    last = by_group(widen(query[:, :, -block:]).mean(2, keepdim=True), kv_heads)
    guess = (last @ means[:, :, None].mT * scale + bias).softmax(-1).flatten(1, 2)[:, :, 0]
    aware = divergence(guess, by_block(columns, block)).sqrt() < tau  # [batch, heads]
    least, most = (-(-tokens // block) for tokens in (min_budget, blocks.keys if max_budget is None else max_budget))
    chosen = []
    for values in (columns, diagonals):
        budget = -(-keep_by_coverage(values, gamma, values < 0).sum(-1) // block)
        budget = budget.masked_fill(aware, 0).clamp(least, max(most, least))
        sums = by_block(values, block)
        sums[..., 0] = torch.inf
        chosen.append(keep_top(sums, budget[..., None]))
    kept = crossing(chosen[0], chosen[1], chosen[1], blocks)
    flat = block_mass(query, means, scale, blocks, "mean", bias[None, None, None]).flatten(-2)
    pooled = keep_by_coverage(flat, gamma, flat < 0).view_as(kept) & blocks.causal(key.device)
    return kept | (pooled & aware[..., None, None])


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of distributions over the last dimension, in nats; 0 log 0 = 0."""
    entropy = torch.special.entr
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).sum(-1).clamp_min(0)


SETTINGS = {
    "tau": Setting("a number from 0", lambda value: is_number(value) and value >= 0),
    "min_budget": FROM_NONE,
    "max_budget": replace(FROM_ONE, optional=True),
}
ESTIMATORS = {"flexprefill": Estimator(flexprefill, chunk_exact=False, head_lists=True, settings=SETTINGS)}
