"""Losses of healing against loops in float64, their gradients against finite differences, and the memory they take."""

from __future__ import annotations

import math

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)

from surgery.healing.losses import find, objective
from surgery.healing.losses.base import BaseLogits, LossInputs, predicts
from surgery.healing.losses.ce import cross_entropy
from surgery.healing.losses.hidden import hidden_mse
from surgery.healing.losses.kl import distillation, distillation_top_k

BATCH, LENGTH, VOCABULARY = 2, 7, 11
F64 = torch.float64


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def logits(seed=0, scale=3.0):
    return draw(BATCH, LENGTH, VOCABULARY, seed=seed, scale=scale)


def some_labels():
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    labels[0, 0] = labels[0, 3] = labels[1, 0] = -100
    return labels


def softmax(row, temperature=1.0):
    """By hand: a list of probabilities."""
    powers = [math.exp(float(x) / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def mean_over(kept, of_row):
    rows = [(b, t) for b in range(BATCH) for t in range(LENGTH) if kept[b, t]]
    return sum(of_row(b, t) for b, t in rows) / len(rows)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def sum_of(student, weights, inputs):
    """The weighted sum of losses by name, and each mean."""
    return objective.measure(student, {name: (weight, find(name)) for name, weight in weights.items()}, inputs)


@pytest.fixture(params=[1, 1 << 20], ids=["chunks of a row", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(objective.CHUNK, "cpu", request.param)


def test_a_row_counts_if_its_next_token_is_of_the_same_document():
    kept = predicts(some_labels())
    assert kept.tolist() == [[True, True, False, True, True, True, False], [True] * 6 + [False]]


@pytest.mark.usefixtures("chunks")
def test_cross_entropy_is_the_loop():
    student, labels = logits(), some_labels()
    kept = predicts(labels)
    want = mean_over(kept, lambda b, t: -math.log(softmax(student[b, t])[labels[b, t + 1]]))
    assert cross_entropy(student, labels).item() == pytest.approx(want, rel=1e-12)
    assert cross_entropy(student, labels, count=100).item() == pytest.approx(want * int(kept.sum()) / 100, rel=1e-12)


def test_cross_entropy_is_torchs():
    student, labels = logits(), some_labels()
    want = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert cross_entropy(student, labels).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_loop(temperature):
    student, teacher, kept = logits(), logits(1), predicts(some_labels())

    def of_row(b, t):
        return temperature**2 * kl(softmax(teacher[b, t], temperature), softmax(student[b, t], temperature))

    assert distillation(student, teacher, kept, temperature).item() == pytest.approx(
        mean_over(kept, of_row), rel=1e-12
    )


def top_k(teacher, k, temperature=1.0):
    """By hand: the k largest log-probabilities, their tokens, and the log of what is left, [batch, length, ...]."""
    values, indices, rest = [], [], []
    for row in teacher.flatten(0, 1):
        p = softmax(row, temperature)
        order = sorted(range(VOCABULARY), key=lambda i: -p[i])
        left = sum(p[i] for i in order[k:])
        values.append([math.log(p[i]) for i in order[:k]])
        indices.append(order[:k])
        rest.append(math.log(left) if left else -math.inf)
    tensors = (torch.tensor(each, dtype=dtype) for each, dtype in ((values, F64), (indices, None), (rest, F64)))
    return tuple(tensor.unflatten(0, (BATCH, LENGTH)) for tensor in tensors)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_top_k_is_the_kl_of_k_tokens_and_the_rest(k, temperature):
    student, teacher, kept = logits(), logits(1), predicts(some_labels())
    values, indices, rest = top_k(teacher, k, temperature)

    def buckets(row, order):
        p = softmax(row, temperature)
        return [p[i] for i in order] + ([1 - sum(p[i] for i in order)] if k < VOCABULARY else [])

    def of_row(b, t):
        order = indices[b, t].tolist()
        return temperature**2 * kl(buckets(teacher[b, t], order), buckets(student[b, t], order))

    found = distillation_top_k(student, values, indices, rest, kept, temperature).item()
    assert found == pytest.approx(mean_over(kept, of_row), rel=1e-9)
    whole = distillation(student, teacher, kept, temperature).item()
    assert found == pytest.approx(whole, rel=1e-12) if k == VOCABULARY else found < whole


def test_top_k_of_itself_is_zero_and_has_no_slope():
    teacher = logits(1).requires_grad_()
    loss = distillation_top_k(teacher, *top_k(teacher.detach(), 4), predicts(some_labels()))
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert teacher.grad.abs().max() < 1e-15


@pytest.mark.parametrize("far", [200.0, 2000.0])
def test_top_k_of_what_the_student_excludes_is_finite(far):
    """In float32, with a student that gives the teacher's tokens, or all others, no mass at all."""
    kept = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    values, indices, rest = (t.float() if t.is_floating_point() else t for t in top_k(logits(1), 4))
    for sign in (1, -1):
        student = torch.zeros(BATCH, LENGTH, VOCABULARY).scatter(2, indices, sign * far).requires_grad_()
        loss = distillation_top_k(student, values, indices, rest, kept)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()
        if sign < 0:  # all of the teacher's mass is where the student has e**-far
            p = values.double().exp().sum(-1)
            assert loss.item() == pytest.approx(far * p.mean().item(), rel=0.1)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_are_those_of_finite_differences(temperature):
    labels, teacher = some_labels(), logits(1)
    kept, stored = predicts(labels), top_k(teacher, 4, temperature)
    inputs = LossInputs(kept, labels, BaseLogits(teacher), temperature=temperature)
    functions = [
        lambda x: cross_entropy(x, labels),
        lambda x: distillation(x, teacher, kept, temperature),
        lambda x: distillation_top_k(x, *stored, kept, temperature),
        lambda x: sum_of(x, {"ce": 0.3, "kl": 0.7}, inputs)[0],
    ]
    student = logits().requires_grad_()
    for function in functions:
        assert torch.autograd.gradcheck(function, [student])


def test_rows_that_do_not_count_have_no_slope():
    student, labels = logits().requires_grad_(), some_labels()
    cross_entropy(student, labels).backward()
    assert torch.equal(student.grad.abs().sum(-1) > 0, predicts(labels))


def test_a_batch_without_a_row_that_counts_is_zero():
    labels = torch.full((BATCH, LENGTH), -100)
    student = logits().requires_grad_()
    cross_entropy(student, labels).backward()
    assert not student.grad.any()


def test_terms_share_a_softmax_and_are_named():
    labels, student, teacher = some_labels(), logits(), logits(1)
    kept = predicts(labels)
    inputs = LossInputs(kept, labels, BaseLogits(teacher))
    loss, parts = sum_of(student, {"ce": 0.25, "kl": 0.75}, inputs)
    assert parts["ce"].item() == pytest.approx(cross_entropy(student, labels).item(), rel=1e-12)
    assert parts["kl"].item() == pytest.approx(distillation(student, teacher, kept).item(), rel=1e-12)
    assert loss.item() == pytest.approx(0.25 * parts["ce"].item() + 0.75 * parts["kl"].item(), rel=1e-12)


def test_bfloat16_logits_are_summed_in_float32():
    student, labels = logits().bfloat16().requires_grad_(), some_labels()
    want = cross_entropy(student.detach().double(), labels)
    loss = cross_entropy(student, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert student.grad.dtype == torch.bfloat16


def test_a_factor_on_the_loss_is_one_on_the_gradient_also_the_second_time():
    labels, student = some_labels(), logits().requires_grad_()
    (want,) = torch.autograd.grad(cross_entropy(student, labels), [student])
    loss = 0.5 * cross_entropy(student, labels)
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, [student], retain_graph=True)
        assert (found - 0.5 * want).abs().max() < 1e-15


def test_one_tensor_of_the_logits_size_is_made(monkeypatch):
    """Counted by the allocator: more would not fit where the logits are gigabytes."""
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setitem(objective.CHUNK, "cpu", 1 << 14)
    labels = torch.randint(0, 4096, (1, 512))
    student, teacher = (torch.randn(1, 512, 4096, requires_grad=grad) for grad in (True, False))
    distillation(student, teacher, predicts(labels)).backward()  # what is made once
    student.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = distillation(student, teacher, predicts(labels))
        (gradient,) = torch.autograd.grad(loss, [student])
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    size = student.numel() * 4
    assert size <= peak < 1.2 * size
    assert gradient.shape == student.shape


def test_hidden_states_are_compared_token_by_token():
    ours, theirs = ([draw(BATCH, LENGTH, 5, seed=seed + i) for i in range(3)] for seed in (10, 20))
    kept = predicts(some_labels())
    total = 0.0
    for layer in range(3):
        for b in range(BATCH):
            for t in range(LENGTH):
                if kept[b, t]:
                    s, w = ours[layer][b, t].tolist(), theirs[layer][b, t].tolist()
                    total += sum((x - y) ** 2 for x, y in zip(s, w, strict=True)) / sum(y * y for y in w)
    want = total / (3 * int(kept.sum()))
    assert hidden_mse(tuple(ours), tuple(theirs), kept).item() == pytest.approx(want, rel=1e-12)
    assert hidden_mse(tuple(theirs), tuple(theirs), kept).item() == 0
