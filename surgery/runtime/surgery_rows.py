"""Causal attention of the query rows that a gate has on, and of no others: for full heads on a CPU.

The rows of all query heads of a KV head are gathered in the order of their tokens. The later half sees all keys before
its own first row's, in one product without a mask; what is left are two problems of half the size, down to a few rows
that need a mask. Two outputs meet by their log-sum-exps.
"""

from __future__ import annotations

import torch

from .surgery_heads import Visibility, slices
from .surgery_softmax import fused, written_out

# Both from the times of one block of SmolLM2's shape (examples/benchmarks/bench_gates.py).
LEAF = 384  # gathered query rows that attend together under a mask
# How many query rows the kernel gives a thread at a time, and from how many rows on. What is not a multiple of it for
# all threads leaves some of them without work.
SHARES = ((768, 256), (0, 64))
DECODE_KEYS = 2048  # keys from which a single token leaves KV heads unread that it has no use for


def pays(query, keys) -> bool:
    """Whether attention of these queries is done for the heads that are on alone, where `Call.on` says which."""
    return query.shape[2] > 1 or keys.shape[2] >= DECODE_KEYS


def gathered(module, query, key, value, scaling, options) -> torch.Tensor | None:
    """Attention of the rows that the gate has on, times the gate; None where all rows must be computed."""
    if isinstance(key, list):
        key, value = key[0].keys, key[0].values
    plain = module.surgery_heads.visibilities == [Visibility()] and options == {"softcap": None, "s_aux": None}
    plain = plain and (getattr(module, "surgery_sparse", None) is None or query.shape[2] == 1)
    if not plain or module.surgery_parameters or not pays(query, key) or written_out(query, key, value):
        return None
    return attend(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)


def attend(module, query, keys, values, scale) -> torch.Tensor | None:
    """Causal attention of the rows that are on, times their gates.

    Args:
        query: [batch, heads, n, head_dim]; keys, values: [batch, KV heads, N, head_dim], the last n of them of the
            queries' own tokens. No padding.

    Returns:
        [batch, n, heads, head_dim], 0 where a head is off; None for a token of which no key can be left unread.
    """
    call, (batch, heads, length, size) = module.surgery_call, query.shape
    if isinstance(call.on, list):
        return _attend_token(module, query, keys, values, scale)
    past, out, pairs = keys.shape[2] - length, query.new_zeros(batch, length, heads, size), 0
    group = heads // keys.shape[1]
    for row in range(batch):
        by_token, gates = query[row].transpose(0, 1).reshape(-1, size), call.gates[row].flatten()
        for kv_head in range(keys.shape[1]):
            first = kv_head * group
            token, head = call.on[row, :, first : first + group].nonzero(as_tuple=True)
            if not len(token):
                continue
            here, place = (slice(row, row + 1), slice(kv_head, kv_head + 1)), token * heads + head + first
            rows = by_token.index_select(0, place)
            made, lse = torch.empty_like(rows), rows.new_empty(len(rows), dtype=_lse_dtype(rows))
            pairs += _attend_rows(rows, past + token, keys[here], values[here], 0, scale, made, lse)
            out[row].view(-1, size).index_copy_(0, place, made.mul_(gates.index_select(0, place)[:, None]))
    if call.work is not None:
        whole = batch * heads * (length * past + length * (length + 1) // 2)
        call.work.add("attention", 2 * size * pairs, 2 * size * whole)
    return out


def _attend_token(module, query, keys, values, scale) -> torch.Tensor | None:
    """`attend` for one token: all heads of the KV heads that have one on, since they read the same keys.

    None where that is every KV head: then there is nothing to leave out.
    """
    call, (kv_heads, length, size) = module.surgery_call, keys.shape[1:]
    group = len(call.on) // kv_heads
    used = [head for head in range(kv_heads) if any(call.on[head * group : (head + 1) * group])]
    if len(used) == kv_heads:
        return None
    rows = query.reshape(1, kv_heads, group, size)
    out = torch.zeros_like(rows)
    for heads in slices(used) if used else ():
        near = (part[:, heads] for part in (rows, keys, values))
        out[:, heads] = fused(*near, scale, with_lse=True)[0]
    if call.work is not None:
        work = 2 * size * length * group
        call.work.add("attention", work * len(used), work * kv_heads)
    return out.reshape(query.shape).transpose(1, 2).mul_(call.gates[..., None])


def _attend_rows(query, places, keys, values, first: int, scale, out, lse) -> int:
    """Attention of some rows of a KV head's queries to the keys from `first` on.

    Args:
        query: [r, head_dim], of the tokens at `places` (long [r], not falling, from `first` on).
        keys, values: [1, 1, N, head_dim].
        out, lse: [r, head_dim] and [r], where output and log-sum-exp are put.

    Returns:
        With how many keys the rows were multiplied, all together.
    """
    count = len(query)
    if count <= LEAF:
        end = int(places[-1]) + 1
        late = torch.arange(first, end) > places[:, None]
        bias = torch.zeros(late.shape, dtype=query.dtype).masked_fill_(late, -torch.inf)
        for whole, part in zip((out, lse), _kernel(query, keys, values, first, end, scale, bias), strict=True):
            whole.copy_(part)
        return count * (end - first)
    half = count - _later_half(count)
    middle = int(places[half])
    pairs = _attend_rows(query[:half], places[:half], keys, values, first, scale, out[:half], lse[:half])
    late = query[half:], places[half:], out[half:], lse[half:]
    pairs += _attend_rows(*late[:2], keys, values, middle, scale, *late[2:])
    if middle > first:
        early, early_lse = _kernel(late[0], keys, values, first, middle, scale)
        late[2].lerp_(early, torch.sigmoid(early_lse - late[3])[:, None].to(out.dtype))
        torch.logaddexp(late[3], early_lse, out=late[3])
        pairs += (count - half) * (middle - first)
    return pairs


def _later_half(count: int) -> int:
    """How many of so many rows are the later half: what the threads share evenly, if it comes near."""
    half = count // 2
    whole = next(share for least, share in SHARES if half >= least) * torch.get_num_threads()
    even = (half + whole // 2) // whole * whole
    return even if 0 < even < count else half


def _lse_dtype(query) -> torch.dtype:
    """What the kernel gives log-sum-exps in."""
    return torch.promote_types(query.dtype, torch.float32)


def _kernel(query, keys, values, first: int, end: int, scale, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [r, head_dim] and log-sum-exp [r] of the CPU's flash attention to the keys from `first` to `end` - 1."""
    near = (part[:, :, first:end] for part in (keys, values))
    seen = None if bias is None else bias[None, None]
    out, lse = fused(query[None, None], *near, scale, with_lse=True, seen=seen)
    return out[0, 0], lse[0, 0]
