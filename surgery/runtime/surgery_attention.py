"""The attention function of a surgical checkpoint.

    out_h(i) = sum over j in V_h(i) of softmax_j(scale * q_i.k_j) * v_j

after projections, norms, RoPE and cache update. V_h is the set of keys that head h sees. `module.surgery_heads` gives
the visibility and the KV heads of each kind of head in the layer. Heads of one kind run together. Full heads run as
plain causal attention. Heads with sinks + window run as a band, one block of queries after another: the cost is
n * window and no [n, n] mask exists. Full heads may read only some blocks of a prompt's keys
(surgery_sparse_prefill.py). The terms of surgery_bias.py and surgery_act.py are computed from each kind's output and
log-sum-exp.

The path of one call, in the order of this file:

    surgery_attention   refuses unknown arguments, applies the gate, and runs the sequences of packed rows one by one
    _attention          splits queries and keys by kind of head; uses what the parts' `attach` put on the module
                        (`surgery_corrections`, `surgery_sparse`). Latent attention takes another way from here
                        (`surgery_latent`), and so do heads whose keys something chooses (`surgery_keepers`): a policy
                        of eviction, which works the call off in pieces, or a reader
    _attend             the heads of one kind: sparse prefill, or the real keys; then the corrections
    of_token, of_prompt by a kernel: one token and all kinds of heads, a prompt and one kind (surgery_kernels.py)
    _on_keys, _block    by PyTorch: keys in consecutive slots, as a full store or a ring holds them
    _on_survivors       keys in slots that differ from KV head to KV head, once a policy has dropped some; then those
                        that heads of a row keep beside them (surgery_kv_archive.py)

The mask: `generate` gives [batch, length]. Transformers passes it to `surgery_mask` (surgery_visibility.py), once for
each kind of layer. `surgery_mask` returns None (no padding) or bool [batch, N] (True: a real token). Where no mask was
given and positions start again, it returns long [batch, N], the number of each token's sequence in a packed row. The
result arrives here as `attention_mask`. `seen_keys` combines it with the heads' visibility, block by block, so that no
[n, n] mask exists. The cache does not know the mask.

A method that drops keys from the cache is a policy in one file; surgery_kv_policy.py describes how to write one.

The second half of this file computes one softmax over some keys, with its log-sum-exp: by PyTorch's attention, or
written out where that does not give it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .surgery_kernels import of_prompt, of_token
from .surgery_stores import KeyValues, Scoring, uncached
from .surgery_visibility import HeadKinds, bias, for_groups, seen_keys, unpadded

BLOCK = 128  # queries of a band that share one slice of keys
LONG, SHORTEST = 4096, 512  # from LONG keys on, one query reads them in splits of at least SHORTEST, for the threads
# Tensors that reach an attention function and do not change what it computes. Others are refused.
IGNORED = {"position_ids", "labels", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k"}


def surgery_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of one layer, every head with its own visibility.

    Args:
        module: attention module that carries `surgery_heads`, a `HeadKinds`.
        query: [batch, heads, n, head_dim].
        key, value: [batch, KV heads, N, head_dim], or what `SurgeryLayer.update` returned.
        attention_mask: the result of `surgery_mask`: None, bool [batch, N] (True: a real token), or long [batch, N],
            the number of each token's sequence in a packed row.
        scaling: factor on q.k. `softcap`, `s_aux` and `sliding_window` are honoured.

    Returns:
        [batch, n, heads, head_dim], and None in place of the weights, which are never held.

    Raises:
        ValueError: a 4-D mask, dropout, a request for attention weights, or an unknown argument.
    """
    options = _options(kwargs)
    if dropout and module.training:
        raise ValueError(
            "a surgical model has no attention dropout: load it with from_pretrained(..., attention_dropout=0.0) "
            "(GPT-2: attn_pdrop=0.0) to train it"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("a surgical model takes a mask [batch, length] of real tokens, not one of 4 dimensions")
    packed = attention_mask is not None and attention_mask.dtype == torch.long
    call = getattr(module, "surgery_call", None)  # the state of the layer's gate, if it has one
    if call is not None and call.on is not None and attention_mask is None:
        out = call.gathered(module, query, key, value, scaling, options)
        if out is not None:
            return out, None
    on = None if packed or call is None or not isinstance(call.on, torch.Tensor) else call.on
    attend = _by_segment if packed else _attention
    gates = None if call is None or not getattr(module, "surgery_keepers", None) else call.gates
    out = attend(module, query, key, value, attention_mask, scaling, options | {"on": on, "gates": gates})
    return out if call is None or call.gates is None else out * call.gates[..., None], None


def _attention(module, query, key, value, attention_mask, scaling, options) -> torch.Tensor:
    """Attention [batch, n, heads, head_dim] without the gate, for rows that hold one sequence each.

    `options["on"]`: bool [batch, n, heads], the rows that the gate needs; the others are arbitrary. None: all.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (latent := getattr(module, "surgery_latent", None)) is not None:
        vectors, rotated = (key[0].keys, key[0].values) if isinstance(key, list) else (key, value)
        return latent(module, query, vectors, rotated, attention_mask, scale)
    kinds: HeadKinds = module.surgery_heads
    if isinstance(key, list):
        views = key
    else:
        new = zip(kinds.visibilities, kinds.split_keys(key), kinds.split_keys(value), strict=True)
        views = [uncached(visibility, keys, values) for visibility, keys, values in new]
    scoring = Scoring(attention_mask, _pads(attention_mask), scale, options["softcap"])
    queries, terms = kinds.split_queries(query), _terms(module, kinds, options)
    for view in views:
        if view.visibility.sinks:
            view.settle_sinks(scoring.pad)
    if keepers := getattr(module, "surgery_keepers", None):
        attend = partial(_attend, made=None, scoring=scoring)
        outputs = [
            keepers[keeper].attend(module, kind, query, view, own, scoring, attend)
            if (keeper := view.visibility.keeper)
            else attend(query, view, own)
            for kind, (query, view, own) in enumerate(zip(queries, views, terms, strict=True))
        ]
        return kinds.join(outputs)
    token = of_token(kinds, query, views, scoring, any(each.with_lse for each in terms))
    made = [None] * len(views) if token is None else zip(*map(kinds.split_queries, token), strict=True)
    outputs = [_attend(*each, scoring) for each in zip(queries, views, terms, made, strict=True)]
    return kinds.join(outputs)


def _pads(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The number of slots before each row's first real token, N for a row without one."""
    return None if mask is None else mask.int().argmax(dim=1).masked_fill(~mask.any(dim=1), mask.shape[1])


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


class _Terms(NamedTuple):
    """What the heads of one kind have besides their visibility.

    Attributes:
        sink: [heads], logit of the base's own learned sink (`s_aux`), or None.
        sparse: a `surgery_sparse_prefill.Sparse`, or None.
        corrections: the parts' corrections of output and log-sum-exp, applied in order (e.g. `surgery_bias.Terms`).
        on: bool [batch, n, heads], the rows that the gate needs; None: all are needed.
        work: a `surgery_gated_compute.Work` that counts multiply-adds, or None.
        observe: called as observe(query, view, out, lse) with the result of the corrections, or None.
        gates: [batch, n, heads], 0 for heads that are off, where something chooses keys; or None.
    """

    sink: torch.Tensor | None
    sparse: object | None
    corrections: list
    on: torch.Tensor | None
    work: object | None
    observe: Callable | None = None
    gates: torch.Tensor | None = None

    @property
    def with_lse(self) -> bool:
        """Whether the log-sum-exp is needed."""
        return bool(self.corrections) or self.sink is not None or self.observe is not None

    def part(self, begin: int, end: int) -> _Terms:
        """The terms of some of a call's queries."""
        on, gates = (None if each is None else each[:, begin:end] for each in (self.on, self.gates))
        return self._replace(on=on, gates=gates)


def _terms(module, kinds: HeadKinds, options: dict) -> list[_Terms]:
    """The terms of each kind of a module's heads in a call."""
    nothing, sinks, on = [None] * len(kinds.visibilities), options["s_aux"], options["on"]
    made = [make(module, kinds) for make in getattr(module, "surgery_corrections", {}).values()]
    corrections = [[each for each in kind if each is not None] for kind in zip(*made, strict=True)]
    sinks = nothing if sinks is None else [logits[0] for logits in kinds.split_queries(sinks[None])]
    on = nothing if on is None else [each.mT for each in kinds.split_queries(on.mT)]
    gates = options["gates"]
    gates = nothing if gates is None else [each.mT for each in kinds.split_queries(gates.mT)]
    sparse, work = getattr(module, "surgery_sparse", None) or nothing, getattr(module, "surgery_work", None)
    each = zip(sinks, sparse, corrections or [[] for _ in nothing], on, gates, strict=True)
    return [_Terms(*terms, work, gates=own) for *terms, own in each]


def _attend(query, view: KeyValues, terms: _Terms, made: tuple | None, scoring: Scoring) -> torch.Tensor:
    """Attention of the heads of one visibility to the keys of a view.

    Args:
        query: [batch, heads, n, head_dim]; the result has this shape, too.
        made: output and log-sum-exp before the corrections, where a kernel has computed them; or None.
    """
    sink, sparse, corrections, on, work, observe, _ = terms
    scoring, with_lse = scoring._replace(sink=sink), terms.with_lse or view.archive is not None
    if sparse is not None and sparse.applies(query.shape[2], view.end):
        rest = scoring.mask, scoring.scale, scoring.softcap
        out, lse, view.read = sparse.attend(query, view.keys, view.values, *rest, work)
    else:
        ran = None  # bool [batch, n, heads], the rows that were computed; None: all
        if made is None and (found := of_prompt(query, view, scoring, with_lse, on)) is not None:
            out, lse, ran = found
        else:
            by_pytorch = _on_keys if view.slots is None else _on_survivors
            out, lse = made or by_pytorch(query, view, scoring, with_lse)
            if view.archive is not None:
                attend = partial(_under_mask, scoring=scoring, with_lse=True, empty_rows=True)
                out, lse = view.archive.join(query, view.keys.shape[1], out, lse, attend)
        if work is not None:
            work.add_seen(view, query, ran)
    for correction in corrections:
        out, lse = correction.apply(out, lse, query, view, scoring)
    if observe is not None:
        observe(query, view, out, lse)
    if sink is not None:
        out, lse = add_keys(out, lse, sink.to(lse.dtype)[:, None, None].expand(*lse.shape, 1))
    return out.to(query.dtype) if with_lse else out


def _on_keys(query, view: KeyValues, scoring: Scoring, with_lse: bool) -> tuple:
    """Attention to the real keys: the output, and its log-sum-exp [batch, heads, n] with `with_lse`, else None."""
    mask, scale, softcap = scoring.mask, scoring.scale, scoring.softcap
    batch, heads, length, size = query.shape
    kv_heads, visibility = view.keys.shape[1], view.visibility
    plain = softcap is None and mask is None and not (with_lse and written_out(query, view.keys, view.values))
    if plain and length == batch == 1 and view.end >= LONG and _splits_pay(query, view):
        return _attend_in_splits(query, view.keys, view.values, scale)
    if plain and visibility.window is None and view.start == 0 and (length == view.end or length == 1):
        return fused(query, view.keys, view.values, scale, with_lse, causal=length > 1)
    if plain and view.sinks_and_ring is not None and visibility.limit is None:
        return fused(query, *view.sinks_and_ring, scale, with_lse)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, size)
    first, lead, step, blocks = view.end - length, 0, BLOCK, []
    if plain and first == 0 and visibility.window is not None:  # the first `window` queries see back to the beginning
        lead = min(length, visibility.window)
        begin = (tensor[:, :, :lead] for tensor in (query, view.keys, view.values))
        out, lse = fused(*begin, scale, with_lse, causal=True)
        shape = (*grouped.shape[:3], lead)
        blocks = [(out.reshape(*shape, size), lse.reshape(shape) if with_lse else None)]
        step = BLOCK if length > 2 * (visibility.window + visibility.sinks) else max(length - lead, 1)
    blocks += [
        _block(grouped[:, :, :, i : i + step], view, first + i, scoring, with_lse) for i in range(lead, length, step)
    ]
    outs, lses = zip(*blocks, strict=True)
    out = (outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)).reshape(query.shape)
    return out, torch.cat(lses, dim=3).reshape(query.shape[:3]) if with_lse else None


