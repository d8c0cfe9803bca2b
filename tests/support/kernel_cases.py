"""Cases for the kernels: what each gave, measured against brute force in float64.

Run as a program under TRITON_INTERPRET=1 (the variable is read when a kernel is decorated, so the tests' own process
cannot): prints one JSON object, {case: {measure: number}}. Outputs are NaN before every launch, and so is all that
lies in padding: whatever is not written, or read though it must not be, shows.
"""

from __future__ import annotations

import json
import sys
import zlib

import torch
from torch.nn.functional import scaled_dot_product_attention

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = {}


def case(name: str, **sizes):
    """Register a function of a device under a name; `sizes` are handed to it."""

    def keep(function):
        if name in CASES:
            raise KeyError(name)
        CASES[name] = lambda device: function(device, seed=zlib.crc32(name.encode()), **sizes)
        return function

    return keep


def made(seed, *shape, dtype=FP32, device="cpu"):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


def inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device, pads=None):
    """query, key, value and pad; NaN in all that is padding."""
    query = made(seed, batch, heads, n, d, dtype=dtype, device=device)
    key, value = (made(seed + i, batch, kv_heads, length, d, dtype=dtype, device=device) for i in (1, 2))
    if pads is None:
        return query, key, value, None
    for row, pad in enumerate(pads):
        key[row, :, :pad], value[row, :, :pad], query[row, :, : max(pad - (length - n), 0)] = (torch.nan,) * 3
    return query, key, value, torch.tensor(pads, device=device)


def poisoned(query):
    return {
        "out": torch.full_like(query, torch.nan),
        "lse": torch.full(query.shape[:3], torch.nan, dtype=FP32, device=query.device),
    }


def positions(n, length, pads, batch, device="cpu"):
    """Position of every query [batch, n] and key [batch, length], counted from the first real token."""
    pad = torch.tensor(pads or [0] * batch, device=device)[:, None]
    return torch.arange(length - n, length, device=device) - pad, torch.arange(length, device=device) - pad


def causal(n, length, pads, batch, device="cpu"):
    """Which keys each query may see, [batch, 1, n, length]."""
    of_query, of_key = positions(n, length, pads, batch, device)
    return ((of_key[:, None] >= 0) & (of_key[:, None] <= of_query[:, :, None]))[:, None]


