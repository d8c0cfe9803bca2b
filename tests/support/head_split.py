"""Models whose heads are split at random."""

from __future__ import annotations

import copy

import torch

from surgery.runtime import modeling_surgery as runtime

SINKS, WINDOW = 3, 5


def kv_heads(model) -> int:
    text = model.config.get_text_config()
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def random_split(model, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    layers = model.config.get_text_config().num_hidden_layers
    return [
        torch.rand(kv_heads(model), generator=generator).lt(0.5).nonzero().flatten().tolist() for _ in range(layers)
    ]


def operated(model, split, sinks=SINKS, window=WINDOW):
    model = copy.deepcopy(model).eval()
    runtime.patch(model, {"layers": entries(split, sinks, window)})
    return model


def entries(split, sinks=SINKS, window=WINDOW) -> list[dict]:
    return [{"streaming": heads, "sinks": sinks, "window": window} for heads in split]
