"""Layouts: the canonical form holds each family's heads where its own forward reads them; packing is the inverse."""

from __future__ import annotations

import pytest
import torch
from families import (
    TINY,
    attention_modules,
    base,
    get_head,
    head_dim_of,
    key_norm,
    kv_heads_of,
    one_thread,  # noqa: F401
    text_config,
)

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import pack, packed_shapes, unpack


def layers_of(name: str):
    """(facts, module, stored tensors by relative name) of each layer."""
    model = base(name)
    for facts in Anatomy.of(model).layers:
        module = model.get_submodule(facts.path)
        yield facts, module, {n: module.get_parameter(n).detach() for n in facts.tensor_names}


@pytest.mark.parametrize("name", TINY)
def test_canonical_form(name):
    """Rows by the index arithmetic of tests/families.py, output columns by the order of the query heads."""
    model, size = base(name), head_dim_of(base(name))
    found = list(layers_of(name))
    assert [id(module) for _, module, _ in found] == [id(module) for module in attention_modules(model)]
    for facts, module, tensors in found:
        layer = unpack(facts, tensors)
        for part, heads in (("q", text_config(model).num_attention_heads), ("k", kv_heads_of(model))):
            assert len(getattr(layer, part)) == heads
        assert len(layer.v) == len(layer.k)
        for part in "qkv":
            weight, bias = getattr(layer, part), getattr(layer, f"{part}_bias")
            for head in range(len(weight)):
                rows = weight[head].double()
                rows = rows if bias is None else torch.cat([rows, bias[head, :, None].double()], dim=1)
                assert torch.equal(rows, get_head(model, module, part, head)), (part, head)
        output = getattr(module, facts.layout.o)
        weight = output.weight.T if facts.layout.conv1d else output.weight
        for head in range(facts.heads):
            assert torch.equal(layer.o[:, head], weight[:, head * size : (head + 1) * size])
        norms = key_norm(model, module)
        assert (layer.k_norm is None) == (norms is None)
        for head, norm in enumerate(norms or []):
            assert torch.equal(layer.k_norm[head], norm)
        assert (layer.sinks is None) == (not hasattr(module, "sinks"))


@pytest.mark.parametrize("name", TINY)
def test_pack_is_the_inverse(name):
    for facts, _, tensors in layers_of(name):
        layer = unpack(facts, tensors)
        for form in (layer, layer.copy()):
            packed = pack(form)
            assert packed.keys() == tensors.keys()
            assert all(torch.equal(packed[n], tensors[n]) for n in tensors)
            assert all(tensor.is_contiguous() for tensor in packed.values())
        hidden, out = layer.q.shape[-1], layer.o.shape[0]
        assert packed_shapes(facts, hidden, out) == {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "falcon_new", "stablelm_qk_layernorm", "gpt_oss"])
def test_a_copy_shares_no_memory(name):
    for facts, _, tensors in layers_of(name):
        before = {n: t.clone() for n, t in tensors.items()}
        for tensor in unpack(facts, tensors).copy().tensors().values():
            assert tensor.is_contiguous()
            tensor.zero_()
        assert all(torch.equal(before[n], t) for n, t in tensors.items())


def test_nothing_that_follows_heads_is_forgotten():
    """Every parameter of an attention module whose shape depends on a number of heads is among the layer's tensors."""
    shared = {"q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight"}
    shared |= {"q_layernorm.bias", "k_layernorm.bias"}  # Phi's: one norm for all heads
    for name in TINY:
        for facts, module, tensors in layers_of(name):
            for left in {n for n, _ in module.named_parameters()} - set(tensors):
                assert left == f"{facts.layout.o}.bias" or left in shared, (name, left)
                if left in shared:
                    assert module.get_parameter(left).shape == (facts.head_dim,), (name, left)
