"""The blocks of a prompt, and the rules by which estimators keep some of them.

Block boundaries are absolute. Key block J holds the keys from J * size to J * size + size - 1, and query block I the
queries at the positions of key block I. So the blocks that a query block keeps do not depend on how a prompt is cut
into chunks, as long as the cuts are at block edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad

from .surgery_kernels import kernel_for

CELLS = 1 << 22  # scores that an estimator holds at once, over all heads: 16 MB of float32


@dataclass(frozen=True)
class Blocks:
    """The partition of `keys` tokens, the last `queries` of which are queries, into blocks of `size`.

    Attributes:
        queries, keys: n and N.
        size: tokens in a block.
    """

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, size: int) -> Blocks:
        """The blocks of query [batch, heads, n, head_dim] and key [batch, KV heads, N, head_dim]."""
        return cls(query.shape[2], key.shape[2], size)

    @property
    def start(self) -> int:
        """Index of the first query among the tokens."""
        return self.keys - self.queries

    @property
    def first(self) -> int:
        """Index of the first query block. Row r of a list of kept blocks is query block `first` + r."""
        return self.start // self.size

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.keys // self.size)

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return self.columns - self.first

    def row_numbers(self, device=None) -> torch.Tensor:
        """Index of each query block, long [rows, 1]."""
        return torch.arange(self.first, self.columns, device=device)[:, None]

    def distance(self, device=None) -> torch.Tensor:
        """Index of the query block minus that of the key block, long [rows, columns]. Below 0 the keys are later."""
        return self.row_numbers(device) - torch.arange(self.columns, device=device)

    def causal(self, device=None) -> torch.Tensor:
        """Key blocks that contain a key which some query of the row sees, bool [rows, columns]."""
        return self.distance(device) >= 0

    def counts(self, device=None) -> torch.Tensor:
        """Number of keys in each block, long [columns]."""
        return (self.keys - torch.arange(self.columns, device=device) * self.size).clamp_max(self.size)

    def forced(self, first: int = 1, local: int = 1, last_rows_dense: int = 0, device=None) -> torch.Tensor:
        """The blocks that are kept whatever their score, bool [rows, columns].

        Args:
            first: how many blocks at the beginning are kept.
            local: how many of the nearest blocks are kept, including the diagonal one.
            last_rows_dense: the query blocks that hold any of this many last tokens keep all blocks.
        """
        distance = self.distance(device)
        near = distance < max(local, 1)
        begin = torch.arange(self.columns, device=device) < max(first, 1)
        dense = (self.row_numbers(device) + 1) * self.size > self.keys - last_rows_dense
        if not last_rows_dense:
            dense = torch.zeros_like(dense)
        return (near | begin | dense) & (distance >= 0)

    def pieces(self, cells_of_row: int) -> Iterator[tuple[slice, slice, int]]:
        """Split the queries into pieces of whole query blocks, each small enough to hold its scores (`CELLS`).

        Args:
            cells_of_row: number of scores of one query block with one key block, over all heads of the batch.

        Yields:
            The rows of a piece in a list of kept blocks, its queries, and how many key blocks its last row sees.
        """
        begin = 0
        while begin < self.rows:
            end = begin + 1
            while end < self.rows and (end + 1 - begin) * (self.first + end + 1) * cells_of_row <= CELLS:
                end += 1
            tokens = slice(self.place(begin), self.place(end))
            yield slice(begin, end), tokens, self.first + end
            begin = end

    def place(self, row: int) -> int:
        """Index of the first query of a row."""
        return min(max((self.first + row) * self.size - self.start, 0), self.queries)

    def row_of(self, tokens: slice, device=None) -> torch.Tensor:
        """The row of each of some queries, long [tokens]."""
        return (self.start + torch.arange(tokens.start, tokens.stop, device=device)) // self.size - self.first

    def fold(self, values: torch.Tensor, rows: slice, fill: float) -> torch.Tensor:
        """Reshape values of the queries of some rows, [..., tokens, x], to blocks, [..., rows, size, x].

        Positions of a block without a query (before a chunk, after the end) get `fill`.
        """
        lead = self.start % self.size if rows.start == 0 else 0
        count = rows.stop - rows.start
        trail = count * self.size - lead - values.shape[-2]
        if lead or trail:
            values = pad(values, (0, 0, lead, trail), value=fill)
        return values.unflatten(-2, (count, self.size))


def widen(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or unchanged if they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def block_means(values: torch.Tensor, size: int, start: int = 0) -> torch.Tensor:
    """Mean of the tokens of each block.

    Args:
        values: [batch, heads, tokens, x]; the first token has index `start`.
        size: tokens of a block.

    Returns:
        [batch, heads, blocks, x], float32 or wider; an incomplete block gives the mean of the tokens it has.
    """
    if start == 0 and (kernel := kernel_for("estimators", values)) is not None:
        return kernel.block_means(values, size, partial(_block_means, values, size, 0))
    return _block_means(values, size, start)


def _block_means(values: torch.Tensor, size: int, start: int) -> torch.Tensor:
    """`block_means` by PyTorch."""
    wide, length = torch.promote_types(values.dtype, torch.float32), values.shape[2]
    lead = min(-start % size, length)
    whole = (length - lead) // size
    middle = lead + whole * size
    means = []
    if lead:
        means.append(values[:, :, :lead].mean(2, keepdim=True, dtype=wide))
    if whole:
        means.append(values[:, :, lead:middle].unflatten(2, (whole, size)).mean(3, dtype=wide))
    if middle < length:
        means.append(values[:, :, middle:].mean(2, keepdim=True, dtype=wide))
    return torch.cat(means, dim=2)


def by_group(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Query [batch, heads, n, x] as [batch, KV heads, group, n, x]."""
    return query.unflatten(1, (kv_heads, query.shape[1] // kv_heads))


def shares(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension. A row that is -inf throughout gives zeros."""
    return scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)


def reduce_groups(mass: torch.Tensor, kv_heads: int, how: str) -> torch.Tensor:
    """Reduce the masses of the query heads that read a KV head to one list.

    Args:
        mass: [batch, heads, rows, columns], not negative.
        how: "sum" or "max" over the query heads of each KV head, or "none".

    Returns:
        [batch, KV heads, rows, columns], or mass itself.
    """
    if how == "none":
        return mass
    grouped = by_group(mass, kv_heads)
    return grouped.sum(2) if how == "sum" else grouped.amax(2)


def keep_by_coverage(mass: torch.Tensor, gamma: float, forced: torch.Tensor) -> torch.Tensor:
    """The blocks with the largest masses that together hold the share gamma of a row's mass.

    Forced blocks come first, then the others in falling order of mass. Of equal masses the earlier block is first. A
    block is kept if the blocks before it hold less than gamma, so the block that reaches gamma is kept.

    Args:
        mass: [..., columns], not negative.
        gamma: share of a row's mass. 1 keeps all blocks, including those without mass.
        forced: bool, broadcast to mass.
    """
    if gamma >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    order = mass.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    kept = before < gamma * ranked.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept) | forced


def keep_by_ratio(mass: torch.Tensor, alpha: float) -> torch.Tensor:
    """Blocks with at least alpha times the largest mass of their row; 0 keeps all."""
    return mass >= alpha * mass.amax(-1, keepdim=True)


def keep_top(scores: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """The k largest of each row, the earlier of equal ones first.

    Args:
        scores: [..., columns].
        k: from 1; one number for all rows, or long, broadcast to [..., 1]. A k above the number of columns keeps all.
    """
    columns = scores.shape[-1]
    k = torch.as_tensor(k, device=scores.device).clamp(1, columns)
    ranked = scores.topk(int(k.max()), dim=-1).values
    least = ranked.gather(-1, (k - 1).expand(*scores.shape[:-1], 1))
    above, level = scores > least, scores == least
    room = k - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def keep(
    mass: torch.Tensor, blocks: Blocks, forced: torch.Tensor, gamma: float | None, density: float | None, alpha=None
) -> torch.Tensor:
    """The blocks that one of three rules keeps, and the forced ones, without the blocks of later keys.

    Args:
        mass: [batch, heads, rows, columns], not negative, 0 for later keys.
        forced: bool [rows, columns] or broadcast to it; only causal blocks may be forced.
        gamma: coverage, see `keep_by_coverage`.
        density: share of the causal blocks of a row, rounded up; forced blocks count towards it.
        alpha: see `keep_by_ratio`.

    Returns:
        bool [batch, heads, rows, columns].

    Raises:
        ValueError: not exactly one of gamma, density and alpha is given.
    """
    if [gamma, density, alpha].count(None) != 2:
        raise ValueError(f"one rule says which blocks are kept: gamma={gamma}, density={density}, alpha={alpha}")
    causal = blocks.causal(mass.device)
    if gamma is not None:
        kept = keep_by_coverage(mass, gamma, forced)
    elif density is not None:
        # Subtract a little, since 0.1 * 30 is slightly more than 3 in floating point.
        most = [math.ceil(density * (row + 1) - 1e-9) for row in range(blocks.first, blocks.columns)]
        ranked = mass.masked_fill(~causal, -torch.inf).masked_fill(forced, torch.inf)
        kept = keep_top(ranked, torch.tensor(most, device=mass.device)[:, None])
    else:
        kept = keep_by_ratio(mass, alpha)
    return (kept | forced) & causal