def brute(query, key, value, seen, scale=None, softcap=None):
    """Attention and log-sum-exp in float64, every score written out; 0 and -inf where nothing is seen."""
    query, key, value = (tensor.double().nan_to_num() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    return weights / total.clamp(min=1e-300) @ value, total[..., 0].log()


def ratio(result, wanted) -> float:
    """Root of the mean square of the error over that of the wanted values."""
    wanted = wanted.double()
    return float((result.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def measure(result, wanted, name="out") -> dict:
    """Errors of (output, lse) or of one tensor; `holes` counts values that are NaN or wrongly finite or infinite."""
    (out, lse), (wanted_out, wanted_lse) = result, wanted
    finite, same = wanted_lse.isfinite(), lse.isneginf() == wanted_lse.isneginf()
    if not finite.any():
        raise RuntimeError("a case in which nothing is seen measures nothing")
    error = lse[finite].double() - wanted_lse[finite]
    empty = out[~finite]
    return {
        "out": ratio(out[finite], wanted_out[finite]),
        "lse": float(error.abs().max()),
        "holes": int((~same).sum() + (~out.isfinite()).sum() + lse.isnan().sum() + (empty != 0).sum()),
    }


# --- block_sparse_prefill ---


def random_kept(seed, lists, batch, n, length, block, pads, density):
    """Random lists; some rows are empty, and some first blocks are masked from end to end."""
    of_query, _ = positions(n, length, pads, batch)
    first = of_query[:, 0].clamp(min=0) // block
    rows = int((of_query[:, -1] // block - first).max()) + 1
    draws = torch.rand(batch, lists, rows, -(-length // block), generator=torch.Generator().manual_seed(seed))
    kept = draws < density
    kept[:, :, -1, 0] = True
    if rows > 1:
        kept[:, 0, (rows - 1) // 2] = False
    return kept


def seen_blocks(kept, heads, block, n, length, pads):
    """The keys that lists let each query see, [batch, heads, n, length]: every pair looked up on its own."""
    batch, lists = kept.shape[:2]
    of_query, of_key = positions(n, length, pads, batch)
    row = (of_query // block - (of_query[:, :1].clamp(min=0) // block)).clamp(0, kept.shape[2] - 1)
    column = (of_key // block).clamp(min=0)
    at = torch.arange(batch)[:, None, None, None]
    head = (torch.arange(heads) // (heads // lists))[:, None, None]
    return kept[at, head, row[:, None, :, None], column[:, None, None, :]] & causal(n, length, pads, batch)


SPARSE = [  # batch, heads, KV heads, n, N, head size, block, pads, lists per
    (1, 4, 4, 1, 1, 16, 16, None, "kv"), (1, 4, 2, 2, 2, 64, 32, None, "kv"), (2, 4, 4, 63, 63, 16, 32, None, "kv"),
    (1, 9, 3, 64, 64, 64, 32, None, "kv"), (1, 9, 3, 65, 65, 64, 32, None, "head"),
    (1, 8, 1, 65, 102, 16, 32, None, "kv"),
    (1, 6, 3, 129, 129, 16, 64, None, "kv"), (1, 6, 3, 129, 130, 80, 64, None, "head"),
    (1, 4, 4, 63, 200, 128, 64, None, "head"), (1, 9, 3, 37, 138, 80, 48, None, "kv"),
    (2, 6, 3, 65, 65, 16, 32, (17, 0), "kv"), (3, 6, 3, 64, 64, 16, 16, (17, 0, 63), "head"),
    (2, 9, 3, 40, 77, 64, 32, (50, 3), "kv"), (2, 4, 2, 33, 70, 16, 32, (38, 69), "kv"),
    (1, 8, 1, 1, 129, 64, 128, None, "kv"), (1, 3, 1, 20, 57, 16, 16, (5,), "kv"),
    (1, 2, 1, 70, 70, 96, 32, None, "kv"),
]  # fmt: skip


def run_sparse(device, seed, batch, heads, kv_heads, n, length, d, block, pads, per, dtype=FP32, softcap=None):
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, pad = inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device, pads)
    kept = random_kept(seed, kv_heads if per == "kv" else heads, batch, n, length, block, pads, 0.6)
    blocks = BlockList.of(kept.to(device), block)
    result = block_sparse_prefill(query, key, value, blocks, pad=pad, softcap=softcap, **poisoned(query))
    seen = seen_blocks(kept, heads, block, n, length, pads).to(device)
    return measure(result, brute(query, key, value, seen, softcap=softcap))


for index, sizes in enumerate(SPARSE):
    names = dict(
        zip(("batch", "heads", "kv_heads", "n", "length", "d", "block", "pads", "per"), sizes, strict=True), dtype=FP32
    )
    case(f"block_sparse fp32 {sizes}", **names)(run_sparse)
    if index % 3 == 1:
        case(f"block_sparse fp16 {sizes}", **(names | {"dtype": FP16}))(run_sparse)
    if index % 4 == 2:
        case(f"block_sparse bf16 {sizes}", **(names | {"dtype": BF16}))(run_sparse)
SHAPE = {
    "batch": 2,
    "heads": 6,
    "kv_heads": 3,
    "n": 50,
    "length": 83,
    "d": 16,
    "block": 32,
    "pads": (9, 60),
    "per": "kv",
}
case("block_sparse fp32 soft-cap", **SHAPE, softcap=2.0)(run_sparse)
case("block_sparse fp32 a list per head, soft-cap", **(SHAPE | {"per": "head"}), softcap=2.0)(run_sparse)


@case("block_sparse fp32 order of the list")
def sparse_order(device, seed):
    """Permuted lists give what sorted ones give, up to rounding."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, _ = inputs(seed, 1, 4, 2, 100, 100, 16, FP32, device)
    blocks = BlockList.of(random_kept(seed, 2, 1, 100, 100, 16, None, 0.8).to(device), 16)
    wanted = block_sparse_prefill(query, key, value, blocks)
    runs = [run.flip(0) for run in torch.tensor_split(blocks.ids, blocks.offsets[1:-1].cpu())]
    permuted = BlockList(blocks.offsets, torch.cat(runs), blocks.heads, blocks.rows, blocks.block)
    if torch.equal(permuted.ids, blocks.ids):
        raise RuntimeError("nothing was permuted")
    return measure(block_sparse_prefill(query, key, value, permuted), tuple(tensor.double() for tensor in wanted))


@case("block_sparse fp32 full list is SDPA")
def sparse_full(device, seed):
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, _ = inputs(seed, 2, 6, 3, 77, 77, 64, FP32, device)
    full = torch.ones(2, 3, 3, 3, dtype=torch.bool, device=device)
    out, lse = block_sparse_prefill(query, key, value, BlockList.of(full, 32), **poisoned(query))
    sdpa = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    _, wanted = brute(query, key, value, causal(77, 77, None, 2, device))
    return measure((out, lse), (sdpa, wanted))


@case("block_sparse fp32 one diagonal block is SDPA on it")
def sparse_diagonal(device, seed):
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, _ = inputs(seed, 1, 4, 4, 96, 96, 16, FP32, device)
    out, _ = block_sparse_prefill(
        query, key, value, BlockList.of(torch.eye(3, device=device).bool().expand(1, 4, 3, 3), 32)
    )
    blocks = (tensor.double().unflatten(2, (3, 32)) for tensor in (query, key, value))
    return {"out": ratio(out, scaled_dot_product_attention(*blocks, is_causal=True).flatten(2, 3))}


@case("block_sparse fp32 two disjoint lists merge")
def sparse_merge(device, seed):
    """o = (o1 e^l1 + o2 e^l2) / (e^l1 + e^l2), where one list, or both, may be empty."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, _ = inputs(seed, 1, 4, 2, 90, 90, 16, FP32, device)
    kept = random_kept(seed, 2, 1, 90, 90, 16, None, 0.7)
    half = kept & (torch.arange(kept.shape[3]) % 2 == 0)
    results = [
        block_sparse_prefill(query, key, value, BlockList.of(kept_blocks.to(device), 16))
        for kept_blocks in (half, kept & ~half)
    ]
    (one, first), (two, second) = ((out.double(), lse.double()) for out, lse in results)
    lse = torch.logaddexp(first, second)
    safe = lse.masked_fill(lse.isneginf(), 0.0)
    out = one * (first - safe).exp()[..., None] + two * (second - safe).exp()[..., None]
    seen = seen_blocks(kept, 4, 16, 90, 90, None).to(device)
    return measure((out, lse), brute(query, key, value, seen))


@case("block_sparse fp32 strides")
def sparse_strides(device, seed):
    """[batch, length, heads, d] views, a slice with an offset, expanded values, an output of other strides."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query = made(seed, 2, 50, 4, 40, device=device)[..., 3:19].transpose(1, 2)
    key = made(seed + 1, 2, 2, 16, 60, device=device).transpose(2, 3)
    value = made(seed + 2, 1, 1, 60, 16, device=device).expand(2, 2, -1, -1)
    kept = random_kept(seed, 4, 2, 50, 60, 16, None, 0.6)
    out = torch.full((2, 50, 4, 16), torch.nan, device=device).transpose(1, 2)
    lse = torch.full((2, 50, 4), torch.nan, device=device).transpose(1, 2)
    result = block_sparse_prefill(query, key, value, BlockList.of(kept.to(device), 16), out=out, lse=lse)
    return measure(result, brute(query, key, value, seen_blocks(kept, 4, 16, 50, 60, None).to(device)))


@case("block_sparse fp32 a row alone")
def sparse_row_alone(device, seed):
    """A padded batch's row is the row without its padding: to the bit, where one compiler's code runs both."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, pad = inputs(seed, 2, 4, 2, 40, 70, 16, FP32, device, (21, 0))
    kept = random_kept(seed, 2, 2, 40, 70, 16, (21, 0), 0.6).to(device)
    batch = block_sparse_prefill(query, key, value, BlockList.of(kept, 16), pad=pad)
    single = block_sparse_prefill(
        query[:1], key[:1, :, 21:], value[:1, :, 21:], BlockList.of(kept[:1, :, :, :4].contiguous(), 16)
    )
    bits = sum(int((a[:1] != b).sum()) for a, b in zip(batch, single, strict=True))
    return {"bits": bits, "out": ratio(batch[0][:1], single[0])}


@case("block_sparse fp64 reference")
def sparse_reference(device, seed):
    """The reference itself, in float64, with everything at once."""
    from surgery.kernels.block_sparse_prefill import BlockList, reference

    query, key, value, pad = inputs(seed, 3, 6, 3, 40, 70, 16, torch.float64, device, (45, 0, 69))
    kept = random_kept(seed, 3, 3, 40, 70, 16, (45, 0, 69), 0.6)
    result = reference(query, key, value, BlockList.of(kept.to(device), 16), 0.3, pad=pad, softcap=3.0)
    seen = seen_blocks(kept, 6, 16, 40, 70, (45, 0, 69)).to(device)
    return measure(result, brute(query, key, value, seen, 0.3, 3.0))


# --- streaming_prefill ---

STREAMING = [  # batch, heads, KV heads, n, N, head size, sinks, window, pads
    (1, 4, 4, 1, 1, 16, 0, 1, None), (1, 6, 3, 63, 63, 16, 4, 8, None), (1, 9, 3, 65, 102, 64, 1, 2, None),
    (1, 8, 1, 129, 129, 16, 0, 1, None), (2, 9, 3, 64, 64, 16, 4, 64, (17, 0)), 
    (3, 6, 3, 40, 77, 16, 4, 20, (50, 3, 76)),
    (1, 4, 4, 37, 200, 80, 40, 33, None), (1, 4, 2, 50, 50, 128, 3, 500, None), (1, 2, 1, 20, 90, 64, 70, 5, (9,)),
]  # fmt: skip


def seen_band(n, length, sinks, window, pads, batch, limit=None, device="cpu"):
    of_query, of_key = (each[:, None] for each in positions(n, length, pads, batch, device))
    distance = of_query[..., None] - of_key[:, :, None]
    near = (distance < window) | (of_key[:, :, None] < sinks)
    return causal(n, length, pads, batch, device) & near & (distance < (limit or length + 1))


def run_streaming(
    device, seed, batch, heads, kv_heads, n, length, d, sinks, window, pads, dtype=FP32, softcap=None, limit=None
):
    from surgery.kernels.streaming_prefill import streaming_prefill

    query, key, value, pad = inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device, pads)
    result = streaming_prefill(
        query, key, value, sinks, window, pad=pad, softcap=softcap, limit=limit, **poisoned(query)
    )
    seen = seen_band(n, length, sinks, window, pads, batch, limit, device)
    return measure(result, brute(query, key, value, seen, softcap=softcap))


@case("streaming fp32 a window of all keys is SDPA")
def streaming_full(device, seed):
    from surgery.kernels.streaming_prefill import streaming_prefill

    query, key, value, _ = inputs(seed, 2, 6, 3, 77, 77, 64, FP32, device)
    out, _ = streaming_prefill(query, key, value, 0, 77)
    tensors = (tensor.double() for tensor in (query, key, value))
    return {"out": ratio(out, scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True))}


# batch, heads, KV heads, n, N, head size, sinks, window, pads; of a text whose keys before the window are gone
APART = [
    (1, 6, 3, 20, 90, 16, 4, 8, None), (1, 4, 4, 1, 200, 64, 0, 33, None), (1, 9, 3, 37, 101, 80, 40, 16, None),
    (2, 6, 3, 17, 64, 16, 4, 20, (17, 0)), (3, 4, 2, 25, 60, 16, 6, 9, (30, 40, 60)),
    (1, 2, 1, 5, 70, 16, 70, 3, (1,)),
]  # fmt: skip


def run_apart(device, seed, batch, heads, kv_heads, n, length, d, sinks, window, pads, dtype=FP32, limit=None):
    """A chunk of a prompt: the window's keys, and the sinks by position in tensors of their own."""
    from surgery.kernels.streaming_prefill import streaming_prefill

    query, key, value, pad = inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device, pads)
    first = length - min(n + window - 1, length)
    apart = [torch.full((batch, kv_heads, sinks, d), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    for row in range(batch):
        begin = pads[row] if pads else 0
        for sink, whole in zip(apart, (key, value), strict=True):
            sink[row, :, : length - begin] = whole[row, :, begin : begin + sinks]
    near = (tensor[:, :, first:] for tensor in (key, value))
    given = {"first": first, "apart": apart if sinks else None, "pad": pad, "limit": limit}
    result = streaming_prefill(query, *near, sinks, window, **given, **poisoned(query))
    seen = seen_band(n, length, sinks, window, pads, batch, limit, device)
    return measure(result, brute(query, key, value, seen))


@case("streaming fp64 reference, sinks apart")
def streaming_reference(device, seed):
    """The reference itself, in float64."""
    from surgery.kernels.streaming_prefill import reference

    query, key, value, pad = inputs(seed, 3, 6, 3, 25, 70, 16, torch.float64, device, (45, 0, 69))
    apart = [torch.zeros(3, 3, 4, 16, dtype=torch.float64, device=device) for _ in range(2)]
    for row, begin in enumerate((45, 0, 69)):
        for sink, whole in zip(apart, (key, value), strict=True):
            sink[row, :, : 70 - begin] = whole[row, :, begin : begin + 4]
    near = (tensor[:, :, 38:] for tensor in (key, value))
    result = reference(query, *near, 4, 8, 0.3, first=38, apart=apart, pad=pad, softcap=3.0, limit=20)
    return measure(result, brute(query, key, value, seen_band(25, 70, 4, 8, (45, 0, 69), 3, 20, device), 0.3, 3.0))


# --- gathered_heads ---

GATHERED = [  # batch, heads, KV heads, n, N, head size, pads, share of rows that are on
    (1, 4, 4, 1, 1, 16, None, 1.0), (1, 9, 3, 65, 65, 16, None, 0.6), (1, 9, 3, 63, 100, 64, None, 0.4),
    (2, 6, 3, 64, 64, 80, (17, 0), 0.5), (3, 8, 1, 33, 70, 16, (40, 3, 69), 0.5), (1, 4, 2, 129, 129, 16, None, 0.05),
    (1, 4, 4, 50, 50, 128, None, 1.0),
]  # fmt: skip


def run_gathered(device, seed, batch, heads, kv_heads, n, length, d, pads, share, dtype=FP32, softcap=None):
    from surgery.kernels.gathered_heads import gathered_heads

    query, key, value, pad = inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device, pads)
    on = torch.rand(batch, n, heads, generator=torch.Generator().manual_seed(seed)) < share
    on[:, -1, 0] = True
    if share < 1:
        on[:, :, -1] = False  # a head that is off everywhere
    on = on.to(device)
    result = gathered_heads(query, key, value, on, pad=pad, softcap=softcap, **poisoned(query))
    seen = causal(n, length, pads, batch, device) & on.transpose(1, 2)[..., None]
    return measure(result, brute(query, key, value, seen, softcap=softcap))


@case("gathered fp32 gradient of the reference")
def gathered_gradient(device, seed):
    """What training would run has the gradients of the brute force."""
    from surgery.kernels.gathered_heads import reference

    shape = (2, 4, 2, 20, 31, 16)
    query, key, value, pad = inputs(seed, *shape, torch.float64, device, (14, 0))
    on = (torch.rand(2, 20, 4, generator=torch.Generator().manual_seed(seed)) < 0.5).to(device)
    seen, gradients = causal(20, 31, (14, 0), 2, device) & on.transpose(1, 2)[..., None], []
    weight = made(seed + 5, 2, 4, 20, 16, dtype=torch.float64, device=device)
    for run in (
        lambda *tensors: reference(*tensors, on, 0.25, pad=pad)[0],
        lambda *tensors: brute(*tensors, seen)[0],
    ):
        leaves = [tensor.nan_to_num().requires_grad_() for tensor in (query, key, value)]
        (run(*leaves) * weight).sum().backward()
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    return {"out": ratio(*gradients)}


# --- split_decode ---

DECODE = [  # batch, KV heads' groups, which are ring heads, steps of the cache, head size, sinks, window, pads, piece
    ([3, 3, 3], [1], [37, 1, 1], 64, 4, 8, None, 16), ([1] * 4, [0, 2], [1] * 9, 16, 2, 3, None, 1000),
    ([8], [0], [20, 1], 16, 0, 5, None, 16), ([4, 4], [], [70, 1], 80, 0, 1, None, 32),
    ([2, 5, 1], [0, 2], [50, 1, 1, 1], 16, 4, 16, (17, 0), 16), ([3, 3, 3], [0, 1, 2], [1, 1], 128, 4, 40, (0, 1), 16),
    ([2, 2, 2], [1, 2], [33, 1], 16, 3, 7, (33, 2, 0), 16), ([1, 1], [1], [90, 1], 16, 1, 1, (5,), 48),
    ([3, 3, 3], [1], [9, 1], 16, 20, 30, None, 16),
]  # fmt: skip


def run_decode(device, seed, groups, ring, steps, d, sinks, window, pads, piece, dtype=FP32, softcap=None, limit=None):
    """A cache filled as generation fills it, then one step of decoding."""
    from surgery.kernels.split_decode import HeadTable, Ring, split_decode

    from surgery.runtime.surgery_stores import RingStore
    from surgery.runtime.surgery_visibility import Visibility

    batch, length, heads = len(pads or [0]), sum(steps), sum(groups)
    query, key, value, pad = inputs(seed, batch, heads, len(groups), 1, length, d, dtype, device, pads)
    store, first = RingStore(Visibility(sinks, window)), 0
    for step in steps if ring else []:
        tensors = (tensor[:, ring, first : first + step].nan_to_num() for tensor in (key, value))
        with torch.no_grad():
            store.append(*tensors, recording=False).settle_sinks(pad)
        first += step
    wanted = []
    for index, group in enumerate(groups):
        begin = sum(groups[:index])
        rows = slice(begin, begin + group)
        seen = seen_band(1, length, sinks, window, pads, batch, limit, device) if index in ring else None
        seen = causal(1, length, pads, batch, device) if seen is None else seen
        inputs_of_head = (query[:, rows], key[:, index : index + 1], value[:, index : index + 1], seen)
        wanted.append(brute(*inputs_of_head, softcap=softcap))
    others = [head for head in range(len(groups)) if head not in ring]
    kept = Ring(store.tensors["keys"], store.tensors["values"], store.seen, sinks, limit) if ring else None
    result = split_decode(
        query, (key[:, others], value[:, others]) if others else None, kept, HeadTable(groups, others, ring, device),
        pad=pad, softcap=softcap, piece=piece, **poisoned(query),
    )  # fmt: skip
    return measure(result, tuple(torch.cat(tensors, 1) for tensors in zip(*wanted, strict=True)))


@case("decode fp32 two launches write one output")
def decode_in_two(device, seed):
    """Each launch writes the query heads of its table and no others."""
    from surgery.kernels.split_decode import HeadTable, split_decode

    groups, length = [2, 5, 1, 2], 70
    query, key, value, pad = inputs(seed, 2, 10, 4, 1, length, 16, FP32, device, (9, 0))
    result = poisoned(query)
    for heads in ([0, 3], [2, 1]):
        table = HeadTable(groups, heads, [], device)
        split_decode(query, (key[:, heads], value[:, heads]), None, table, pad=pad, piece=32, **result)
    spread = [head for head, group in enumerate(groups) for _ in range(group)]
    wanted = brute(query, key[:, spread], value[:, spread], causal(1, length, (9, 0), 2, device))
    return measure((result["out"], result["lse"]), wanted)


# --- estimators ---


@case("estimators fp32 block means")
def means(device, seed):
    from surgery.kernels.estimators import block_means

    key = made(seed, 2, 45, 3, 20, device=device).transpose(1, 2)
    wanted = [key[b, h, j : j + 16].double().mean(0) for b in range(2) for h in range(3) for j in range(0, 45, 16)]
    return {"out": ratio(block_means(key, 16), torch.stack(wanted).view(2, 3, 3, 20))}


POOLED = [  # batch, heads, KV heads, n, N, head size, block, queries
    (1, 4, 2, 70, 70, 16, 16, "each"), (2, 9, 3, 37, 101, 64, 32, "each"), (1, 4, 4, 1, 33, 80, 16, "each"),
    (1, 6, 3, 50, 90, 16, 24, "all"), (1, 8, 1, 65, 65, 128, 64, "all"),
]  # fmt: skip


def run_pooled(device, seed, batch, heads, kv_heads, n, length, d, block, queries, dtype=FP32):
    """Every sum written out: for all queries of a block, for all blocks up to it."""
    from surgery.kernels.estimators import pooled_mass

    query, key, _, _ = inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device)
    columns, start = -(-length // block), length - n
    key_blocks = [key[:, :, j * block : (j + 1) * block].double() for j in range(columns)]
    middle = torch.stack([key_block.mean(2) for key_block in key_blocks], 2)
    bias = torch.tensor([key_block.shape[2] for key_block in key_blocks], device=device).double().log()[None, None]
    result = pooled_mass(query, middle.float(), bias.float(), 0.3, block, length, queries)
    middle = middle.repeat_interleave(heads // kv_heads, 1)
    wanted = torch.zeros(result.shape, dtype=torch.float64, device=device)
    for line in range(result.shape[2]):
        own = start // block + line
        rows = [i - start for i in range(own * block, min((own + 1) * block, length)) if i >= start]
        scores = torch.einsum("bhid,bhjd->bhij", query[:, :, rows].double(), middle[:, :, : own + 1]) * 0.3
        scores = (scores + bias[:, :, None, : own + 1]).exp()
        if queries == "each":
            wanted[:, :, line, : own + 1] = (scores / scores.sum(-1, keepdim=True)).sum(2)
        else:
            wanted[:, :, line, : own + 1] = scores.sum(2) / scores.sum((2, 3))[..., None]
    return {
        "out": ratio(result, wanted),
        "holes": int((~result.isfinite()).sum() + ((result != 0) & (wanted == 0)).sum()),
    }


CROSSED = [  # batch, heads, KV heads, n, N, head size, block, stride
    (1, 4, 2, 64, 64, 16, 32, 8), (2, 6, 3, 37, 101, 64, 32, 4), (1, 4, 4, 1, 33, 80, 16, 16),
    (1, 8, 1, 50, 90, 16, 32, 2), (1, 3, 1, 65, 70, 128, 64, 16),
]  # fmt: skip


def run_crossed(device, seed, batch, heads, kv_heads, n, length, d, block, stride, dtype=FP32):
    """Antidiagonals pair by pair, in loops over groups."""
    from surgery.kernels.estimators import antidiagonal_mass

    query, key, _, _ = inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device)
    result = antidiagonal_mass(query, key, 0.3, block, stride)
    start = length - n
    products = torch.zeros(batch, heads, length, length, dtype=torch.float64, device=device)
    wide = key.double().repeat_interleave(heads // kv_heads, 1)
    products[:, :, start:] = torch.einsum("bhid,bhjd->bhij", query.double(), wide) * 0.3
    wanted = torch.zeros(result.shape, dtype=torch.float64, device=device)
    for group in range(start // stride, -(-length // stride)):
        scores = []
        for other in range(group + 1):
            pairs = [(group * stride + stride - 1 - c, other * stride + c) for c in range(stride)]
            pairs = [(i, j) for i, j in pairs if start <= i < length and (other < group or j <= i)]
            real = [products[:, :, i, j] for i, j in pairs if j < length]
            scores.append(sum(real) / len(pairs) if pairs else torch.full_like(products[:, :, 0, 0], -torch.inf))
        shares = torch.stack(scores, -1).exp()
        shares = (shares / shares.sum(-1, keepdim=True)).nan_to_num()
        for other in range(group + 1):
            wanted[:, :, group * stride // block - start // block, other * stride // block] += shares[..., other]
    return {
        "out": ratio(result, wanted),
        "holes": int((~result.isfinite()).sum() + ((result != 0) & (wanted == 0)).sum()),
    }


def register(kernel, run, fields, rows, half=()):
    """A case in float32 for every row of sizes, in the other types for the rows whose index is in `half`."""
    for index, sizes in enumerate(rows):
        sizes_by_name = dict(zip(fields, sizes, strict=True))
        for label, dtype in {"fp32": FP32, "fp16": FP16, "bf16": BF16}.items():
            if label == "fp32" or index in half:
                case(f"{kernel} {label} {sizes}", **sizes_by_name, dtype=dtype)(run)


ATTENTION = ("batch", "heads", "kv_heads", "n", "length", "d")
BAND, RINGS = (
    (*ATTENTION, "sinks", "window", "pads"),
    ("groups", "ring", "steps", "d", "sinks", "window", "pads", "piece"),
)
register("streaming", run_streaming, BAND, STREAMING, half=(4,))
register("streaming_apart", run_apart, BAND, APART, half=(0,))
case("streaming_apart fp32 limit", **dict(zip(BAND, APART[3], strict=True)), limit=30)(run_apart)
register("gathered", run_gathered, (*ATTENTION, "pads", "share"), GATHERED, half=(3,))
register("decode", run_decode, RINGS, DECODE, half=(0,))
register("pooled", run_pooled, (*ATTENTION, "block", "queries"), POOLED, half=(1,))
register("antidiagonal", run_crossed, (*ATTENTION, "block", "stride"), CROSSED, half=(1,))
case("streaming fp32 soft-cap, limit", **dict(zip(BAND, STREAMING[5], strict=True)), softcap=2.0, limit=30)(
    run_streaming
)
case("gathered fp32 soft-cap", **dict(zip((*ATTENTION, "pads", "share"), GATHERED[4], strict=True)), softcap=2.0)(
    run_gathered
)
case("decode fp32 soft-cap, limit", **dict(zip(RINGS, DECODE[4], strict=True)), softcap=2.0, limit=12)(run_decode)


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    chosen = {name: run for name, run in CASES.items() if not wanted or any(word in name for word in wanted)}
    json.dump({name: run("cpu") for name, run in chosen.items()}, sys.stdout)


if __name__ == "__main__":
    main()
