"""How long prefill and decoding take, and how many bytes the cache holds: base and patched, interleaved in one run.

A head split is credited only with what it does beyond our own plainest version: the patched model is compared with
the stock model on `DynamicCache`, and with itself with all heads full on the block-growing cache.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import SurgeryError

STOCK, FULL, SPLIT = "base, DynamicCache", "base, block cache", "patched"


@dataclass(frozen=True)
class Timing:
    """One model at one length.

    Attributes:
        prefill, decode: seconds for the prompt, and for one token after it: medians over the rounds.
        prefill_spread, decode_spread: largest over smallest of the rounds.
        cache_bytes: bytes of the tensors that the cache holds after the prompt.
    """

    model: str
    length: int
    prefill: float
    prefill_spread: float
    decode: float
    decode_spread: float
    cache_bytes: int


@dataclass(frozen=True)
class Benchmark:
    """All timings of one run, and the machine they were taken on."""

    machine: str
    rounds: int
    timings: list[Timing]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratios": self.ratios()}

    def ratios(self) -> list[dict[str, float]]:
        """For each length: how many times faster the patched model is, and what share of the bytes it holds."""
        found = []
        for length in dict.fromkeys(t.length for t in self.timings):
            at = {t.model: t for t in self.timings if t.length == length}
            stock, full, split = at[STOCK], at[FULL], at[SPLIT]
            found.append(
                {
                    "length": length,
                    "prefill_vs_stock": stock.prefill / split.prefill,
                    "decode_vs_stock": stock.decode / split.decode,
                    "decode_vs_block_cache": full.decode / split.decode,
                    "cache_bytes_vs_stock": split.cache_bytes / stock.cache_bytes,
                }
            )
        return found


def bench(
    out: str | Path,
    base: str | Path,
    *,
    lengths: tuple[int, ...] = (512, 2048, 8192),
    rounds: int = 3,
    decode: int = 16,
    progress: Callable[[int, int, str], None] | None = None,
) -> Benchmark:
    """Time a surgical checkpoint against its base on random tokens, batch 1.

    Args:
        lengths: prompt lengths in tokens.
        rounds: repetitions; the models take turns within each.
        decode: tokens decoded after each prompt.

    Raises:
        SurgeryError: `out` has no head split, or a length is beyond the base's positions.
    """
    import torch

    from ..hub import resolve
    from ..runtime.modeling_surgery import patch
    from ..scoring import load_model

    stock, model = load_model(resolve(str(base)).path), load_model(out)
    block = getattr(model.config, "surgery", None)
    if not block:
        raise SurgeryError("no head split to time", where=str(out), fix="surgery apply duo-attention MODEL -o OUT")
    longest = getattr(stock.config, "max_position_embeddings", None)
    if longest and max(lengths) + decode > longest:
        raise SurgeryError(
            f"length {max(lengths)} is beyond the base's {longest} positions", fix="choose shorter --lengths"
        )
    split = {"layers": block["layers"]}
    full = {"layers": [{**layer, "streaming": []} for layer in block["layers"]]}
    samples: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    done, total = 0, rounds * len(lengths) * 3
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(stock.config.vocab_size, (1, length), generator=generator)
        for _ in range(rounds):
            for name in (STOCK, FULL, SPLIT):
                if name != STOCK:
                    patch(model, split if name == SPLIT else full)
                one = _run(stock if name == STOCK else model, ids, decode)
                samples.setdefault((name, length), []).append(one)
                done += 1
                if progress:
                    progress(done, total, "bench")
    timings = [_median(name, length, values) for (name, length), values in samples.items()]
    return Benchmark(_machine(), rounds, timings)


def parse_lengths(text: str) -> tuple[int, ...]:
    """ "512,2k,8k" as numbers of tokens (k: thousands).

    Raises:
        SurgeryError: not positive whole numbers.
    """
    try:
        lengths = tuple(int(part.strip().lower().replace("k", "000")) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise SurgeryError(f"lengths are whole numbers with commas between, not {text!r}", fix="--lengths 512,2k")
    return lengths


def _run(model, ids, decode: int) -> tuple[float, float, int]:
    """Seconds of a prefill, seconds of one decoded token, bytes held by the cache after the prompt."""
    import torch

    from ..runtime.modeling_surgery import CACHE

    model.eval()
    gc.collect()
    with torch.no_grad():
        begin = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - begin
        cache, token = out[CACHE], out.logits[:, -1:].argmax(-1)
        held = cache_bytes(cache)
        begin = time.perf_counter()
        for _ in range(decode):
            token = model(input_ids=token, **{CACHE: cache}, use_cache=True).logits[:, -1:].argmax(-1)
    return prefill, (time.perf_counter() - begin) / decode, held


def cache_bytes(cache) -> int:
    """Bytes of the tensors that a cache really holds."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _median(name: str, length: int, values: list[tuple[float, float, int]]) -> Timing:
    prefill, decode, held = zip(*values, strict=True)
    spread = [max(part) / min(part) for part in (prefill, decode)]
    return Timing(name, length, statistics.median(prefill), spread[0], statistics.median(decode), spread[1], max(held))


def _machine() -> str:
    import platform

    import torch

    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
