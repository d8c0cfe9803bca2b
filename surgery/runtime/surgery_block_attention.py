"""Attention of a prompt to the kept blocks of keys, by PyTorch.

Key block J holds keys J * block to J * block + block - 1, and query block I holds the queries at the positions of key
block I. Positions are absolute: the n queries are the last of N tokens. A query sees the keys before it in the key
blocks that are kept for its query block.

On a CPU the keys of a list of kept blocks are gathered, and the flash kernel attends to them without a mask. Only a
query's own block needs a mask, and the own blocks of all queries are one causal product. The two outputs are merged by
their log-sum-exps. Where this kernel cannot be used (gradients, soft-capped scores, other devices without the Triton
kernel) the softmax is written out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .surgery_attention import explicit, fused, written_out

ROWS = 32  # scattered rows that attend together, to all keys up to the last row's position


def attend_blocks(query, keys, values, kept, block: int, scale: float, softcap=None) -> tuple:
    """Causal attention to the kept blocks.

    Args:
        query: [batch, heads, n, head_dim].
        keys, values: [batch, KV heads, N, head_dim], n <= N, all of real tokens.
        kept: bool [batch, KV heads or heads, query blocks, key blocks]; the first row is the query block of token
            N - n. Queries always attend to their own block, and never to later ones.
        block: tokens in a block.
        scale: factor on q.k.
        softcap: cap on the scores, or None.

    Returns:
        [batch, heads, n, head_dim] and the natural log-sum-exp [batch, heads, n].
    """
    query, keys = query.to(values.dtype), keys.to(values.dtype)  # under autocast they differ
    kept = with_own_blocks(kept, (keys.shape[2] - query.shape[2]) // block)
    run = _written_out if softcap is not None or written_out(query, keys, values) else _gathered

    rows = [run(*row, block, scale, softcap) for row in zip(query, keys, values, kept, strict=True)]
    return tuple(
        tensors[0][None] if len(tensors) == 1 else torch.stack(tensors) for tensors in zip(*rows, strict=True)
    )


def with_own_blocks(kept, first: int) -> torch.Tensor:
    """Kept blocks [batch, lists, query blocks, key blocks] with each query block's own, from number `first` on."""
    own = torch.arange(first, first + kept.shape[2], device=kept.device)[:, None]
    return kept.scatter(3, own.expand(*kept.shape[:2], -1, 1), True)


