"""The attention function of a surgical checkpoint, and the mask function that belongs to it.

    out_h(i) = sum over j in V_h(i) of softmax_j(scale * q_i.k_j) * v_j

after projections, norms, RoPE and cache update. V_h is read from `module.surgery_heads`: for each kind of head in the
layer its visibility and its KV heads. Heads of one kind run together: full heads as plain causal attention, heads with
sinks + window as a band, block of queries by block of queries: the cost is n * window and no [n, n] mask exists.
What is added to the scores (surgery_terms.py) follows from each part's output and log-sum-exp.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .surgery_heads import HeadKinds, Visibility
from .surgery_rows import attend, pays
from .surgery_skipping import count_whole
from .surgery_stores import KeyValues, uncached
from .surgery_terms import Terms, split_terms

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
    packed = attention_mask is not None and attention_mask.dtype == torch.long
    call = getattr(module, "surgery_call", None)  # what the gate says, where there is one
    if call is not None and call.on is not None and attention_mask is None:
        out = _gathered(module, query, key, value, scaling, options)
        if out is not None:
            return out, None
    out = (_by_segment if packed else _attention)(module, query, key, value, attention_mask, scaling, options)
    if call is not None and call.work is not None:
        count_whole(module, query, key[0].end if isinstance(key, list) else key.shape[2])
    return out if call is None or call.gates is None else out * call.gates[..., None], None


def _gathered(module, query, key, value, scaling, options) -> torch.Tensor | None:
    """Attention of the rows that the gate has on, times the gate; None where all rows must be computed."""
    if isinstance(key, list):
        key, value = key[0].keys, key[0].values
    plain = module.surgery_heads.visibilities == [Visibility()] and options == {"softcap": None, "s_aux": None}
    if not plain or module.surgery_parameters or not pays(query, key) or _written_out(query, key, value):
        return None
    return attend(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _attention(module, query, key, value, attention_mask, scaling, options) -> torch.Tensor:
    """Attention [batch, n, heads, head_dim] without the gate, of rows that hold one sequence each."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kinds: HeadKinds = module.surgery_heads
    if isinstance(key, list):
        views = key
    else:
        new = zip(kinds.visibilities, kinds.split_keys(key), kinds.split_keys(value), strict=True)
        views = [uncached(visibility, keys, values) for visibility, keys, values in new]
    pad = None if attention_mask is None else attention_mask.int().argmax(dim=1)
    terms = split_terms(module, kinds, options["s_aux"])
    parts = [
        _attend(part, view, attention_mask, pad, scale, options["softcap"], term)
        for part, view, term in zip(kinds.split_queries(query), views, terms, strict=True)
    ]
    return kinds.join(parts).transpose(1, 2).contiguous()


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


def _attend(query, view: KeyValues, mask, pad, scale, softcap, terms: Terms | None) -> torch.Tensor:
    """Heads of one visibility: query [batch, heads, n, head_dim] against a view; the result has query's shape."""
    if view.visibility.sinks:
        view.settle_sinks(pad)
    out, lse = _on_keys(query, view, mask, pad, scale, softcap, terms is not None)
    return out if terms is None else terms.apply(out, lse, query, view, pad, scale, softcap)


def _on_keys(query, view: KeyValues, mask, pad, scale, softcap, with_lse: bool) -> tuple:
    """Attention to the real keys: output, and its log-sum-exp [batch, heads, n] if it is asked for, else None."""
    batch, heads, length, size = query.shape
    kv_heads, visibility = view.keys.shape[1], view.visibility
    plain = softcap is None and mask is None and not (with_lse and _written_out(query, view.keys, view.values))
    if plain and visibility.window is None and view.start == 0 and (length == view.end or length == 1):
        return _fused(query, view.keys, view.values, scale, with_lse, causal=length > 1)
    if plain and view.whole is not None and visibility.limit is None:
        return _fused(query, *view.whole, scale, with_lse)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, size)
    first, lead, blocks, masks = view.end - length, 0, [], {}
    if plain and first == 0 and visibility.window is not None:  # up to there the window reaches back to the begin
        lead = min(length, visibility.window)
        begin = (part[:, :, :lead] for part in (query, view.keys, view.values))
        out, lse = _fused(*begin, scale, with_lse, causal=True)
        shape = (*grouped.shape[:3], lead)
        blocks = [(out.reshape(*shape, size), lse.reshape(shape) if with_lse else None)]
    blocks += [
        _block(grouped[:, :, :, i : i + BLOCK], view, first + i, mask, pad, scale, softcap, with_lse, masks)
        for i in range(lead, length, BLOCK)
    ]
    outs, lses = zip(*blocks, strict=True)
    out = (outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)).reshape(query.shape)
    return out, torch.cat(lses, dim=3).reshape(query.shape[:3]) if with_lse else None


