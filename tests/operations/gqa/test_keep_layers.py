"""gqa's keep_layers and keep_kv: layers that lose most by sharing keep their KV heads, or more of them."""

from __future__ import annotations

import copy
import itertools
import json
import random

import pytest
from closed_form import SEQUENCES, Stopped, Tokens, closed, copies_in, numbers, recipe, same  # noqa: F401
from families import (
    attention_modules,
    base,
    build,
    check_both_ways_to_load,
    difference,
    layers_of,
    logits_of,
)

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.head_scores import HeadScores
from surgery.config import recipe as recipes
from surgery.errors import SurgeryError, UnsupportedModelError
from surgery.operations.gqa.heads_by_layer import choose_heads, kept_first, largest_total, possible_numbers
from surgery.operations.gqa.layer import SharedLayer
from surgery.operations.gqa.lost_alone import LayerLosses, validation_samples
from surgery.operations.head_scorers.choice import HeadChoice
from surgery.report.card_sections import provenance


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_layers_that_can_share_do(name, numbers, tmp_path):
    """Of two layers one has heads that are copies: it shares them without loss, and the other keeps its own."""
    models = {}
    for layer in range(2):
        old = copies_in(layer, name)
        model = copy.deepcopy(old)
        steps = recipe(closed(numbers, 2, keep_layers=0.5, grouping="similarity"))
        plan = package.plan(steps, old)
        assert "which 1 of 2 layers keep their KV heads is measured" in " ".join(plan.notes)
        report = package.apply(steps, model, tokenizer=Tokens())
        assert report.data["tier"] == "surgical"
        heads = [anatomy.kv_heads for anatomy in Anatomy.of(model).layers]
        assert heads == ([2, 4] if layer == 0 else [4, 2])
        kept_layers = [attention_modules(each)[1 - layer].state_dict() for each in (model, old)]
        assert same(*kept_layers)
        losses = [each["lost_alone"] for each in layers_of(report.data).values()]
        assert losses[layer] <= 1e-6 < 1e-3 < losses[1 - layer]
        assert difference(logits_of(model), logits_of(old)) <= 1e-3
        models[tmp_path / f"{layer}"] = model
    check_both_ways_to_load(models, tmp_path)


def test_a_loss_is_the_kl_to_the_base_with_that_layer_alone(numbers):
    """Against the layer converted alone by a list, its logits and the base's in float64."""
    model = copy.deepcopy(base("llama"))
    report = package.apply(recipe(closed(numbers, 1, keep_layers=0.5)), model, tokenizer=Tokens())
    losses = [each["lost_alone"] for each in layers_of(report.data).values()]
    validation = SEQUENCES[[5, 11]]
    base_logps = logits_of(base("llama"), validation).double().log_softmax(-1)
    for layer, counts in enumerate(([1, 4], [4, 1])):
        converted = copy.deepcopy(base("llama"))
        package.apply(recipe(closed(numbers, counts, refit=["q", "k", "v", "o"])), converted, tokenizer=Tokens())
        logps = logits_of(converted, validation).double().log_softmax(-1)
        assert losses[layer] == pytest.approx(
            (base_logps.exp() * (base_logps - logps)).sum(-1).mean().item(), rel=1e-3
        )


def test_texts_of_both_halves_are_tried():
    """Of mixed text the second half is the model's own."""
    assert validation_samples(40) == [5, 11, 23, 29]
    assert validation_samples(48) == [5, 17, 29, 41]
    assert validation_samples(12) == [5, 11]
    assert validation_samples(4) == [3]


def test_the_choice_with_the_least_loss():
    """Against all choices; of equal losses the earlier layer has more heads."""
    assert choose_heads([{1: 0.1, 4: 0}, {1: 0.2, 4: 0}], 5) == [1, 4]
    assert choose_heads([{1: 0.1, 4: 0}, {1: 0.1, 4: 0}], 5) == [4, 1]
    draw = random.Random(0)
    for counts, layers in (((1, 3), 6), ((1, 2, 4, 8), 4), ((2, 3, 6), 5)):
        losses = [{count: draw.choice([draw.random() / count, 0.25]) for count in counts} for _ in range(layers)]
        every = list(itertools.product(counts, repeat=layers))
        for total in {sum(choice) for choice in every}:
            possible = [choice for choice in every if sum(choice) == total]
            least = min(sum(map(dict.__getitem__, losses, choice)) for choice in possible)
            found = choose_heads(losses, total)
            assert sum(found) == total
            assert sum(map(dict.__getitem__, losses, found)) == pytest.approx(least, abs=1e-12)
    with pytest.raises(ValueError, match="no choice of KV heads has 6 in 2 layers"):
        choose_heads([{1: 0, 4: 0}, {1: 0, 4: 0}], 6)


