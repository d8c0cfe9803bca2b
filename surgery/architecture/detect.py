"""Reads the fields of an `Anatomy` from a config and a table of tensors, and checks them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from surgery.architecture.families import (
    ATTENTION_WORDS,
    COMMON_FORM,
    FAMILIES,
    LAYER_PATHS,
    SHARE,
    Family,
    with_kv_vector,
    with_query_vector,
)
from surgery.architecture.layer import BYTES, Latent, LayerAnatomy
from surgery.architecture.sliding import SLIDING
from surgery.architecture.weights import packed_shapes
from surgery.errors import ModelError, UnsupportedModelError
from surgery.io.safetensors import STORED_NAMES

TOWERS = ("vision", "visual", "image", "audio", "speech")  # parts of a composite that are not the language model
DECODER_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def read_anatomy(config, tensors: dict, where: str) -> dict[str, Any]:
    """The fields of the `Anatomy` that a config and a table of tensors describe.

    Args:
        config: a Transformers config.
        tensors: name -> (dtype, shape); {} if unknown, then the config is not checked against them.
        where: name of the model in errors.
    """
    text = _text(config)
    model_type = getattr(text, "model_type", "") or ""
    check_block(config, where)
    family, guess, prefix = FAMILIES.get(model_type), False, ""
    if differ := sorted(getattr(text, "per_layer_attributes", None) or ()):  # of a base such as Gemma 4
        raise UnsupportedModelError(
            f"the layers of this {model_type} differ in {', '.join(differ)}",
            where=where,
            fix="this version converts models whose layers have one shape",
        )
    if family is None:
        family, prefix = _guess(config, tensors, where)
        guess = True
    count = _positive_integer(text, "num_hidden_layers", where)
    heads = _positive_integer(text, "num_attention_heads", where)
    kv_heads = _kv_heads(text, family, heads, where)
    latent = _latent(text, family, where)
    if latent:
        kv_heads, head_dim = 1, latent.nope + latent.rope
        family = with_query_vector(family) if latent.queries else family
    else:
        head_dim = getattr(text, "head_dim", None) or _positive_integer(text, "hidden_size", where) // heads
    if heads % kv_heads:
        raise ModelError(
            f"config.json has {heads} query heads on {kv_heads} KV heads",
            where=where,
            fix="num_key_value_heads must divide num_attention_heads",
        )
    family = _settle_falcon(text, family)
    prefix = prefix or _find_layers(family, tensors, count, config, where)
    sizes = heads, kv_heads, head_dim
    layers = []
    for index in range(count):
        layer = _layer(config, family, tensors, f"{prefix}.{index}.{family.attn}", index, sizes, guess)
        layer = replace(layer, latent=latent) if latent else layer
        if tensors:
            _verify(layer, tensors, config, where)
            if guess:
                _refuse_extras(layer, tensors, where)
        layers.append(layer)
    composite = config.model_type if text is not config else None
    dtype = layers[0].dtype or _config_dtype(text) or _config_dtype(config)
    return {
        "model_type": model_type,
        "layers": tuple(layers),
        "guess": guess,
        "composite": composite,
        "dtype": dtype,
        "config": text,
        "tensors": tensors,
    }


def _text(config):
    """The config of the language model; a composite's config holds several."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _latent(text, family: Family, where: str) -> Latent | None:
    """The latent attention that a config describes; None for a family without."""
    if not family.latent_norm:
        return None
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    queries = _positive_integer(text, "q_lora_rank", where) if getattr(text, "q_lora_rank", None) is not None else 0
    return Latent(*(_positive_integer(text, name, where) for name in sizes), queries)


