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


def brute(query, key, value, seen, scale=None, softcap=None, bias=None):
    """Attention and log-sum-exp in float64, every score written out; 0 and -inf where nothing is seen."""
    query, key, value = (part.double().nan_to_num() for part in (query, key, value))
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()[:, :, None]
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    return weights / total.clamp(min=1e-300) @ value, total[..., 0].log()


def ratio(found, wanted) -> float:
    """Root of the mean square of the error over that of the wanted values."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def measure(found, wanted, name="out") -> dict:
    """Errors of (output, lse) or of one tensor; `holes` counts values that are NaN or wrongly finite or infinite."""
    (out, lse), (wanted_out, wanted_lse) = found, wanted
    finite, same = wanted_lse.isfinite(), lse.isneginf() == wanted_lse.isneginf()
    if not finite.any():
        raise RuntimeError("a case in which nothing is seen measures nothing")
    lost = lse[finite].double() - wanted_lse[finite]
    empty = out[~finite]
    return {
        "out": ratio(out[finite], wanted_out[finite]),
        "lse": float(lost.abs().max()),
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


def run_sparse(device, seed, batch, heads, kv_heads, n, length, d, block, pads, per, dtype=FP32, softcap=None, bias=0):
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, pad = inputs(seed, batch, heads, kv_heads, n, length, d, dtype, device, pads)
    kept = random_kept(seed, kv_heads if per == "kv" else heads, batch, n, length, block, pads, 0.6)
    extra = made(seed + 3, batch, bias, length, device=device) if bias else None
    blocks = BlockList.of(kept.to(device), block)
    found = block_sparse_prefill(query, key, value, blocks, pad=pad, softcap=softcap, bias=extra, **poisoned(query))
    seen = seen_blocks(kept, heads, block, n, length, pads).to(device)
    return measure(found, brute(query, key, value, seen, softcap=softcap, bias=extra))


for number, sizes in enumerate(SPARSE):
    names = dict(
        zip(("batch", "heads", "kv_heads", "n", "length", "d", "block", "pads", "per"), sizes, strict=True), dtype=FP32
    )
    case(f"block_sparse fp32 {sizes}", **names)(run_sparse)
    if number % 3 == 1:
        case(f"block_sparse fp16 {sizes}", **(names | {"dtype": FP16}))(run_sparse)
    if number % 4 == 2:
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
case("block_sparse fp32 bias for all heads", **SHAPE, bias=1)(run_sparse)
case("block_sparse fp32 bias per head, soft-cap", **SHAPE, bias=6, softcap=2.0)(run_sparse)


@case("block_sparse fp32 order of the list")
def sparse_order(device, seed):
    """Permuted lists give what sorted ones give, up to rounding."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, _ = inputs(seed, 1, 4, 2, 100, 100, 16, FP32, device)
    blocks = BlockList.of(random_kept(seed, 2, 1, 100, 100, 16, None, 0.8).to(device), 16)
    wanted = block_sparse_prefill(query, key, value, blocks)
    pieces = [piece.flip(0) for piece in torch.tensor_split(blocks.ids, blocks.offsets[1:-1].cpu())]
    turned = BlockList(blocks.offsets, torch.cat(pieces), blocks.heads, blocks.rows, blocks.block)
    if torch.equal(turned.ids, blocks.ids):
        raise RuntimeError("nothing was permuted")
    return measure(block_sparse_prefill(query, key, value, turned), tuple(part.double() for part in wanted))


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
    parts = (part.double().unflatten(2, (3, 32)) for part in (query, key, value))
    return {"out": ratio(out, scaled_dot_product_attention(*parts, is_causal=True).flatten(2, 3))}


@case("block_sparse fp32 two disjoint lists merge")
def sparse_merge(device, seed):
    """o = (o1 e^l1 + o2 e^l2) / (e^l1 + e^l2), where one part, or both, may be empty."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, _ = inputs(seed, 1, 4, 2, 90, 90, 16, FP32, device)
    kept = random_kept(seed, 2, 1, 90, 90, 16, None, 0.7)
    half = kept & (torch.arange(kept.shape[3]) % 2 == 0)
    parts = [
        block_sparse_prefill(query, key, value, BlockList.of(part.to(device), 16)) for part in (half, kept & ~half)
    ]
    (one, first), (two, second) = ((out.double(), lse.double()) for out, lse in parts)
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
    found = block_sparse_prefill(query, key, value, BlockList.of(kept.to(device), 16), out=out, lse=lse)
    return measure(found, brute(query, key, value, seen_blocks(kept, 4, 16, 50, 60, None).to(device)))


@case("block_sparse fp32 a row alone")
def sparse_row_alone(device, seed):
    """A padded batch's row is, to the bit, the row without its padding."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query, key, value, pad = inputs(seed, 2, 4, 2, 40, 70, 16, FP32, device, (21, 0))
    kept = random_kept(seed, 2, 2, 40, 70, 16, (21, 0), 0.6).to(device)
    batch = block_sparse_prefill(query, key, value, BlockList.of(kept, 16), pad=pad)
    alone = block_sparse_prefill(
        query[:1], key[:1, :, 21:], value[:1, :, 21:], BlockList.of(kept[:1, :, :, :4].contiguous(), 16)
    )
    return {"bits": sum(int((a[:1] != b).sum()) for a, b in zip(batch, alone, strict=True))}


@case("block_sparse fp64 reference")
def sparse_reference(device, seed):
    """The reference itself, in float64, with everything at once."""
    from surgery.kernels.block_sparse_prefill import BlockList, reference

    query, key, value, pad = inputs(seed, 3, 6, 3, 40, 70, 16, torch.float64, device, (45, 0, 69))
    bias, kept = made(seed, 3, 6, 70, device=device), random_kept(seed, 3, 3, 40, 70, 16, (45, 0, 69), 0.6)
    found = reference(query, key, value, BlockList.of(kept.to(device), 16), 0.3, pad=pad, softcap=3.0, bias=bias)
    seen = seen_blocks(kept, 6, 16, 40, 70, (45, 0, 69)).to(device)
    return {
        name: value / 1e-4 for name, value in measure(found, brute(query, key, value, seen, 0.3, 3.0, bias)).items()
    }


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    chosen = {name: run for name, run in CASES.items() if not wanted or any(word in name for word in wanted)}
    json.dump({name: run("cpu") for name, run in chosen.items()}, sys.stdout)


if __name__ == "__main__":
    main()
