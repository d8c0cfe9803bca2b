"""The attention function of a surgical checkpoint, and the mask function that belongs to it.

    out_h(i) = sum over j in V_h(i) of softmax_j(scale * q_i.k_j) * v_j

after projections, norms, RoPE and cache update. V_h is read from `module.surgery_heads`: for each kind of head in the
layer its visibility and its KV heads. Heads of one kind run together: full heads as plain causal attention, heads with
sinks + window as a band, block of queries by block of queries: the cost is n * window and no [n, n] mask exists.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .surgery_heads import HeadKinds
from .surgery_stores import KeyValues, uncached

BLOCK = 128  # queries of a band that share one slice of keys
# Tensors that reach an attention function and do not change what it computes. Others are refused.
IGNORED = {"position_ids", "labels", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k"}


def surgery_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of one layer, every head with its own visibility.

    Args:
        module: attention module that carries `surgery_heads`, a `HeadKinds`.
        query: [batch, heads, n, head_dim].
        key, value: [batch, KV heads, N, head_dim], or what `SurgeryLayer.update` returned.
        attention_mask: [batch, N] (True: a real token) as `surgery_mask` gives it, or None.
        scaling: factor on q.k. `softcap`, `s_aux` and `sliding_window` are honoured.

    Returns:
        [batch, n, heads, head_dim], and None: the weights are never held.

    Raises:
        ValueError: a 4-D mask, dropout, attention weights or an argument that is not known here.
    """
    options = _options(kwargs)
    if dropout and module.training:
        raise ValueError("a surgical model has no attention dropout: set it to 0 in the config before training")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("a surgical model takes a mask [batch, length] of real tokens, not one of 4 dimensions")
    if attention_mask is not None and attention_mask.dtype == torch.long:
        return _by_segment(module, query, key, value, attention_mask, scaling, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kinds: HeadKinds = module.surgery_heads
    if isinstance(key, list):
        views = key
    else:
        new = zip(kinds.visibilities, kinds.split_keys(key), kinds.split_keys(value), strict=True)
        views = [uncached(visibility, keys, values) for visibility, keys, values in new]
    pad = None if attention_mask is None else attention_mask.int().argmax(dim=1)
    logits = options["s_aux"]  # [heads]
    sinks = [None] * len(views) if logits is None else [part[0] for part in kinds.split_queries(logits[None])]
    parts = [
        _attend(part, view, attention_mask, pad, scale, options["softcap"], sink)
        for part, view, sink in zip(kinds.split_queries(query), views, sinks, strict=True)
    ]
    return kinds.join(parts).transpose(1, 2).contiguous(), None


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


def _options(kwargs: dict) -> dict:
    known = {"softcap", "s_aux", "sliding_window"}
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is not supported by a surgical model: the weights are never held")
    if kwargs.get("is_causal") is False:
        raise ValueError("a surgical model attends causally: is_causal=False is not supported")
    for name, argument in kwargs.items():
        if name not in known | IGNORED and isinstance(argument, torch.Tensor):
            raise ValueError(f"the attention of this model takes {name}, which a surgical model does not know")
    return {"softcap": kwargs.get("softcap"), "s_aux": kwargs.get("s_aux")}


def _attend(query, view: KeyValues, mask, pad, scale, softcap, s_aux) -> torch.Tensor:
    """Heads of one visibility: query [batch, heads, n, head_dim] against a view; the result has query's shape."""
    batch, heads, length, size = query.shape
    kv_heads, visibility = view.keys.shape[1], view.visibility
    if visibility.sinks:
        view.settle_sinks(pad)
    plain = softcap is None and s_aux is None and mask is None
    if plain and visibility.window is None and view.start == 0 and (length == view.end or length == 1):
        return sdpa(query, view.keys, view.values, scale=scale, is_causal=length > 1, enable_gqa=heads != kv_heads)
    if plain and view.whole is not None and visibility.limit is None:
        return sdpa(query, *view.whole, scale=scale, enable_gqa=heads != kv_heads)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, size)
    sinks = None if s_aux is None else s_aux.reshape(kv_heads, heads // kv_heads)
    first = view.end - length
    blocks = [
        _block(grouped[:, :, :, i : i + BLOCK], view, first + i, mask, pad, scale, softcap, sinks)
        for i in range(0, length, BLOCK)
    ]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)).reshape(query.shape)