def _layer(
    config, family: Family, tensors: dict, path: str, index: int, sizes: tuple[int, int, int], guess: bool
) -> LayerAnatomy:
    """The anatomy of one layer.

    Args:
        path: path of its attention module.
        sizes: query heads, KV heads and head size in the config, for all layers.
    """
    text, entry, (heads, kv_heads, head_dim) = _text(config), _block_entry(config, index), sizes
    if vector := entry.get("low_rank", {}).get("rank", 0):
        family = with_kv_vector(family)
    return LayerAnatomy(
        index=index,
        path=path,
        heads=entry.get("num_attention_heads", heads),
        kv_heads=entry.get("num_key_value_heads", kv_heads),
        head_dim=head_dim,
        rotary=_rotary(text, family, head_dim, index, guess),
        positions=_positions(text, family, index, guess),
        qk_norm=_qk_norm(text, family, tensors, path, (heads, head_dim), guess),
        window=_window(text, index),
        soft_cap=getattr(text, "attn_logit_softcapping", None),
        biases=_biases(family, tensors, path),
        dtype=_dtype(family, tensors, path),
        layout=family,
        query_groups=tuple(entry.get("query_groups", ())) if len({*entry.get("query_groups", ())}) > 1 else (),
        query_numbers=tuple(entry.get("query_numbers", ())),
        kv_numbers=tuple(entry.get("kv_numbers", ())),
        vector=vector,
        entry=_part_entries(entry),
    )


def _block_entry(config, index: int) -> dict:
    """A layer's entry in the `surgery` block; {} for a stock checkpoint."""
    block = getattr(config, "surgery", None)
    return block["layers"][index] if block else {}


def _part_entries(entry: dict) -> dict:
    """The keys of a layer's entry in the `surgery` block that are not about its heads and shapes."""
    if not entry:
        return {}
    from surgery.runtime.surgery_config import SHAPE

    return {name: value for name, value in entry.items() if name not in SHAPE}


def _positive_integer(config, name: str, where: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"the config has no usable {name} (found {value!r})", where=where)
    return value


def _kv_heads(text, family: Family, heads: int, where: str) -> int:
    if family.kv_field is None:
        return heads
    if family.kv_field == "falcon":
        if text.new_decoder_architecture:
            return text.num_kv_heads
        return 1 if text.multi_query else heads
    kv_heads = getattr(text, family.kv_field, None)
    return heads if kv_heads is None else _positive_integer(text, family.kv_field, where)


def _settle_falcon(text, family: Family) -> Family:
    if family.layout != "falcon":
        return family
    rows = text.multi_query and not text.new_decoder_architecture
    return replace(family, layout="rows" if rows else "grouped")


def _find_layers(family: Family, tensors: dict, count: int, config, where: str) -> str:
    """Path of the layer list in this checkpoint or model."""
    if not tensors:
        return family.layers
    tail = f"{family.attn}.{family.o}.weight"
    counts = {
        path: sum(f"{path}.{index}.{tail}" in tensors for index in range(count)) for path in LAYER_PATHS[family.layers]
    }
    path = max(counts, key=counts.get)
    if counts[path] == 0:
        _refuse_packed(config, tensors, where)
        raise ModelError(
            f"no attention weights found under {' or '.join(counts)}",
            where=where,
            exists=_attention_names(tensors),
        )
    if counts[path] < count:
        missing = next(index for index in range(count) if f"{path}.{index}.{tail}" not in tensors)
        raise ModelError(
            f"{path}.{missing}.{tail} is missing",
            where=where,
            exists=f"{counts[path]} of the {count} layers that config.json promises",
        )
    return path


def _guess(config, tensors: dict, where: str) -> tuple[Family, str]:
    """Family and layer path of an unknown model with the common form q_proj, k_proj, v_proj, o_proj."""
    model_type = getattr(config, "model_type", "") or "(no model_type)"
    classes = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False) or (
        classes and not any(c.endswith(DECODER_HEADS) for c in classes)
    ):
        raise UnsupportedModelError(
            f"{model_type} is not a decoder language model (architectures: {', '.join(classes) or 'none'})",
            where=where,
            exists=f"known families: {', '.join(FAMILIES)}",
            fix="surgery converts causal language models, not encoders, vision models or encoder-decoders",
        )
    forms: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, (re.match(COMMON_FORM, name) for name in tensors)):
        if any(tower in match["layers"] for tower in TOWERS):
            continue
        forms.setdefault((match["layers"], match["attn"]), set()).add(match["p"])
    for (layers, attn), projections in forms.items():
        outputs = projections & {"o_proj", "out_proj"}
        if {"q_proj", "k_proj", "v_proj"} <= projections and len(outputs) == 1:
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            # Whisper's num_key_value_heads is an alias that means the encoder's heads.
            alias = "num_key_value_heads" in (getattr(text, "attribute_map", None) or {})
            honoured = "num_key_value_heads" if getattr(text, "num_key_value_heads", None) and not alias else None
            return Family(layers, attn, o=outputs.pop(), positions="unknown", kv_field=honoured), layers
    _refuse_packed(config, tensors, where)
    raise UnsupportedModelError(
        f"attention of model type {model_type} is of a form that is not understood",
        where=where,
        exists=_attention_names(tensors) or f"known families: {', '.join(FAMILIES)}",
        fix="a family is one row in surgery/architecture/families.py; others need q_proj, k_proj, v_proj, o_proj",
    )


