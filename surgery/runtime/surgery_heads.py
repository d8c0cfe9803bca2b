"""Kinds of heads: which keys the heads of a layer see, and which heads run together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Visibility:
    """Which keys a query at position i sees: those j <= i with i - j < limit, and j < sinks or i - j < window.

    Attributes:
        window: None for a full head.
        limit: the base model's own sliding window in this layer, or None.
        of_base: the window is the base's own.
    """

    sinks: int = 0
    window: int | None = None
    limit: int | None = None
    of_base: bool = False

    def simplified(self) -> Visibility:
        """The same keys in the form that stores least: where the base's own window is narrower, it rules alone."""
        if self.limit is not None and (self.window is None or self.window >= self.limit):
            return Visibility(0, self.limit, None, of_base=True)
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
        self.facts = (groups, kinds)  # equal ones split heads alike
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
        self.kinds = [slices(heads) for heads in kinds]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.shape[1] != self.count:
            raise ValueError(f"the surgery block is of {self.count} heads, this layer made {tensor.shape[1]}")
        return [_take(tensor, slices) for slices in self.kinds]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0].transpose(1, 2).contiguous()
        batch, _, length, size = parts[0].shape
        joined = parts[0].new_empty(batch, length, self.count, size)
        for part, slices in zip(parts, self.kinds, strict=True):
            first = 0
            for heads in slices:
                last = first + len(range(self.count)[heads])
                joined[:, :, heads] = part[:, first:last].transpose(1, 2)
                first = last
        return joined


def slices(heads: list[int]) -> list[slice]:
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
    window, layers = getattr(text, "sliding_window", None), range(text.num_hidden_layers)
    if kinds:  # which the base's masks follow, whatever the switch says
        return [window if kinds[i] == "sliding_attention" else None for i in layers]
    return [window if getattr(text, "use_sliding_window", True) else None for _ in layers]
