"""Models of the families with an attention interface, and splits of their heads at random."""

from __future__ import annotations

import copy

import pytest
import torch
from families import OFF_THE_INTERFACE, TINY

from surgery.architecture.anatomy import Anatomy
from surgery.runtime import modeling_surgery as runtime

SINKS, WINDOW = 3, 5
COMPOSITES = {name for name in TINY if "image" in name or name == "gemma3"}
FAMILIES = [name for name in TINY if name not in OFF_THE_INTERFACE | COMPOSITES]


@pytest.fixture(scope="module")
def bases():
    return {}


@pytest.fixture
def base(request, bases):
    """The model of the family that a test is parametrised by, built once a file."""
    name = request.param
    if name not in bases:
        bases[name] = TINY[name]().eval().requires_grad_(False)
    return bases[name]


def kv_heads(model) -> int:
    return Anatomy.of(model).layers[0].kv_heads


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
