"""The sums by which the estimators of sparse prefill choose blocks of keys for blocks of queries.

There is no padding, the queries are the last n of the N tokens, and block boundaries are absolute, as in
`surgery_block_selection.Blocks`. The formulas are the same as in `surgery_estimate_pooled.block_mass` and
`surgery_estimate_xattention.antidiagonal_mass`. Scores are not kept beyond their tile: only the result takes memory.
"""

from __future__ import annotations

from functools import partial

import torch

from .surgery_triton import (  # isort: skip
    LOG2E, jit, load_tile, on_device, padded_size, precision, said_once, started, target, tiles, tl, unsupported,
    upcast,
)  # fmt: skip

NAME = "estimators"
# Tables like `surgery_triton.TILES`. POOLED: query rows and key columns of a tile, warps, stages. All is in float32,
# since the means are in float32 and their tiles are small. CROSSED, for antidiagonals: key groups of a tile, warps,
# stages. The rows of a tile are the query groups of a block.
POOLED = {
    ("cuda", "float32", 64): (64, 32, 8, 2),
    ("cuda", "float32", 128): (32, 16, 8, 2),
    ("hip", "float32", 64): (64, 32, 4, 1),
    ("hip", "float32", 128): (32, 32, 4, 1),
}
CROSSED = {
    ("cuda", "half", 64): (32, 4, 2),
    ("cuda", "half", 128): (32, 4, 1),
    ("cuda", "float32", 64): (32, 4, 2),
    ("cuda", "float32", 128): (32, 4, 1),
    ("hip", "half", 64): (32, 4, 1),
    ("hip", "half", 128): (32, 4, 1),
    ("hip", "float32", 64): (32, 4, 1),
    ("hip", "float32", 128): (32, 4, 1),
}


def supports(query, block: int = 128, stride: int = 1) -> str | None:
    """Why the kernels do not support these queries; None if they do.

    Args:
        stride: stride of the antidiagonals; 1: the question is about the pooled sums.
    """
    reason = unsupported(query.device, query.dtype, query.shape[3])
    if reason is None and padded_size(query.shape[3]) > 128:
        reason = f"no tile fits heads of size {query.shape[3]}"
    side = block // stride
    if reason is None and stride > 1 and (block % stride or side & (side - 1) or side > 32):
        reason = f"a block of {block} is not 1, 2, 4, ..., 32 groups of {stride}"
    if reason is None and stride > 1 and side > 16 and query.dtype == torch.float32 and _spills(target(query.device)):
        reason = f"{side} groups of float32 need more registers than there are"
    return reason


def _spills(name: str) -> bool:
    """Whether 32 rows of float32 spill registers on a target: on NVIDIA they do, with three products of tf32."""
    return name.startswith("sm_")


