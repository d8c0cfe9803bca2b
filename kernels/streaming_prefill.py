"""Causal attention of a prompt to sinks + window, without lists of blocks (Xiao et al., StreamingLLM, 2023).

The query at position p sees the keys at positions j <= p with j < sinks or p - j < window. Positions count from the
row's first real token. A program takes rows of all query heads of a KV head. It reads the tiles of the sinks, and then
the tiles of the window. The cost is n * (sinks + window), whatever N is. A window of N
and no sinks is plain causal attention.
"""

from __future__ import annotations

from functools import partial

import torch

from .surgery_triton import (  # isort: skip
    add_tile, capped, check, factors, jit, load_tile, masked_softmax, of_prefill, on_device, outputs,
    padded_size, precision, put, said_once, started, store_rows, target, tiles, tl, unsupported, upcast,
)  # fmt: skip

NAME = "streaming_prefill"


def supports(query) -> str | None:
    """Why the kernel does not support these queries; None if it does."""
    return unsupported(query.device, query.dtype, query.shape[3])


def streaming_prefill(
    query, key, value, sinks: int, window: int, scale=None, *, first=0, apart=None, limit=None, pad=None, softcap=None,
    out=None, lse=None, fallback=None,
):  # fmt: skip
    """Causal attention of every query to the first keys and the nearest ones.

    Args:
        query: [batch, heads, n, head_dim], of the last n of the N tokens; any strides.
        key, value: [batch, KV heads, N, head_dim], in the query's dtype; any strides.
        sinks: number of keys at the start of a row that all its later queries see; 0: no sinks.
        window: number of nearest keys, including the query's own; at least 1.
        scale: factor on q.k, head_dim ** -0.5 by default.
        first: slot of the first key: the end of a longer text, of which at least the keys that `window` reaches.
        apart: keys and values of the sinks by position, each [batch, KV heads, sinks, head_dim], where `first` is
            above 0: they are read in place of those of the same positions in `key` and `value`.
        limit: the base model's own sliding window: no key farther away is seen, not even a sink. None: no limit.
        pad: [batch], number of slots before each row's first real token; keys there are never read. None: no padding.
        softcap: scores become softcap * tanh(score / softcap).
        out, lse: tensors for the results, with any strides; None: new tensors.
        fallback: computes what is returned if the kernel cannot run; default: the reference, into out and lse.

    Returns:
        The output, with the shape of the query, and the natural log-sum-exp of the scores, float32 [batch, heads, n].
        They are 0 and -inf for a query in padding.

    Raises:
        ValueError: shapes or sizes do not fit, or a tensor requires a gradient: there is no backward pass.
    """
    pad = check(NAME, query, key, value, pad)
    (batch, heads, n, size), (kv_heads, length) = query.shape, key.shape[1:3]
    if n > length or sinks < 0 or window < 1 or first < 0 or (limit is not None and limit < 1):
        raise ValueError(f"{NAME}: n={n}, N={length}, sinks={sinks}, window={window}, limit={limit} cannot be")
    if bool(sinks and first) != (apart is not None):
        raise ValueError(f"{NAME}: {sinks} sinks before slot {first} of the first key come apart, and no others do")
    for part in apart or ():
        if part.shape != (batch, kv_heads, sinks, size) or part.dtype != key.dtype or part.device != key.device:
            raise ValueError(
                f"{NAME}: sinks that come apart are [batch, KV heads, {sinks}, head_dim], as the keys are"
            )
    scale = size**-0.5 if scale is None else scale
    same = {"first": first, "apart": apart, "limit": limit, "pad": pad, "softcap": softcap}
    made = partial(reference, query, key, value, sinks, window, scale, **same)
    fallback = fallback or partial(put, made, out, lse)
    if said_once(NAME, supports(query), query.device):
        return fallback()
    out, lse = outputs(query, out, lse)
    if out.numel() == 0:
        return out, lse
    name, group = target(query.device), heads // kv_heads
    rows, keys, warps, stages = tiles(size, query.dtype, name)
    factor, cap = factors(scale, softcap)
    end = first + length
    sink_key, sink_value = apart or (key, value)

    def launch():
        with on_device(query):
            _attend[(-(-n * group // rows), kv_heads, batch)](
                query, key, value, sink_key, sink_value, out, lse, pad,
                *query.stride(), *key.stride(), *value.stride(), *sink_key.stride(), *sink_value.stride(),
                *out.stride(), *lse.stride(),
                n, first, length, min(sinks, end), min(window, end), end if limit is None else min(limit, end),
                factor, cap, GROUP=group, D=size, BM=rows, BN=keys, BD=padded_size(size), CAPPED=softcap is not None,
                PADDED=pad is not None, APART=apart is not None, UPCAST=upcast(query.dtype),
                PRECISION=precision(query.dtype, name), num_warps=warps, num_stages=stages,
            )  # fmt: skip

    kind = f"{query.dtype} {size} {group} {softcap is not None} {pad is not None} {apart is not None}"
    return (out, lse) if started(NAME, query.device, launch, kind) else fallback()


@jit
def _attend(
    Q, K, V, SINK_K, SINK_V, OUT, LSE, PAD,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, sk_b, sk_h, sk_n, sk_d, sv_b, sv_h, sv_n, sv_d,
    o_b, o_h, o_n, o_d, l_b, l_h, l_n, n, first_slot, length, sinks, window, limit, factor, cap,
    GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr,
    PADDED: tl.constexpr, APART: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    at, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pad = 0
    if PADDED:
        pad = tl.load(PAD + batch).to(tl.int32)
    origin = first_slot - pad  # position of the first key
    start = origin + length - n  # position of the first query; negative in padding
    packed = at * BM + tl.arange(0, BM)
    row = packed // GROUP
    position = start + row
    head = (kv_head * GROUP + packed % GROUP).to(tl.int64)
    live = row < n

    WHOLE: tl.constexpr = D == BD
    dim, near = tl.arange(0, BD), tl.arange(0, BN)
    real = dim < D
    q_at = Q + batch * q_b + head[:, None] * q_h + row.to(tl.int64)[:, None] * q_n + dim[None, :] * q_d
    q = load_tile(q_at, live[:, None], real[None, :], WHOLE, UPCAST)
    k_base = K + batch * k_b + kv_head.to(tl.int64) * k_h
    v_base = V + batch * v_b + kv_head.to(tl.int64) * v_h
    k_offset = dim[:, None] * k_d + near[None, :] * k_n
    v_offset = near[:, None] * v_n + dim[None, :] * v_d

    nearest = tl.maximum(start + at * BM // GROUP, 0)  # the first real position of this tile
    last = start + tl.minimum((at * BM + BM - 1) // GROUP, n - 1)
    low = tl.maximum(nearest - tl.minimum(window, limit) + 1, 0) // BN  # the window's tiles of keys: low to high
    high = tl.maximum(last + BN, 0) // BN
    before = tl.cdiv(sinks, BN)  # tiles of sinks
    if not APART:
        before = tl.minimum(before, low)  # those that the window does not include
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    if APART:
        s_k, s_v = (
            SINK_K + batch * sk_b + kv_head.to(tl.int64) * sk_h,
            SINK_V + batch * sv_b + kv_head.to(tl.int64) * sv_h,
        )
        for i in range(0, before):
            place = i * BN + near
            inside = (place < sinks) & (place <= last)
            k_at = s_k + dim[:, None] * sk_d + place[None, :] * sk_n
            v_at = s_v + place[:, None] * sv_n + dim[None, :] * sv_d
            distance = position[:, None] - place[None, :]
            seen = inside[None, :] & (distance >= 0) & (distance < limit)
            top, total, acc = add_tile(
                q, k_at, v_at, inside, real, seen, factor, cap, top, total, acc,
                WHOLE, UPCAST, CAPPED, PRECISION,
            )  # fmt: skip
        before = 0
    for i in range(0, before + tl.maximum(high - low, 0)):
        tile = tl.where(i < before, i, low + i - before) * BN
        place, index = tile + near, tile + near - origin
        inside = (index >= 0) & (index < length)
        far = (tile - origin).to(tl.int64)
        distance = position[:, None] - place[None, :]
        if APART:
            seen = (distance < window) & (place >= sinks)[None, :]
        else:
            seen = (distance < window) | (place < sinks)[None, :]
        seen = seen & (distance >= 0) & (distance < limit)
        top, total, acc = add_tile(
            q, k_base + far * k_n + k_offset, v_base + far * v_n + v_offset, inside, real, seen, factor, cap,
            top, total, acc,
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
    types = {"SINK_K": dtype, "SINK_V": dtype}
    plain, full = of_prefill(_attend, tile, types, head_dim, dtype, name, group).items()
    both = {}
    for words, apart in (("", False), (", sinks apart", True)):
        for label, (kernel, types, fixed, options) in (plain, full):
            both[label + words] = kernel, types, fixed | {"APART": apart}, options
    return both


def reference(
    query, key, value, sinks: int, window: int, scale, *, first=0, apart=None, limit=None, pad=None, softcap=None
):
    """The same in plain PyTorch, 128 queries at a time. float64 stays float64, and gradients are supported.

    Returns:
        As `streaming_prefill`; the log-sum-exp is float64 if the query is.
    """
    (batch, heads, n, _), (kv_heads, length) = query.shape, key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    pad = torch.zeros(batch, dtype=torch.int64, device=query.device) if pad is None else pad
    of_key = torch.arange(first, first + length, device=query.device) - pad[:, None]  # [batch, N]
    of_query = of_key[:, length - n :]
    if apart is not None:  # the sinks come first, each once
        of_key = torch.cat([torch.arange(sinks, device=query.device).expand(batch, -1), of_key], dim=1)
        again = (torch.arange(sinks + length, device=query.device) >= sinks) & (of_key < sinks)
        of_key = of_key.masked_fill(again, -1)
        key, value = (torch.cat(pair, dim=2) for pair in zip(apart, (key, value), strict=True))
    padding = (of_key < 0)[:, None, :, None]
    keys, values = (part.to(wide).masked_fill(padding, 0.0) for part in (key, value))
    grouped, outs, lses = query.unflatten(1, (kv_heads, heads // kv_heads)), [], []
    for begin in range(0, n, 128):
        rows = grouped[:, :, :, begin : begin + 128].to(wide)
        scores = capped(torch.einsum("bkgid,bkjd->bkgij", rows, keys) * scale, softcap)
        distance = (of_query[:, begin : begin + 128, None] - of_key[:, None])[:, None, None]
        place = of_key[:, None, None, None]
        seen = (place >= 0) & (distance >= 0) & ((distance < window) | (place < sinks))
        if limit is not None:
            seen = seen & (distance < limit)
        p, lse = masked_softmax(scores, seen)
        outs.append(torch.einsum("bkgij,bkjd->bkgid", p, values).masked_fill((lse == -torch.inf)[..., None], 0.0))
        lses.append(lse)
    return torch.cat(outs, 3).flatten(1, 2).to(query.dtype), torch.cat(lses, 3).flatten(1, 2)
