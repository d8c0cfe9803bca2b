"""ACT: less weight for sinks other than the first token; closed form, runtime, probes, choice of heads, operation."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
import torch
from dense import LENGTH, batch, chunked, dense_logits, difference, given, random_terms
from families import TINY, base, double, one_thread  # noqa: F401 (a fixture)
from sink_terms import FAMILIES, SPLITS, entries, operated, random_attention
from sinks import QUICK, Toy, recipe, sink

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.io.loading import load_model, read_tokenizer
from surgery.operations.sink_calibration import act, zero_tuning
from surgery.operations.sink_calibration.act import agreement, best_cut, choose_heads, set_probes
from surgery.operations.sink_calibration.zero_tuning import Trial, gradients
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime.surgery_act import MOST, scale_share

# --- the closed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.4, 1e-3])
def test_the_closed_form_moves_weight_as_act_says(beta):
    """Sinks' weights times beta, what is freed to the other keys in proportion: on the whole softmax."""
    query, key, value = random_attention(1)
    scores = query @ key.mT / 5
    weights, lse, sinks = scores.softmax(-1), scores.logsumexp(-1), [1, 4, 5]
    share = weights[..., sinks].sum(-1)
    assert share.max() < MOST
    part = weights[..., sinks] @ value[:, :, sinks]
    got, got_lse = scale_share(weights @ value, lse, share, part, torch.tensor(beta, dtype=torch.float64).log())
    moved = weights.clone()
    others = [key for key in range(7) if key not in sinks]
    freed = (1 - beta) * share[..., None]
    moved[..., sinks] *= beta
    moved[..., others] += freed * weights[..., others] / weights[..., others].sum(-1, keepdim=True)
    assert (got - moved @ value).abs().max() < 1e-12
    biased = scores.clone()
    biased[..., sinks] += (beta * (1 - share) / (1 - beta * share)).log()[..., None]
    assert (got_lse - biased.logsumexp(-1)).abs().max() < 1e-12


def test_a_row_that_sees_sinks_alone_or_nothing_stays_as_it_is():
    out, lse = torch.randn(3, 4).double(), torch.tensor([0.3, -torch.inf, 0.5]).double()
    share = torch.tensor([1.0, 0.0, MOST]).double()
    part = share[:, None] * out
    log_beta = torch.tensor(0.4).double().log().requires_grad_()
    got, got_lse = scale_share(out, lse, share, part, log_beta)
    assert (got[:2] - out[:2]).abs().max() < 1e-12
    assert got_lse[1] == -torch.inf
    got.sum().backward()
    assert log_beta.grad.isfinite()


def test_gradients_of_the_closed_form():
    query, key, value = (tensor[:1, :2].clone().requires_grad_() for tensor in random_attention())
    log_beta = torch.tensor([[-0.5], [-2.0]]).double().requires_grad_()

    def function(query, key, value, log_beta):
        weights = (query @ key.mT).softmax(-1)
        share, part = weights[..., 2:4].sum(-1), weights[..., 2:4] @ value[:, :, 2:4]
        return scale_share(weights @ value, (query @ key.mT).logsumexp(-1), share, part, log_beta)

    assert torch.autograd.gradcheck(function, (query, key, value, log_beta))


