"""Tokens of which the base is sure count more: values and gradients by a formula of their own, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from families import TINY, one_thread  # noqa: F401 (a fixture)

from surgery.config.heal import Heal
from surgery.data.packing import Packed
from surgery.healing.callbacks import read
from surgery.healing.losses import find, objective
from surgery.healing.losses.base import BaseLogits, BaseTopK, LossInputs, predicts
from surgery.healing.teacher import LiveTeacher, StoredTeacher, store

BATCH, LENGTH, VOCABULARY = 2, 7, 11
F64 = torch.float64


def draw(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator, dtype=F64)


def some_labels():
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    labels[0, 0] = labels[0, 3] = labels[1, 0] = -100
    return labels


@pytest.fixture(params=[1, 3 * VOCABULARY, 1 << 20], ids=["a row", "three rows", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(objective.CHUNK, "cpu", request.param)


def rows_of(name, student, teacher, labels, temperature, k=None):
    """Each row's value by autograd's own operations [batch, length]; the last token predicts nothing."""
    if name == "ce":
        target = labels.roll(-1, 1).clamp(min=0)[..., None]
        return -student.log_softmax(-1).gather(-1, target)[..., 0]
    p, q = ((each / temperature).softmax(-1) for each in (teacher, student))
    if k:
        order = teacher.argsort(-1, descending=True)[..., :k]
        p, q = (torch.cat([each.gather(-1, order), 1 - each.gather(-1, order).sum(-1, True)], -1) for each in (p, q))
    ours, theirs = (q, p) if name == "reverse_kl" else (p, q)
    return temperature**2 * (ours * (ours / theirs).log()).sum(-1)


def top_k(teacher, k, temperature):
    log_p = (teacher / temperature).log_softmax(-1)
    values, indices = log_p.topk(k, -1)
    rest = (1 - values.exp().sum(-1)).log()
    return BaseTopK(values, indices, rest)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("stored", [None, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("sure", [0.3, 1.0])
@pytest.mark.parametrize("weights", [{"kl": 1.0}, {"ce": 0.4, "kl": 0.6}, {"reverse_kl": 2.0}, {"ce": 1.0, "kl": 0.0}])
def test_value_and_gradient(weights, sure, temperature, stored):
    student, teacher, labels = draw(0).requires_grad_(), draw(1), some_labels()
    kept = predicts(labels)
    # With temperature 1 or not, the weight is of the distribution that the student is drawn to.
    p = (teacher / temperature).softmax(-1).max(-1).values
    each = (1 - sure) + sure * p
    values = {name: rows_of(name, student, teacher, labels, temperature, stored) for name in weights}
    want = sum(weight * (each * values[name])[kept].sum() / kept.sum() for name, weight in weights.items())
    (slope,) = torch.autograd.grad(want, student)
    base = top_k(teacher, stored, temperature) if stored else BaseLogits(teacher)
    inputs = LossInputs(kept, labels, base, temperature=temperature, sure=sure)
    loss, means = objective.measure(student, {name: (w, find(name)) for name, w in weights.items()}, inputs)
    (found,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    assert torch.allclose(found, slope, rtol=1e-8, atol=1e-12)
    assert not found[~kept].any(), "ignored labels and last tokens"
    for name, mean in means.items():  # as without `sure`
        assert mean.item() == pytest.approx(values[name][kept].mean().item(), rel=1e-9)
    with torch.no_grad():
        again, _ = objective.measure(student, {name: (w, find(name)) for name, w in weights.items()}, inputs)
    assert again.item() == pytest.approx(want.item(), rel=1e-9)


def test_a_count_over_several_forwards_and_a_batch_that_predicts_nothing():
    student, labels = draw(0).requires_grad_(), some_labels()
    inputs = LossInputs(predicts(labels), labels, BaseLogits(draw(1)), sure=0.5)
    losses = {"kl": (1.0, find("kl"))}
    one, ten = (objective.measure(student, losses, inputs, count)[0].item() for count in (1, 10))
    assert ten == pytest.approx(one / 10, rel=1e-12)
    nothing = LossInputs(torch.zeros_like(labels, dtype=torch.bool), labels, BaseLogits(draw(1)), sure=0.5)
    loss, _ = objective.measure(student, losses, nothing)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_0_is_as_without_it_to_the_bit_and_a_sure_base_as_well():
    student, labels = draw(0).float().requires_grad_(), some_labels()
    losses, found = {"kl": (1.0, find("kl"))}, []
    for more in ({}, {"sure": 0.0}):
        inputs = LossInputs(predicts(labels), labels, BaseLogits(draw(1).float()), **more)
        loss, _ = objective.measure(student, losses, inputs)
        found.append((loss.detach(), *torch.autograd.grad(loss, student)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    certain = torch.nn.functional.one_hot(torch.full((BATCH, LENGTH), 3), VOCABULARY) * 1e4
    results = []
    for sure in (0.0, 1.0):
        inputs = LossInputs(predicts(labels), labels, BaseLogits(certain.float()), sure=sure)
        results.append(objective.measure(student, losses, inputs)[0].item())
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_hidden_states_are_not_weighted():
    student, labels, states = draw(0), some_labels(), (draw(2),)
    losses = {"kl": (1.0, find("kl")), "hidden": (2.0, find("hidden"))}
    terms = []
    for sure in (0.0, 1.0):
        inputs = LossInputs(predicts(labels), labels, BaseLogits(draw(1)), states, (draw(3),), sure=sure)
        loss, means = objective.measure(student, losses, inputs)
        alone = LossInputs(predicts(labels), labels, BaseLogits(draw(1)), sure=sure)
        kl, _ = objective.measure(student, {"kl": losses["kl"]}, alone)
        assert (loss - kl).item() == pytest.approx(2 * means["hidden"].item(), rel=1e-12)
        terms.append(kl.item())
    assert terms[1] < terms[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_stored_teacher_weighs_as_a_live_one(tmp_path, temperature):
    base, student = TINY["llama"](), TINY["llama"](seed=1)
    rows = Packed([torch.randint(3, 128, (48,), generator=torch.Generator().manual_seed(2)).tolist()], 16)
    heal = Heal(method="full", steps=1, length=16, batch_tokens=48, sure=0.8, temperature=temperature)
    store(base, rows, tmp_path, top_k=128, temperature=temperature, dtype=torch.float32)
    batch = {name: torch.stack([rows[i][name] for i in range(3)]) for name in rows[0]}
    outputs = student(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    stored = heal.model_copy(update={"teacher": "stored", "top_k": 128})
    one, terms = LiveTeacher(base).loss(outputs, batch, heal)
    two, same = StoredTeacher(tmp_path).loss(outputs, batch, stored)
    assert one.item() == pytest.approx(two.item(), rel=1e-4)
    assert terms["kl"] == pytest.approx(same["kl"], rel=1e-4)
    assert one.item() < terms["kl"]


@pytest.mark.parametrize("loss", ["ce", {"ce": 1, "hidden": 0.5}, {"hidden": 1.0}])
def test_it_is_refused_where_no_base_is_asked_for_probabilities(loss):
    with pytest.raises(ValueError, match=r"heal.sure is read where the base's probabilities are asked"):
        Heal(method="full", steps=1, loss=loss, sure=0.5)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "much"])
def test_it_is_a_share(value):
    with pytest.raises(ValueError, match="sure"):
        Heal(method="full", steps=1, sure=value)


def test_only_who_sets_it_records_it():
    assert "sure" not in Heal(method="full", steps=1).identity()
    assert Heal(method="full", steps=1, sure=0.5).identity()["sure"] == 0.5


def test_a_training_reports_plain_means_and_a_weighted_loss(surgery, model, text, tmp_path):
    quick = ("--no-check", "--no-eval", "-q")
    assert surgery("apply", "mqa", model, "-o", "out", *quick).code == 0
    small = ("length=16", "batch_tokens=32", "steps=4", "learning_rate=0.01", f"data={text}", "method=parts")
    for to, *more in (("plain",), ("sure", "sure=0.5")):
        done = surgery("heal", "out", *small, *more, "-o", to, "--base", model, *quick)
        assert done.code == 0, done.err
    plain, sure = (read(tmp_path / name / "healing/metrics.jsonl") for name in ("plain", "sure"))
    assert sure[0]["kl"] == pytest.approx(plain[0]["kl"], rel=1e-6)
    assert all(0.5 * line["kl"] < line["loss"] < line["kl"] for line in sure)
    card = (tmp_path / "sure/README.md").read_text()
    assert "A token's loss counted 0.5 + 0.5 p, where p is the base's largest probability for it" in card
    shown = surgery("plan", "gqa-distill", model, "heal.sure=0.5", f"heal.data={text}", "heal.length=64")
    assert "heal: a token counts 0.5 + 0.5 p, p the base's largest probability" in shown.out
    without = surgery("plan", "gqa-distill", model, "heal.sure=0", "heal.length=64").out
    assert "heal: towards the base" in without
    assert "counts" not in without
