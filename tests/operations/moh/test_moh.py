"""The operations moh and mae: counts, what they measure and fit, refusals, compositions, files."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from dense import batch, chunked, difference, given
from families import TINY, VOCAB, one_thread  # noqa: F401 (a fixture)
from tokenizers_of_bytes import byte_tokenizer

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.io.loading import load_model, read_tokenizer
from surgery.operations import find
from surgery.operations.moh.router import Planned, RegressionSums, ridge, route, worth
from surgery.runtime.modeling_surgery import attention_modules
from surgery.runtime.surgery_gates import Gate

QUICK = {"calibration_samples": 8, "calibration_length": 64}


def recipe(*steps) -> dict:
    return {"version": 1, "name": "test", "operations": list(steps), "evaluate": None}


def moh(**fields) -> dict:
    return {"op": "moh"} | fields


# --- the fit --------------------------------------------------------------------------------------------------------


def planted(seed: int = 0, tokens: int = 600, inputs: int = 9, outputs: int = 5, noise: float = 0.1):
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(tokens, inputs, generator=generator).double()
        @ torch.randn(inputs, inputs, generator=generator).double()
    )
    weights, bias = torch.randn(outputs, inputs, generator=generator).double(), torch.linspace(-3, 4, outputs).double()
    return x + 2, weights, bias, (x + 2) @ weights.T + bias + noise * torch.randn(tokens, outputs, generator=generator)


def moments_of(x, y, chunks: int = 3) -> RegressionSums:
    moments = RegressionSums(x.shape[1], y.shape[1])
    for x_chunk, y_chunk in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        moments.add(x_chunk, y_chunk)
    return moments


def test_ridge_is_that_of_the_dense_system():
    """Coefficients and errors by an explicit solve over all tokens, whatever the pieces."""
    x, _, _, y = planted(noise=3.0)
    for strength in (1e-6, 0.1, 100.0):
        centred, unit = x - x.mean(0), (x - x.mean(0)).square().mean()
        left = centred.T @ centred / len(x) + strength * unit * torch.eye(9).double()
        weights = torch.linalg.solve(left, centred.T @ (y - y.mean(0)) / len(x))
        for chunks in (1, 7):
            (got,) = moments_of(x, y, chunks).solutions([strength])
            assert (got[:-1] - weights).abs().max() < 1e-9
            assert (got[-1] - (y.mean(0) - x.mean(0) @ weights)).abs().max() < 1e-9
            want = (x @ got[:-1] + got[-1] - y).square().sum(0)
            assert torch.allclose(moments_of(x, y, chunks).errors(got), want, rtol=1e-8)


def test_ridge_finds_a_planted_router_and_a_strength_that_fits_the_noise():
    x, weights, bias, y = planted()
    got, shift, record = ridge(moments_of(x[:400], y[:400]), moments_of(x[400:], y[400:]))
    assert (got - weights).abs().max() < 0.05
    assert (shift - bias).abs().max() < 0.1
    assert record["ridge"] <= 1e-3
    assert record["explained"] > 0.99
    noise = torch.randn(600, 5, generator=torch.Generator().manual_seed(1)).double()
    _, _, record = ridge(moments_of(x[:30], noise[:30]), moments_of(x[30:], noise[30:]))
    assert record["ridge"] >= 1.0
    assert record["explained"] < 0.05


@pytest.mark.parametrize("groups", [(1,) * 6, (2, 1, 3)])
def test_worths_are_those_of_explicit_outputs(groups):
    generator = torch.Generator().manual_seed(0)
    heads, output = torch.randn(7, 6 * 4, generator=generator), torch.randn(10, 6, 4, generator=generator)
    energy, damage = (worth(heads, output, groups, score, 0.3) for score in ("energy", "damage"))
    ends = torch.tensor([0, *groups]).cumsum(0).tolist()
    for token in range(7):
        z = heads[token].double().view(6, 4)
        outputs = [sum(output[:, h].double() @ z[h] for h in range(a, b)) for a, b in pairwise(ends)]
        total = sum(outputs)
        for unit, output_of_unit in enumerate(outputs):
            assert energy[token, unit] == pytest.approx(output_of_unit.square().sum().log().item(), abs=1e-9)
            others = [other for v, other in enumerate(outputs) if v != unit]
            growth = output_of_unit @ output_of_unit + 2 * 0.3 * sum(output_of_unit @ other for other in others)
            assert damage[token, unit] == pytest.approx((growth / (total @ total)).item(), abs=1e-9)


def test_damage_is_the_mean_growth_of_the_error_over_random_sets():
    """chance = share of other units that are off: the mean over all sets of that size, by enumeration."""
    from itertools import combinations

    generator = torch.Generator().manual_seed(3)
    heads, output = torch.randn(1, 5 * 4, generator=generator), torch.randn(10, 5, 4, generator=generator)
    adds = [output[:, h].double() @ heads[0].double().view(5, 4)[h] for h in range(5)]
    got = worth(heads, output, (1,) * 5, "damage", 2 / 4)[0]
    for unit in range(5):
        growths = []
        for others in combinations([v for v in range(5) if v != unit], 2):
            without = sum(adds[v] for v in others)
            growths.append((without + adds[unit]).square().sum() - without.square().sum())
        want = sum(growths) / len(growths) / sum(adds).square().sum()
        assert got[unit].item() == pytest.approx(want.item(), abs=1e-9)


@torch.no_grad()
def test_a_layer_is_measured_on_what_the_gated_layers_before_it_give(monkeypatch):
    """The last layer's inputs are those of the model with its gates in place, run as a whole."""
    base = TINY["llama"]().eval()
    sequences = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))
    measured, add = [], RegressionSums.add
    monkeypatch.setattr(RegressionSums, "add", lambda self, x, y: measured.append(x.clone()) or add(self, x, y))
    planned = {layer: Planned(Gate("moh", (1,) * 8, (), 2), 1) for layer in (0, 1)}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    gates, records = route(base, Anatomy.of(base), planned, sequences, score="energy", router="fit")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert [record["layer"] for record in records] == [0, 1]
    model = copy.deepcopy(base)
    operation = find("moh")(op="moh")
    from surgery.runtime.modeling_surgery import patch

    patch(model, {"layers": [operation._entry(gates[layer], model) for layer in (0, 1)]})
    for layer, module in enumerate(attention_modules(model)):
        for name, values in gates[layer][1].items():
            getattr(module, f"surgery_{name}").copy_(values)
    inputs = []
    attention_modules(model)[1].register_forward_pre_hook(
        lambda m, a, k: inputs.append(k["hidden_states"][0]), with_kwargs=True
    )
    for sequence in sequences:
        model(input_ids=sequence[None], use_cache=False)
    for got, want in zip(measured[4:], inputs, strict=True):
        assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def test_shared_heads_are_those_with_the_largest_mean_and_static_takes_the_next():
    base = TINY["qwen3"]().eval()
    sequences = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))
    planned = {1: Planned(Gate("moh", (1,) * 8, (), 2), 3)}
    energies, layer = [], base.model.layers[1].self_attn

    def energy(module, args):
        z = args[0][0].double().view(20, 8, 16)
        weight = module.weight.double().view(-1, 8, 16)
        energies.append(torch.einsum("thd,Dhd->thD", z, weight).square().sum(-1).log())

    hook = layer.o_proj.register_forward_pre_hook(energy)
    for sequence in sequences:
        base(input_ids=sequence[None], use_cache=False)
    hook.remove()
    order = torch.cat(energies).mean(0).argsort(descending=True).tolist()
    gates, _ = route(base, Anatomy.of(base), planned, sequences, score="energy", router="static")
    gate, parameters = gates[1]
    assert gate.shared == tuple(sorted(order[:3]))
    assert parameters["router"].abs().max() == 0
    routed = [unit for unit in range(8) if unit not in gate.shared]
    best = parameters["router_bias"].argsort(descending=True)[:2]
    assert {routed[i] for i in best} == set(order[3:5])


