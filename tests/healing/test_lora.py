"""Adapters on every layout: they train what they should, merge into the model that was there, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from families import TINY, TOKENS, one_thread  # noqa: F401
from torch import nn
from transformers.pytorch_utils import Conv1D

from surgery.architecture.anatomy import Anatomy
from surgery.config.heal import Heal
from surgery.errors import SurgeryError
from surgery.healing.lora import adapt, freeze, merge
from surgery.healing.parameters import select_trainable
from surgery.healing.trainer import SCALAR_RATE, parameter_groups
from surgery.io.model_folder import model_table

LORA = Heal(steps=1, rank=2)
FAMILIES = ["llama", "llama_bias", "qwen3", "phi3", "olmo2", "mixtral", "falcon_new", "gpt2", "gemma2"]


def made(family):
    model = TINY[family]()
    parts = frozenset() if family == "gpt2" else frozenset("kv")

    def is_linear(path):
        return isinstance(model.get_submodule(path), nn.Linear | Conv1D)

    return model, select_trainable(LORA, Anatomy.of(model), model_table(model), parts, is_linear)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_merge(family):
    model, trained = made(family)
    names, before = list(model.state_dict()), logits(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    embedding = model.get_input_embeddings().weight.clone()
    adapted = adapt(model, LORA, trained)
    assert torch.equal(logits(adapted), before), "updates start at zero"
    training = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in training.values()) == trained.count
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in training.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    moved = logits(adapted)
    assert (moved - before).abs().max() > 1e-3
    merged, error = merge(adapted, TOKENS.max().item())
    assert merged is model, "in place"
    assert error < 1e-4
    assert torch.allclose(logits(merged), moved, atol=1e-4)
    assert list(merged.state_dict()) == names
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    assert torch.equal(merged.get_input_embeddings().weight, embedding)


def test_a_merge_that_moves_the_logits_is_refused(monkeypatch):
    model, trained = made("llama")
    adapted = adapt(model, LORA, trained)
    whole = type(adapted.base_model).merge_and_unload

    def broken(self, **kwargs):
        found = whole(self, **kwargs)
        with torch.no_grad():
            found.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        return found

    monkeypatch.setattr(type(adapted.base_model), "merge_and_unload", broken)
    with pytest.raises(SurgeryError, match="merging the adapters moved the logits"):
        merge(adapted, 64)


def test_what_is_frozen_and_how_fast_the_rest_learns():
    model, _ = made("llama_bias")
    names = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.bias")
    freeze(model, names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)
    attention = model.model.layers[0].self_attn
    for name, shape in (("surgery_router", (4, 64)), ("surgery_log_gamma", (8,))):
        attention.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    heal = Heal(steps=1, method="parts", learning_rate=0.001, weight_decay=0.1)
    groups = parameter_groups(model, heal)
    found = [([tuple(p.shape) for p in each["params"]], each["lr"], each["weight_decay"]) for each in groups]
    assert found == [
        ([(4, 64), (32, 64)], 0.001, 0.1),  # the router is a matrix as others
        ([(32,)], 0.001, 0.0),
        ([(8,)], SCALAR_RATE * 0.001, 0.0),
    ]
