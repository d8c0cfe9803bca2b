"""Facts about attention: from the config, a folder and a loaded model the same, and those of Transformers' modules."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from families import (
    KV,
    OFF_THE_INTERFACE,
    QUERIES,
    TINY,
    TOKENS,
    attention_modules,
    base,
    build,
    head_dim_of,
    kv_heads_of,
    one_thread,  # noqa: F401
    text_config,
)
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.architecture.families import FAMILIES
from surgery.errors import SurgeryError

QK_NORM = {"qwen3": "shared", "qwen3_moe": "shared", "gemma3": "shared", "gemma3_image_text": "shared"}
QK_NORM |= {"phi_qk_layernorm": "shared", "olmo2": "whole", "cohere_qk_norm": "per head"}
QK_NORM |= {"stablelm_qk_layernorm": "modules"}
INTERLEAVED = ("cohere", "cohere_qk_norm", "glm4", "gptj")
OTHER = {"gpt2": "learned", "opt": "learned", "bloom": "alibi", "mpt": "alibi", "falcon_alibi": "alibi"}
SHARED_FACTS = (
    "index",
    "heads",
    "kv_heads",
    "head_dim",
    "rotary",
    "positions",
    "qk_norm",
    "window",
    "soft_cap",
    "layout",
)
WITHOUT_PREFIX = {
    "llama": ("model", "layers"),
    "gpt2": ("transformer", "h"),
    "bloom": ("transformer", "h"),
    "falcon_new": ("transformer", "h"),
    "gptj": ("transformer", "h"),
    "mpt": ("transformer", "blocks"),
    "gpt_neox": ("gpt_neox", "layers"),
    "opt": ("model", "decoder.layers"),
}


def facts(anatomy: Anatomy) -> list[dict]:
    return [{name: getattr(layer, name) for name in SHARED_FACTS} for layer in anatomy.layers]


@pytest.mark.parametrize("name", TINY)
def test_three_sources_agree(name, tmp_path):
    model = base(name)
    model.save_pretrained(tmp_path)
    loaded, folder = Anatomy.of(model), Anatomy.of(tmp_path)
    assert facts(Anatomy.of(model.config)) == facts(loaded) == facts(folder)
    assert [layer.biases for layer in folder.layers] == [layer.biases for layer in loaded.layers]
    for anatomy in (loaded, folder):
        assert {layer.dtype for layer in anatomy.layers} == {"F32"} == {anatomy.dtype}
        assert anatomy.parameters == sum(p.numel() for p in model.parameters())
        assert not anatomy.guess
        assert anatomy.composite == ("gemma3" if name == "gemma3_image_text" else None)
        assert anatomy.model_type == text_config(model).model_type
        assert all(f"{layer.path}.{n}" in anatomy.tensors for layer in anatomy.layers for n in layer.tensor_names)
    assert Anatomy.of(model.config).parameters == 0
    assert Anatomy.of(model.config).kv_bytes_per_token == loaded.kv_bytes_per_token


def rotary_channels(model, layer: int) -> int:
    """Channels that the model's own rotary embedding turns."""
    config = text_config(model)
    if config.model_type == "gptj":
        return config.rotary_dim
    if getattr(config, "no_rope_layers", None) and not config.no_rope_layers[layer]:
        return 0
    kind = config.layer_types[layer] if getattr(config, "layer_types", None) else ""
    for module in model.modules():
        for buffer in (f"{kind}_inv_freq", "inv_freq"):
            if hasattr(module, buffer):
                return 0 if name_of(model) in OTHER else 2 * getattr(module, buffer).numel()
    return 0


def name_of(model) -> str:
    return next(name for name in TINY if base(name) is model)


