"""One decoding step of a layer whose heads keep different keys: full heads and ring heads in one launch.

A full head reads all N keys. A head with sinks + window reads its sinks and its ring, in the layout of
`surgery_stores.RingStore`: the sinks by position, then the token of slot s at index sinks + s % window. The keys of a
head are cut into pieces that run in parallel, and a second kernel merges the results by their log-sum-exps (split-K,
as in FlashDecoding). A small table says for each KV head where its keys are. Groups may have different sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .surgery_triton import (  # isort: skip
    add_tile, capped, check, factors, jit, load_tile, masked_softmax, on_device, outputs, padded_size,
    precision, said_once, started, store_rows, target, tiles, tl, unsupported, upcast,
)  # fmt: skip

NAME = "split_decode"
# Keys of a tile, warps, stages, as in `surgery_triton.TILES`; the rows of a tile are the query heads of one KV head.
TILES = {
    ("cuda", "half", 64): (32, 4, 3),
    ("cuda", "half", 128): (64, 4, 2),
    ("cuda", "half", 256): (32, 4, 2),
    ("cuda", "float32", 64): (32, 4, 2),
    ("cuda", "float32", 128): (16, 4, 2),
    ("hip", "half", 64): (64, 4, 2),
    ("hip", "half", 128): (32, 4, 2),
    ("hip", "half", 256): (32, 4, 1),
    ("hip", "float32", 64): (32, 4, 1),
    ("hip", "float32", 128): (32, 4, 1),
    ("hip", "float32", 256): (16, 4, 1),
}
WIDEST = 32  # query heads of a KV head: 64 rows spill registers on sm_80
SHORTEST = 256  # least number of keys in a piece: a shorter piece is not worth its merge


@dataclass
class Ring:
    """Keys and values of the heads that see sinks + window, including the newest token.

    Attributes:
        keys, values: [batch, ring KV heads, sinks + window, head_dim].
        seen: number of slots so far, including the newest token and padding.
        sinks: number of sinks, which are stored first, by position.
        limit: no key farther away is seen, not even a sink; None: no limit.
    """

    keys: torch.Tensor
    values: torch.Tensor
    seen: int
    sinks: int
    limit: int | None = None

    @property
    def window(self) -> int:
        return self.keys.shape[2] - self.sinks


class HeadTable:
    """Where the keys of some KV heads of a layer are, and which query heads read them.

    Args:
        groups: number of query heads of each KV head of the layer.
        full: the KV heads whose keys are all stored, in the order in which they are stored.
        ring: the KV heads that see sinks + window, in the order of `Ring.keys`.

    Attributes:
        rows: int32 [KV heads, 4] of (0 full or 1 ring, index there, first query head, group), in no order.
        counts: number of full and of ring KV heads.
        widest: the largest group.
    """

    def __init__(self, groups: list[int], full: list[int], ring: list[int], device=None):
        rows = [
            (kind, place, sum(groups[:head]), groups[head])
            for kind, heads in enumerate((full, ring))
            for place, head in enumerate(heads)
        ]
        self.rows = torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 4)
        self.counts, self.widest = (len(full), len(ring)), max((row[3] for row in rows), default=1)


def supports(query, group: int = 1) -> str | None:
    """Why the kernel does not support these queries, up to `group` of them for a KV head; None if it does."""
    if group > WIDEST:
        return f"{group} query heads read one KV head, which needs more registers than there are (most: {WIDEST})"
    return unsupported(query.device, query.dtype, query.shape[3])


def split_decode(
    query, full, ring: Ring | None, table: HeadTable, scale=None, *, pad=None, softcap=None, piece=None,
    out=None, lse=None, fallback=None,
):  # fmt: skip
    """Attention of the newest token to the keys that each head keeps.

    Args:
        query: [batch, heads, 1, head_dim]; any strides.
        full: keys and values [batch, full KV heads, N, head_dim], the newest token last; None without full heads.
        ring: see `Ring`; None without ring heads.
        table: where the heads' keys are. Query heads that it does not name are neither read nor written.
        scale: factor on q.k, head_dim ** -0.5 by default.
        pad: [batch], number of slots before each row's first real token; full heads never read them. None: no padding.
        softcap: scores become softcap * tanh(score / softcap).
        piece: number of keys that one program reads; by default, there are enough pieces to keep the GPU busy.
        out, lse: tensors for the results, with any strides; None: new tensors.
        fallback: computes what is returned if the kernel cannot run; default: the reference, into out and lse.

    Returns:
        The output, with the shape of the query, and the natural log-sum-exp of the scores, float32 [batch, heads, 1].
        They are 0 and -inf in a row that has no real token yet.

    Raises:
        ValueError: shapes do not fit, or a tensor requires a gradient: there is no backward pass.
    """
    batch, heads, n, size = query.shape
    kept = [pair for pair in (full, ring and (ring.keys, ring.values)) if pair is not None]
    for keys, values in kept:
        pad = check(NAME, query[:, : keys.shape[1]], keys, values, pad)
    counts = (0 if full is None else full[0].shape[1], 0 if ring is None else ring.keys.shape[1])
    if n != 1 or not kept or table.counts != counts:
        raise ValueError(f"{NAME}: {n} queries, {counts[0]} full and {counts[1]} ring KV heads do not fit the table")
    if ring is not None and (ring.window < 1 or ring.seen < 1):
        raise ValueError(f"{NAME}: a ring has a window and the newest token in it")
    scale = size**-0.5 if scale is None else scale
    made = partial(reference, query, full, ring, table, scale, pad=pad, softcap=softcap)
    fallback = fallback or partial(_written, made, table, out, lse)
    if said_once(NAME, supports(query, table.widest), query.device):
        return fallback()
    out, lse = outputs(query, out, lse)
    if out.numel() == 0:
        return out, lse
    name = target(query.device)
    keys, warps, stages = _tile(size, query.dtype, name)
    longest = max(0 if full is None else full[0].shape[2], 0 if ring is None else ring.keys.shape[2])
    rows = table.rows
    piece = -(-(piece or _piece(query, longest, len(rows))) // keys) * keys
    pieces = -(-longest // piece)
    if pieces == 1:
        parts, part_lse, steps = out[:, :, 0], lse[:, :, 0], (0, 0)
    else:
        parts = torch.empty(pieces, batch, heads, size, dtype=torch.float32, device=query.device)
        part_lse = torch.empty(pieces, batch, heads, dtype=torch.float32, device=query.device)
        steps = (parts.stride(0), part_lse.stride(0))
    full_keys, full_values = full or kept[-1]  # placeholders if there are no full heads
    ring_keys, ring_values = (ring.keys, ring.values) if ring else kept[0]
    factor, cap = factors(scale, softcap)
    shared = {"D": size, "BD": padded_size(size)}

    def launch():
        with on_device(query):
            _attend[(len(rows), pieces, batch)](
                query, full_keys, full_values, ring_keys, ring_values, parts, part_lse, rows, pad,
                *query[:, :, 0].stride(), *full_keys.stride(), *full_values.stride(), *ring_keys.stride(),
                *ring_values.stride(), steps[0], *parts.stride()[-3:], steps[1], *part_lse.stride()[-2:],
                full_keys.shape[2] if full else ring.seen, ring.sinks if ring else 0, ring.window if ring else 1,
                ring.seen if ring else 0, (ring.limit if ring else None) or 2**30, piece, factor, cap, **shared,
                BM=padded_size(table.widest), BN=keys, CAPPED=softcap is not None,
                PADDED=pad is not None, UPCAST=upcast(query.dtype), PRECISION=precision(query.dtype, name),
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            if pieces > 1:
                _merge[(len(rows), table.widest, batch)](
                    parts, part_lse, out, lse, rows, *steps, *parts.stride()[1:3], *part_lse.stride()[1:],
                    *out[:, :, 0].stride(), *lse[:, :, 0].stride(), pieces, **shared, num_warps=1,
                )  # fmt: skip

    kind = f"{query.dtype} {size} {padded_size(table.widest)} {softcap is not None} {pad is not None}"
    return (out, lse) if started(NAME, query.device, launch, kind) else fallback()


def _written(made, table: HeadTable, out, lse):
    """Compute, and copy the results of a table's query heads into the tensors that were given, if any were."""
    heads = [head for _, _, first, group in table.rows.tolist() for head in range(first, first + group)]
    found = []
    for new, old in zip(made(), (out, lse), strict=True):
        if old is not None:
            old[:, heads] = new[:, heads].to(old.dtype)
        found.append(new if old is None else old)
    return tuple(found)


