"""`surgery ARGS` with FSDP on CPU processes, which torch can do and accelerate cannot ask it for.

accelerate (1.15) reads FSDP's settings only where its processes are of an accelerator's kind (MULTI_GPU, ...). Here it
is told that these are, on CPU devices and gloo; nothing else is changed, and what shards and trains is torch's FSDP2.
For `accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 tests/fsdp_on_cpu.py ARGS`.
"""

from __future__ import annotations

import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from surgery.cli import main
from surgery.healing import sharding


def begin(self, cpu=False, sagemaker_dp=False, backend=None):
    torch.distributed.init_process_group("gloo")
    self.device = torch.device("cpu")
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState._prepare_backend = begin
    sharding._refuse_fsdp = lambda: None
    main(sys.argv[1:])
