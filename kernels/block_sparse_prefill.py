"""Causal attention of a prompt to listed blocks of keys (block-sparse prefill).

Positions in a row count from its first real token. Key block J holds the keys at positions J * block to
J * block + block - 1, and query block I holds the queries at positions I * block to I * block + block - 1. The n
queries are the last n of the N slots, so the first and the last query block may be partial. With one list per KV head,
a program takes the rows of all query heads of the group together, so that a key block is read once for all of them.
K and V are never repeated.

The softmax over tiles is the online softmax of FlashAttention (Dao et al., 2022), in our own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from .surgery_triton import (  # isort: skip
    add_tile, capped, check, factors, jit, load_tile, masked_softmax, on_device, outputs, padded_size,
    precision, put, said_once, started, store_rows, target, tiles, tl, unsupported, upcast,
)  # fmt: skip

NAME = "block_sparse_prefill"


@dataclass
class BlockList:
    """The kept key blocks of every query block, as concatenated lists.

    Attributes:
        offsets: int64 [batch * heads * rows + 1], where the list of (batch, head, query block) starts in `ids`.
        ids: int32, numbers of key blocks in any order, each at most once in a list. The keys of a block after the
            query's own block are masked: such a block only costs time.
        heads: number of KV heads or of query heads of the model.
        rows: number of query blocks; list row 0 is the block of the row's first real query.
        block: number of keys, and of queries, in a block.
    """

    offsets: torch.Tensor
    ids: torch.Tensor
    heads: int
    rows: int
    block: int

    @classmethod
    def of(cls, kept: torch.Tensor, block: int) -> BlockList:
        """Make the lists from a mask of kept blocks, bool [batch, KV heads or heads, query blocks, key blocks]."""
        if kept.dim() != 4 or kept.dtype != torch.bool:
            raise ValueError("kept is a bool tensor [batch, heads, query blocks, key blocks]")
        offsets = kept.new_zeros(kept.shape[:3].numel() + 1, dtype=torch.int64)
        torch.cumsum(kept.sum(-1, dtype=torch.int64).flatten(), 0, out=offsets[1:])
        ids = torch.arange(kept.shape[3], dtype=torch.int32, device=kept.device).expand(kept.shape)[kept]
        return cls(offsets, ids, kept.shape[1], kept.shape[2], block)

    def kept(self, key_blocks: int) -> torch.Tensor:
        """The mask of kept blocks, bool [batch, heads, query blocks, key blocks]."""
        lists = len(self.offsets) - 1
        kept = torch.zeros(lists, key_blocks, dtype=torch.bool, device=self.ids.device)
        row = torch.repeat_interleave(torch.arange(lists, device=self.ids.device), self.offsets.diff())
        kept[row, self.ids.long()] = True
        return kept.view(-1, self.heads, self.rows, key_blocks)


def supports(query, block: int) -> str | None:
    """Why the kernel does not support these queries and this block; None if it does."""
    if block % 16:
        return f"a block of {block} is no multiple of 16"
    return unsupported(query.device, query.dtype, query.shape[3])


def block_sparse_prefill(
    query, key, value, blocks: BlockList, scale=None, *, pad=None, softcap=None, out=None, lse=None, fallback=None
):
    """Causal attention of every query to the keys of the blocks that its query block keeps.

    Args:
        query: [batch, heads, n, head_dim], of the last n of the N tokens; any strides.
        key, value: [batch, KV heads, N, head_dim], in the query's dtype; any strides.
        blocks: lists per KV head (one for the whole group) or per query head.
        scale: factor on q.k, head_dim ** -0.5 by default.
        pad: [batch], number of slots before each row's first real token; keys there are never read. None: no padding.
        softcap: scores become softcap * tanh(score / softcap).
        out, lse: tensors for the results, with any strides; None: new tensors.
        fallback: computes what is returned if the kernel cannot run; default: the reference, into out and lse.

    Returns:
        The output, with the shape of the query, and the natural log-sum-exp of the scores, float32 [batch, heads, n].
        For a query that sees no key they are 0 and -inf.

    Raises:
        ValueError: shapes do not fit, or a tensor requires a gradient: there is no backward pass.
    """
    pad = check(NAME, query, key, value, pad)
    (batch, heads, n, size), (kv_heads, length) = query.shape, key.shape[1:3]
    if n > length:
        raise ValueError(f"{NAME}: {n} queries for {length} keys: the queries are the last of the tokens")
    if blocks.heads not in (heads, kv_heads) or len(blocks.offsets) != batch * blocks.heads * blocks.rows + 1:
        raise ValueError(f"{NAME}: the lists are of {blocks.heads} heads, there are {kv_heads} KV heads and {heads}")
    scale = size**-0.5 if scale is None else scale

    made = partial(reference, query, key, value, blocks, scale, pad=pad, softcap=softcap)
    fallback = fallback or partial(put, made, out, lse)
    if said_once(NAME, supports(query, blocks.block), query.device):
        return fallback()
    out, lse = outputs(query, out, lse)
    if out.numel() == 0:
        return out, lse
    name, block = target(query.device), blocks.block
    group = heads // kv_heads
    pack = group if blocks.heads == kv_heads else 1
    rows, keys, warps, stages = tiles(size, query.dtype, name)
    rows, keys = min(rows, padded_size(block * pack)), min(keys, block & -block)  # a tile's keys divide the block
    parts, shift = -(-block * pack // rows), -(-length // block)
    spanned = (length - 1) // block - (length - n) // block if pad is None else (n - 1) // block + 1
    factor, cap = factors(scale, softcap)

    def launch():
        with on_device(query):
            _attend[((spanned + 1) * parts, blocks.heads, batch)](
                query, key, value, out, lse, blocks.offsets, blocks.ids, pad,
                *query.stride(), *key.stride(), *value.stride(), *out.stride(), *lse.stride(),
                n, length, blocks.heads, blocks.rows, parts, shift, factor, cap,
                GROUP=group, PACK=pack, D=size, BLOCK=block, BM=rows, BN=keys, BD=padded_size(size),
                CAPPED=softcap is not None, PADDED=pad is not None, UPCAST=upcast(query.dtype),
                PRECISION=precision(query.dtype, name), num_warps=warps, num_stages=stages,
            )  # fmt: skip

    kind = f"{query.dtype} {size} {block} {pack} {softcap is not None} {pad is not None}"
    return (out, lse) if started(NAME, query.device, launch, kind) else fallback()


@jit
def _attend(
    Q, K, V, OUT, LSE, OFFSETS, IDS, PAD,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, l_b, l_h, l_n,
    n, length, lists, list_rows, parts, shift, factor, cap,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, CAPPED: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    at = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries have the longest lists: they start first
    which, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pad = 0
    if PADDED:
        pad = tl.load(PAD + batch).to(tl.int32)
    start = length - n - pad  # position of the first query; negative in padding
    first = (start + shift * BLOCK) // BLOCK - shift  # its block: rounded down below zero too
    block = first + at // parts
    packed = (at % parts) * BM + tl.arange(0, BM)
    token = packed // PACK
    position = block * BLOCK + token
    row = position - start
    head = (which * PACK + packed % PACK).to(tl.int64)
    kv_head = (which // (GROUP // PACK)).to(tl.int64)
    live = (token < BLOCK) & (row >= 0) & (row < n)

    dim, near = tl.arange(0, BD), tl.arange(0, BN)
    real = dim < D
    q_at = Q + batch * q_b + head[:, None] * q_h + row.to(tl.int64)[:, None] * q_n + dim[None, :] * q_d
    WHOLE: tl.constexpr = D == BD
    q = load_tile(q_at, live[:, None], real[None, :], WHOLE, UPCAST)
    k_base = K + batch * k_b + kv_head * k_h
    v_base = V + batch * v_b + kv_head * v_h
    k_offset = dim[:, None] * k_d + near[None, :] * k_n
    v_offset = near[:, None] * v_n + dim[None, :] * v_d

    listed = block - tl.maximum(first, 0)
    its, has = OFFSETS + (batch * lists + which) * list_rows + listed, (listed >= 0) & (listed < list_rows)
    begin = tl.load(its, mask=has, other=0)
    count = (tl.load(its + 1, mask=has, other=0) - begin).to(tl.int32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    SPLIT: tl.constexpr = BLOCK // BN
    for i in range(0, count * SPLIT):
        low = tl.load(IDS + begin + i // SPLIT) * BLOCK + (i % SPLIT) * BN
        slot = low + pad
        inside = near < length - slot
        k_at, v_at = k_base + slot.to(tl.int64) * k_n, v_base + slot.to(tl.int64) * v_n
        seen = (low + near)[None, :] <= position[:, None]
        top, total, acc = add_tile(
            q, k_at + k_offset, v_at + v_offset, inside, real, seen, factor, cap, top, total, acc,
            WHOLE, UPCAST, CAPPED, PRECISION,
        )  # fmt: skip

    o_at = OUT + batch * o_b + head[:, None] * o_h + row.to(tl.int64)[:, None] * o_n + dim[None, :] * o_d
    l_at = LSE + batch * l_b + head * l_h + row.to(tl.int64) * l_n
    store_rows(o_at, l_at, live, real, top, total, acc)


def variants(head_dim: int, dtype: torch.dtype, name: str, group: int) -> dict:
    """The launches for a target, for ahead-of-time compilation: {label: (kernel, types, constants, options)}.

    `group`: query heads of a KV head.
    """
    if (tile := tiles(head_dim, dtype, name)) is None:
        return {}
    rows, keys, warps, stages = tile
    types = dict.fromkeys(("Q", "K", "V", "OUT"), dtype) | {"LSE": "*fp32", "OFFSETS": "*i64", "IDS": "*i32"}
    fixed = {"D": head_dim, "BLOCK": 128, "BM": rows, "BN": keys, "BD": padded_size(head_dim), "UPCAST": False}
    fixed["PRECISION"] = precision(dtype, name)
    plain = {"GROUP": group, "PACK": group, "CAPPED": False, "PADDED": False, "PAD": None}
    full = {"GROUP": group, "PACK": group, "CAPPED": True, "PADDED": True}
    small = {"BLOCK": 64, "BM": min(rows, 64), "BN": min(keys, 64)}
    options = {"num_warps": warps, "num_stages": stages}
    return {
        "plain": (_attend, types, fixed | plain, options),
        "a list per head": (_attend, types, fixed | plain | {"PACK": 1}, options),
        "a list per head, blocks of 64": (_attend, types, fixed | plain | {"PACK": 1} | small, options),
        "pad, soft-cap": (_attend, types | {"PAD": "*i64"}, fixed | full, options),
        "pad, soft-cap, a list per head": (
            _attend,
            types | {"PAD": "*i64"},
            fixed | full | {"PACK": 1},
            options,
        ),
    }


def reference(query, key, value, blocks: BlockList, scale, *, pad=None, softcap=None):
    """The same in plain PyTorch, query block by query block. float64 stays float64, and gradients are supported.

    Returns:
        As `block_sparse_prefill`; the log-sum-exp is float64 if the query is.
    """
    (batch, heads, n, size), (kv_heads, length), block = query.shape, key.shape[1:3], blocks.block
    wide = torch.promote_types(query.dtype, torch.float32)
    kept = blocks.kept(-(-length // block))
    kept = kept.repeat_interleave(heads // blocks.heads, dim=1)  # one list per query head
    outs, lses = [], []
    for row in range(batch):
        skipped = 0 if pad is None else int(pad[row])
        hidden = min(max(skipped - (length - n), 0), n)  # queries that are padding
        first = max(length - n - skipped, 0)  # position of the first real query
        keys, values = (part[row, :, skipped:].to(wide) for part in (key, value))
        keys, values = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (keys, values))
        made = [query.new_zeros(heads, hidden, size)]
        found = [query.new_full((heads, hidden), -torch.inf, dtype=wide)]
        places = torch.arange(first, first + n - hidden, device=query.device)
        for at, place in enumerate(places.split(_pieces(first, n - hidden, block))):
            rows = query[row, :, place - first + hidden].to(wide)
            scores = capped(rows @ keys.mT * scale, softcap)
            position = torch.arange(keys.shape[1], device=query.device)
            seen = position <= place[:, None]
            if at < blocks.rows:
                seen = seen & kept[row, :, at].repeat_interleave(block, dim=-1)[:, None, : len(position)]
            else:
                seen = torch.zeros_like(seen)
            p, lse = masked_softmax(scores, seen)
            made.append((p @ values).to(query.dtype))
            found.append(lse)
        outs.append(torch.cat(made, dim=1))
        lses.append(torch.cat(found, dim=1))
    return torch.stack(outs), torch.stack(lses)


def _pieces(first: int, count: int, block: int) -> list[int]:
    """The number of positions in each block, among `count` consecutive positions from `first` on."""
    edges = [first, *range((first // block + 1) * block, first + count, block), first + count]
    return [high - low for low, high in pairwise(edges) if high > low]
