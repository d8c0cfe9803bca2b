"""Kinds of heads: which keys the heads of a layer see, and which heads run together.

Masks of a surgical checkpoint: which slots hold real tokens, and which keys a block of queries sees.

`surgery_mask` is the mask function that Transformers calls once for a forward; the rest is for the attention function.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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


def surgery_mask(batch_size, q_length, kv_length, mask_function=None, attention_mask=None, device=None, **kwargs):
    """The mask function.

    Returns:
        Which slots hold real tokens, bool [batch, kv_length]; None if all do; for rows that hold several sequences
        (Transformers sees it at positions that start anew) the number of each token's sequence, long [batch, length].

    Raises:
        ValueError: a mask that is not plain causal (image blocks that see each other, chunks), or one with holes:
            padding must be before a row's tokens or after them.
    """
    segments = _segments(mask_function)
    if attention_mask is None:
        return segments
    mask = attention_mask.to(torch.bool)
    if mask.shape[1] < kv_length:
        raise ValueError(f"the attention mask has {mask.shape[1]} columns, cache and input have {kv_length} tokens")
    mask = mask[:, :kv_length]
    if bool(mask.all()):
        return None
    edges = (mask[:, 1:] != mask[:, :-1]).sum(dim=1)
    if bool((edges > 2).any()) or bool((mask[:, 0] & mask[:, -1] & (edges > 0)).any()):
        raise ValueError("the attention mask has holes: padding must be before a row's tokens or after them")
    return mask


def _segments(mask_function) -> torch.Tensor | None:
    """Sequence numbers of a packed batch; masks that are neither causal nor windows nor packed rows are refused."""
    segments = None
    for part in _mask_parts(mask_function):
        name = getattr(part, "__qualname__", str(part)).removesuffix(".<locals>.inner_mask")
        if name == "packed_sequence_mask_function":
            segments = part.__closure__[0].cell_contents.long()
        elif name not in ("causal_mask_function", "sliding_window_overlay"):
            raise ValueError(
                f"this model asks for a mask that is not causal ({name}); a surgical model supports causal attention, "
                "sliding windows and packed rows only"
            )
    return segments


def _mask_parts(function):
    """The pieces a mask function is made of: Transformers joins them with `and_masks` and wraps packed rows."""
    if function is None:
        return
    name = getattr(function, "__qualname__", "")
    if not name.startswith(("and_masks", "remap_positions_for_packed_sequence")):
        yield function
        return
    for cell in function.__closure__ or ():
        parts = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        for part in parts:
            if callable(part) and not isinstance(part, torch.Tensor):
                yield from _mask_parts(part)


@lru_cache(maxsize=8)
def unpadded(visibility, first: int, length: int, low: int, apart: bool, group: int, dtype, device):
    """`seen_keys` of a block without padding, for its groups, as a bias: alike in all layers and in most blocks."""
    with torch.inference_mode(False):  # kept, and used in training later
        slots, key_slots = (torch.arange(begin, first + length, device=device) for begin in (first, low))
        return bias(for_groups(seen_keys(visibility, slots, key_slots, None, None, apart), group), dtype)


def for_groups(seen: torch.Tensor, group: int) -> torch.Tensor | None:
    """A group's queries share its keys, one product for all of them: the mask for it, None where all is seen."""
    return None if bool(seen.all()) else seen[:, None].repeat(1, 1, group, 1)


def seen_keys(visibility, slots, key_slots, mask, pad, apart: bool) -> torch.Tensor:
    """Which keys the queries in these slots see: bool [1 or batch, queries, keys].

    Args:
        apart: the sinks come first, and then the keys, among which they may be once more.
    """
    distance = slots[:, None] - key_slots[None, :]
    seen = (distance >= 0) & (key_slots >= 0)
    if visibility.window is not None:
        near = distance < visibility.window
        seen = seen & (near if apart or not visibility.sinks else near | (key_slots < visibility.sinks))
    if visibility.limit is not None:
        seen = seen & (distance < visibility.limit)
    seen = seen[None]  # [1 or batch, b, keys]
    if mask is not None:
        seen = seen & mask[:, None, key_slots.clamp(min=0)]
    if apart:
        start = 0 if pad is None else pad[:, None, None]
        seen = seen & (key_slots >= visibility.sinks + start)
        position = slots[None, :, None] - start
        order = torch.arange(visibility.sinks, device=slots.device)
        visible = order <= position
        if visibility.limit is not None:
            visible = visible & (position - order < visibility.limit)
        if mask is not None:  # a row shorter than the sinks, padded on the right
            visible = visible & (order < mask.sum(dim=1)[:, None, None])
        seen = torch.cat([visible.expand(seen.shape[0], -1, -1), seen.expand(visible.shape[0], -1, -1)], dim=-1)
    return seen


def bias(seen: torch.Tensor | None, dtype) -> torch.Tensor | None:
    """A mask as a bias on the scores; a bias as it is."""
    if seen is None or seen.dtype != torch.bool:
        return seen if seen is None else seen.to(dtype)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
