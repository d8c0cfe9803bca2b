"""Models that carry biases and virtual keys, and random attention to compare them with."""

from __future__ import annotations

import copy

import torch

from surgery.runtime import modeling_surgery as runtime

WINDOW = 5


FAMILIES = ["llama", "qwen3", "gemma2", "gpt_oss"]


SPLITS = {"none": None, "sinks": 2, "no sinks": 0}  # sinks of the streaming heads; None: no head streams


def entries(model, sinks: int | None, tensors: list[dict], stand_in: bool, **more) -> list[dict]:
    """The layers of the block: KV heads 1 and 3 stream in layer 0, 0 and 1 in layer 1. `more`: keys of every entry."""
    entries_of_layers = []
    for heads, tensors_of_layer in zip(([1, 3], [0, 1]), tensors, strict=True):
        split = {} if sinks is None else {"streaming": heads, "sinks": sinks, "window": WINDOW}
        shapes = {"parameters": {name: list(tensor.shape) for name, tensor in tensors_of_layer.items()}}
        entries_of_layers.append(split | shapes | ({"stand_in": True} if stand_in else {}) | more)
    return entries_of_layers


def operated(base, sinks, tensors, stand_in=False, **more):
    model = copy.deepcopy(base).eval()
    runtime.patch(model, {"layers": entries(base, sinks, tensors, stand_in, **more)})
    with torch.no_grad():
        for module, tensors_of_layer in zip(runtime.attention_modules(model), tensors, strict=True):
            for name, tensor in tensors_of_layer.items():
                getattr(module, name).copy_(tensor)
    return model


def random_attention(seed: int = 0, n: int = 5, keys: int = 7, d: int = 3):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, 3, size, d, generator=generator, dtype=torch.float64) for size in (n, keys, keys)
    )
    return query, key, value
