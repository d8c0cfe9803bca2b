"""What the closed form counts, and how much, against explicit sums over what the stock model sees, in float64."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from closed_form import SEQUENCES, Tokens, closed, numbers, recipe  # noqa: F401
from families import (
    CONVERTIBLE,
    KV,
    attention_modules,
    base,
    difference,
    double,
    get_head,
    logits_of,
    one_thread,  # noqa: F401
    set_head,
)
from score_fits import score_loss, score_problem

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import write_layers
from surgery.architecture.weights import with_bias
from surgery.calibration.closed_form import layer as fitted_layer
from surgery.calibration.closed_form.conjugate_gradient import solve
from surgery.calibration.closed_form.fit_scores import ScoreObjective
from surgery.calibration.closed_form.fit_values import ValueProblem
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.calibration.closed_form.low_rank import fit_output, merge_keys, merge_values
from surgery.operations.gqa import layer as shared_layer
from surgery.operations.gqa.layer import Sharing


def uneven(name: str):
    """The family's model in float64; tokens differ in loudness, and heads in how strongly they ask."""
    model, generator = double(base(name)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.mul_(0.3 + 3 * torch.rand(len(table), 1, generator=generator).double())
        for module, head in product(attention_modules(model), range(8)):
            scale = 0.2 + 2 * torch.rand(1, generator=generator).item()
            set_head(model, module, "q", head, scale * get_head(model, module, "q", head))
    return model


def shared(model, kv_heads: int, sequences=SEQUENCES, **settings):
    """A converted copy, and what is recorded of each layer."""
    new = copy.deepcopy(model)
    before = Anatomy.of(new)
    after = before.with_kv_heads(kv_heads)
    results, records = Sharing(model, after.layers, sequences, FitSettings(**settings)).layers()
    write_layers(new, before, after, results)
    return new, records


def stock(model, monkeypatch, sequences=SEQUENCES) -> list[SimpleNamespace]:
    """Of each layer in stock Transformers: x (with ones for biases), p, query, key, state before it, z and written."""
    model, layers, rotated = copy.deepcopy(model), [], []
    model.set_attn_implementation("eager")
    for module in attention_modules(model):
        layers.append(layer := SimpleNamespace())

        def before(module, args, kwargs, layer=layer):
            x = args[0] if args else kwargs["hidden_states"]
            layer.x = x if module.k_proj.bias is None else torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)

        def after(output, args, out, layer=layer):
            layer.z, layer.written = args[0], out if output.bias is None else out - output.bias

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.o_proj.register_forward_hook(after)
    library = sys.modules[type(module).__module__]
    rope = library.apply_rotary_pos_emb
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(
            library, "apply_rotary_pos_emb", lambda *args, **more: rotated.append(rope(*args, **more)) or rotated[-1]
        )
        out = model(input_ids=sequences, use_cache=False, output_attentions=True, output_hidden_states=True)
    for index, layer in enumerate(layers):
        layer.p, layer.rms = out.attentions[index], 1 / out.hidden_states[index].square().mean(-1)
        if len(rotated) == len(layers):  # no layer without RoPE
            layer.query, layer.key = rotated[index]
    return layers


def counted(index: int, stride: int = 2) -> list[int]:
    """The rows of a sequence that count."""
    return list(range(1 + index % stride, SEQUENCES.shape[1], stride))


def key_moments(layer, received: float):
    """Σ ω x xᵀ / Σ ω and Σ ω x / Σ ω over tokens; ω from the attention that a token gets."""
    received_attention = torch.stack(
        [sum(p[head, row] for head in range(8) for row in counted(i)) for i, p in enumerate(layer.p)]
    )
    share = 1 - received + received * received_attention / received_attention.mean(1, keepdim=True)
    second, mean = torch.einsum("st,sti,stj->ij", share, layer.x, layer.x), torch.einsum("st,sti->i", share, layer.x)
    return second / share.sum(), mean / share.sum()


