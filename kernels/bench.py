"""How fast the kernels are: `python -m surgery.kernels.bench`. Speed is a ratio to PyTorch's attention in one run.

Without a GPU there is nothing to time: then it says what would serve each kind of tensor, and stops. On a GPU that the
kernels do not support it stops with an error.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .block_sparse_prefill import BlockList, block_sparse_prefill
from .estimators import antidiagonal_mass, block_means, pooled_mass
from .gathered_heads import gathered_heads
from .split_decode import HeadTable, Ring, split_decode
from .streaming_prefill import streaming_prefill
from .surgery_triton import executor, failed, unsupported

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 128  # the attention of Llama-3.1-8B and many others
SINKS, WINDOW = 64, 256


def milliseconds(run, repeats: int = 9) -> float:
    """Median time of a call on the GPU, after three calls that are not counted."""
    times = []
    for number in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def random_lists(columns: int, density: float) -> torch.Tensor:
    """A random causal mask of blocks [1, KV heads, columns, columns] with a density, plus block 0 and the diagonal."""
    kept = torch.rand(1, KV_HEADS, columns, columns, device="cuda") < density
    kept[..., 0] = True
    return (kept | torch.eye(columns, dtype=torch.bool, device="cuda")).tril()


def prefill(length: int, dtype: torch.dtype):
    """Yield (label, milliseconds, milliseconds of SDPA) for one prompt."""
    query = torch.randn(1, HEADS, length, SIZE, device="cuda", dtype=dtype)
    key, value = (torch.randn(1, KV_HEADS, length, SIZE, device="cuda", dtype=dtype) for _ in range(2))
    dense = milliseconds(lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True))
    columns = -(-length // BLOCK)
    for density in (1.0, 0.4, 0.2, 0.1):
        kept = random_lists(columns, density)
        share = float(kept.sum() / KV_HEADS / (columns * (columns + 1) / 2))
        blocks = BlockList.of(kept, BLOCK)
        yield (
            f"block_sparse_prefill, {share:.0%} of the blocks",
            milliseconds(lambda blocks=blocks: block_sparse_prefill(query, key, value, blocks)),
            dense,
        )
    yield "making the list of blocks", milliseconds(lambda: BlockList.of(kept, BLOCK)), dense
    means = block_means(key, BLOCK)
    bias = torch.full((1, 1, columns), float(BLOCK), device="cuda").log()
    pooled = lambda: pooled_mass(query, means, bias, SIZE**-0.5, BLOCK, length)  # noqa: E731
    yield "estimators: block means", milliseconds(lambda: block_means(key, BLOCK)), dense
    yield "estimators: pooled", milliseconds(pooled), dense
    yield (
        "estimators: antidiagonals, stride 16",
        milliseconds(lambda: antidiagonal_mass(query, key, SIZE**-0.5, BLOCK, 16)),
        dense,
    )
    yield (
        f"streaming_prefill, {SINKS} + {WINDOW}",
        milliseconds(lambda: streaming_prefill(query, key, value, SINKS, WINDOW)),
        dense,
    )
    for share in (1.0, 0.5):
        on = torch.rand(1, length, HEADS, device="cuda") < share
        yield (
            f"gathered_heads, {share:.0%} of the rows",
            milliseconds(lambda on=on: gathered_heads(query, key, value, on)),
            dense,
        )


def decode(length: int, dtype: torch.dtype):
    """Yield the same for one token, with half of the KV heads on sinks + window; SDPA has all heads full."""
    query = torch.randn(1, HEADS, 1, SIZE, device="cuda", dtype=dtype)
    half, group = KV_HEADS // 2, HEADS // KV_HEADS
    full = [torch.randn(1, KV_HEADS, length, SIZE, device="cuda", dtype=dtype) for _ in range(2)]
    near = [torch.randn(1, half, SINKS + WINDOW, SIZE, device="cuda", dtype=dtype) for _ in range(2)]
    dense = milliseconds(lambda: sdpa(query, *full, enable_gqa=True), 31)
    ring = Ring(*near, length, SINKS)
    table = HeadTable([group] * KV_HEADS, list(range(half, KV_HEADS)), list(range(half)), "cuda")
    kept = tuple(part[:, half:] for part in full)
    yield (
        "split_decode, half of the heads on a ring",
        milliseconds(lambda: split_decode(query, kept, ring, table), 31),
        dense,
    )
    whole = HeadTable([group] * KV_HEADS, list(range(KV_HEADS)), [], "cuda")
    yield "split_decode, all heads full", milliseconds(lambda: split_decode(query, full, None, whole), 31), dense


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m surgery.kernels.bench", description=__doc__)
    parser.add_argument("tokens", nargs="*", type=int, default=[4096, 16384, 32768], help="in the prompt")
    lengths = parser.parse_args().tokens
    if not torch.cuda.is_available():
        print("no GPU here: nothing to time. What a kernel's call runs on this machine:")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            print(f"  {str(dtype).removeprefix('torch.')}: {executor('cpu', dtype, SIZE)}")
        return
    card = torch.cuda.get_device_name()
    if reason := unsupported("cuda", torch.bfloat16, SIZE):
        raise SystemExit(f"nothing was timed on {card}, since every figure would be PyTorch's: {reason}")
    print(f"{card}, torch {torch.__version__}; {executor('cuda', torch.bfloat16, SIZE)}")
    print(f"bfloat16, 1 x {HEADS} heads on {KV_HEADS} KV heads of {SIZE}, blocks of {BLOCK}; medians\n")
    print("| tokens | what | ms | SDPA ms | SDPA / this |")
    print("| --- | --- | --- | --- | --- |")
    with torch.no_grad():
        for length in lengths:
            for times in (prefill, decode):
                for what, taken, dense in times(length, torch.bfloat16):
                    print(f"| {length} | {what} | {taken:.3f} | {dense:.3f} | {dense / taken:.2f} |", flush=True)
    if broken := failed():
        raise SystemExit(f"these figures are PyTorch's: no kernel could be launched for {'; '.join(broken)}")


if __name__ == "__main__":
    main()