def _block(query, view: KeyValues, first: int, scoring: Scoring, with_lse: bool) -> tuple:
    """Attention of one block of queries [batch, KV heads, group, b, head_dim]; the first query is in slot `first`."""
    (group, length), mask = query.shape[2:4], scoring.mask
    visibility, device, end = view.visibility, query.device, first + length
    low = view.start if visibility.window is None else max(view.start, first - visibility.window + 1)
    # The sinks are read from their own buffer, not from their place among the keys.
    separate_sinks = visibility.sinks > 0
    if view.ring:
        keys, values = view.keys, view.values
    else:
        if mask is None and view.start == 0 and low <= max(visibility.sinks, length):
            low, separate_sinks = 0, False
        keys, values = (tensor[:, :, low - view.start : end - view.start] for tensor in (view.keys, view.values))
    if separate_sinks:
        keys = torch.cat([view.sink_keys, keys], dim=2)
        values = torch.cat([view.sink_values, values], dim=2)
    if mask is None and visibility.window is not None and not view.ring:
        # Blocks beyond sinks + window share one mask, unless the base's own window (`limit`) may end before the sinks.
        reusable_mask = separate_sinks and visibility.limit is None
        shift = max(low - visibility.sinks - 1, 0) if reusable_mask else 0
        seen = unpadded(
            visibility, first - shift, length, low - shift, separate_sinks, group, dtype=query.dtype, device=device
        )
    else:
        key_slots = view.store.slots(device) if view.ring else torch.arange(low, end, device=device)
        slots = torch.arange(first, end, device=device)
        seen = for_groups(seen_keys(visibility, slots, key_slots, mask, scoring.pad, separate_sinks), group)
    return _under_mask(query, keys, values, seen, scoring, with_lse, empty_rows=mask is not None)


