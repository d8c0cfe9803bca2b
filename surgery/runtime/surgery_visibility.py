"""Kinds of heads: which keys the heads of a layer see, and which heads run together.

This file also makes the masks of a surgical checkpoint: which slots hold real tokens, and which keys a block of
queries sees. Transformers calls the mask function `surgery_mask` once in a forward for each kind of layer. The
attention function calls the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from .surgery_config import HeadCost, Part, all_whole, is_whole, query_groups, used_parts, validate

MOST_KEPT = 1 << 20  # largest number of sinks, and of a window's tokens: the first token allocates memory for all


@dataclass(frozen=True)
class Visibility:
    """Which keys a query at position i sees: those j <= i with i - j < limit, and j < sinks or i - j < window.

    Attributes:
        sinks: how many first tokens are seen.
        window: how many last tokens are seen; None for a full head.
        limit: the base model's own sliding window in this layer, or None.
        of_base: the window is the base's own.
        keeper: who takes a call's keys and chooses among them, which may differ among KV heads: "policy" drops some
            from the cache (surgery_kv_policy.py), "read" leaves some unread (surgery_kv_read.py), "vectors" stores
            what they are made of (surgery_low_rank.py); "": nobody.
        most: the largest number of keys that the policy lets the cache hold for a KV head; None: it grows.
        rank: numbers in a vector, where keys and values are made of vectors; else 0.
    """

    sinks: int = 0
    window: int | None = None
    limit: int | None = None
    of_base: bool = False
    keeper: str = ""
    most: int | None = None
    rank: int = 0

    def simplified(self) -> Visibility:
        """The same keys in the form that stores least: a base's window that is no wider replaces sinks and window."""
        if self.limit is not None and (self.window is None or self.window >= self.limit):
            return Visibility(0, self.limit, None, of_base=True)
        return self


