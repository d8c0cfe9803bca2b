"""Random models of a real model's shape: for lengths beyond its positions, where only time and memory mean anything.

Weights do not change how long attention takes; the number of heads, their visibility and the length do.
"""

from __future__ import annotations

import copy
import random

from surgery.errors import SurgeryError


def synthetic_config(config, layers: list[int], positions: int):
    """A copy of a config with some of its layers and at least so many positions.

    Args:
        config: of a model that is no composite.
        layers: numbers of the layers to keep; lists with an entry a layer (`layer_types`, the `surgery` block's) keep
            those entries.
        positions: longest sequence that must fit.
    """
    config, depth = copy.deepcopy(config), config.num_hidden_layers
    config.num_hidden_layers = len(layers)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            setattr(config, name, [value[i] for i in layers])
    if block := getattr(config, "surgery", None):
        config.surgery = {**block, "layers": [block["layers"][i] for i in layers]}
    if (getattr(config, "max_position_embeddings", None) or positions) < positions:
        config.max_position_embeddings = positions
    return config


def random_model(config):
    """A model with random weights, the same at every call, in the config's dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from surgery.machine.transformers_logging import quiet_transformers

    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval()


def spaced_layers(depth: int, count: int | None) -> list[int]:
    """Numbers of `count` layers, evenly spaced over `depth`; all where count is None.

    Raises:
        SurgeryError: more layers than there are, or none.
    """
    if count is not None and not 1 <= count <= depth:
        raise SurgeryError(f"{count} layers of {depth}", where="--layers", fix=f"1 to {depth}")
    count = count or depth
    return [int((i + 0.5) * depth / count) for i in range(count)]


def even_split(layers: list[dict], kv_heads: list[int], ratio: float, seed: int = 0) -> list[dict]:
    """The `surgery` block's layers with a share of all KV heads streaming, chosen at random over all layers.

    Args:
        layers: they keep their sinks and window; a layer that names none takes those of one that does.
        kv_heads: of each layer.
        ratio: from 0 to 1, rounded to a whole number of heads.

    Raises:
        SurgeryError: a ratio outside 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise SurgeryError(f"ratio {ratio:g}", where="--ratio", fix="from 0 to 1")
    heads = [(layer, head) for layer, count in enumerate(kv_heads) for head in range(count)]
    chosen = set(random.Random(seed).sample(heads, round(ratio * len(heads))))
    named = next((layer for layer in layers if "window" in layer), {"sinks": 16, "window": 240})
    reach = {"sinks": named.get("sinks", 0), "window": named["window"]}
    return [
        {**reach, **layer, "streaming": [head for head in range(kv_heads[number]) if (number, head) in chosen]}
        for number, layer in enumerate(layers)
    ]
