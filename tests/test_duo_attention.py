"""The head split end to end: scores, choice, plan, both doors, later generations, peft."""

from __future__ import annotations

import json

import pytest
import torch

import surgery
from surgery.calibration.head_scores import HeadScores, choose_streaming, far_mass, load_scores
from surgery.checking import run_doors
from surgery.errors import SurgeryError

SPLIT = (
    "streaming_ratio=0.5",
    "sinks=2",
    "window=6",
    "calibration_length=160",
    "calibration_samples=2",
    "evaluate.windows=1",
    "evaluate.length=64",
)


def test_the_lowest_scores_stream():
    scores = [[0.9, 0.1, 0.5], [0.2, 0.2, 0.8]]
    assert choose_streaming(scores, ratio=0.5) == [[1], [0, 1]]
    assert choose_streaming(scores, ratio=0.0) == [[], []]
    assert choose_streaming(scores, ratio=1.0) == [[0, 1, 2], [0, 1, 2]]
    assert choose_streaming(scores, threshold=0.5) == [[1], [0, 1]]
    assert choose_streaming(scores, ratio=0.5, min_retrieval=2) == [[1], [0]]
    assert choose_streaming(scores, ratio=0.5, protect=(1,)) == [[0, 1, 2], []]
    assert choose_streaming(scores, ratio=1 / 3) == [[1], [0]], "ties go by layer and head"


def test_score_files(tmp_path):
    scores = HeadScores("far-mass", [[0.5, 0.25], [1.0, 0.0]], {"text": "t"})
    scores.save(tmp_path / "scores.json")
    assert load_scores(tmp_path / "scores.json", 2, 2) == scores
    (tmp_path / "pattern.tsv").write_text("0.5\t0.25\n1.0\t0.0\n")  # as DuoAttention publishes its patterns
    assert load_scores(tmp_path / "pattern.tsv", 2, 2).scores == scores.scores
    with pytest.raises(SurgeryError, match="another model: 2 x 2"):
        load_scores(tmp_path / "scores.json", 2, 3)
    (tmp_path / "pattern.tsv").write_text("0.5\tnan\n1.0\t0.0\n")
    with pytest.raises(SurgeryError, match="NaN"):
        load_scores(tmp_path / "pattern.tsv", 2, 2)
    with pytest.raises(SurgeryError, match="no such score file"):
        load_scores(tmp_path / "none.json", 2, 2)


