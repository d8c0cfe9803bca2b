"""The `surgery` block of a surgical config: what it says of each layer, and whether it is right.

The block is all that the code needs to know of a surgery, besides the weights:

    {"format": 1, "base_model_type": "llama", "layers": [{...}, ...]}

`layers` has an entry for every layer. What an entry leaves out is as in the base:

    streaming, sinks, window   KV heads that see only the first `sinks` and the last `window` tokens
    num_attention_heads, num_key_value_heads, query_groups, shapes
                               a layer of another shape: its heads, how many query heads read each KV head (left out
                               where all are read by equally many), and the shape of each parameter that differs,
                               by its name in the attention module
    parameters, stand_in       parameters that the surgery gave to the attention module, name -> shape, and whether
                               virtual keys are for queries alone that do not see the first token (surgery_bias.py)
    gate                       which heads are on for a token (surgery_gates.py): {"kind": "moh", "unit": "head" or
                               "kv_group", "shared": [units that are always on], "active": routed units that are on},
                               or {"kind": "mae", "hard": ..., "rescale": ...}
    sparse                     which blocks of keys the full heads read of a prompt (surgery_sparse_prefill.py)
    query_numbers, kv_numbers  what the base calls this layer's heads, where some of its heads are gone: for people,
                               nothing that runs reads them

The parts of this code that only some checkpoints need, and the files that a checkpoint carries.

What every surgical model runs is imported as usual. A part is looked up by its name where a layer's entry in the
`surgery` block uses it, so that a checkpoint may come without the parts that it does not use. Transformers takes a
checkpoint's code by its text: the file that config.json names, and those that it finds imported there. So a
checkpoint's copy of this file ends with an import of each part that it carries, which never runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import transformers
from transformers.dynamic_module_utils import get_relative_import_files

from .surgery_visibility import HeadKinds, base_windows, kinds_of_heads, query_groups

NAME, FORMAT = "surgery", 1
TRANSFORMERS = ((5, 21), (6, 0))  # from, before; 5.20 drops the soft-cap of gemma2 under SDPA
KEYS = {"streaming", "sinks", "window", "num_attention_heads", "num_key_value_heads", "query_groups", "shapes"}
KEYS |= {"query_numbers", "kv_numbers", "parameters", "stand_in", "gate", "sparse"}
# Parameters of terms -> the value that changes nothing; not -inf, which would give gradients that are no numbers.
TERMS = {
    "surgery_log_gamma": 0.0,
    "surgery_log_beta": 0.0,
    "surgery_sink_probe": 0.0,
    "surgery_sink_logit": -1e4,
    "surgery_key": 0.0,
    "surgery_value": 0.0,
}
ROUTERS = (
    "surgery_router",
    "surgery_router_bias",
    "surgery_router_temperature",
    "surgery_shared_router",
    "surgery_balance",
)
IDENTITY = TERMS | dict.fromkeys(ROUTERS, 0.0)


def head_kinds(config) -> list[HeadKinds]:
    """The kinds of heads of each layer of a surgical config."""
    return [
        kinds_of_heads(
            query_groups(config, layer),
            layer.get("streaming", ()),
            layer.get("sinks", 0),
            layer.get("window", 1),
            limit,
        )
        for layer, limit in zip(validate(config), base_windows(config), strict=True)
    ]


def validate(config) -> list[dict]:
    """The layers of a config's `surgery` block, checked.

    Raises:
        ValueError: a format that this code does not know, a Transformers it was not made for, or a block that does
            not fit the model.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not TRANSFORMERS[0] <= version < TRANSFORMERS[1]:
        least, below = (".".join(map(str, bound)) for bound in TRANSFORMERS)
        raise ValueError(
            f"this checkpoint's code is made for Transformers >= {least} and < {below}, this is {version}"
        )
    block = getattr(config, NAME, None)
    if not isinstance(block, dict) or block.get("format") != FORMAT:
        found = block.get("format") if isinstance(block, dict) else block
        raise ValueError(f"the surgery block has format {found!r}; this code reads format {FORMAT}")
    layers, count = block.get("layers"), config.get_text_config().num_hidden_layers
    if not isinstance(layers, list) or len(layers) != count:
        raise ValueError(f"the surgery block must have a list of {count} layers")
    for number, layer in enumerate(layers):
        if reason := _fault(config, layer):
            raise ValueError(f"layer {number} of the surgery block {reason}")
    return layers


