"""A score that is measured later comes into record and card, where it belongs there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import surgery
from surgery.evaluation.probes.settings import make
from surgery.io.identity import greedy_settings, stable_hash
from surgery.io.loading import read_tokenizer
from surgery.io.manifest import model_differences, other_files
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


# Settings of answers, some of which Python takes for the default: True == 1.
CHANGES_ANSWERS = {
    "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 1, "min_length": 1, "num_beams": 4,
    "forced_eos_token_id": 1, "remove_invalid_values": True, "renormalize_logits": True, "max_new_tokens": 3,
}  # fmt: skip


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
    (other / "generation_config.json").write_text("{}")
    assert "(eos_token_id of generation_config.json)" in another_base(report.data, other), "then answers have no end"
    (other / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 7}))
    assert another_base(report.data, other).endswith("(eos_token_id of generation_config.json)")
    for key, value in CHANGES_ANSWERS.items():
        (other / "generation_config.json").write_text(json.dumps(generation | {key: value}))
        assert another_base(report.data, other).endswith(f"({key} of generation_config.json)")
    (other / "generation_config.json").write_text(json.dumps(generation))
    (other / "config.json").write_text("{")
    assert "cannot be compared" in another_base(report.data, other)
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    report.data["base"].pop("config")
    assert another_base(report.data, other) == "", "an earlier version recorded none"


def test_greedy_settings_are_those_that_transformers_takes(tiny, tmp_path):
    """The end of answers comes from config.json only where there is no generation config."""
    import transformers

    folder = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 9]}
    (folder / "config.json").write_text(json.dumps(config))
    for generation in (None, {}, {"max_new_tokens": 256}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]}):
        file = folder / "generation_config.json"
        file.unlink(missing_ok=True)
        if generation is not None:
            file.write_text(json.dumps(generation))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        ends = greedy_settings(generation, config)["eos_token_id"]
        assert ends == ([loaded] if isinstance(loaded, int) else loaded), generation
    (folder / "generation_config.json").unlink()
    inner = {"text_config": {"eos_token_id": 3, "repetition_penalty": 1.2}}
    for said in ({"repetition_penalty": 1.3, "suppress_tokens": [4]}, inner, inner | {"eos_token_id": 5}):
        written = (
            {key: value for key, value in config.items() if key != "eos_token_id"} | {"eos_token_id": None} | said
        )
        (folder / "config.json").write_text(json.dumps(written))
        from_model = {"config_file_name": "config.json", "_from_model_config": True}  # as a model is loaded
        made = transformers.GenerationConfig.from_pretrained(folder, **from_model).to_dict()
        assert greedy_settings(None, written) == greedy_settings(made, {}), said
    assert greedy_settings({"num_beams": 1, "top_p": 0.5, "pad_token_id": 4}, config) == {"eos_token_id": None}


def test_a_base_without_a_generation_config(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "generation_config.json").unlink()
    recipe = {"version": 1, "name": "r", "operations": [{"op": "head_mask", "values": {0: {0: 0.5}}}]}
    surgery.apply(recipe, str(base), output=tmp_path / "out", check=False, evaluate=False)
    record = Report.of(tmp_path / "out").data
    assert record["base"]["generation_config"] == "none"
    assert another_base(record, base) == ""
    (base / "generation_config.json").write_text(json.dumps({"max_length": 256}))
    assert "(eos_token_id of generation_config.json)" in another_base(record, base)
    record["base"]["generation_config"] = {}  # as an earlier version said it
    (base / "generation_config.json").unlink()
    assert another_base(record, base) == ""


@pytest.mark.parametrize("content", ["{}", '{"transformers_version": "4.40.0"}'])
def test_a_base_with_an_empty_generation_config_is_its_own(tiny, tmp_path, content):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "generation_config.json").write_text(content)
    recipe = {"version": 1, "name": "r", "operations": [{"op": "head_mask", "values": {0: {0: 0.5}}}]}
    surgery.apply(recipe, str(base), output=tmp_path / "out", check=False, evaluate=False)
    assert another_base(Report.of(tmp_path / "out").data, base) == ""


def test_a_score_with_another_tokenizer_is_not_recorded(report, tiny, tmp_path):
    probe, other = make("needles", {"length": 64, "cases": 4}), shutil.copytree(tiny, tmp_path / "base")
    (other / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}!{% endfor %}")
    reason = record_score(report, str(other), probe, NEEDLES)
    assert reason == "its own tokenizer or chat template is another one than the score was measured with"
    assert record_score(report, str(tiny), probe, NEEDLES, read_tokenizer(other)) == reason, "it was given"
    assert record_score(report, str(tiny), probe, NEEDLES, read_tokenizer(tiny)) == ""


def test_a_folder_that_cannot_be_written_keeps_its_record(report, tiny, monkeypatch):
    """The score itself is not lost: the caller prints it, with the reason."""

    def refused(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Report, "save", refused)
    reason = record_score(report, str(tiny), make("needles", {"length": 64, "cases": 4}), NEEDLES)
    assert reason == "its folder cannot be written (Permission denied)"


def test_what_counts_as_a_change_of_a_result(report, tmp_path):
    """Files that Transformers would load, and configs by what they say."""
    folder, record = report.folder, report.data
    assert model_differences(folder, record) == []
    loaded = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json")
    for name in loaded:
        (folder / name).write_bytes(b"{}")
        assert model_differences(folder, record) == [f"{name} was added"]
        (folder / name).unlink()
    for name in ("model-backup.safetensors", "notes.txt", "checkpoint-5/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
        assert model_differences(folder, record) == [], name
    generation = folder / "generation_config.json"
    said = json.loads(generation.read_text())
    record["other_files"].pop("generation_config.json")
    generation.write_text(json.dumps({"_from_model_config": True, "eos_token_id": said["eos_token_id"]}))
    assert model_differences(folder, record) == [], "config.json says the same"
    for more in ({"repetition_penalty": 1.5}, {"eos_token_id": 99}):
        generation.write_text(json.dumps(said | {"_from_model_config": True} | more))
        assert model_differences(folder, record) == ["generation_config.json was added"]
    generation.write_text("{")
    assert model_differences(folder, record) == ["generation_config.json was added"]


def test_an_index_that_points_elsewhere_is_a_change(tmp_path):
    """Of weights in several files: what the index names is what is loaded."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}')
    record = {"files": {}, "other_files": other_files(folder, {})}
    assert model_differences(folder, record) == []
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "tuned.safetensors"}}')
    assert model_differences(folder, record) == ["model.safetensors.index.json is not the file that was written"]


def test_a_dtype_that_transformers_adds_inside_is_no_change(tmp_path):
    file, inside = tmp_path / "config.json", {"hidden_size": 4}
    hashes = []
    for dtype in ({}, {"dtype": None}, {"dtype": "float32"}, {"dtype": "bfloat16"}):
        file.write_text(json.dumps({"model_type": "gemma3", "dtype": "float32", "text_config": inside | dtype}))
        hashes.append(stable_hash(file))
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    rope = {"full_attention": {}, "sliding_attention": {}}
    file.write_text(json.dumps({"model_type": ["x"], "rope_parameters": rope}))
    assert stable_hash(file), "a hash, whatever stands there"


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
