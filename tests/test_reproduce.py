"""`surgery reproduce`: the recipe of a checkpoint is run again on its base, and the result compared."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest
import torch
from conftest import edit_record, edit_tensors
from families import one_thread  # noqa: F401 (a fixture)
from safetensors.torch import save_file

import surgery as package
from surgery.errors import SurgeryError
from surgery.report.reproduction import differing_tensors

MERGED = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}


@pytest.fixture
def out(model, tmp_path):
    package.apply(MERGED, str(model), output=tmp_path / "out", check=False, evaluate=False)
    return tmp_path / "out"


def record_of(folder) -> dict:
    return json.loads((folder / "surgery.json").read_text())


def test_the_same_recipe_on_the_same_base_gives_the_same_hashes(surgery, out, model, tmp_path):
    ran = surgery("reproduce", "out", "--base", model)
    assert ran.code == 0, ran.err
    assert "out: reproduced: 1 weight file with the recorded hash" in ran.out
    data = surgery("reproduce", "out", "--base", model, "--json").json
    assert (data["reproduced"], data["same_bits"], data["tensors"], data["config"]) == (True, True, [], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"], "nothing is kept"


@pytest.mark.parametrize(
    "recipe",
    [
        {"operations": [{"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 3}]},
        {"operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}], "heal": {"steps": 2, "length": 16}},
    ],
)
def test_terms_and_healing_are_run_again_too(model, text, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    if "heal" in recipe:
        recipe["heal"] |= {"data": str(text), "batch_tokens": 32, "method": "full", "precision": "float32"}
    recipe = {"version": 1, "name": "r"} | recipe
    package.apply(recipe, str(model), output=tmp_path / "out", check=False, evaluate=False)
    found = package.reproduce(tmp_path / "out", model)
    assert found.same_bits, str(found)


def test_a_changed_digit_of_the_recipe_gives_other_weights(surgery, out, model):
    recipe = record_of(out)["recipe"]
    recipe["operations"][0]["kv_heads"] = 3
    edit_record(out, recipe=recipe)
    ran = surgery("reproduce", "out", "--base", model)
    assert ran.code == 4
    assert "not reproduced: config.json differs" in ran.out
    assert "k_proj" in ran.out
    assert ran.err.startswith("error: out: not reproduced")
    found = package.reproduce(out, model)
    names = {each.name for each in found.tensors}
    assert names == {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "kv"}
    shapes = {each.otherwise for each in found.tensors}
    assert shapes == {"shape [8, 72], now [24, 72]"}
    assert shapes.pop() in ran.out
    assert "inf" not in ran.out.split()
    data = surgery("reproduce", "out", "--base", model, "--json").json
    assert {(each["distance"], each["otherwise"]) for each in data["tensors"]} == {
        (None, "shape [8, 72], now [24, 72]")
    }


def test_how_tensors_differ(tmp_path):
    one, whole, zero = torch.tensor([3.0, 4.0]), torch.tensor([1, 2]), torch.zeros(2)
    old = {"same": one, "b": one, "a": one, "half": one, "shape": one, "gone": one}
    old |= {"whole": whole, "whole-same": whole, "zero": zero, "nan": one, "infinite": one, "was-nan": one / 0 * 0}
    new = {"same": one, "b": torch.tensor([3.0, 4.5]), "a": torch.tensor([3.0, 5.0]), "half": one.half()}
    new |= {"shape": one[:1].half(), "more": one, "whole": whole + 1, "whole-same": whole, "zero": one}
    new |= {"nan": torch.tensor([3.0, math.nan]), "infinite": torch.tensor([3.0, math.inf]), "was-nan": one}
    for folder, tensors in (("old", old), ("new", new)):
        (tmp_path / folder).mkdir()
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / folder / "model.safetensors")
    found = differing_tensors(tmp_path / "old", tmp_path / "new")
    assert [(each.name, each.otherwise or each.distance) for each in found] == [
        ("gone", "only in the recorded weights"),
        ("half", "dtype F32, now F16"),
        ("infinite", "values that are not finite"),
        ("more", "only in the new weights"),
        ("nan", "values that are not finite"),
        ("shape", "shape [2], now [1]"),
        ("was-nan", "values that are not finite"),
        ("whole", "other bytes (I64)"),
        ("zero", "all zero in the recorded weights"),
        ("a", 0.2),
        ("b", 0.1),
    ]


def test_a_changed_digit_that_no_weight_shows(model, tmp_path):
    package.apply("streaming", str(model), output=tmp_path / "out", check=False, evaluate=False, sinks=1, window=3)
    recipe = record_of(tmp_path / "out")["recipe"]
    recipe["operations"][0]["window"] = 4
    edit_record(tmp_path / "out", recipe=recipe)
    found = package.reproduce(tmp_path / "out", model)
    assert (found.files, found.config, found.reproduced) == ({"model.safetensors": True}, ["surgery"], False)


@pytest.mark.parametrize(("factor", "reproduced"), [(2.0, True), (1.5, False)])
def test_last_bits_are_told_from_other_weights(model, text, tmp_path, monkeypatch, factor, reproduced):
    monkeypatch.chdir(tmp_path)
    recipe = MERGED | {"evaluate": {"text": str(text), "windows": 1, "length": 64}}
    package.apply(recipe, str(model), output=tmp_path / "out", check=False)
    name = "model.layers.1.self_attn.v_proj.weight"

    def change(tensors) -> None:
        tensors[name] = tensors[name].clone()
        if reproduced:
            flat = tensors[name].view(-1)
            flat[flat.abs().argmin()] *= factor
        else:
            tensors[name] *= factor

    edit_tensors(tmp_path / "out", change)
    digest = hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest()
    record = record_of(tmp_path / "out")
    files = {"model.safetensors": record["files"]["model.safetensors"] | {"sha256": digest}}
    edit_record(tmp_path / "out", files=files)
    assert not package.reproduce(tmp_path / "out", model).reproduced, "on one machine equal bits are promised"
    edit_record(tmp_path / "out", versions=record["versions"] | {"torch": "1.0"})
    found = package.reproduce(tmp_path / "out", model)
    assert [each.name for each in found.tensors] == [name]
    assert found.reproduced is reproduced
    assert not found.same_bits
    then, now = found.figures["cross-entropy, nats a token"]
    assert then == record["evaluation"]["out"]["cross_entropy"] == now
    assert ("to rounding" in str(found)) is reproduced
    (tmp_path / "words.txt").unlink()
    found = package.reproduce(tmp_path / "out", model)
    assert not found.figures
    assert "the loss was not compared: words.txt: no such text file" in str(found)


def test_a_text_that_the_recipe_reads_is_missing(refused, model, text, tmp_path, monkeypatch):
    heal = {"steps": 1, "length": 16, "batch_tokens": 32, "data": str(text), "method": "full"}
    package.apply(MERGED | {"heal": heal}, str(model), output=tmp_path / "out", check=False, evaluate=False)
    text.unlink()
    refused(
        "reproduce", "out", "--base", model, says=["words.txt", "run the command in the folder that has this file"]
    )


def test_a_text_that_an_operation_reads_is_missing(refused, model, text, tmp_path, monkeypatch):
    step = {"op": "gqa", "kv_heads": 1, "method": "closed_form", "calibration_text": str(text)}
    step |= {"calibration_samples": 2, "calibration_length": 32}
    recipe = MERGED | {"operations": [step]}
    package.apply(recipe, str(model), output=tmp_path / "out", check=False, evaluate=False)
    text.unlink()
    refused(
        "reproduce", "out", "--base", model, says=["words.txt", "run the command in the folder that has this file"]
    )


def test_an_edited_record_is_told(surgery, out, model):
    record = record_of(out)
    (out / "surgery.json").write_text(json.dumps(record | {"created": "yesterday"}))
    ran = surgery("reproduce", "out", "--base", model)
    assert ran.code == 0, ran.err
    assert "note: surgery.json was edited after surgery wrote it" in ran.out


def test_it_runs_with_the_recorded_threads(out, model, monkeypatch):
    from surgery import pipeline

    used, before = [], torch.get_num_threads()
    run = pipeline.apply_to_folder
    monkeypatch.setattr(pipeline, "apply_to_folder", lambda *a: (used.append(torch.get_num_threads()), run(*a))[1])
    edit_record(out, threads=2)
    package.reproduce(out, model)
    assert used == [2]
    assert torch.get_num_threads() == before


def test_what_cannot_be_reproduced(refused, surgery, out, model, tmp_path):
    refused("reproduce", model, says=["surgery.json"])
    other = shutil.copytree(model, tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors.update({name: 2 * t for name, t in tensors.items()}))
    refused("reproduce", "out", "--base", other, says=["this is not the base it was made from", "--base"])
    recipe = record_of(out)["recipe"]
    recipe["operations"][0]["op"] = "of_a_later_version"
    edit_record(out, recipe=recipe)
    with pytest.raises(SurgeryError, match="of_a_later_version"):
        package.reproduce(out, model)


def test_the_same_tensors_in_a_file_with_another_hash(out, model):
    from safetensors.torch import load, save

    tensors = load((out / "model.safetensors").read_bytes())
    content = save(tensors, metadata={"format": "pt", "note": "of another program"})
    (out / "model.safetensors").write_bytes(content)
    files = record_of(out)["files"]
    digest = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_record(out, files={name: entry | digest for name, entry in files.items()})
    found = package.reproduce(out, model)
    assert (found.same_bits, found.reproduced, found.tensors) == (False, True, [])
    assert "every tensor is the same to the bit, in files with another hash" in str(found)


def test_a_checkpoint_that_is_not_what_its_record_says(refused, out, model):
    says = ["the model is not the one in surgery.json", "model.safetensors is", "surgery check"]
    edit_tensors(out, lambda tensors: tensors.update({name: 3 * tensor for name, tensor in tensors.items()}))
    refused("reproduce", "out", "--base", model, says=says, code=4)
    (out / "model.safetensors").unlink()
    refused("reproduce", "out", "--base", model, says=says, code=4)
    edit_record(out, files={})
    refused("reproduce", "out", "--base", model, says=["surgery.json lists no weights"])


@pytest.mark.parametrize("name", ["surgery_attention.py", "generation_config.json"])
def test_code_or_a_config_beside_the_weights_that_was_changed(refused, model, tmp_path, name):
    package.apply("streaming", str(model), output=tmp_path / "split", check=False, evaluate=False, sinks=1, window=3)
    file = tmp_path / "split" / name
    if not file.is_file():
        pytest.skip(f"this model has no {name}")
    content = file.read_text(encoding="utf-8")
    file.write_text(content.replace("{", '{"top_k": 3,', 1) if file.suffix == ".json" else content + "\n", "utf-8")
    refused("reproduce", "split", "--base", model, says=["the model is not the one in surgery.json", name], code=4)


def test_a_record_whose_hash_was_removed_counts_as_edited(out, model):
    record = record_of(out)
    del record["record_sha256"]
    (out / "surgery.json").write_text(json.dumps(record))
    assert "edited" in str(package.reproduce(out, model))


def test_code_of_another_version_is_named(model, tmp_path):
    out = tmp_path / "split"
    package.apply("streaming", str(model), output=out, check=False, evaluate=False, sinks=1, window=3)
    code = out / "surgery_cache.py"
    code.write_bytes(code.read_bytes() + b"# as an earlier version wrote it\n")
    digest = {"sha256": hashlib.sha256(code.read_bytes()).hexdigest(), "bytes": code.stat().st_size}
    edit_record(out, other_files=record_of(out)["other_files"] | {code.name: digest})
    found = package.reproduce(out, model)
    assert found.same_bits
    assert "note: the code in the folder is of another version: surgery_cache.py" in str(found)


def test_a_config_that_names_a_default_is_the_same(out, model):
    config = json.loads((out / "config.json").read_text())
    assert config.pop("attention_bias") is False
    (out / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0"}))
    edit_record(out, threads="x")
    assert package.reproduce(out, model).same_bits


def test_a_model_that_was_saved_from_memory(refused, model, tmp_path):
    loaded = package.load(model)
    report = package.apply("gqa", loaded, method="mean")
    package.save(loaded, tmp_path / "saved", report)
    refused("reproduce", "saved", "--base", model, says=["saved from a model in memory"])
