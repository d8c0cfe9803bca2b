"""gqa's keep_layers and keep_kv: layers that lose most by sharing keep their KV heads, or more of them."""

from __future__ import annotations

import copy
import itertools
import json
import random

import pytest
from closed_form import SEQUENCES, Stopped, Tokens, closed, copies_in, numbers, recipe, same  # noqa: F401
from families import attention_modules, base, check_both_ways_to_load, difference, layers_of, logits_of, one_thread  # noqa: F401

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.operations.gqa.choose_heads import choose_heads, validation_samples
from surgery.operations.gqa.layer import SharedLayer


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


def test_keep_kv_tries_each_number_of_heads(numbers, tmp_path):
    """The choice with the least sum of what each layer lost alone, with the heads that the plan counts."""
    models, losses = {}, {}
    for count in (1, 2):
        trial = copy.deepcopy(base("llama"))
        report = package.apply(recipe(closed(numbers, count, keep_layers=0.5)), trial, tokenizer=Tokens())
        losses[count] = [each["lost_alone"] for each in layers_of(report.data).values()]
    for share, total in ((0.375, 3), (0.5, 4), (0.7, 5), (0.75, 6), (0.9, 6)):
        model, step = copy.deepcopy(base("llama")), closed(numbers, None, keep_kv=share)
        plan = package.plan(recipe(step), model)
        assert "KV heads 4 → 1, 2 or 4 by layer" in str(plan.to_dict())
        assert sum(layer.kv_heads for layer in plan.after.layers) == total
        report = package.apply(recipe(step), model, tokenizer=Tokens())
        heads = [layer.kv_heads for layer in Anatomy.of(model).layers]
        by_layer = [{4: 0.0, 1: losses[1][layer], 2: losses[2][layer]} for layer in range(2)]
        possible = [choice for choice in itertools.product((1, 2, 4), repeat=2) if sum(choice) == total]
        assert tuple(heads) == min(possible, key=lambda c: by_layer[0][c[0]] + by_layer[1][c[1]])
        for layer, record in enumerate(layers_of(report.data).values()):
            assert record["kv_heads"] == heads[layer]
            found = {int(count): lost for count, lost in record["lost_by_heads"].items()}
            assert found == pytest.approx({count: losses[count][layer] for count in (1, 2)}, rel=1e-3)
        models[tmp_path / str(total) / str(share)] = model
    check_both_ways_to_load(models, tmp_path)


def test_keep_kv_with_one_number_is_keep_layers(numbers):
    models = []
    for fields in ({"keep_layers": 0.5}, {"keep_kv": 0.75}):
        model = copy.deepcopy(base("llama"))
        package.apply(recipe(closed(numbers, 2, **fields)), model, tokenizer=Tokens())
        models.append(model.state_dict())
    assert same(*models)
    unchanged = package.plan(recipe(closed(numbers, None, keep_kv=1)), base("llama"))
    assert "nothing: there are 4 KV heads already" in str(unchanged.to_dict())


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
        ("llama", closed(numbers, 2, keep_kv=0.5, keep_layers=0.5), "both say how much is left: drop one"),
        ("llama", closed(numbers, [2, 4], keep_kv=0.5), "drop keep_kv, or give kv_heads one number or null"),
        ("llama", closed(numbers, None, keep_kv=0.5, grouping="similarity"), "give kv_heads one number"),
        ("llama", closed(numbers, None, keep_kv=1.5), "keep_kv"),
        ("llama", closed(numbers, None, keep_kv=0), "keep_kv"),
        ("phi3", closed(numbers, None, keep_kv=0.75), "give one number of KV heads for all layers"),
        ("llama", {"op": "gqa", "kv_heads": 2, "keep_kv": 0.5}, "keep_kv: read by method: closed_form alone"),
    ]
    for name, step, says in cases:
        with pytest.raises(SurgeryError, match=says):
            package.plan(recipe(step), base(name))


def test_no_layer_kept_is_the_plain_merge(numbers):
    models = []
    for fields in ({}, {"keep_layers": 0.0}):
        model = copy.deepcopy(base("llama"))
        report = package.apply(recipe(closed(numbers, 2) | fields), model, tokenizer=Tokens())
        assert report.data["tier"] == "native"
        models.append(model.state_dict())
    assert same(models[0], models[1])
