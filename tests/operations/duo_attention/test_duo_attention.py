"""The head split end to end: scores, choice, plan, both ways to load, later generations, peft."""

from __future__ import annotations

import json

import pytest
import torch

import surgery
from surgery.calibration.head_scores import HeadScores
from surgery.errors import SurgeryError
from surgery.evaluation.check import load_in_fresh_process
from surgery.runtime.surgery_config import exported_files

SPLIT = (
    "streaming_ratio=0.5",
    "sinks=2",
    "window=6",
    "calibration_length=160",
    "calibration_samples=2",
    "evaluate.windows=1",
    "evaluate.length=64",
)


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
    assert statuses["both ways to load agree"] == "passed"
    assert sum(map(len, report["operations"][0]["record"]["streaming"])) == 3
    config = json.loads((split / "config.json").read_text())
    assert config["model_type"] == "surgery"
    assert config["architectures"] == ["SurgeryLlamaForCausalLM"]
    files = {path.name for path in split.glob("*.py")}
    assert files == set(exported_files([]))
    card = (split / "README.md").read_text()
    assert "trust_remote_code=True" in card
    again = surgery("apply", "duo-attention", split, "-o", "again", *SPLIT)
    assert again.code == 2
    assert "sets the visibility (which keys a head sees) already" in again.err
    inspected = surgery("inspect", split, "--json")
    streaming = [(layer["streaming"] or {"kv_heads": []})["kv_heads"] for layer in inspected.json["layers"]]
    assert streaming == report["operations"][0]["record"]["streaming"]


@pytest.mark.real_process
def test_later_generations_and_the_model_in_memory(split, tmp_path):
    """Loaded, saved, loaded, saved again: equal tensors, equal logits, without the package."""
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
    results = load_in_fresh_process(jobs)
    assert all("error" not in result for result in results), results
    for job, result in zip(jobs, results, strict=True):
        assert result["generated"] == results[0]["generated"]
        assert (torch.load(job["logits"]) - want).abs().max() <= 1e-4
    one, two = (json.loads((folder / "config.json").read_text()) for folder in folders[1:])
    assert one == two


@pytest.mark.real_process
def test_without_a_door_the_auto_classes_refuse(split):
    """No package registered, no trust: an error that names the remedy, not the stock model."""
    result = load_in_fresh_process([{"folder": str(split), "tokens": [[1, 2]], "generate": 1}])[0]
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
        ("threshold=0.5", "threshold both choose the heads: streaming_ratio=null"),
        ("scores=none.json", "no such score file"),
        ("scores=far-mas", "did you mean 'far-mass'"),
    ],
)
def test_bad_fields(refused, model, override, says):
    refused("apply", "duo-attention", model, "-o", "out", override, says=[says])


def test_families_outside_the_interface_are_refused():
    from families import TINY

    with pytest.raises(SurgeryError, match="attention interface"):
        surgery.plan("duo-attention", TINY["bloom"]())


def test_layers_that_are_local_anyway_are_not_counted(tmp_path):
    """Half of gpt_oss's layers see no farther than a window: heads streaming there would save nothing."""
    from families import TINY

    HeadScores("file", [[0.0] * 4, [0.4, 0.3, 0.2, 0.1]], {}).save(tmp_path / "s.json")
    fields = {"scores": str(tmp_path / "s.json"), "sinks": 2}
    model = TINY["gpt_oss"]()  # layers of window 6 and none
    plan = surgery.plan("duo-attention", model, window=6, **fields)
    assert [layer.streaming for layer in plan.after.layers] == [(), (2, 3)]
    assert any("1 of 2 layers" in note for note in plan.notes)
    plan = surgery.plan("duo-attention", model, window=5, **fields)
    assert [layer.streaming for layer in plan.after.layers] == [(0, 1, 2, 3), ()], "a narrower window does save"
    assert not any("own window" in note for note in plan.notes)


def test_weight_rewrites_come_first(model):
    steps = [{"op": "gqa", "kv_heads": 1}, {"op": "duo_attention", "streaming_ratio": 0.5}]
    recipe = {"version": 1, "name": "both", "operations": steps}
    plan = surgery.plan(recipe, str(model))
    assert (plan.tier, plan.streams) == ("surgical", False)
    with pytest.raises(SurgeryError, match="come before duo_attention"):
        surgery.plan(recipe | {"operations": steps[::-1]}, str(model))
    with pytest.raises(SurgeryError, match="sets the visibility"):
        surgery.plan(recipe | {"operations": [steps[1], steps[1]]}, str(model))
