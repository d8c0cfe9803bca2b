"""What the heads of each layer see, as the config's `surgery` block says it.

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
    query_numbers, kv_numbers  what the base calls this layer's heads, where some of its heads are gone: for people,
                               nothing that runs reads them
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers

from .surgery_gates import FIELDS, ROUTERS, Gate

NAME, FORMAT = "surgery", 1
TRANSFORMERS = ((5, 20), (6, 0))  # from, before
KEYS = {"streaming", "sinks", "window", "num_attention_heads", "num_key_value_heads", "query_groups", "shapes"}
KEYS |= {"query_numbers", "kv_numbers", "parameters", "stand_in", "gate"}
# Parameters of terms -> the value that changes nothing; not -inf, which would give gradients that are no numbers.
TERMS = {"surgery_log_gamma": 0.0, "surgery_sink_logit": -1e4, "surgery_key": 0.0, "surgery_value": 0.0}
IDENTITY = TERMS | dict.fromkeys(ROUTERS, 0.0)


@dataclass(frozen=True)
class Visibility:
    """Which keys a query at position i sees: those j <= i with i - j < limit, and j < sinks or i - j < window.

    Attributes:
        window: None for a full head.
        limit: the base model's own sliding window in this layer, or None.
    """

    sinks: int = 0
    window: int | None = None
    limit: int | None = None

    def simplified(self) -> Visibility:
        """The same keys in the form that stores least: where the base's own window is narrower, it rules alone."""
        if self.limit is not None and (self.window is None or self.window >= self.limit):
            return Visibility(0, self.limit, None)
        return self


class HeadKinds:
    """Which heads of a layer run together, and the order of heads that brings them together.

    A kind is a visibility and a number of query heads for each KV head. Query heads are stored KV head by KV head.

    Args:
        groups: query heads that read each KV head.
        kinds: (visibility, KV head numbers) of every kind; the KV heads of one kind are read by equally many.
    """

    def __init__(self, groups: list[int], kinds: list[tuple[Visibility, list[int]]]):
        self.visibilities = [visibility for visibility, _ in kinds]
        first = [sum(groups[:head]) for head in range(len(groups))]
        self._keys = _Order([heads for _, heads in kinds])
        self._queries = _Order([[first[h] + i for h in heads for i in range(groups[h])] for _, heads in kinds])

    def split_keys(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Keys or values [batch, KV heads, ...] apart by kind."""
        return self._keys.split(tensor)

    def split_queries(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Anything [batch, query heads, ...] apart by kind."""
        return self._queries.split(tensor)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split_queries`."""
        return self._queries.join(parts)


class _Order:
    """Heads by kind. Nothing is moved where the kinds lie one after the other as they are."""

    def __init__(self, kinds: list[list[int]]):
        self.sizes = [len(heads) for heads in kinds]
        self.order = [head for heads in kinds for head in heads]
        self.sorted = self.order == sorted(self.order)
        self._indices: dict = {}

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.shape[1] != len(self.order):
            raise ValueError(f"the surgery block is of {len(self.order)} heads, this layer made {tensor.shape[1]}")
        if len(self.sizes) == 1:
            return [tensor]
        ordered = tensor if self.sorted else tensor.index_select(1, self._index(tensor.device, inverse=False))
        return ordered.split(self.sizes, dim=1)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(parts, dim=1)
        return joined if self.sorted else joined.index_select(1, self._index(joined.device, inverse=True))

    def _index(self, device, inverse: bool) -> torch.Tensor:
        if (device, inverse) not in self._indices:
            with torch.inference_mode(False):  # kept, and used in training later
                order = torch.tensor(self.order)
                self._indices[device, inverse] = (order.argsort() if inverse else order).to(device)
        return self._indices[device, inverse]


def kinds_of_heads(groups: list[int], streaming=(), sinks: int = 0, window: int = 1, limit=None) -> HeadKinds:
    """The kinds of heads of a layer: full ones first, then those with sinks + window.

    Args:
        groups: query heads that read each KV head.
        streaming: numbers of the KV heads that see sinks + window.
        limit: the base's own sliding window in this layer, or None.
    """
    kinds: dict[tuple[Visibility, int], list[int]] = {}
    for head in sorted(range(len(groups)), key=lambda head: (head in set(streaming), head)):
        visibility = Visibility(sinks, window, limit) if head in set(streaming) else Visibility(limit=limit)
        kinds.setdefault((visibility.simplified(), groups[head]), []).append(head)
    return HeadKinds(groups, [(visibility, sorted(heads)) for (visibility, _), heads in kinds.items()])


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


def query_groups(config, layer: dict | None = None) -> list[int]:
    """How many query heads read each KV head of a layer, None: of a layer as the base's config has it."""
    text, layer = config.get_text_config(), layer or {}
    heads = layer.get("num_attention_heads", text.num_attention_heads)
    kv_heads = layer.get("num_key_value_heads", getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    return layer.get("query_groups") or [heads // kv_heads] * kv_heads


def base_windows(config) -> list[int | None]:
    """The base model's own sliding window in each layer, None for full attention."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    layers = range(text.num_hidden_layers)
    return [window if kinds is None or kinds[i] == "sliding_attention" else None for i in layers]


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
        if name in layer and not _whole(layer[name], least):
            return f"has {name} {layer[name]!r}, which must be whole and from {least}"
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
    right |= {name: [kv_heads, logit[1], size] for name in ("surgery_key", "surgery_value")}
    for name, shape in named.items():
        if name in TERMS and (not _numbers(shape, 1) or shape != right[name]):
            return f"gives {name} the shape {shape}; it is {right[name]}"
        if name in ("surgery_key", "surgery_value") and "surgery_sink_logit" not in named:
            return f"has {name} without surgery_sink_logit"
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