def test_what_a_total_allows():
    """Against all choices."""
    for counts, layers in (((1, 3), 6), ((1, 2, 4), 3), ((2, 3, 6), 4)):
        every = list(itertools.product(counts, repeat=layers))
        for most in range(layers * max(counts) + 2):
            total = largest_total(counts, layers, most)
            assert total == max((sum(choice) for choice in every if sum(choice) <= most), default=None)
            if total is not None:
                used = {count for choice in every if sum(choice) == total for count in choice}
                assert possible_numbers(counts, layers, total) == sorted(used)


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """What each layer of the tiny Llama lost alone with 1 and with 2 KV heads, and the text."""
    text = tmp_path_factory.mktemp("text") / "numbers.txt"
    text.write_text(" ".join(map(str, SEQUENCES.flatten().tolist())), "utf-8")
    losses = {}
    for count in (1, 2):
        trial = copy.deepcopy(base("llama"))
        report = package.apply(recipe(closed(text, count, keep_layers=0.5)), trial, tokenizer=Tokens())
        losses[count] = [each["lost_alone"] for each in layers_of(report.data).values()]
    return text, losses


def test_keep_kv_tries_each_number_of_heads(lost, tmp_path):
    """The choice with the least sum of what each layer lost alone, with the heads that the plan counts."""
    (text, losses), models = lost, {}
    for share, total, possible in ((0.375, 3, "1 or 2"), (0.5, 4, "2"), (0.7, 5, "1 or 4"), (0.9, 6, "2 or 4")):
        model, step = copy.deepcopy(base("llama")), closed(text, None, keep_kv=share, kept_by="loss")
        plan = package.plan(recipe(step), model)
        assert sum(layer.kv_heads for layer in plan.after.layers) == total
        report = package.apply(recipe(step), model, tokenizer=Tokens())
        heads = [layer.kv_heads for layer in Anatomy.of(model).layers]
        by_layer = [{4: 0.0, 1: losses[1][layer], 2: losses[2][layer]} for layer in range(2)]
        choices = [choice for choice in itertools.product((1, 2, 4), repeat=2) if sum(choice) == total]
        assert possible == " or ".join(map(str, sorted({count for choice in choices for count in choice})))
        assert tuple(heads) == min(choices, key=lambda c: by_layer[0][c[0]] + by_layer[1][c[1]])
        assert plan.measured == (len(choices) > 1)
        if len(choices) > 1:
            assert "4 KV heads: how many stay in which layer is measured" in str(plan)
            assert [each["kv_heads"] for each in layers_of(report.data).values()] == heads
        assert report.data["tier"] == ("native" if len(set(heads)) == 1 else "surgical") == plan.tier
        models[tmp_path / str(share)] = model
    check_both_ways_to_load(models, tmp_path)


SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
THREE_LAYERS = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4}


def load_step(step: dict):
    """The operation of a step."""
    return recipes.load(recipe(step)).operations[0]


def with_losses(text, monkeypatch, losses: dict[int, list[float]], **fields):
    """keep_kv=0.5 of 12 heads in 3 layers, with these losses in place of those that are measured."""

    def measure(work, _):
        counts = [layer.kv_heads for layer in work.targets]
        return [loss if count < 4 else None for loss, count in zip(losses[min(counts)], counts, strict=True)]

    monkeypatch.setattr(LayerLosses, "measure", measure)
    monkeypatch.setattr(LayerLosses, "fits", {}, raising=False)
    model = build("Llama", **THREE_LAYERS).eval()
    # Fits of trials are not used.
    step = closed(text, None, **({"keep_kv": 0.5, "sequential": True, "kept_by": "loss"} | fields))
    plan = package.plan(recipe(step), model)
    assert "KV heads 4 → 1" in str(plan.to_dict())
    return model, plan, package.apply(recipe(step), model, tokenizer=Tokens())