def _block(query, view: KeyValues, first: int, mask, pad, scale, softcap, with_lse: bool, masks: dict) -> tuple:
    """One block of queries [batch, KV heads, group, b, head_dim], the first of which is in slot `first`.

    Args:
        masks: of the blocks before this one, where no row is padded: all that lie beyond sinks + window are alike.
    """
    batch, kv_heads, group, length, size = query.shape
    visibility, device = view.visibility, query.device
    if view.ring:
        keys, values, key_slots = view.keys, view.values, view.store.slots()
    else:
        low = view.start if visibility.window is None else max(view.start, first - visibility.window + 1)
        cut = slice(low - view.start, first + length - view.start)
        keys, values = view.keys[:, :, cut], view.values[:, :, cut]
        key_slots = torch.arange(low, first + length, device=device)
    if visibility.sinks:  # nearer ones are read from their own buffer
        keys = torch.cat([view.sink_keys, keys], dim=2)
        values = torch.cat([view.sink_values, values], dim=2)
    reach = first if visibility.window is None else min(first, visibility.window + visibility.sinks)
    if mask is not None or (reach, length) not in masks:
        seen = _seen(visibility, torch.arange(first, first + length, device=device), key_slots, mask, pad)
        seen = seen[:, None].repeat(1, 1, group, 1)  # the group's queries share the keys: one product for all of them
        masks[reach, length] = (seen, bool(seen.all()))
    seen, every = masks[reach, length]
    rows = query.reshape(batch, kv_heads, group * length, size)
    if softcap is None and not (with_lse and _written_out(rows, keys, values)):
        out, lse = _fused(rows, keys, values, scale, with_lse, seen=None if every else seen)
    else:
        out, lse = _explicit(rows, keys, values, seen, scale, softcap, with_lse)
    if mask is not None:  # rows of padding see nothing: zero, never NaN
        empty = ~seen.any(dim=-1)
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, -torch.inf) if with_lse else None
    return out.reshape(query.shape), lse.reshape(query.shape[:4]) if with_lse else None


def _seen(visibility, slots, key_slots, mask, pad) -> torch.Tensor:
    """Which keys, the sinks first, the queries in these slots see: bool [1 or batch, queries, sinks + keys]."""
    distance = slots[:, None] - key_slots[None, :]
    seen = (distance >= 0) & (key_slots >= 0)
    for bound in (visibility.window, visibility.limit):
        seen = seen if bound is None else seen & (distance < bound)
    seen = seen[None]  # [1 or batch, b, keys]
    if mask is not None:
        seen = seen & mask[:, None, key_slots.clamp(min=0)]
    if visibility.sinks:
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


def _written_out(query, keys, values) -> bool:
    """Whether no kernel gives the log-sum-exp here: the CPU's does, and has no gradient for it."""
    if query.device.type != "cpu" or not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return True
    return torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad)


def _fused(query, keys, values, scale, with_lse: bool, causal: bool = False, seen=None) -> tuple:
    """Output and log-sum-exp (None if it is not asked for) by one kernel; `seen` bool [batch or 1, 1, n, keys]."""
    if not with_lse:
        gqa = query.shape[1] != keys.shape[1]
        return sdpa(query, keys, values, attn_mask=seen, scale=scale, is_causal=causal, enable_gqa=gqa), None
    bias = None
    if seen is not None:
        bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, keys, values, 0.0, causal, attn_mask=bias, scale=scale)


def _explicit(rows, keys, values, seen, scale, softcap, with_lse: bool) -> tuple:
    """Softmax written out: soft-capped scores, and a log-sum-exp with a gradient."""
    product = rows @ keys.mT
    scores = product.to(torch.promote_types(product.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    lse = scores.logsumexp(-1) if with_lse else None
    return scores.softmax(-1).to(values.dtype) @ values, lse


def _by_segment(module, query, key, value, segments, scaling, options):
    """Packed rows: every sequence attends alone, and its first tokens are its sinks."""
    if isinstance(key, list):  # the cache of this call: all its keys are new
        raise ValueError("packed rows are for training: pass use_cache=False")
    rows = []
    for row, numbers in enumerate(segments.expand(query.shape[0], -1)):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        pieces = zip(*(part[row : row + 1].split(lengths, dim=2) for part in (query, key, value)), strict=True)
        outputs = [_attention(module, *piece, None, scaling, options) for piece in pieces]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows)