@pytest.mark.parametrize("name", TINY)
def test_facts_are_those_of_the_modules(name):
    model = base(name)
    cache = DynamicCache(config=text_config(model))
    modules = dict(model.named_modules())
    for layer, module in zip(Anatomy.of(model).layers, attention_modules(model), strict=True):
        assert modules[layer.path] is module
        assert (layer.heads, layer.kv_heads) == (QUERIES, kv_heads_of(model))
        assert layer.group == getattr(module, "num_key_value_groups", QUERIES // kv_heads_of(model))
        assert layer.head_dim == head_dim_of(model) == getattr(module, "head_dim", head_dim_of(model))
        assert layer.rotary == rotary_channels(model, layer.index)
        expected = OTHER.get(name, "interleaved" if name in INTERLEAVED else "half")
        assert layer.positions == ("none" if name == "smollm3" and layer.index == 1 else expected)
        assert layer.qk_norm == QK_NORM.get(name)
        own = any(hasattr(module, n) for n in ("k_norm", "k_layernorm"))
        assert own == (layer.qk_norm is not None)
        assert layer.soft_cap == getattr(module, "attn_logit_softcapping", None)
        assert (layer.layout.sinks is not None) == hasattr(module, "sinks")
        held = cache.layers[layer.index] if cache.layers else None
        sliding = getattr(held, "is_sliding", False)
        assert layer.window == (held.sliding_window if sliding else None)
        fused = layer.layout.qkv
        parts = {"qkv": fused, "o": layer.layout.o} if fused else {p: getattr(layer.layout, p) for p in "qkvo"}
        biases = [p for p, n in parts.items() if getattr(getattr(module, n), "bias", None) is not None]
        assert layer.biases == "".join(biases)
        assert layer.layout.conv1d == (type(getattr(module, layer.layout.o)).__name__ == "Conv1D")


@pytest.mark.parametrize("name", TINY)
def test_a_share_of_rotated_channels_counts_where_the_code_reads_it(name):
    """A Llama with `partial_rotary_factor` rotates all channels."""
    config = copy.deepcopy(base(name).config)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or name == "falcon_alibi":
        pytest.skip("it has no RoPE, or one for each kind of layer, or a scaled one")
    rope["partial_rotary_factor"], config.rotary_dim = 0.25, 2
    with torch.device("meta"):
        model = type(base(name))(config)
    frequencies = next(buffer for key, buffer in model.named_buffers() if key.endswith("rotary_emb.inv_freq"))
    assert Anatomy.of(model).layers[0].rotary == 2 * len(frequencies)


@pytest.mark.parametrize("name", TINY)
def test_cache_bytes_are_those_of_a_cache(name):
    """At 9 and at 12 tokens: both are beyond a window of 6 tokens, so that its layers store the same."""
    model, stored = base(name), {}
    for length in (9, 12):
        with torch.no_grad():
            cache = model(input_ids=TOKENS[:1, :length], use_cache=True).past_key_values
        stored[length] = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    # Before Transformers 5.25 Falcon cached repeated heads; we say so.
    repeated = QUERIES // KV if name == "falcon_new" and name in OFF_THE_INTERFACE else 1
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # a config of a model that was never saved may not say it
    for anatomy in (Anatomy.of(model), Anatomy.of(config)):
        assert 3 * anatomy.kv_bytes_per_token * repeated == stored[12] - stored[9]
        # Transformers drops the oldest token of a window as soon as it has been read.
        kept = 12 * anatomy.kv_bytes_per_token + anatomy.kv_bytes_fixed * 5 // 6
        assert kept * repeated == stored[12]
        if anatomy.kv_bytes_fixed == 0:
            assert anatomy.kv_bytes_at(12) * repeated == stored[12]


def test_cache_bytes_of_a_text_that_fills_no_window():
    """A window of 6 tokens holds 4 of a text of 4, and 6 of a longer one; other layers hold all of it."""
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=6, sliding_window=6, num_key_value_heads=2, head_dim=8, dtype="float32"
    )
    anatomy, a_layer = Anatomy.of(config), 4 * 2 * 2 * 8  # keys and values of 2 heads of 8 channels, float32
    for tokens in (1, 4, 6, 7, 100):
        assert anatomy.kv_bytes_at(tokens) == a_layer * (5 * min(tokens, 6) + tokens)


def test_windows_by_layer():
    """Qwen 2's three fields: the window of the layers beyond `max_window_layers`, when it is on."""
    fields = {"num_hidden_layers": 4, "sliding_window": 6, "max_window_layers": 2}
    for switch, windows in ((True, [None, None, 6, 6]), (False, [None] * 4)):
        config = transformers.Qwen2Config(**fields, use_sliding_window=switch)
        assert [layer.window for layer in Anatomy.of(config).layers] == windows
    config = transformers.Gemma3TextConfig(num_hidden_layers=6, sliding_window=6)
    assert [layer.window for layer in Anatomy.of(config).layers] == [6, 6, 6, 6, 6, None]
    assert [layer.window for layer in Anatomy.of(transformers.MistralConfig(sliding_window=None)).layers] == [
        None
    ] * 32