def test_numbers_that_come_out_alike_make_a_stock_model(lost, monkeypatch, tmp_path):
    """The plan cannot know it. Folder, record and card agree, and both ways to load it are one."""
    model, plan, report = with_losses(lost[0], monkeypatch, {1: [9.0, 9.0, 9.0], 2: [1.0, 1.0, 1.0]})
    assert [layer.kv_heads for layer in Anatomy.of(model).layers] == [2, 2, 2]
    assert (plan.tier, report.data["tier"]) == ("surgical", "native")
    assert "In each of its 3 layers, 4 KV heads were merged into 2" in json.dumps(report.data["operations"])
    check_both_ways_to_load({tmp_path / "out": model}, tmp_path)
    assert not Anatomy.of(tmp_path / "out").surgical


def test_the_card_names_the_numbers_of_each_layer(lost, monkeypatch):
    model, _, report = with_losses(lost[0], monkeypatch, {1: [0.1, 2.0, 2.5], 2: [0.05, 1.0, 1.2]})
    assert [layer.kv_heads for layer in Anatomy.of(model).layers] == [1, 1, 4]
    words = json.dumps(report.data["operations"])
    assert "In 2 of its 3 layers, 4 KV heads were merged into 1" in words
    assert report.data["tier"] == "surgical"
    assert "gqa: the layers keep 1, 1, 4 KV heads" in provenance(report.data)
    assert "1 KV head in one layer alone costs 0.1000 to 2.5000 nats (KL)" in provenance(report.data)


def copying(monkeypatch, scores: list[list[float]], fails: str = ""):
    """Let the heads have these scores. A scorer of the name `fails` cannot measure the model."""

    def measure(choice, model, context):
        if choice.scores == fails:
            raise UnsupportedModelError("it repeats none")
        return HeadScores(choice.scores, scores)

    monkeypatch.setattr(HeadChoice, "measure", measure)


def test_layers_that_copy_keep_their_heads_first(lost, monkeypatch):
    """Where they take all that is left, no layer is tried alone."""
    copying(monkeypatch, [[0.05] * 4, [0, 0.3, 0, 0], [0.9, 0.2, 0.1, 0]])
    model, plan, report = with_losses(lost[0], monkeypatch, {}, kept_by=None)
    assert "layers whose heads copy from far back keep all their KV heads, the strongest first" in str(plan)
    assert [layer.kv_heads for layer in Anatomy.of(model).layers] == [1, 1, 4]
    records = layers_of(report.data).values()
    assert [each["copying"] for each in records] == [0, 0.3, 1.1]
    assert not any("lost_alone" in each for each in records)
    words = "gqa: layers 2 keep their KV heads, since their heads copy from far back (retrieval)"
    assert words in provenance(report.data)


@pytest.mark.parametrize(("first", "heads"), [([2.0, 1.0, 5.0], [4, 1, 4]), ([1.0, 2.0, 5.0], [1, 4, 4])])
def test_what_copying_leaves_goes_by_loss(lost, monkeypatch, first, heads):
    """A model that repeats no passkey is scored on random tokens."""
    copying(monkeypatch, [[0] * 4, [0] * 4, [0.9, 0, 0, 0]], fails="retrieval")
    losses = {1: first, 2: [0.0, 0.0, 9.0]}
    model, _, report = with_losses(lost[0], monkeypatch, losses, kept_by="copying", keep_kv=0.75)
    assert [layer.kv_heads for layer in Anatomy.of(model).layers] == heads
    assert {each["copying_by"] for each in layers_of(report.data).values()} == {"induction"}
    assert "gqa: layers 2 keep their KV heads, since their heads copy" in provenance(report.data)


def test_a_layer_that_copies_is_not_tried_alone(lost, monkeypatch):
    """It keeps its heads whatever it would lose. The others lose what they lose where all are tried."""
    tried, convert = [], SharedLayer.convert
    monkeypatch.setattr(
        SharedLayer, "convert", lambda work: (tried.append(work.layer.anatomy.index), convert(work))[1]
    )
    records = {}
    for kept_by in ("loss", "copying"):
        copying(monkeypatch, [[0] * 4, [0.9, 0, 0, 0], [0] * 4])
        model = build("Llama", **THREE_LAYERS).eval()
        step = closed(lost[0], 1, keep_kv=0.75, kept_by=kept_by)
        report = package.apply(recipe(step), model, tokenizer=Tokens())
        records[kept_by] = list(layers_of(report.data).values())
        assert tried == ([0, 1, 2] if kept_by == "loss" else [0, 2])
        tried.clear()
    every, others = records.values()
    assert "lost_alone" not in others[1]
    assert others[1]["kv_heads"] == 4
    assert [others[index]["lost_alone"] for index in (0, 2)] == [every[index]["lost_alone"] for index in (0, 2)]
    words = provenance(report.data)
    assert "gqa: layers 1 keep their KV heads, since their heads copy from far back (retrieval)" in words
    assert f"sharing each alone costs {max(others[0]['lost_alone'], others[2]['lost_alone']):.4f}" in words


