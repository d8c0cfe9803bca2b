"""Weighted GQA: the mixed weights against a loop, their gradients, and that folding changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from families import TINY, TOKENS, attention_modules, difference, get_head, logits_of, one_thread  # noqa: F401

import surgery
from surgery.config.heal import Heal
from surgery.errors import SurgeryError
from surgery.healing.trainer import SCALAR_RATE, parameter_groups
from surgery.healing.weighted_gqa import add_mixing, fold


def converted(family: str, kv_heads: int = 2):
    base = TINY[family]()
    student = copy.deepcopy(base)
    surgery.apply("gqa", student, kv_heads=kv_heads, method="mean")
    return base, student


def spread(weight, per: str, head):
    """A weight as it multiplies a head [d, n], or [d, n + 1] with the bias, which counts the mean over n."""
    if per != "row":
        return weight.view(-1, 1)
    bias = head.shape[-1] - weight.shape[-1]
    return torch.cat([weight, weight.mean().expand(1, bias)], -1)


@pytest.mark.parametrize("per", ["head", "channel", "row"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "starcoder2"])
def test_weights_are_the_conversions_and_the_weighted_heads(family, per):
    base, student = converted(family)
    before = logits_of(student)
    names = add_mixing(student, base, per)
    assert len(names) == 2 * 2  # K and V of two layers
    assert torch.equal(logits_of(student), before)  # all 0: the conversion's own
    own = [copy.deepcopy(module) for module in attention_modules(converted(family)[1])]
    generator = torch.Generator().manual_seed(0)
    mixed = {}
    for name in names:
        p = student.get_parameter(name)
        p.data = torch.randn(p.shape, generator=generator)
        mixed[name] = p.detach().double()
    changed = logits_of(student)
    assert difference(changed, before) > 0.1
    assert fold(student) in (4, 8)  # with biases 8
    assert difference(logits_of(student), changed) < 1e-5
    assert set(student.state_dict()) == set(converted(family)[1].state_dict())
    for layer, (module, first, old) in enumerate(
        zip(attention_modules(student), own, attention_modules(base), strict=True)
    ):
        for part in "kv":
            weights = next(w for name, w in mixed.items() if f".{layer}." in name and f"{part}_proj" in name)
            for head in range(2):
                want = get_head(student, first, part, head)
                for member in range(2):
                    theirs = get_head(base, old, part, 2 * head + member)
                    want = want + spread(weights[head, member], per, theirs) * theirs
                assert (get_head(student, module, part, head) - want).abs().max() < 1e-5


@pytest.mark.parametrize("per", ["head", "row"])
@pytest.mark.parametrize(("family", "method"), [("llama", "mean"), ("qwen2", "first"), ("starcoder2", "mean")])
def test_heads_that_train_begin_at_their_mean(family, method, per):
    """W' = (W - mean) + sum of w_h W_h: as converted at first; then a loop over heads with values of their own."""
    base = TINY[family]()
    student = copy.deepcopy(base)
    surgery.apply("gqa", student, kv_heads=2, method=method)
    first, before = copy.deepcopy(student), logits_of(student)
    names = add_mixing(student, base, per, train_heads=True)
    assert difference(logits_of(student), before) < 1e-5
    generator, values = torch.Generator().manual_seed(0), {}
    for name in names:
        p = student.get_parameter(name)
        p.data = torch.randn(p.shape, generator=generator) / 4
        values[name] = p.detach().double()
    own = [module for name, module in student.named_modules() if name.endswith("parametrizations.weight")]
    if method == "mean":
        assert max(each.original.abs().max() for each in own) < 1e-6, "nothing beside the mean"
    fold(student)
    for layer, (module, start, old) in enumerate(zip(*map(attention_modules, (student, first, base)), strict=True)):
        for part in "kv":
            inside = {n: v for n, v in values.items() if f"layers.{layer}." in n and f"{part}_proj" in n}
            weights = next(v for n, v in inside.items() if n.endswith("mixing"))
            heads = next(v for n, v in inside.items() if n.endswith("weight.0.surgery_heads"))
            biases = [v[..., None] for n, v in inside.items() if n.endswith("bias.0.surgery_heads")]
            heads = torch.cat([heads, *biases], -1)
            for head in range(2):
                members = [get_head(base, old, part, 2 * head + member) for member in range(2)]
                want = get_head(first, start, part, head) - (members[0] + members[1]) / 2
                for member in range(2):
                    weight = spread(weights[head, member], per, want)
                    want = want + weight * heads[head, member]
                assert (get_head(student, module, part, head) - want).abs().max() < 1e-5


def test_heads_that_train_have_the_rate_of_other_projections():
    """They are the base's K and V. The mixing weights have a higher rate, as all logits and scalars have."""
    base, student = converted("qwen2")
    student.requires_grad_(False)
    names = add_mixing(student, base, "head", train_heads=True)
    for name in (*names, "model.layers.0.self_attn.q_proj.weight"):
        student.get_parameter(name).requires_grad_(True)
    heal = Heal(steps=1, method="full", learning_rate=0.001, weight_decay=0.1)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(student, heal)
        for p in group["params"]
    }
    rates = {name: found[id(student.get_parameter(name))] for name in names}
    assert {rate for name, rate in rates.items() if name.endswith("weight.0.surgery_heads")} == {(0.001, 0.1)}
    assert {rate for name, rate in rates.items() if name.endswith("bias.0.surgery_heads")} == {(0.001, 0.0)}
    assert {rate for name, rate in rates.items() if name.endswith("mixing")} == {(SCALAR_RATE * 0.001, 0.0)}
    assert len(rates) == 3 * 2 * 2
    assert found[id(student.get_parameter("model.layers.0.self_attn.q_proj.weight"))] == (0.001, 0.1)


def test_the_weights_train_and_find_a_mixture():
    """The student is to have the mixture 0.8, 0.2 of the base's heads; from their mean it gets there."""
    base, student = converted("llama")
    wanted = copy.deepcopy(student)
    names = add_mixing(wanted, base)
    for name in names:
        wanted.get_parameter(name).data[..., 0, 0] = 0.3
        wanted.get_parameter(name).data[..., 1, 0] = -0.3
    fold(wanted)
    target = logits_of(wanted).float()
    student.requires_grad_(False)
    trained = [student.get_parameter(name).requires_grad_(True) for name in add_mixing(student, base)]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    losses = []
    for _ in range(150):
        loss = (student(input_ids=TOKENS).logits - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 1e-3 * losses[0]
    assert all((p[:, 0, 0] - 0.3).abs().max() < 0.05 for p in trained)


def test_an_order_of_heads_is_followed():
    base, student = converted("llama")
    orders = [[0, 3, 1, 2], [2, 0, 3, 1]]
    name = add_mixing(student, base, orders=orders)[0]
    first = copy.deepcopy(attention_modules(converted("llama")[1])[0])
    student.get_parameter(name).data[1, 0] = 1.0
    fold(student)
    found = get_head(student, attention_modules(student)[0], "k", 1) - get_head(student, first, "k", 1)
    assert (found - get_head(base, attention_modules(base)[0], "k", 1)).abs().max() < 1e-6


def test_checkpoints_hold_no_head_of_the_base():
    base, student = converted("llama")
    add_mixing(student, base)
    assert not any("heads" in name for name in student.state_dict())


def test_what_cannot_be_mixed_is_refused():
    base = TINY["llama"]()
    with pytest.raises(SurgeryError, match="there is nothing to mix"):
        add_mixing(copy.deepcopy(base), base)
    base, student = converted("phi3")
    with pytest.raises(SurgeryError, match="in one matrix"):
        add_mixing(student, base)
