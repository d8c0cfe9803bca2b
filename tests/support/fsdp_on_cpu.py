"""`surgery ARGS` with FSDP on CPU processes, which torch can do and accelerate cannot ask it for.

accelerate (1.15) reads FSDP's settings only where its processes are of an accelerator's kind (MULTI_GPU, ...). Here it
is told that these are, on CPU devices and gloo; nothing else is changed, and what shards and trains is torch's FSDP2.
For `accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 tests/fsdp_on_cpu.py ARGS`.

It says at the end whether what trained was shared out. STOP_AT in the environment: dies before that step.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from surgery.cli.main import main
from surgery.healing import callbacks as callbacks
from surgery.healing import distributed as distributed

shared = []


def begin(self, cpu=False, sagemaker_dp=False, backend=None):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    self.device = torch.device("cpu")
    return "gloo", DistributedType.MULTI_GPU


def full_tensor(parameter, known=distributed.full_tensor):
    shared.append(hasattr(parameter, "full_tensor") and all(each.is_shard() for each in parameter.placements))
    return known(parameter)


def on_step_begin(self, args, state, control, known=callbacks.HealCallback.on_step_begin, **kwargs):
    if state.global_step == int(os.environ.get("STOP_AT", "-1")):
        os._exit(9)
    return known(self, args, state, control, **kwargs)


if __name__ == "__main__":
    PartialState._prepare_backend = begin
    distributed._refuse_fsdp = lambda: None
    distributed.full_tensor = full_tensor
    callbacks.HealCallback.on_step_begin = on_step_begin
    try:
        main(sys.argv[1:])
    finally:
        print(f"shared out: {bool(shared) and all(shared)}", flush=True)
