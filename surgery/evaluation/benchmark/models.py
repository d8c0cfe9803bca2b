"""Models and prompts of a benchmark.

The base and the converted model are loaded, or made with random weights in the same shape. Models that do not belong
together are refused. Random models serve lengths beyond the model's positions, where only time and memory have a
meaning: the time of attention depends on the number of heads, their visibility and the length, not on the weights.

Prompts are text if the weights are the model's own, and random tokens if the weights are random. A router and sparse
prefill choose heads and blocks by the text, so with a model's own weights random tokens would give other timings.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

from surgery.errors import MachineError, ModelMismatchError, SettingError, SurgeryError, UnsupportedModelError

SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")


def compare(base, out, base_name: str | Path, out_name: str | Path) -> list[str]:
    """Verify, from their configs and the record in `out`, that two models can be compared.

    Returns:
        Notes that say why it is not certain that `out` was made from this base; [] if it is.

    Raises:
        SurgeryError: the models differ in shape outside of the attention.
    """
    from surgery.architecture.stock_class import base_type_of
    from surgery.report.lineage import another_base
    from surgery.report.report import FILE, Report

    for name in SHAPE:
        theirs, ours = (getattr(config.get_text_config(), name, None) for config in (base, out))
        if name == "model_type":
            ours = base_type_of(ours, theirs)
        if theirs != ours:
            raise ModelMismatchError(
                f"not made from this base: its {name} is {ours}, the base's is {theirs}",
                where=str(out_name),
                fix="--base the model that it was made from",
            )
    if not (Path(out_name) / FILE).is_file():
        return [f"no {FILE} in {out_name}: it is not known which base it was made from"]
    reason = another_base(Report.of(out_name).data, base_name)
    return [f"the base: {reason}"] if reason else []


def loaded_pair(base, out, base_folder: Path, out_folder: Path, positions: int) -> tuple[Any, Any, dict]:
    """Both models with their own weights, and {}.

    Raises:
        SurgeryError: more positions are asked for than the base has.
        MachineError: there is not enough memory.
    """
    from surgery.io.loading import load_model

    longest = getattr(base.get_text_config(), "max_position_embeddings", None)
    if longest and positions > longest:
        raise SettingError(
            f"{positions} tokens with those decoded are beyond the base's {longest} positions",
            fix="shorter --lengths, or --synthetic (random weights of the same shape)",
        )
    weights = sum(file.stat().st_size for folder in (base_folder, out_folder) for file in folder.glob("*.safetensors"))
    _refuse_too_big(weights, base, positions)
    return load_model(base_folder), load_model(out_folder), {}


def random_pair(base, out, positions: int, layers: int | None, ratio: float | None) -> tuple[Any, Any, dict]:
    """Both models with random weights and `positions` positions.

    Args:
        layers: number of layers; None for all.
        ratio: share of streaming KV heads, chosen at random over all layers; None for the split of `out`.

    Returns:
        Base, converted model, and a dict that says which layers of the base they have.

    Raises:
        SurgeryError: layers or ratio are out of range, the model is a composite, or `out` has no head split for a
            ratio.
        MachineError: there is not enough memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if base.get_text_config() is not base:
        raise UnsupportedModelError(
            "composites (vision + text) have no synthetic counterpart", fix="leave out --synthetic"
        )
    depth = base.num_hidden_layers
    kept_layers = spaced_layers(depth, layers)
    stock, patched = (synthetic_config(config, kept_layers, positions) for config in (base, out))
    block = getattr(patched, "surgery", None)
    if ratio is not None:
        if not block:
            raise SettingError("a ratio needs a checkpoint with a head split", where="--ratio", fix="leave it out")
        patched.surgery = {**block, "layers": even_split(block["layers"], _kv_heads(patched), ratio)}
    weights = 0
    for config in (stock, patched):
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        weights += sum(parameter.numel() * parameter.element_size() for parameter in shapes.parameters())
    _refuse_too_big(weights, stock, positions)
    info = {"layers_of_the_base": depth, "layers_kept": kept_layers, "ratio_asked": ratio}
    models = random_model(stock), random_model(patched)
    _random_routers(models[1])
    return *models, info


def _random_routers(model) -> None:
    """Give routers random weights. A new router is zero and would turn on the same heads for all tokens."""
    import torch

    for module in model.modules():
        if (router := getattr(module, "surgery_router", None)) is not None:
            generator = torch.Generator().manual_seed(module.layer_idx)
            router.data.copy_(torch.randn(router.shape, generator=generator) * router.shape[1] ** -0.5)


def split_figures(config) -> dict[str, Any] | None:
    """The head split of a config in figures; None for a native model."""
    block = getattr(config, "surgery", None)
    if not block:
        return None
    per_layer = [len(layer.get("streaming", [])) for layer in block["layers"]]
    heads = sum(_kv_heads(config))
    reach = {(layer["sinks"], layer["window"]) for layer in block["layers"] if layer.get("streaming")}
    return {
        "streaming": sum(per_layer),
        "kv_heads": heads,
        "ratio": sum(per_layer) / heads,
        "streaming_per_layer": per_layer,
        "sinks_and_windows": sorted(map(list, reach)),
    }