def block_means(key, block: int, fallback=None):
    """Mean of the keys of each block.

    Args:
        key: [batch, KV heads, N, head_dim].
        fallback: computes what is returned if the kernel cannot run, here and below; default: the reference.

    Returns:
        float32 [batch, KV heads, blocks, head_dim]; the last block may have fewer keys.
    """
    batch, heads, length, size = key.shape
    fallback = fallback or partial(block_means_reference, key, block)
    if said_once(NAME, supports(key), key.device):
        return fallback()
    columns = -(-length // block)
    means = torch.empty(batch, heads, columns, size, dtype=torch.float32, device=key.device)

    def launch():
        with on_device(key):
            _means[(columns, heads, batch)](
                key, means, *key.stride(), *means.stride(), length, block, D=size, BN=16, BD=padded_size(size),
                num_warps=4,
            )  # fmt: skip

    written = means.numel() == 0 or started(NAME, key.device, launch, f"means {key.dtype} {size}")
    return means if written else fallback()


def pooled_mass(query, means, bias, scale: float, block: int, length: int, queries: str = "each", fallback=None):
    """The attention of query blocks to key blocks, if every key of a block were the block's mean key.

    With the scores s_iJ = scale * q_i.mean_J + bias_J over the blocks J <= I of query i's own block I:

        each: sum over the queries i of I of softmax_J(s_iJ)
        all:  softmax_J(log of the sum over i of exp(s_iJ))

    Args:
        query: [batch, heads, n, head_dim], of the last n of `length` tokens; any strides.
        means: float32 [batch, KV heads, blocks, head_dim], from `block_means`.
        bias: float32 [batch or 1, KV heads or 1, blocks], log of the number of keys in each block.
        queries: "each" or "all".

    Returns:
        float32 [batch, heads, query blocks, key blocks], 0 for later key blocks. The query blocks have the numbers
        (length - n) // block to (length - 1) // block.

    Raises:
        ValueError: `queries` is neither "each" nor "all", or means or bias have another number of blocks.
    """
    (batch, heads, n, size), (kv_heads, columns) = query.shape, means.shape[1:3]
    if queries not in ("each", "all") or columns != -(-length // block) or bias.shape[-1] != columns:
        raise ValueError(f"{NAME}: queries is each or all, and means and bias are of the {-(-length // block)} blocks")
    bias = bias.expand(batch, kv_heads, columns).float()
    fallback = fallback or partial(pooled_reference, query, means, bias, scale, block, length, queries)
    if said_once(NAME, supports(query), query.device):
        return fallback()
    start = length - n
    rows = columns - start // block
    mass = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=query.device)
    if mass.numel() == 0:
        return mass
    name, each = target(query.device), queries == "each"
    tile_rows, tile_columns, warps, stages = _pooled_tile(size, name)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device) if each else mass
    given = (*query.stride(), *means.stride(), *bias.stride(), n, start, columns, block, scale * LOG2E)
    fixed = {"GROUP": heads // kv_heads, "D": size, "BM": tile_rows, "BN": tile_columns, "BD": padded_size(size)}
    fixed |= {"PRECISION": precision(torch.float32, name), "num_warps": warps, "num_stages": stages}

    def launch():
        with on_device(query):
            if each:
                _pooled_lse[(-(-n // tile_rows), heads, batch)](query, means, bias, lse, *given, **fixed)
            grid = (rows * -(-columns // tile_columns), heads, batch)
            _pooled_sum[grid](query, means, bias, lse, mass, *given, -(-block // tile_rows), EACH=each, **fixed)

    if not started(NAME, query.device, launch, f"pooled {queries} {query.dtype} {size}"):
        return fallback()
    return mass if each else mass.softmax(-1)


def antidiagonal_mass(query, key, scale: float, block: int, stride: int, fallback=None):
    """Shares of key blocks by the antidiagonals of stride x stride tiles, summed over the query groups of a block.

    Query group I (tokens I * stride to I * stride + stride - 1) scores key group J by the mean of scale * q.k over
    the pairs (query I * stride + stride - 1 - c, key J * stride + c). For J = I, the mean is over the pairs whose key
    is not later than the query. Then follow a softmax over J <= I, and the sum over the groups of both blocks (Xu et
    al., XAttention, 2025).

    Args:
        query: [batch, heads, n, head_dim], of the last n of the N tokens; any strides.
        key: [batch, KV heads, N, head_dim], in the query's dtype.
        stride: tokens in a group; it must divide the block.

    Returns:
        float32 [batch, heads, query blocks, key blocks], 0 for later key blocks.

    Raises:
        ValueError: the stride does not divide the block.
    """
    (batch, heads, n, size), (kv_heads, length) = query.shape, key.shape[1:3]
    if block % stride:
        raise ValueError(f"{NAME}: the stride must divide the block: {block} is no multiple of {stride}")
    fallback = fallback or partial(antidiagonal_reference, query, key, scale, block, stride)
    if said_once(NAME, supports(query, block, stride), query.device) or stride == 1:
        return fallback()
    columns, start = -(-length // block), length - n
    rows = columns - start // block
    mass = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=query.device)
    if mass.numel() == 0:
        return mass
    name = target(query.device)
    keys, warps, stages = _crossed_tile(size, query.dtype, name)

    def launch():
        with on_device(query):
            _antidiagonal[(rows, heads, batch)](
                query, key, mass, *query.stride(), *key.stride(), *mass.stride(), length, start, columns,
                scale * LOG2E, GROUP=heads // kv_heads, D=size, STRIDE=stride, SIDE=block // stride,
                BM=max(16, block // stride), BN=keys, BD=padded_size(size), UPCAST=upcast(query.dtype),
                PRECISION=precision(query.dtype, name), num_warps=warps, num_stages=stages,
            )  # fmt: skip

    written = started(NAME, query.device, launch, f"antidiagonal {block} {stride} {query.dtype} {size}")
    return mass if written else fallback()


def _pooled_tile(head_dim: int, name: str) -> tuple[int, int, int, int] | None:
    return tiles(head_dim, torch.float32, name, POOLED, (16, 16, 1, 1))


def _crossed_tile(head_dim: int, dtype: torch.dtype, name: str) -> tuple[int, int, int] | None:
    return tiles(head_dim, dtype, name, CROSSED, (32, 1, 1))


@jit
def _means(
    K, MEANS, k_b, k_h, k_n, k_d, o_b, o_h, o_n, o_d, length, block,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    column, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dim, near = tl.arange(0, BD), tl.arange(0, BN)
    end = tl.minimum((column + 1) * block, length)
    total = tl.zeros([BD], tl.float32)
    for first in range(column * block, end, BN):
        slot = first + near
        k_at = K + batch * k_b + head * k_h + slot.to(tl.int64)[:, None] * k_n + dim[None, :] * k_d
        k = tl.load(k_at, mask=(slot < end)[:, None] & (dim < D)[None, :], other=0.0)
        total += tl.sum(k.to(tl.float32), 0)
    mean = total / (end - column * block).to(tl.float32)
    tl.store(MEANS + batch * o_b + head * o_h + column * o_n + dim * o_d, mean, mask=dim < D)


@jit
def _pooled_scores(
    q, M, BIAS, head, batch, low, k_b, k_h, k_n, k_d, b_b, b_h, b_n, columns, factor,
    GROUP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in base 2, [rows, BN], of a tile of queries for the mean keys from column `low` on."""
    column, dim = low + tl.arange(0, BN), tl.arange(0, BD)
    m_at = M + batch * k_b + (head // GROUP) * k_h + column[None, :] * k_n + dim[:, None] * k_d
    m = tl.load(m_at, mask=(column < columns)[None, :] & (dim < D)[:, None], other=0.0)
    more = tl.load(BIAS + batch * b_b + (head // GROUP) * b_h + column * b_n, mask=column < columns, other=0.0)
    return tl.dot(q, m, input_precision=PRECISION) * factor + more[None, :] * 1.4426950408889634


@jit
def _pooled_lse(
    Q, M, BIAS, LSE, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, b_b, b_h, b_n, n, start, columns, block, factor,
    GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp in base 2 of each query's scores, over the blocks up to its own; LSE is contiguous."""
    at, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, dim = at * BM + tl.arange(0, BM), tl.arange(0, BD)
    q_at = Q + batch * q_b + head * q_h + row.to(tl.int64)[:, None] * q_n + dim[None, :] * q_d
    q = tl.load(q_at, mask=(row < n)[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
    own = (start + row) // block
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for low in range(0, (start + tl.minimum(at * BM + BM, n) - 1) // block + 1, BN):
        scores = _pooled_scores(
            q, M, BIAS, head, batch, low, k_b, k_h, k_n, k_d, b_b, b_h, b_n, columns, factor, GROUP, D, BN, BD,
            PRECISION,
        )  # fmt: skip
        scores = tl.where((low + tl.arange(0, BN))[None, :] <= own[:, None], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))  # all queries see block 0: never -inf
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(scores - new[:, None]), 1)
        top = new
    tl.store(LSE + (batch * tl.num_programs(1) + head) * n + row, top + tl.log2(total), mask=row < n)


@jit
def _pooled_sum(
    Q, M, BIAS, LSE, MASS, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, b_b, b_h, b_n, n, start, columns, block, factor,
    parts, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """BN columns of one row of blocks: sums of shares over the row's queries (EACH), or logs of sums of exp."""
    wide = tl.cdiv(columns, BN)
    line, low = tl.program_id(0) // wide, (tl.program_id(0) % wide) * BN
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    own = start // block + line
    column, dim = low + tl.arange(0, BN), tl.arange(0, BD)
    top = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    if low <= own:
        for part in range(0, parts):
            token = part * BM + tl.arange(0, BM)
            row = own * block + token - start
            live = (token < block) & (row >= 0) & (row < n)
            q_at = Q + batch * q_b + head * q_h + row.to(tl.int64)[:, None] * q_n + dim[None, :] * q_d
            q = tl.load(q_at, mask=live[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
            scores = _pooled_scores(
                q, M, BIAS, head, batch, low, k_b, k_h, k_n, k_d, b_b, b_h, b_n, columns, factor, GROUP, D, BN, BD,
                PRECISION,
            )  # fmt: skip
            if EACH:
                lse = tl.load(LSE + (batch * tl.num_programs(1) + head) * n + row, mask=live, other=0.0)
                total += tl.sum(tl.where(live[:, None], tl.exp2(scores - lse[:, None]), 0.0), 0)
            else:
                scores = tl.where(live[:, None], scores, float("-inf"))
                new = tl.maximum(top, tl.max(scores, 0))
                safe = tl.where(new == float("-inf"), 0.0, new)
                total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(scores - safe[None, :]), 0)
                top = new
    if EACH:
        found = tl.where(column <= own, total, 0.0)
    else:
        found = tl.where(column <= own, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    lines = tl.num_programs(0) // wide
    m_at = MASS + ((batch * tl.num_programs(1) + head) * lines + line) * columns + column
    tl.store(m_at, found, mask=column < columns)


@jit
def _antidiagonal_scores(
    q_base, k_base, q_group, k_group, q_n, q_d, k_n, k_d, length, start, factor,
    D: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of query groups [BM] for key groups [BN]; -inf for later key groups."""
    dim = tl.arange(0, BD)
    whole = tl.zeros([BM, BN], tl.float32)
    early = tl.zeros([BM, BN], tl.float32)  # the causal pairs if both groups are the same
    for c in range(0, STRIDE):
        place, slot = q_group * STRIDE + STRIDE - 1 - c, k_group * STRIDE + c
        inside = (place >= start) & (place < length)
        q_at = q_base + (place - start).to(tl.int64)[:, None] * q_n + dim[None, :] * q_d
        k_at = k_base + slot.to(tl.int64)[None, :] * k_n + dim[:, None] * k_d
        q = load_tile(q_at, inside[:, None], (dim < D)[None, :], False, UPCAST)
        k = load_tile(k_at, (slot < length)[None, :], (dim < D)[:, None], False, UPCAST)
        product = tl.dot(q, k, input_precision=PRECISION)
        whole += product
        early += tl.where(2 * c < STRIDE, product, 0.0)
    first, end = tl.maximum(q_group * STRIDE, start), tl.minimum((q_group + 1) * STRIDE, length)
    count = tl.maximum(end - first, 0)
    some = tl.maximum(end - tl.maximum(first, q_group * STRIDE + STRIDE // 2), 0)
    on = tl.where((some > 0)[:, None], early / tl.maximum(some, 1).to(tl.float32)[:, None] * factor, float("-inf"))
    off = whole / tl.maximum(count, 1).to(tl.float32)[:, None] * factor
    scores = tl.where(k_group[None, :] == q_group[:, None], on, off)
    return tl.where(k_group[None, :] <= q_group[:, None], scores, float("-inf"))


@jit
def _antidiagonal(
    Q, K, MASS, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, m_b, m_h, m_n, m_d, length, start, columns, factor,
    GROUP: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, SIDE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row of blocks: one pass over the key groups for the log-sum-exps, and one pass for the shares."""
    line, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    own, lane = start // (SIDE * STRIDE) + line, tl.arange(0, BM)
    q_group = own * SIDE + lane
    live = (lane < SIDE) & (q_group * STRIDE < length) & ((q_group + 1) * STRIDE > start)
    q_base, k_base = Q + batch * q_b + head * q_h, K + batch * k_b + (head // GROUP) * k_h
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for low in range(0, (own + 1) * SIDE, BN):
        scores = _antidiagonal_scores(
            q_base, k_base, q_group, low + tl.arange(0, BN), q_n, q_d, k_n, k_d, length, start, factor, D, STRIDE, BM,
            BN, BD, UPCAST, PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
        top = new
    live = live & (total > 0.0)
    lse = tl.where(live, top + tl.log2(tl.where(live, total, 1.0)), 0.0)
    side = tl.arange(0, BN // SIDE)
    for low in range(0, columns * SIDE, BN):
        column = low // SIDE + side
        shares = tl.zeros([BN // SIDE], tl.float32)
        if low < (own + 1) * SIDE:
            scores = _antidiagonal_scores(
                q_base, k_base, q_group, low + tl.arange(0, BN), q_n, q_d, k_n, k_d, length, start, factor, D, STRIDE,
                BM, BN, BD, UPCAST, PRECISION,
            )  # fmt: skip
            shared = tl.sum(tl.where(live[:, None], tl.exp2(scores - lse[:, None]), 0.0), 0)
            shares = tl.sum(tl.reshape(shared, [BN // SIDE, SIDE]), 1)
        m_at = MASS + batch * m_b + head * m_h + line * m_n + column * m_d
        tl.store(m_at, shares, mask=column < columns)


def variants(head_dim: int, dtype: torch.dtype, name: str, group: int) -> dict:
    """The launches for a target, for ahead-of-time compilation: {label: (kernel, types, constants, options)}.

    `group`: query heads of a KV head.
    """
    size = padded_size(head_dim)
    if size > 128:
        return {}
    fixed = {"GROUP": group, "D": head_dim, "BD": size}
    rows, columns, warps, stages = _pooled_tile(head_dim, name)
    pooled = fixed | {"BM": rows, "BN": columns, "PRECISION": precision(torch.float32, name)}
    types, options = (
        {"Q": dtype, "M": "*fp32", "BIAS": "*fp32", "LSE": "*fp32", "MASS": "*fp32"},
        {
            "num_warps": warps,
            "num_stages": stages,
        },
    )
    keys, crossed_warps, crossed_stages = _crossed_tile(head_dim, dtype, name)
    crossed = fixed | {"BM": 16, "BN": keys, "UPCAST": False, "PRECISION": precision(dtype, name)}
    stride_4 = (
        _antidiagonal,
        {"Q": dtype, "K": dtype, "MASS": "*fp32"},
        crossed | {"STRIDE": 4, "SIDE": 32, "BM": 32},
        {"num_warps": crossed_warps, "num_stages": crossed_stages},
    )
    some = {} if dtype == torch.float32 and _spills(name) else {"antidiagonal, stride 4": stride_4}
    return some | {
        "means": (_means, {"K": dtype, "MEANS": "*fp32"}, {"D": head_dim, "BD": size, "BN": 16}, {"num_warps": 4}),
        "pooled, log-sum-exp": (_pooled_lse, types, pooled, options),
        "pooled, each": (_pooled_sum, types, pooled | {"EACH": True}, options),
        "pooled, all": (_pooled_sum, types, pooled | {"EACH": False}, options),
        "antidiagonal": (
            _antidiagonal,
            {"Q": dtype, "K": dtype, "MASS": "*fp32"},
            crossed | {"STRIDE": 16, "SIDE": 8},
            {"num_warps": crossed_warps, "num_stages": crossed_stages},
        ),
    }


def block_means_reference(key, block: int):
    """`block_means` in plain PyTorch; float64 stays float64."""
    parts = key.to(torch.promote_types(key.dtype, torch.float32)).split(block, dim=2)
    return torch.stack([part.mean(2) for part in parts], dim=2)


def pooled_reference(query, means, bias, scale: float, block: int, length: int, queries: str = "each"):
    """`pooled_mass` in plain PyTorch, query block by query block; float64 stays float64."""
    (batch, heads, n, _), (kv_heads, columns) = query.shape, means.shape[1:3]
    start = length - n
    wide = torch.promote_types(query.dtype, torch.float32)
    means, bias = (part.repeat_interleave(heads // kv_heads, dim=1).to(wide) for part in (means, bias))
    mass = means.new_zeros(batch, heads, columns - start // block, columns)
    for line in range(mass.shape[2]):
        own = start // block + line
        rows = query[:, :, max(own * block - start, 0) : (own + 1) * block - start].to(wide)
        scores = rows @ means[:, :, : own + 1].mT * scale + bias[:, :, None, : own + 1]
        found = scores.softmax(-1).sum(2) if queries == "each" else scores.logsumexp(2).softmax(-1)
        mass[:, :, line, : own + 1] = found
    return mass


def antidiagonal_reference(query, key, scale: float, block: int, stride: int):
    """`antidiagonal_mass` in plain PyTorch, query group by query group; float64 stays float64."""
    (batch, heads, n, _), (kv_heads, length) = query.shape, key.shape[1:3]
    start, columns, side = length - n, -(-length // block), block // stride
    wide = torch.promote_types(query.dtype, torch.float32)
    tail = (0, 0, 0, columns * block - length)
    keys = torch.nn.functional.pad(key.to(wide), tail).repeat_interleave(heads // kv_heads, dim=1)
    keys = keys.unflatten(2, (-1, stride))  # [batch, heads, groups, stride, d]
    mass = keys.new_zeros(batch, heads, columns - start // block, columns)
    for group in range(start // stride, -(-length // stride)):
        places = torch.arange(max(group * stride, start), min((group + 1) * stride, length), device=query.device)
        rows, c = query[:, :, places - start].to(wide), group * stride + stride - 1 - places
        products = torch.einsum("bhcd,bhgcd->bhgc", rows, keys[:, :, : group + 1, c]) * scale
        scores, early = products.mean(-1), 2 * c < stride
        scores[..., group] = products[..., group, early].mean(-1) if early.any() else -torch.inf
        top = scores.amax(-1, keepdim=True)
        shares = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
        shares = torch.nn.functional.pad(
            shares / shares.sum(-1, keepdim=True).clamp(min=1e-30), (0, -(group + 1) % side)
        )
        blocks = shares.unflatten(-1, (-1, side)).sum(-1)
        mass[:, :, group * stride // block - start // block, : blocks.shape[-1]] += blocks
    return mass
