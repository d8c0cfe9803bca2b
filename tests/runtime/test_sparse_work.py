"""What sparse prefill computes and no more: the rows that are estimated, the keys that are read, and their count."""

from __future__ import annotations

import pytest
import torch
from dense import batch, chunked, given, sparse_rows
from families import one_thread  # noqa: F401 (a fixture)
from sparse import BLOCK, LENGTH, NARROW, PADS, base_of, draw, ends, sparsened, written_out
from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

from surgery.runtime import surgery_block_attention as executor
from surgery.runtime import surgery_sparse_prefill as prefill
from surgery.runtime.surgery_estimators import choose, estimator_names
from surgery.runtime.surgery_gated_compute import counted
from surgery.runtime.surgery_sparse_prefill import DENSE, Sparse

SETTINGS = {
    "pooled": {"density": 0.3},
    "sampled": {"gamma": 0.6, "every": 8},
    "streaming": {"sinks": 1, "window": 20},
    "tri_shape": {"sinks": 1, "window": 1, "last": 20},
    "vertical_slash": {"vertical": 4, "slash": 4, "sinks": 1, "nearest": 1},
    "flexprefill": {"gamma": 0.4, "min_budget": 16},
    "xattention": {"gamma": 0.5, "stride": 4},
    "block_topk": {"top": 2},
    "max_threshold": {"alpha": 0.6, "local": 1},
    "hierarchical": {"top": 2},
    "by_head": {"patterns": [{"method": "pooled", "gamma": 0.5}, {"method": "streaming", "window": 1}] * 3},
}
WHERE = [  # n, N, dense_below, last_rows_dense
    (150, 150, 0, 0), (150, 150, 70, 0), (150, 150, 64, 17), (160, 160, 0, 20), (100, 150, 32, 0), (90, 150, 128, 5),
    (150, 150, 150, 0), (150, 150, 0, 150), (40, 150, 144, 0),
]  # fmt: skip