def test_the_strongest_that_a_total_allows():
    assert kept_first([0, 0.5, 0.9], 4, [1, 2, 4], 6) == [2]
    assert kept_first([0, 0.5, 0.9], 4, [1, 2, 4], 9) == [1, 2]
    assert kept_first([0, 0.5, 0.9], 4, [1, 2, 4], 12) == [1, 2]
    assert kept_first([0.1, 0.5, 0.9], 4, [1, 2, 4], 12) == [0, 1, 2]
    assert kept_first([0.1, 0.5, 0.9], 4, [1, 2, 4], 3) == []
    assert kept_first([0.1, 0.5], 4, [2, 4], 7) == [], "one layer would be left with 3"


def test_where_no_past_is_far_losses_decide(numbers):
    short = build("Llama", **THREE_LAYERS, max_position_embeddings=128)
    plan = package.plan(recipe(closed(numbers, None, keep_kv=0.5)), short)
    assert "each layer is tried alone with each number" in str(plan)
    with pytest.raises(SurgeryError, match="no far past to measure heads on"):
        package.plan(recipe(closed(numbers, None, keep_kv=0.5, kept_by="copying")), short)
    with pytest.raises(SurgeryError, match="kept_by: copying needs keep_kv or keep_layers"):
        package.plan(recipe(closed(numbers, 2, kept_by="copying")), build("Llama", **THREE_LAYERS))


def test_a_loss_that_is_no_number_is_refused(lost, monkeypatch):
    with pytest.raises(SurgeryError, match=r"model\.layers\.1\.self_attn.*with 1 KV head in this layer alone"):
        with_losses(lost[0], monkeypatch, {1: [0.1, float("nan"), 1.5], 2: [0.05, 1.0, 1.2]})


def test_keep_kv_with_one_number_is_keep_layers(numbers):
    models = []
    for fields in ({"keep_layers": 0.5}, {"keep_kv": 0.75, "kept_by": "loss"}):
        model = copy.deepcopy(base("llama"))
        package.apply(recipe(closed(numbers, 2, **fields)), model, tokenizer=Tokens())
        models.append(model.state_dict())
    assert same(*models)
    unchanged = package.plan(recipe(closed(numbers, None, keep_kv=1)), base("llama"))
    assert "nothing: there are 4 KV heads already" in str(unchanged.to_dict())


def test_a_milder_share_is_one_that_is_taken(numbers):
    for share in (0.3, 0.5, 0.75, 0.9, 0.95, 1):
        key, _, value = load_step(closed(numbers, None, keep_kv=share)).milder().partition("=")
        assert (key, share < float(value) < 1) == ("keep_kv", True) if key else share > 0.9


def test_more_numbers_take_more_time(numbers):
    anatomy = Anatomy.of(build("Llama", **THREE_LAYERS))
    one, two, again = (
        sum(each.flops for each in load_step(closed(numbers, count, **fields)).plan(anatomy).measurements)
        for count, fields in (
            (2, {"keep_layers": 0.5}), (None, {"keep_kv": 0.5}), (None, {"keep_kv": 0.5, "sequential": True})
        )
    )  # fmt: skip
    assert one < two < again


