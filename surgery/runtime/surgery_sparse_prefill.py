"""Sparse prefill of a layer: which rows are sparse, which blocks they read, and the correction of their outputs.

An entry of the `surgery` block may hold `sparse`:

    {"method": "pooled", "block": 128, "dense_below": 1024, "last_rows_dense": 0, "delta": null, ...}

and the method's other settings (surgery_estimators.py). Sparse prefill applies to heads that see all tokens, and to
calls with more than one query. Only whole blocks of queries are sparse. If a call contains only a part of a block, its
queries read all keys, as a decoded token does. So a prompt gives the same results in one piece, in chunks that end at
block edges, and with speculated tokens at its end. A short call after a long past is decoding. (Without a cache every
step is a prompt again, and the generated tokens are a part of it.)

With `exact`, which block_topk has, each query of each query head reads a list of its own, and all of the above on
blocks of queries does not apply. A call with more than one query is a prompt, wherever it begins and ends, and its
queries read what they would read in one piece (but for `last_rows_dense`, which counts from the call's end). A call
with one query is decoding, and reads all.

Positions are counted from a row's first real token: every row of a padded batch runs alone on its real tokens.

surgery_block_attention.py attends to the kept blocks, surgery_query_blocks.py to those of single queries.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil

import torch

from .surgery_block_attention import attend_blocks, attend_rows, with_own_blocks
from .surgery_config import FILES, Part, load_file
from .surgery_estimators import choose, choose_by_query, estimator, settings_problems, with_defaults
from .surgery_kernels import by_pytorch, kernel_for, nothing
from .surgery_visibility import HeadKinds, Visibility

# A list that keeps more than this share of the blocks that its queries see reads all of them. It would save little
# more than the cost of gathering and estimating, and reading all blocks is exact.
DENSE = 0.6
PROBED = 4  # a check of the model has this many blocks of queries where prefill is sparse


@dataclass(frozen=True)
class Sparse:
    """How the heads of one visibility attend to a prompt.

    Attributes:
        method: the name of an estimator (`surgery_estimators.estimator_names`).
        block: tokens in a block of queries and of keys, a power of two.
        dense_below: query blocks that end at this position or before read all keys.
        last_rows_dense: the query blocks that hold any of this many last tokens of a call read all keys as well.
        delta: every delta-th row corrects the outputs (`_corrected`); it divides the block. None: no correction.
        settings: the method's own settings.
    """

    method: str
    block: int = 128
    dense_below: int = 0
    last_rows_dense: int = 0
    delta: int | None = None
    settings: dict = field(default_factory=dict)

    @classmethod
    def of(cls, entry: dict) -> Sparse:
        """The `Sparse` that a layer's entry `sparse` describes."""
        fields = set(cls.__dataclass_fields__) - {"settings"}
        own = {name: value for name, value in entry.items() if name in fields}
        return cls(**own, settings={name: value for name, value in entry.items() if name not in own})

    def of_heads(self, heads: list[int]) -> Sparse:
        """The same for some of the query heads; a setting that is a list has a value for each head."""
        by_head = {name: values for name, values in self.settings.items() if isinstance(values, list)}
        own = {name: [values[head] for head in heads] for name, values in by_head.items()}
        return replace(self, settings=self.settings | own)

    @property
    def exact(self) -> bool:
        """Whether each query has a list of its own."""
        return bool(self.settings.get("exact"))

    @property
    def dense_until(self) -> int:
        """The position up to which all queries of a prompt read all keys, whatever the text."""
        blocks = self.dense_below // self.block
        if self.exact:
            top = with_defaults(self.method, self.settings)["top"]
            blocks = max(blocks, min(top) if isinstance(top, list) else top)
        return blocks * self.block

    def applies(self, length: int, end: int) -> bool:
        """Whether any row of a call of `length` queries, the last of `end` tokens, may be sparse."""
        if self.exact:
            return length > 1 and end > self.dense_until
        return length >= self.block and end > self.dense_below

    @torch.compiler.disable  # tracing its loops, which depend on the prompt, would give a new graph each time
    def attend(self, query, keys, values, mask, scale: float, softcap, work=None) -> tuple:
        """Attention of a prompt, or of a chunk of it.

        Args:
            query: [batch, heads, n, head_dim].
            keys, values: [batch, KV heads, N, head_dim], in slots 0 to N - 1; the queries have the last n slots.
            mask: bool [batch, N], the slots of real tokens, which are consecutive; None: all are real.
            work: a `surgery_gated_compute.Work` that counts the multiply-adds, or None.

        Returns:
            The output [batch, heads, n, head_dim] and the log-sum-exp [batch, heads, n], 0 and -inf for padding. Then
            a function that says which keys were read, for terms that need it: from positions of queries
            [batch, 1, r, 1] and keys [batch, heads, 1, m] to bool [batch, heads, r, m]. It is None with `delta`, whose
            correction makes output and log-sum-exp stand for all keys.
        """
        rows, found = [_Row.of(query, keys, values, mask, row) for row in range(len(query))], []
        for row in rows:
            if row.some:
                with _products(work):
                    row.kept = self.kept(row.query, row.keys, scale)
        made = self._by_kernel(query, keys, values, rows, scale, softcap)
        for row, pair in zip(rows, made or [self._by_pytorch(row, scale, softcap) for row in rows], strict=True):
            if row.some and self.delta is not None:
                pair = self._corrected(*pair, row.query, row.keys, row.values, scale, softcap)
            if row.some and work is not None:
                work.add("attention", *self._products_of(row))
            found.append(row.padded(*pair))
        out, lse = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True))
        lists = tuple(row.lists(self) for row in rows)
        return out, lse, None if self.delta is not None else partial(_read, lists, self.block)

    def _by_pytorch(self, row: _Row, scale, softcap) -> tuple:
        """Attention of one row's real tokens to its kept blocks."""
        if not row.some:
            wide = torch.promote_types(row.query.dtype, torch.float32)
            return row.query, row.query.new_empty(row.query.shape[:3], dtype=wide)
        attend = load_file("sparse.queries").attend_choices if self.exact else attend_blocks
        return attend(row.query, row.keys, row.values, row.kept, self.block, scale, softcap)

    def _by_kernel(self, query, keys, values, rows: list[_Row], scale, softcap) -> list[tuple] | None:
        """`_by_pytorch` of each row, all in one launch; None where no kernel is for it."""
        query, keys = query.to(values.dtype), keys.to(values.dtype)  # under autocast they differ
        lists = [] if self.exact else [row.kept for row in rows if row.some]
        kernel = kernel_for("block_sparse_prefill", query, keys, values, shape=(self.block,)) if lists else None
        if kernel is None:
            return None
        kept = lists[0].new_zeros(len(rows), *(max(each.shape[axis] for each in lists) for axis in (1, 2, 3)))
        for row, mine in zip(rows, kept, strict=True):
            if row.some:
                lists = with_own_blocks(row.kept, row.kept.shape[3] - row.kept.shape[2])[0]
                lists = lists.repeat_interleave(len(mine) // len(lists), dim=0)
                mine[:, : lists.shape[1], : lists.shape[2]] = lists
        padded = any(row.start for row in rows)
        pad = torch.tensor([row.start for row in rows], device=query.device) if padded else None
        blocks, same = kernel.BlockList.of(kept, self.block), {"pad": pad, "softcap": softcap, "fallback": nothing}
        made = kernel.block_sparse_prefill(query, keys, values, blocks, scale, **same)
        return None if made is None else [row.of_batch(index, made) for index, row in enumerate(rows)]

    def _products_of(self, row: _Row) -> tuple[int, int]:
        """The multiply-adds of attention for one row, and those of full attention."""
        (heads, length, size), end = row.query.shape[1:], row.keys.shape[2]
        seen = heads * (length * (end - length) + length * (length + 1) // 2)
        return 2 * size * self.pairs(row.kept, heads, length, end), 2 * size * seen

    def sparse_blocks(self, length: int, end: int) -> range:
        """The query blocks that may leave out keys, for a call with the last `length` of `end` tokens.

        These are the blocks that the call contains whole, that end after `dense_below`, and that hold none of the
        `last_rows_dense` rows.
        """
        begin = max(ceil((end - length) / self.block), self.dense_below // self.block)
        return range(begin, max((end - self.last_rows_dense) // self.block, begin))

    @torch.no_grad()
    def kept(self, query, keys, scale: float) -> torch.Tensor:
        """The blocks that are read, bool [batch, KV heads or heads, query blocks, key blocks]; all tokens are real.

        With `exact` each query has a row of its own: [batch, heads, n, key blocks].
        """
        if self.exact:
            return self._kept_by_query(query, keys)
        length, end = query.shape[2], keys.shape[2]
        past, size, device, rows = end - length, self.block, keys.device, self.sparse_blocks(length, end)
        first, columns = past // size, torch.arange(ceil(end / size), device=device)
        causal = columns <= torch.arange(first, len(columns), device=device)[:, None]
        if not rows:
            return causal.expand(len(keys), keys.shape[1], -1, -1)
        if estimator(self.method).chunk_exact:  # these rows keep the same blocks without the others
            query, keys, first = query[:, :, rows.start * size - past : rows.stop * size - past], keys, rows.start
            keys = keys[:, :, : rows.stop * size]
        with torch.autocast(device.type, enabled=False):  # else rounded sums would choose the blocks
            found = choose(self.method, query, keys, scale, size, self.settings)
        found = found[:, :, rows.start - first : rows.stop - first]
        many = found.sum(-1, keepdim=True) > DENSE * (torch.arange(rows.start, rows.stop, device=device)[:, None] + 1)
        kept = causal.repeat(*found.shape[:2], 1, 1)
        kept[:, :, rows.start - past // size : rows.stop - past // size, : found.shape[-1]] &= found | many
        return kept

    def _kept_by_query(self, query, keys) -> torch.Tensor:
        """`kept` of each query. It reads all where its block ends by `dense_below`, or holds a late row."""
        length, end = query.shape[2], keys.shape[2]
        own = torch.arange(end - length, end, device=keys.device)[:, None] // self.block
        with torch.autocast(keys.device.type, enabled=False):  # else rounded sums would choose the blocks
            found = choose_by_query(self.method, query, keys, self.block, self.settings)
        dense = own < self.dense_below // self.block
        if self.last_rows_dense:
            dense = dense | ((own + 1) * self.block > end - self.last_rows_dense)
        return (found | dense) & (torch.arange(found.shape[3], device=keys.device) <= own)

    def pairs(self, kept, heads: int, length: int, end: int) -> int:
        """The number of pairs of a query and a key that are multiplied for one row of the batch, over all heads.

        Args:
            kept: [1, lists, query blocks or with `exact` queries, key blocks].
        """
        past, size = end - length, self.block
        own = sum(place % size + 1 for place in range(past, end))
        if self.exact:  # every query's own block is among those that it reads
            return heads * own + (int(kept.sum()) - heads * length) * size
        numbers = torch.arange(past // size, ceil(end / size), device=kept.device)
        queries = (numbers * size + size).clamp_max(end) - (numbers * size).clamp_min(past)
        before = kept.tril(past // size - 1)[0].sum(-1)  # key blocks before the queries' own, [lists, query blocks]
        pairs = heads * own + int((before * queries).sum()) * size * (heads // kept.shape[1])
        rows = self.sparse_blocks(length, end)
        exact = range(rows.start * size, rows.stop * size, self.delta) if self.delta is not None else ()
        return pairs + heads * sum(place + 1 for place in exact)

    def _corrected(self, out, lse, query, keys, values, scale, softcap) -> tuple:
        """Delta attention: correct the sparse rows by the difference between dense and sparse at every delta-th row.

        Every delta-th row is computed densely. The difference from its sparse output is added to it and to the rows up
        to the next dense row. The log-sum-exp gets the same correction, so that it is the dense one at these rows for
        terms that need it. No row depends on a later one. Rows that read all keys are not changed.

        Source: Willette et al. 2025, "Delta Attention", arXiv 2505.11254. There a fixed tail is dense as well, which
        is `last_rows_dense` here.
        """
        past, rows = keys.shape[2] - query.shape[2], self.sparse_blocks(query.shape[2], keys.shape[2])
        if not rows:
            return out, lse
        places = range(rows.start * self.block, rows.stop * self.block, self.delta)
        begin, stop = places.start - past, places.stop - past
        right = attend_rows(query[:, :, begin : stop : self.delta], keys, values, list(places), scale, softcap)
        corrected = []
        for sparse, exact in zip((out, lse), right, strict=True):
            middle = sparse[:, :, begin:stop]
            rest = (exact - middle[:, :, :: self.delta]).repeat_interleave(self.delta, dim=2)
            corrected.append(torch.cat([sparse[:, :, :begin], middle + rest, sparse[:, :, stop:]], dim=2))
        return tuple(corrected)


@contextmanager
def _products(work):
    """Count the matrix products inside as multiply-adds of the estimator, all by PyTorch: a kernel's are not seen."""
    if work is None:
        yield
        return
    from torch.utils.flop_counter import FlopCounterMode

    with by_pytorch(), FlopCounterMode(display=False) as counter:
        yield
    work.add("estimator", counter.get_total_flops() // 2, 0)


@dataclass
class _Row:
    """One row of a batch in a call, without its padding.

    Attributes:
        query, keys, values: [1, heads or KV heads, real tokens, head_dim].
        start: slot of the first real token; N where there is none.
        before, after: queries of padding before and after the real ones.
        kept: the blocks that it reads, as `Sparse.kept` gives them; None before they are chosen.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    start: int = 0
    before: int = 0
    after: int = 0
    kept: torch.Tensor | None = None

    @classmethod
    def of(cls, query, keys, values, mask, row: int) -> _Row:
        """Row `row` of a batch; `mask`: bool [batch, N], whose real tokens are consecutive, or None."""
        query, keys, values = (part[row : row + 1] for part in (query, keys, values))
        if mask is None:
            return cls(query, keys, values)
        (length, end), slots = (query.shape[2], keys.shape[2]), mask[row].nonzero().flatten().tolist()
        past, (start, stop) = end - length, (slots[0], slots[-1] + 1) if slots else (end, end)
        first = max(start, past)
        stop = max(stop, first)  # a row whose real tokens all came in earlier calls
        near = (part[:, :, start:stop] for part in (keys, values))
        return cls(query[:, :, first - past : stop - past], *near, start, first - past, end - stop)

    @property
    def some(self) -> bool:
        """Whether any of the call's tokens is real."""
        return self.query.shape[2] > 0

    def padded(self, out, lse) -> tuple:
        """Its output and log-sum-exp with 0 and -inf in place of padding."""
        edges, pad = (self.before, self.after), torch.nn.functional.pad
        return (pad(out, (0, 0, *edges)), pad(lse, edges, value=-torch.inf)) if any(edges) else (out, lse)

    def of_batch(self, index: int, made: tuple) -> tuple:
        """Its part of tensors [batch, heads, n, ...], with the number of its row in the batch."""
        return tuple(part[index : index + 1, :, self.before : part.shape[2] - self.after] for part in made)

    def lists(self, sparse: Sparse) -> Lists:
        """What its queries read."""
        if not self.some:
            return Lists(self.query.new_zeros(1, 1, 1, 1, dtype=torch.bool), 0, 1)
        first = self.keys.shape[2] - self.query.shape[2] if sparse.exact else self.kept.shape[3] - self.kept.shape[2]
        return Lists(self.kept, first, 1 if sparse.exact else sparse.block)


@dataclass(frozen=True)
class Lists:
    """The blocks of keys that one row of a batch reads.

    Attributes:
        kept: bool [1, lists, rows, key blocks], a list for each query head or KV head.
        first: the number of the first row: of its query block, or of its query.
        unit: tokens of a row: the block, or 1.
    """

    kept: torch.Tensor
    first: int
    unit: int


def _read(lists: tuple[Lists, ...], block: int, queries, keys) -> torch.Tensor:
    """The function that `Sparse.attend` returns; `lists` has those of each row of the batch."""
    found, heads = [], torch.arange(keys.shape[1], device=keys.device)[:, None, None]
    for row, each in enumerate(lists):
        _, count, rows, columns = each.kept.shape
        mine = (queries[row] // each.unit - each.first).clamp(0, rows - 1)  # [1, r, 1]
        its = (keys[row] // block).clamp(0, columns - 1)  # [heads, 1, m]
        found.append(each.kept[0][heads * count // len(heads), mine, its])
    return torch.stack(found)


def problem_of(entry, heads: int) -> str:
    """The error in a layer's entry `sparse`, a sentence; "" if there is none.

    Args:
        heads: number of query heads in the layer.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        return f"{entry!r} names no method"
    sparse = Sparse.of(entry)
    if problems := settings_problems(sparse.method, sparse.settings, sparse.block or 0, heads):
        return problems[0]
    for name in ("dense_below", "last_rows_dense"):
        if type(value := getattr(sparse, name)) is not int or value < 0:
            return f"{name} is {value!r}, and must be a whole number from 0"
    if sparse.exact and sparse.delta is not None:
        return "delta corrects blocks of queries, and with exact each query has a list of its own: drop one of them"
    if sparse.exact and sparse.settings.get("votes"):
        return "votes are of a block's queries, and with exact each query reads what it picks: drop votes"
    if (delta := sparse.delta) is not None and (type(delta) is not int or delta < 1 or sparse.block % delta):
        return f"delta is {delta!r}, and must divide the block of {sparse.block}"
    return ""


class SparsePart(Part):
    """The blocks of keys that full heads read in a prompt. An entry has `sparse` (see the module's docstring)."""

    keys = ("sparse",)
    by_slots = of_prompts = True

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        problem = problem_of(layer["sparse"], sum(groups))
        return f"has sparse prefill that cannot be: {problem}" if problem else ""

    def methods(self, layer: dict) -> set[str]:
        sparse = layer["sparse"]
        named = {f"sparse.{each['method']}" for each in (sparse, *sparse.get("patterns", ()))}
        attends = {"sparse.queries"} if sparse.get("exact") else {"kernel.block_sparse_prefill"}
        return ({"kernel.estimators", *named} | attends) & set(FILES)

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        module.surgery_sparse = None
        if "sparse" not in layer:
            return
        kinds: HeadKinds = module.surgery_heads  # its indices are made on the CPU: a model is loaded under "meta"
        sparse, every = Sparse.of(layer["sparse"]), torch.arange(sum(groups), device="cpu")
        module.surgery_sparse = [
            sparse.of_heads(own[0].tolist()) if visibility == Visibility() else None
            for visibility, own in zip(kinds.visibilities, kinds.split_queries(every[None]), strict=True)
        ]

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("visibility in prefill",)

    def after_heads_change(self, layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
        """A setting that is a list has a value for each query head."""
        settings = layer["sparse"].items()
        rows = {name: [values[head] for head in queries] for name, values in settings if isinstance(values, list)}
        return {"sparse": layer["sparse"] | rows}

    def describe(self, layer: dict) -> tuple[str, str]:
        sparse = layer["sparse"]
        return "sparse prefill", sparse["method"] + (", each query its own blocks" if sparse.get("exact") else "")

    def display_key(self, layer: dict):
        return layer["sparse"]

    def probe_length(self, layer: dict, least: int) -> int:
        sparse = Sparse.of(layer["sparse"])
        return max(least, max(sparse.dense_below, sparse.dense_until) + PROBED * sparse.block)


PART = SparsePart()