# --- the operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "phi3", "gpt_neox"])
@pytest.mark.parametrize(
    "step",
    [
        moh(active_ratio=1.0, shared_ratio=0.0, router="random"),
        moh(active_ratio=1.0, shared_ratio=0.0, router="zero", granularity="kv_group", keep_first_layers=1),
        {"op": "mae", "hard": False, "router": "zero"},
    ],
    ids=["head", "kv_group", "mae"],
)
@torch.no_grad()
def test_identity(family, step):
    base = TINY[family]().eval()
    model = copy.deepcopy(base)
    report = package.apply(recipe(step), model)
    assert report.data["tier"] == "surgical"
    ids, mask = batch(base)
    want = base(**given(base, ids, mask), use_cache=False).logits
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-5
    assert difference(chunked(model, ids, mask, [20, 1, 24]), want, mask) <= 1e-5


@torch.no_grad()
def test_all_on_with_a_fitted_router_is_the_base_exactly(model):
    loaded, base = load_model(model), load_model(model)
    step = moh(active_ratio=1.0, shared_ratio=0.4, **QUICK)
    report = package.apply(recipe(step), loaded, tokenizer=read_tokenizer(model))
    assert max(p.abs().max() for n, p in loaded.named_parameters() if n.endswith("surgery_router")) > 0
    assert all(len(layer["shared"]) in (3, 4) for layer in report.data["operations"][0]["record"]["layers"])
    ids = torch.arange(4, 24)[None]
    assert torch.equal(loaded(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("granularity", ["head", "kv_group"])
def test_ratios_hold_over_all_layers(granularity):
    """What rounding leaves goes on to the next layer: the sum is that of the ratio, rounded once."""
    base = TINY["llama"](num_hidden_layers=7)
    units = 8 if granularity == "head" else 4
    for ratio in (0.3, 0.45, 0.5, 0.67, 0.9, 1.0):
        operation = find("moh")(
            op="moh", active_ratio=ratio, shared_ratio=0.13, granularity=granularity, keep_first_layers=1
        )
        counts = operation._counts(Anatomy.of(base))
        assert len(counts) == 6
        assert abs(sum(on for on, _ in counts) - ratio * 6 * units) <= 0.5 + 1e-9
        assert all(0 <= shared < on <= units for on, shared in counts)
        assert max(on for on, _ in counts) - min(on for on, _ in counts) <= 1


@torch.no_grad()
def test_a_fit_turns_on_the_heads_it_says(model):
    """Through apply: shared ones always, so many of the others; modes and other weights as they were."""
    loaded = load_model(model).train()
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    step = moh(active_ratio=0.5, shared_ratio=0.25, **QUICK)
    package.apply(recipe(step), loaded, tokenizer=read_tokenizer(model))
    assert loaded.training
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in before.items())
    choices = []
    for module in attention_modules(loaded):
        module.o_proj.register_forward_pre_hook(lambda m, _: choices.append(m.surgery_call.gates[0]))
    loaded.eval()(input_ids=torch.arange(4, 24)[None])
    counts = [4 + 1, 4]  # 4.5 of 9, and what is left over
    for choice, module, on in zip(choices, attention_modules(loaded), counts, strict=True):
        assert set(choice.unique().tolist()) == {0.0, 1.0}
        assert (choice.sum(-1) == on).all()
        assert (choice[:, list(module.surgery_gate.shared)] == 1).all()
        assert choice.mean(0).min() > 0 or (choice.mean(0) == 0).any()


def test_a_router_of_random_numbers_is_that_of_its_seed():
    models = [TINY["llama"]() for _ in range(3)]
    for one, seed in zip(models, (0, 0, 1), strict=True):
        package.apply(recipe(moh(router="random", shared_ratio=0.0, seed=seed)), one)
    first, second, third = (attention_modules(one)[1].surgery_router for one in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert first.std().item() == pytest.approx(64**-0.5, rel=0.2)


@torch.no_grad()
def test_mae_leaves_out_the_head_that_is_worth_least(model):
    """Its router is the negative of moh's for the same score."""
    one, two = load_model(model), load_model(model)
    tokenizer, quick = read_tokenizer(model), QUICK | {"score": "energy", "router": "static"}
    package.apply(recipe({"op": "mae", **quick}), one, tokenizer=tokenizer)
    package.apply(recipe(moh(active_ratio=8 / 9, shared_ratio=0.0, **quick)), two, tokenizer=tokenizer)
    for a, b in zip(attention_modules(one), attention_modules(two), strict=True):
        assert a.surgery_router_bias.argmax() == b.surgery_router_bias.argmin()
    ids = torch.arange(4, 24)[None]
    assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)


def test_one_recipe_with_every_part_saved_and_through_both_doors(surgery, model, tmp_path):
    steps = [
        {"op": "prune_heads", "granularity": "kv_group", "per_layer": 1, "scores": "magnitude", "refit": False},
        {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 6, "protect_layers": [0]},
        {"op": "sink_calibration", "method": "zero_tuning", "gamma": 0.5, "layers": [1]},
        moh(active_ratio=0.5, shared_ratio=0.2, **QUICK),
    ]
    (tmp_path / "all.yaml").write_text(json.dumps(recipe(*steps)))
    done = surgery("apply", "all.yaml", model, "-o", "out", "--no-eval")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["loads with trust_remote_code"] == statuses["both ways to load agree"] == "passed"
    one, two = json.loads((tmp_path / "out" / "config.json").read_text())["surgery"]["layers"]
    assert [layer["gate"]["active"] + len(layer["gate"]["shared"]) for layer in (one, two)] == [3, 3]
    assert set(two["parameters"]) == {
        "surgery_log_gamma",
        "surgery_router",
        "surgery_router_bias",
        "surgery_router_temperature",
        "surgery_shared_router",
        "surgery_balance",
    }
    for step in (moh(), {"op": "mae"}):
        with pytest.raises(SurgeryError, match=rf"{step['op']}: this checkpoint sets the gate .* already"):
            package.plan(recipe(step), str(tmp_path / "out"))
    with pytest.raises(SurgeryError, match="weight rewrites come before"):
        package.plan(recipe({"op": "expand"}), str(tmp_path / "out"))


def test_conflicts_name_both(model):
    with pytest.raises(SurgeryError, match="mae: moh before it sets the gate of the same heads"):
        package.plan(recipe(moh(), {"op": "mae"}), str(model))
    with pytest.raises(SurgeryError, match="moh: moh before it sets the gate"):
        package.plan(recipe(moh(), moh()), str(model))
    with pytest.raises(SurgeryError, match="weight rewrites come before moh"):
        package.plan(recipe(moh(), {"op": "gqa", "kv_heads": 1}), str(model))
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 6}
    for steps in ((split, moh()), (moh(), split)):
        assert package.plan(recipe(*steps), str(model)).tier == "surgical"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "moh",
            [
                "12 of 18 query heads are on for a token (66.7%), 5 of them for every token",
                "6 of 9 (2 shared), 6 of 9 (3 shared)",
            ],
        ),
        (
            "mae",
            ["16 of 18 query heads are on for a token, all but one in each layer", "no work is skipped in 2 of 2"],
        ),
    ],
)
def test_recipes(surgery, model, name, words):
    planned = surgery("plan", name, model)
    assert planned.code == 0, planned.err
    printed = " ".join(planned.out.split())
    assert all(word in printed for word in words), printed
    assert "surgical" in printed


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("phi3", ["no work is skipped in the query projection"]),
        ("phi", ["no work is skipped in the output projection, which is dense here"]),
        ("olmo2", ["the QK-norm spans all heads"]),
        ("gemma2", ["computes all heads"]),
        ("llama", []),
    ],
)
def test_plan_says_where_no_work_is_skipped(family, words):
    notes = " ".join(package.plan(recipe(moh()), TINY[family]()).notes)
    assert all(word in notes for word in words), notes
    assert words or ("no work" not in notes and "all heads" not in notes)
    notes = " ".join(package.plan(recipe(moh(active_ratio=0.8)), TINY[family]()).notes)
    assert "no work is skipped in 1 of 2 layers: with more than 75% on" in notes


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["active_ratio=0"], ["active_ratio", "greater than 0"]),
        (["active_ratio=1.1"], ["active_ratio should be at most 1"]),
        (["active_ratio=.nan"], ["active_ratio"]),
        (["active_ratio=0.02", "shared_ratio=0.0"],
         ["active_ratio 0.02 of 9 query heads", "layer 0", "none", "at least 1/9, 0.112"]),
        (["active_ratio=0.3", "shared_ratio=0.3"], ["shared_ratio 0.3 is not less than active_ratio 0.3"]),
        (["shared_ratio=1"], ["shared_ratio", "less than 1"]),
        (["granularity=layer"], ["granularity", "head", "kv_group"]),
        (["granularity=kv_group", "active_ratio=0.1", "shared_ratio=0.0"], ["of 3 KV groups", "none"]),
        (["keep_first_layers=2"], ["keep_first_layers 2 leaves none of the 2 layers"]),
        (["keep_first_layers=-1"], ["keep_first_layers"]),
        (["score=magnitude"], ["score", "energy", "damage"]),
        (["router=learned"], ["router", "fit"]),
        (["calibration_samples=2"], ["calibration_samples"]),
        (["calibration_samples=100000"], ["too short"]),
        (["text=nothing.txt"], ["nothing.txt"]),
    ],
)  # fmt: skip
def test_bad_fields(refused, model, overrides, says):
    refused("apply", "moh", model, "-o", "out", *overrides, says=says)


