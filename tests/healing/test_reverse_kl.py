"""Reverse KL against loops in float64, finite differences and autograd; of the whole distribution and of k tokens."""

from __future__ import annotations

import math

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)

from surgery.healing.callbacks import read
from surgery.healing.losses import find, objective
from surgery.healing.losses.base import BaseLogits, BaseTopK, LogitLoss, LossInputs
from surgery.healing.teacher import top_k_and_rest

BATCH, LENGTH, VOCABULARY = 2, 5, 11


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)


def stored(base: torch.Tensor, k: int, temperature: float) -> BaseTopK:
    kept = [top_k_and_rest(row, k, temperature) for row in base]
    return BaseTopK(*(torch.stack(parts) for parts in zip(*kept, strict=True)))


def reverse_kl(student, base, temperature=1.0, loss=None):
    kept = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    kept[0, 2] = False
    inputs = LossInputs(kept, base=base, temperature=temperature)
    return objective.measure(student, {"reverse_kl": (1.0, loss or find("reverse_kl"))}, inputs)[0]


def by_hand(student, base, temperature, tokens=None) -> float:
    """The loop: of k tokens and the rest where `tokens` [batch, length, k] says which."""
    total = []
    for b in range(BATCH):
        for t in range(LENGTH):
            if (b, t) == (0, 2):
                continue
            q, p = (
                [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in row) for x in row]
                for row in (student[b, t].tolist(), base[b, t].tolist())
            )
            if tokens is not None:
                order = tokens[b, t].tolist()
                q, p = ([each[i] for i in order] + [1 - sum(each[i] for i in order)] for each in (q, p))
            total.append(temperature**2 * sum(x * math.log(x / y) for x, y in zip(q, p, strict=True)))
    return sum(total) / len(total)


@pytest.fixture(params=[1, 1 << 20], ids=["chunks of a row", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(objective.CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_loop(temperature):
    student, base = logits(0), logits(1)
    whole = reverse_kl(student, BaseLogits(base), temperature).item()
    assert whole == pytest.approx(by_hand(student, base, temperature), rel=1e-12)
    few = reverse_kl(student, stored(base, 4, temperature), temperature).item()
    assert few == pytest.approx(by_hand(student, base, temperature, base.topk(4).indices), rel=1e-9)
    assert few < whole
    every = reverse_kl(student, stored(base, VOCABULARY, temperature), temperature).item()
    assert every == pytest.approx(whole, rel=1e-12)


def test_it_is_the_kl_with_both_sides_exchanged():
    student, base = logits(0), logits(1)
    inputs = LossInputs(torch.ones(BATCH, LENGTH, dtype=torch.bool), base=BaseLogits(student))
    kl = objective.measure(base, {"kl": (1.0, find("kl"))}, inputs)[1]["kl"]
    inputs = LossInputs(torch.ones(BATCH, LENGTH, dtype=torch.bool), base=BaseLogits(base))
    means = objective.measure(student, {name: (1.0, find(name)) for name in ("kl", "reverse_kl")}, inputs)[1]
    assert means["reverse_kl"].item() == pytest.approx(kl.item(), rel=1e-12)
    assert means["kl"].item() != pytest.approx(kl.item(), rel=1e-3)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [None, 1, 4, VOCABULARY])
def test_its_gradient_is_that_of_finite_differences(temperature, k):
    base = BaseLogits(logits(1)) if k is None else stored(logits(1), k, temperature)
    assert torch.autograd.gradcheck(lambda x: reverse_kl(x, base, temperature), [logits(0).requires_grad_()])


class ByAutograd(LogitLoss):
    """The formula alone."""

    summary, goal, method = "Reverse KL.", "the base", "reverse KL"

    def rows(self, chunk, inputs):
        log_q = (chunk.logits / inputs.temperature).log_softmax(-1)
        log_p = (inputs.base.flat[chunk.rows] / inputs.temperature).log_softmax(-1)
        return inputs.temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_gradient_is_that_of_the_fallback(temperature):
    student, base = logits(0).requires_grad_(), BaseLogits(logits(1))
    losses = [reverse_kl(student, base, temperature, loss) for loss in (None, ByAutograd())]
    found, want = (torch.autograd.grad(loss, student)[0] for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    assert (found - want).abs().max() < 1e-14
    assert not found[0, 2].any(), "a row that does not count"


def test_of_itself_it_is_zero_and_has_no_slope():
    student = logits(1).requires_grad_()
    for base in (BaseLogits(student), stored(student.detach(), 4, 1.0)):
        (slope,) = torch.autograd.grad(loss := reverse_kl(student, base), student)
        assert abs(loss.item()) < 1e-14
        assert slope.abs().max() < 1e-14


@pytest.mark.parametrize("far", [200.0, 2000.0])
def test_it_is_finite_where_one_side_excludes_what_the_other_says(far):
    """In float32: a student that gives all mass, or none, to the base's tokens; a base without a rest."""
    base = logits(1).float()
    for k in (4, VOCABULARY):
        values, indices, rest = (
            torch.stack(parts) for parts in zip(*(top_k_and_rest(row, k, 1.0) for row in base), strict=True)
        )
        for sign in (1, -1):
            for left in (rest, torch.full_like(rest, -math.inf)):
                student = torch.zeros_like(base).scatter(2, indices[..., :4], sign * far).requires_grad_()
                loss = reverse_kl(student, BaseTopK(values, indices, left))
                loss.backward()
                assert loss.isfinite()
                assert student.grad.isfinite().all()


def test_a_training_with_a_stored_teacher_is_the_live_one_s(surgery, model, text, tmp_path):
    """All 64 tokens are kept; the metrics and the card know the loss by its own words."""
    quick = ("--no-check", "--no-eval", "--no-gate", "-q")
    assert surgery("apply", "mqa", model, "-o", "out", *quick).code == 0
    asked = ("heal", "out", f"data={text}", "length=16", "batch_tokens=32", "steps=3", "method=parts")
    asked += ("learning_rate=0.01", "--base", model, *quick, "loss={reverse_kl: 1, ce: 0.1}")
    for name, more in (
        ("live", ()),
        ("stored", ("teacher=stored", "top_k=64")),
        ("few", ("teacher=stored", "top_k=2")),
    ):
        done = surgery(*asked, *more, "-o", name)
        assert done.code == 0, done.err
    live, stored, few = (
        [line["reverse_kl"] for line in read(tmp_path / name / "healing/metrics.jsonl")]
        for name in ("live", "stored", "few")
    )
    assert stored == pytest.approx(live, rel=5e-3)  # float16 on the disk
    assert few[0] < 0.99 * live[0]
    assert "the next token of the text and the base's likely tokens" in (tmp_path / "live/README.md").read_text()
