"""One softmax over some keys, with its log-sum-exp: by a kernel, or written out where no kernel gives it."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .surgery_masks import bias

# Before torch 2.9 at least, this kernel knows no groups of query heads, and reads other memory without an error.
OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10)


def written_out(query, keys, values) -> bool:
    """Whether no kernel gives the log-sum-exp here: the CPU's does, and has no gradient for it."""
    if query.device.type != "cpu" or not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return True
    return torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad)


def fused(query, keys, values, scale, with_lse: bool, causal: bool = False, seen=None) -> tuple:
    """Output and log-sum-exp (None if not asked for) by one kernel; seen: mask or bias [batch or 1, 1, n, keys]."""
    gqa = query.shape[1] != keys.shape[1]
    decoding = query.shape[2] == 1 and seen is None and not causal and query.device.type == "cpu"
    if decoding and gqa:
        # One query of each head: as rows of one head a group reads its keys once. 32 heads, 8 KV heads, 4,000 keys,
        # one core: 8.6 -> 3.9 ms; in bfloat16, whose keys the kernel converts for each head anew, 19.5 -> 1.8 ms.
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
    """Attention to m more keys, besides those that `out` attends to. Rows that attend to nothing stay so.

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