# Their own defaults have queries of low rank, which are refused (tests/operations/mla).
LATENT = {kind for kind, family in FAMILIES.items() if family.latent_norm}


def test_defaults_of_every_family():
    """A config of published size: heads, KV heads and head size as its attention is built."""
    for kind in set(FAMILIES) - LATENT:
        config = transformers.CONFIG_MAPPING[kind]()
        anatomy = Anatomy.of(config)
        assert anatomy.model_type == kind
        assert len(anatomy.layers) == config.num_hidden_layers
        layer = anatomy.layers[0]
        assert layer.heads % layer.kv_heads == 0
        assert 0 <= layer.rotary <= layer.head_dim
        assert layer.rotary % 2 == 0


@pytest.mark.parametrize("name", WITHOUT_PREFIX)
def test_checkpoints_without_the_prefix(name, tmp_path):
    """gpt2 and bloom on the Hub hold "h.0...", not "transformer.h.0...": what the base model alone saves."""
    prefix, layers = WITHOUT_PREFIX[name]
    bare = getattr(base(name), prefix)
    bare.save_pretrained(tmp_path)
    for source in (tmp_path, bare):
        anatomy = Anatomy.of(source)
        assert [layer.path.startswith(f"{layers}.{layer.index}.") for layer in anatomy.layers] == [True, True]
        assert facts(anatomy) == facts(Anatomy.of(base(name)))


@pytest.mark.parametrize(
    "prefix", ["language_model.model.layers", "model.language_model.layers", "model.text_model.layers"]
)
def test_prefixes_of_composites(prefix):
    """The language model's place in a composite changed between releases of Transformers."""
    whole = Anatomy.of(base("gemma3_image_text"))
    renamed = {n.replace("model.language_model.layers", prefix): entry for n, entry in whole.tensors.items()}
    anatomy = Anatomy.of(base("gemma3_image_text").config, renamed)
    assert [layer.path for layer in anatomy.layers] == [f"{prefix}.{i}.self_attn" for i in range(2)]
    assert facts(anatomy) == facts(whole)


def test_on_disk_spelling_of_experts(tmp_path):
    """Mixtral's and Qwen 3 MoE's experts lie apart on disk; attention has the same names in both places."""
    for name in ("mixtral", "qwen3_moe"):
        base(name).save_pretrained(tmp_path / name)
        folder, loaded = Anatomy.of(tmp_path / name), Anatomy.of(base(name))
        assert folder.tensors.keys() != loaded.tensors.keys()
        assert [layer.path for layer in folder.layers] == [layer.path for layer in loaded.layers]
        assert folder.parameters == loaded.parameters


def test_new_numbers():
    for name, expected in (
        ("llama", {"num_key_value_heads": 1}),
        ("falcon_new", {"num_kv_heads": 1}),
        ("falcon_old", {"multi_query": True, "num_kv_heads": QUERIES}),
    ):
        after = Anatomy.of(base(name)).with_kv_heads(1)
        assert after.edits == expected
        assert {(layer.kv_heads, layer.group) for layer in after.layers} == {(1, QUERIES)}
        assert after.edit_config({"a": 1, "num_key_value_heads": 4}) == {"a": 1, "num_key_value_heads": 4} | expected
        assert (
            after.kv_bytes_per_token * Anatomy.of(base(name)).layers[0].kv_heads
            == Anatomy.of(base(name)).kv_bytes_per_token
        )
    after = Anatomy.of(base("gemma3_image_text")).with_kv_heads(2)
    raw = {"model_type": "gemma3", "text_config": {"a": 1}, "vision_config": {"num_key_value_heads": 4}}
    assert after.edit_config(raw) == raw | {"text_config": {"a": 1, "num_key_value_heads": 2}}


def test_which_families_honour_the_number():
    """A config that says 2 KV heads: the projections shrink, or Anatomy knows that they do not."""
    for name in TINY:
        anatomy = Anatomy.of(base(name))
        honoured = not anatomy.kv_heads_problem(2)
        assert honoured == (
            name
            not in (
                "gpt_neox",
                "gpt2",
                "gptj",
                "opt",
                "bloom",
                "mpt",
                "falcon_old",
                "falcon_alibi",
                "falcon_multi_query",
            )
        ), name
        if name == "gemma3_image_text":
            continue
        config = type(base(name).config)(
            **(base(name).config.to_dict() | {"num_key_value_heads": 2, "num_kv_heads": 2})
        )
        with torch.device("meta"):
            model = type(base(name))(config)
        assert (kv_heads_of(model) == 2 and attention_modules(model)[0] is not None) or not honoured
        assert (sum(p.numel() for p in model.parameters()) < anatomy.parameters) == honoured, name