@pytest.mark.parametrize(("family", "part"), [("phi3", "qkv_proj"), ("gpt2", "c_attn"), ("gptj", "")])
def test_a_norm_needs_a_query_projection(family, part):
    model, steps = TINY[family](), recipe(moh(router="norm"))
    if not part:
        assert "norm" in " ".join(package.plan(steps, model).changes)
        return
    with pytest.raises(SurgeryError, match=f"makes queries in {part}; take router: fit"):
        package.plan(steps, model)


@pytest.mark.parametrize("router", ["norm", "zero", "fit"])
def test_shared_heads_may_be_the_first(router):
    """Then nothing is measured for them; router=norm needs no text and adds no parameter, as MoH's code for LLMs."""
    model, tokenizer = TINY["llama"](vocab_size=258), byte_tokenizer() if router == "fit" else None
    step = moh(router=router, active_ratio=0.5, shared_ratio=0.25, **(QUICK | {"shared": "first"}))
    plan = package.plan(recipe(step), model)
    assert plan.measured == (router == "fit")
    before = sum(p.numel() for p in model.parameters())
    package.apply(recipe(step), model, tokenizer=tokenizer)
    for module in attention_modules(model):
        assert module.surgery_gate.shared == (0, 1)
        assert module.surgery_gate.active == 2
        assert hasattr(module, "surgery_router_temperature") == (router != "norm")
        if router == "fit":
            assert module.surgery_router.abs().max() > 0
    added = sum(p.numel() for p in model.parameters()) - before
    assert (added == 0) == (router == "norm")
    assert plan.parameters_after == before + added
    if router == "norm":
        copies = [copy.deepcopy(model) for _ in range(2)]
        for each, balance in zip(copies, (0.0, 5.0), strict=True):
            heal = {
                "method": "full",
                "steps": 1,
                "length": 32,
                "batch_tokens": 64,
                "data": "builtin",
                "balance": balance,
            }
            package.heal(each, TINY["llama"](vocab_size=258), tokenizer=byte_tokenizer(), settings=heal)
        weights = [each.model.layers[0].self_attn.q_proj.weight for each in copies]
        assert not torch.equal(*weights), "the load balance reaches the queries"
        heal = {
            "method": "full",
            "steps": 2,
            "length": 32,
            "batch_tokens": 64,
            "data": "builtin",
            "learning_rate": 0.01,
        }
        package.heal(model, TINY["llama"](vocab_size=258), tokenizer=byte_tokenizer(), settings=heal)
        gates = []
        for module in attention_modules(model):
            module.register_forward_hook(lambda each, *_: gates.append(each.surgery_call.gates), prepend=True)
        with torch.no_grad():
            model.eval()(torch.randint(3, 200, (1, 20), generator=torch.Generator().manual_seed(0)))
        assert all(set(values.unique().tolist()) == {0.0, 1.0} for values in gates)