def gate_figures(config) -> dict[str, Any] | None:
    """The gates of a config in figures; None if no layer has one."""
    from surgery.runtime.surgery_config import query_groups
    from surgery.runtime.surgery_gates import Gate

    layers = (getattr(config, "surgery", None) or {}).get("layers", [])
    gates = [Gate.of(layer["gate"], query_groups(config, layer)) for layer in layers if "gate" in layer]
    if not gates:
        return None
    kinds = sorted({gate.kind for gate in gates})
    return {"layers": len(gates), "kinds": kinds, "on": sum(gate.on / gate.units for gate in gates) / len(gates)}


def sparse_figures(config) -> dict[str, Any] | None:
    """The sparse prefill of a config in figures; None if no layer has one.

    `by_text`: whether the number of blocks that are read depends on text and weights, not only on the settings.
    """
    layers = (getattr(config, "surgery", None) or {}).get("layers", [])
    if not (entries := [layer["sparse"] for layer in layers if "sparse" in layer]):
        return None
    by_text = any("density" not in entry and entry["method"] not in ("streaming", "tri_shape") for entry in entries)
    below = sorted({entry.get("dense_below", 0) for entry in entries})
    methods = sorted({entry["method"] for entry in entries})
    return {"layers": len(entries), "methods": methods, "dense_below": below, "by_text": by_text}


def _kv_heads(config) -> list[int]:
    """KV heads of each layer of a surgical config."""
    from surgery.runtime.surgery_config import query_groups

    return [len(query_groups(config, layer)) for layer in config.surgery["layers"]]


def _refuse_too_big(weights: int, config, positions: int) -> None:
    """Raise if an estimate of the memory is too large: the weights of both models; for the longest prompt, the base's
    cache with a copy of one layer; and four tensors of a layer's width.
    """
    from surgery.machine.device import too_big

    text = config.get_text_config()
    size = getattr(getattr(config, "dtype", None), "itemsize", None) or 4
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    cache = 2 * heads * head * (text.num_hidden_layers + 1)
    width = max(getattr(text, "intermediate_size", None) or 0, text.hidden_size)
    if reason := too_big(weights, extra=positions * size * (cache + 4 * width)):
        raise MachineError(
            f"the benchmark {reason}",
            fix="shorter --lengths, or --synthetic --layers N (fewer layers)",
            code="out-of-memory",
        )


RANDOM = "random tokens"


def make_prompts(folder: Path | None, vocabulary: int, lengths: tuple[int, ...]) -> tuple[dict, str, str]:
    """One prompt for each length, the same at every call.

    Args:
        folder: folder of the model, with its tokenizer; None: the weights are random.
        vocabulary: number of different tokens.
        lengths: lengths of the prompts in tokens.

    Returns:
        Length -> long [1, length]; a description of the prompts; and why they are random tokens although the weights
        are not random, or "".
    """
    import torch

    reason = ""
    if folder is not None:
        from surgery.data.text import load_text, windows
        from surgery.io.loading import read_tokenizer

        try:
            text = load_text(part="calibration")
            tokens = windows(text, read_tokenizer(folder), max(max(lengths), 2), 1)
            return {length: tokens[:, :length] for length in lengths}, text.title, ""
        except SurgeryError as error:
            reason = error.what
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(vocabulary, (1, n), generator=generator) for n in lengths}, RANDOM, reason


def synthetic_config(config, layers: list[int], positions: int):
    """A copy of a config with some of its layers and at least `positions` positions.

    Args:
        config: the config of a model that is no composite.
        layers: indices of the layers to keep. Lists with one entry per layer (`layer_types`, those of the `surgery`
            block) keep the same entries.
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
    """Indices of `count` layers, evenly spaced over `depth`; all layers if `count` is None.

    Raises:
        SurgeryError: `count` is less than 1 or more than `depth`.
    """
    if count is not None and not 1 <= count <= depth:
        raise SettingError(f"{count} layers of {depth}", where="--layers", fix=f"1 to {depth}")
    count = count or depth
    return [int((i + 0.5) * depth / count) for i in range(count)]


def even_split(layers: list[dict], kv_heads: list[int], ratio: float, seed: int = 0) -> list[dict]:
    """The layers of a `surgery` block with a given share of streaming KV heads, chosen at random over all layers.

    Args:
        layers: the layers of the block. Each keeps its sinks and window; a layer without them takes those of another.
        kv_heads: number of KV heads of each layer.
        ratio: share from 0 to 1, rounded to a whole number of heads.

    Raises:
        SurgeryError: the ratio is outside 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise SettingError(f"ratio {ratio:g}", where="--ratio", fix="from 0 to 1")
    heads = [(layer, head) for layer, count in enumerate(kv_heads) for head in range(count)]
    chosen = set(random.Random(seed).sample(heads, round(ratio * len(heads))))
    with_window = next((layer for layer in layers if "window" in layer), {"sinks": 16, "window": 240})
    reach = {"sinks": with_window.get("sinks", 0), "window": with_window["window"]}
    return [
        {
            **reach,
            **layer,
            "streaming": [head for head in range(kv_heads[layer_index]) if (layer_index, head) in chosen],
        }
        for layer_index, layer in enumerate(layers)
    ]