def test_a_run_that_was_stopped_goes_on(model, text, tmp_path, monkeypatch):
    """Stopped while layers are tried: those that were are not fitted again, and the result has the same bytes."""
    options = {"calibration_samples": 4, "calibration_length": 64, "calibration_text": str(text)}
    options |= {"keep_layers": 0.5, "check": False, "evaluate": False}

    def stop(done, total, label):
        if done and "layers" in label:
            raise Stopped

    package.apply("gqa", str(model), output=tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        package.apply("gqa", str(model), output=tmp_path / "out", progress=stop, **options)
    fitted, convert = [], SharedLayer.convert
    monkeypatch.setattr(
        SharedLayer, "convert", lambda work: (fitted.append(work.layer.anatomy.index), convert(work))[1]
    )
    package.apply("gqa", str(model), output=tmp_path / "out", resume=True, **options)
    assert fitted == [1], "the layer that shares is not fitted a second time, either"
    complete, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert out.read_bytes() == complete.read_bytes()
    report = json.loads((tmp_path / "out" / "surgery.json").read_text("utf-8"))
    assert report["tier"] == "surgical"
    records = list(layers_of(report).values())
    kept_layers = [index for index, record in enumerate(records) if record["kv_heads"] == 3]
    assert len(kept_layers) == 1
    assert records[kept_layers[0]]["lost_alone"] >= records[1 - kept_layers[0]]["lost_alone"]
    assert f"layers {kept_layers[0]} keep their KV heads" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_refusals(numbers):
    cases = [
        ("llama", closed(numbers, [2, 4], keep_layers=0.5), "drop keep_layers, or give kv_heads one number"),
        ("llama", {"op": "gqa", "kv_heads": 2, "keep_layers": 0.5}, "keep_layers: read by method: closed_form alone"),
        (
            "llama",
            {"op": "gqa", "kv_heads": 2, "ridge": 0.1, "calibration_text": "self"},
            "ridge, calibration_text: read",
        ),
        ("phi3", closed(numbers, 2, keep_layers=0.5), "give one number of KV heads for all layers"),
        ("llama", closed(numbers, 2, keep_layers=0.2), "0.2 of 2 layers is none of them"),
        ("llama", closed(numbers, 2, keep_layers=0.9), "0.9 of 2 layers is all of them"),
        ("llama", closed(numbers, 3, keep_layers=0.5), "4 KV heads on 8 query heads cannot become 3"),
        ("llama", closed(numbers, None, keep_kv=0.2), "0.2 of 8 KV heads is fewer than 1 in each of 2 .*least 0.25"),
        ("llama", closed(numbers, 2, keep_kv=0.4), "fewer than 2 in each of 2 layers: take at least 0.5"),
        ("llama", closed(numbers, 2, keep_kv=0.5, keep_layers=0.5), "drop keep_kv, or set keep_layers=0"),
        ("llama", closed(numbers, 4, keep_kv=0.5), "nothing can go, with kv_heads: 4, and 4 KV heads in the model"),
        ("llama", closed(numbers, 3, keep_kv=0.5), "cannot become 3; possible: 1, 2, 4$"),
        ("llama", closed(numbers, 2, calibration_recall=0.5), "pieces of 24 tokens are too short .*length=64 or more"),
        ("llama", closed(numbers, 2, calibration_recall=1), "calibration_recall"),
        ("llama", closed(numbers, [2, 4], keep_kv=0.5), "drop keep_kv, or give kv_heads one number or null"),
        ("llama", closed(numbers, None, keep_kv=1.5), "keep_kv"),
        ("llama", closed(numbers, None, keep_kv=0), "keep_kv"),
        ("phi3", closed(numbers, None, keep_kv=0.75), "give one number of KV heads for all layers"),
        ("llama", {"op": "gqa", "kv_heads": 2, "keep_kv": 0.5}, "keep_kv: read by method: closed_form alone"),
    ]
    for name, step, says in cases:
        with pytest.raises(SurgeryError, match=says):
            package.plan(recipe(step), base(name))
    with pytest.raises(SurgeryError, match="nothing can go, with a layer with 1 KV head in the model"):
        package.plan(
            recipe(closed(numbers, None, keep_kv=0.5)), build("Llama", **THREE_LAYERS | {"num_key_value_heads": 1})
        )
    with pytest.raises(SurgeryError, match="orders heads for one number of groups: give kv_heads one number"):
        package.plan(recipe(closed(numbers, None, keep_kv=0.5, grouping="similarity")), build("Llama", **THREE_LAYERS))


def test_no_layer_kept_is_the_plain_merge(numbers):
    models = []
    for fields in ({}, {"keep_layers": 0.0}):
        model = copy.deepcopy(base("llama"))
        report = package.apply(recipe(closed(numbers, 2) | fields), model, tokenizer=Tokens())
        assert report.data["tier"] == "native"
        models.append(model.state_dict())
    assert same(models[0], models[1])
