"""The operation sink_calibration: what it measures, searches, keeps and refuses, and that it composes and is saved."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import pytest
import torch
from conftest import edit_json
from dense import batch, chunked, dense_logits, difference, given
from families import TINY, one_thread  # noqa: F401 (a fixture)
from sinks import QUICK, Toy, log_gammas, recipe, sink

import surgery as package
from surgery.errors import SurgeryError
from surgery.io.loading import load_model, read_tokenizer
from surgery.operations.sink_calibration import virtual_keys, zero_tuning
from surgery.operations.sink_calibration.zero_tuning import Trial, first_tokens, search_gammas

NO_SINKS = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 0, "window": 6}


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_a_fixed_gamma_on_some_heads_and_a_fixed_logit_on_others(family):
    """Two terms in one recipe, on what a head split left: against explicit weights in float64."""
    base = TINY[family]().eval()
    model = copy.deepcopy(base)
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 5}
    only = {"layers": [1], "heads": [2, 5, 7], "exclude": [[1, 5]]}
    steps = [sink("zero_tuning", gamma=3, **only), sink("learned", logit=1.5, heads=[0, 7])]
    package.apply(recipe(split, *steps), model)
    log_gamma, logit = torch.zeros(8), torch.full((8, 1), -1e4)
    log_gamma[[2, 7]], logit[[0, 7]] = math.log(3), 1.5
    tensors = [{"surgery_sink_logit": logit}, {"surgery_sink_logit": logit, "surgery_log_gamma": log_gamma}]
    ids, mask = batch(base)
    all_stream = [{"streaming": [0, 1, 2, 3], "sinks": 2, "window": 5}] * 2
    want = dense_logits(base, all_stream, ids, mask, tensors)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    assert difference(chunked(model, ids, mask, [30, 1, 14]), want, mask) <= 1e-4


def _take(inputs: list, module, args, kwargs) -> None:
    inputs.append(kwargs["hidden_states"])


@torch.no_grad()
def test_first_tokens_are_measured_with_all_heads_full():
    """Keys, values and scores from the projections, position by position, in float64; the model's heads are split."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    base = TINY["llama"]().eval()
    model = copy.deepcopy(base)
    package.apply(recipe(NO_SINKS), model)
    samples, reach = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0)), [6, 9]
    keys, values, means = [[], []], [[], []], [[], []]
    for sample in samples:
        inputs: list = []
        take = partial(_take, inputs)
        hooks = [layer.self_attn.register_forward_pre_hook(take, with_kwargs=True) for layer in base.model.layers]
        base(input_ids=sample[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        cos, sin = base.model.rotary_emb(inputs[0], torch.arange(20)[None])
        for index, (hidden, layer) in enumerate(zip(inputs, base.model.layers, strict=True)):
            attention = layer.self_attn
            q, k, v = (
                projection(hidden).view(1, 20, -1, 8).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            keys[index].append(k[0, :, 0])
            values[index].append(v[0, :, 0])
            score = (q[0].double() @ k[0, :, 0].repeat_interleave(2, 0)[..., None].double())[..., 0] * 8**-0.5
            means[index].append(score[:, reach[index] :].mean(-1))
    for index, measured in enumerate(first_tokens(model, samples, reach)):
        for got, want in ((measured.key, keys), (measured.value, values), (measured.score, means)):
            assert (got - torch.stack(want[index]).mean(0)).abs().max() < 1e-4
    ids, _ = batch(base, (0,))
    again = copy.deepcopy(base)
    package.apply(recipe(NO_SINKS), again)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits), "the model was left as it was"


@torch.no_grad()
def test_a_fit_puts_what_was_measured_in_place_of_the_first_token(model, monkeypatch):
    """On heads that lost it and nowhere else; kept, and refused where it is no better than nothing."""
    tokenizer, measured = read_tokenizer(model), []
    monkeypatch.setattr(
        virtual_keys, "first_tokens", lambda *args: measured.append(first_tokens(*args)) or measured[-1]
    )
    changes = {True: -1.0, False: 0.0}
    for method, kept in (("kv_bias", True), ("learned", True), ("learned", False)):
        loaded = load_model(model)

        def objective(model, sample, kind, better=changes[kept]):
            logits = [t for name, t in model.state_dict().items() if name.endswith("sink_logit")]
            return torch.tensor(better if any((t > -9000).any() for t in logits) else 0.0)

        monkeypatch.setattr(zero_tuning, "objective", objective)
        split = NO_SINKS | {"streaming_ratio": 0.5, "scores": str(model / "scores.tsv")}
        (model / "scores.tsv").write_text("0.1 0.9 0.2\n0.8 0.7 0.3\n")
        report = package.apply(recipe(split, sink(method, **QUICK)), loaded, tokenizer=tokenizer)
        record = report.data["operations"][1]["record"]
        assert record["kept"] is kept
        tensors = loaded.state_dict()
        for layer, streaming in ((0, [0, 2]), (1, [2])):
            path = f"model.layers.{layer}.self_attn.surgery_"
            logit, value = tensors[f"{path}sink_logit"][:, 0].float(), tensors[f"{path}value"]
            heads = [3 * head + i for head in streaming for i in range(3)]
            expected = torch.full((9,), -1e4)
            if kept:
                expected[heads] = 0.0 if method == "kv_bias" else measured[-1][layer].score[heads].float()
            assert (logit - expected.bfloat16().float()).abs().max() < 1e-6
            want = measured[-1][layer].value.bfloat16() if kept else torch.zeros_like(value[:, 0])
            assert torch.equal(value[:, 0], want)
            if method == "kv_bias":
                assert torch.equal(tensors[f"{path}key"][:, 0], measured[-1][layer].key.bfloat16())
        assert loaded.config.surgery["layers"][0]["stand_in"] is True


# --- the search -----------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    def make(fit, held):
        model = Toy(fit, held)
        monkeypatch.setattr(zero_tuning, "objective", lambda model, sample, kind: model.objective(sample, kind))
        samples = torch.tensor([[1, 0], [1, 5], [0, 1], [0, 9]])
        return model, Trial(model, list(model.logs), samples[:2], samples[2:])

    return make


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("uniform", [[0.4, 0.4, 0.4], [0.4, 0.4, 0.4]]),
        ("layers", [[0.2, 0.2, 0.2], [1.0, 1.0, 1.0]]),
        ("heads", [[0.4, 0.4, 0.0], [0.4, 0.4, 0.4]]),
    ],
)
def test_search_finds_the_best_of_the_grid(toy, groups, expected):
    target = {
        "uniform": [[0.4, 0.5, 0.3], [0.4, 0.4, 0.4]],
        "layers": [[0.6, 0.2, -0.2], [0.9, 1.0, 1.1]],
        "heads": [[0.4, 0.5, 0.0], [0.3, 0.4, 0.4]],
    }[groups]
    model, trial = toy(target, target)
    grid = [math.exp(x) for x in (-0.5, 0.2, 0.4, 1.0)]
    record = search_gammas(trial, [torch.ones(3), torch.ones(3)], grid, groups)
    assert record["kept"] is True
    for got, want in zip(model.logs, expected, strict=True):
        assert torch.allclose(got.detach(), torch.tensor(want), atol=1e-6)


