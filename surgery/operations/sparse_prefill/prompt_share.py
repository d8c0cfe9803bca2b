"""The share of a prompt's keys that is read where the settings alone determine it: block_topk with `exact` (MoBA).

Every query of block I reads its own block up to itself, and as many of the I earlier blocks as it may pick. An entry
is the value of `sparse` in a layer's entry of the `surgery` block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

DEFAULT_BLOCK, DEFAULT_TOP = 128, 8  # as in the runtime
NEARLY_ALL = 0.9  # a prompt of which more than this share is read is dense in all but name


def block_of(entry: dict[str, Any]) -> int:
    """Tokens in a block."""
    return entry.get("block", DEFAULT_BLOCK)


def tops(entry: dict[str, Any]) -> list[int]:
    """How many blocks a query picks, its own among them: one number, or one for each query head."""
    top = entry.get("top", DEFAULT_TOP)
    return top if isinstance(top, list) else [top]


def dense_until(entry: dict[str, Any]) -> int:
    """The position up to which every query reads all keys before it, whatever the text."""
    block = block_of(entry)
    return max(entry.get("dense_below", 0) // block, min(tops(entry)) if entry.get("exact") else 0) * block


def share_read(entry: dict[str, Any], length: int) -> float:
    """The share of the pairs of a query and a key before it that are read, for a prompt of `length` tokens."""
    *_, (read, pairs) = _pairs(entry, length)
    return read / pairs


def last_query_reads(entry: dict[str, Any], length: int) -> float:
    """The share of a prompt's keys that its last query reads: what the paper calls 1 - sparsity."""
    block = block_of(entry)
    index, inside = divmod(length - 1, block)
    return _earlier(entry, index, length) * block / length + (inside + 1) / length


def nearly_dense_until(entry: dict[str, Any], share: float) -> int:
    """The longest prompt, in whole blocks, of which more than this share is read."""
    longest = 0
    for index, (read, pairs) in enumerate(_pairs(entry | {"last_rows_dense": 0}, None)):
        if read <= share * pairs:
            return longest
        longest = (index + 1) * block_of(entry)
    return longest


def _pairs(entry: dict[str, Any], length: int | None) -> Iterator[tuple[float, int]]:
    """After each block of queries, the pairs that are read and all pairs; without a length it never ends."""
    block, read, pairs = block_of(entry), 0.0, 0
    for index in count() if length is None else range(-(-length // block)):
        queries = block if length is None else min(block, length - index * block)
        own = queries * (queries + 1) // 2
        read += queries * _earlier(entry, index, length) * block + own
        pairs += queries * index * block + own
        yield read, pairs


def _earlier(entry: dict[str, Any], index: int, length: int | None) -> float:
    """How many earlier blocks the queries of a block read, a mean over the heads."""
    block, last = block_of(entry), entry.get("last_rows_dense", 0)
    if index < entry.get("dense_below", 0) // block or (last and length and (index + 1) * block > length - last):
        return index
    each = [min(index, top - 1) for top in tops(entry)]
    return sum(each) / len(each)