def _under_mask(query, keys, values, seen, scoring: Scoring, with_lse: bool, *, empty_rows: bool) -> tuple:
    """Attention of queries [batch, KV heads, group, b, head_dim] to the keys they see.

    `empty_rows`: some queries may see no key.
    """
    rows = query.flatten(2, 3)
    if scoring.softcap is None and not (with_lse and written_out(rows, keys, values)):
        out, lse = fused(rows, keys, values, scoring.scale, with_lse, seen=seen)
    else:
        out, lse = explicit(rows, keys, values, seen, scoring.scale, scoring.softcap, with_lse)
    if empty_rows and seen is not None:  # rows of padding see nothing: their output is zero, never NaN
        empty = ~seen.any(dim=-1)
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, -torch.inf) if with_lse else None
    return out.reshape(query.shape), lse.reshape(query.shape[:4]) if with_lse else None


def _on_survivors(query, view: KeyValues, scoring: Scoring, with_lse: bool) -> tuple:
    """`_on_keys` for full heads from whose cache a policy has dropped keys, which differ from KV head to KV head."""
    mask, scale, softcap = scoring.mask, scoring.scale, scoring.softcap
    (batch, _, length, size), kv_heads = query.shape, view.keys.shape[1]
    plain = softcap is None and mask is None and not (with_lse and written_out(query, view.keys, view.values))
    if plain and length == 1 and not view.gaps:  # the newest token sees all
        return fused(query, view.keys, view.values, scale, with_lse)
    grouped, first, blocks = query.reshape(batch, kv_heads, -1, length, size), view.end - length, []
    real = view.slots >= 0  # [batch, KV heads, kept]
    if mask is not None:
        real = real & mask[:, None].expand(-1, kv_heads, -1).gather(2, view.slots.clamp(min=0))
    for begin in range(0, length, BLOCK):
        rows = grouped[:, :, :, begin : begin + BLOCK]
        at = torch.arange(first + begin, first + begin + rows.shape[3], device=query.device)
        seen = (view.slots[:, :, None] <= at[:, None]) & real[:, :, None]
        seen = seen.repeat(1, 1, rows.shape[2], 1)
        blocks.append(_under_mask(rows, view.keys, view.values, seen, scoring, with_lse, empty_rows=True))
    outs, lses = zip(*blocks, strict=True)
    lse = torch.cat(lses, dim=3).reshape(query.shape[:3]) if with_lse else None
    return torch.cat(outs, dim=3).reshape(query.shape), lse