# --- the runtime ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
@torch.no_grad()
def test_random_settings_against_explicit_weights(seed):
    """Family, split, padding and chunks at random; decode of one token at a time at the end."""
    draw = random.Random(seed)
    model, sinks = base(FAMILIES[seed % 4]), draw.choice([*SPLITS.values()])
    ids, mask = batch(model, (0, draw.randrange(1, 20)))
    tensors = random_terms(model, "act", seed)
    want = dense_logits(model, entries(model, sinks, tensors, False), ids, mask, tensors)
    patched = operated(model, sinks, tensors)
    first, second = sorted(draw.sample(range(1, LENGTH - 3), 2))
    chunks = [first, second - first, *[1] * (LENGTH - second)]
    assert difference(patched(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    assert difference(chunked(patched, ids, mask, chunks), want, mask) <= 1e-4
    plain = operated(model, sinks, [{}, {}])(**given(model, ids, mask), use_cache=False).logits
    assert difference(plain, want, mask) > 1e-3, "nothing changes here: the test has no power"


@pytest.mark.parametrize("family", [name for name in TINY if not Anatomy.of(base(name)).runtime_problem()])
@torch.no_grad()
def test_beta_1_is_the_base_in_every_family(family):
    plain, model = base(family), copy.deepcopy(base(family))
    package.apply(recipe(sink("act", beta=1.0)), model)
    for module in runtime.attention_modules(model):
        module.surgery_sink_probe.fill_(1.0)  # sinks are found, and keep their weight
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    want = plain(input_ids=ids, use_cache=False).logits
    assert difference(model(input_ids=ids, use_cache=False).logits, want, mask) <= 1e-5
    assert difference(chunked(model, ids, mask, [11, 1, 8]), want, mask) <= 1e-5


@torch.no_grad()
def test_generation_beams_and_a_cropped_cache():
    model = operated(base("gemma2"), 2, random_terms(base("gemma2"), "act", 4))
    ids, mask = batch(model)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 3):
        made = model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **options)
        again = model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, use_cache=False, **options)
        assert torch.equal(made, again)
    row = ids[:1]
    cache = model.make_cache()
    cache.activate_past_recording()
    model(input_ids=row[:, :30], **{runtime.CACHE: cache})
    model(input_ids=row[:, 5:12], **{runtime.CACHE: cache})  # taken back
    cache.crop(-7)
    got = model(input_ids=row[:, 30:], **{runtime.CACHE: cache}).logits
    want = model(input_ids=row, use_cache=False).logits[:, 30:]
    assert difference(got, want, torch.ones_like(row[:, 30:])) <= 1e-5


def test_gradients_reach_beta_where_it_is_1():
    """The choice of heads goes by this slope: against one-sided differences, since beta is at most 1."""
    tensors = [{k: t.double() for k, t in named.items()} for named in random_terms(base("llama"), "act", 2)]
    model = operated(double(base("llama")), None, tensors)
    ids, _ = batch(model, (0,))
    weights = torch.randn(LENGTH, 128, generator=torch.Generator().manual_seed(0)).double()

    def loss():
        return (model(input_ids=ids, use_cache=False).logits * weights).sum()

    for module in runtime.attention_modules(model):
        beta, step = module.surgery_log_beta, -0.01 * torch.linspace(0.5, 1.5, 8).double()
        with torch.no_grad():
            for each in runtime.attention_modules(model):
                each.surgery_log_beta.zero_()
        (slope,) = torch.autograd.grad(loss(), beta)
        values = []
        for _ in range(3):
            with torch.no_grad():
                values.append(loss())
                beta += step
        expected = (4 * values[1] - 3 * values[0] - values[2]) / 2
        assert (slope @ step).item() == pytest.approx(expected.item(), rel=1e-2)  # norms compute in float32


# --- the calibration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_has_the_best_f1(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, generator=generator)
    marked = scores + torch.randn(40, generator=generator) > 1

    def f1(cut: float) -> float:
        predicted = [x > cut for x in scores.tolist()]
        both = sum(p and m for p, m in zip(predicted, marked.tolist(), strict=True))
        return 2 * both / (sum(predicted) + marked.sum().item())

    best = max(f1(x - 1e-6) for x in scores.tolist())
    assert f1(best_cut(scores, marked).item()) == pytest.approx(best)


