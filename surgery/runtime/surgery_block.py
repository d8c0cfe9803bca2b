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
                               virtual keys are for queries alone that do not see the first token (surgery_terms.py)
    gate                       which heads are on for a token (surgery_gates.py): {"kind": "moh", "unit": "head" or
                               "kv_group", "shared": [units that are always on], "active": routed units that are on},
                               or {"kind": "mae", "hard": ..., "rescale": ...}
    sparse                     which blocks of keys the full heads read of a prompt (surgery_prefill.py)
    query_numbers, kv_numbers  what the base calls this layer's heads, where some of its heads are gone: for people,
                               nothing that runs reads them
"""

from __future__ import annotations

import transformers

from .surgery_gates import FIELDS, ROUTERS, Gate
from .surgery_heads import HeadKinds, base_windows, kinds_of_heads, query_groups
from .surgery_prefill import problem_of

NAME, FORMAT = "surgery", 1
TRANSFORMERS = ((5, 20), (6, 0))  # from, before
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
        raise ValueError(f"this checkpoint's code is made for Transformers >= 5.20 and < 6, this is {version}")
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
        if name in layer and not (_whole(layer[name], least)):
            return f"has {name} {layer[name]!r}, which must be whole and from {least}"
    if layer.get("num_key_value_heads", 1) > layer.get("num_attention_heads", sum(query_groups(config))):
        return f"has {layer['num_key_value_heads']} KV heads, more than query heads"
    groups = query_groups(config, layer)
    kv_heads = layer.get("num_key_value_heads", len(query_groups(config)))
    heads = layer.get("num_attention_heads", sum(query_groups(config)))
    whole = isinstance(groups, list) and all(_whole(size, 1) for size in groups)
    if not whole or len(groups) != kv_heads or sum(groups) != heads:
        return f"spreads {heads} query heads over {kv_heads} KV heads as {groups}"
    for name, count in (("query_numbers", heads), ("kv_numbers", kv_heads)):
        numbers = layer.get(name, [])
        if numbers and not (_numbers(numbers, 0) and len({*numbers}) == count == len(numbers)):
            return f"must give {count} different numbers as {name}, not {numbers}"
    shapes = layer.get("shapes", {})
    if not isinstance(shapes, dict) or not all(_numbers(shape, 1) and shape for shape in shapes.values()):
        return "has shapes that are no lists of whole numbers"
    streaming = layer.get("streaming", [])
    if not _numbers(streaming, 0) or len({*streaming}) < len(streaming) or max(streaming, default=0) >= kv_heads:
        return f"must list KV heads from 0 to {kv_heads - 1} as streaming, each once, not {streaming}"
    if streaming and not {"sinks", "window"} <= set(layer):
        return "has streaming heads without sinks and window"
    named = layer.get("parameters", {})
    if not isinstance(named, dict) or set(named) - set(IDENTITY):
        return f"has other parameters than {', '.join(sorted(IDENTITY))}"
    if "sparse" in layer and (problem := problem_of(layer["sparse"], heads)):
        return f"has sparse prefill that cannot be: {problem}"
    fault = _fault_of_gate(layer, groups, config.get_text_config().hidden_size)
    return fault or _fault_of_terms(config, layer, heads, kv_heads)


def _fault_of_terms(config, layer: dict, heads: int, kv_heads: int) -> str:
    """What is wrong with the parameters in a layer's entry, "" if nothing."""
    named, text = layer.get("parameters", {}), config.get_text_config()
    logit = named.get("surgery_sink_logit", [heads, 1])
    if not _numbers(logit, 1) or len(logit) != 2:
        return f"gives surgery_sink_logit the shape {logit}; it is [{heads}, virtual keys]"
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    right = {"surgery_log_gamma": [heads], "surgery_sink_logit": [heads, logit[1]]}
    right |= {"surgery_log_beta": [heads], "surgery_sink_probe": [heads, size + 2]}
    right |= {name: [kv_heads, logit[1], size] for name in ("surgery_key", "surgery_value")}
    for name, shape in named.items():
        if name in TERMS and (not _numbers(shape, 1) or shape != right[name]):
            return f"gives {name} the shape {shape}; it is {right[name]}"
        if name in ("surgery_key", "surgery_value") and "surgery_sink_logit" not in named:
            return f"has {name} without surgery_sink_logit"
    if ("surgery_log_beta" in named) != ("surgery_sink_probe" in named):
        return "has one of surgery_log_beta and surgery_sink_probe without the other"
    if {"surgery_log_gamma", "surgery_log_beta"} <= set(named):
        return "has surgery_log_gamma and surgery_log_beta: a layer has one bias"
    stand_in = layer.get("stand_in", False)
    if not isinstance(stand_in, bool) or (stand_in and "surgery_sink_logit" not in named):
        return f"has stand_in {stand_in!r}, which must be true or false, and is for virtual keys alone"
    return ""


def _fault_of_gate(layer: dict, groups: list[int], hidden: int) -> str:
    """What is wrong with the gate in a layer's entry, "" if nothing.

    Args:
        groups: query heads that read each KV head.
        hidden: width of the layer's input.
    """
    gate, named = layer.get("gate"), layer.get("parameters", {})
    if gate is None:
        return f"has {', '.join(lost)} without a gate" if (lost := sorted(set(named) & set(ROUTERS))) else ""
    kind = gate.get("kind") if isinstance(gate, dict) else None
    if not isinstance(kind, str) or set(gate) != FIELDS.get(kind):
        kinds = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in FIELDS.items())
        return f"has the gate {gate}, and a gate has ({kinds})"
    if kind == "mae":
        if not (isinstance(gate["hard"], bool) and isinstance(gate["rescale"], bool)) or sum(groups) < 2:
            return "has a gate of kind mae whose hard and rescale are not true or false, or fewer than two heads"
    else:
        if gate["unit"] not in ("head", "kv_group"):
            return f"has a gate with unit {gate['unit']!r}, which is head or kv_group"
        count, shared = len(groups) if gate["unit"] == "kv_group" else sum(groups), gate["shared"]
        whole = isinstance(shared, list) and all(type(unit) is int and 0 <= unit < count for unit in shared)
        if not whole or len({*shared}) < len(shared) or len(shared) >= count:
            return f"has a gate with shared {shared}; they are some of 0 to {count - 1}, each once, and not all"
        routed = count - len(shared)
        if type(gate["active"]) is not int or not 1 <= gate["active"] <= routed:
            return f"has a gate with active {gate['active']!r}; it is whole, from 1 to the {routed} routed"
    right = Gate.of(gate, groups).shapes(hidden)
    wrong = {name: named.get(name) for name in ROUTERS if named.get(name) != right.get(name)}
    return f"has a gate whose parameters are {wrong}; they are {right}" if wrong else ""


def _whole(value, least: int) -> bool:
    return type(value) is int and value >= least


def _numbers(values, least: int) -> bool:
    return isinstance(values, list) and all(_whole(value, least) for value in values)