@pytest.mark.parametrize("groups", ["uniform", "layers", "heads"])
@pytest.mark.parametrize("gamma", [1.5, 1 / 1.5])
def test_without_a_grid_more_and_less_of_the_first_token_are_tried(toy, groups, gamma):
    target = [[math.log(gamma)] * 2, [math.log(gamma)] * 2]
    model, trial = toy(target, target)
    record = search_gammas(trial, [torch.ones(2)] * 2, None, groups)
    assert record["kept"] is True
    assert len(record["tried"]) - 1 == {"uniform": 8, "layers": 16, "heads": 12}[groups]
    for got in model.logs:
        assert torch.allclose(got.detach(), torch.tensor(target[0]), atol=1e-6)


def test_search_moves_heads_both_ways_and_only_those_that_may(toy):
    target = [[0.4, -0.4, 0.4, -0.4]]
    model, trial = toy(target, target)
    record = search_gammas(trial, [torch.tensor([1.0, 1.0, 0.0, 0.0])], [math.exp(0.4), math.exp(0.1)], "heads")
    assert torch.allclose(model.logs[0].detach(), torch.tensor([0.4, -0.4, 0.0, 0.0]), atol=1e-6)
    assert record["held_back_change"] == pytest.approx(-0.32, abs=1e-6)
    assert {trial.get("side") for trial in record["tried"]} == {None, "more", "less", "both"}


