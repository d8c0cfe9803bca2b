"""Sparse prefill of a layer: which rows are sparse, which blocks they read, and the correction of their outputs.

An entry of the `surgery` block may hold `sparse`:

    {"method": "pooled", "block": 128, "dense_below": 1024, "last_rows_dense": 0, "delta": null, ...}

and whatever other settings the method has (surgery_block_selection.py). It is for heads that see all, and for calls
with more than one query. What is sparse is a whole block of queries: those of a block that a call holds only a part
of read all keys, as a decoded token does. So a prompt in one piece, in chunks that end at block edges, and with
speculated tokens at its end gives the same, and a short call behind a long past is decoding. (Without a cache every
step is a prompt again, and the generated tokens are a part of it.)

Positions are counted from a row's first real token: every row of a padded batch is run alone on its real tokens.

Attention of a prompt to the blocks of keys that were kept for it.

Key block J is keys J * block to J * block + block - 1; query block I likewise, in absolute positions, where the n
queries are the last of N tokens. A query sees what lies before it in the key blocks kept for its block.

On a CPU the keys of a list are gathered and go through the flash kernel without a mask: only a query's own block
needs one, and the own blocks of all queries are one causal product. Two outputs meet by their log-sum-exps. Where that
kernel has no answer (gradients, soft-capped scores, other devices without the Triton kernel) the softmax is written
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import ceil

import torch

from .surgery_attention import explicit, fused, written_out
from .surgery_block_selection import METHODS, choose, settings_problems
from .surgery_config import FILES, Part, load_file
from .surgery_visibility import HeadKinds, Visibility

# A list that keeps more than this share of the blocks that its queries see reads all of them: what it would save is
# little, gathering and estimating taken off, and reading all is exact.
DENSE = 0.6
PROBED = 4  # blocks of queries that a check of the model has beyond where prefill becomes sparse


@dataclass(frozen=True)
class Sparse:
    """How the heads of one visibility attend to a prompt.

    Attributes:
        method: a name of `surgery_block_selection.METHODS`.
        block: tokens in a block of queries and of keys, a power of two.
        dense_below: query blocks that end at this position or before read all keys.
        last_rows_dense: so do the query blocks that hold the last so many tokens of a call.
        delta: the correction below from every delta-th row, a divisor of the block; None: no correction.
        settings: the method's own.
    """

    method: str
    block: int = 128
    dense_below: int = 0
    last_rows_dense: int = 0
    delta: int | None = None
    settings: dict = field(default_factory=dict)

    @classmethod
    def of(cls, entry: dict) -> Sparse:
        """From `sparse` of a layer's entry."""
        fields = set(cls.__dataclass_fields__) - {"settings"}
        own = {name: value for name, value in entry.items() if name in fields}
        return cls(**own, settings={name: value for name, value in entry.items() if name not in own})

    def of_heads(self, heads: list[int]) -> Sparse:
        """The same for some of the query heads: a setting that is a list has a value for each head."""
        by_head = {name: values for name, values in self.settings.items() if isinstance(values, list)}
        own = {name: [values[head] for head in heads] for name, values in by_head.items()}
        return replace(self, settings=self.settings | own)

    def applies(self, length: int, end: int) -> bool:
        """Whether any row of a call of `length` queries, the last of `end` tokens, may be sparse."""
        return length >= self.block and end > self.dense_below

    @torch.compiler.disable  # a loop over lists that the prompt makes: traced, it would be another graph each time
    def attend(self, query, keys, values, mask, scale: float, softcap, work=None) -> tuple:
        """Attention of a prompt, or of a chunk of it.

        Args:
            query: [batch, heads, n, head_dim].
            keys, values: [batch, KV heads, N, head_dim], of the slots from 0 on; the queries have the last n.
            mask: bool [batch, N], the slots of real tokens, which are neighbours; None: all are real.
            work: a `surgery_gated_compute.Work` that counts the multiply-adds, or None.

        Returns:
            [batch, heads, n, head_dim] and the log-sum-exp [batch, heads, n]; 0 and -inf for padding. Then what was
            read, for terms that ask, or None where the two stand for all keys: a function of positions of queries
            [batch, 1, r, 1] and keys [batch, heads, 1, m] that gives bool [batch, heads, r, m].
        """
        found = []
        for row in range(len(query)):
            one = tuple(part[row : row + 1] for part in (query, keys, values))
            if mask is None:
                found.append(self._row(*one, scale, softcap, work))
            else:
                found.append(self._padded(*one, mask[row], scale, softcap, work))
        outs, lses, kept = zip(*found, strict=True)
        out, lse = (part[0] if len(part) == 1 else torch.cat(part) for part in (outs, lses))
        return out, lse, None if self.delta is not None else partial(_read, kept, self.block)

    def _padded(self, query, keys, values, real, scale, softcap, work) -> tuple:
        """`attend` for a row, real: bool [N]."""
        slots, past = real.nonzero().flatten().tolist(), keys.shape[2] - query.shape[2]
        start, stop = (slots[0], slots[-1] + 1) if slots else (0, 0)
        first = max(start, past)
        if first >= stop:
            lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
            return torch.zeros_like(query), lse, query.new_zeros(1, 1, 1, 1, dtype=torch.bool)
        near = (part[:, :, start:stop] for part in (keys, values))
        out, lse, kept = self._row(query[:, :, first - past : stop - past], *near, scale, softcap, work)
        edges = first - past, keys.shape[2] - stop
        pad = torch.nn.functional.pad
        return pad(out, (0, 0, *edges)), pad(lse, edges, value=-torch.inf), kept

    def _row(self, query, keys, values, scale, softcap, work) -> tuple:
        """`attend` for a row of real tokens."""
        with _products(work):
            kept = self.kept(query, keys, scale)
        out, lse = attend_blocks(query, keys, values, kept, self.block, scale, softcap)
        if self.delta is not None:
            out, lse = self._corrected(out, lse, query, keys, values, scale, softcap)
        if work is not None:
            (heads, length, size), end = query.shape[1:], keys.shape[2]
            seen = heads * (length * (end - length) + length * (length + 1) // 2)
            work.add("attention", 2 * size * self.pairs(kept, heads, length, end), 2 * size * seen)
        return out, lse, kept

    def sparse_blocks(self, length: int, end: int) -> range:
        """The query blocks that may leave out keys, of a call of the last `length` of `end` tokens.

        Not those that the call holds only a part of, that end by `dense_below`, or that hold one of the last rows.
        """
        begin = max(ceil((end - length) / self.block), self.dense_below // self.block)
        return range(begin, max((end - self.last_rows_dense) // self.block, begin))

    @torch.no_grad()
    def kept(self, query, keys, scale: float) -> torch.Tensor:
        """The blocks that are read, bool [batch, KV heads or heads, query blocks, key blocks]; all real tokens."""
        length, end = query.shape[2], keys.shape[2]
        past, size, device, rows = end - length, self.block, keys.device, self.sparse_blocks(length, end)
        first, columns = past // size, torch.arange(ceil(end / size), device=device)
        causal = columns <= torch.arange(first, len(columns), device=device)[:, None]
        if not rows:
            return causal.expand(len(keys), keys.shape[1], -1, -1)
        if METHODS[self.method].chunk_exact:  # these rows get the same without the others, which need none
            query, keys, first = query[:, :, rows.start * size - past : rows.stop * size - past], keys, rows.start
            keys = keys[:, :, : rows.stop * size]
        with torch.autocast(device.type, enabled=False):  # else what is kept would follow from rounded sums
            found = choose(self.method, query, keys, scale, size, self.settings)
        found = found[:, :, rows.start - first : rows.stop - first]
        many = found.sum(-1, keepdim=True) > DENSE * (torch.arange(rows.start, rows.stop, device=device)[:, None] + 1)
        kept = causal.repeat(*found.shape[:2], 1, 1)
        kept[:, :, rows.start - past // size : rows.stop - past // size, : found.shape[-1]] &= found | many
        return kept

    def pairs(self, kept, heads: int, length: int, end: int) -> int:
        """Pairs of a query and a key that are multiplied in a row, over all heads.

        Args:
            kept: [1, lists, query blocks, key blocks].
        """
        past, size = end - length, self.block
        numbers = torch.arange(past // size, ceil(end / size), device=kept.device)
        queries = (numbers * size + size).clamp_max(end) - (numbers * size).clamp_min(past)
        before = kept.tril(past // size - 1)[0].sum(-1)  # key blocks before the queries' own, [lists, query blocks]
        own = sum(place % size + 1 for place in range(past, end))
        pairs = heads * own + int((before * queries).sum()) * size * (heads // kept.shape[1])
        rows = self.sparse_blocks(length, end)
        exact = range(rows.start * size, rows.stop * size, self.delta) if self.delta is not None else ()
        return pairs + heads * sum(place + 1 for place in exact)

    def _corrected(self, out, lse, query, keys, values, scale, softcap) -> tuple:
        """Delta attention: every delta-th row is computed densely, and its rest is added to the rows up to the next.

        The log-sum-exp is corrected alike, so that terms that need it meet the dense one at these rows. A row never
        gets what a later one knows, and rows that read all keys anyway get 0.

        Source: Willette et al. 2025, "Delta Attention", arXiv 2505.11254. There a fixed tail is dense as well: that is
        `last_rows_dense`.
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
    """Count the multiply-adds of the matrix products inside as the estimator's."""
    if work is None:
        yield
        return
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield
    work.add("estimator", counter.get_total_flops() // 2, 0)


def _read(kept: tuple[torch.Tensor, ...], block: int, queries, keys) -> torch.Tensor:
    """The function that `Sparse.attend` gives; kept: of each row of the batch, its last row that of the last block."""
    found, heads = [], torch.arange(keys.shape[1], device=keys.device)[:, None, None]
    for row, lists in enumerate(kept):
        _, count, rows, columns = lists.shape
        mine = (queries[row] // block - (columns - rows)).clamp(0, rows - 1)  # [1, r, 1]
        its = (keys[row] // block).clamp(0, columns - 1)  # [heads, 1, m]
        found.append(lists[0][heads * count // len(heads), mine, its])
    return torch.stack(found)


def problem_of(entry, heads: int) -> str:
    """What is wrong with `sparse` of a layer's entry, a sentence; "" if nothing.

    Args:
        heads: query heads of the layer.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        return f"{entry!r} names no method"
    sparse = Sparse.of(entry)
    if problems := settings_problems(sparse.method, sparse.settings, sparse.block or 0, heads):
        return problems[0]
    for name in ("dense_below", "last_rows_dense"):
        if type(value := getattr(sparse, name)) is not int or value < 0:
            return f"{name} is {value!r}, and must be a whole number from 0"
    if (delta := sparse.delta) is not None and (type(delta) is not int or delta < 1 or sparse.block % delta):
        return f"delta is {delta!r}, and must divide the block of {sparse.block}"
    return ""


ROWS = 32  # rows far from one another that read their keys together, up to the last one's


def attend_blocks(query, keys, values, kept, block: int, scale: float, softcap=None) -> tuple:
    """Causal attention to the kept blocks.

    Args:
        query: [batch, heads, n, head_dim].
        keys, values: [batch, KV heads, N, head_dim], n <= N, all of real tokens.
        kept: bool [batch, KV heads or heads, query blocks, key blocks]; its rows are the query blocks from that of
            token N - n on. The block of the queries themselves is always attended to, later ones never.
        block: tokens in a block.
        scale: factor on q.k.
        softcap: cap on the scores, or None.

    Returns:
        [batch, heads, n, head_dim] and the natural log-sum-exp [batch, heads, n].
    """
    query, keys = query.to(values.dtype), keys.to(values.dtype)  # under autocast they differ
    first = (keys.shape[2] - query.shape[2]) // block
    own = torch.arange(first, first + kept.shape[2], device=kept.device)[:, None]
    kept = kept.scatter(3, own.expand(*kept.shape[:2], -1, 1), True)
    run = _written_out if softcap is not None or written_out(query, keys, values) else _gathered

    def by_pytorch() -> tuple:
        rows = [run(*row, block, scale, softcap) for row in zip(query, keys, values, kept, strict=True)]
        return tuple(part[0][None] if len(part) == 1 else torch.stack(part) for part in zip(*rows, strict=True))

    if query.device.type != "cuda" or _trains(query, keys, values) or (kernel := _kernel()) is None:
        return by_pytorch()
    lists = kernel.BlockList.of(kept, block)
    return kernel.block_sparse_prefill(query, keys, values, lists, scale, softcap=softcap, fallback=by_pytorch)


def attend_rows(query, keys, values, places: list[int], scale: float, softcap=None) -> tuple:
    """Causal attention of some rows, which may lie far from one another, to all keys.

    Args:
        query: [batch, heads, r, head_dim], of the tokens at `places`, which ascend.
        keys, values: [batch, KV heads, N, head_dim].

    Returns:
        [batch, heads, r, head_dim] and the log-sum-exp [batch, heads, r].
    """
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    (batch, heads, _, size), kv_heads, parts = query.shape, keys.shape[1], []
    plain = softcap is None and not written_out(query, keys, values)
    for begin in range(0, len(places), ROWS):
        near = places[begin : begin + ROWS]
        end, shape = near[-1] + 1, (batch, heads, len(near))
        rows = query[:, :, begin : begin + ROWS].reshape(batch, kv_heads, -1, size)
        seen = torch.arange(end) <= torch.tensor(near)[:, None]
        seen = seen.repeat(heads // kv_heads, 1)[None, None].to(query.device)
        far = rows, keys[:, :, :end], values[:, :, :end]
        out, lse = fused(*far, scale, True, seen=seen) if plain else explicit(*far, seen, scale, softcap, True)
        parts.append((out.reshape(*shape, size), lse.reshape(shape)))
    return tuple(torch.cat(part, dim=2) for part in zip(*parts, strict=True))


@lru_cache
def _kernel():
    """The module of the Triton kernel, or None where it cannot be had: PyTorch does the same."""
    try:
        return load_file("sparse.kernel")
    except (ValueError, ImportError):
        return None


def _trains(*tensors) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _gathered(query, keys, values, kept, block: int, scale: float, softcap) -> tuple:
    """`attend_blocks` of one row by the CPU's flash kernel."""
    (heads, length, size), lists = query.shape, len(kept)
    past, group = keys.shape[1] - length, heads // lists
    first, whole = past // block, keys.shape[1] // block
    lead = 0 if past else _causal_rows(kept)
    if lead > 1:
        end = min(lead * block, length)
        early = fused(*(part[None, :, :end] for part in (query, keys, values)), scale, True, causal=True)
        if end == length:
            return early[0][0], early[1][0]
        late = _gathered(query[:, end:], keys, values, kept[:, lead:], block, scale, softcap)
        return tuple(torch.cat([one[0], other], dim=1) for one, other in zip(early, late, strict=True))
    out, lse = _own_blocks(query, keys, values, block, scale)
    folded = [
        tuple(part[head, : whole * block].contiguous().unflatten(0, (whole, block)) for part in (keys, values))
        for head in range(len(keys))
    ]
    for number, row, ids in _lists(kept, first):
        begin = max((first + row) * block - past, 0)
        end = min((first + row + 1) * block - past, length)
        low, high = int(ids[0]), int(ids[-1]) + 1
        mine = slice(number * group, (number + 1) * group), slice(begin, end)
        near = [
            part[low:high] if high - low == len(ids) else part.index_select(0, ids)
            for part in folded[number * len(keys) // lists]
        ]
        rows = query[mine].reshape(1, 1, -1, size)
        more, more_lse = fused(rows, *(part.view(1, 1, -1, size) for part in near), scale, True)
        here, here_lse = out[mine], lse[mine]
        more, more_lse = more.view(here.shape), more_lse.view(here_lse.shape)
        here.lerp_(more, torch.sigmoid(more_lse - here_lse)[..., None].to(out.dtype))
        torch.logaddexp(here_lse, more_lse, out=here_lse)
    return out, lse


def _causal_rows(kept) -> int:
    """How many query blocks, from the first of a prompt on, keep all that lies before them in every list."""
    whole = (kept | ~torch.ones_like(kept[0]).tril()).all(-1).all(0)
    return int(whole.cumprod(0).sum())


def _lists(kept, first: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Number of the list's head, its row, and the key blocks before the row's own, where there are any."""
    _, rows, columns = kept.shape
    before = torch.arange(columns, device=kept.device) < first + torch.arange(rows, device=kept.device)[:, None]
    where = (kept & before).nonzero()
    heads, places = where[:, 0], where[:, 1]
    lists, counts = torch.unique_consecutive(heads * rows + places, return_counts=True)
    for number, ids in zip(lists.tolist(), where[:, 2].split(counts.tolist()), strict=True):
        yield number // rows, number % rows, ids


def _own_blocks(query, keys, values, block: int, scale: float) -> tuple:
    """Every query's attention to the keys of its own block: [heads, n, head_dim] and the log-sum-exp [heads, n]."""
    length, end = query.shape[1], keys.shape[1]
    past = end - length
    lead = min(-past % block, length)  # queries of a block that began before them
    middle = lead + (length - lead) // block * block
    parts = []
    if lead:
        begin, stop = past // block * block, past + lead
        seen = torch.arange(begin, stop) <= torch.arange(past, stop)[:, None]
        near = (part[None, :, begin:stop] for part in (keys, values))
        parts.append(fused(query[None, :, :lead], *near, scale, True, seen=seen[None, None]))
    if middle > lead:
        folded = [
            part[:, begin : begin + middle - lead].unflatten(1, (-1, block)).transpose(0, 1)
            for part, begin in ((query, lead), (keys, past + lead), (values, past + lead))
        ]
        out, lse = fused(*folded, scale, True, causal=True)
        parts.append((out.transpose(0, 1).flatten(1, 2)[None], lse.transpose(0, 1).flatten(1, 2)[None]))
    if middle < length:
        near = (part[None, :, -(length - middle) :] for part in (keys, values))
        parts.append(fused(query[None, :, middle:], *near, scale, True, causal=True))
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return out[0], lse[0]


def _written_out(query, keys, values, kept, block: int, scale: float, softcap) -> tuple:
    """`attend_blocks` of one row with the softmax written out, list by list."""
    (heads, length, size), lists, end = query.shape, len(kept), keys.shape[1]
    past, group, device = end - length, heads // lists, query.device
    first, tokens, found = past // block, torch.arange(end, device=device), []
    for number, head_lists in enumerate(kept):
        pieces = []
        for row, blocks in enumerate(head_lists):
            begin, stop = max((first + row) * block, past), min((first + row + 1) * block, end)
            near = tokens[:stop][blocks.repeat_interleave(block)[:stop]]
            mine = slice(number * group, (number + 1) * group), slice(begin - past, stop - past)
            seen = (near <= tokens[begin:stop, None]).repeat(group, 1)
            held = (part[number * len(keys) // lists, near] for part in (keys, values))
            out, lse = explicit(query[mine].reshape(-1, size), *held, seen, scale, softcap, True)
            pieces.append((out.reshape(group, -1, size), lse.reshape(group, -1)))
        found.append([torch.cat(part, dim=1) for part in zip(*pieces, strict=True)])
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


class SparsePrefill(Part):
    """Which blocks of keys the full heads read of a prompt; an entry has `sparse`, as this file's beginning says."""

    keys = ("sparse",)
    by_slots = True

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        problem = problem_of(layer["sparse"], sum(groups))
        return f"has sparse prefill that cannot be: {problem}" if problem else ""

    def methods(self, layer: dict) -> set[str]:
        sparse = layer["sparse"]
        named = {f"sparse.{each['method']}" for each in (sparse, *sparse.get("patterns", ()))}
        return {"sparse.kernel", *named} & set(FILES)

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        module.surgery_sparse = None
        if "sparse" not in layer:
            return
        kinds: HeadKinds = module.surgery_heads  # the numbers are made on the CPU: a model is loaded under "meta"
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
        return "sparse prefill", layer["sparse"]["method"]

    def told_apart(self, layer: dict):
        return layer["sparse"]

    def probe_length(self, layer: dict, least: int) -> int:
        sparse = Sparse.of(layer["sparse"])
        return max(least, sparse.dense_below + PROBED * sparse.block)


PART = SparsePrefill()