def _attention_names(tensors: dict) -> str:
    """Tensor names that look like attention, for an error; layer numbers are replaced by N."""
    names = {re.sub(r"\.\d+\.", ".N.", name) for name in tensors if any(w in name for w in ATTENTION_WORDS)}
    shown = sorted(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _positions(text, family: Family, index: int, guess: bool) -> str:
    if guess or family.positions in ("learned", "unknown"):
        return family.positions
    if family.latent_norm:
        return "interleaved" if text.rope_interleave else "half"
    if getattr(text, "alibi", False) is True:
        return "alibi"
    no_rope = getattr(text, "no_rope_layers", None)  # SmolLM3: 1 = this layer does use RoPE
    return "none" if no_rope and not no_rope[index] else family.positions


def _rotary(text, family: Family, head_dim: int, index: int, guess: bool) -> int:
    if _positions(text, family, index, guess) not in ("half", "interleaved"):
        return 0
    if family.latent_norm:
        return text.qk_rope_head_dim
    rope = getattr(text, "rope_parameters", None) or {}
    if rope and all(isinstance(v, dict) for v in rope.values()):  # one set for each layer type (Gemma 3)
        rope = rope.get((getattr(text, "layer_types", None) or [""])[index], {})
    if family.partial == SHARE:
        return int(head_dim * rope.get(SHARE, 1.0))
    return (getattr(text, family.partial) if family.partial else None) or head_dim


def _qk_norm(text, family: Family, tensors: dict, path: str, size: tuple[int, int], guess: bool) -> str | None:
    kind, (heads, head_dim) = family.qk_norm, size
    if guess:
        shape = tensors.get(f"{path}.{family.q_norm}.weight", ("", ()))[1]
        kind = {(heads * head_dim,): "whole", (heads, head_dim): "per head", (head_dim,): "shared"}.get(shape)
    if kind is None:
        return None
    if tensors:
        return kind if any(name.startswith(f"{path}.{family.k_norm}.") for name in tensors) else None
    switches = [getattr(text, name, None) for name in ("use_qk_norm", "qk_layernorm")]
    return None if False in switches else kind


def _window(text, index: int) -> int | None:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return window if kinds[index] == SLIDING else None
    return window if getattr(text, "use_sliding_window", True) else None


def _biases(family: Family, tensors: dict, path: str) -> str:
    if family.qkv:
        fused = "qkv" if f"{path}.{family.qkv}.bias" in tensors else ""
    else:
        names = {"q": family.q_input, "k": family.k, "v": family.v}
        fused = "".join(letter for letter, name in names.items() if f"{path}.{name}.bias" in tensors)
    return fused + ("o" if f"{path}.{family.o}.bias" in tensors else "")


def _dtype(family: Family, tensors: dict, path: str) -> str:
    return tensors.get(f"{path}.{family.o}.weight", ("",))[0]


def _config_dtype(text) -> str:
    name = str(getattr(text, "dtype", None) or "").removeprefix("torch.")
    return STORED_NAMES.get(name, "")


def _verify(layer: LayerAnatomy, tensors: dict, config, where: str) -> None:
    """Raise unless every tensor of the layer is present, not quantised, and has the shape that the config gives."""
    layout, rows = layer.layout, {"q": layer.heads, "k": layer.kv_heads, "v": layer.kv_heads}
    wanted = (
        {layout.qkv: sum(rows.values())} if layout.qkv else {getattr(layout, letter): n for letter, n in rows.items()}
    )
    quantised = getattr(config, "quantization_config", None)
    for name in layer.tensor_names:
        stored_name = f"{layer.path}.{name}"
        if stored_name not in tensors or tensors[stored_name][0] not in BYTES:
            if quantised or stored_name in tensors:
                _refuse_quantised(config, stored_name, tensors.get(stored_name), where)
            raise ModelError(f"{stored_name} is missing", where=where, exists=_attention_names(tensors))
    hidden = None if layer.positions == "unknown" else getattr(_text(config), "hidden_size", None)  # None: a guess
    if layer.latent or layer.vector:
        _verify_shapes(layer, tensors, hidden, where)
        return
    sizes = {name: (heads * layer.head_dim, hidden) for name, heads in wanted.items()}
    sizes[layout.o] = (hidden, layer.heads * layer.head_dim)
    for name, both in sizes.items():
        shape = tensors[f"{layer.path}.{name}.weight"][1]
        expected = both[::-1] if layout.conv1d else both
        if len(shape) != 2 or any(size not in (None, stored) for size, stored in zip(expected, shape, strict=True)):
            raise ModelError(
                f"{layer.path}.{name}.weight has shape {list(shape)}, which does not fit the config",
                where=where,
                exists=f"{layer.heads} query heads, {layer.kv_heads} KV heads, head size {layer.head_dim}",
                fix="the config and the weights are of different models; fused layouts of other frameworks "
                "(Megatron's interleave, for one) must be converted to Hugging Face's first",
            )


def _verify_shapes(layer: LayerAnatomy, tensors: dict, hidden: int, where: str) -> None:
    """Raise unless every tensor of a layer with a vector has the shape that the config gives."""
    for name, expected in packed_shapes(layer, hidden, hidden).items():
        shape = tensors[f"{layer.path}.{name}"][1]
        if tuple(shape) != expected:
            raise ModelError(
                f"{layer.path}.{name} has shape {list(shape)}, and the config gives {list(expected)}",
                where=where,
                fix="the config and the weights are of different models",
            )


def _refuse_extras(layer: LayerAnatomy, tensors: dict, where: str) -> None:
    """Raise if the attention of a guessed family has other tensors whose shape could depend on the heads."""
    known = {*layer.tensor_names, f"{layer.layout.o}.bias"}
    for name, (_, shape) in tensors.items():
        rest = name.removeprefix(f"{layer.path}.")
        harmless = "rotary" in rest or ("norm" in rest and shape == (layer.head_dim,))
        if rest != name and rest not in known and not harmless:
            raise UnsupportedModelError(
                f"{name} {list(shape)} is not understood: it may follow the heads",
                where=where,
                fix="an unknown family is converted only where its attention holds q, k, v and o projections and "
                "norms of the queries and keys; a family is one row in surgery/architecture/families.py",
            )


def _refuse_packed(config, tensors: dict, where: str) -> None:
    """Raise if the projections are stored as packed integers (GPTQ, AWQ), not as matrices."""
    for name, (dtype, shape) in tensors.items():
        if dtype not in BYTES and any(word in name for word in ATTENTION_WORDS):
            _refuse_quantised(config, name, (dtype, shape), where)


def _refuse_quantised(config, name: str, stored_entry: tuple | None, where: str) -> None:
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method") or (stored_entry[0] if stored_entry else "an unknown method")
    base = getattr(config, "_name_or_path", "") or ""
    stored = stored_entry[0] if stored_entry else "not stored as a matrix"
    known = f"convert {base}, the unquantised model that the config names" if "/" in base else ""
    raise UnsupportedModelError(
        f"the attention projections are quantised ({method}): {name} is {stored}",
        where=where,
        fix=known or "convert the unquantised model and quantise the result; weight rewrites need real matrices",
    )


def check_block(config, where: str) -> dict | None:
    """The `surgery` block of a config, or None if it has none. A block that is not valid is refused."""
    if not hasattr(config, "surgery"):
        return None
    from surgery.runtime.surgery_config import validate

    try:
        validate(config)
    except ValueError as error:
        fix = "convert the base again, or put config.json back as it was written"
        raise ModelError(f"config.json: {error}", where=where, fix=fix) from None
    return config.surgery
