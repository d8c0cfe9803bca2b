"""Which blocks sparse prefill keeps: every method against its formula, written out in float64 with loops."""

import importlib
import math
import sys
from fractions import Fraction

import pytest
import torch
from families import one_thread  # noqa: F401

from surgery.runtime import surgery_config
from surgery.runtime.surgery_estimators import choose, estimator, estimator_names, settings_problems, with_defaults
from surgery.runtime.surgery_sparse_prefill import PART, problem_of

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


def sampled(rows, every=32, reduce="sum", local=2, **rule):
    number, totals = rows[0].number, []
    for row in rows:
        own = [0.0] * (number + 1)
        for i in row.places:
            if (i + 1) % every == 0 or i == row.total - 1:
                weights = (row.keys[: i + 1] @ row.all_queries[i - row.start] * SCALE).softmax(0).tolist()
                for j, weight in enumerate(weights):
                    own[j // row.block] += weight
        totals.append(own)
    mass = [(max if reduce == "max" else sum)(each) for each in zip(*totals, strict=True)]
    return by_rule(mass, {0, *range(max(number - local + 1, 0), number + 1)}, **rule)


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
    ("sampled", sampled, {"gamma": 0.7, "every": 16}),
    ("sampled", sampled, {"density": 0.3, "every": 1, "reduce": "max", "local": 1}),
    ("sampled", sampled, {"alpha": 0.2, "every": 8, "reduce": "none"}),
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


# What holds for all of them.

EVERY = list({method: (method, settings) for method, _, settings in CASES}.values())
NAMES = [method for method, _ in EVERY]
IDENTITY = {
    "pooled": [{"gamma": 1}, {"density": 1.0}, {"alpha": 0.0}],
    "streaming": [{"sinks": 0, "window": 10**6}, {"sinks": 10**6, "window": 1}],
    "tri_shape": [{"window": 10**6}, {"sinks": 0, "window": 1, "last": 10**6}],
    "vertical_slash": [{"vertical": 10**6, "slash": 0, "nearest": 0}, {"vertical": 0, "slash": 10**6}],
    "flexprefill": [{"gamma": 1.0, "min_budget": 0}, {"gamma": 0.1, "min_budget": 10**6}],
    "xattention": [{"gamma": 1.0}, {"density": 1}, {"alpha": 0}],
    "sampled": [{"gamma": 1.0, "every": 16}, {"density": 1, "every": 8}, {"alpha": 0, "every": 4}],
    "block_topk": [{"top": 10**6}],
    "max_threshold": [{"alpha": 0.0}],
    "hierarchical": [{"top": 40}],
}


def test_every_method_is_tested():
    assert set(NAMES) == set(IDENTITY) == set(estimator_names()) - {"by_head"}


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("method", NAMES)
def test_settings_that_change_nothing_keep_every_causal_block(method, shape):
    *sizes, block = shape
    query, key = made(*sizes)
    query[:, :, -1] *= 500  # shares of nothing at all count as well
    first, columns = (key.shape[2] - query.shape[2]) // block, -(-key.shape[2] // block)
    causal = torch.tensor([[column <= row for column in range(columns)] for row in range(first, columns)])
    for settings in IDENTITY[method]:
        assert settings_problems(method, settings, block, sizes[0]) == []
        found = choose(method, query, key, SCALE, block, settings)
        assert torch.equal(found, causal.expand_as(found)), settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "settings"), EVERY, ids=NAMES)
def test_first_and_diagonal_blocks_are_kept_and_later_ones_never(method, settings, dtype):
    """Also with one enormous query, one enormous key, and nothing but zeros."""
    query, key = made(9, 3, 150, 70, dtype=dtype)
    query[0, 0, 5], key[0, 1, 100], query[1, 5] = 1e4, -1e4, 0
    found = choose(method, query, key, SCALE, 16, settings)
    assert found.dtype == torch.bool
    assert found.shape == (2, found.shape[1], 5, 10)
    assert found.shape[1] in (3, 9)
    assert found[..., 0].all()
    for row in range(found.shape[2]):
        assert found[:, :, row, 5 + row].all()
        assert not found[:, :, row, 6 + row :].any()
    assert torch.equal(found, choose(method, query.float(), key.float(), SCALE, 16, settings)), "scores are in float32"


