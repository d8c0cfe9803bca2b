"""The speed of this machine, measured on small products once in a process, for the time estimates of `plan`.

A product of a text's hidden states with a weight is timed on one thread, by the thread's CPU time, so that waiting for
other programs does not count. A whole model reaches the share EFFICIENCY of this speed. On one core of an AMD EPYC,
SmolLM2-135M reached 0.69 during scoring, 0.73 in a recall test, and 0.78 during the measurement of its heads.

n threads are less than n times as fast, and gain least in small products. A second thread made SmolLM2's products over
one text of 512 tokens faster by a third. With two texts at a time, the speed nearly doubled (`parallel.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

EFFICIENCY = 0.7
ROWS = 512  # tokens of a text
# n threads are n ** GAIN_NARROW times as fast below NARROW channels, and n ** GAIN_WIDE times from there on.
NARROW, GAIN_NARROW, GAIN_WIDE = 2048, 0.6, 0.9
# The most seconds, the fewest repeats (the first call is slow) and the most, for which a product is timed.
SECONDS, FEWEST, TIMES = 0.3, 2, 40
STREAMED = 1 << 24  # size of a weight that is too large for a CPU's cache


@functools.lru_cache
def flops_per_second(hidden: int, inner: int, device: str = "cpu", dtype: str = "float32") -> float:
    """Floating-point operations per second that a model of these widths reaches.

    On the CPU that is on PyTorch's threads.
    """
    import torch

    options = {"device": device, "dtype": getattr(torch, dtype)}
    left, right = torch.ones(ROWS, hidden, **options), torch.ones(hidden, inner, **options)
    if torch.device(device).type != "cpu":
        return EFFICIENCY * 2 * ROWS * hidden * inner / _quickest_there(lambda: left @ right)
    one = 2 * ROWS * hidden * inner / _quickest(lambda: left @ right)
    return EFFICIENCY * one * torch.get_num_threads() ** (GAIN_NARROW if hidden < NARROW else GAIN_WIDE)


@functools.lru_cache
def bytes_per_second(device: str = "cpu") -> float:
    """Bytes of weights that a device reads per second, which limits the speed of generating token by token."""
    import torch

    side = int(STREAMED**0.5)
    weight, state = torch.ones(side, side, device=device), torch.ones(side, device=device)
    if torch.device(device).type != "cpu":
        return EFFICIENCY * 4 * side * side / _quickest_there(lambda: (weight @ state)[None])
    return EFFICIENCY * 4 * side * side / _quickest(lambda: weight @ state)


def _quickest_there(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls on a GPU, by the wall clock."""
    return _fastest(lambda: work()[0, 0].item(), time.perf_counter)  # reading a number waits for the GPU


def _quickest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls, on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fastest(work, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def _fastest(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of several calls, by a clock."""
    best, began = float("inf"), time.monotonic()
    for done in range(1, TIMES + 1):
        before = clock()
        work()
        best = min(best, clock() - before)
        if done >= FEWEST and time.monotonic() - began > SECONDS:
            break
    return max(best, 1e-6)
