"""Models with sparse prefill, and their attention written out."""

from __future__ import annotations

import copy

import pytest
import torch
from families import TINY

from surgery.runtime import modeling_surgery as runtime

LENGTH, PADS, BLOCK = 150, (0, 11, 0, 37), 16


NARROW = {"method": "streaming", "block": BLOCK, "sinks": 4, "window": 20}


def base_of(name: str):
    field = "n_positions" if name == "gpt2" else "max_position_embeddings"
    return TINY[name](**{field: 256}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bases():
    return {}


@pytest.fixture
def base(request, bases):
    if request.param not in bases:
        bases[request.param] = base_of(request.param)
    return bases[request.param]


def sparsened(base, sparse: dict, **more):
    model = copy.deepcopy(base)
    layers = base.config.get_text_config().num_hidden_layers
    runtime.patch(model, {"layers": [{"sparse": sparse} | more] * layers})
    return model


def draw(seed: int, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def written_out(query, key, value, kept, block, scale, softcap=None):
    """The definition, pair by pair, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    (_, heads, n, _), (_, kv_heads, length, _) = query.shape, key.shape
    key, value = (tensor.repeat_interleave(heads // kv_heads, 1) for tensor in (key, value))
    kept, past = kept.repeat_interleave(heads // kept.shape[1], 1), length - n
    scores = query @ key.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    for i in range(n):
        for j in range(length):
            mine, its = (past + i) // block, j // block
            if j > past + i:
                scores[:, :, i, j] = -torch.inf
            elif its != mine:
                scores[:, :, i, j] += torch.where(kept[:, :, mine - past // block, its], 0.0, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def ends(chunks: list[int]) -> list[int]:
    return [sum(chunks[: i + 1]) for i in range(len(chunks))]


def recipe(*steps: dict) -> dict:
    return {"version": 1, "name": "test", "operations": list(steps), "evaluate": None}