@pytest.mark.parametrize(("method", "settings"), EVERY, ids=NAMES)
def test_chunks_at_block_edges_keep_what_one_shot_keeps(method, settings):
    query, key = made(9, 3, 250, 250)
    whole = choose(method, query, key, SCALE, 16, settings)
    pieces = [
        choose(method, query[:, :, begin:end], key[:, :, :end], SCALE, 16, settings)
        for begin, end in ((0, 96), (96, 112), (112, 250))
    ]
    joined = torch.cat([torch.nn.functional.pad(piece, (0, 16 - piece.shape[-1])) for piece in pieces], dim=2)
    assert torch.equal(joined, whole) == estimator(method).chunk_exact


@pytest.mark.parametrize("method", NAMES)
def test_lists_are_of_query_heads_by_default_where_the_description_says_so(method):
    query, key = made(9, 3, 150, 70)
    found = choose(method, query, key, SCALE, 64, {})
    assert found.shape[1] == (9 if estimator(method).head_lists else 3)


@pytest.mark.parametrize("method", NAMES)
def test_what_reads_no_text_keeps_the_same_of_any(method):
    """Whatever the settings are; what reads text keeps another thing of another text under some."""
    texts = [made(9, 3, 150, 70, seed=seed) for seed in range(2)]
    every = [settings for name, _, settings in CASES if name == method]
    alike = [torch.equal(*(choose(method, *text, SCALE, 16, settings) for text in texts)) for settings in every]
    assert all(alike) != estimator(method).reads_text


@pytest.mark.parametrize(("method", "settings"), EVERY, ids=NAMES)
def test_a_row_alone_is_the_row_in_a_batch_and_strides_do_not_matter(method, settings):
    query, key = made(9, 3, 151, 61)
    whole = choose(method, query, key, SCALE, 16, settings)
    for row in range(2):
        assert torch.equal(choose(method, query[row, None], key[row, None], SCALE, 16, settings)[0], whole[row])
    turned = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key))
    assert torch.equal(choose(method, *turned, SCALE, 16, settings), whole)


@pytest.mark.parametrize(("method", "settings"), EVERY, ids=NAMES)
def test_inputs_are_left_alone(method, settings):
    query, key = made(4, 2, 100, 60)
    before = query.clone(), key.clone()
    choose(method, query, key, SCALE, 16, settings)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