def test_far_mass_is_the_attention_outside_sinks_and_window(model):
    """Against the eager path's own attention weights, on the same tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from surgery.calibration.text import load_text

    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = loaded.config._attn_implementation
    got = far_mass(loaded, tokenizer, sinks=2, window=10, samples=1, length=200, seed=3)
    assert loaded.config._attn_implementation == before
    assert not any(hasattr(module, "surgery_heads") for module in loaded.modules())

    ids = tokenizer(load_text(part="calibration").text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    start = int(torch.randperm(len(ids) // 136, generator=torch.Generator().manual_seed(3))[0]) * 136
    piece = ids[start : start + 136]
    eager = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").double()
    with torch.no_grad():
        weights = eager(input_ids=torch.cat([piece, piece[:64]])[None], output_attentions=True).attentions
    i, j = torch.arange(136, 200)[:, None], torch.arange(200)[None, :]
    far = ((j >= 2) & (i - j >= 10)).double()
    for layer, table in enumerate(weights):
        mass = (table[0, :, 136:] * far).sum(-1).mean(-1).view(3, -1).amax(-1)
        assert torch.allclose(torch.tensor(got.scores[layer], dtype=torch.float64), mass, atol=1e-5)


@pytest.fixture
def split(surgery, model, tmp_path):
    """A tiny Llama with half of its KV heads streaming, made by the command."""
    done = surgery("apply", "duo-attention", model, "-o", "out", "--no-gate", "--no-eval", *SPLIT)
    assert done.code == 0, done.err
    return tmp_path / "out"


def test_through_the_command(surgery, split, model):
    report = json.loads((split / "surgery.json").read_text())
    assert report["tier"] == "surgical"
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["loads with trust_remote_code"] == "passed"
    assert statuses["both doors agree"] == "passed"
    assert sum(map(len, report["operations"][0]["record"]["streaming"])) == 3
    config = json.loads((split / "config.json").read_text())
    assert config["model_type"] == "surgery"
    assert config["architectures"] == ["SurgeryLlamaForCausalLM"]
    files = {path.name for path in split.glob("*.py")}
    assert files == {"modeling_surgery.py", "surgery_attention.py", "surgery_cache.py", "surgery_stores.py"}
    card = (split / "README.md").read_text()
    assert "trust_remote_code=True" in card
    again = surgery("apply", "duo-attention", split, "-o", "again", *SPLIT)
    assert again.code == 2
    assert "second surgery" in again.err
    seen = surgery("inspect", split, "--json")
    found = [(layer["streaming"] or {"kv_heads": []})["kv_heads"] for layer in seen.json["layers"]]
    assert found == report["operations"][0]["record"]["streaming"]


def test_later_generations_and_the_model_in_memory(split, tmp_path):
    """Loaded, saved, loaded, saved again: equal tensors, equal logits, through a stranger's door."""
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    model = surgery.load(split)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    folders = [split]
    for generation in (1, 2):
        folders.append(tmp_path / f"generation{generation}")
        surgery.load(folders[-2]).save_pretrained(folders[-1])
    jobs = [
        {"folder": str(f), "tokens": ids.tolist(), "generate": 8, "trust": True, "logits": str(tmp_path / f"{i}.pt")}
        for i, f in enumerate(folders)
    ]
    results = run_doors(jobs)
    assert all("error" not in result for result in results), results
    for job, result in zip(jobs, results, strict=True):
        assert result["generated"] == results[0]["generated"]
        assert (torch.load(job["logits"]) - want).abs().max() <= 1e-4
    one, two = (json.loads((folder / "config.json").read_text()) for folder in folders[1:])
    assert one == two


def test_without_a_door_the_auto_classes_refuse(split):
    """No package registered, no trust: an error that names the remedy, not the stock model."""
    result = run_doors([{"folder": str(split), "tokens": [[1, 2]], "generate": 1}])[0]
    assert "trust_remote_code" in result["error"] or "surgery" in result["error"]


def test_peft_trains_merges_and_saves(split, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(surgery.load(split), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    merged = model.merge_and_unload().eval()
    assert type(merged).__name__ == "SurgeryLlamaForCausalLM"
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        got, want = (m(input_ids=ids).logits for m in (surgery.load(tmp_path / "merged"), merged))
    assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("streaming_ratio=1.5", "streaming_ratio"),
        ("window=0", "window"),
        ("sinks=-1", "sinks"),
        ("protect_layers=[7]", "layers 0 to 1"),
        ("per_layer_min_retrieval=9", "per_layer_min_retrieval"),
        ("threshold=0.5", "either streaming_ratio or threshold"),
        ("scores=none.json", "no such score file"),
    ],
)
def test_bad_fields(refused, model, override, says):
    refused("apply", "duo-attention", model, "-o", "out", override, says=[says])


def test_families_outside_the_interface_are_refused():
    from families import TINY

    with pytest.raises(SurgeryError, match="attention interface"):
        surgery.plan("duo-attention", TINY["bloom"]())


def test_weight_rewrites_come_first(model):
    steps = [{"op": "gqa", "kv_heads": 1}, {"op": "duo_attention", "streaming_ratio": 0.5}]
    recipe = {"version": 1, "name": "both", "operations": steps}
    plan = surgery.plan(recipe, str(model))
    assert (plan.tier, plan.streams) == ("surgical", False)
    with pytest.raises(SurgeryError, match="come before duo_attention"):
        surgery.plan(recipe | {"operations": steps[::-1]}, str(model))
    with pytest.raises(SurgeryError, match="sets the visibility"):
        surgery.plan(recipe | {"operations": [steps[1], steps[1]]}, str(model))