@pytest.mark.parametrize("shared", [0.0, 0.25])
@pytest.mark.parametrize("router", ["norm", "random", "static"])
def test_gates_that_weigh_begin_with_a_temperature(router, shared):
    """The mean of the routed gates is 1, and they differ; heads that are off count nothing."""
    model, tokenizer = TINY["llama"](vocab_size=258), byte_tokenizer()
    step = moh(router=router, gates="weigh", active_ratio=0.5, shared_ratio=shared, **QUICK)
    package.apply(recipe(step), model, tokenizer=tokenizer)
    on, gates = 4 - int(8 * shared), []
    for module in attention_modules(model):
        assert module.surgery_router_temperature.item() == 1
        assert hasattr(module, "surgery_router") == (router != "norm")
        module.register_forward_hook(lambda each, *_: gates.append(each.surgery_call.gates), prepend=True)
    with torch.no_grad():
        model(torch.randint(3, 200, (1, 20), generator=torch.Generator().manual_seed(0)))
    for module, values in zip(attention_modules(model), gates, strict=True):
        routed = values[..., module.surgery_gate.routed]
        assert ((routed > 0).sum(-1) == on).all()
        assert torch.allclose(routed.sum(-1), torch.tensor(float(on)), atol=1e-5)
        assert (routed.amax(-1) > 1.001).all()


def test_bad_fields_of_mae(refused, model):
    refused("apply", "mae", model, "-o", "out", "hard=false", "rescale=true", says=["rescale is for hard: true"])


def test_what_cannot_be_gated():
    with pytest.raises(SurgeryError, match="attention interface"):
        package.plan(recipe(moh()), TINY["bloom"]())
    with pytest.raises(SurgeryError, match="mae: a layer with a single query head"):
        package.plan(recipe({"op": "mae"}), TINY["llama"](num_attention_heads=1, num_key_value_heads=1))
    model = TINY["llama"]()
    with pytest.raises(SurgeryError, match="needs the tokenizer"):
        package.apply(recipe(moh()), model)
    assert not hasattr(model.config, "surgery")