@pytest.mark.parametrize(("method", "settings"), EVERY, ids=NAMES)
def test_lists_of_query_heads_are_as_if_keys_were_repeated(method, settings):
    """And those of KV heads follow them, where keys are shared."""
    if "reduce" in estimator(method).defaults:
        settings = settings | {"reduce": "none"}
    query, key = made(9, 3, 150, 70)
    found = choose(method, query, key, SCALE, 16, settings)
    repeated = choose(method, query, key.repeat_interleave(3, 1), SCALE, 16, settings)
    assert torch.equal(found.repeat_interleave(9 // found.shape[1], 1), repeated)
    order = [2, 0, 1]
    heads = [3 * group + head for group in order for head in range(3)]
    moved = choose(method, query[:, heads], key[:, order], SCALE, 16, settings)
    assert torch.equal(moved, found[:, order if found.shape[1] == 3 else heads])


PIECEWISE = ["pooled", "sampled", "xattention", "block_topk", "max_threshold", "hierarchical"]


@pytest.mark.parametrize("sizes", [(9, 3, 256, 256), (9, 3, 250, 99), (4, 4, 64, 64)], ids=str)
@pytest.mark.parametrize("method", PIECEWISE)
def test_scores_made_in_pieces_give_the_same(method, sizes, monkeypatch):
    """XAttention's released code masks every key where the length is a multiple of its chunk (pad = 0)."""
    from surgery.runtime import surgery_block_selection, surgery_estimate_hierarchical

    settings = dict(EVERY)[method]
    query, key = made(*sizes)
    whole = choose(method, query, key, SCALE, 16, settings)
    for cells in (1, 2**14):
        for module in (surgery_block_selection, surgery_estimate_hierarchical):
            monkeypatch.setattr(module, "CELLS", cells)
        assert torch.equal(choose(method, query, key, SCALE, 16, settings), whole)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("pooled", {"density": 0.2}),
        ("pooled", {"gamma": 0.5, "queries": "all"}),
        ("pooled", {"gamma": 0.5, "queries": "mean"}),
        ("pooled", {"alpha": 0.5}),
        ("xattention", {"density": 0.2, "stride": 8}),
        ("sampled", {"gamma": 0.6, "every": 16}),
        ("max_threshold", {"alpha": 0.3, "local": 1, "first": 1}),
        ("block_topk", {"top": 2}),
        ("hierarchical", {"top": 2}),
        ("vertical_slash", {"vertical": 20, "slash": 2, "sinks": 1, "nearest": 1}),
        ("flexprefill", {"gamma": 0.5, "tau": 0.0, "min_budget": 32}),
        ("flexprefill", {"gamma": 0.97, "tau": 9.0, "min_budget": 16}),
    ],
    ids=str,
)
def test_a_needle_block_is_kept_by_those_that_look_at_the_keys(method, settings):
    """All queries point to one block far back; the rest is noise. streaming and tri_shape never see it."""
    generator = torch.Generator().manual_seed(5)
    query, key = (0.3 * torch.randn(2, heads, 400, 16, generator=generator) for heads in (4, 2))
    needle = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    query += 6 * needle
    key[:, :, 7 * 16 : 8 * 16] += 6 * needle
    found = choose(method, query, key, 0.25, 16, settings)
    assert found[:, :, 10:, 7].all()
    assert found.float().mean() < 0.3
    blind = choose("streaming", query, key, 0.25, 16, {"sinks": 4, "window": 20})
    assert not blind[:, :, 10:, 7].any()


# What released implementations get wrong (research of the methods), each where it would show.


@pytest.mark.parametrize("method", ["pooled", "max_threshold"])
def test_one_query_of_huge_norm_does_not_decide_for_its_block(method):
    query, key = torch.zeros(1, 1, 160, 8), torch.zeros(1, 1, 160, 8)
    key[:, :, 32:48, 0] = key[:, :, 64:80, 1] = 1.0
    query[:, :, :, 0] = 8.0  # all want block 2
    query[:, :, 150, :] = torch.tensor([0.0, 200.0, 0, 0, 0, 0, 0, 0])  # one wants block 4, and shouts
    settings = {"alpha": 0.3} | ({"local": 1, "first": 1} if method == "max_threshold" else {})
    assert choose(method, query, key, 1.0, 16, settings)[0, 0, 9, 2]
    assert not choose(method, query, key, 1.0, 16, settings | {"queries": "all"})[0, 0, 9, 2], "it would show here"


def test_flexprefill_knows_a_head_whose_pooled_shares_vanish():
    """0 * log(0 / m) is 0; as a NaN it would make the divergence no number, and the head one of columns."""
    from surgery.runtime.surgery_estimate_flexprefill import divergence

    assert divergence(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])) == 0
    assert divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(math.log(2))
    query, key = torch.zeros(1, 1, 160, 8), torch.zeros(1, 1, 160, 8)
    query[..., 0], key[..., 0], key[:, :, :16, 0] = 50.0, -50.0, 50.0  # exp(-5000) is 0
    key[:, :, 32:48, 1], query[:, :, 112:128, 1] = 200.0, 100.0  # block 7 alone looks at block 2
    settings = {"gamma": 0.95, "min_budget": 16}
    assert choose("flexprefill", query, key, 1.0, 16, settings)[0, 0, 7, 2], "only query by query this is seen"
    assert not choose("flexprefill", query, key, 1.0, 16, settings | {"tau": 0.0})[0, 0, 7, 2]


