"""Files that are JSON, YAML or a header only at first sight: one sentence each, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
from conftest import edit_json

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5_000
FAST = ("--no-check", "--no-eval")


@pytest.fixture
def model(tiny, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def config(**fields):
    return lambda model: edit_json(model / "config.json", **fields)


def with_text(name: str, key: str, text: str):
    """A JSON file whose key has a value that is written out."""

    def craft(model: Path) -> None:
        known = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(known | {key: "HERE"}).replace('"HERE"', text))

    return craft


def header(change):
    """The header of model.safetensors, changed as text; offsets stay right."""

    def craft(model: Path) -> None:
        data = (model / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        text = change(json.loads(data[8 : 8 + size])).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return craft


def first_entry(**fields):
    def change(table: dict) -> str:
        name = next(name for name in table if name != "__metadata__")
        return json.dumps(table | {name: table[name] | fields})

    return header(change)


def index(**fields):
    """A weight index in place of the single file."""

    def craft(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        with open(model / "model-00001-of-00001.safetensors", "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            names = [name for name in json.loads(file.read(size)) if name != "__metadata__"]
        plain = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        text = json.dumps(plain | fields)
        text = text.replace('"DEEP"', DEEP).replace('"DIGITS"', DIGITS)
        (model / "model.safetensors.index.json").write_text(text)

    return craft


def record(text: str):
    return lambda model: (model / "surgery.json").write_text(text)


CRAFTED = {
    "config nested deep": with_text("config.json", "x", DEEP),
    "config with a long number": with_text("config.json", "x", DIGITS),
    "index nested deep": index(x="DEEP"),
    "index with a long number": index(x="DIGITS"),
    "index of nothing": index(weight_map={}),
    "index with a list": index(metadata=[1]),
    "index with a long name": index(weight_map={"lm_head.weight": "x" * 5_000 + ".safetensors"}),
    "header nested deep": header(lambda table: json.dumps(table | {"x": "HERE"}).replace('"HERE"', DEEP)),
    "dtype a list": first_entry(dtype=["BF16"]),
    "dtype a mapping": first_entry(dtype={"a": 1}),
    "three offsets": first_entry(data_offsets=[0, 1, 2]),
    "model_type a list": config(model_type=["llama"]),
    "model_type a mapping": config(model_type={"a": "llama"}),
    "a window in words": config(sliding_window="big"),
    "a share in words": config(partial_rotary_factor="half", rope_parameters={"partial_rotary_factor": "half"}),
    "attention of somebody's": config(_attn_implementation="evil/kernel"),
    "many layers": config(num_hidden_layers=10**12),
    "some layers too many": config(num_hidden_layers=10**8),
    "many labels": config(num_labels=10**7),
    "a block that is none": config(model_type="surgery", surgery=[1], auto_map=[2]),
    "a card nested deep": lambda model: (model / "README.md").write_text(f"---\nx: {'[' * 20_000}\n---\n# it\n"),
    "a record nested deep": record('{"history": ' + DEEP + "}"),
    "a history in numbers": record('{"history": 5}'),
    "a history in words": record('{"history": "long"}'),
    "a name that is no text": lambda model: Path(os.fsdecode(bytes(model) + b"/LICENSE-\xff")).write_text("free"),
}
MAY_PASS = {  # what is beside the model may be left out; it may not end in a traceback
    "index with a list", "a share in words", "many labels", "a card nested deep", "a record nested deep",
    "a history in numbers", "a history in words", "a name that is no text", "config with a long number",
    "a window in words", "index nested deep", "index with a long number",
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
@pytest.mark.parametrize("verb", ["plan", "apply"])
def test_crafted_models(surgery, model, tmp_path, case, verb):
    CRAFTED[case](model)
    begin = time.monotonic()
    ran = surgery(verb, "mqa", "model", *(("-o", "out", *FAST) if verb == "apply" else ()))
    assert time.monotonic() - begin < 30
    assert "Traceback" not in ran.err + ran.out
    assert "this is a bug" not in ran.err
    assert ran.code == 2 or (case in MAY_PASS and ran.code == 0), (ran.code, ran.err)
    if ran.code:
        assert ran.err.count("error:") == 1
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


RECIPE = "version: 1\nname: x\noperations: [{op: gqa, kv_heads: 1, method: mean}]\nevaluate: null\n"


@pytest.mark.parametrize("depth", [100, 600, 900, 20_000])
@pytest.mark.parametrize("form", ["flow", "block"])
def test_a_recipe_nested_deep(surgery, model, depth, form):
    if form == "block" and depth > 1000:
        pytest.skip("a file of indents of 200 MB")
    deep = "[" * depth + "]" * depth if form == "flow" else "".join(f"\n{' ' * (i + 1)}a:" for i in range(depth))
    Path("r.yaml").write_text(f"{RECIPE}x: {deep}\n")
    ran = surgery("plan", "r.yaml", "model")
    assert ran.code == 2
    assert "Traceback" not in ran.err
    ran = surgery("plan", "mqa", "model", f"description={'[' * depth}{']' * depth}")
    assert ran.code == 2
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("out", ["/", "//", "/."])
def test_the_root_is_no_output(surgery, model, out):
    ran = surgery("apply", "mqa", "model", "-o", out, *FAST)
    assert ran.code == 2
    assert "the root of a file system is no output folder" in ran.err


@pytest.mark.parametrize(
    "progress", [DEEP, '{"done": 5}', '{"records": 5, "done": {}}', '{"done": {"x": 5}}', "[1]", "5"]
)
def test_a_forged_progress(surgery, model, tmp_path, progress):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/surgery-progress.json").write_text(progress)
    ran = surgery("apply", "mqa", "model", "-o", "out", *FAST, "--resume")
    assert "Traceback" not in ran.err
    assert ran.code in (0, 2)


@pytest.mark.parametrize(
    "fields",
    [{"auto_map": []}, {"auto_map": "x"}, {"auto_map": 5}],
    ids=lambda fields: repr(next(iter(fields.values()))),
)
def test_check_of_a_config_of_another_shape(surgery, model, tmp_path, fields):
    split = RECIPE.replace("{op: gqa, kv_heads: 1, method: mean}", "{op: duo_attention, streaming_ratio: 1.0}")
    Path("r.yaml").write_text(split)
    assert surgery("apply", "r.yaml", "model", "-o", "out", *FAST).code == 0
    edit_json(tmp_path / "out/config.json", **fields)
    ran = surgery("check", "out")
    assert ran.code == 4
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("versions", [5, [], "x", None])
def test_check_of_a_record_of_another_shape(surgery, model, tmp_path, versions):
    assert surgery("apply", "mqa", "model", "-o", "out", *FAST).code == 0
    edit_json(tmp_path / "out/surgery.json", versions=versions)
    ran = surgery("check", "out")
    assert ran.code == 4
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("memory", ["nan", "inf", "1e400", "-1", "0", "x"])
def test_memory_that_is_no_number(surgery, model, memory):
    ran = surgery("check", "model", "--memory", memory)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_a_text_with_a_long_name(surgery, model):
    ran = surgery("plan", "gqa", "model", "kv_heads=1", f"calibration_text={'x' * 5_000}")
    assert ran.code == 2
    assert "no such text file" in ran.err


def sparse(state):
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].to_sparse()


def meta(state):
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].to("meta")


def quantized(state):
    import torch

    table = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.quantize_per_tensor(table.float(), 0.1, 0, torch.qint8)


def a_number_as_name(state):
    state[5] = state.pop("model.embed_tokens.weight")


@pytest.mark.parametrize("change", [sparse, meta, quantized, a_number_as_name])
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantised tensors
def test_odd_pickles(refused, model, change):
    import torch
    from safetensors.torch import load_file

    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    change(state)
    torch.save(state, model / "pytorch_model.bin")
    words = {"a_number_as_name": "names a tensor 5"}.get(change.__name__, "model.embed_tokens.weight in")
    refused("apply", "gqa", model, "kv_heads=2", "method=mean", "-o", "out", "--allow-pickle", *FAST, says=[words])
