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
from surgery.operations.gqa import layer as shared_layer
from surgery.operations.gqa.conjugate_gradient import solve
from surgery.operations.gqa.fit_scores import ScoreObjective
from surgery.operations.gqa.fit_values import ValueProblem
from surgery.operations.gqa.layer_inputs import FitSettings
from surgery.operations.gqa.low_rank import fit_output, merge_keys, merge_values
from surgery.operations.gqa.merge import with_bias
from surgery.operations.gqa.streams import Sharing


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
    model, found, turned = copy.deepcopy(model), [], []
    model.set_attn_implementation("eager")
    for module in attention_modules(model):
        found.append(seen := SimpleNamespace())

        def before(module, args, kwargs, seen=seen):
            x = args[0] if args else kwargs["hidden_states"]
            seen.x = x if module.k_proj.bias is None else torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)

        def after(output, args, out, seen=seen):
            seen.z, seen.written = args[0], out if output.bias is None else out - output.bias

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.o_proj.register_forward_hook(after)
    library = sys.modules[type(module).__module__]
    rope = library.apply_rotary_pos_emb
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(library, rope.__name__, lambda *given, **more: turned.append(rope(*given, **more)) or turned[-1])
        out = model(input_ids=sequences, use_cache=False, output_attentions=True, output_hidden_states=True)
    for number, seen in enumerate(found):
        seen.p, seen.rms = out.attentions[number], 1 / out.hidden_states[number].square().mean(-1)
        if len(turned) == len(found):  # no layer without RoPE
            seen.query, seen.key = turned[number]
    return found


def counted(place: int, stride: int = 2) -> list[int]:
    """The rows of a sequence that count."""
    return list(range(1 + place % stride, SEQUENCES.shape[1], stride))


def key_moments(seen, received: float):
    """Σ ω x xᵀ / Σ ω and Σ ω x / Σ ω over tokens; ω from the attention that a token gets."""
    got = torch.stack([sum(p[head, row] for head in range(8) for row in counted(i)) for i, p in enumerate(seen.p)])
    share = 1 - received + received * got / got.mean(1, keepdim=True)
    second, mean = torch.einsum("st,sti,stj->ij", share, seen.x, seen.x), torch.einsum("st,sti->i", share, seen.x)
    return second / share.sum(), mean / share.sum()


def value_moments(seen):
    """Of what every fourth of the rows reads, each by 1 / rms² of its hidden state."""
    rows = [(place, row) for place in range(len(SEQUENCES)) for row in counted(place)[::4]]
    read = torch.stack([seen.p[place, :, row] @ seen.x[place] for place, row in rows])
    rms = torch.stack([seen.rms[place, row] for place, row in rows])
    return torch.einsum("r,rhi,rhj->ij", rms, read, read) / (8 * rms.sum())


def near(found, want, tolerance: float = 1e-5) -> bool:
    return bool((found - want).abs().max() <= tolerance * want.abs().max())


def heads_of(model, layer: int, part: str, count: int) -> torch.Tensor:
    return torch.stack([get_head(model, attention_modules(model)[layer], part, head) for head in range(count)])


def output_of(model, layer: int = 0) -> torch.Tensor:
    return attention_modules(model)[layer].o_proj.weight.detach()


