"""Which blocks sparse prefill keeps: every method against its formula, written out in float64 with loops."""

import math
from fractions import Fraction

import pytest
import torch

from surgery.runtime.surgery_estimators import choose, settings_problems, with_defaults
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
        self.start, self.all_queries = start, query[batch, head]
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
                    if 0 <= column <= number:
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


def max_threshold(rows, alpha, queries="each", reduce="none", first=2, local=4):
    number = rows[0].number
    mass = [0.0] * (number + 1)
    for row in rows:
        scores = (row.queries @ torch.stack([row.mean_of(c) for c in range(number + 1)]).T * SCALE).tolist()
        logs = [math.log(len(row.keys_of(c))) for c in range(number + 1)]
        if queries == "all":
            scores = [[math.log(sum(map(math.exp, each))) for each in zip(*scores, strict=True)]]
        for vote in scores:
            for column, share in enumerate(softmax([a + b for a, b in zip(vote, logs, strict=True)])):
                mass[column] += share if column < number else 0.0
    near = range(max(number - local + 1, 0), number + 1)
    return {*range(min(first, number + 1)), *near} | {c for c in range(number) if mass[c] >= alpha * max(mass)}


def xattention(rows, stride=8, reduce="none", **rule):
    number, block = rows[0].number, rows[0].block
    mass = [0.0] * (number + 1)
    for row in rows:
        products = (row.queries @ row.keys.T * SCALE).tolist()
        for query_group in range(number * block // stride, (number + 1) * block // stride):
            scores = {}
            for key_group in range(query_group + 1):
                pairs = [(query_group * stride + stride - 1 - c, key_group * stride + c) for c in range(stride)]
                pairs = [(i, j) for i, j in pairs if row.places[0] <= i <= row.places[-1] and j <= i]
                if pairs:
                    scores[key_group] = sum(products[i - row.places[0]][j] for i, j in pairs) / len(pairs)
            for key_group, share in zip(scores, softmax([*scores.values()] or [0.0]), strict=False):
                mass[key_group * stride // block] += share
    return by_rule(mass, {0, number}, **rule)


def block_topk(rows, top, votes=0.0):
    (row,), counts = rows, {}
    means = [row.mean_of(column) for column in range(row.number)]
    for query in row.queries:
        order = sorted(range(row.number), key=lambda column: (-float(query @ means[column]), column))
        for column in order[: (top[row.head] if isinstance(top, list) else top) - 1]:
            counts[column] = counts.get(column, 0) + 1
    return {column for column, count in counts.items() if count >= votes * len(row.queries)}


def hierarchical(rows, top, representative="mean", local=1):
    (row,) = rows
    number, size = row.number, row.block

    def score(chunk):
        keys = row.keys[chunk[0] * size : chunk[1] * size]
        return float((row.queries @ (keys[len(keys) // 2] if representative == "middle" else keys.mean(0))).max())

    chunks = [(part * number // top, (part + 1) * number // top) for part in range(top)]
    chunks = [chunk for chunk in chunks if chunk[0] < chunk[1]]
    while any(end - begin > 1 for begin, end in chunks):
        halves = []
        for begin, end in chunks:
            middle = (begin + end) // 2
            halves += [half for half in ((begin, middle), (middle, end)) if half[0] < half[1]]
        chunks = sorted(sorted(halves, key=score, reverse=True)[:top])
    return {begin for begin, _ in chunks} | {*range(max(number - local + 1, 0), number + 1)}


def columns_and_diagonals(row, last):
    """Mean weight of each key, and of each distance, in the last queries."""
    columns, diagonals = torch.zeros(2, row.total, dtype=torch.float64)
    places = range(max(row.total - last, row.start), row.total)
    for i in places:
        own = (row.keys[: i + 1] @ row.all_queries[i - row.start] * SCALE).softmax(0) / len(places)
        columns[: i + 1] += own
        diagonals[: i + 1] += own.flip(0)
    return columns.tolist(), diagonals.tolist()


def crossed(row, distances):
    """Blocks with a key at one of these distances from a place of the query block."""
    begin = row.number * row.block
    return {(i - d) // row.block for d in distances for i in range(begin, begin + row.block) if i >= d}


def largest(values, count, forced=()):
    return set(sorted(range(len(values)), key=lambda n: (n not in forced, -values[n], n))[:count])


def vertical_slash(rows, vertical, slash, last=64, sinks=30, nearest=100):
    (row,) = rows
    columns, diagonals = columns_and_diagonals(row, last)
    vertical, slash = (each[row.head] if isinstance(each, list) else each for each in (vertical, slash))
    kept = {j // row.block for j in largest(columns, max(vertical, sinks), range(sinks))}
    return kept | crossed(row, largest(diagonals, max(slash, nearest), range(nearest)))


def flexprefill(rows, gamma=0.9, tau=0.1, min_budget=1024, max_budget=None):
    (row,) = rows
    size, count = row.block, -(-row.total // row.block)
    columns, diagonals = columns_and_diagonals(row, size)
    in_blocks = [[sum(values[c * size : (c + 1) * size]) for c in range(count)] for values in (columns, diagonals)]

    def estimate(queries, seen):
        mean = queries.mean(0)
        return softmax([float(mean @ row.mean_of(c)) * SCALE + math.log(len(row.keys_of(c))) for c in range(seen)])

    guess, distance = estimate(row.all_queries[-size:], count), 0.0
    for p, q in zip(guess, in_blocks[0], strict=True):
        distance += sum(x * math.log(2 * x / (p + q)) / 2 for x in (p, q) if x > 0)
    aware, chosen = math.sqrt(max(distance, 0)) < tau, []
    for values, sums in zip((columns, diagonals), in_blocks, strict=True):
        order, before, needed = sorted(values, reverse=True), 0.0, 0
        while needed < row.total and before < gamma * sum(values):
            before += order[needed]
            needed += 1
        blocks = max(0 if aware else -(-needed // size), -(-min_budget // size))
        if max_budget is not None:
            blocks = min(blocks, -(-max_budget // size))
        chosen.append(largest(sums, max(blocks, 1), {0}))
    kept = chosen[0] | {row.number - near - more for near in chosen[1] for more in (0, 1)}
    if aware:
        every = []
        for number in range(row.start // size, count):
            own = row.all_queries[max(number * size - row.start, 0) : (number + 1) * size - row.start]
            every += [(-mass, number, c) for c, mass in enumerate(estimate(own, number + 1))]
        before, rows_of = 0.0, count - row.start // size
        for mass, number, column in sorted(every):
            if before < gamma * rows_of and number == row.number:
                kept.add(column)
            before -= mass
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
    ("max_threshold", max_threshold, {"alpha": 0.3}),
    ("max_threshold", max_threshold, {"alpha": 0.6, "queries": "all", "first": 1, "local": 1}),
    ("max_threshold", max_threshold, {"alpha": 0.5, "reduce": "sum", "local": 2}),
    ("xattention", xattention, {"gamma": 0.7, "stride": 8}),
    ("xattention", xattention, {"density": 0.25, "stride": 4, "reduce": "sum"}),
    ("xattention", xattention, {"gamma": 0.5, "stride": 16}),
    ("xattention", xattention, {"gamma": 0.9, "stride": 2}),
    ("block_topk", block_topk, {"top": 2}),
    ("block_topk", block_topk, {"top": 3, "votes": 0.3}),
    ("hierarchical", hierarchical, {"top": 2}),
    ("hierarchical", hierarchical, {"top": 3, "representative": "middle", "local": 2}),
    ("vertical_slash", vertical_slash, {"vertical": 8, "slash": 5, "sinks": 2, "nearest": 3}),
    ("vertical_slash", vertical_slash, {"vertical": 1, "slash": 12, "last": 20, "sinks": 0, "nearest": 1}),
    ("flexprefill", flexprefill, {"gamma": 0.6, "tau": 0.0, "min_budget": 16}),
    ("flexprefill", flexprefill, {"gamma": 0.5, "tau": 0.25, "min_budget": 1, "max_budget": 40}),
    ("flexprefill", flexprefill, {"gamma": 0.4, "tau": 9.0, "min_budget": 0}),
]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("case", CASES, ids=[f"{name}-{settings}" for name, _, settings in CASES])
def test_kept_blocks_are_those_of_the_formula(case, shape):
    method, formula, settings = case
    *sizes, block = shape
    query, key = made(*sizes)
    assert settings_problems(method, settings, block, sizes[0]) == []
    found = choose(method, query, key, SCALE, block, settings)
    group = (
        method not in ("streaming", "tri_shape") and with_defaults(method, settings).get("reduce", "none") != "none"
    )
    expected = lists(query, key, block, lambda rows: formula(rows, **settings), group)
    if not group:  # a list for each query head is as good as one for those of a KV head, where all of them are alike
        found = found.repeat_interleave(query.shape[1] // found.shape[1], dim=1)
    assert torch.equal(found, expected)