@pytest.mark.parametrize("held", [[[-0.4, -0.4]], [[0.2, 0.2]]])
def test_search_keeps_nothing_that_is_no_better_on_text_held_back(toy, held):
    model, trial = toy([[0.4, 0.4]], held)
    record = search_gammas(trial, [torch.ones(2)], [math.exp(0.4)], "uniform")
    assert record["kept"] is False
    assert record["held_back_change"] >= -1e-6
    assert torch.equal(model.logs[0].detach(), torch.zeros(2))


@pytest.mark.parametrize("second", [[0, 9], [0, 1]])
def test_a_gain_on_copies_of_one_text_is_not_kept(toy, second):
    """Its standard error would be 0; of two texts that differ it is one."""
    model, trial = toy([[0.4, 0.4]], [[0.4, 0.4]])
    trial.validation = torch.tensor([[0, 1], second, [0, 1]])
    record = search_gammas(trial, [torch.ones(2)], [math.exp(0.4)], "uniform")
    copies = second == [0, 1]
    assert record["kept"] is not copies
    assert record["texts"] == (1 if copies else 2)
    assert record["standard_error"] == (None if copies else pytest.approx(0.0, abs=1e-6))
    assert "two standard errors" in record["kept_if"]
    assert bool(model.logs[0].any()) is not copies


def test_a_gain_within_its_standard_error_is_not_kept(monkeypatch):
    """Paired over texts: -0.3, -0.1, +0.1, -0.3 is -0.15 with an error of 0.0957, so 1.6 of them."""
    changes = {0: -0.3, 1: -0.1, 2: 0.1, 3: -0.3}
    model = torch.nn.Module()
    model.log = torch.nn.Parameter(torch.zeros(1))

    def objective(model, sample, kind):
        return torch.tensor(float(sample[1]) + (changes[int(sample[0])] if model.log.item() else 0.0))

    monkeypatch.setattr(zero_tuning, "objective", objective)
    samples = torch.tensor([[0, 5], [1, 50], [2, 0], [3, 7]])
    record = Trial(model, [model.log], samples, samples).settle([torch.ones(1)])
    assert record["held_back_change"] == pytest.approx(-0.15, abs=1e-5)
    assert record["standard_error"] == pytest.approx(0.0957, abs=1e-4)
    assert (record["kept"], model.log.item()) == (False, 0.0)
    changes[2] = -0.2  # -0.225 with an error of 0.0479: 4.7 of them
    assert Trial(model, [model.log], samples, samples).settle([torch.ones(1)])["kept"] is True


def test_search_that_finds_nothing_says_so(toy):
    model, trial = toy([[0.0, 0.0]], [[0.4, 0.4]])
    record = search_gammas(trial, [torch.ones(2)], [math.exp(0.4)], "uniform")
    assert record["kept"] is False
    assert torch.equal(model.logs[0].detach(), torch.zeros(2))


