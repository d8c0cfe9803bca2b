"""Training in several processes: what accelerate's engine shards, and how full tensors are gathered.

The launcher's environment names the engine (`accelerate launch --config_file ...`; examples/accelerate). DDP gives
every process everything. ZeRO-1 shards the optimiser, ZeRO-2 also the gradients, and FSDP and ZeRO-3 also the weights.
No engine shards the base of a distillation: every process holds all of it.

When several processes train together (accelerate launch, torchrun), only the first one writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SettingError
from surgery.io.output_folder import OutputFolder
from surgery.machine.device import note_device
from surgery.machine.placement import CPU, current

if TYPE_CHECKING:
    import torch


ZERO = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}


@dataclass(frozen=True)
class Engine:
    """The processes of a training, and what is sharded over them.

    Attributes:
        name: the engine's name, for people.
        sharded: those of "weights", "gradients" and "optimizer" of which a process holds only a part.
    """

    name: str = ""
    processes: int = 1
    sharded: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Engine:
        """The engine that launched this process.

        Raises:
            SurgeryError: the launcher's settings would change what trains, or how.
        """
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if _says("ACCELERATE_USE_FSDP"):
            _refuse_fsdp()
            return cls("FSDP", processes, ZERO[3])
        if _says("ACCELERATE_USE_DEEPSPEED"):
            stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
            if _says("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
                raise SettingError(
                    "zero3_init_flag would share out models while they are read, the base and the model to save too",
                    where="accelerate's config",
                    fix="zero3_init_flag: false",
                )
            return cls(f"ZeRO-{stage}", processes, ZERO.get(stage, ()))
        return cls("copies (DDP)" if processes > 1 else "", processes)

    def shards(self, what: str) -> int:
        """Over how many processes "weights", "gradients" or "optimizer" are sharded; 1: each process holds all."""
        return self.processes if what in self.sharded else 1


def _says(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _refuse_fsdp() -> None:
    import torch

    where = "accelerate's config"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise SettingError("FSDP's first version is not supported", where=where, fix="fsdp_version: 2")
    if _says("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise SettingError(
            "fsdp_cpu_ram_efficient_loading leaves the models of all processes but the first empty, the base's too",
            where=where,
            fix="fsdp_cpu_ram_efficient_loading: false",
        )
    if not torch.accelerator.is_available():
        raise SettingError(
            "accelerate knows FSDP on accelerators alone: on CPUs it would train whole copies (DDP) without a word",
            where=where,
            fix="distributed_type: MULTI_GPU with use_cpu: true (examples/accelerate/cpu.yaml), which says so",
        )


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The full tensor of a parameter, in every process; all processes must call this."""
    if hasattr(parameter, "full_tensor"):  # FSDP: a DTensor
        return parameter.detach().full_tensor()
    with _gathered(parameter):
        return parameter.detach().clone() if hasattr(parameter, "ds_id") else parameter.detach()


def _gathered(parameter):
    if not hasattr(parameter, "ds_id"):  # ZeRO-3
        return nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters([parameter])


def put(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Write a full tensor into a parameter; this process may hold only a shard of the parameter."""
    import torch

    with torch.no_grad():
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
        parameter.copy_(tensor)


def trainable_tensors(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and full tensors of the parameters that train, on the CPU; every process must iterate over all of them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, full_tensor(parameter).cpu()


PATIENCE = timedelta(days=2)


def on_cpu() -> bool:
    """Whether the training runs on CPUs.

    accelerate and the Trainer must know this. Otherwise they would look for accelerators: each of several processes
    would train by itself, and bfloat16 would be refused.
    """
    import torch

    return current().device == CPU or not torch.accelerator.is_available()


def processes():
    """The state of all processes, `accelerate.PartialState`; a process's first call connects it to the others.

    The timeout is long: the other processes wait while the first one converts, generates text or runs a teacher. This
    takes hours, and torch would give up after minutes. (If a script has connected the processes before, by an
    Accelerator of its own, its timeout holds.)
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    state = PartialState(cpu=on_cpu(), timeout=PATIENCE)
    if on_cpu() and state.device.type != CPU and state.num_processes == 1:  # an earlier run was on a GPU
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=True, timeout=PATIENCE)
    note_device(state.device)  # where this process trains
    return state


class Ranks:
    """The rank of this process, from the launcher's environment; without a launcher it is the only process."""

    def __init__(self):
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.several = self.count > 1
        self.first = not self.several or int(os.environ.get("RANK", "0")) == 0

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.several:
            processes().wait_for_everyone()

    @contextmanager
    def opened(self, out: OutputFolder, needed_bytes: int) -> Iterator[Path]:
        """OUT.partial in every process. The first process creates it, and renames it to OUT when all are done."""
        if self.first:
            with out.opened(needed_bytes) as partial:
                self.wait()
                yield partial
                self.wait()
            return
        self.wait()
        yield out.partial
        self.wait()
