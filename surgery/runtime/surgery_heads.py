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
    query_numbers, kv_numbers  what the base calls this layer's heads, where some of its heads are gone: for people,
                               nothing that runs reads them
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import transformers

NAME, FORMAT = "surgery", 1
TRANSFORMERS = ((5, 20), (6, 0))  # from, before
KEYS = {"streaming", "sinks", "window", "num_attention_heads", "num_key_value_heads", "query_groups", "shapes"}
KEYS |= {"query_numbers", "kv_numbers", "parameters", "stand_in"}
# Parameters of terms -> the value that changes nothing; not -inf, which would give gradients that are no numbers.
IDENTITY = {
    "surgery_log_gamma": 0.0,
    "surgery_log_beta": 0.0,
    "surgery_sink_probe": 0.0,
    "surgery_sink_logit": -1e4,
    "surgery_key": 0.0,
    "surgery_value": 0.0,
}


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
        """Outputs of the kinds, each [batch, heads, n, head_dim], as [batch, n, query heads, head_dim] in order."""
        return self._queries.join(parts)


class _Order:
    """Heads by kind. What is next to one another, or evenly spaced, is read where it lies."""

    def __init__(self, kinds: list[list[int]]):
        self.count = sum(len(heads) for heads in kinds)
        self.kinds = [_slices(heads) for heads in kinds]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.shape[1] != self.count:
            raise ValueError(f"the surgery block is of {self.count} heads, this layer made {tensor.shape[1]}")
        return [_take(tensor, slices) for slices in self.kinds]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        batch, _, length, size = parts[0].shape
        joined = parts[0].new_empty(batch, length, self.count, size)
        for part, slices in zip(parts, self.kinds, strict=True):
            first = 0
            for heads in slices:
                last = first + len(range(self.count)[heads])
                joined[:, :, heads] = part[:, first:last].transpose(1, 2)
                first = last
        return joined


def _slices(heads: list[int]) -> list[slice]:
    """Ascending numbers as few slices: one where they are evenly spaced, else one for each row of neighbours."""
    if len(steps := {after - before for before, after in pairwise(heads)}) <= 1:
        return [slice(heads[0], heads[-1] + 1, *steps)]
    begins = [head for head in heads if head - 1 not in heads]
    ends = [head + 1 for head in heads if head + 1 not in heads]
    return [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]


def _take(tensor: torch.Tensor, slices: list[slice]) -> torch.Tensor:
    parts = [tensor[:, heads] for heads in slices]
    if len(parts) == 1:
        return parts[0]
    if tensor.dim() < 4:
        return torch.cat(parts, dim=1)
    # As attention makes them, the heads of one token lie side by side, and are copied so.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=2).transpose(1, 2)


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
    return _fault_of_terms(config, layer, heads, kv_heads)


def _fault_of_terms(config, layer: dict, heads: int, kv_heads: int) -> str:
    """What is wrong with the parameters in a layer's entry, "" if nothing."""
    named, text = layer.get("parameters", {}), config.get_text_config()
    if not isinstance(named, dict) or set(named) - set(IDENTITY):
        return f"has other parameters than {', '.join(sorted(IDENTITY))}"
    logit = named.get("surgery_sink_logit", [heads, 1])
    if not _numbers(logit, 1) or len(logit) != 2:
        return f"gives surgery_sink_logit the shape {logit}; it is [{heads}, virtual keys]"
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    right = {"surgery_log_gamma": [heads], "surgery_sink_logit": [heads, logit[1]]}
    right |= {"surgery_log_beta": [heads], "surgery_sink_probe": [heads, size + 2]}
    right |= {name: [kv_heads, logit[1], size] for name in ("surgery_key", "surgery_value")}
    for name, shape in named.items():
        if not _numbers(shape, 1) or shape != right[name]:
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


def _whole(value, least: int) -> bool:
    return type(value) is int and value >= least


def _numbers(values, least: int) -> bool:
    return isinstance(values, list) and all(_whole(value, least) for value in values)