def looks(n: int, length: int, dtype=torch.float64):
    """Queries that look at some blocks of keys much more than at others."""
    query, key = 2 * draw(0, 1, 6, n, 8, dtype=dtype), draw(1, 1, 3, length, 8, dtype=dtype)
    return query, key + 1.5 * draw(2, 1, 3, -(-length // 16), 8, dtype=dtype)[:, :, torch.arange(length) // 16]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", estimator_names())
@torch.no_grad()
def test_rows_that_are_not_estimated_change_nothing_for_the_others(method, where):
    """The rule, on the choice made for all rows at once."""
    n, length, below, last = where
    query, key = looks(n, length)
    found = Sparse(method, BLOCK, below, last, None, SETTINGS[method]).kept(query, key, 0.4)[0]
    every = choose(method, query, key, 0.4, BLOCK, SETTINGS[method])[0]
    every = every.repeat_interleave(6 // len(every), 0)
    found, first = found.repeat_interleave(6 // len(found), 0), (length - n) // BLOCK
    some = False
    for head in range(6):
        for row in range(found.shape[1]):
            own = first + row
            begin, end = own * BLOCK, (own + 1) * BLOCK
            dense = begin < length - n or end > length or end <= below or end > length - last
            some |= not dense
            dense = dense or int(every[head, row].sum()) > DENSE * (own + 1)
            wanted = [column <= own and (dense or bool(every[head, row, column])) for column in range(every.shape[2])]
            assert found[head, row].tolist() == wanted, (head, row)
    assert some == (where in WHERE[:6]), "the case has no sparse row, or has one"


def test_only_rows_that_may_be_sparse_are_estimated(monkeypatch):
    seen = []

    def record(method, query, key, *others):
        seen.append((query.shape[2], key.shape[2]))
        return choose(method, query, key, *others)

    monkeypatch.setattr(prefill, "choose", record)
    for n, length, below, last in WHERE:
        Sparse("pooled", BLOCK, below, last, None, {"density": 0.3}).kept(*looks(n, length), 0.4)
    assert seen == [(144, 144), (80, 144), (64, 128), (128, 128), (80, 144), (16, 144)]


@pytest.mark.parametrize("lead", [2, 5, 10])
@pytest.mark.parametrize("length", [150, 160])
@torch.no_grad()
def test_leading_rows_that_read_all_are_one_causal_product(lead, length, monkeypatch):
    parts = [draw(i, 2, heads, length, 8) for i, heads in enumerate((6, 3, 3))]
    kept = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(3)) < 0.3
    kept[:, :, :lead] = True
    kept[:, :, lead:, 1] = False
    want, want_lse = written_out(*parts, kept, BLOCK, 0.3)
    calls, fused = [], executor.fused
    monkeypatch.setattr(executor, "fused", lambda *args, **more: calls.append(args[0].shape) or fused(*args, **more))
    out, lse = executor.attend_blocks(*parts, kept, BLOCK, 0.3)
    assert (out - want).abs().max() <= 1e-5
    assert (lse - want_lse).abs().max() <= 1e-5
    first = (1, 6, min(lead * BLOCK, length), 8)
    assert calls.count(first) == 2  # once for each row of the batch
    most = 1 + 2 + 3 * (10 - lead)  # that product, the own blocks, and a product for each list
    assert len(calls) <= 2 * most


@torch.no_grad()
def test_the_kernels_lists_mean_what_the_executor_means():
    """A list without the queries' own block, a chunk that begins inside a block, and none of the later blocks."""
    for n, length in ((150, 150), (70, 150), (1, 33)):
        query, key, value = draw(0, 1, 6, n, 16), draw(1, 1, 3, length, 16), draw(2, 1, 3, length, 16)
        count = -(-length // BLOCK)
        kept = torch.rand(1, 3, count - (length - n) // BLOCK, count, generator=torch.Generator().manual_seed(3)) < 0.4
        own = torch.arange(count - kept.shape[2], count)[:, None]
        lists = BlockList.of(kept.scatter(3, own.expand(1, 3, -1, 1), True), BLOCK)  # as `Sparse.kept` gives them
        want = written_out(query, key, value, kept, BLOCK, 0.3)
        for pair in (
            executor.attend_blocks(query, key, value, kept, BLOCK, 0.3),
            block_sparse_prefill(query, key, value, lists, 0.3),
        ):
            for one, other in zip(pair, want, strict=True):
                assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("method", estimator_names())
@torch.no_grad()
def test_autocast_changes_no_choice(method):
    query, key = looks(150, 150, torch.float32)
    sparse = Sparse(method, BLOCK, 16, settings=SETTINGS[method])
    want = sparse.kept(query, key, 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse.kept(query, key, 0.4), want)


def test_training_under_autocast():
    """As Trainer does it with bf16=True."""
    model = sparsened(base_of("qwen3"), {"method": "sampled", "block": BLOCK, "every": 8, "gamma": 0.5}).train()
    ids, mask = batch(model, (0, 11), LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.requires_grad_(True)(**given(model, ids, mask), labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("delta", [None, 8])
@pytest.mark.parametrize("pads", [(0,), PADS])
@torch.no_grad()
def test_counted_pairs_are_those_of_the_blocks_that_are_read(pads, delta):
    """In one piece and in chunks, left-padded and not."""
    base = base_of("llama")
    sparse = NARROW | {"dense_below": 32, "last_rows_dense": 5} | ({"delta": delta} if delta else {})
    model = sparsened(base, sparse)
    ids, mask = batch(base, pads, LENGTH)
    for pieces in ([LENGTH], [50, 100]):
        with counted(model) as work:
            chunked(model, ids, mask, pieces)
        pairs = whole = 0
        for pad in pads:
            real, begin = [j >= pad for j in range(LENGTH)], 0
            pairs += int(sparse_rows(sparse | {"calls": ends(pieces)}, real).tril().sum())
            whole += (LENGTH - pad) * (LENGTH - pad + 1) // 2
            for end in ends(pieces) if delta else ():  # its dense rows: in whole blocks beyond 32, not the last rows
                first, last = max(begin - pad, 0), end - pad
                for block in range(10):
                    inside = block * BLOCK >= max(first, 32) and (block + 1) * BLOCK <= last - 5
                    pairs += sum(i + 1 for i in range(block * BLOCK, (block + 1) * BLOCK, delta)) if inside else 0
                begin = end
        each = 2 * 8 * 8 * 2  # scores and values, head size, heads, layers
        assert work.done == {"attention": pairs * each, "estimator": 0}
        assert work.dense == {"attention": whole * each, "estimator": 0}
    with counted(model) as work:
        pass
    assert not any(hasattr(module, "surgery_work") for module in model.modules())


@torch.no_grad()
def test_counted_estimator_is_its_matrix_products():
    model = sparsened(base_of("llama"), {"method": "pooled", "queries": "mean", "density": 0.3, "block": BLOCK})
    ids, _ = batch(model, (0,), LENGTH)
    with counted(model) as work:
        model(input_ids=ids, use_cache=False)
    assert work.done["estimator"] == 2 * 8 * 9 * 9 * 8  # layers, heads, query blocks, key blocks, head size
    assert work.done["attention"] < 0.75 * work.dense["attention"]