def _splits_pay(query, view: KeyValues) -> bool:
    """Whether one query of full heads reads its keys in splits, which needs a kernel that gives a log-sum-exp."""
    return view.visibility.window is None and not written_out(query, view.keys, view.values)


def _attend_in_splits(query, keys, values, scale) -> tuple:
    """Attention of one query of each head to all keys, which are split among the threads; a group reads its keys once.

    Args:
        query: [1, heads, 1, head_dim].
        keys, values: [1, KV heads, n, head_dim].

    Returns:
        [1, heads, 1, head_dim] and the log-sum-exp [1, heads, 1].
    """
    kv_heads, length = keys.shape[1:3]
    threads = torch.get_num_threads()
    splits = min(threads // gcd(kv_heads, threads), length // SHORTEST)
    size = length // splits
    if splits == 1:
        return fused(query, keys, values, scale, True)
    rows = query.reshape(kv_heads, 1, -1, query.shape[-1])
    key_splits = (tensor[0, :, : splits * size].unflatten(1, (splits, size)) for tensor in (keys, values))
    out, lse = fused(rows.expand(-1, splits, -1, -1), *key_splits, scale, True)
    if rest := length - splits * size:
        last, last_lse = fused(rows, *(tensor[0, :, None, -rest:] for tensor in (keys, values)), scale, True)
        out, lse = torch.cat([out, last], dim=1), torch.cat([lse, last_lse], dim=1)
    total = lse.logsumexp(1)  # [KV heads, group]
    out = (out * (lse - total[:, None]).exp()[..., None].to(out.dtype)).sum(1)
    return out.reshape(query.shape), total.reshape(query.shape[:3])


def _by_segment(module, query, key, value, segments, scaling, options):
    """Attention of packed rows: every sequence attends to itself alone, and its own first tokens are its sinks."""
    if isinstance(key, list):  # a cache that was made for this call: all its keys are new
        raise ValueError("packed rows are for training: pass use_cache=False")
    rows = []
    for row, sequence_ids in enumerate(segments.expand(query.shape[0], -1)):
        lengths = torch.unique_consecutive(sequence_ids, return_counts=True)[1].tolist()
        sequences = zip(*(tensor[row : row + 1].split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        whole = options["gates"]
        gates = [None] * len(lengths) if whole is None else whole[row : row + 1].split(lengths, dim=1)
        outputs = [
            _attention(module, *sequence, None, scaling, options | {"gates": own})
            for sequence, own in zip(sequences, gates, strict=True)
        ]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows)


# Before torch 2.10, this kernel does not know groups of query heads: it reads other memory, silently.
OLD = tuple(int(component) for component in torch.__version__.split(".")[:2]) < (2, 10)


def written_out(query, keys, values) -> bool:
    """Whether no kernel gives the log-sum-exp here. The CPU's kernel gives it, but without a gradient."""
    if query.device.type != "cpu" or not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return True
    return torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad)


def fused(query, keys, values, scale, with_lse: bool, causal: bool = False, seen=None) -> tuple:
    """Output, and log-sum-exp with `with_lse` (else None), by one kernel.

    `seen`: a mask or a bias, [batch or 1, 1, n, keys].
    """
    gqa = query.shape[1] != keys.shape[1]
    decoding = query.shape[2] == 1 and seen is None and not causal and query.device.type == "cpu"
    if decoding and gqa:
        # One query of each head: a group's heads become rows of one head, and read their keys once. 32 heads, 8 KV
        # heads, 4,000 keys, one core: 8.6 -> 3.9 ms. In bfloat16, where the kernel converts the keys for each head,
        # 19.5 -> 1.8 ms.
        rows = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
        out, lse = fused(rows, keys, values, scale, with_lse)
        return out.reshape(*query.shape[:3], -1), None if lse is None else lse.reshape(query.shape[:3])
    if decoding and query.dtype == keys.dtype == values.dtype == torch.bfloat16:  # 8 heads, 2,048 keys: 5.7 -> 0.9 ms
        return explicit(query, keys, values, None, scale, None, with_lse)
    if not with_lse:
        return sdpa(query, keys, values, attn_mask=seen, scale=scale, is_causal=causal, enable_gqa=gqa), None
    query, keys = query.to(values.dtype), keys.to(values.dtype)  # under autocast they differ
    if OLD and (group := query.shape[1] // keys.shape[1]) > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, keys, values, 0.0, causal, attn_mask=bias(seen, query.dtype), scale=scale)


def explicit(rows, keys, values, seen, scale, softcap, with_lse: bool) -> tuple:
    """Softmax written out: soft-capped scores, and a log-sum-exp with a gradient."""
    product = rows @ keys.mT
    scores = product.to(torch.promote_types(product.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        unseen = ~seen if seen.dtype == torch.bool else seen < 0
        scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
    lse = scores.logsumexp(-1) if with_lse else None
    return scores.softmax(-1).to(values.dtype) @ values, lse


def add_keys(out, lse, logits, values=None):
    """Attention to the keys that `out` attends to, and to m more. Rows that attend to nothing stay unchanged.

    Args:
        out: [..., n, d], the softmax's output.
        lse: [..., n], natural log-sum-exp of the scaled scores; -inf for a row that attends to nothing.
        logits: [..., n, m], scaled scores of the new keys.
        values: [..., m, d], or None: they have no value, and only take weight.

    Returns:
        The new output and log-sum-exp.
    """
    empty = lse == -torch.inf
    every = torch.cat([lse.masked_fill(empty, 0.0)[..., None], logits], dim=-1)
    weights = every.softmax(-1)
    added = out * weights[..., :1]
    if values is not None:
        added = added + weights[..., 1:] @ values.to(weights.dtype)
    return added.masked_fill(empty[..., None], 0.0), every.logsumexp(-1).masked_fill(empty, -torch.inf)