def _block(query, view: KeyValues, first: int, mask, pad, scale, softcap, s_aux) -> torch.Tensor:
    """One block of queries [batch, KV heads, group, b, head_dim], the first of which is in slot `first`."""
    batch, kv_heads, group, length, size = query.shape
    visibility, device = view.visibility, query.device
    slots = torch.arange(first, first + length, device=device)
    if view.ring:
        keys, values, key_slots = view.keys, view.values, view.store.slots()
    else:
        low = view.start if visibility.window is None else max(view.start, first - visibility.window + 1)
        cut = slice(low - view.start, first + length - view.start)
        keys, values = view.keys[:, :, cut], view.values[:, :, cut]
        key_slots = torch.arange(low, first + length, device=device)
    distance = slots[:, None] - key_slots[None, :]
    seen = (distance >= 0) & (key_slots >= 0)
    for bound in (visibility.window, visibility.limit):
        seen = seen if bound is None else seen & (distance < bound)
    seen = seen[None]  # [1 or batch, b, keys]
    if mask is not None:
        seen = seen & mask[:, None, key_slots.clamp(min=0)]
    if visibility.sinks:
        start = 0 if pad is None else pad[:, None, None]
        seen = seen & (key_slots >= visibility.sinks + start)  # nearer sinks are read from their own buffer
        position = slots[None, :, None] - start
        order = torch.arange(visibility.sinks, device=device)
        visible = order <= position
        if visibility.limit is not None:
            visible = visible & (position - order < visibility.limit)
        if mask is not None:  # a row shorter than the sinks, padded on the right
            visible = visible & (order < mask.sum(dim=1)[:, None, None])
        seen = torch.cat([visible.expand(seen.shape[0], -1, -1), seen.expand(visible.shape[0], -1, -1)], dim=-1)
        keys = torch.cat([view.sink_keys, keys], dim=2)
        values = torch.cat([view.sink_values, values], dim=2)
    rows = query.reshape(batch, kv_heads, group * length, size)
    seen = seen[:, None].repeat(1, 1, group, 1)  # the group's queries share the keys: one product for all of them
    if softcap is None and s_aux is None:
        out = sdpa(rows, keys, values, attn_mask=None if bool(seen.all()) else seen, scale=scale)
    else:
        out = _explicit(rows, keys, values, seen, scale, softcap, s_aux, group)
    if mask is not None:  # rows of padding see nothing: zero, never NaN
        out = out.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)
    return out.reshape(query.shape)


def _explicit(rows, keys, values, seen, scale, softcap, s_aux, group) -> torch.Tensor:
    """Softmax written out, for soft-capped scores and learned sinks (a logit without a value)."""
    scores = (rows @ keys.mT).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        length = rows.shape[2] // group
        sink = s_aux.float().repeat_interleave(length, dim=1)[None, :, :, None].expand(len(rows), -1, -1, -1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(values.dtype) @ values


def _by_segment(module, query, key, value, segments, scaling, options):
    """Packed rows: every sequence attends alone, and its first tokens are its sinks."""
    if isinstance(key, list):  # the cache of this call: all its keys are new
        raise ValueError("packed rows are for training: pass use_cache=False")
    rows = []
    for row, numbers in enumerate(segments.expand(query.shape[0], -1)):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        pieces = zip(*(part[row : row + 1].split(lengths, dim=2) for part in (query, key, value)), strict=True)
        outputs = [surgery_attention(module, *piece, None, scaling=scaling, **options)[0] for piece in pieces]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None