@pytest.mark.parametrize("groups", ["uniform", "layers", "heads"])
def test_search_on_a_model_leaves_modes_and_gradients(model, groups):
    loaded = load_model(model).train()
    loaded.model.embed_tokens.weight.requires_grad_(False)
    grads = [parameter.requires_grad for parameter in loaded.parameters()]
    step = sink("zero_tuning", groups=groups, objective="entropy", grid=[2.0], layers=[1], heads=[0, 8], **QUICK)
    report = package.apply(recipe(step), loaded, tokenizer=read_tokenizer(model))
    record = report.data["operations"][0]["record"]
    assert record["objective"] == "entropy"
    (log_gamma,) = log_gammas(loaded)
    assert (log_gamma[1:8] == 0).all()
    assert (log_gamma.abs().max() > 0) == record["kept"]
    assert loaded.training
    named = [p for name, p in loaded.named_parameters() if "surgery_" not in name]
    assert [parameter.requires_grad for parameter in named] == grads
    assert all(parameter.grad is None for parameter in loaded.parameters())


# --- plans, files, refusals -----------------------------------------------------------------------------------------


def test_one_recipe_with_every_part_saved_and_through_both_doors(surgery, model, tmp_path):
    steps = [
        {"op": "gqa", "kv_heads": 1},
        {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 6, "protect_layers": [0]},
        sink("zero_tuning", gamma=0.5, layers=[1], heads=[4]),
        sink("kv_bias", start="identity", layers=[0]),
    ]
    (tmp_path / "all.yaml").write_text(json.dumps(recipe(*steps)))
    done = surgery("apply", "all.yaml", model, "-o", "out", "--no-eval")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["loads with trust_remote_code"] == statuses["both ways to load agree"] == "passed"
    one, two = json.loads((tmp_path / "out" / "config.json").read_text())["surgery"]["layers"]
    assert one["parameters"] == {"surgery_sink_logit": [9, 1], "surgery_value": [1, 1, 8], "surgery_key": [1, 1, 8]}
    assert (two["parameters"], two["streaming"]) == ({"surgery_log_gamma": [9]}, [0])
    (log_gamma,) = log_gammas(package.load(tmp_path / "out"))
    assert log_gamma.float().tolist() == [0.0] * 4 + [torch.tensor(math.log(0.5)).bfloat16().item()] + [0.0] * 4
    for method, term in (("zero_tuning", "bias"), ("learned", "virtual keys")):
        again = recipe(sink(method, **({"gamma": 2.0} if term == "bias" else {"start": "identity"})))
        with pytest.raises(SurgeryError, match=rf"sets the {term} .*already"):
            package.plan(again, str(tmp_path / "out"))
    with pytest.raises(SurgeryError, match="weight rewrites come before"):
        package.plan(recipe({"op": "expand"}), str(tmp_path / "out"))


def test_apply_says_that_a_search_kept_nothing(surgery, model, text):
    """A plan says what is searched; what was done must not be taken from it."""
    overrides = ["gamma=null", "grid=[1]", "calibration_samples=4", "calibration_length=32"]
    run = surgery("apply", "zero-tuning", model, "-o", "out", f"operations.0.text={text}", *overrides, "--no-eval")
    assert run.code == 0, run.err
    assert "found:     sink_calibration zero_tuning: no setting was kept (none that was tried" in " ".join(
        run.out.split("\n")
    )
    assert "no setting was kept" in (model.parent / "out" / "README.md").read_text()


def test_two_operations_of_one_term_are_refused_and_of_two_are_not(model):
    bias, keys = sink("zero_tuning", gamma=2.0), sink("learned", logit=0.0)
    with pytest.raises(SurgeryError, match="sink_calibration before it sets the bias"):
        package.plan(recipe(bias, bias), str(model))
    with pytest.raises(SurgeryError, match="sets the virtual keys"):
        package.plan(recipe(keys, sink("kv_bias", start="identity")), str(model))
    with pytest.raises(SurgeryError, match="weight rewrites come before"):
        package.plan(recipe(bias, {"op": "gqa", "kv_heads": 1}), str(model))
    assert package.plan(recipe(bias, keys), str(model)).tier == "surgical"