def eager_sums(model, sample) -> list[torch.Tensor]:
    """What every judged key gets from all queries, from the whole attention map of every layer: [heads, keys]."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    maps = model(input_ids=sample[None], output_attentions=True, use_cache=False).attentions
    length, sums_of_layers = len(sample), []
    for weights in maps:
        rows = [
            [sum(weights[0, h, i, j].item() for i in range(j, length)) for j in range(1, length // 2 + 1)]
            for h in range(weights.shape[1])
        ]
        sums_of_layers.append(torch.tensor(rows))
    return sums_of_layers


@torch.no_grad()
def test_probes_agree_with_acts_rule_as_often_as_they_say():
    plain, alpha, length = base("llama"), 1.5, 24
    model = copy.deepcopy(plain)
    package.apply(recipe(sink("act", beta=1.0)), model)
    samples = torch.randint(3, 128, (5, length), generator=torch.Generator().manual_seed(3))
    probes = {module.layer_idx: module.surgery_sink_probe for module in runtime.attention_modules(model)}
    set_probes(model, probes, samples[:4], alpha=alpha)
    count, mass = {"said": 0, "marked": 0, "both": 0}, {"said": 0.0, "marked": 0.0, "both": 0.0}
    cache = plain(input_ids=samples[4:], use_cache=True)[runtime.CACHE]
    for layer, sums in enumerate(eager_sums(plain, samples[4])):
        values, probe = cache.layers[layer].values[0].double(), probes[layer].double()
        for head in range(8):
            for key in range(1, 13):
                v, total = values[head // 2, key], sums[head, key - 1].item()
                predicted = bool(probe[head, :-2] @ v + probe[head, -2] * v.norm() + probe[head, -1] > 0)
                marked = total / (length - key) > alpha / length
                for name, holds in (("said", predicted), ("marked", marked), ("both", predicted and marked)):
                    count[name] += holds
                    mass[name] += holds * total
    assert 0 < count["both"] < count["said"]
    expected = {"sinks": count["marked"], "found": count["said"]}
    for name, sums in (("", count), ("mass_", mass)):
        expected[f"{name}precision"] = sums["both"] / sums["said"]
        expected[f"{name}recall"] = sums["both"] / sums["marked"]
    assert agreement(model, probes, samples[4:], alpha) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_probes_learn_a_rule_that_values_tell(monkeypatch):
    """Tokens of one direction are sinks of some heads, short ones of others, and a head without any gets no probe."""
    generator, rule = torch.Generator().manual_seed(1), torch.randn(6, generator=torch.Generator().manual_seed(2))

    def text(n: int):
        value = torch.randn(1, 2, n, 6, generator=generator) * torch.rand(1, 2, n, 1, generator=generator)
        along, short = value[0] @ rule > 1, value[0].norm(dim=-1) < 0.3
        marked = torch.stack([along[0], short[0], short[1], torch.zeros(n, dtype=torch.bool)])
        return value, torch.ones(4, n), marked, torch.arange(n) % 3 > 0

    def each_call(model, layers, samples, alpha, visit, progress, label):
        for sample in samples:
            visit(0, *sample)

    monkeypatch.setattr(act, "_each_call", each_call)
    probes = {0: torch.zeros(4, 8)}
    set_probes(None, probes, [text(300) for _ in range(6)], alpha=5.0)
    result = agreement(None, probes, [text(300) for _ in range(4)], 5.0)
    assert result["sinks"] > 100
    assert min(result["precision"], result["recall"]) > 0.9
    assert torch.equal(probes[0][3], torch.zeros(8))


@pytest.mark.parametrize(("held", "kept"), [(-1.0, True), (0.3, False)])
def test_the_heads_that_gain_are_chosen_and_kept_if_they_gain_elsewhere(monkeypatch, held, kept):
    log = math.log(0.4)
    fit = [[log, 0.5, log], [0.3, log, -0.01]]  # the last gains by its slope and loses by beta
    model = Toy(fit, [[held] * 3, [held] * 3])
    monkeypatch.setattr(zero_tuning, "objective", lambda model, sample, kind: model.objective(sample, kind))
    samples = torch.tensor([[1, 0], [1, 5], [0, 1], [0, 9]])
    targets = {0: [0, 1, 2], 1: [0, 1, 2]}
    record = choose_heads(Trial(model, list(model.logs), samples[:2], samples[2:]), targets, 0.4)
    assert record["kept"] is kept
    assert [trial["heads"] for trial in record["tried"]] == [0, 4, 2, 1, 1]
    best = min(record["tried"], key=lambda trial: trial["fit"])["heads"]
    assert sum((row < 0).sum().item() for row in model.logs) == (best if kept else 0)
    assert all(x in (0.0, pytest.approx(log)) for row in model.logs for x in row.tolist())


def test_a_layer_without_any_sink_has_no_slope():
    model = operated(base("llama"), None, random_terms(base("llama"), "act", 2))
    modules = runtime.attention_modules(model)
    with torch.no_grad():
        modules[1].surgery_sink_probe.zero_()
    samples = batch(model, (0,))[0]
    trial = Trial(model, [module.surgery_log_beta for module in modules], samples, samples)
    first, second = gradients(trial)
    assert first.abs().max() > 0
    assert torch.equal(second, torch.zeros(8))


# --- the operation --------------------------------------------------------------------------------------------------


def test_the_operation_on_a_model_and_its_record(model):
    loaded = load_model(model).train()
    report = package.apply(
        recipe(sink("act", beta=0.5, threshold=1.5, layers=[1], heads=[0, 4], **QUICK)),
        loaded,
        tokenizer=read_tokenizer(model),
    )
    record = report.data["operations"][0]["record"]
    assert record["beta"] == 0.5
    assert set(record["agreement"]) == {"precision", "recall", "mass_precision", "mass_recall", "sinks", "found"}
    parameters = {name: p for name, p in loaded.named_parameters() if "surgery_" in name}
    assert sorted(name.rpartition(".")[2] for name in parameters) == ["surgery_log_beta", "surgery_sink_probe"]
    chosen = (runtime.attention_modules(loaded)[1].surgery_log_beta < 0).nonzero()[:, 0].tolist()
    assert record["heads"] == ({"1": chosen} if chosen else {})
    assert bool(chosen) == record["kept"]
    assert set(chosen) <= {0, 4}
    assert loaded.training


def test_after_a_head_split_saved_and_through_both_doors(surgery, model, tmp_path):
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 6, "protect_layers": [0]}
    act = sink("act", beta=0.5, threshold=1.5, exclude=[[1, 3]], **QUICK)
    (tmp_path / "both.yaml").write_text(json.dumps(recipe(split, act)))
    done = surgery("apply", "both.yaml", model, "-o", "out", "--no-eval")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["loads with trust_remote_code"] == statuses["both ways to load agree"] == "passed"
    (_, layer) = json.loads((tmp_path / "out" / "config.json").read_text())["surgery"]["layers"]
    assert layer["parameters"] == {"surgery_log_beta": [9], "surgery_sink_probe": [9, 10]}
    assert layer["streaming"] == [0, 1, 2]
    loaded = package.load(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again = package.load(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.state_dict().items())


def test_the_shipped_recipe_plans(surgery, model):
    planned = surgery("plan", "act", model, "--json")
    assert planned.code == 0, planned.err
    assert planned.json["tier"] == "surgical"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["beta=0"], ["beta", "greater than 0"]),
        (["beta=1.5"], ["beta should be at most 1"]),
        (["threshold=0"], ["threshold"]),
        (["gamma=2"], ["gamma is for method: zero_tuning, not act"]),
        (["method=zero_tuning", "beta=0.5"], ["beta is for method: act, not zero_tuning"]),
    ],
)
def test_bad_fields(refused, model, overrides, says):
    refused("apply", "act", model, "-o", "out", *overrides, says=says)


def test_two_biases_are_refused_in_one_recipe_and_one_after_the_other(model):
    act, gamma = sink("act", beta=1.0), sink("zero_tuning", gamma=2.0)
    with pytest.raises(SurgeryError, match="sets the bias"):
        package.plan(recipe(act, gamma), str(model))
    loaded = load_model(model)
    package.apply(recipe(act), loaded)
    with pytest.raises(SurgeryError, match=r"sets the bias .* already"):
        package.plan(recipe(gamma), loaded)
