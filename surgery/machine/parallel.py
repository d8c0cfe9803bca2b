"""Parallel work on many small items: on a CPU each thread takes one item, where a single product is too small.

SmolLM2's products over one text of 512 tokens gained a third from a second thread; two texts at a time nearly double.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

WORKERS = 8  # at most: each holds the memory that one item takes

if TYPE_CHECKING:
    import torch

    Result = TypeVar("Result")

_thread = threading.local()  # a thread holds its pools of workers, and the event that cancels what it works on


def parallel_map(
    work: Callable[..., Result], *items: Iterable, device: torch.device, at_once: int = WORKERS
) -> Iterator[Result]:
    """Yield what `work` returns for each item, without gradients, in the order of the items.

    Args:
        work: computes one item; it may write only to what belongs to that item. Long work calls `check_cancelled` now
            and then.
        items: `work` is called with one value of each iterable.
        device: of the tensors.
        at_once: at most so many items, which share the threads; the work on an item may itself call `parallel_map`.
    """
    import torch

    cancelled = threading.Event()

    def compute(item: tuple) -> Result:
        with torch.no_grad():  # the mode belongs to a thread
            return work(*item)

    def compute_on_worker(item: tuple) -> Result:
        _thread.cancelled = cancelled
        return compute(item)

    arguments, threads = list(zip(*items, strict=True)), torch.get_num_threads()
    if device.type != "cpu" or min(threads, len(arguments), at_once) < 2:  # one item has all threads
        yield from map(compute, arguments)
        return
    workers = _workers(min(threads, at_once), threads)
    waiting: deque = deque()
    try:
        for item in arguments:
            waiting.append(workers.submit(compute_on_worker, item))
        while waiting:
            waiting[0].result()  # on Ctrl-C this one is still among those to wait for
            yield waiting.popleft().result()
    finally:
        try:
            _end(waiting, cancelled)
        finally:
            torch.set_num_threads(threads)


def _end(futures: Iterable[Future], cancelled: threading.Event) -> None:
    """Cancel what is not done, and return when no thread works on it: the caller restores what they work on.

    A second Ctrl-C waits as well.
    """
    interrupt = None
    while True:
        try:
            cancelled.set()
            for future in futures:
                future.cancel()
            wait(futures)
            break
        except KeyboardInterrupt as pressed:
            interrupt = pressed
    if interrupt:
        raise interrupt


def check_cancelled() -> None:
    """Raise `CancelledError` where the result of this thread is no longer needed: after an error or Ctrl-C."""
    cancelled = getattr(_thread, "cancelled", None)
    if cancelled is not None and cancelled.is_set():
        raise CancelledError


class OrderedSection:
    """A section of the work on each item that runs in the order of the items, on whichever thread."""

    def __init__(self):
        self._next, self._passed = 0, threading.Condition()

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Wait for the turn of the item at `index`, from 0; the next item follows, unless an error ends this one."""
        with self._passed:
            while self._next != index:
                self._passed.wait(0.1)
                check_cancelled()
        yield
        with self._passed:
            self._next = index + 1
            self._passed.notify_all()


def _workers(count: int, threads: int) -> ThreadPoolExecutor:
    """A pool of `count` workers, which is kept: starting threads again takes a quarter of such work's time.

    A forked process has no threads of its parent, so the process is in the key.
    """
    import torch

    def begin() -> None:
        torch.get_num_threads()  # else the thread would take the process's number when it first computes
        torch.set_num_threads(threads // count)

    pools, key = _thread.__dict__.setdefault("pools", {}), (count, threads, os.getpid())
    if key not in pools:
        pools[key] = ThreadPoolExecutor(count, "surgery worker", initializer=begin)
    return pools[key]
