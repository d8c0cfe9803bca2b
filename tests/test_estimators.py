"""Which blocks sparse prefill keeps: every method against its formula, written out in float64 with loops."""

import math
from fractions import Fraction

import pytest
import torch

from surgery.runtime.surgery_estimators import choose, settings_problems
from tests.families import one_thread  # noqa: F401

# heads, KV heads, tokens, queries (the last of them), block
SHAPES = [
    (9, 3, 150, 150, 16),
    (9, 3, 150, 70, 16),  # begins at the edge of a block
    (4, 4, 151, 61, 16),  # begins inside one
    (8, 1, 333, 333, 64),
    (8, 1, 333, 140, 64),
    (4, 4, 400, 144, 128),
    (9, 3, 300, 299, 128),
    (9, 3, 256, 256, 32),
    (4, 2, 17, 1, 16),
    (4, 2, 16, 16, 16),
    (4, 2, 1, 1, 16),
]
SCALE = 0.4
IDS = [f"{h}-{kv}-{keys}-{queries}-{block}" for h, kv, keys, queries, block in SHAPES]


def made(heads, kv_heads, keys, queries, block=None, batch=2, size=8, seed=0, dtype=torch.float64):
    """Queries that look at some keys much more than at others; no two scores are the same."""
    generator = torch.Generator().manual_seed(seed + 1000 * keys + queries)
    query = 2 * torch.randn(batch, heads, queries, size, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, keys, size, generator=generator, dtype=torch.float64)
    key += (
        1.5
        * torch.randn(batch, kv_heads, -(-keys // 16), size, generator=generator, dtype=torch.float64)[
            :, :, torch.arange(keys) // 16
        ]
    )
    return query.to(dtype), key.to(dtype)


# The formulas. A row of a list is (batch row, head, query block); `Row` has what they read.


class Row:
    """One query block of one query head: its queries by place, the keys of its head, block by block."""

    def __init__(self, query, key, block, batch, head, number):
        start, group = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
        self.number, self.block, self.total, self.head = number, block, key.shape[2], head
        places = range(max(number * block, start), min((number + 1) * block, self.total))
        self.places, self.queries = list(places), query[batch, head, places.start - start : places.stop - start]
        self.keys = key[batch, head // group]

    def keys_of(self, column):
        return self.keys[column * self.block : (column + 1) * self.block]

    def mean_of(self, column):
        return self.keys_of(column).sum(0) / len(self.keys_of(column))


def lists(query, key, block, kept_of, group=False):
    """Bool [batch, heads or KV heads, rows, columns] from the sets that `kept_of(rows of the heads)` gives."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    first, columns, size = (keys - queries) // block, -(-keys // block), heads // kv_heads
    out = torch.zeros(batch, kv_heads if group else heads, columns - first, columns, dtype=torch.bool)
    for row in range(batch):
        for place in range(out.shape[1]):
            of = range(place * size, (place + 1) * size) if group else [place]
            for number in range(first, columns):
                kept = kept_of([Row(query, key, block, row, head, number) for head in of])
                for column in {0, number, *kept}:
                    if column <= number:
                        out[row, place, number - first, column] = True
    return out


def softmax(scores):
    peak = max(scores)
    powers = [math.exp(score - peak) for score in scores]
    return [power / sum(powers) for power in powers]


def by_rule(mass, forced, gamma=None, density=None, alpha=None):
    """Of masses of the blocks 0 to the diagonal one."""
    order = sorted(range(len(mass)), key=lambda column: (column not in forced, -mass[column], column))
    if density is not None:
        return {*order[: math.ceil(Fraction(str(density)) * len(mass))], *forced}
    if alpha is not None:
        return {column for column in order if mass[column] >= alpha * max(mass)} | forced
    kept, before = set(forced), 0.0
    for column in order:
        if gamma >= 1 or before < gamma * sum(mass):
            kept.add(column)
        before += mass[column]
    return kept


def pooled(rows, queries="each", reduce="sum", similarity=None, local=1, **rule):
    number, totals, unlike = rows[0].number, [], set()
    for column in range(number + 1) if similarity is not None else []:
        units = torch.stack([key / key.norm() for key in rows[0].keys_of(column)])
        if float((units @ units.T).mean()) < similarity:
            unlike.add(column)
    weighed = [column for column in range(number + 1) if column not in unlike]
    for row in rows if weighed else []:
        logs = [math.log(len(row.keys_of(column))) for column in weighed]
        scores = (row.queries @ torch.stack([row.mean_of(column) for column in weighed]).T * SCALE).tolist()
        if queries == "mean":
            scores = [[sum(each) / len(scores) for each in zip(*scores, strict=True)]]
        elif queries == "all":
            scores = [[math.log(sum(map(math.exp, each))) for each in zip(*scores, strict=True)]]
        own = [0.0] * (number + 1)
        for vote in scores:
            for column, share in zip(weighed, softmax([a + b for a, b in zip(vote, logs, strict=True)]), strict=True):
                own[column] += share
        totals.append(own)
    mass = [(max if reduce == "max" else sum)(each) for each in zip(*totals or [[0.0] * (number + 1)], strict=True)]
    return by_rule(mass, {0, *range(max(number - local + 1, 0), number + 1)} | unlike, **rule)


def streaming(rows, sinks=128, window=4096, last=0):
    (row,) = rows
    sinks, window = (each[row.head] if isinstance(each, list) else each for each in (sinks, window))
    begin, kept = row.number * row.block, set()
    if last and any(place >= row.total - last for place in range(begin, begin + row.block)):
        return set(range(row.number + 1))
    for place in range(begin, begin + row.block):  # of the whole block, also where a chunk has a part of it
        kept |= {j // row.block for j in range(place + 1) if j < sinks or place - j < window}
    return kept


CASES = [
    ("pooled", pooled, {"gamma": 0.6}),
    ("pooled", pooled, {"gamma": 0.9, "queries": "all"}),
    ("pooled", pooled, {"gamma": 0.8, "queries": "mean", "reduce": "max"}),
    ("pooled", pooled, {"density": 0.3, "reduce": "none", "local": 2}),
    ("pooled", pooled, {"density": 0.1, "reduce": "max", "queries": "all"}),
    ("pooled", pooled, {"alpha": 0.2}),
    ("pooled", pooled, {"gamma": 0.5, "similarity": 0.65}),
    ("pooled", pooled, {"gamma": 0.5, "similarity": 0.99, "reduce": "none"}),
    ("streaming", streaming, {"sinks": 4, "window": 40}),
    ("streaming", streaming, {"sinks": 20, "window": 1}),
    ("tri_shape", streaming, {"sinks": 1, "window": 17, "last": 20}),
]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("case", CASES, ids=[f"{name}-{settings}" for name, _, settings in CASES])
def test_kept_blocks_are_those_of_the_formula(case, shape):
    method, formula, settings = case
    *sizes, block = shape
    query, key = made(*sizes)
    assert settings_problems(method, settings, block, sizes[0]) == []
    found = choose(method, query, key, SCALE, block, settings)
    group = found.shape[1] == key.shape[1]
    expected = lists(query, key, block, lambda rows: formula(rows, **settings), group and method == "pooled")
    if method in ("streaming", "tri_shape"):
        found = found.repeat_interleave(expected.shape[1] // found.shape[1], dim=1)
    assert torch.equal(found, expected)