@pytest.mark.parametrize("name", ["zero-tuning", "learned-sinks", "duo-with-sinks"])
def test_recipes(surgery, model, name):
    planned = surgery("plan", name, model, "--json")
    assert planned.code == 0, planned.err
    assert planned.json["tier"] == "surgical"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["gamma=0"], ["gamma", "at least 0.001"]),
        (["gamma=-1"], ["gamma", "at least 0.001"]),
        (["gamma=.inf"], ["gamma"]),
        (["gamma=.nan"], ["gamma"]),
        (["grid=[]"], ["grid"]),
        (["grid=[1.5,0]"], ["grid"]),
        (["method=zerotuning"], ["method"]),
        (["layers=[5]"], ["layers [5]", "layers 0 to 1"]),
        (["layers=[-1]"], ["layers"]),
        (["heads=[9]"], ["heads [9]", "query heads 0 to 8"]),
        (["heads=[]"], ["must not be empty"]),
        (["exclude=[[2,0]]"], ["exclude [[2, 0]]", "no such"]),
        (["exclude=[[0,9]]"], ["exclude [[0, 9]]", "no such"]),
        (["exclude=[[0]]"], ["exclude"]),
        (["layers=[1]", "heads=[3]", "exclude=[[1,3]]"], ["leaves no head"]),
        (["method=learned"], ["these heads see it", "sinks: 0"]),
        (["method=kv_bias", "gamma=2"], ["gamma is for method: zero_tuning"]),
        (["method=kv_bias", "logit=2"], ["logit is for method: learned"]),
        (["method=act", "groups=uniform"], ["groups is for method: zero_tuning, not act"]),
        (["method=kv_bias", "objective=entropy"], ["objective is for method: zero_tuning or act, not kv_bias"]),
        (["start=identity"], ["start is for method: learned or kv_bias, not zero_tuning"]),
        (["gamma=2", "grid=[1.5]"], ["grid, groups and objective are for a gamma that is searched"]),
        (["method=learned", "logit=0", "value=zero"], ["logit takes the place of a fit"]),
        (["calibration_samples=2"], ["calibration_samples"]),
        (["gamma=2", "calibration_length=64"], ["nothing is measured here: drop calibration_length"]),
        (["calibration_samples=100000"], ["too short"]),
    ],
)
def test_bad_fields(refused, model, overrides, says):
    refused("apply", "zero-tuning", model, "-o", "out", *overrides, says=says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sink_calibration.method=zero_tuning"], ["stream without sinks", "duo_attention.sinks from 1"]),
        (["window=600"], ["calibration_length 512", "give more than 601"]),
        (["sinks=1"], ["these heads see it"]),
    ],
)
def test_what_does_not_go_with_a_head_split(refused, model, overrides, says):
    refused("apply", "learned-sinks", model, "-o", "out", *overrides, says=says)


def test_a_split_without_sinks_after_a_weight_for_the_first_token_is_refused(surgery, refused, model, tmp_path):
    """In one recipe, on a checkpoint, and where the heads are known only when they were measured."""
    weigh = sink("zero_tuning", gamma=2.0, layers=[1], heads=[8])
    split = {"op": "duo_attention", "sinks": 0, "window": 6}
    (tmp_path / "low.tsv").write_text("0.9 0.9 0.9\n0.9 0.9 0.1\n")
    (tmp_path / "high.tsv").write_text("0.1 0.9 0.9\n0.9 0.9 0.9\n")
    given_scores = {"scores": "low.tsv", "streaming_ratio": 0.17}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(weigh, split | given_scores)))
    refused("plan", "r.yaml", model, says=["stream without sinks", "heads [8] of layer 1", "sinks from 1"])
    for fields in ({"sinks": 1}, {"scores": "high.tsv"}, {"protect_layers": [1]}):
        (tmp_path / "r.yaml").write_text(json.dumps(recipe(weigh, split | given_scores | fields)))
        assert surgery("plan", "r.yaml", model).code == 0, fields
    (tmp_path / "w.yaml").write_text(json.dumps(recipe(weigh)))
    assert surgery("apply", "w.yaml", model, "-o", "weighed", "--no-check", "--no-eval").code == 0
    (tmp_path / "s.yaml").write_text(json.dumps(recipe(split | given_scores)))
    refused("plan", "s.yaml", "weighed", says=["weighs the first token (zero_tuning) in layers [1]", "sinks from 1"])
    (tmp_path / "s.yaml").write_text(json.dumps(recipe(split | given_scores | {"protect_layers": [1]})))
    assert surgery("plan", "s.yaml", "weighed").code == 0