def _fault(config, layer) -> str:
    """What is wrong with a layer's entry, "" if nothing."""
    if not isinstance(layer, dict) or set(layer) - KEYS:
        return f"has other keys than {', '.join(sorted(KEYS))}"
    numbers = {"num_attention_heads": 1, "num_key_value_heads": 1, "sinks": 0, "window": 1}
    for name, least in numbers.items():
        if name in layer and not (is_whole(layer[name], least)):
            return f"has {name} {layer[name]!r}, which must be whole and from {least}"
    if layer.get("num_key_value_heads", 1) > layer.get("num_attention_heads", sum(query_groups(config))):
        return f"has {layer['num_key_value_heads']} KV heads, more than query heads"
    groups = query_groups(config, layer)
    kv_heads = layer.get("num_key_value_heads", len(query_groups(config)))
    heads = layer.get("num_attention_heads", sum(query_groups(config)))
    whole = isinstance(groups, list) and all(is_whole(size, 1) for size in groups)
    if not whole or len(groups) != kv_heads or sum(groups) != heads:
        return f"spreads {heads} query heads over {kv_heads} KV heads as {groups}"
    for name, count in (("query_numbers", heads), ("kv_numbers", kv_heads)):
        numbers = layer.get(name, [])
        if numbers and not (all_whole(numbers, 0) and len({*numbers}) == count == len(numbers)):
            return f"must give {count} different numbers as {name}, not {numbers}"
    shapes = layer.get("shapes", {})
    if not isinstance(shapes, dict) or not all(all_whole(shape, 1) and shape for shape in shapes.values()):
        return "has shapes that are no lists of whole numbers"
    streaming = layer.get("streaming", [])
    if not all_whole(streaming, 0) or len({*streaming}) < len(streaming) or max(streaming, default=0) >= kv_heads:
        return f"must list KV heads from 0 to {kv_heads - 1} as streaming, each once, not {streaming}"
    if streaming and not {"sinks", "window"} <= set(layer):
        return "has streaming heads without sinks and window"
    named = layer.get("parameters", {})
    if not isinstance(named, dict) or set(named) - set(IDENTITY):
        return f"has other parameters than {', '.join(sorted(IDENTITY))}"
    if "gate" not in layer and (lost := sorted(set(named) & set(ROUTERS))):
        return f"has {', '.join(lost)} without a gate"
    faults = (
        load_part(name).validation_error(config, layer, groups) for name in OF_LAYERS if name in _attached(layer)
    )
    return next(filter(None, faults), "")


def _attached(layer: dict) -> set[str]:
    """The parts, of `OF_LAYERS`, that a layer's entry has."""
    terms = "stand_in" in layer or set(layer.get("parameters", {})) & set(TERMS)
    return {"gate", "sparse"} & set(layer) | ({"terms"} if terms else set())


def parts_of(layers: list[dict]) -> set[str]:
    """The parts of this code that layers use, whose entries are right: names of `surgery_config.FILES`."""
    used = set()
    for layer in layers:
        used |= _attached(layer)
        used |= {"sinks"} if "surgery_log_beta" in layer.get("parameters", {}) else set()
        if sparse := layer.get("sparse"):
            used |= {"kernel", *(each["method"] for each in (sparse, *sparse.get("patterns", ())))} & set(FILES)
    return used


def is_whole(value, least: int) -> bool:
    """Whether a value is a whole number from `least` on."""
    return type(value) is int and value >= least


def all_whole(values, least: int) -> bool:
    """Whether a value is a list of whole numbers from `least` on."""
    return isinstance(values, list) and all(is_whole(value, least) for value in values)


ENTRY = "modeling_surgery"  # what config.json names
OF_LAYERS = ("terms", "gate", "sparse")  # what an entry may have: the part's `attach` gives it to a module
FILES = {
    "terms": "surgery_bias",
    "sinks": "surgery_act",
    "gate": "surgery_gated_compute",
    "sparse": "surgery_sparse_prefill",
    "kernel": "block_sparse_prefill",  # of the package's kernels; with "sparse"
    # The ways to choose blocks in sparse prefill. `by_head`, which uses others, comes with "sparse".
    "block_topk": "surgery_estimate_block_topk",
    "flexprefill": "surgery_estimate_flexprefill",
    "hierarchical": "surgery_estimate_hierarchical",
    "max_threshold": "surgery_estimate_max_threshold",
    "pooled": "surgery_estimate_pooled",
    "sampled": "surgery_estimate_sampled",
    "streaming": "surgery_estimate_streaming",
    "tri_shape": "surgery_estimate_streaming",
    "vertical_slash": "surgery_estimate_vertical_slash",
    "xattention": "surgery_estimate_xattention",
}
LIST = b"\n\nif False:  # read by Transformers, which takes what it finds imported here\n"


@cache
def load_part(name: str):
    """The module of a part.

    Raises:
        ValueError: no part has this name, or the checkpoint that this code came with does not use it.
    """
    if name not in FILES:
        raise ValueError(f"there is no part {name!r} of a surgery; there is: {', '.join(FILES)}")
    if (spec := _spec(FILES[name])) is None:
        raise ValueError(
            f"the surgery block uses {name!r}, and its code {FILES[name]}.py did not come with this checkpoint: load "
            "it with surgery.load and save it again"
        )
    return import_module(spec.name)


def _spec(file: str):
    """Where a file of code is: a checkpoint has all beside this one, the package its kernels elsewhere; or None."""
    here = find_spec(f".{file}", __package__)
    return here or (find_spec(f"surgery.kernels.{file}") if find_spec("surgery") else None)


def exported_files(parts: Iterable[str]) -> dict[str, bytes]:
    """The files of code that a checkpoint with these parts carries: name -> content."""
    files = sorted({FILES[name] for name in parts})
    roots = [Path(_spec(name).origin) for name in (ENTRY, *files)]
    found = {Path(file) for root in roots for file in (root, *get_relative_import_files(root))}
    code = {path.name: path.read_bytes() for path in sorted(found)}
    own = Path(__file__).name
    code[own] = code[own].partition(LIST)[0]
    if files:
        code[own] += LIST + "".join(f"    from .{file} import *\n" for file in files).encode()
    return code


def export_files(parts: Iterable[str], folder: str | Path) -> None:
    """Put the code that a checkpoint with these parts carries in its folder."""
    for name, content in exported_files(parts).items():
        (Path(folder) / name).write_bytes(content)