def value_moments(layer):
    """Of what every fourth of the rows reads, each by 1 / rms² of its hidden state."""
    rows = [(index, row) for index in range(len(SEQUENCES)) for row in counted(index)[::4]]
    read = torch.stack([layer.p[index, :, row] @ layer.x[index] for index, row in rows])
    rms = torch.stack([layer.rms[index, row] for index, row in rows])
    return torch.einsum("r,rhi,rhj->ij", rms, read, read) / (8 * rms.sum())


def near(got, want, tolerance: float = 1e-5) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def heads_of(model, layer: int, projection: str, count: int) -> torch.Tensor:
    return torch.stack([get_head(model, attention_modules(model)[layer], projection, head) for head in range(count)])


def output_of(model, layer: int = 0) -> torch.Tensor:
    return attention_modules(model)[layer].o_proj.weight.detach()


def choices(layer, scale: float, heads: range) -> tuple[int, int]:
    """The key head whose scores vary least from the base's for all queries of its group; by Σ p error² instead."""
    variance, square = dict.fromkeys(heads, 0.0), dict.fromkeys(heads, 0.0)
    for index, head, query in product(range(len(SEQUENCES)), heads, range(2 * heads[0], 2 * heads[-1] + 2)):
        for row in counted(index, 8):
            p, keys = layer.p[index, query, row], layer.key[index, head] - layer.key[index, query // 2]
            error = scale * keys @ layer.query[index, query, row]
            variance[head] += (p * (error - p @ error).square()).sum().item()
            square[head] += (p @ error.square()).item()
    return min(heads, key=variance.get), min(heads, key=square.get)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_behind_a_norm_the_key_head_stays_whose_scores_are_nearest(name, monkeypatch):
    """Brute force over the heads of each group, and not what is first or has the smallest errors, means and all."""
    model, choices_made = uneven(name), []
    stock_layers, scale = stock(model, monkeypatch), attention_modules(model)[0].scaling
    for kv_heads in (2, 1):
        new, records = shared(model, kv_heads, refit=(), stride=8)
        for layer, record in enumerate(records):
            groups = [range(first, first + KV // kv_heads) for first in range(0, KV, KV // kv_heads)]
            best = [(*choices(stock_layers[layer], scale, group), group[0]) for group in groups]
            expected, choices_made = [head for head, *_ in best], choices_made + best
            assert record["key_heads"] == expected
            assert torch.equal(heads_of(new, layer, "k", kv_heads), heads_of(model, layer, "k", KV)[expected])
    right, square, first = zip(*choices_made, strict=True)
    assert right not in (square, first)


@pytest.mark.parametrize("name", ["llama_bias", "stablelm", "smollm3"])
@pytest.mark.parametrize(("weighted", "received"), [(True, 0.5), (True, 1.0), (False, 0.5)])
def test_merged_heads_are_those_of_explicit_moments(name, weighted, received, monkeypatch):
    """Keys: inputs by the attention that they get, unturned channels centred. Values: what attention reads."""
    model, free = uneven(name), 0
    new, _ = shared(model, 2, refit=(), stride=2, weighted=weighted, received=received)
    for layer, (anatomy, stock_layer) in enumerate(
        zip(Anatomy.of(model).layers, stock(model, monkeypatch), strict=True)
    ):
        (second, mean), read = key_moments(stock_layer, received), value_moments(stock_layer)
        q, k, v = (heads_of(model, layer, projection, count) for projection, count in (("q", 8), ("k", KV), ("v", KV)))
        o, free = output_of(model, layer).unflatten(1, (8, -1)), free + (anatomy.rotary < anatomy.head_dim)
        power, grams = (
            x.unflatten(0, (KV, 2)).sum(1) for x in (q @ second @ q.mT, torch.einsum("ohd,ohe->hde", o, o))
        )
        right, wrong = (power, torch.eye(anatomy.head_dim).double().expand_as(power))[:: 1 if weighted else -1]
        rope, flat = {"rotary": anatomy.rotary, "positions": anatomy.positions}, key_moments(stock_layer, 0.0)[0]
        for group in range(2):
            members, readers = slice(2 * group, 2 * group + 2), slice(4 * group, 4 * group + 4)
            key, value = (heads_of(new, layer, projection, 2)[group] for projection in "kv")
            want = merge_keys(k[members], second, right[members], mean=mean, **rope)
            assert near(key, want.head)
            queries = want.maps.mT.repeat_interleave(2, dim=0) @ q[readers]
            assert near(heads_of(new, layer, "q", 8)[readers], queries)
            assert not near(key, merge_keys(k[members], second, wrong[members], mean=mean, **rope).head, 1e-2)
            assert not near(key, merge_keys(k[members], flat, right[members], mean=mean, **rope).head, 1e-3)
            uncentred = merge_keys(k[members], second, right[members], **rope).head
            assert near(key, uncentred, 1e-2) == (anatomy.rotary == anatomy.head_dim)
            assert near(value, merge_values(v[members], read, grams[members]).head)
            assert not near(value, merge_values(v[members], flat, grams[members]).head, 1e-2)
    assert free == {"llama_bias": 0, "stablelm": 2, "smollm3": 1}[name]


def test_a_constant_counts_where_a_learned_sink_competes(monkeypatch):
    """Keys without RoPE in a layer with learned sinks: not centred."""
    conversions, convert = [], shared_layer.SharedLayer.convert
    monkeypatch.setattr(
        shared_layer.SharedLayer, "convert", lambda conversion: conversions.append(conversion) or convert(conversion)
    )
    shared(uneven("gpt_oss"), 2, refit=())
    conversion = conversions[0]
    conversion.layer = conversion.layer.replace(anatomy=replace(conversion.layer.anatomy, rotary=0, positions="none"))
    moments, (q, k) = conversion._input_moments(), (with_bias(conversion.layer, projection) for projection in "qk")
    power = (q @ moments.second @ q.mT).unflatten(0, (KV, 2)).sum(1)[:2]
    key, rope = conversion._merge_keys(q, k, moments, {})[1][0], {"rotary": 0, "positions": "none"}
    assert near(key, merge_keys(k[:2], moments.second, power, **rope).head)
    assert not near(key, merge_keys(k[:2], moments.second, power, mean=moments.mean, **rope).head, 1e-2)


@pytest.mark.parametrize("name", ["llama_bias", "starcoder2"])
def test_rows_of_the_output_refit_count_relative_to_their_state(name, monkeypatch):
    """Explicit normal equations of the first layer, without the first token; not those of rows that are all alike."""
    model, one = uneven(name), SEQUENCES[:1].repeat(12, 1)  # what is held back is what is fitted
    merged, _ = shared(model, 2, one, refit=())
    new, _ = shared(model, 2, one, refit=("o",), ridges=(0.01,))
    stock_layer, z = (stock(m, monkeypatch, SEQUENCES[:1])[0] for m in (model, merged))
    written, z, start, fitted = stock_layer.written[0], z.z[0], output_of(merged), output_of(new)

    def ridge(weights, rows):
        left, right = (sum(weights[t] * y[t].outer(z[t]) for t in rows) for y in (z, written))
        pull = 0.01 * left.diagonal().mean()
        return torch.linalg.solve(left + pull * torch.eye(len(left)).double(), right + pull * start, left=False)

    rows = range(1, SEQUENCES.shape[1])
    assert near(fitted, ridge(stock_layer.rms[0], rows))
    assert not near(fitted, ridge(torch.ones_like(stock_layer.rms[0]), rows), 1e-2)
    assert not near(fitted, ridge(stock_layer.rms[0], range(SEQUENCES.shape[1])), 1e-2)


def test_rows_of_the_value_refit_count_relative_to_their_state(monkeypatch):
    """At the result the gradient of Σ ω |Σ_h O_h Σ_s p W_V x − r|² is nought, and that of other weights is not."""
    model = uneven("llama_bias")
    # All samples are fitted, and all are held back.
    monkeypatch.setattr(shared_layer, "train_and_validation", lambda samples: (samples, samples))
    merged, _ = shared(model, 2, refit=(), stride=2)
    new, _ = shared(model, 2, refit=("v",), stride=2, steps=400, damping=1e-6)
    stock_layer, p = stock(model, monkeypatch)[0], stock(merged, monkeypatch)[0].p
    o = output_of(merged).unflatten(1, (8, -1))

    def gradient(converted, alike: bool):
        v, total = heads_of(converted, 0, "v", 2).repeat_interleave(4, dim=0), torch.zeros(2, 8, 65).double()
        for index, row in [(i, row) for i in range(len(SEQUENCES)) for row in counted(i)]:
            read = p[index, :, row] @ stock_layer.x[index]
            error = torch.einsum("ohd,hdn,hn->o", o, v, read) - stock_layer.written[index, row]
            slope = torch.einsum("o,ohd,hn->hdn", error, o, read).unflatten(0, (2, 4)).sum(1)
            total += slope * (1 if alike else stock_layer.rms[index, row])
        return total.norm()

    assert gradient(new, False) <= 1e-5 * gradient(merged, False)
    assert gradient(new, True) >= 1e-2 * gradient(merged, True)


def test_texts_held_back_do_not_fit_the_output_under_which_they_judge_values(monkeypatch):
    """Of two fits of W_O the first leaves them out, and the values are then fitted with what it gave."""
    model, with_validations, fits = uneven("llama"), [], []

    def fit(*args, with_validation):
        with_validations.append(with_validation)
        fits.append(fit_output(*args, with_validation=with_validation))
        return fits[-1]

    def problem(samples, output, groups):
        assert near(output.flatten(1), fits[-1].weight)
        return ValueProblem(samples, output, groups)

    monkeypatch.setattr(fitted_layer, "fit_output", fit)
    shared(model, 2, refit=("o",), stride=2)
    assert with_validations == [True, True]
    with_validations.clear()
    monkeypatch.setattr(shared_layer, "ValueProblem", problem)
    shared(model, 2, refit=("v", "o"), stride=2)
    assert with_validations == [False, True] * 2


@pytest.mark.parametrize("reweight_keys", [True, False])
def test_from_the_second_fit_on_a_key_counts_by_what_it_has_and_had(reweight_keys, monkeypatch):
    """Keys are weighted by the mean of the base's attention and of that with the queries that were just fitted."""
    model, fitted_samples, solutions = uneven("llama"), [], []
    merged, _ = shared(model, 2, refit=(), stride=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            shared_layer,
            "ScoreObjective",
            lambda samples, *rest: fitted_samples.append(samples) or ScoreObjective(samples, *rest),
        )
        patch.setattr(
            shared_layer, "solve", lambda *args, **more: solutions.append(solve(*args, **more)) or solutions[-1]
        )
        shared(model, 2, refit=("q", "k"), stride=2, reweight_keys=reweight_keys)
    for head in range(8):
        set_head(merged, attention_modules(merged)[0], "q", head, solutions[0].weight[head])
    base_layer, new_layer = stock(model, monkeypatch)[0], stock(merged, monkeypatch)[0]
    assert (base_layer.p - new_layer.p).abs().max() > 1e-3
    for step, (old, new) in enumerate([(1.0, 0.0), (0.5, 0.5) if reweight_keys else (1.0, 0.0)]):
        samples = [*fitted_samples[2 * step], *fitted_samples[2 * step + 1]]  # to fit, and held back
        assert len(samples) == len(SEQUENCES)
        for sample in samples:
            index = next(i for i, x in enumerate(base_layer.x) if near(x, sample.x))
            want = old * base_layer.p[index] + new * new_layer.p[index]
            assert near(sample.weights, want[:, sample.rows])


@pytest.mark.parametrize(("projection", "groups", "damping"), product("qk", (1, 2), (0.5, 30.0)))
def test_the_first_step_of_the_score_fit_goes_where_inputs_are_strong(projection, groups, damping):
    """One step down the slope G: δ = −a C⁻¹ G (M + damping · mean eigenvalue)⁻¹, and a where L is least along it.

    C holds a number for each head and channel: the curvature of its scores, of a pair that RoPE mixes the mean.
    """
    samples, rotation, q, k = score_problem(groups, 3, seed=7)
    objective = ScoreObjective(samples, 0.5, rotation, rotation, groups)
    problem, start = (objective.query_problem(k), q) if projection == "q" else (objective.key_problem(q), k)

    def loss(weight):
        return score_loss(samples, weight, k) if projection == "q" else score_loss(samples, q, weight)

    slope = torch.autograd.functional.jacobian(loss, start)
    curvature, moments = torch.zeros(start.shape[:2]).double(), torch.zeros(5, 5).double()
    for sample in samples:
        query, key = rotation(sample.x @ q.mT)[:, sample.rows], rotation(sample.x @ k.mT)
        for (row, at), head in product(enumerate(sample.rows), range(2)):
            p, own = sample.weights[head, row], head * groups // 2
            if projection == "q":  # of a query's channels: the variance of its keys under p
                curvature[head] += p @ key[own].square() - (p @ key[own]).square()
                moments += sample.x[at].outer(sample.x[at]) * (head == 0)
            else:
                curvature[own] += query[head, row].square()
                moments += torch.einsum("s,si,sj->ij", p, sample.x, sample.x)
    curvature[:, :2] = curvature[:, :2].mean(1, keepdim=True)  # two channels turn, two do not
    moments += damping * moments.diagonal().mean() * torch.eye(5).double()
    way = -torch.linalg.solve(moments, slope / curvature.unsqueeze(-1), left=False)
    curved = torch.einsum("hdn,hdn->", torch.autograd.functional.hvp(loss, start, way)[1], way)
    solution = solve(problem, problem, start, steps=1, damping=damping)
    assert solution.steps == 1
    assert near(solution.weight - start, -(slope * way).sum() / curved * way, 1e-7)


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, SCALED, LLAMA3], ids=["default", "yarn", "llama3"])
def test_heads_that_differ_in_size_merge_without_loss(rope, numbers):
    """Keys: complex multiples of one key, by frequency; values: mixes of one value. Turns alone cannot tell."""
    old = CONVERTIBLE["llama"](rope_parameters=rope | {"rope_theta": 10000.0})
    generator = torch.Generator().manual_seed(5)
    for module, head in product(attention_modules(old), range(1, KV)):
        (size, turn), mix = torch.rand(2, 4, generator=generator), torch.randn(8, 8, generator=generator)
        key = get_head(old, module, "k", 0)
        key = torch.complex(key[:4], key[4:]) * torch.polar(0.3 + 2.7 * size, 2 * torch.pi * turn)[:, None]
        set_head(old, module, "k", head, torch.cat([key.real, key.imag]))
        set_head(old, module, "v", head, mix.double() * 8**-0.5 @ get_head(old, module, "v", 0))
    want, mean = logits_of(old, SEQUENCES), {"op": "gqa", "kv_heads": 1}
    for step in (closed(numbers, 1), mean, mean | {"align": "procrustes"}):
        model = copy.deepcopy(old)
        package.apply(recipe(step), model, tokenizer=Tokens())
        off = difference(logits_of(model, SEQUENCES), want)
        assert off <= 1e-3 if "method" in step else off > 0.1
