"""What `surgery export` refuses: one message each, before anything is written. No engine is needed here."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import edit_json, edit_record
from exported_models import ALIKE, UNEQUAL, UNIFORM
from families import ROOT, build
from tokenizers_of_bytes import byte_tokenizer

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.cli.doctor import PACKAGES
from surgery.engines import base, find
from surgery.engines.llama_cpp import PARTS
from surgery.io import manifest
from surgery.runtime.surgery_config import PARTS as RUNTIME_PARTS


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The engine counts as installed, whether it is or not."""
    monkeypatch.setattr(base.ServingEngine, "version", lambda engine: "llama.cpp of a test")


def make(folder: Path, family: str, step: dict, **fields) -> Path:
    """A result that counts as checked, of a tiny model that knows every byte."""
    source = folder.with_name(f"{folder.name}-base")
    build(family, vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
          intermediate_size=96, max_position_embeddings=128, **fields).save_pretrained(source)  # fmt: skip
    byte_tokenizer().save_pretrained(source)
    recipe = {"version": 1, "name": "made", "operations": [step], "evaluate": None}
    package.apply(recipe, str(source), output=folder, check=False, evaluate=False)
    passed(folder)
    return folder


def passed(folder: Path) -> None:
    """Say in the record that the files as they are now passed the check."""
    record = json.loads((folder / "surgery.json").read_text(encoding="utf-8"))
    others = manifest.other_files(folder, record["files"])
    edit_record(folder, check={"passed": True, "items": []}, other_files=others)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("native") / "made", "Llama", UNIFORM)


@pytest.fixture
def out(native, tmp_path) -> Path:
    return Path(shutil.copytree(native, tmp_path / "out"))


def export(*more: str) -> list[str]:
    return ["export", "out", "--for", "llama.cpp", "-o", "f.gguf", *more]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["export", "out"], ["no engine was named", "available: llama.cpp", "add --for llama.cpp"]),
        (["export", "out", "--for", "llama.cpp"], ["no file was named", "add -o FILE.gguf"]),
        (["export", "out", "--for", "lama.cpp", "-o", "f.gguf"], ["no engine 'lama.cpp'", "--for llama.cpp"]),
        (export("--type", "q8"), ["no type 'q8'", "f32, f16, bf16, q8_0", "--type q8_0"]),
        (["export", "out", "--for", "llama.cpp", "-o", "f"], ["ends with .gguf", "-o f.gguf"]),
        (["export", "out", "--for", "llama.cpp", "-o", "no/f.gguf"], ["no such folder", "make it first"]),
        (["export", "out", "--for", "llama.cpp", "-o", "out/f.gguf"], ["in the checkpoint's folder", "-o f.gguf"]),
        (["export", "none", "--for", "llama.cpp", "-o", "f.gguf"], ["none: no such folder"]),
    ],
)
def test_usage(refused, out, args, says):
    refused(*args, says=says)


def test_a_file_of_this_name_is_kept(refused, out, tmp_path):
    (tmp_path / "f.gguf").write_text("mine")
    refused(*export(), says=["f.gguf exists", "--overwrite"])
    assert (tmp_path / "f.gguf").read_text() == "mine"


