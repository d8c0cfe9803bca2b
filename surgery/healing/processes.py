"""Several processes of one training (accelerate launch, torchrun): the first one writes, the others train along."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from surgery.io.output_folder import OutputFolder

PATIENCE = timedelta(days=2)


def on_cpu() -> bool:
    """Whether CPUs train. accelerate and the Trainer must be told so: else each of several processes, which would be
    looked for on accelerators, would train by itself, and bfloat16 would be refused."""
    import torch

    return not torch.accelerator.is_available()


def processes():
    """The state of all processes, `accelerate.PartialState`; the first call of a process connects it.

    The others wait for as long as the first converts, lets the base write or asks a teacher: hours, where torch would
    give up after minutes. (Where a script has connected them before, by an Accelerator of its own, its timeout holds.)
    """
    from accelerate import PartialState

    return PartialState(cpu=on_cpu(), timeout=PATIENCE)


class Ranks:
    """Which process this is, by the launcher's environment; alone where there is no launcher."""

    def __init__(self):
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.several = self.count > 1
        self.first = not self.several or int(os.environ.get("RANK", "0")) == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.several:
            processes().wait_for_everyone()

    @contextmanager
    def opened(self, out: OutputFolder, needed_bytes: int) -> Iterator[Path]:
        """OUT.partial in every process: the first makes it, and turns it into OUT when all are done with it."""
        if self.first:
            with out.opened(needed_bytes) as partial:
                self.wait()
                yield partial
                self.wait()
            return
        self.wait()
        yield out.partial
        self.wait()
