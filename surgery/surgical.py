"""Checkpoints whose layers no stock class can have: their entry in the `surgery` block, their config.json and code.

`save_pretrained` of a surgical model writes the same files; `export` is for the streaming engine, which builds no
model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import SurgeryError

if TYPE_CHECKING:
    from .anatomy import Anatomy


def check_block(config, where: str) -> dict | None:
    """The `surgery` block of a config, or None; one that was edited by hand into nonsense is refused."""
    if not hasattr(config, "surgery"):
        return None
    from .runtime.surgery_heads import validate

    try:
        validate(config)
    except ValueError as error:
        fix = "convert the base again, or put config.json back as it was written"
        raise SurgeryError(f"config.json: {error}", where=where, fix=fix) from None
    return config.surgery


def layer_entries(
    anatomy: Anatomy, shapes: list[dict[str, tuple[int, ...]]], *, needed: bool = False
) -> list[dict] | None:
    """Each layer's entry in the `surgery` block, as far as its shape goes; None where the config says it all.

    Args:
        anatomy: of the model as it will be.
        shapes: for each layer, parameter name within the attention module -> shape.
        needed: the model has a `surgery` block for other reasons: entries even where the config says it all.
    """
    if anatomy.alike and not needed:
        return None
    config, edits, entries = anatomy.config, anatomy.edits, []
    stock = tuple(edits.get(name, getattr(config, name)) for name in ("num_attention_heads", "num_key_value_heads"))
    for layer, named in zip(anatomy.layers, shapes, strict=True):
        entry = {"num_attention_heads": layer.heads, "num_key_value_heads": layer.kv_heads}
        for name in ("query_groups", "query_numbers", "kv_numbers"):
            entry |= {name: list(getattr(layer, name))} if getattr(layer, name) else {}
        if (layer.heads, layer.kv_heads) != stock:
            entry["shapes"] = {name: list(shape) for name, shape in sorted(named.items())}
        entries.append(entry)
    return entries


def export(raw: dict, anatomy: Anatomy, entries: list[dict], folder: Path) -> dict:
    """The config.json of a surgical checkpoint; its code is copied into the folder.

    Args:
        raw: the base's config.json, with what changes for all layers alike.
        entries: of `layer_entries`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .runtime import modeling_surgery as runtime

    kind = anatomy.model_type
    config, model = (
        runtime.PREFIX + names[kind] for names in (CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    code = Path(runtime.__file__)
    for name in runtime.FILES:
        shutil.copyfile(code.with_name(name), folder / name)
    return raw | {
        "model_type": runtime.NAME,
        "architectures": [model],
        "auto_map": {"AutoConfig": f"{code.stem}.{config}", "AutoModelForCausalLM": f"{code.stem}.{model}"},
        runtime.NAME: {"format": runtime.FORMAT, "base_model_type": kind, "layers": entries},
    }
