"""Causal attention of only those query rows that a gate turns on (mixture of attention heads).

For each token, some query heads are on (Jin et al., MoH, 2024). For each KV head, the rows of its query heads that are
on are listed in the order of their tokens. A program takes a tile of that list and reads the keys up to the position
of its last row. Rows that are off cost nothing, and their output is 0.
"""

from __future__ import annotations

from functools import partial

import torch

from .surgery_triton import (  # isort: skip
    add_tile, capped, check, factors, jit, load_tile, of_prefill, on_device, outputs, padded_size, precision,
    put, said_once, started, store_rows, target, tiles, tl, unsupported, upcast,
)  # fmt: skip

NAME = "gathered_heads"


def supports(query) -> str | None:
    """Why the kernel does not support these queries; None if it does."""
    return unsupported(query.device, query.dtype, query.shape[3])


def gathered_heads(query, key, value, on, scale=None, *, pad=None, softcap=None, out=None, lse=None, fallback=None):
    """Causal attention of some rows of the queries to all keys.

    Args:
        query: [batch, heads, n, head_dim], of the last n of the N tokens; any strides.
        key, value: [batch, KV heads, N, head_dim], in the query's dtype; any strides.
        on: bool [batch, n, heads], whether a head is computed for a token.
        scale: factor on q.k, head_dim ** -0.5 by default.
        pad: [batch], number of slots before each row's first real token; keys there are never read. None: no padding.
        softcap: scores become softcap * tanh(score / softcap).
        out, lse: tensors for the results, with any strides; None: new tensors.
        fallback: computes what is returned if the kernel cannot run; default: the reference, into out and lse.

    Returns:
        The output, with the shape of the query and not yet multiplied by the gate, and the natural log-sum-exp of the
        scores, float32 [batch, heads, n]. They are 0 and -inf where a head is off, and in padding.

    Raises:
        ValueError: shapes do not fit, or a tensor requires a gradient, which only `reference` supports.
    """
    pad = check(NAME, query, key, value, pad)
    (batch, heads, n, size), (kv_heads, length) = query.shape, key.shape[1:3]
    if on.shape != (batch, n, heads) or on.dtype != torch.bool or n > length:
        raise ValueError(f"{NAME}: on is bool [batch, n, heads] = {[batch, n, heads]}, of the last n of the tokens")
    scale = size**-0.5 if scale is None else scale
    made = partial(reference, query, key, value, on, scale, pad=pad, softcap=softcap)
    fallback = fallback or partial(put, made, out, lse)
    if said_once(NAME, supports(query), query.device):
        return fallback()
    out, lse = outputs(query, out, lse)
    out.zero_()
    lse.fill_(-torch.inf)
    if out.numel() == 0:
        return out, lse
    name, group = target(query.device), heads // kv_heads
    tile_rows, keys, warps, stages = tiles(size, query.dtype, name)
    by_head = on.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(batch, kv_heads, n * group)
    # A stable sort puts the rows that are on first, in the order of their tokens. So the host need not wait for the
    # GPU to count them: programs past the end of the list return at once.
    listed = by_head.int().argsort(dim=-1, descending=True, stable=True).int().contiguous()
    counts, (factor, cap) = by_head.sum(-1, dtype=torch.int32), factors(scale, softcap)

    def launch():
        with on_device(query):
            _attend[(-(-n * group // tile_rows), kv_heads, batch)](
                query, key, value, out, lse, listed, counts, pad,
                *query.stride(), *key.stride(), *value.stride(), *out.stride(), *lse.stride(), n, length, factor, cap,
                GROUP=group, D=size, BM=tile_rows, BN=keys, BD=padded_size(size), CAPPED=softcap is not None,
                PADDED=pad is not None, UPCAST=upcast(query.dtype), PRECISION=precision(query.dtype, name),
                num_warps=warps, num_stages=stages,
            )  # fmt: skip

    kind = f"{query.dtype} {size} {group} {softcap is not None} {pad is not None}"
    return (out, lse) if started(NAME, query.device, launch, kind) else fallback()


@jit
def _attend(
    Q, K, V, OUT, LSE, LISTED, COUNTS, PAD,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, l_b, l_h, l_n,
    n, length, factor, cap,
    GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr,
    PADDED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    at = tl.num_programs(0) - 1 - tl.program_id(0)  # late rows have the most keys: they start first
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    which = batch * tl.num_programs(1) + kv_head
    count = tl.load(COUNTS + which)
    if at * BM >= count:
        return
    pad = 0
    if PADDED:
        pad = tl.load(PAD + batch).to(tl.int32)
    place = at * BM + tl.arange(0, BM)
    live = place < count
    packed = tl.load(LISTED + which * n * GROUP + place, mask=live, other=0)
    row = packed // GROUP
    position = length - n - pad + row  # negative in padding
    head = (kv_head * GROUP + packed % GROUP).to(tl.int64)

    WHOLE: tl.constexpr = D == BD
    dim, near = tl.arange(0, BD), tl.arange(0, BN)
    real = dim < D
    q_at = Q + batch * q_b + head[:, None] * q_h + row.to(tl.int64)[:, None] * q_n + dim[None, :] * q_d
    q = load_tile(q_at, live[:, None], real[None, :], WHOLE, UPCAST)
    k_base = K + batch * k_b + kv_head.to(tl.int64) * k_h
    v_base = V + batch * v_b + kv_head.to(tl.int64) * v_h
    k_offset = dim[:, None] * k_d + near[None, :] * k_n
    v_offset = near[:, None] * v_n + dim[None, :] * v_d
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for first in range(0, tl.max(tl.where(live, position, -1), 0) + 1, BN):
        slot = first + pad
        inside = near < length - slot
        k_at, v_at = k_base + slot.to(tl.int64) * k_n, v_base + slot.to(tl.int64) * v_n
        seen = (first + near)[None, :] <= position[:, None]
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
    return of_prefill(_attend, tile, {"LISTED": "*i32", "COUNTS": "*i32"}, head_dim, dtype, name, group)


def reference(query, key, value, on, scale, *, pad=None, softcap=None):
    """The same in plain PyTorch. float64 stays float64, and gradients are supported.

    Returns:
        As `gathered_heads`; the log-sum-exp is float64 if the query is.
    """
    (batch, heads, n, _), (kv_heads, length) = query.shape, key.shape[1:3]
    wide, group = torch.promote_types(query.dtype, torch.float32), heads // kv_heads
    outs, lses = query.new_zeros(query.shape, dtype=wide), query.new_full(query.shape[:3], -torch.inf, dtype=wide)
    for row in range(batch):
        skipped = 0 if pad is None else int(pad[row])
        for head in range(heads):
            token = on[row, :, head].nonzero()[:, 0]
            keys, values = (part[row, head // group, skipped:].to(wide) for part in (key, value))
            place = token + length - n - skipped
            token, place = token[place >= 0], place[place >= 0]
            scores = capped(query[row, head, token].to(wide) @ keys.mT * scale, softcap)
            later = torch.arange(len(keys), device=query.device) > place[:, None]
            scores = scores.masked_fill(later, -torch.inf)
            at = (torch.tensor(row, device=query.device), torch.tensor(head, device=query.device), token)
            outs = outs.index_put(at, scores.softmax(-1) @ values)
            lses = lses.index_put(at, scores.logsumexp(-1))
    return outs.to(query.dtype), lses
