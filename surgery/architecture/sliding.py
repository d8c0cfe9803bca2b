"""Layers that see a window alone, in a stock model: which families can hold them, their config and their modules.

A config of such a family lists a kind of attention for each layer (`layer_types`) and has one `sliding_window`. A
layer of the kind `sliding_attention` sees the last `sliding_window` tokens, the present one among them, and the stock
cache of Transformers keeps no more of it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from surgery.architecture.stock_class import empty_model, refuse_other_class, stock_config, take_class

if TYPE_CHECKING:
    from collections.abc import Collection

    from surgery.architecture.anatomy import Anatomy

SLIDING, FULL = "sliding_attention", "full_attention"
# A family -> the stock family that computes the same and lists a kind of attention for each layer.
HOSTS = {"llama": "ministral", "mistral": "ministral"} | {
    name: name for name in ("ministral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "gpt_oss")
}
SWITCHED = ("qwen2", "qwen3", "smollm3")  # families whose layers slide only where `use_sliding_window` says so
# What the host's config must be told, because its defaults are others or because it computes nothing of the kind.
TOLD = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "vocab_size", "num_key_value_heads", "rope_parameters")  # fmt: skip
OF_KIND = ("attention_type", "is_sliding", "layer_type", "sliding_window", "has_sliding_layers")  # module attributes


def sliding_problem(anatomy: Anatomy) -> str:
    """Why no stock model can have a window in some layers of this model; "" if one can."""
    kind, config = anatomy.model_type, anatomy.config
    streaming = "duo_attention gives heads a window in every family"
    if anatomy.composite or anatomy.guess or kind not in HOSTS:
        return f"stock {anatomy.composite or kind} has one kind of attention for all layers; {streaming}"
    if anatomy.surgical or not anatomy.alike or any(layer.entry for layer in anatomy.layers):
        return "the layers of this model were changed beyond a stock model: put sliding_layers before that surgery"
    host = HOSTS[kind]
    if host != kind and (any(layer.biases for layer in anatomy.layers) or getattr(config, "mlp_bias", False)):
        return f"stock {host}, which would hold it, has no biases, and this {kind} has; {streaming}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and all(isinstance(each, dict) for each in rope.values()) and rope.get(SLIDING) != rope.get(FULL):
        return f"layers of {kind} that slide have another RoPE than full ones, which the others were not trained with"
    return ""


def sliding_fields(anatomy: Anatomy, sliding: Collection[int], window: int) -> dict[str, Any]:
    """The fields of the stock config that differ from the base's, where the layers `sliding` have the window."""
    host, config = HOSTS[anatomy.model_type], anatomy.config
    kinds = [SLIDING if layer.index in sliding else FULL for layer in anatomy.layers]
    fields: dict[str, Any] = {"layer_types": kinds, "sliding_window": window}
    if host in SWITCHED:
        fields["use_sliding_window"] = True
    if host == anatomy.model_type:
        return fields
    told = {name: anatomy.edits.get(name, getattr(config, name)) for name in TOLD}
    named = {"model_type": host, "architectures": [f"{host.capitalize()}ForCausalLM"]}
    return named | told | {"head_dim": anatomy.layers[0].head_dim} | fields


def refuse_windows(model, after: Anatomy) -> None:
    """Raise SurgeryError if a model in memory cannot become the stock model that `after` describes."""
    if after.model_type != model.config.model_type:
        refuse_other_class(model, "sliding_layers")


def write_windows(model, after: Anatomy) -> None:
    """Give the layers of a loaded model, in place, the windows that `after` describes, and the config that says so.

    Weights, modules and hooks stay. A model whose family cannot hold windows gets the classes of one that can.
    """
    layers = [layer.path.rpartition(".")[0] for layer in after.layers]
    if after.model_type == model.config.model_type:
        for name, value in after.edits.items():
            setattr(model.config, name, value)
        stock = empty_model(model, deepcopy(model.config))
    else:
        stock = empty_model(model, stock_config(model.config, after.edits))
        take_class(model, stock, [*layers, *(layer.path for layer in after.layers)])
    pairs = [(model.base_model, stock.base_model)]
    for path, layer, made in zip(layers, after.layers, stock.base_model.layers, strict=True):
        attention = layer.path.rpartition(".")[2]
        pairs += [(model.get_submodule(path), made), (model.get_submodule(layer.path), made.get_submodule(attention))]
    for ours, made in pairs:
        vars(ours).update({name: value for name, value in vars(made).items() if name in OF_KIND})
