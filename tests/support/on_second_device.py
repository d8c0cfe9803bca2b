"""Convert tiny models on the CPU and on a second device: `python on_second_device.py [OPERATION...]`, JSON on stdout.

For each operation: the largest difference of a weight to the one converted on the CPU, as a share of the weights'
size; the devices on which weights lie; the share of the multiply-adds that ran on the second device, and those that
did not, by operation; the most bytes alive there. With `--router-on-cpu` the regression of `moh` is computed on the
CPU, which must be seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from second_device import NAME, Work

# isort: split
from families import build
from tokenizers_of_bytes import byte_tokenizer

import surgery

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 1024,
}  # fmt: skip
SMALL = {"calibration_samples": 4, "calibration_length": 64}
TEXT = SMALL | {"calibration_text": "builtin"}  # text that a model writes would differ: the CPU's writes in bfloat16
OPERATIONS = {
    "gqa": {"op": "gqa", "kv_heads": 1, "method": "closed_form", **TEXT},
    "gqa by means": {"op": "gqa", "kv_heads": 1, "method": "mean"},
    "duo_attention": {"op": "duo_attention", "streaming_ratio": 0.5, "sinks": 2, "window": 8},
    "moh": {"op": "moh", "active_ratio": 0.5, **SMALL},
    "mae": {"op": "mae", **SMALL},
    "prune_heads": {"op": "prune_heads", "granularity": "kv_group", "per_layer": 1, **TEXT},
    "zero_tuning": {"op": "sink_calibration", "method": "zero_tuning", **SMALL},
    "act": {"op": "sink_calibration", "method": "act", **SMALL},
    "learned": {"op": "sink_calibration", "method": "learned", "logit": -2.0},
    "sparse_prefill": {"op": "sparse_prefill", "method": "streaming", "block": 16, "dense_below": 0},
}


def converted(step: dict, device: str):
    """A tiny model with random weights on this device, converted in memory."""
    model = build("Llama", **SIZES).eval().to(device)
    recipe = {"version": 1, "name": "made", "operations": [step], "evaluate": None}
    surgery.apply(recipe, model, tokenizer=byte_tokenizer())
    return model


def compared(step: dict) -> dict:
    """What one operation does on the second device, beside the CPU."""
    expected = converted(step, "cpu").state_dict()
    with Work() as work:
        found = converted(step, NAME).state_dict()
    assert found.keys() == expected.keys()
    difference = max(
        float((found[name].cpu().double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-9))
        for name, tensor in expected.items()
    )
    return {
        "difference": difference,
        "devices": sorted({tensor.device.type for tensor in found.values()}),
        "share": work.share,
        "on_cpu": {name: count for name, count in work.cpu.most_common() if count},
        "multiply_adds": sum(work.second.values()),
        "peak_bytes": work.peak,
    }


def put_router_on_cpu() -> None:
    """Let the sums of `moh`'s regression be made on the CPU, as a careless `.cpu()` would."""
    from surgery.operations.moh.router import RegressionSums

    init, add = RegressionSums.__init__, RegressionSums.add
    RegressionSums.__init__ = lambda sums, inputs, outputs, device=None: init(sums, inputs, outputs)
    RegressionSums.add = lambda sums, x, y: add(sums, x.cpu(), y.cpu())


def main() -> None:
    torch.set_num_threads(1)  # `Work` counts this thread
    asked = sys.argv[1:]
    if "--router-on-cpu" in asked:
        asked.remove("--router-on-cpu")
        put_router_on_cpu()
    json.dump({name: compared(OPERATIONS[name]) for name in asked or OPERATIONS}, sys.stdout)


if __name__ == "__main__":
    main()