class HeadKinds:
    """The heads of a layer that run together, and the order of heads that brings them together.

    A kind is a visibility and a number of query heads for each KV head. Query heads are stored in order of KV heads.

    Args:
        groups: number of query heads that read each KV head.
        kinds: (visibility, indices of KV heads) for every kind; equally many query heads read each KV head of a kind.
    """

    def __init__(self, groups: list[int], kinds: list[tuple[Visibility, list[int]]]):
        self.visibilities = [visibility for visibility, _ in kinds]
        self.spec = (groups, kinds)  # equal values split heads in the same way
        self.tables: dict = {}  # what a kernel knows of them (surgery_kernels.py), on each device
        first = [sum(groups[:head]) for head in range(len(groups))]
        self._keys = _Order([heads for _, heads in kinds])
        self._queries = _Order([[first[h] + i for h in heads for i in range(groups[h])] for _, heads in kinds])

    def split_keys(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split keys or values [batch, KV heads, ...] by kind."""
        return self._keys.split(tensor)

    def split_queries(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split any tensor [batch, query heads, ...] by kind."""
        return self._queries.split(tensor)

    def join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Join the kinds' outputs, each [batch, heads, n, head_dim], to [batch, n, query heads, head_dim] in order."""
        return self._queries.join(outputs)


class _Order:
    """The order of heads by kind. Heads that are evenly spaced are read as a view, without a copy."""

    def __init__(self, kinds: list[list[int]]):
        self.count = sum(len(heads) for heads in kinds)
        self.kinds = [slices(heads) for heads in kinds]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.shape[1] != self.count:
            raise ValueError(f"the surgery block is of {self.count} heads, this layer made {tensor.shape[1]}")
        return [_take(tensor, slices) for slices in self.kinds]

    def join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        if len(outputs) == 1:
            return outputs[0].transpose(1, 2).contiguous()
        batch, _, length, size = outputs[0].shape
        joined = outputs[0].new_empty(batch, length, self.count, size)
        for output, slices in zip(outputs, self.kinds, strict=True):
            first = 0
            for heads in slices:
                last = first + len(range(self.count)[heads])
                joined[:, :, heads] = output[:, first:last].transpose(1, 2)
                first = last
        return joined


def slices(heads: list[int]) -> list[slice]:
    """Ascending indices as few slices: one if they are evenly spaced, else one for each run of neighbours."""
    if len(steps := {after - before for before, after in pairwise(heads)}) <= 1:
        return [slice(heads[0], heads[-1] + 1, *steps)]
    begins = [head for head in heads if head - 1 not in heads]
    ends = [head + 1 for head in heads if head + 1 not in heads]
    return [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]


def _take(tensor: torch.Tensor, slices: list[slice]) -> torch.Tensor:
    chunks = [tensor[:, heads] for heads in slices]
    if len(chunks) == 1:
        return chunks[0]
    if tensor.dim() < 4:
        return torch.cat(chunks, dim=1)
    # In memory, attention has the heads of one token next to one another. The copy keeps this layout.
    return torch.cat([chunk.transpose(1, 2) for chunk in chunks], dim=2).transpose(1, 2)


def kinds_of_heads(groups: list[int], streaming=(), sinks: int = 0, window: int = 1, limit=None) -> HeadKinds:
    """The kinds of heads of a layer: full heads first, then heads that see sinks + window.

    Args:
        groups: number of query heads that read each KV head.
        streaming: indices of the KV heads that see sinks + window.
        limit: the base's own sliding window in this layer, or None.
    """
    full, narrow, streaming = Visibility(limit=limit), Visibility(sinks, window, limit), set(streaming)
    return _kinds(groups, [narrow if head in streaming else full for head in range(len(groups))])


def base_windows(config) -> list[int | None]:
    """The base model's own sliding window in each layer, None for full attention."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window, layers = getattr(text, "sliding_window", None), range(text.num_hidden_layers)
    if kinds:  # the base's masks follow these, whatever `use_sliding_window` is
        return [window if kinds[i] == "sliding_attention" else None for i in layers]
    return [window if getattr(text, "use_sliding_window", True) else None for _ in layers]


def head_kinds(config) -> list[HeadKinds]:
    """The kinds of heads in each layer of a surgical config, from the visibility that its parts give each KV head."""
    kinds = []
    for layer, limit in zip(validate(config), base_windows(config), strict=True):
        groups = query_groups(config, layer)
        heads = [Visibility(limit=limit)] * len(groups)
        for part in used_parts(layer).values():
            heads = part.visibilities(layer, heads)
        kinds.append(_kinds(groups, heads))
    return kinds


def _kinds(groups: list[int], heads: list[Visibility]) -> HeadKinds:
    """The kinds of KV heads with these visibilities; kinds without sinks and window come first."""
    kinds: dict[tuple[Visibility, int], list[int]] = {}
    for head in sorted(range(len(groups)), key=lambda head: (heads[head].window is not None, head)):
        kinds.setdefault((heads[head].simplified(), groups[head]), []).append(head)
    return HeadKinds(groups, [(visibility, sorted(heads)) for (visibility, _), heads in kinds.items()])


class HeadSplit(Part):
    """The head split: some KV heads see only the first tokens and the last ones.

    An entry has `streaming` (indices of these KV heads), `sinks` and `window` (numbers of tokens).
    """

    keys = ("streaming", "sinks", "window")

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        for name, least in (("sinks", 0), ("window", 1)):
            if name in layer and not (is_whole(layer[name], least) and layer[name] <= MOST_KEPT):
                return f"has {name} {layer[name]!r}, which must be whole and from {least} to {MOST_KEPT}"
        kv_heads, streaming = len(groups), layer.get("streaming", [])
        if not all_whole(streaming, 0) or len({*streaming}) < len(streaming) or max(streaming, default=0) >= kv_heads:
            return f"must list KV heads from 0 to {kv_heads - 1} as streaming, each once, not {streaming}"
        if streaming and not {"sinks", "window"} <= set(layer):
            return "has streaming heads without sinks and window"
        return ""

    def visibilities(self, layer: dict, heads: list[Visibility]) -> list[Visibility]:
        streaming, reach = {*layer.get("streaming", ())}, (layer.get("sinks", 0), layer.get("window", 1))
        return [Visibility(*reach, seen.limit) if head in streaming else seen for head, seen in enumerate(heads)]

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("visibility",) if layer.get("streaming") else ()

    def kv_cost(self, layer: dict, heads: list[HeadCost]) -> list[HeadCost]:
        streaming, window = {*layer.get("streaming", ())}, layer.get("window", 0)
        narrow = HeadCost(0, layer.get("sinks", 0) + window)
        # A base's window that is no wider replaces sinks and window (`Visibility.simplified`).
        wider = [cost.growing or cost.fixed > window for cost in heads]
        return [narrow if head in streaming and wider[head] else cost for head, cost in enumerate(heads)]

    def after_heads_change(self, layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
        streaming = layer.get("streaming")
        remaining = [new for new, old in enumerate(kv_heads) if old in (streaming or ())]
        return {} if streaming is None else {"streaming": remaining}

    def display_key(self, layer: dict):
        return len(layer.get("streaming", ())), layer.get("sinks", 0), layer.get("window", 0)

    def probe_length(self, layer: dict, least: int) -> int:
        return least + layer.get("sinks", 0) + layer.get("window", 0)


PART = HeadSplit()


def surgery_mask(batch_size, q_length, kv_length, mask_function=None, attention_mask=None, device=None, **kwargs):
    """The mask function that Transformers calls.

    Returns:
        The slots of real tokens, bool [batch, kv_length], or None if all are real. For packed rows, which Transformers
        detects by positions that start again, the number of each token's sequence, long [batch, length].

    Raises:
        ValueError: the mask is not causal (image blocks that see each other, chunks), has holes (padding must be
            before a row's tokens or after them), is too short, or is given for packed rows.
    """
    segments = _segments(mask_function)
    if attention_mask is None:
        return segments
    if segments is not None:
        raise ValueError("packed rows have no padding: leave the attention mask out, their positions tell them apart")
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
    """The sequence numbers of a packed batch, or None. Raises a ValueError for masks that `surgery_mask` refuses."""
    segments = None
    for function in _mask_functions(mask_function):
        name = getattr(function, "__qualname__", str(function)).removesuffix(".<locals>.inner_mask")
        if name == "packed_sequence_mask_function":
            segments = function.__closure__[0].cell_contents.long()
        elif name not in ("causal_mask_function", "sliding_window_overlay"):
            raise ValueError(
                f"this model asks for a mask that is not causal ({name}); a surgical model supports causal attention, "
                "sliding windows and packed rows only"
            )
    return segments


def _mask_functions(function):
    """The elementary functions of a mask function, which Transformers joins (`and_masks`) and wraps (packed rows)."""
    if function is None:
        return
    name = getattr(function, "__qualname__", "")
    if not name.startswith(("and_masks", "remap_positions_for_packed_sequence")):
        yield function
        return
    for cell in function.__closure__ or ():
        members = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        for member in members:
            if callable(member) and not isinstance(member, torch.Tensor):
                yield from _mask_functions(member)


@lru_cache(maxsize=8)
def unpadded(visibility, first: int, length: int, low: int, separate_sinks: bool, group: int, *, dtype, device):
    """`seen_keys` of a block without padding, for its groups, as a bias: the same in all layers and most blocks."""
    with torch.inference_mode(False):  # kept, and used in training later
        slots, key_slots = (torch.arange(begin, first + length, device=device) for begin in (first, low))
        return bias(for_groups(seen_keys(visibility, slots, key_slots, None, None, separate_sinks), group), dtype)


def for_groups(seen: torch.Tensor, group: int) -> torch.Tensor | None:
    """The mask for one product of a group's queries with the keys that they share; None where all keys are seen."""
    return None if bool(seen.all()) else seen[:, None].repeat(1, 1, group, 1)


def seen_keys(visibility, slots, key_slots, mask, pad, separate_sinks: bool) -> torch.Tensor:
    """The keys that the queries in these slots see: bool [1 or batch, queries, keys].

    Args:
        separate_sinks: the result has columns for the sinks first, and then for the keys, where the sinks are hidden.
    """
    distance = slots[:, None] - key_slots[None, :]
    seen = (distance >= 0) & (key_slots >= 0)
    if visibility.window is not None:
        near = distance < visibility.window
        seen = seen & (near if separate_sinks or not visibility.sinks else near | (key_slots < visibility.sinks))
    if visibility.limit is not None:
        seen = seen & (distance < visibility.limit)
    seen = seen[None]  # [1 or batch, b, keys]
    if mask is not None:
        seen = seen & mask[:, None, key_slots.clamp(min=0)]
    if separate_sinks:
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
    """A mask as a bias on the scores. A bias stays unchanged, apart from its dtype."""
    if seen is None or seen.dtype != torch.bool:
        return seen if seen is None else seen.to(dtype)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