def attend_rows(query, keys, values, positions: list[int], scale: float, softcap=None) -> tuple:
    """Causal attention of some rows, which need not be neighbours, to all keys.

    Args:
        query: [batch, heads, r, head_dim], the queries of the tokens at `positions`, which ascend.
        keys, values: [batch, KV heads, N, head_dim].

    Returns:
        [batch, heads, r, head_dim] and the log-sum-exp [batch, heads, r].
    """
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    (batch, heads, _, size), kv_heads, chunks = query.shape, keys.shape[1], []
    plain = softcap is None and not written_out(query, keys, values)
    for begin in range(0, len(positions), ROWS):
        near = positions[begin : begin + ROWS]
        end, shape = near[-1] + 1, (batch, heads, len(near))
        rows = query[:, :, begin : begin + ROWS].reshape(batch, kv_heads, -1, size)
        seen = torch.arange(end) <= torch.tensor(near)[:, None]
        seen = seen.repeat(heads // kv_heads, 1)[None, None].to(query.device)
        far = rows, keys[:, :, :end], values[:, :, :end]
        out, lse = fused(*far, scale, True, seen=seen) if plain else explicit(*far, seen, scale, softcap, True)
        chunks.append((out.reshape(*shape, size), lse.reshape(shape)))
    return tuple(torch.cat(tensors, dim=2) for tensors in zip(*chunks, strict=True))


def _gathered(query, keys, values, kept, block: int, scale: float, softcap) -> tuple:
    """`attend_blocks` for one row of the batch, by the CPU's flash kernel."""
    (heads, length, size), lists = query.shape, len(kept)
    past, group = keys.shape[1] - length, heads // lists
    first, full_blocks = past // block, keys.shape[1] // block
    lead = 0 if past else _causal_rows(kept)
    if lead > 1:
        end = min(lead * block, length)
        early = fused(*(tensor[None, :, :end] for tensor in (query, keys, values)), scale, True, causal=True)
        if end == length:
            return early[0][0], early[1][0]
        late = _gathered(query[:, end:], keys, values, kept[:, lead:], block, scale, softcap)
        return tuple(torch.cat([one[0], other], dim=1) for one, other in zip(early, late, strict=True))
    out, lse = _own_blocks(query, keys, values, block, scale)
    folded = [
        tuple(
            tensor[head, : full_blocks * block].contiguous().unflatten(0, (full_blocks, block))
            for tensor in (keys, values)
        )
        for head in range(len(keys))
    ]
    for list_index, row, ids in _lists(kept, first):
        begin = max((first + row) * block - past, 0)
        end = min((first + row + 1) * block - past, length)
        low, high = int(ids[0]), int(ids[-1]) + 1
        own_rows = slice(list_index * group, (list_index + 1) * group), slice(begin, end)
        near = [
            tensor[low:high] if high - low == len(ids) else tensor.index_select(0, ids)
            for tensor in folded[list_index * len(keys) // lists]
        ]
        rows = query[own_rows].reshape(1, 1, -1, size)
        more, more_lse = fused(rows, *(tensor.view(1, 1, -1, size) for tensor in near), scale, True)
        here, here_lse = out[own_rows], lse[own_rows]
        more, more_lse = more.view(here.shape), more_lse.view(here_lse.shape)
        here.lerp_(more, torch.sigmoid(more_lse - here_lse)[..., None].to(out.dtype))
        torch.logaddexp(here_lse, more_lse, out=here_lse)
    return out, lse


def _causal_rows(kept) -> int:
    """The number of query blocks at the start of a prompt that keep all earlier blocks in every list."""
    complete = (kept | ~torch.ones_like(kept[0]).tril()).all(-1).all(0)
    return int(complete.cumprod(0).sum())


def _lists(kept, first: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (index of the list's head, row, kept key blocks before the row's own) for rows that have such blocks."""
    _, rows, columns = kept.shape
    before = torch.arange(columns, device=kept.device) < first + torch.arange(rows, device=kept.device)[:, None]
    where = (kept & before).nonzero()
    heads, query_blocks = where[:, 0], where[:, 1]
    lists, counts = torch.unique_consecutive(heads * rows + query_blocks, return_counts=True)
    for list_index, ids in zip(lists.tolist(), where[:, 2].split(counts.tolist()), strict=True):
        yield list_index // rows, list_index % rows, ids


def _own_blocks(query, keys, values, block: int, scale: float) -> tuple:
    """Every query's attention to the keys of its own block: [heads, n, head_dim] and the log-sum-exp [heads, n]."""
    length, end = query.shape[1], keys.shape[1]
    past = end - length
    lead = min(-past % block, length)  # queries of a block that began before the first query
    middle = lead + (length - lead) // block * block
    outputs = []
    if lead:
        begin, stop = past // block * block, past + lead
        seen = torch.arange(begin, stop) <= torch.arange(past, stop)[:, None]
        near = (tensor[None, :, begin:stop] for tensor in (keys, values))
        outputs.append(fused(query[None, :, :lead], *near, scale, True, seen=seen[None, None]))
    if middle > lead:
        folded = [
            tensor[:, begin : begin + middle - lead].unflatten(1, (-1, block)).transpose(0, 1)
            for tensor, begin in ((query, lead), (keys, past + lead), (values, past + lead))
        ]
        out, lse = fused(*folded, scale, True, causal=True)
        outputs.append((out.transpose(0, 1).flatten(1, 2)[None], lse.transpose(0, 1).flatten(1, 2)[None]))
    if middle < length:
        near = (tensor[None, :, -(length - middle) :] for tensor in (keys, values))
        outputs.append(fused(query[None, :, middle:], *near, scale, True, causal=True))
    out, lse = (
        outputs[0] if len(outputs) == 1 else (torch.cat(tensors, dim=2) for tensors in zip(*outputs, strict=True))
    )
    return out[0], lse[0]


def _written_out(query, keys, values, kept, block: int, scale: float, softcap) -> tuple:
    """`attend_blocks` for one row of the batch, with the softmax written out, list by list."""
    (heads, length, size), lists, end = query.shape, len(kept), keys.shape[1]
    past, group, device = end - length, heads // lists, query.device
    first, tokens, by_list = past // block, torch.arange(end, device=device), []
    for list_index, head_lists in enumerate(kept):
        by_row = []
        for row, blocks in enumerate(head_lists):
            begin, stop = max((first + row) * block, past), min((first + row + 1) * block, end)
            near = tokens[:stop][blocks.repeat_interleave(block)[:stop]]
            own_rows = slice(list_index * group, (list_index + 1) * group), slice(begin - past, stop - past)
            seen = (near <= tokens[begin:stop, None]).repeat(group, 1)
            selected = (tensor[list_index * len(keys) // lists, near] for tensor in (keys, values))
            out, lse = explicit(query[own_rows].reshape(-1, size), *selected, seen, scale, softcap, True)
            by_row.append((out.reshape(group, -1, size), lse.reshape(group, -1)))
        by_list.append([torch.cat(tensors, dim=1) for tensors in zip(*by_row, strict=True)])
    return tuple(torch.cat(tensors) for tensors in zip(*by_list, strict=True))
