"""How fast this machine computes: measured on small products, once in a process, for the times that `plan` gives.

A product of a text's hidden states with a weight is timed on one thread, in the time that the thread itself had: what
it waits for other programs does not count. What a whole model reaches of it is EFFICIENCY: on one core of an AMD EPYC,
SmolLM2-135M reached 0.69 when it was scored, 0.73 in a recall test, and 0.78 while its heads were measured.

More threads gain less than their number, and least where products are small: SmolLM2's over one text of 512 tokens
gained a third from a second thread, and nearly double where two texts were computed at a time (`parallel.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

EFFICIENCY = 0.7
ROWS = 512  # tokens of a text
NARROW, GAIN_NARROW, GAIN_WIDE = 2048, 0.6, 0.9  # n threads are as fast as n ** gain, below so many channels and above
SECONDS, TIMES = 0.3, 40  # at most so long, and so often, a product is timed
STREAMED = 1 << 24  # numbers of a weight that no cache of a CPU holds


@functools.lru_cache
def flops_per_second(hidden: int, inner: int) -> float:
    """Floating-point operations a second that a model of these widths reaches in float32, on PyTorch's threads."""
    import torch

    left, right = torch.ones(ROWS, hidden), torch.ones(hidden, inner)
    one = 2 * ROWS * hidden * inner / _quickest(lambda: left @ right)
    return EFFICIENCY * one * torch.get_num_threads() ** (GAIN_NARROW if hidden < NARROW else GAIN_WIDE)


@functools.lru_cache
def bytes_per_second() -> float:
    """Bytes of weights that are read in a second: what bounds a text that is written token by token."""
    import torch

    side = int(STREAMED**0.5)
    weight, state = torch.ones(side, side), torch.ones(side)
    return EFFICIENCY * 4 * side * side / _quickest(lambda: weight @ state)


def _quickest(work: Callable[[], Any]) -> float:
    """Seconds of the quickest of several calls, on one thread."""
    import torch

    threads, best, began = torch.get_num_threads(), float("inf"), time.monotonic()
    torch.set_num_threads(1)
    try:
        for _ in range(TIMES):
            before = time.thread_time()
            work()
            best = min(best, time.thread_time() - before)
            if time.monotonic() - began > SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return max(best, 1e-6)
