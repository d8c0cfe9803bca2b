"""What is read of a plain config.json without Transformers is what Transformers reads; all others are left to it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from families import CONVERTIBLE
from transformers import CONFIG_MAPPING

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.detect import read_anatomy
from surgery.errors import SurgeryError
from surgery.io import model_folder
from surgery.io.earlier_keys import with_earlier_keys
from surgery.io.model_folder import load_config, settled_config
from surgery.io.plain_config import FORMS, PlainConfig, plain_config

# As the Hub has them.
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
LLAMA_OF_TODAY = {
    **{key: value for key, value in LLAMA_3_1.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")},
    "dtype": "bfloat16", "head_dim": 128, "pad_token_id": None, "unk_token_id": 0, "_name_or_path": "somewhere",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
PLAIN = {"llama 3.1": LLAMA_3_1, "llama": LLAMA_OF_TODAY, "mistral": MISTRAL, "qwen2": QWEN_2_5, "qwen3": QWEN_3}
VALUES = (
    None, True, False, -1, 0, 1, 3, 6, 2**20, -0.5, 0.5, 1.5, "", "silu", "default", "float16", "int8", [], [2], ["x"],
    ["full_attention"] * 32, {}, {"rope_type": "default"}, {"rope_type": "llama3", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "yarn", "factor": 2.0},
)  # fmt: skip
# Keys that a config.json may have and none of these has: what they mean is Transformers' to say.
OTHERS = (
    "alibi", "attn_logit_softcapping", "auto_map", "layer_types", "no_rope_layers", "output_attentions",
    "partial_rotary_factor", "per_layer_config", "qk_layernorm", "quantization_config", "rope_parameters",
    "rope_scaling", "rotary_dim", "sliding_window", "surgery", "use_qk_norm", "use_sliding_window", "head_dim",
)  # fmt: skip
MISSING = object()


def transformers_config(raw: dict):
    """What Transformers makes of it; a copy, since it completes what it is given."""
    copied = json.loads(json.dumps(raw))
    return CONFIG_MAPPING[copied["model_type"]].from_dict(copied)


def read(config) -> dict:
    """The anatomy, with the tensors that the full config asks for; without its config."""
    size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    rows = {"q": config.num_attention_heads * size, "k": config.num_key_value_heads * size}
    shapes = {f"{letter}_proj": (rows.get(letter, rows["k"]), config.hidden_size) for letter in "qkv"}
    shapes |= {"o_proj": (config.hidden_size, rows["q"])}
    paths = [f"model.layers.{index}.self_attn" for index in range(config.num_hidden_layers)]
    table = {f"{path}.{name}.weight": ("BF16", shape) for path in paths for name, shape in shapes.items()}
    return read_anatomy(config, table, "here") | {"config": None}


def same(raw: dict) -> bool:
    """Whether the config is plain; where it is, what is known without Transformers is what Transformers knows."""
    plain = plain_config(raw, lambda: pytest.fail("asked Transformers"))
    if plain is None:
        return False
    full = transformers_config(raw)  # which accepts it
    for name in {*vars(plain)} - {"_absent", "_load"}:
        assert getattr(full, name, MISSING) == getattr(plain, name), name
    for name in plain._absent:
        assert not hasattr(full, name), name
        assert not hasattr(plain, name), name
    if plain.num_attention_heads % plain.num_key_value_heads == 0 and plain.num_hidden_layers < 100:
        assert read(plain) == read(full)
    return True


@pytest.mark.parametrize("name", PLAIN)
def test_what_the_hub_has_is_plain(name):
    assert same(PLAIN[name])


@pytest.mark.parametrize("name", PLAIN)
def test_both_spellings(name):
    """A result has the keys of Transformers 4 beside those of Transformers 5. Where they say two things, ask it."""
    saved = transformers_config(PLAIN[name]).to_dict()
    new = {
        key: value for key, value in PLAIN[name].items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")
    }
    both = with_earlier_keys(new | {"rope_parameters": saved["rope_parameters"], "dtype": "bfloat16"})
    assert {"rope_theta", "torch_dtype"} <= both.keys()
    assert same(both)
    assert not same(both | {"torch_dtype": "float16"})
    if "rope_scaling" in both:
        assert not same(both | {"rope_scaling": both["rope_scaling"] | {"factor": 7.0}})
        assert not same(both | {"rope_theta": 7.0})


def test_every_form_is_tested():
    assert {config["model_type"] for config in PLAIN.values()} == FORMS.keys()


@pytest.mark.parametrize("name", PLAIN)
def test_a_key_less(name):
    kept = [key for key in PLAIN[name] if same({k: v for k, v in PLAIN[name].items() if k != key})]
    assert {"bos_token_id", "transformers_version", "rms_norm_eps"} <= {*kept}
    assert not {"hidden_size", "num_hidden_layers", "vocab_size", "model_type"} & {*kept}


@pytest.mark.parametrize("name", PLAIN)
def test_another_value(name):
    """Of any type, for any key that it has or may have: read alike, or left to Transformers."""
    keys = [key for key in dict.fromkeys([*PLAIN[name], *OTHERS]) if key != "model_type"]
    plain = {key: [value for value in VALUES if same(PLAIN[name] | {key: value})] for key in keys}
    assert 3 in plain["vocab_size"]
    assert not any(type(value) is not int for value in plain["hidden_size"])
    assert not plain["quantization_config"] + plain["surgery"] + plain["auto_map"] + plain["no_rope_layers"]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_family_has_the_same_anatomy(name, tmp_path):
    """From a folder, whose config.json Transformers has written, with the tensors of the model."""
    CONVERTIBLE[name]().save_pretrained(tmp_path)
    table = model_folder.tensor_table(tmp_path)
    known, full = Anatomy.of(tmp_path), Anatomy.of(load_config(tmp_path), table)
    assert replace(known, config=None) == replace(full, config=None)
    if name in ("llama", "llama_bias", "mistral", "qwen2", "qwen3"):
        assert type(known.config) is PlainConfig


def test_what_is_not_known_is_asked_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1), encoding="utf-8")
    config = settled_config(tmp_path)
    assert type(config) is PlainConfig
    assert "full" not in vars(config)
    assert config.rms_norm_eps == 1e-05
    assert vars(config)["full"].to_dict() == load_config(tmp_path).to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        _ = config.no_such_field


def test_what_transformers_refuses_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1 | {"hidden_size": 4100}), encoding="utf-8")
    with pytest.raises(SurgeryError, match="Transformers does not accept this config"):
        settled_config(tmp_path)
