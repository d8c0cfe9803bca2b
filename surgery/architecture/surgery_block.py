"""The `surgery` block, config.json and code of surgical checkpoints, whose layers no stock class can have.

`save_pretrained` of a surgical model writes the same files; `export` serves the streaming engine, which builds no
model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.architecture.layer import query_names

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy


def layer_entries(
    anatomy: Anatomy, shapes: list[dict[str, tuple[int, ...]]], *, needed: bool = False
) -> list[dict] | None:
    """Each layer's entry in the `surgery` block; None if a stock config can describe the model.

    Settings in an existing block are kept and adapted to the layer's present heads.

    Args:
        anatomy: anatomy of the model after the change; its config is still the one before the change.
        shapes: for each layer, parameter name within the attention module -> shape.
        needed: return entries even if a stock config can describe the model.
    """
    block, entries = getattr(anatomy.config, "surgery", None), []
    if anatomy.alike and not needed and block is None:
        return None
    heads, kv_heads = _stock_numbers(anatomy)
    stock = (heads, kv_heads or heads)  # without the field: one per query head
    earlier = block["layers"] if block else [{}] * len(anatomy.layers)
    for layer, layer_shapes, old in zip(anatomy.layers, shapes, earlier, strict=True):
        entry = {"num_attention_heads": layer.heads, "num_key_value_heads": layer.kv_heads}
        for name in ("query_groups", "query_numbers", "kv_numbers"):
            entry |= {name: list(getattr(layer, name))} if getattr(layer, name) else {}
        if (layer.heads, layer.kv_heads) != stock:
            entry["shapes"] = {name: list(shape) for name, shape in sorted(layer_shapes.items())}
        entries.append(_follow_heads(old, layer) | entry)
    return entries


def _stock_numbers(anatomy: Anatomy) -> tuple[int, int | None]:
    """The numbers of query and KV heads that the config names after the change; None: it has no field of KV heads.

    A latent vector is one KV head, which a config of latent attention does not count.
    """
    if anatomy.latent:
        return anatomy.layers[0].heads, 1
    heads, kv_heads = (
        anatomy.edits.get(name, getattr(anatomy.config, name, None))
        for name in ("num_attention_heads", "num_key_value_heads")
    )
    return heads, kv_heads


def _follow_heads(old: dict, layer: LayerAnatomy) -> dict:
    """An earlier entry, adapted to the heads that the layer has now."""
    from surgery.runtime.surgery_config import after_heads_change, used_parts

    numbers = {name: old[name] for name in ("query_numbers", "kv_numbers") if name in old}
    of_present_heads = {
        "query_groups": [layer.group] * layer.kv_heads,
        "query_numbers": [],
        "kv_numbers": [],
        "shapes": {},
    }
    old = old | {name: value for name, value in of_present_heads.items() if name in old}
    if not used_parts(old):  # no part depends on the heads, so they need not be matched
        return old
    queries, kv_heads = query_names(layer), [layer.kv_name(head) for head in range(layer.kv_heads)]
    pairs = ((queries, numbers.get("query_numbers")), (kv_heads, numbers.get("kv_numbers")))
    return after_heads_change(
        old, *([old_numbers.index(name) if old_numbers else name for name in names] for names, old_numbers in pairs)
    )


def export(raw: dict, anatomy: Anatomy, entries: list[dict], folder: Path) -> dict:
    """Copy the code of a surgical checkpoint into its folder, and return its config.json.

    Args:
        raw: the base's config.json, already with the edits that hold for all layers.
        entries: the result of `layer_entries`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from surgery.runtime import modeling_surgery as runtime
    from surgery.runtime.surgery_config import PER_LAYER, export_files, parts_of, per_layer_config

    kind = anatomy.model_type
    config, model = (
        runtime.PREFIX + names[kind] for names in (CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    export_files(parts_of(entries), folder)
    own = per_layer_config(entries, *_stock_numbers(anatomy))
    return {name: value for name, value in raw.items() if name != PER_LAYER} | {
        "model_type": runtime.NAME,
        "architectures": [model],
        "auto_map": runtime.auto_map(config, model),
        runtime.NAME: raw.get(runtime.NAME, {})
        | {"format": runtime.FORMAT, "base_model_type": kind, "layers": entries},
        **({PER_LAYER: own} if own else {}),
    }