def test_packages_that_are_missing_are_named(refused, out, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(base, "_installed", lambda name: name not in ("xllamacpp", "gguf"))
    refused(*export(), says=["needs xllamacpp and gguf, which are not", "pip install 'attention-surgery[llamacpp]'"])


def test_a_folder_that_did_not_pass_the_check(refused, out):
    edit_record(out, check=None)
    refused(*export(), says=["has not passed `surgery check`", "to fix: run `surgery check out`"])
    edit_record(out, check={"passed": False, "items": []})
    refused(*export(), says=["has not passed `surgery check`"])


def test_a_folder_that_changed_since(refused, out):
    edit_json(out / "config.json", rms_norm_eps=0.1)
    refused(*export(), says=["changed since it was checked: config.json is not the file", "surgery check out"])


def test_a_stock_folder(refused, out):
    (out / "surgery.json").unlink()
    refused(*export(), says=["no surgery.json", "llama.cpp or its converter reads it"])


def test_an_adapter_that_was_not_merged(refused, out):
    (out / "adapter_config.json").write_text("{}")
    refused(*export(), says=["holds an adapter", "merge_and_unload"])


def test_a_folder_without_its_tokenizer(refused, out):
    for path in out.glob("tokenizer*"):
        path.unlink()
    passed(out)
    refused(*export(), says=["no tokenizer files, and what llama.cpp runs holds the tokenizer", "convert that again"])


def test_a_folder_of_four_bits(refused, out):
    edit_json(out / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    passed(out)
    refused(*export(), says=["the weights are quantised", "--type q8_0"])


@pytest.mark.parametrize(
    ("family", "step", "fields", "says"),
    [
        ("Llama", {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 8}, {}, "streaming heads"),
        ("Llama", {"op": "moh", "active_ratio": 0.5, "router": "static", "calibration_samples": 4,
                   "calibration_length": 32}, {}, "gated heads"),
        ("Llama", {"op": "sparse_prefill", "method": "streaming", "dense_below": 0}, {}, "sparse prefill"),
        ("Llama", {"op": "sink_calibration", "method": "learned", "logit": -2.0}, {}, "sink biases"),
        ("Qwen2", UNEQUAL, {}, "different numbers of heads, and q_proj, k_proj, v_proj with biases"),
        ("Llama", UNEQUAL, {"attention_bias": True}, "q_proj, k_proj, v_proj, o_proj with biases"),
        ("Qwen2", ALIKE, {}, "2 query heads of size 16 with hidden states of size 64: llama.cpp takes the size of a"),
        ("Qwen3", UNEQUAL, {"head_dim": 16}, "different numbers of heads, and QK-norm"),
        ("Gemma", UNEQUAL, {"head_dim": 16}, "different numbers of heads of gemma"),
    ],
)  # fmt: skip
def test_what_a_gguf_file_cannot_hold(refused, tmp_path, family, step, fields, says):
    make(tmp_path / "out", family, step, **fields)
    refused(*export(), says=["llama.cpp cannot express", says, "the nearest that it can: "])


def test_the_sentence_about_a_qwen2(tmp_path):
    """Word by word: it names the reason and the nearest thing that the file can hold."""
    anatomy = Anatomy.of(make(tmp_path / "out", "Qwen2", UNEQUAL))
    (obstacle,) = find("llama.cpp").obstacles(anatomy)
    what = "layers with different numbers of heads, and q_proj, k_proj, v_proj with biases"
    assert obstacle.what == f"{what}: llama.cpp's deci has no place for biases"
    assert "gqa kv_heads=N" in obstacle.nearest


def test_query_heads_in_groups_of_unequal_size(refused, tmp_path):
    step = {"op": "gqa", "kv_heads": 2, "method": "mean"}
    first = make(tmp_path / "first", "Llama", step)
    recipe = {"op": "prune_heads", "granularity": "head", "heads": [[0], []], "refit": False}
    package.apply({"version": 1, "name": "cut", "operations": [recipe], "evaluate": None}, str(first),
                  output=tmp_path / "out", check=False, evaluate=False)  # fmt: skip
    passed(tmp_path / "out")
    refused(*export(), says=["read by different numbers of query heads", "granularity=kv_group"])


def test_the_packages_are_those_of_the_extra_and_the_doctor_lists_them():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    engine = find("llama.cpp")
    assert {wanted.partition(">=")[0] for wanted in extras[engine.extra]} == set(engine.packages) <= set(PACKAGES)


def test_every_part_of_the_runtime_has_its_reason():
    assert set(PARTS) == set(RUNTIME_PARTS) - {"latent"}, "engines decode latent attention so by themselves"


def test_the_api_says_what_is_no_path():
    with pytest.raises(package.SurgeryError, match="is not a path"):
        package.export(3, "llama.cpp", "f.gguf")
    with pytest.raises(package.SurgeryError, match="is not a text"):
        package.export("out", 3, "f.gguf")