def planned_and_built(kind: str) -> dict[str, tuple]:
    """What differs between the shapes planned for a family and those of the stock class with the new config.

    Without memory, at the size of the family's default config, halving its KV heads and expanding them.
    """
    config = transformers.CONFIG_MAPPING[kind]()

    def shapes(config):
        with torch.device("meta"):
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(config)
        return model, {name: tuple(p.shape) for name, p in model.named_parameters()}

    model, before = shapes(config)
    anatomy = Anatomy.of(model)
    heads, now = anatomy.layers[0].heads, anatomy.layers[0].kv_heads
    halved = now // 2 if now % 2 == 0 and not anatomy.kv_heads_problem(now // 2) else 1
    found = {}
    for step in ({"op": "gqa", "kv_heads": halved}, {"op": "expand", "kv_heads": heads}):
        if not anatomy.kv_heads_problem(step["kv_heads"]):
            plan = surgery.plan({"version": 1, "name": "test", "operations": [step]}, model)
            planned = {name: shape for name, shape in (before | plan.shapes).items() if shape is not None}
            _, built = shapes(type(config).from_dict(plan.after.edit_config(config.to_dict())))
            names = [name for name in built | planned if built.get(name) != planned.get(name)]
            found |= {(step["op"], name): (planned.get(name), built.get(name)) for name in names}
    return found


def test_every_decoder_of_transformers():
    """About 200 families: refused in words, or planned right, also where it is a guess."""
    faults, right = {}, []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            different = planned_and_built(kind)
        except SurgeryError:
            continue
        except Exception as error:  # theirs: some cannot be built from their defaults
            frames = pytest.ExceptionInfo.from_exception(error).traceback
            if any(Path(surgery.__file__).parent in Path(frame.path).parents for frame in frames):
                faults[kind] = error
        else:
            right.append(kind)
            if different:
                faults[kind] = different
    assert not faults
    assert set(FAMILIES) - LATENT - {"ministral"} <= set(right)  # whose default config has no size of a head
    assert len(right) > 60


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4"])
def test_quantised_projections_are_refused(method):
    model = build("Llama", **base("llama").config.to_dict())
    config, tensors = model.config, dict(Anatomy.of(model).tensors)
    path = "model.layers.0.self_attn.q_proj"
    shape = tensors.pop(f"{path}.weight")[1]
    if method == "bitsandbytes":
        tensors[f"{path}.weight"] = ("U8", (shape[0] * shape[1] // 2, 1))
    elif method == "fp8":
        tensors[f"{path}.weight"] = ("F8_E4M3", shape)
    else:
        tensors[f"{path}.qweight"] = ("I32", (shape[1] // 8, shape[0]))
    config.quantization_config = {"quant_method": method}
    with pytest.raises(SurgeryError, match=f"attention projections are quantised \\({method}\\)") as caught:
        Anatomy.of(config, tensors)
    assert "convert the unquantised model" in str(caught.value)
    config._name_or_path = "org/plain"
    with pytest.raises(SurgeryError, match="convert org/plain"):
        Anatomy.of(config, tensors)


def test_quantised_experts_alone_are_carried():
    """gpt_oss on the Hub: MXFP4 experts, attention in bfloat16."""
    anatomy = Anatomy.of(base("gpt_oss"))
    tensors = {n: ("BF16", shape) for n, (_, shape) in anatomy.tensors.items() if "experts" not in n}
    tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"] = ("U8", (4, 64, 2, 16))
    config = base("gpt_oss").config
    config.quantization_config = {"quant_method": "mxfp4"}
    try:
        assert Anatomy.of(config, tensors).dtype == "BF16"
    finally:
        del config.quantization_config


def test_config_faults_are_errors(tmp_path):
    base("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    for fields, words in (
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.o_proj.weight is missing"),
        ({"num_key_value_heads": 3}, "8 query heads on 3 KV heads"),
        ({"num_attention_heads": 4, "head_dim": 8}, "does not fit the config"),
    ):
        path.write_text(json.dumps(good | fields), encoding="utf-8")
        with pytest.raises(SurgeryError, match=words):
            Anatomy.of(tmp_path)
