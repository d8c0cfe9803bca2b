"""A score that is measured later comes into record and card, where it belongs there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import surgery
from surgery.evaluation.probes.settings import make
from surgery.report.lineage import another_base, record_score
from surgery.report.report import Report

SCORE = {
    "status": "done", "text": {"title": "t"}, "base": {"perplexity": 2.0, "cross_entropy": 0.7},
    "out": {"perplexity": 2.1, "cross_entropy": 0.75}, "kl": {"mean": 0.1, "p99": 0.2, "top_k": 4},
    "top1_agreement": 0.9,
}  # fmt: skip
NEEDLES = {
    "status": "done",
    "settings": {"lengths": [64], "secret": "digits", "text": {"title": "t"}},
    "base": {"hits": 4, "of": 4, "accuracy": 1.0},
    "out": {"hits": 0, "of": 4, "accuracy": 0.0},
    "kept": {"of": 4, "kept": 0, "share": 0.0, "low": 0.0, "high": 0.5},
    "cases": [{"length": 64}],
}


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory) -> Path:
    recipe = {
        "version": 1,
        "name": "r",
        "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}],
        "evaluate": {"max_kl": 1.0, "probes": {"choices": {"items": 4}}},
    }
    out = tmp_path_factory.mktemp("lineage") / "out"
    surgery.apply(recipe, str(tiny), output=out, check=False, evaluate=False)
    return out


@pytest.fixture
def report(converted, tmp_path) -> Report:
    report = Report.of(shutil.copytree(converted, tmp_path / "out"))
    report.data["evaluation"] = SCORE
    return report


def test_eval_without_settings_measures_as_the_recipe_does(tiny, tmp_path, monkeypatch):
    """So its score is that of the card, which the hint asks for; a recipe that judges nothing takes any score."""
    text = tmp_path / "novel.txt"
    text.write_text("the cat sat on the old green door and the dog slept . " * 200)
    monkeypatch.chdir(tmp_path)
    steps = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    judged = {"evaluate": {"text": "novel.txt", "windows": 2, "length": 16, "max_kl": 9.0}}
    surgery.apply(steps | judged, str(tiny), output="judged", check=False, evaluate=False)
    surgery.evaluate("judged", str(tiny))
    assert surgery.Report.of("judged").gate == "passed"
    surgery.apply(steps, str(tiny), output="free", check=False, evaluate=False, overrides=["evaluate=null"])
    surgery.evaluate("free", str(tiny), text="novel.txt", windows=2, length=16)
    assert surgery.Report.of("free").perplexity is not None
    surgery.apply(steps | judged, str(tiny), output="other", check=False, evaluate=False)
    found = surgery.evaluate("other", str(tiny), text="novel.txt", windows=1, length=16)
    (note,) = [note for note in found.notes if "not added" in note]
    assert "are not those of its recipe (" in note
    assert "windows=2" in note


def test_the_first_score_of_a_probe_comes_into_the_card(report, tiny):
    probe = make("needles", {"length": 64, "cases": 4})
    assert record_score(report, str(tiny), probe, NEEDLES) == ""
    saved = Report.of(report.folder).data
    needles = {k: v for k, v in NEEDLES.items() if k != "cases"}
    needles["scored_in"] = {"surgery": surgery.__version__, "device": "cpu", "dtype": "auto"}
    assert saved["evaluation"] == SCORE | {"needles": needles}
    assert saved["gate"]["status"] == "passed", "the gate asks for max_kl"
    card = (report.folder / "README.md").read_text(encoding="utf-8")
    assert "no longer copies from its prompt: 0 of 4 hidden passkeys found; the base finds 4." in card
    assert "keeps the scores that it has" in record_score(report, str(tiny), probe, NEEDLES), "and no second one"


def test_a_score_of_weights_that_were_changed_is_not_recorded(report, tiny):
    probe, weights = make("needles", {"length": 64, "cases": 4}), report.folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    reason = record_score(report, str(tiny), probe, NEEDLES)
    fault = "model.safetensors is not the file that was written"
    assert reason == f"the folder is not as surgery.json describes it: {fault}"
    assert "needles" not in report.data["evaluation"]
    weights.write_bytes(content)
    assert record_score(report, str(tiny), probe, NEEDLES) == ""


def test_a_base_with_another_config_is_another_base(report, tiny, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((other / "config.json").read_text())
    assert another_base(report.data, other) == ""
    (other / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0", "use_cache": True}))
    assert another_base(report.data, other) == "", "a key of the machine, and one that is the default"
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    expected = "the config of this base differs from that of the one it was made from (rms_norm_eps)"
    assert another_base(report.data, other) == expected
    nested = config | {"rope_scaling": None, "architectures": ["Another"], "use_cache": False}
    (other / "config.json").write_text(json.dumps(nested))
    assert another_base(report.data, other) == "", "keys that change no score"
    generation = json.loads((other / "generation_config.json").read_text())
    said = {"transformers_version": "5.0.0", "top_p": None, "num_beams": 1, "repetition_penalty": 1.0} | generation
    (other / "generation_config.json").write_text(json.dumps(said | {"use_cache": False, "pad_token_id": 9}))
    assert another_base(report.data, other) == "", "no value, defaults, and keys that change no score"
    (other / "generation_config.json").unlink()
    assert another_base(report.data, other) == "", "it was made of config.json"
    (other / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 7}))
    assert another_base(report.data, other).endswith("(eos_token_id of generation_config.json)")
    (other / "generation_config.json").write_text(json.dumps(generation | {"repetition_penalty": 9.0}))
    assert another_base(report.data, other).endswith("(repetition_penalty of generation_config.json)")
    (other / "generation_config.json").write_text(json.dumps(generation))
    (other / "config.json").write_text("{")
    assert "cannot be compared" in another_base(report.data, other)
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    report.data["base"].pop("config")
    assert another_base(report.data, other) == "", "an earlier version recorded none"


def test_a_base_whose_generation_config_is_no_json_is_converted(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "generation_config.json").write_text("{")
    recipe = {"version": 1, "name": "r", "operations": [{"op": "head_mask", "values": {0: {0: 0.5}}}]}
    surgery.apply(recipe, str(base), output=tmp_path / "out", check=False, evaluate=False)
    record = Report.of(tmp_path / "out").data
    assert record["base"]["generation_config"] is None
    assert another_base(record, base) == ""


def test_a_score_of_a_copy_in_the_cache_of_the_hub_is_not_recorded(report, tiny, tmp_path):
    report.save()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in report.folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = (report.folder / "surgery.json").read_bytes()
    reason = record_score(Report.of(snapshot), str(tiny), make("needles", {"length": 64, "cases": 4}), NEEDLES)
    assert reason == "its folder is a copy of what is on the Hub, and stays as it is"
    assert (snapshot / "surgery.json").is_symlink()
    assert (report.folder / "surgery.json").read_bytes() == before


def test_a_base_whose_config_holds_infinity(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    limits = {"time_step_limit": [0.0, float("inf")], "inner": {"_name_or_path": "a", "floor": float("-inf")}}
    (base / "config.json").write_text(json.dumps(config | limits))
    recipe = {"version": 1, "name": "r", "operations": [{"op": "head_mask", "values": {0: {0: 0.5}}}]}
    surgery.apply(recipe, str(base), output=tmp_path / "out", check=False, evaluate=False)
    record = Report.of(tmp_path / "out").data
    assert another_base(record, base) == ""
    (base / "config.json").write_text(json.dumps(config | limits | {"inner": {"_name_or_path": "b", "floor": 0.0}}))
    assert "(inner)" in another_base(record, base)
    limits["inner"]["_name_or_path"] = "of another machine"
    (base / "config.json").write_text(json.dumps(config | limits))
    assert another_base(record, base) == ""


def test_what_does_not_belong_there_is_not_recorded(report, tiny, converted):
    probe, choices = make("needles", {"length": 64, "cases": 4}), make("choices", {"items": 5})
    assert "not the base it was made from" in record_score(report, str(converted), probe, NEEDLES)
    assert "not those of its recipe" in record_score(report, str(tiny), choices, {"status": "done"})
    wrong = record_score(report, str(converted), choices, {"status": "done"})
    assert "not the base it was made from" in wrong, "before anything about the settings"
    report.data["evaluation"] = None
    assert "no score of perplexity yet" in record_score(report, str(tiny), probe, NEEDLES)
    assert "evaluation" in Report.of(report.folder).data
    assert Report.of(report.folder).data["evaluation"] is None
