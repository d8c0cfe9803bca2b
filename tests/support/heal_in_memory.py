"""Heals a model in memory in each process: `torchrun ... heal_in_memory.py BASE`; each prints what it then has."""

from __future__ import annotations

import hashlib
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.healing.distributed import PATIENCE, processes

if __name__ == "__main__":
    base = sys.argv[1]
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    surgery.apply("mqa", model, tokenizer=tokenizer)
    settings = {"method": "parts", "data": "self", "minutes": 0.05, "length": 16, "batch_tokens": 32}
    done = surgery.heal(model, base, tokenizer=tokenizer, precision="float32", eval_every=0, **settings).data["heal"]
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.float().numpy().tobytes())
    if processes().num_processes > 1:
        from torch.distributed.distributed_c10d import _get_default_group

        backend = _get_default_group()._get_backend(processes().device)
        assert backend.options._timeout == PATIENCE, backend.options._timeout
    line = f"healed {done['processes']} {done['steps']} {done['data']['sha256']} {digest.hexdigest()}\n"
    print(line, end="", flush=True)  # in one write: both processes print to the same pipe