@pytest.mark.parametrize("keys", [256, 250])
@pytest.mark.parametrize("distance", [16, 40, 48, 70])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("vertical_slash", {"vertical": 1, "slash": 2, "sinks": 1, "nearest": 1}),
        ("flexprefill", {"gamma": 0.4, "tau": 0.0, "min_budget": 32, "max_budget": 32}),
    ],
    ids=["vertical_slash", "flexprefill"],
)
def test_a_diagonal_is_kept_as_both_blocks_that_it_crosses(method, settings, distance, keys):
    """At any length: bins of distances that are counted from the far end would not fit where n % block != 0."""
    place = torch.arange(keys, dtype=torch.float64)[:, None] * torch.tensor([0.31, 0.17, 0.083, 0.041]).double()
    turned = place - distance * torch.tensor([0.31, 0.17, 0.083, 0.041]).double()
    key, query = (4 * torch.cat([each.cos(), each.sin()], -1)[None, None] for each in (place, turned))
    found = choose(method, query, key, 1.0, 16, settings)
    for i in range(distance, keys):
        assert found[0, 0, i // 16, (i - distance) // 16], i


def test_xattention_scores_no_key_with_an_earlier_query():
    from surgery.runtime.surgery_estimate_xattention import antidiagonal_mass

    query, key = made(4, 2, 160, 160)
    before = antidiagonal_mass(query, key, SCALE, 16, 8)
    key[:, :, 156:] *= 50  # in the last tile on the diagonal, these meet only queries before them
    assert torch.equal(antidiagonal_mass(query, key, SCALE, 16, 8), before)
    key[:, :, 152:156] *= 50
    assert not torch.equal(antidiagonal_mass(query, key, SCALE, 16, 8)[:, :, 9], before[:, :, 9])


def test_unlike_keys_hide_a_needle_from_their_mean_and_are_kept_by_similarity():
    query, key = torch.zeros(1, 1, 320, 8), torch.zeros(1, 1, 320, 8)
    query[..., 0], key[..., 1] = 6.0, 1.0
    key[:, :, 100, 0], key[:, :, 101:104, 0] = 6.0, -6.0  # the mean points away
    assert not choose("pooled", query, key, 1.0, 16, {"density": 0.2})[0, 0, 10:, 6].any()
    assert choose("pooled", query, key, 1.0, 16, {"density": 0.2, "similarity": 0.9})[0, 0, 10:, 6].all()


def test_by_head_gives_every_head_its_own_method():
    query, key = made(9, 3, 150, 70)
    patterns = [
        {"method": "streaming", "sinks": 4, "window": 30 + head}
        if head % 3 == 0
        else {"method": "vertical_slash", "vertical": 2 + head, "slash": 3, "sinks": 1, "nearest": 1}
        if head % 3 == 1
        else {"method": "block_topk", "top": 1 + head // 3, "votes": 0.1 * (head // 5)}
        for head in range(9)
    ]
    assert settings_problems("by_head", {"patterns": patterns}, 16, 9) == []
    found = choose("by_head", query, key, SCALE, 16, {"patterns": patterns})
    formulas = {"streaming": streaming, "vertical_slash": vertical_slash, "block_topk": block_topk}

    def kept_of(rows):
        settings = dict(patterns[rows[0].head])
        return formulas[settings.pop("method")](rows, **settings)

    assert torch.equal(found, lists(query, key, 16, kept_of))


@pytest.mark.parametrize(
    ("method", "settings", "formula"),
    [
        ("streaming", {"sinks": [1, 20, 3, 4], "window": [1, 17, 33, 64]}, streaming),
        ("block_topk", {"top": [1, 2, 3, 9]}, block_topk),
        (
            "vertical_slash",
            {"vertical": [2, 4, 8, 1], "slash": [5, 1, 2, 9], "sinks": 1, "nearest": 1},
            vertical_slash,
        ),
    ],
    ids=["streaming", "block_topk", "vertical_slash"],
)
def test_a_list_is_one_setting_for_each_query_head(method, settings, formula):
    query, key = made(4, 2, 151, 61)
    assert settings_problems(method, settings, 16, 4) == []
    expected = lists(query, key, 16, lambda rows: formula(rows, **settings))
    assert torch.equal(choose(method, query, key, SCALE, 16, settings), expected)


def test_equal_scores_keep_the_earlier_block():
    query, key = torch.zeros(1, 1, 160, 8), torch.zeros(1, 1, 160, 8)
    for method, settings in [("pooled", {"density": 0.4}), ("block_topk", {"top": 4}), ("pooled", {"gamma": 0.35})]:
        assert choose(method, query, key, 1.0, 16, settings)[0, 0, 9].tolist() == [True] * 3 + [False] * 6 + [True]


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("poled", {}, "did you mean pooled"),
        (None, {}, "there is no method None"),
        ("pooled", {"gama": 0.5}, "did you mean gamma"),
        ("pooled", {"gamma": 0}, "above 0, up to 1"),
        ("pooled", {"gamma": float("nan")}, "above 0, up to 1"),
        ("pooled", {"density": 1.5}, "above 0, up to 1"),
        ("pooled", {"density": True}, "above 0, up to 1"),
        ("pooled", {"gamma": 0.5, "density": 0.5}, "gamma and density"),
        ("pooled", {"gamma": None}, "here it is none"),
        ("pooled", {"queries": "some"}, "each, all or mean"),
        ("pooled", {"local": 0}, "whole number from 1"),
        ("pooled", {"similarity": 2}, "from -1 to 1"),
        ("xattention", {"stride": 12}, "power of two"),
        ("xattention", {"stride": 128}, "not be larger than the block of 64"),
        ("sampled", {"every": 128}, "not be larger than the block of 64"),
        ("streaming", {"window": [1, 2]}, "one for each query head"),
        ("streaming", {"window": [1, 2, 3, -4]}, "one for each query head"),
        ("pooled", {"local": [1, 1, 1, 1]}, "must be a whole number"),
        ("by_head", {}, "needs patterns"),
        ("by_head", {"patterns": [{"method": "streaming"}]}, "one for each of the 4 query heads"),
        (
            "by_head",
            {"patterns": [{"method": "streaming"}] * 3 + [{"method": "streming"}]},
            "query head 3: there is no",
        ),
        ("by_head", {"patterns": [{"method": "block_topk", "top": [1]}] * 4}, "query head 0: top"),
        ("by_head", {"patterns": "all"}, "must be a list"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(method, settings, says):
    assert says in " ".join(settings_problems(method, settings, 64, 4))


@pytest.mark.parametrize("block", [0, 8, 48, 64.0, True, None])
def test_block_sizes_that_do_not_fit_are_named(block):
    said = " ".join(settings_problems("pooled", {}, block))
    assert ("power of two" in said) == (block is not None)


def test_defaults_are_right_and_a_given_rule_replaces_the_default_one():
    for method in estimator_names():
        assert (settings_problems(method, {}, 128, 9) == []) == (method != "by_head")
    assert with_defaults("pooled", {"density": 0.5})["gamma"] is None
    assert with_defaults("pooled", {"local": 2})["gamma"] == estimator("pooled").defaults["gamma"]


TOY = '''"""Sparse prefill where a block is kept if the number of its distance has the parity asked for."""

import torch

from .surgery_block_selection import Blocks
from .surgery_estimators import Estimator, Setting


def parity(query, key, scale, block: int, *, odd=False, local: int = 1, of: int | None = 2) -> torch.Tensor:
    blocks = Blocks.of(query, key, block)
    distance = blocks.distance(key.device)
    left = torch.as_tensor(odd, device=key.device).long().view(-1, 1, 1)
    kept = (distance % of == left) | blocks.forced(local=local, device=key.device)
    return (kept & blocks.causal(key.device)).expand(query.shape[0], query.shape[1], -1, -1)


ESTIMATORS = {
    "parity": Estimator(
        parity,
        chunk_exact=True,
        head_lists=True,
        reads_text=False,
        by_head=("odd",),
        settings={
            "odd": Setting("true or false", lambda value: isinstance(value, bool)),
            "of": Setting("2 or 32", lambda value: value in (2, 32), optional=True, within_block=True),
        },
    )
}
'''


@pytest.fixture
def parity(tmp_path, monkeypatch):
    """A new estimator: a file beside the others and a line of `FILES`, no more."""
    runtime, name = importlib.import_module("surgery.runtime"), "surgery_estimate_parity"
    (tmp_path / f"{name}.py").write_text(TOY)
    monkeypatch.setattr(runtime, "__path__", [*runtime.__path__, str(tmp_path)])
    monkeypatch.setitem(surgery_config.FILES, "sparse.parity", name)
    yield "parity"
    surgery_config.load_file.cache_clear()
    sys.modules.pop(f"{runtime.__name__}.{name}", None)
    vars(runtime).pop(name, None)


def test_a_new_estimator_is_a_file_and_a_line(parity):
    """It is chosen by, alone and for one of many heads; its defaults and its own setting are known."""
    query, key = made(4, 2, 151, 61)
    columns, first = 10, (151 - 61) // 16

    def expected(odd, local=1):
        return torch.tensor(
            [
                [c <= r and (c == 0 or r - c < local or (r - c) % 2 == odd) for c in range(columns)]
                for r in range(first, columns)
            ]
        )

    assert estimator_names()[-1] == parity
    assert with_defaults(parity, {"local": 2}) == {"odd": False, "local": 2, "of": 2}
    assert torch.equal(choose(parity, query, key, SCALE, 16, {})[1, 2], expected(0))
    assert torch.equal(choose(parity, query, key, SCALE, 16, {"odd": True, "local": 3})[0, 0], expected(1, 3))
    lists = choose(parity, query, key, SCALE, 16, {"odd": [True, False, False, True]})
    assert torch.equal(lists[0], torch.stack([expected(odd) for odd in (1, 0, 0, 1)]))
    patterns = [{"method": parity, "odd": head > 1} for head in range(3)] + [{"method": "block_topk", "top": 99}]
    assert settings_problems("by_head", {"patterns": patterns}, 16, 4) == []
    kept = choose("by_head", query, key, SCALE, 16, {"patterns": patterns})
    assert torch.equal(kept[0, :3], torch.stack([expected(odd) for odd in (0, 0, 1)]))
    assert torch.equal(kept[0, 3], torch.ones_like(kept[0, 3]).tril(first))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, None),
        ({"odd": True, "local": 2, "of": 32}, "of of parity is 32, and must not be larger than the block of 16"),
        ({"odd": [True, False]}, None),
        ({"odd": [True, 2]}, "odd of parity is [True, 2], and must be one for each query head, each true or false"),
        ({"odd": 1}, "odd of parity is 1, and must be true or false"),
        ({"odd": None}, "odd of parity is None, and must be true or false"),
        ({"of": None}, None),
        ({"of": 3}, "of of parity is 3, and must be 2 or 32"),
        ({"local": 0}, "local of parity is 0, and must be a whole number from 1"),
        ({"ood": True}, "parity has no setting 'ood', did you mean odd?; it has: odd, local, of"),
    ],
    ids=str,
)
def test_settings_of_a_new_estimator_are_checked_by_what_it_says(parity, settings, says):
    assert settings_problems(parity, settings, 16, 2) == ([says] if says else [])


def test_an_entry_of_a_new_estimator_is_right_and_names_its_file(parity):
    entry = {"method": parity, "block": 16, "odd": True}
    assert problem_of(entry, 4) == ""
    assert problem_of(entry | {"odd": 3}, 4) == "odd of parity is 3, and must be true or false"
    assert PART.methods({"sparse": entry}) == {"kernel.block_sparse_prefill", "kernel.estimators", "sparse.parity"}
