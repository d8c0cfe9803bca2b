"""The closed forms against planted structure, brute-force optimisation and dense solvers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from families import one_thread  # noqa: F401
from score_fits import SMALL, score_loss, score_problem

from surgery.calibration.closed_form.conjugate_gradient import solve
from surgery.calibration.closed_form.fit_mlp import MLPOutput
from surgery.calibration.closed_form.fit_scores import ScoreObjective, ScoreSample
from surgery.calibration.closed_form.fit_values import ValueProblem, ValueSample
from surgery.calibration.closed_form.low_rank import fit_output, merge_keys, merge_values, shared_channels
from surgery.calibration.moments import Products

D, HEADS, SIZE, LENGTH = 24, 4, 8, 40


def rand(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(bias: bool, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [N, D] with a mean; a bias is one more input that is 1."""
    x = rand(600, D, seed=seed) @ rand(D, D, seed=seed + 1) * D**-0.5 + rand(D, seed=seed + 2)
    return torch.cat([x, torch.ones(600, 1, dtype=torch.float64)], dim=1) if bias else x


def pairs(rotary: int, positions: str) -> list[tuple[int, int]]:
    if positions == "interleaved":
        return [(2 * f, 2 * f + 1) for f in range(rotary // 2)]
    return [(f, f + rotary // 2) for f in range(rotary // 2)]


def phases(rotary: int) -> torch.Tensor:
    """e^{i m theta} [LENGTH, rotary / 2]."""
    frequencies = 10000.0 ** -(torch.arange(rotary // 2, dtype=torch.float64) * 2 / max(rotary, 1))
    return torch.polar(
        torch.ones(LENGTH, rotary // 2, dtype=torch.float64), torch.arange(LENGTH)[:, None] * frequencies
    )


def rotated(z: torch.Tensor, rotary: int, positions: str) -> torch.Tensor:
    """RoPE on [.., LENGTH, d], pair by pair."""
    out, angle = z.clone(), phases(rotary)
    for f, (a, b) in enumerate(pairs(rotary, positions)):
        c, s = angle[:, f].real, angle[:, f].imag
        out[..., a], out[..., b] = z[..., a] * c - z[..., b] * s, z[..., a] * s + z[..., b] * c
    return out


def free_map(rotary: int, positions: str, seed: int) -> torch.Tensor:
    """A random matrix [d, d] that passes through RoPE: a complex number for each pair, anything on the rest."""
    out, numbers = torch.zeros(SIZE, SIZE, dtype=torch.float64), rand(SIZE, seed=seed)
    for f, (a, b) in enumerate(pairs(rotary, positions)):
        re, im = numbers[2 * f], numbers[2 * f + 1]
        out[a, a], out[b, b], out[a, b], out[b, a] = re, re, -im, im
    out[rotary:, rotary:] = rand(SIZE - rotary, SIZE - rotary, seed=seed + 1)
    return out


def attend(q, k, v, o, x, rotary, positions) -> torch.Tensor:
    """Causal attention of H query heads on KV heads given one for each query head: [LENGTH, D]."""
    query, key = (rotated(x @ w.mT, rotary, positions) for w in (q, k))
    scores = query @ key.mT / math.sqrt(SIZE)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    return torch.einsum("hts,hsd,ohd->to", scores.softmax(-1), x @ v.mT, o)


LAYOUTS = [(SIZE, "half"), (SIZE, "interleaved"), (4, "half"), (4, "interleaved"), (0, "none")]


@pytest.mark.parametrize(("rotary", "positions"), LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("readers", [1, 2])
def test_planted_heads_are_found(rotary, positions, bias, readers):
    """Keys that are legal maps of one key, values that are mixes of one value: nothing is lost. The mean loses all."""
    x = inputs(bias)
    width = x.shape[1]
    key, value = rand(SIZE, width, seed=10), rand(SIZE, width, seed=11)
    k = torch.stack([free_map(rotary, positions, 20 + 2 * h) @ key for h in range(HEADS)])
    v = torch.stack([rand(SIZE, SIZE, seed=40 + h) @ value for h in range(HEADS)])
    q, o = rand(HEADS * readers, SIZE, width, seed=12) * 0.3, rand(D, HEADS * readers, SIZE, seed=13)
    moments, mean = x.T @ x / len(x), x.mean(0)
    power = torch.stack(
        [sum(q[h * readers + j] @ moments @ q[h * readers + j].T for j in range(readers)) for h in range(HEADS)]
    )
    grams = torch.stack(
        [sum(o[:, h * readers + j].T @ o[:, h * readers + j] for j in range(readers)) for h in range(HEADS)]
    )
    keys = merge_keys(k, moments, power, rotary=rotary, positions=positions, mean=mean)
    values = merge_values(v, moments, grams)
    owner = [h // readers for h in range(HEADS * readers)]
    new_q = torch.stack([keys.maps[g].T @ q[j] for j, g in enumerate(owner)])
    new_o = torch.stack([o[:, j] @ values.maps[g] for j, g in enumerate(owner)], dim=1)
    inputs_of_text = x[:LENGTH]
    want = attend(q, k[owner], v[owner], o, inputs_of_text, rotary, positions)
    count = len(owner)
    got = attend(
        new_q,
        keys.head.expand(count, -1, -1),
        values.head.expand(count, -1, -1),
        new_o,
        inputs_of_text,
        rotary,
        positions,
    )
    assert (got - want).abs().max() <= 1e-8 * want.abs().max()
    assert keys.lost <= 1e-10 * keys.energy
    assert values.lost <= 1e-10 * values.energy
    mean_k, mean_v = (w.mean(0).expand(count, -1, -1) for w in (k, v))
    assert (attend(q, mean_k, mean_v, o, inputs_of_text, rotary, positions) - want).norm() >= 0.3 * want.norm()


def least(loss, *starts) -> float:
    """What LBFGS reaches from these starts."""
    variables = [start.clone().requires_grad_(True) for start in starts]
    solver = torch.optim.LBFGS(
        variables,
        lr=1,
        max_iter=600,
        tolerance_grad=1e-14,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        value = loss(*variables)
        value.backward()
        return value

    solver.step(closure)
    return loss(*variables).item()


def test_no_shared_key_is_better_per_frequency():
    """LBFGS over any complex key and factors, from the closed form and from chance, does not beat it."""
    x, k = inputs(False), rand(HEADS, SIZE, D, seed=50)
    q = rand(HEADS, SIZE, D, seed=51) * torch.tensor([0.2, 1.0, 3.0, 1.0]).double()[:, None, None]
    moments = x.T @ x / len(x)
    power = torch.stack([w @ moments @ w.T for w in q])
    merged = merge_keys(k, moments, power, rotary=SIZE, positions="half")
    total = 0.0
    for a, b in pairs(SIZE, "half"):
        z = torch.complex(x @ k[:, a].T, x @ k[:, b].T)  # [N, heads]
        weight = power[:, a, a] + power[:, b, b]

        def loss(factor, shared, z=z, weight=weight):
            predicted = torch.view_as_complex(factor) * torch.view_as_complex(shared)[:, None]
            return ((z - predicted).abs().square() * weight).mean(0).sum()

        head = torch.complex(x @ merged.head[a], x @ merged.head[b])
        factors = torch.complex(merged.maps[:, a, a], merged.maps[:, b, a])
        starts = [(torch.view_as_real(factors), torch.view_as_real(head))]
        starts.append((rand(HEADS, 2, seed=52 + a), rand(len(x), 2, seed=60 + a)))
        ours = loss(*starts[0]).item()
        total += ours
        assert all(least(loss, *start) >= ours * (1 - 1e-6) for start in starts)
    assert merged.lost == pytest.approx(total, rel=1e-9)


def test_no_shared_value_is_better():
    x, v, o = inputs(True), rand(3, SIZE, D + 1, seed=70), rand(D, 3, SIZE, seed=71)
    moments = x.T @ x / len(x)
    grams = torch.stack([o[:, h].T @ o[:, h] for h in range(3)])
    merged = merge_values(v, moments, grams)
    wanted = torch.stack([x @ v[h].T @ o[:, h].T for h in range(3)])

    def loss(head, columns):
        return (wanted - torch.einsum("nd,hod->hno", x @ head.T, columns)).square().sum() / len(x)

    columns = torch.stack([o[:, h] @ merged.maps[h] for h in range(3)])
    ours = loss(merged.head, columns).item()
    assert merged.lost == pytest.approx(ours, rel=1e-9)
    assert least(loss, merged.head, columns) >= ours * (1 - 1e-6)
    assert least(loss, rand(SIZE, D + 1, seed=72), rand(3, D, SIZE, seed=73)) >= ours * (1 - 1e-6)
    energy = (x @ merged.head.T).square().sum() * 3
    assert energy.item() == pytest.approx((x @ v.flatten(0, 1).T).square().sum().item(), rel=1e-9)


def test_a_gauge_changes_nothing_and_the_same_moments_give_the_same_bits():
    """Keys turned and scaled by head, queries back: the same model, and the same scores after the merge."""
    x, k, q = inputs(False), rand(HEADS, SIZE, D, seed=80), rand(HEADS, SIZE, D, seed=81)
    moments = x.T @ x / len(x)
    maps = torch.stack([free_map(SIZE, "half", 90 + 2 * h) for h in range(HEADS)])
    scores = []
    for keys, queries in ((k, q), (maps @ k, torch.linalg.inv(maps).mT @ q)):
        power = torch.stack([w @ moments @ w.T for w in queries])
        merged, again = (merge_keys(keys, moments, power, rotary=SIZE, positions="half") for _ in range(2))
        assert torch.equal(merged.head, again.head)
        query = rotated(x[:LENGTH] @ (merged.maps.mT @ queries).mT, SIZE, "half")
        scores.append(query @ rotated(x[:LENGTH] @ merged.head.T, SIZE, "half").mT)
    assert (scores[0] - scores[1]).abs().max() <= 1e-9 * scores[0].abs().max()


def test_heads_that_nobody_reads_or_that_say_nothing():
    moments = rand(3, 3, seed=1) @ rand(3, 3, seed=1).T
    moments = moments.reshape(3, 1, 3, 1)
    for weights in (torch.zeros(3, 1, 1), torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1)):
        results = shared_channels(moments, weights.double())
        assert all(result.isfinite().all() for result in results)
    assert all(
        result.isfinite().all() for result in shared_channels(torch.zeros_like(moments), torch.ones(3, 1, 1).double())
    )
    _, _, lost, _ = shared_channels(moments, torch.tensor([0.0, 1.0, 0.0]).double().reshape(3, 1, 1))
    assert lost <= 1e-9, "one reader: its head is told exactly"


def test_the_ridge_is_chosen_on_what_is_held_back():
    """Few noisy rows: without a ridge the fit is worse than W_0 on other rows; the chosen one is better than both."""
    truth, old = rand(5, 30, seed=100), rand(5, 30, seed=100) + 0.1 * rand(5, 30, seed=101)
    spectrum = torch.logspace(0, -3, 30, dtype=torch.float64)

    def rows(count, seed):
        z = rand(count, 30, seed=seed) * spectrum
        return z, z @ truth.T + 0.2 * rand(count, 5, seed=seed + 1)

    def sums(z, r):
        return r.T @ z, z.T @ z

    train, validation, test = rows(40, 102), rows(400, 104), rows(4000, 106)
    result = fit_output(old, sums(*train), sums(*validation), [1e-9, 1e-4, 1e-2, 1e-1, 1.0, 10.0])

    def loss(weight, data):
        return (data[1] - data[0] @ weight.T).square().sum().item()

    plain = fit_output(old, sums(*train), sums(*train), [1e-9])
    assert plain.ridge == 1e-9
    assert loss(result.weight, test) < loss(old, test) < loss(plain.weight, test)
    assert result.after - result.before == pytest.approx(
        loss_of_ridge(old, train, result.ridge, validation) - loss(old, validation), rel=1e-9
    )
    without = fit_output(old, sums(*train), sums(*validation), [result.ridge], with_validation=False)
    assert loss(without.weight, validation) - loss(old, validation) == pytest.approx(
        without.after - without.before, rel=1e-9
    )
    assert loss(result.weight, validation) < loss(without.weight, validation), "the rows held back are fitted as well"
    exact = (validation[0], validation[0] @ old.T)  # W_0 is right there: nothing can beat it
    unchanged = fit_output(old, sums(*train), sums(*exact), [1e-9, 1.0])
    assert unchanged.ridge is None
    assert torch.equal(unchanged.weight, old)


def loss_of_ridge(old, train, ridge, validation) -> float:
    """The ridge fit by stacked least squares, judged on rows."""
    z, r = train
    pull = math.sqrt(ridge * z.square().sum().item() / z.shape[1])
    stacked = torch.cat([z, pull * torch.eye(z.shape[1], dtype=torch.float64)])
    weight = torch.linalg.lstsq(stacked, torch.cat([r, pull * old.T])).solution.T
    return (validation[1] - validation[0] @ weight.T).square().sum().item()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("projection", ["q", "k"])
def test_the_score_fit_is_the_least_squares_solution(groups, stride, projection):
    samples, rotation, q, k = score_problem(groups, stride, seed=7)
    objective = ScoreObjective(samples, 0.5, rotation, rotation, groups)
    problem, start = (objective.query_problem(k), q) if projection == "q" else (objective.key_problem(q), k)

    def loss(weight):
        return score_loss(samples, weight, k) if projection == "q" else score_loss(samples, q, weight)

    weight = start.clone().requires_grad_(True)
    gradient = torch.autograd.grad(loss(weight), weight)[0]
    goal, constant = problem.target(start)
    assert torch.allclose(problem.product(start) - goal, gradient, rtol=1e-9, atol=1e-9)
    value = (start * (problem.product(start) - 2 * goal)).sum().item() + constant
    assert value == pytest.approx(2 * loss(start).item(), rel=1e-9)
    solution = solve(problem, problem, start, steps=200, damping=1.0)
    assert solution.after == pytest.approx(2 * loss(solution.weight).item() / constant, rel=1e-9)
    assert least(loss, start) >= loss(solution.weight).item() * (1 - 1e-6)
    assert loss(solution.weight) < 0.95 * loss(start)


@pytest.mark.parametrize("projection", ["q", "k", "v"])
def test_two_threads_find_what_one_finds(projection):
    """Also the tenth time: no thread writes where another does."""
    samples, rotation, q, k = score_problem(2, 1, seed=7)
    objective, output = ScoreObjective(samples * 4, 0.5, rotation, rotation, 2), torch.randn(7, 2, SMALL).double()
    more = [
        ValueSample(
            sample.x, sample.rows, sample.weights, torch.randn(len(sample.rows), 7).double(), sample.rows + 1.0
        )
        for sample in samples * 4
    ]

    def results() -> list[torch.Tensor]:
        kinds = {"q": lambda: objective.query_problem(k), "k": lambda: objective.key_problem(q)}
        problem = kinds.get(projection, lambda: ValueProblem(more, output, 2))()
        start = q if projection == "q" else k
        goal, constant = problem.target(start)
        return [goal, torch.tensor(constant), problem.product(start), *problem.preconditioner()]

    one_thread_results = results()
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            assert all(
                torch.allclose(*both, rtol=1e-12, atol=0) for both in zip(one_thread_results, results(), strict=True)
            )
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("projection", ["q", "k"])
def test_sums_over_float32_texts_are_the_float64_ones_to_its_precision(projection):
    samples, rotation, q, k = score_problem(2, 1, seed=7)
    narrow = [
        ScoreSample(
            sample.x.float(), sample.rows, sample.weights.float(), lambda sample=sample: sample.scores().float()
        )
        for sample in samples
    ]
    results, start = [], q if projection == "q" else k
    for samples_given, rotation_given in ((samples, rotation), (narrow, rotation.to(torch.empty(0)))):
        objective = ScoreObjective(samples_given, 0.5, rotation_given, rotation_given, 2)
        problem = objective.query_problem(k) if projection == "q" else objective.key_problem(q)
        goal, constant = problem.target(start)
        solution = solve(problem, problem, start, steps=8, damping=1.0)
        assert {goal.dtype, problem.product(start).dtype, solution.weight.dtype} == {torch.float64}
        results.append([problem.product(start), goal, solution.weight, torch.full((), constant, dtype=torch.float64)])
    for exact, rounded in zip(*results, strict=True):
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).abs().max() <= 1e-5 * exact.abs().max()


def test_the_score_fit_keeps_the_start_that_is_better_on_what_is_held_back():
    samples, rotation, q, k = score_problem(1, 1, seed=9)
    held_back = []
    for sample in samples[:2]:  # held back: the scores are those that the start gives
        key = rotation(sample.x @ k.mT)
        scores = 0.5 * rotation(sample.x @ q.mT)[:, sample.rows] @ key.mT
        held_back.append(ScoreSample(sample.x, sample.rows, sample.weights, lambda scores=scores: scores))
    train, validation = (
        ScoreObjective(samples[2:], 0.5, rotation, rotation, 1),
        ScoreObjective(held_back, 0.5, rotation, rotation, 1),
    )
    solution = solve(train.query_problem(k), validation.query_problem(k), q, steps=8, damping=1.0)
    assert torch.equal(solution.weight, q)
    assert solution.steps == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_the_value_fit_is_the_least_squares_solution(groups):
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, samples = torch.tensor([1, 2, 4, 5, 8, 11]), []
    for _ in range(3):
        unseen = torch.arange(12) > rows[:, None]
        weights = draw(2, 6, 12).masked_fill(unseen, -math.inf).softmax(-1)
        row_weights = torch.rand(6, generator=generator).double() + 0.1
        samples.append(ValueSample(draw(12, 5), rows, weights, draw(6, 7), row_weights))
    output, start = draw(7, 2, SMALL), draw(groups, SMALL, 5)

    def loss(weight):
        total = 0.0
        for sample in samples:
            written = 0.0
            for head in range(2):
                values = sample.x @ weight[head * groups // 2].T
                written = written + sample.weights[head] @ values @ output[:, head].T
            total = total + ((written - sample.wanted).square().sum(-1) * sample.row_weights).sum()
        return total / 2

    problem = ValueProblem(samples, output, groups)
    goal, constant = problem.target(start)
    weight = start.clone().requires_grad_(True)
    gradient = torch.autograd.grad(loss(weight), weight)[0]
    assert torch.allclose(problem.product(start) - goal, gradient, rtol=1e-9, atol=1e-9)
    solution = solve(problem, problem, start, steps=200, damping=1.0)
    assert solution.before == pytest.approx(2 * loss(start).item() / constant, rel=1e-9)
    assert solution.after == pytest.approx(2 * loss(solution.weight).item() / constant, rel=1e-9)
    assert least(loss, start) >= loss(solution.weight).item() * (1 - 1e-6)
    assert loss(solution.weight) < 0.95 * loss(start)


@pytest.mark.parametrize("pieces", [1, 8, 19])
def test_products_in_float32_are_summed_in_float64(pieces):
    generator, sums, exact = torch.Generator().manual_seed(0), Products(), torch.zeros(5, 3, dtype=torch.float64)
    for _ in range(pieces):
        a, b = torch.randn(5, 7, generator=generator), torch.randn(7, 3, generator=generator)
        sums.add(a, b)
        exact += a.double() @ b.double()
    assert sums.total.dtype == torch.float64
    torch.testing.assert_close(sums.total, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.total, exact, rtol=1e-5, atol=1e-5)  # asked for twice, counted once


def mlp_fit(spoiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The true and the refitted projection, from 12 sequences of states rest + W z. `spoiled`: in the converted model
    one token's input is 10,000 times as large, and so is its state."""
    outputs, width, tokens = 6, 10, 40
    truth, old = rand(outputs, width, seed=1), rand(outputs, width, seed=2)
    module = torch.nn.Linear(width, outputs, bias=False, dtype=torch.float64)
    module.weight.data = old.clone()
    inputs = [rand(tokens, width, seed=10 + index) for index in range(12)]
    rests = [rand(tokens, outputs, seed=50 + index) for index in range(12)]
    base = [(rest + z @ truth.T)[None] for rest, z in zip(rests, inputs, strict=True)]
    if spoiled:
        inputs[3][7] *= 1e4

    def step(index: int) -> None:
        converted[index] = (rests[index] + module(inputs[index]))[None]

    converted = [rest[None] for rest in rests]
    with torch.no_grad():
        fitted = MLPOutput(module, base, converted, step).refit([1e-8])
    assert fitted is not None
    return truth, fitted[0]


def test_a_token_that_got_massive_activations_does_not_outweigh_the_others():
    truth, fitted = mlp_fit(spoiled=False)
    torch.testing.assert_close(fitted, truth, atol=1e-5, rtol=0)
    truth, fitted = mlp_fit(spoiled=True)
    assert (fitted - truth).abs().max() < 0.1 * truth.abs().max()