def choices(seen, scale: float, heads: range) -> tuple[int, int]:
    """The key head whose scores vary least from the base's for all queries of its group; by Σ p error² instead."""
    variance, square = dict.fromkeys(heads, 0.0), dict.fromkeys(heads, 0.0)
    for place, head, query in product(range(len(SEQUENCES)), heads, range(2 * heads[0], 2 * heads[-1] + 2)):
        for row in counted(place, 8):
            p, keys = seen.p[place, query, row], seen.key[place, head] - seen.key[place, query // 2]
            error = scale * keys @ seen.query[place, query, row]
            variance[head] += (p * (error - p @ error).square()).sum().item()
            square[head] += (p @ error.square()).item()
    return min(heads, key=variance.get), min(heads, key=square.get)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_behind_a_norm_the_key_head_stays_whose_scores_are_nearest(name, monkeypatch):
    """Brute force over the heads of each group, and not what is first or has the smallest errors, means and all."""
    model, found = uneven(name), []
    seen, scale = stock(model, monkeypatch), attention_modules(model)[0].scaling
    for kv_heads in (2, 1):
        new, records = shared(model, kv_heads, refit=(), stride=8)
        for layer, record in enumerate(records):
            groups = [range(first, first + KV // kv_heads) for first in range(0, KV, KV // kv_heads)]
            best = [(*choices(seen[layer], scale, group), group[0]) for group in groups]
            kept, found = [head for head, *_ in best], found + best
            assert record["key_heads"] == kept
            assert torch.equal(heads_of(new, layer, "k", kv_heads), heads_of(model, layer, "k", KV)[kept])
    right, square, first = zip(*found, strict=True)
    assert right not in (square, first)


@pytest.mark.parametrize("name", ["llama_bias", "stablelm", "smollm3"])
@pytest.mark.parametrize(("weighted", "received"), [(True, 0.5), (True, 1.0), (False, 0.5)])
def test_merged_heads_are_those_of_explicit_moments(name, weighted, received, monkeypatch):
    """Keys: inputs by the attention that they get, unturned channels centred. Values: what attention reads."""
    model, free = uneven(name), 0
    new, _ = shared(model, 2, refit=(), stride=2, weighted=weighted, received=received)
    for layer, (facts, seen) in enumerate(zip(Anatomy.of(model).layers, stock(model, monkeypatch), strict=True)):
        (second, mean), read = key_moments(seen, received), value_moments(seen)
        q, k, v = (heads_of(model, layer, part, count) for part, count in (("q", 8), ("k", KV), ("v", KV)))
        o, free = output_of(model, layer).unflatten(1, (8, -1)), free + (facts.rotary < facts.head_dim)
        power, grams = (
            x.unflatten(0, (KV, 2)).sum(1) for x in (q @ second @ q.mT, torch.einsum("ohd,ohe->hde", o, o))
        )
        right, wrong = (power, torch.eye(facts.head_dim).double().expand_as(power))[:: 1 if weighted else -1]
        given, flat = {"rotary": facts.rotary, "positions": facts.positions}, key_moments(seen, 0.0)[0]
        for group in range(2):
            some, readers = slice(2 * group, 2 * group + 2), slice(4 * group, 4 * group + 4)
            key, value = (heads_of(new, layer, part, 2)[group] for part in "kv")
            want = merge_keys(k[some], second, right[some], mean=mean, **given)
            assert near(key, want.head)
            asked = want.maps.mT.repeat_interleave(2, dim=0) @ q[readers]
            assert near(heads_of(new, layer, "q", 8)[readers], asked)
            assert not near(key, merge_keys(k[some], second, wrong[some], mean=mean, **given).head, 1e-2)
            assert not near(key, merge_keys(k[some], flat, right[some], mean=mean, **given).head, 1e-3)
            uncentred = merge_keys(k[some], second, right[some], **given).head
            assert near(key, uncentred, 1e-2) == (facts.rotary == facts.head_dim)
            assert near(value, merge_values(v[some], read, grams[some]).head)
            assert not near(value, merge_values(v[some], flat, grams[some]).head, 1e-2)
    assert free == {"llama_bias": 0, "stablelm": 2, "smollm3": 1}[name]


def test_a_constant_counts_where_a_learned_sink_competes(monkeypatch):
    """Keys without RoPE in a layer with learned sinks: not centred."""
    works, convert = [], shared_layer.SharedLayer.convert
    monkeypatch.setattr(shared_layer.SharedLayer, "convert", lambda work: works.append(work) or convert(work))
    shared(uneven("gpt_oss"), 2, refit=())
    work = works[0]
    work.layer = work.layer.replace(anatomy=replace(work.layer.anatomy, rotary=0, positions="none"))
    moments, (q, k) = work._inputs(), (with_bias(work.layer, part) for part in "qk")
    power = (q @ moments.second @ q.mT).unflatten(0, (KV, 2)).sum(1)[:2]
    found, given = work._keys(q, k, moments, {})[1][0], {"rotary": 0, "positions": "none"}
    assert near(found, merge_keys(k[:2], moments.second, power, **given).head)
    assert not near(found, merge_keys(k[:2], moments.second, power, mean=moments.mean, **given).head, 1e-2)


@pytest.mark.parametrize("name", ["llama_bias", "starcoder2"])
def test_rows_of_the_output_refit_count_relative_to_their_state(name, monkeypatch):
    """Explicit normal equations of the first layer, without the first token; not those of rows that are all alike."""
    model, one = uneven(name), SEQUENCES[:1].repeat(12, 1)  # what is held back is what is fitted
    merged, _ = shared(model, 2, one, refit=())
    new, _ = shared(model, 2, one, refit=("o",), ridges=(0.01,))
    seen, z = (stock(m, monkeypatch, SEQUENCES[:1])[0] for m in (model, merged))
    written, z, start, found = seen.written[0], z.z[0], output_of(merged), output_of(new)

    def ridge(weights, rows):
        left, right = (sum(weights[t] * y[t].outer(z[t]) for t in rows) for y in (z, written))
        pull = 0.01 * left.diagonal().mean()
        return torch.linalg.solve(left + pull * torch.eye(len(left)).double(), right + pull * start, left=False)

    rows = range(1, SEQUENCES.shape[1])
    assert near(found, ridge(seen.rms[0], rows))
    assert not near(found, ridge(torch.ones_like(seen.rms[0]), rows), 1e-2)
    assert not near(found, ridge(seen.rms[0], range(SEQUENCES.shape[1])), 1e-2)


def test_rows_of_the_value_refit_count_relative_to_their_state(monkeypatch):
    """At the result the gradient of Σ ω |Σ_h O_h Σ_s p W_V x − r|² is nought, and that of other weights is not."""
    model = uneven("llama_bias")
    monkeypatch.setattr(shared_layer, "apart", lambda pieces: (pieces, pieces))  # all are fitted, all are held back
    merged, _ = shared(model, 2, refit=(), stride=2)
    new, _ = shared(model, 2, refit=("v",), stride=2, steps=400, damping=1e-6)
    seen, p, o = stock(model, monkeypatch)[0], stock(merged, monkeypatch)[0].p, output_of(merged).unflatten(1, (8, -1))

    def gradient(converted, alike: bool):
        v, total = heads_of(converted, 0, "v", 2).repeat_interleave(4, dim=0), torch.zeros(2, 8, 65).double()
        for place, row in [(number, row) for number in range(len(SEQUENCES)) for row in counted(number)]:
            read = p[place, :, row] @ seen.x[place]
            error = torch.einsum("ohd,hdn,hn->o", o, v, read) - seen.written[place, row]
            slope = torch.einsum("o,ohd,hn->hdn", error, o, read).unflatten(0, (2, 4)).sum(1)
            total += slope * (1 if alike else seen.rms[place, row])
        return total.norm()

    assert gradient(new, False) <= 1e-5 * gradient(merged, False)
    assert gradient(new, True) >= 1e-2 * gradient(merged, True)


def test_texts_held_back_do_not_fit_the_output_under_which_they_judge_values(monkeypatch):
    """Of two fits of W_O the first leaves them out, and the values are then fitted with what it gave."""
    model, asked, found = uneven("llama"), [], []

    def fit(*given, with_held):
        asked.append(with_held)
        found.append(fit_output(*given, with_held=with_held))
        return found[-1]

    def problem(pieces, output, groups):
        assert near(output.flatten(1), found[-1].weight)
        return ValueProblem(pieces, output, groups)

    monkeypatch.setattr(shared_layer, "fit_output", fit)
    shared(model, 2, refit=("o",), stride=2)
    assert asked == [True, True]
    asked.clear()
    monkeypatch.setattr(shared_layer, "ValueProblem", problem)
    shared(model, 2, refit=("v", "o"), stride=2)
    assert asked == [False, True] * 2


@pytest.mark.parametrize("reweight_keys", [True, False])
def test_from_the_second_fit_on_a_key_counts_by_what_it_has_and_had(reweight_keys, monkeypatch):
    """Keys are weighted by the mean of the base's attention and of that with the queries that were just fitted."""
    model, asked, solved = uneven("llama"), [], []
    merged, _ = shared(model, 2, refit=(), stride=2)
    with monkeypatch.context() as patch:
        patch.setattr(shared_layer, "Fit", lambda pieces, *rest: asked.append(pieces) or ScoreObjective(pieces, *rest))
        patch.setattr(shared_layer, "solve", lambda *given, **more: solved.append(solve(*given, **more)) or solved[-1])
        shared(model, 2, refit=("q", "k"), stride=2, reweight_keys=reweight_keys)
    for head in range(8):
        set_head(merged, attention_modules(merged)[0], "q", head, solved[0].weight[head])
    base_seen, new_seen = stock(model, monkeypatch)[0], stock(merged, monkeypatch)[0]
    assert (base_seen.p - new_seen.p).abs().max() > 1e-3
    for turn, (old, new) in enumerate([(1.0, 0.0), (0.5, 0.5) if reweight_keys else (1.0, 0.0)]):
        pieces = [*asked[2 * turn], *asked[2 * turn + 1]]  # to fit, and held back
        assert len(pieces) == len(SEQUENCES)
        for piece in pieces:
            place = next(i for i, x in enumerate(base_seen.x) if near(x, piece.x))
            want = old * base_seen.p[place] + new * new_seen.p[place]
            assert near(piece.weights, want[:, piece.rows])


@pytest.mark.parametrize(("part", "groups", "damping"), product("qk", (1, 2), (0.5, 30.0)))
def test_the_first_step_of_the_score_fit_goes_where_inputs_are_strong(part, groups, damping):
    """One step down the slope G: δ = −a C⁻¹ G (M + damping · mean eigenvalue)⁻¹, and a where L is least along it.

    C holds a number for each head and channel: the curvature of its scores, of a pair that RoPE mixes the mean.
    """
    pieces, turn, q, k = score_problem(groups, 3, seed=7)
    fit = ScoreObjective(pieces, 0.5, turn, turn, groups)
    problem, start = (fit.query_problem(k), q) if part == "q" else (fit.key_problem(q), k)

    def loss(weight):
        return score_loss(pieces, weight, k) if part == "q" else score_loss(pieces, q, weight)

    slope = torch.autograd.functional.jacobian(loss, start)
    curvature, moments = torch.zeros(start.shape[:2]).double(), torch.zeros(5, 5).double()
    for piece in pieces:
        query, key = turn(piece.x @ q.mT)[:, piece.rows], turn(piece.x @ k.mT)
        for (row, at), head in product(enumerate(piece.rows), range(2)):
            p, own = piece.weights[head, row], head * groups // 2
            if part == "q":  # of a query's channels: the variance of its keys under p
                curvature[head] += p @ key[own].square() - (p @ key[own]).square()
                moments += piece.x[at].outer(piece.x[at]) * (head == 0)
            else:
                curvature[own] += query[head, row].square()
                moments += torch.einsum("s,si,sj->ij", p, piece.x, piece.x)
    curvature[:, :2] = curvature[:, :2].mean(1, keepdim=True)  # two channels turn, two do not
    moments += damping * moments.diagonal().mean() * torch.eye(5).double()
    way = -torch.linalg.solve(moments, slope / curvature.unsqueeze(-1), left=False)
    curved = torch.einsum("hdn,hdn->", torch.autograd.functional.hvp(loss, start, way)[1], way)
    found = solve(problem, problem, start, steps=1, damping=damping)
    assert found.steps == 1
    assert near(found.weight - start, -(slope * way).sum() / curved * way, 1e-7)


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