def test_a_split_that_is_measured_is_looked_at_when_it_is_known(model, monkeypatch):
    from surgery.calibration.head_scores import HeadScores
    from surgery.operations.head_scorers.choice import HeadChoice

    weigh = sink("zero_tuning", gamma=2.0, layers=[1], heads=[8])
    split = {"op": "duo_attention", "sinks": 0, "window": 6, "streaming_ratio": 0.17}  # planned: head 0 of layer 0
    for scores, lost in (([[1.0] * 3, [1.0, 1.0, 0.0]], True), ([[0.0, 1.0, 1.0], [1.0] * 3], False)):
        monkeypatch.setattr(HeadChoice, "measure", lambda *_, found=scores: HeadScores("measured", found))
        loaded = load_model(model)
        if lost:
            with pytest.raises(SurgeryError, match=r"heads .8. of layer 1 stream without sinks"):
                package.apply(recipe(weigh, split), loaded)
        else:
            package.apply(recipe(weigh, split), loaded)


@pytest.mark.parametrize("method", ["learned", "kv_bias"])
def test_a_window_as_long_as_the_models_positions_is_refused(refused, model, method):
    """Pieces of text are cut to the positions, so that no query lies behind the window, whatever is asked for."""
    edit_json(model / "config.json", max_position_embeddings=256)
    says = ["no positions behind the window of 256 tokens", "choose a smaller window"]
    refused("plan", "learned-sinks", model, f"sink_calibration.method={method}", says=says)
    refused("apply", "learned-sinks", model, "-o", "out", f"sink_calibration.method={method}", says=says)


def test_families_outside_the_interface_are_refused():
    with pytest.raises(SurgeryError, match="attention interface"):
        package.plan(recipe(sink("zero_tuning", gamma=2.0)), TINY["bloom"]())


@pytest.mark.parametrize(("method", "refused"), [("act", True), ("zero_tuning", False)])
def test_unequal_query_groups_are_refused_where_attention_is_measured(method, refused):
    """At plan: after pruning it would be too late, and a model in memory half changed."""
    prune = {"op": "prune_heads", "granularity": "head", "heads": [[0, 3], [2, 7]], "scores": "magnitude"}
    steps = recipe(prune | {"refit": False}, sink(method))
    if not refused:
        assert package.plan(steps, TINY["llama"]()).tier == "surgical"
        return
    with pytest.raises(SurgeryError, match="unequally many query heads"):
        package.plan(steps, TINY["llama"]())


def test_copies_of_a_question_count_once(tmp_path):
    from surgery.data.questions import faults_of

    lines = [json.dumps({"prompt": f"a {i}", "choices": ["b", "c"], "answer": 0}) for i in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines[:7] * 2))
    assert "has 7 different questions" in faults_of(tmp_path / "q.jsonl")[0]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert not faults_of(tmp_path / "q.jsonl")


@pytest.mark.parametrize(("fields", "count"), [({"gamma": 2.0}, 0), ({}, 1)])
def test_the_card_says_only_what_holds(fields, count):
    from surgery.operations.sink_calibration.operation import SinkCalibration

    assert len(SinkCalibration(**sink("zero_tuning", **fields)).limitations()) == count


def test_measuring_needs_a_tokenizer():
    model = TINY["llama"]()
    with pytest.raises(SurgeryError, match="needs the tokenizer"):
        package.apply(recipe(sink("zero_tuning")), model)
    assert not hasattr(model.config, "surgery")
