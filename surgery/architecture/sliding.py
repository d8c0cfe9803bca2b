"""Layers that see a window alone, in a stock model: which families can hold them, their config and their modules.

A config of such a family lists a kind of attention for each layer (`layer_types`) and has one `sliding_window`. A
layer of the kind `sliding_attention` sees the last `sliding_window` tokens, the present one among them, and the stock
cache of Transformers keeps no more of it.
"""

from __future__ import annotations

from copy import deepcopy
from math import inf
from typing import TYPE_CHECKING, Any

from surgery.architecture.stock_class import (
    empty_model,
    refuse_other_class,
    refuse_other_forward,
    set_fields,
    stock_config,
    take_class,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from surgery.architecture.anatomy import Anatomy

SLIDING, FULL = "sliding_attention", "full_attention"
# A family -> the stock family that computes the same and lists a kind of attention for each layer.
HOSTS = {"llama": "ministral", "mistral": "ministral"} | {
    name: name for name in ("ministral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "gpt_oss")
}
# Families that list the kind of each layer and compute positions by it, which is no part of `HOSTS`.
OTHER_ROPE = {"olmo3": "another RoPE", "cohere2": "RoPE"}
WINDOWS = ("layer_types", "sliding_window", "use_sliding_window")  # fields of a config
SWITCHED = ("qwen2", "qwen3", "smollm3")  # families whose layers slide only where `use_sliding_window` says so
# What the host's config must be told, because its defaults are others or because it computes nothing of the kind.
TOLD = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "vocab_size", "num_key_value_heads", "rope_parameters")  # fmt: skip
OF_KIND = ("attention_type", "is_sliding", "layer_type", "sliding_window", "has_sliding_layers")  # module attributes


def slides(anatomy: Anatomy) -> list[int]:
    """The layers that have a window already, by index. One as long as the longest text leaves nothing out."""
    longest = anatomy.positions or inf
    return [layer.index for layer in anatomy.layers if layer.window is not None and layer.window < longest]


def full_layers(anatomy: Anatomy) -> list[int]:
    """The layers that see all tokens, by index."""
    return sorted({layer.index for layer in anatomy.layers} - {*slides(anatomy)})


def sliding_problem(anatomy: Anatomy) -> str:
    """Why no stock model can have a window in some layers of this model; "" if one can."""
    kind, config = anatomy.model_type, anatomy.config
    instead = "" if anatomy.runtime_problem() else "; duo_attention gives heads a window here"
    if anatomy.surgical or not anatomy.alike or any(layer.entry for layer in anatomy.layers):
        return "the layers of this model were changed beyond a stock model: put sliding_layers before that surgery"
    if kind in OTHER_ROPE:
        return f"layers of {kind} that slide have {OTHER_ROPE[kind]}, which full ones were not trained with{instead}"
    if anatomy.composite:
        return f"{anatomy.composite} is more than a text model, and the text model alone can get windows"
    if anatomy.guess or kind not in HOSTS:
        return f"no stock model computes what {kind} does and lists which layers slide{instead}"
    if host_problem := _host_problem(anatomy):
        return f"{host_problem}{instead}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and all(isinstance(each, dict) for each in rope.values()) and rope.get(SLIDING) != rope.get(FULL):
        return f"layers of {kind} that slide have another RoPE, which full ones were not trained with{instead}"
    if not full_layers(anatomy):
        return f"all layers of this {kind} slide already: its cache is as small as its window makes it"
    return ""


def _host_problem(anatomy: Anatomy) -> str:
    """Why the stock family with windows cannot stand for a model of another family; "" if it can."""
    kind, host, config = anatomy.model_type, HOSTS[anatomy.model_type], anatomy.config
    if host == kind:
        return ""
    if any(layer.biases for layer in anatomy.layers) or getattr(config, "mlp_bias", False):
        return f"stock {host}, which would hold it, has no biases, and this {kind} has"
    named = getattr(config, "architectures", None) or []
    if any(not name.endswith("ForCausalLM") for name in named):
        return f"stock {host}, which would hold it, is a causal model, and this is a {named[0]}"
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
        refuse_other_forward(model, _changing_paths(after))


def write_windows(model, after: Anatomy) -> None:
    """Give the layers of a loaded model, in place, the windows that `after` describes, and the config that says so.

    Weights, modules and hooks stay. A model whose family cannot hold windows gets the classes of one that can.
    """
    other = after.model_type != model.config.model_type
    config = stock_config(model.config, after.edits) if other else deepcopy(model.config)
    if not other:
        set_fields(config, after.edits)
    stock = empty_model(model, config)  # whatever fails has failed now
    if other:
        take_class(model, stock, _changing_paths(after))
    else:
        set_fields(model.config, after.edits)
    pairs = [(model.base_model, stock.base_model)]
    for layer, made in zip(after.layers, stock.base_model.layers, strict=True):
        block, _, attention = layer.path.rpartition(".")
        pairs += [(model.get_submodule(block), made), (model.get_submodule(layer.path), made.get_submodule(attention))]
    for ours, made in pairs:
        vars(ours).update({name: value for name, value in vars(made).items() if name in OF_KIND})


def _changing_paths(after: Anatomy) -> list[str]:
    """The modules of the layers that the stock family has under other classes."""
    return [path for layer in after.layers for path in (layer.path.rpartition(".")[0], layer.path)]