def _tile(head_dim: int, dtype: torch.dtype, name: str) -> tuple[int, int, int] | None:
    return tiles(head_dim, dtype, name, TILES, (16, 1, 1))


def _piece(query, longest: int, kv_heads: int) -> int:
    """Number of keys in a piece, at least `SHORTEST`: every multiprocessor of the GPU should have two programs."""
    busy = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    return max(SHORTEST, -(-longest // max(1, busy // (query.shape[0] * kv_heads))))


@jit
def _attend(
    Q, FULL_K, FULL_V, RING_K, RING_V, OUT, LSE, TABLE, PAD,
    q_b, q_h, q_d, fk_b, fk_h, fk_n, fk_d, fv_b, fv_h, fv_n, fv_d, rk_b, rk_h, rk_n, rk_d, rv_b, rv_h, rv_n, rv_d,
    o_s, o_b, o_h, o_d, l_s, l_b, l_h,
    length, sinks, window, seen_slots, limit, piece, factor, cap,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr,
    PADDED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pad = 0
    if PADDED:
        pad = tl.load(PAD + batch).to(tl.int32)
    kind, place = tl.load(TABLE + kv_head * 4), tl.load(TABLE + kv_head * 4 + 1).to(tl.int64)
    first, group = tl.load(TABLE + kv_head * 4 + 2), tl.load(TABLE + kv_head * 4 + 3)
    lane, dim = tl.arange(0, BM), tl.arange(0, BD)
    live, real = lane < group, dim < D
    head = (first + lane).to(tl.int64)
    WHOLE: tl.constexpr = D == BD
    q_at = Q + batch * q_b + head[:, None] * q_h + dim[None, :] * q_d
    q = load_tile(q_at, live[:, None], real[None, :], WHOLE, UPCAST)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    low = split * piece
    if kind == 0:
        k_base, v_base = FULL_K + batch * fk_b + place * fk_h, FULL_V + batch * fv_b + place * fv_h
        for start in range(low, tl.minimum(low + piece, length), BN):
            slot = start + tl.arange(0, BN)
            seen = (slot < length) & (slot >= pad)
            far = slot.to(tl.int64)
            k_at = k_base + far[None, :] * fk_n + dim[:, None] * fk_d
            v_at = v_base + far[:, None] * fv_n + dim[None, :] * fv_d
            top, total, acc = add_tile(
                q, k_at, v_at, seen, real, seen[None, :], factor, cap, top, total, acc,
                WHOLE, UPCAST, CAPPED, PRECISION,
            )  # fmt: skip
    else:
        k_base, v_base = RING_K + batch * rk_b + place * rk_h, RING_V + batch * rv_b + place * rv_h
        newest = seen_slots - 1
        for start in range(low, tl.minimum(low + piece, sinks + window), BN):
            index = start + tl.arange(0, BN)
            behind = (newest % window - (index - sinks) + window) % window  # slots since this index was written
            position = tl.where(index < sinks, index, newest - behind - pad)
            in_ring = (index < sinks + window) & (newest - behind >= 0) & (position >= sinks)  # no sink counts twice
            seen = tl.where(index < sinks, position <= newest - pad, in_ring) & (newest - pad - position < limit)
            k_at = k_base + index[None, :] * rk_n + dim[:, None] * rk_d
            v_at = v_base + index[:, None] * rv_n + dim[None, :] * rv_d
            top, total, acc = add_tile(
                q, k_at, v_at, seen, real, seen[None, :], factor, cap, top, total, acc,
                WHOLE, UPCAST, CAPPED, PRECISION,
            )  # fmt: skip

    o_at = OUT + split * o_s + batch * o_b + head[:, None] * o_h + dim[None, :] * o_d
    l_at = LSE + split * l_s + batch * l_b + head * l_h
    store_rows(o_at, l_at, live, real, top, total, acc)


@jit
def _merge(
    PARTS, PART_LSE, OUT, LSE, TABLE, p_s, m_s, p_b, p_h, m_b, m_h, o_b, o_h, o_d, l_b, l_h, pieces,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """o = sum of o_s e^(l_s - l), where l is the log-sum-exp of all pieces. A piece that saw no key has l_s = -inf."""
    lane, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, group = tl.load(TABLE + tl.program_id(0) * 4 + 2), tl.load(TABLE + tl.program_id(0) * 4 + 3)
    if lane >= group:
        return
    head, dim = (first + lane).to(tl.int64), tl.arange(0, BD)
    top, total, acc = float("-inf"), 0.0, tl.zeros([BD], tl.float32)
    for split in range(0, pieces):
        lse = tl.load(PART_LSE + split * m_s + batch * m_b + head * m_h)
        part = tl.load(PARTS + split * p_s + batch * p_b + head * p_h + dim, mask=dim < D, other=0.0)
        new = tl.maximum(top, lse)
        safe = tl.where(new == float("-inf"), 0.0, new)
        decay, weight = tl.exp(top - safe), tl.exp(lse - safe)
        acc = acc * decay + part * weight
        total = total * decay + weight
        top = new
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    tl.store(OUT + batch * o_b + head * o_h + dim * o_d, (acc / total).to(OUT.dtype.element_ty), mask=dim < D)
    tl.store(LSE + batch * l_b + head * l_h, tl.where(some, top + tl.log(total), float("-inf")))


def variants(head_dim: int, dtype: torch.dtype, name: str, group: int) -> dict:
    """The launches for a target, for ahead-of-time compilation: {label: (kernel, types, constants, options)}.

    `group`: query heads of a KV head.
    """
    if (tile := _tile(head_dim, dtype, name)) is None:
        return {}
    keys, warps, stages = tile
    types = dict.fromkeys(("Q", "FULL_K", "FULL_V", "RING_K", "RING_V"), dtype) | {"LSE": "*fp32", "TABLE": "*i32"}
    types |= {"OUT": "*fp32", "PAD": "*i64"}
    shared = {"D": head_dim, "BD": padded_size(head_dim)}
    fixed = shared | {
        "BM": padded_size(group),
        "BN": keys,
        "PADDED": True,
        "UPCAST": False,
        "PRECISION": precision(dtype, name),
    }
    options = {"num_warps": warps, "num_stages": stages}
    return {
        "plain": (_attend, types | {"OUT": dtype}, fixed | {"CAPPED": False, "PADDED": False, "PAD": None}, options),
        "pad": (_attend, types, fixed | {"CAPPED": False}, options),
        "groups of 32": (_attend, types, fixed | {"CAPPED": False, "BM": WIDEST}, options),
        "soft-cap": (_attend, types, fixed | {"CAPPED": True}, options),
        "merge": (
            _merge,
            {"PARTS": "*fp32", "PART_LSE": "*fp32", "LSE": "*fp32", "TABLE": "*i32", "OUT": dtype},
            shared,
            {"num_warps": 1},
        ),
    }


def reference(query, full, ring: Ring | None, table, scale, *, pad=None, softcap=None):
    """The same in plain PyTorch, head by head. float64 stays float64, and gradients are supported.

    Returns:
        As `split_decode`, with 0 and -inf for the query heads that the table does not name. The log-sum-exp is float64
        if the query is.
    """
    wide, device = torch.promote_types(query.dtype, torch.float32), query.device
    pad = torch.zeros(query.shape[0], dtype=torch.int64, device=device) if pad is None else pad
    out, found = query.new_zeros(query.shape, dtype=wide), query.new_full(query.shape[:3], -torch.inf, dtype=wide)
    for kind, place, first, group in table.rows.tolist():
        if kind == 0:
            keys, values = full
            position = torch.arange(keys.shape[2], device=device) - pad[:, None]
            seen = position >= 0
        else:
            keys, values, newest = ring.keys, ring.values, ring.seen - 1
            index = torch.arange(ring.window, device=device)
            slot = newest - (newest - index) % ring.window
            near = slot - pad[:, None]
            sinks = torch.arange(ring.sinks, device=device).expand(len(pad), -1)
            position = torch.cat([sinks, near], dim=1)
            seen = torch.cat([sinks <= newest - pad[:, None], (slot >= 0) & (near >= ring.sinks)], dim=1)
            if ring.limit is not None:
                seen = seen & (newest - pad[:, None] - position < ring.limit)
        rows, hidden = query[:, first : first + group, 0].to(wide), ~seen[:, :, None]
        keys, values = (part[:, place].to(wide).masked_fill(hidden, 0.0) for part in (keys, values))
        scores = capped(torch.einsum("bgd,bjd->bgj", rows, keys) * scale, softcap)
        p, lse = masked_softmax(scores, seen[:, None])
        out[:, first : first + group, 0] = torch.einsum("bgj,bjd->bgd", p, values)
        found[:, first : first + group, 0] = lse
    return out.to(query.dtype), found
