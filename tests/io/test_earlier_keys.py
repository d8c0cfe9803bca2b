"""The keys of Transformers 4 beside those of Transformers 5.

That version 4 reads the same RoPE from them is measured by examples/benchmarks/transformers_versions.py.
"""

from __future__ import annotations

import json

import pytest
from conftest import TEXT
from families import TINY
from transformers import AutoConfig

import surgery as package
from surgery.io.earlier_keys import with_earlier_keys

LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip


def read(folder, config) -> dict:
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder).to_dict()


@pytest.mark.parametrize("family", TINY)
def test_transformers_5_reads_the_same(tmp_path, family):
    TINY[family]().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    before, after = read(tmp_path, config), read(tmp_path, with_earlier_keys(config))
    added = {"partial_rotary_factor"}  # Transformers keeps it as an attribute of some families
    assert {key: after[key] for key in after if key not in added} == {
        key: before[key] for key in before if key not in added
    }
    assert after["rope_parameters"] == before["rope_parameters"] if "rope_parameters" in before else True


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "dtype": "float32"},
         {"rope_theta": 1e5, "torch_dtype": "float32"}),
        ({"rope_parameters": LLAMA_3},
         {"rope_theta": 5e5, "rope_scaling": {key: LLAMA_3[key] for key in LLAMA_3 if key != "rope_theta"}}),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ({"model_type": "gemma3_text", "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
         {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ({"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
         {"rotary_emb_base": 1e4, "rotary_pct": 0.25}),
        ({"model_type": "phi3", "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "rope_theta": 1e4,
            "original_max_position_embeddings": 64}},
         {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}),
        ({"model_type": "newer", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {}),
        ({"rope_parameters": None, "dtype": None}, {}),
        ({"n_embd": 64}, {}),
    ],
)  # fmt: skip
def test_what_is_added(config, expected):
    made = with_earlier_keys(config)
    assert made == config | expected
    assert list(made)[-len(config) :] == list(config) or expected == {}


def test_keys_that_are_there_stay():
    config = {"rope_parameters": {"rope_theta": 1e5}, "rope_theta": 7.0, "dtype": "float32", "torch_dtype": "bfloat16"}
    assert with_earlier_keys(config) == config


def test_the_text_model_of_a_composite_has_them():
    text = {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e5}}
    made = with_earlier_keys({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert made["text_config"]["rope_theta"] == 1e5
    assert "rope_theta" not in made


def test_a_native_result_has_them_and_a_surgical_one_does_not(surgery, model, tmp_path):
    assert surgery("apply", "mqa", model, "-o", "native", "--no-check", "--no-eval", "-q").code == 0
    assert surgery("apply", "streaming", model, "-o", "surgical", "--no-check", "--no-eval", "-q").code == 0
    healing = ("steps=1", "length=16", "batch_tokens=32", "data=text.txt", "method=full")
    (tmp_path / "text.txt").write_text(TEXT)
    assert (
        surgery("heal", "native", *healing, "--base", model, "-o", "healed", "--no-check", "--no-eval", "-q").code == 0
    )
    loaded = package.load(tmp_path / "native")
    package.save(loaded, tmp_path / "saved", package.Report.of(tmp_path / "native"))
    for name in ("healed", "saved"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"], name
    native, surgical = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("native", "surgical"))
    assert native["rope_theta"] == native["rope_parameters"]["rope_theta"]
    assert "rope_theta" not in surgical
