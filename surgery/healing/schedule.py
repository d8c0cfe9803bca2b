"""How a training runs through its time: the learning rate, the clock, and which row comes when."""

from __future__ import annotations

import math
import time

import torch


def rate_at(fraction: float, warmup: float) -> float:
    """The learning rate as a share of its highest: it rises to 1 in `warmup`, then falls as a cosine to 0.

    Args:
        fraction: how much of the training is over, 0 to 1.
    """
    if fraction < warmup:
        return fraction / warmup
    over = min(1.0, (fraction - warmup) / (1 - warmup))
    return 0.5 * (1 + math.cos(math.pi * over))


class Clock:
    """Seconds of training, those before a resume among them.

    Args:
        minutes: when the time is over; None: never.
    """

    def __init__(self, minutes: float | None = None):
        self.limit = None if minutes is None else 60 * minutes
        self.earlier, self.began = 0.0, time.monotonic()

    def start(self, earlier: float = 0.0) -> None:
        self.earlier, self.began = earlier, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.began

    @property
    def fraction(self) -> float:
        """How much of the time is over; only where there is a limit."""
        return min(1.0, self.seconds / self.limit)


class Rows(torch.utils.data.Dataset):
    """The rows of a data set in shuffled rounds, `count` of them: the n-th is the same in every process and run.

    Args:
        packed: rows by number.
        count: rows in all; more than there are begins the next round, shuffled anew.
        seed: of the order.
    """

    def __init__(self, packed, count: int, seed: int):
        self.packed, self.count, self.seed = packed, count, seed
        self._round: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int):
        return self.packed[self.place(number)]

    def place(self, number: int) -> int:
        """Which row of the data the n-th is."""
        this, place = divmod(number, len(self.packed))
        if self._round[0] != this:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + this)
            self._round = (this, torch.randperm(len(self.packed), generator=generator).tolist())
        return self._round[1][place]
