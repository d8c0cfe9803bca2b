"""Masks of a surgical checkpoint: which slots hold real tokens, and which keys a block of queries sees.

`surgery_mask` is the mask function that Transformers calls once for a forward; the rest is for the attention function.
"""

from __future__ import annotations

from functools import lru_cache

import torch


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
