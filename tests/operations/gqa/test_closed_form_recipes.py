"""The closed form among other operations, in a folder and in memory, its text, and what a plan says of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from closed_form import Tokens, closed, copies_in, numbers, recipe  # noqa: F401
from families import base, difference, logits_of
from transformers import AutoTokenizer

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.closed_form.cost import Calibration, efforts
from surgery.calibration.cost import layer_parameters
from surgery.data.calibration_text import calibration_sequences
from surgery.operations.gqa.operation import GQA

SMALL = {"kv_heads": 1, "method": "closed_form", "calibration_samples": 12, "calibration_length": 24}


def written(recipe: dict, folder: Path) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def test_two_merges_of_one_recipe_keep_files_of_their_own(tiny_llama, text, tmp_path):
    """Silent heads, then the same merge again: the second must not find what the first one has kept."""
    merge = {"op": "gqa", **SMALL, "calibration_text": str(text)}
    mask = {"op": "head_mask", "values": {0: {0: 0.0, 1: 0.0, 2: 0.0}, 1: {3: 0.0, 4: 0.0}}}
    steps = recipe(merge, mask, {"op": "expand", "kv_heads": 3}, merge)
    report = package.apply(steps, str(tiny_llama), output=tmp_path / "out", check=False, evaluate=False)
    first, _, _, second = (each["record"] for each in report.data["operations"])
    assert first != second
    in_memory = package.load(tiny_llama)
    package.apply(steps, in_memory, tokenizer=AutoTokenizer.from_pretrained(tiny_llama))
    stored, ids = package.load(tmp_path / "out"), torch.arange(3, 40)[None]
    with torch.no_grad():
        assert difference(stored(ids).logits, in_memory(ids).logits) < 0.05


@pytest.mark.parametrize(
    "after",
    [
        {"op": "gqa", "kv_heads": [1, 3]},
        {"op": "gqa", "kv_heads": [1, 3], "method": "closed_form"},
        {"op": "gqa", "kv_heads": 1, "method": "closed_form", "keep_layers": 0.5},
    ],
    ids=["mean", "closed form", "keep_layers"],
)
def test_fewer_heads_by_layer_after_a_group_was_pruned(numbers, after):
    """A layer that merges forgets what the base called its heads; one that keeps its heads knows it."""
    model = copies_in(0)
    before = logits_of(model)
    if after.get("method") == "closed_form":
        after = after | {key: value for key, value in closed(numbers, 1).items() if key.startswith("calibration")}
    prune = {"op": "prune_heads", "heads": [[2, 3], [2, 3]], "refit": False}
    package.apply(recipe(prune, after), model, tokenizer=Tokens())
    layers = Anatomy.of(model).layers
    assert sorted(layer.kv_heads for layer in layers) == [1, 3]
    for layer in layers:
        assert layer.kv_numbers == ((0, 2, 3) if layer.kv_heads == 3 else ())
    assert difference(logits_of(model), before) > 0


def test_pieces_that_the_model_wrote_begin_as_those_of_a_file(tiny_llama, text, tmp_path):
    """With BOS, where the tokenizer begins a text with it; documents that end early leave no other begin."""
    folder = tmp_path / "bos"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model = package.load(folder)
    model.generation_config.eos_token_id = list(range(3, 30))  # many documents end at once
    samples = calibration_sequences(model, tokenizer, "self", 24, 8)
    assert samples.shape == (8, 24)
    assert (samples[:, 0] == 1).all()
    assert (calibration_sequences(model, tokenizer, str(text), 24, 4)[:, 0] == 1).all()


def test_a_text_that_is_not_there_is_refused_by_the_plan(refused, tiny_llama):
    says = ["calibration_text: no such text file: 'nope.txt'", "mixed"]
    refused("plan", "gqa", tiny_llama, "calibration_text=nope.txt", says=says, has_json=False)
    refused(
        "plan",
        "zero-tuning",
        tiny_llama,
        "sink_calibration.text=nope.txt",
        says=["text: no such text file"],
        has_json=False,
    )


def test_a_plan_does_not_name_layers_that_it_cannot_know(surgery, tiny_llama):
    printed = surgery("plan", "gqa", tiny_llama, "keep_layers=0.5").out
    assert "model.layers.0-1" in printed
    assert "3 KV heads: how many stay in which layer is measured" in printed


def test_the_card_names_the_text(surgery, tiny_llama, text):
    small = ("calibration_samples=4", "calibration_length=64", f"calibration_text={text}")
    assert surgery("apply", "gqa", tiny_llama, "-o", "out", *small, "--no-eval").code == 0
    assert f"gqa: fitted to 256 tokens: {Path(text).name} (sha256 " in Path("out/README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_text_goes_through_layers_alone(name):
    """A plan counts their weights; neither embeddings nor the output layer, which no fit needs."""
    model = base(name)
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    assert layer_parameters(Anatomy.of(model)) == sum(parameter.numel() for parameter in layers.parameters())


def test_memory_of_a_plan_holds_weights_and_sums(monkeypatch):
    """What grows with neither the text nor its length: new weights, one layer in float32, sums of the MLP's input."""
    from transformers import LlamaConfig

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    config = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=24, num_attention_heads=8)
    anatomy = Anatomy.of(config)
    short = GQA(op="gqa", **SMALL)._calibration(anatomy).memory(anatomy, 24)
    weights = 24 * (4 * 512 * 512 + 512 * 1376) * 2
    assert short > weights + 5 * 8 * 1376**2
    less, more = (Calibration(samples, 24, efforts(3), mlp=False) for samples in (12, 24))
    fewer = Calibration(24, 24, efforts(3), mlp=False, stride=8)
    assert fewer.flops(anatomy, 24) < more.flops(anatomy, 24)
    assert fewer.memory(anatomy, 24) < more.memory(anatomy, 24)
    # What does not grow with the text: in each product of the fits of queries, keys (5 + 11 + 17) and values (14), the
    # preconditioner's in float64.
    fixed = 24 * (5 + 11 + 17 + 14) * 0.7 * 2 * 2 * 512 * 512**2
    assert 2 * less.flops(anatomy, 24) - more.flops(anatomy, 24) == pytest.approx(fixed)
    assert less.memory(anatomy, 24) < more.memory(anatomy, 24) < 1.2 * less.memory(anatomy, 24)
    with_mlp = Calibration(24, 24, efforts(3))
    # Five ridges in float64: Cholesky, solution, loss. They reach the speed of which a model reaches 0.7.
    solved = 0.7 * 24 * 5 * 2 * (1376**3 / 3 + 4 * 1376**2 * 512)
    moments = 24 * 24 * 24 * 2 * 1376 * (1376 + 512)
    assert with_mlp.flops(anatomy, 24) - more.flops(anatomy, 24) == pytest.approx(solved + moments)
    # Two refits of attention's output projection, which has 512 inputs.
    with_outputs = Calibration(24, 24, efforts(3), mlp=False, outputs=2)
    solved = 0.7 * 24 * 2 * 5 * 2 * (512**3 / 3 + 4 * 512**2 * 512)
    moments = 24 * 2 * 24 * 24 * 2 * 512 * (512 + 512)
    assert with_outputs.flops(anatomy, 24) - more.flops(anatomy, 24) == pytest.approx(solved + moments)
    # A start from the eigenvectors of 768 rows, of a matrix made of moments of 512 numbers.
    started = Calibration(24, 24, efforts(3), mlp=False, decomposed=768)
    wanted = 0.7 * 24 * (25 * 768**3 + 2 * (2 * 768 * 512 * 512 + 2 * 768 * 512 * 768))
    assert started.flops(anatomy, 24) - more.flops(anatomy, 24) == pytest.approx(wanted)
