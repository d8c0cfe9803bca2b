"""Sparse prefill: executors and wrappers against float64 written out, models of every family, caches, files, plans."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch
from dense import batch, chunked, dense_logits, dense_model, difference, given, random_terms
from families import OFF_THE_INTERFACE, TINY, check_both_ways_to_load, one_thread  # noqa: F401 (one_thread: a fixture)
from sparse import BLOCK, LENGTH, NARROW, PADS, base, base_of, bases, draw, ends, recipe, sparsened, written_out  # noqa: F401
from transformers import DynamicCache

import surgery as package
from surgery.errors import SurgeryError
from surgery.operations.sparse_prefill import operation
from surgery.operations.variants import own_keys
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_estimators as estimators
from surgery.runtime.surgery_block_attention import attend_blocks, attend_rows
from surgery.runtime.surgery_sparse_prefill import Sparse

FAMILIES = [name for name in TINY if name not in OFF_THE_INTERFACE and "image" not in name and name != "gemma3"]
SOME = ["llama", "qwen3", "gemma2", "gpt_oss"]


every_family = pytest.mark.parametrize("base", FAMILIES, indirect=True)
some = pytest.mark.parametrize("base", SOME, indirect=True)


# --- executors ------------------------------------------------------------------------------------------------------


SHAPES = [  # batch, heads, KV heads, n, N, head size, block, lists
    (1, 6, 3, 64, 64, 8, 16, 3),
    (2, 6, 3, 37, 50, 8, 16, 6),
    (1, 6, 2, 5, 37, 8, 16, 2),
    (1, 4, 4, 1, 33, 8, 16, 4),
    (1, 9, 3, 100, 131, 8, 32, 3),
    (1, 6, 3, 16, 64, 8, 16, 6),
    (1, 8, 1, 40, 64, 20, 16, 1),
    (1, 2, 1, 3, 3, 8, 16, 2),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_executors_against_every_pair_written_out(shape, share, softcap):
    rows, heads, kv_heads, n, length, size, block, lists = shape
    query, key, value = (
        draw(0, rows, heads, n, size),
        draw(1, rows, kv_heads, length, size),
        draw(2, rows, kv_heads, length, size),
    )
    count = -(-length // block)
    kept = (
        torch.rand(rows, lists, count - (length - n) // block, count, generator=torch.Generator().manual_seed(3))
        < share
    )
    want, want_lse = written_out(query, key, value, kept, block, 0.3, softcap)
    with torch.no_grad():
        out, lse = attend_blocks(query, key, value, kept, block, 0.3, softcap)
        strided = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value))
        again, _ = attend_blocks(*strided, kept, block, 0.3, softcap)
    assert (out - want).abs().max() <= 1e-5
    assert (lse - want_lse).abs().max() <= 1e-5
    assert (again - want).abs().max() <= 1e-5
    wide = [part.double().requires_grad_() for part in (query, key, value)]
    narrow = [part.clone().requires_grad_() for part in (query, key, value)]
    for parts, run in ((wide, written_out), (narrow, attend_blocks)):
        out, lse = run(*parts, kept, block, 0.3, softcap)
        (out.square().sum() + lse.sum()).backward()
    for one, other in zip(narrow, wide, strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype):
    query, key, value = (draw(i, 1, heads, 80, 16, dtype=dtype) for i, heads in enumerate((6, 3, 3)))
    kept = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.4
    want, want_lse = written_out(query, key, value, kept, 16, 0.25)
    out, lse = attend_blocks(query, key, value, kept, 16, 0.25)
    assert out.dtype == dtype
    assert (out - want).norm() <= 1e-2 * want.norm()
    assert (lse - want_lse).norm() <= 1e-2 * want_lse.norm()


@pytest.mark.parametrize("places", [[0], [3, 4, 40], list(range(0, 70, 1)), list(range(5, 70, 8))])
@pytest.mark.parametrize("softcap", [None, 2.0])
@torch.no_grad()
def test_rows_far_from_one_another(places, softcap):
    query, key, value = draw(0, 2, 6, 70, 8), draw(1, 2, 3, 70, 8), draw(2, 2, 3, 70, 8)
    every = torch.ones(2, 3, 5, 5, dtype=torch.bool)
    want, want_lse = written_out(query, key, value, every, 16, 0.3, softcap)
    out, lse = attend_rows(query[:, :, places], key, value, places, 0.3, softcap)
    assert (out - want[:, :, places]).abs().max() <= 1e-5
    assert (lse - want_lse[:, :, places]).abs().max() <= 1e-5


# --- which rows are sparse, and the correction ----------------------------------------------------------------------


def kept_of(sparse: Sparse, n: int, length: int) -> torch.Tensor:
    return sparse.kept(torch.zeros(1, 2, n, 4), torch.zeros(1, 1, length, 4), 1.0)[0, 0]


def test_queries_of_a_block_that_the_call_does_not_hold_read_all():
    sparse = Sparse("streaming", 16, settings={"sinks": 1, "window": 1})
    kept = kept_of(sparse, 100, 150)  # from token 50: blocks 3 (cut) to 9 (cut)
    causal = torch.ones(7, 10).tril(3).bool()
    for row in range(7):
        few = torch.zeros(10, dtype=torch.bool)
        few[[0, 3 + row]] = True
        assert torch.equal(kept[row], few if 0 < row < 6 else causal[row]), row
    assert kept_of(sparse, 15, 150).sum() == 9 + 10  # no whole block: as decoding is


def test_dense_below_last_rows_and_lists_that_keep_much():
    few = {"sinks": 1, "window": 1}
    counts = kept_of(Sparse("streaming", 16, dense_below=70, settings=few), 160, 160).sum(1).tolist()
    assert counts == [1, 2, 3, 4, 2, 2, 2, 2, 2, 2]
    counts = kept_of(Sparse("streaming", 16, last_rows_dense=17, settings=few), 160, 160).sum(1).tolist()
    assert counts == [1, 2, 3, 2, 2, 2, 2, 2, 9, 10]
    # Of 4 to 10 blocks 5 are kept where there are so many: 5 of 8 is more than 0.6, 5 of 9 is not.
    counts = kept_of(Sparse("streaming", 16, settings={"sinks": 1, "window": 49}), 160, 160).sum(1).tolist()
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8, 5, 5]
    assert kept_of(Sparse("streaming", 16, dense_below=160, settings=few), 160, 160).tril().sum() == 55


@pytest.mark.parametrize("delta", [1, 4, 16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@torch.no_grad()
def test_delta_against_its_definition(delta, softcap):
    """Row i gets what dense attention adds at the last multiple of delta, in whole sparse blocks, and nothing else."""
    sparse = Sparse(
        "streaming", 16, dense_below=40, last_rows_dense=10, delta=delta, settings={"sinks": 1, "window": 1}
    )
    n, length = 140, 150
    query, key, value = draw(0, 1, 6, n, 8), draw(1, 1, 3, length, 8), draw(2, 1, 3, length, 8)
    kept = torch.zeros(10, 10, dtype=torch.bool)
    for block in range(10):  # block 0 is cut, 1 ends by 40, 9 is cut and so late
        kept[block, [0, block]] = True
    kept[[0, 1, 2, 9]] = True
    kept[8] = True  # holds token 140
    found = [
        written_out(query, key, value, mask[None, None].expand(1, 3, -1, -1), 16, 0.3, softcap)
        for mask in (kept, torch.ones_like(kept))
    ]
    want, want_lse = (part.clone() for part in found[0])
    for position in range(48, 128):
        at, its = position - 10, position // delta * delta - 10
        want[:, :, at] += found[1][0][:, :, its] - found[0][0][:, :, its]
        want_lse[:, :, at] += found[1][1][:, :, its] - found[0][1][:, :, its]
    out, lse, _ = sparse.attend(query, key, value, None, 0.3, softcap)
    assert (out - want).abs().max() <= 1e-5
    assert (lse - want_lse).abs().max() <= 1e-5
    if delta > 1:
        assert (found[0][0] - want).abs().max() > 1e-2


@pytest.mark.parametrize("sparse", [Sparse("pooled", 16, settings={"density": 0.3}), Sparse("pooled", 16, delta=8)])
@torch.no_grad()
def test_a_row_of_a_padded_batch_is_the_row_alone_to_the_bit(sparse):
    """Padding on both sides, a row with one token, a row with none; what lies in padding is never read."""
    length, n, edges = 150, 120, [(0, 150), (11, 150), (0, 99), (149, 150), (40, 120), (0, 0)]
    query, key, value = draw(0, 6, 6, n, 8), draw(1, 6, 3, length, 8), draw(2, 6, 3, length, 8)
    mask = torch.zeros(6, length, dtype=torch.bool)
    for row, (start, stop) in enumerate(edges):
        mask[row, start:stop] = True
    key.transpose(1, 2)[~mask] = torch.nan
    value.transpose(1, 2)[~mask] = torch.nan
    out, lse, _ = sparse.attend(query, key, value, mask, 0.3, None)
    for row, (start, stop) in enumerate(edges):
        first = min(max(start, length - n), stop)
        here, before = slice(first - 30, stop - 30), stop - first
        assert (out[row, :, : first - 30] == 0).all() or before == 0
        if before:
            near = (part[row : row + 1, :, start:stop] for part in (key, value))
            alone, alone_lse, _ = sparse.attend(query[row : row + 1, :, here], *near, None, 0.3, None)
            assert torch.equal(out[row, :, here], alone[0])
            assert torch.equal(lse[row, :, here], alone_lse[0])
            assert (out[row, :, stop - 30 :] == 0).all()
        else:
            assert (out[row] == 0).all()
            assert (lse[row] == -torch.inf).all()


# --- models ---------------------------------------------------------------------------------------------------------

SAME = {
    "gamma 1": {"method": "pooled", "gamma": 1.0},
    "density 1": {"method": "pooled", "density": 1.0},
    "alpha 0": {"method": "pooled", "alpha": 0.0},
    "lists by head": {"method": "pooled", "gamma": 1.0, "reduce": "none"},
    "window": {"method": "streaming", "sinks": 0, "window": LENGTH},
    "tri-shape": {"method": "tri_shape", "sinks": 1, "window": 1, "last": LENGTH},
    "dense_below": {"method": "streaming", "sinks": 1, "window": 1, "dense_below": LENGTH},
    "last rows": {"method": "streaming", "sinks": 1, "window": 1, "last_rows_dense": LENGTH},
    "delta 1": {"method": "streaming", "sinks": 1, "window": 1, "delta": 1},
    "gamma 1, delta": {"method": "pooled", "gamma": 1.0, "delta": 8},
    "block": {"method": "streaming", "sinks": 1, "window": 1, "block": 256},
    "xattention": {"method": "xattention", "gamma": 1.0, "stride": 4},
    "sampled": {"method": "sampled", "gamma": 1.0, "every": 8},
    "flexprefill": {"method": "flexprefill", "gamma": 1.0, "min_budget": 16},
    "columns": {"method": "vertical_slash", "vertical": LENGTH, "slash": 16},
    "diagonals": {"method": "vertical_slash", "vertical": 16, "slash": LENGTH},
    "top": {"method": "block_topk", "top": 10},
    "exact": {"method": "block_topk", "top": 10, "exact": True},
    "exact, last rows": {"method": "block_topk", "top": 1, "exact": True, "last_rows_dense": LENGTH},
    "max_threshold": {"method": "max_threshold", "alpha": 0.0},
    "hierarchical": {"method": "hierarchical", "top": 10},
    "by head": {"method": "by_head", "patterns": [{"method": "pooled", "gamma": 1.0}] * 8},
}


EVEN, ODD = [BLOCK] * 9 + [6], [[50, 1, 99]]  # pieces of a prompt: of whole blocks, and others


@pytest.mark.parametrize(
    ("base", "setting"),
    [  # every setting on some families, and every family with a quarter of the settings
        (family, setting)
        for i, family in enumerate(FAMILIES)
        for j, setting in enumerate(SAME)
        if family in SOME or (i + j) % 4 == 0
    ],
    indirect=["base"],
)
@torch.no_grad()
def test_identity(base, setting):
    """Each setting that changes nothing: cached and not, a row alone and a padded batch, in pieces of every kind."""
    ids, mask = batch(base, PADS, LENGTH)
    model = sparsened(base, {"block": BLOCK} | SAME[setting])
    for rows, ways in ((slice(0, 1), ODD), (slice(None), (EVEN, *ODD, [LENGTH]))):
        part = ids[rows], mask[rows]
        want = base(**given(base, *part), use_cache=False).logits
        assert difference(model(**given(model, *part), use_cache=False).logits, want, part[1]) <= 1e-5
        for pieces in ways:
            assert difference(chunked(model, *part, pieces), want, part[1]) <= 1e-5


@every_family
@torch.no_grad()
def test_values_against_a_dense_mask(base):
    """One piece, pieces at block edges, odd pieces; left padding. Layers with a window of the base keep it."""
    ids, mask = batch(base, PADS, LENGTH)
    sparse = NARROW | {"dense_below": 32, "last_rows_dense": 5}
    model, count = sparsened(base, sparse), base.config.num_hidden_layers
    want = dense_logits(base, [{"sparse": sparse}] * count, ids, mask)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    for pieces in ([LENGTH], [48, 16, 80, 6], [50, 1, 99]):
        want = dense_logits(base, [{"sparse": sparse | {"calls": ends(pieces)}}] * count, ids, mask)
        assert difference(chunked(model, ids, mask, pieces), want, mask) <= 1e-4
    full = dense_logits(base, [{}] * count, ids, mask)
    windows = getattr(base.config.get_text_config(), "layer_types", None) is None and base.config.model_type in (
        "mistral",
        "starcoder2",
    )
    assert (difference(full, want, mask) > 1e-3) != windows, "sparse prefill changes nothing here"


@some
@torch.no_grad()
def test_pieces_at_block_edges_and_any_cache_give_what_one_piece_gives(base):
    model = sparsened(base, {"method": "pooled", "block": BLOCK, "density": 0.3, "delta": 8})
    ids, mask = batch(base, (0, 0), LENGTH)
    want = model(**given(model, ids, mask), use_cache=False).logits
    for pieces in ([BLOCK] * 9 + [6], [64, 80, 6], [144, 6], [144, *[1] * 6], [144, 4, 2]):
        assert difference(chunked(model, ids, mask, pieces), want, mask) <= 1e-5
    cache = DynamicCache()
    logits = [
        model(**given(model, ids[:, :end], mask[:, :end], begin), **{runtime.CACHE: cache}).logits
        for begin, end in ((0, 64), (64, 144), (144, 150))
    ]
    assert difference(torch.cat(logits, 1), want, mask) <= 1e-5
    dense = base(**given(base, ids, mask), use_cache=False).logits
    assert difference(want, dense, mask) > 1e-3


@some
@torch.no_grad()
def test_right_padding(base):
    model = sparsened(base, NARROW)
    ids, mask = batch(base, (0, 0, 0), LENGTH)
    mask[1, -39:] = 0
    mask[2, 10:] = 0
    want = dense_logits(base, [{"sparse": NARROW}] * 2, ids, mask)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4


@some
def test_generation(base):
    """A left-padded batch = its rows alone; beams, speculation, pieces at block edges = plain decoding."""
    model = sparsened(base, NARROW)
    ids, mask = batch(base, PADS, LENGTH)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, pad in enumerate(PADS):
        alone = model.generate(input_ids=ids[row : row + 1, pad:], attention_mask=mask[row : row + 1, pad:], **options)
        assert torch.equal(alone[0, LENGTH - pad :], made[row, LENGTH:])
    one = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    plain = model.generate(**one, **options)
    assert torch.equal(plain, model.generate(**one, **options, use_cache=False))  # token 160 would begin a block
    assert torch.equal(plain, model.generate(**one, **options, prefill_chunk_size=2 * BLOCK))
    assert torch.equal(plain, model.generate(**one, **options, prompt_lookup_num_tokens=3))
    assert torch.equal(plain, model.generate(**one, **options, assistant_model=copy.deepcopy(model)))
    beams = [model.generate(**one, **options, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2"], indirect=True)
@torch.no_grad()
def test_packed_rows_are_separate_rows(base):
    model = sparsened(base, NARROW)
    ids, _ = batch(base, (0,), LENGTH)
    lengths = (90, 1, 59)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    parts = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert difference(packed, torch.cat(parts, 1), torch.ones_like(ids)) <= 1e-5


@pytest.mark.parametrize("kind", ["gamma", "act", "act by map", "logit and value", "key and value", "stand in"])
@some
@torch.no_grad()
def test_with_a_head_split_and_terms(base, kind):
    """Full heads sparse, streaming heads a band, terms on both: the dense model's logits."""
    tensors, sinks = random_terms(base, kind, 1), 0 if kind == "stand in" else 2
    split = [{"streaming": heads, "sinks": sinks, "window": 5, "sparse": NARROW} for heads in ([1], [0, 3])]
    layers = [
        entry | {"parameters": {n: list(t.shape) for n, t in named.items()}}
        for entry, named in zip(split, tensors, strict=True)
    ]
    more = {"stand in": {"stand_in": True}, "act by map": {"act": {"alpha": 1.3}}}.get(kind, {})
    layers = [entry | more for entry in layers]
    model = copy.deepcopy(base)
    runtime.patch(model, {"layers": layers})
    for module, named in zip(runtime.attention_modules(model), tensors, strict=True):
        for name, tensor in named.items():
            getattr(module, name).copy_(tensor)
    ids, mask = batch(base, PADS, LENGTH)
    want = dense_logits(base, layers, ids, mask, tensors)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    without = [{name: value for name, value in entry.items() if name != "sparse"} for entry in layers]
    assert difference(dense_logits(base, without, ids, mask, tensors), want, mask) > 1e-3


@some
def test_gradients_are_those_of_the_dense_mask(base):
    ids, mask = batch(base, (0, 11), LENGTH)
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    model = sparsened(base, NARROW).train().requires_grad_(True)
    dense = dense_model(base, [{"sparse": NARROW}] * 2, mask).requires_grad_(True)
    for each in (model, dense):
        each(**given(each, ids, mask), labels=labels, use_cache=False).loss.backward()
        found.append(
            {name: p.grad for name, p in each.named_parameters() if "self_attn" in name and p.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert (grad - found[1][name]).norm() <= 1e-3 * found[1][name].norm() + 1e-9, name


@torch.no_grad()
def test_compiled_is_eager():
    model = sparsened(base_of("llama"), NARROW)
    ids, mask = batch(model, (0,), LENGTH)
    want = model(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    assert difference(compiled(input_ids=ids, use_cache=False).logits, want, mask) <= 1e-5


@torch.no_grad()
def test_settings_by_head_follow_their_heads():
    """Windows by query head, with KV heads of two kinds between them: each head as if all had its window."""
    base = base_of("llama")
    windows = [20, 20, 40, 20, 60, 20, 20, 60]
    entry = NARROW | {"window": windows}
    model = copy.deepcopy(base)
    runtime.patch(model, {"layers": [{"sparse": entry, "streaming": [1], "sinks": 1, "window": 8}, {}]})
    module = runtime.attention_modules(model)[0]
    assert [s and s.settings["window"] for s in module.surgery_sparse] == [[20, 20, 60, 20, 20, 60], None]


# --- files, plans, recipes ------------------------------------------------------------------------------------------


def test_both_doors_and_saved_again(bases, tmp_path, monkeypatch):
    long = torch.randint(3, families.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(families, "TOKENS", long)
    ways = {name: {"method": name, "block": BLOCK} for name in estimators.estimator_names() if name != "by_head"}
    ways["sampled"] |= {"every": 8}
    ways["by_head"] = {
        "method": "by_head",
        "block": BLOCK,
        "patterns": [{"method": "pooled"}, {"method": "streaming"}] * 4,
    }
    ways["delta"] = NARROW | {"delta": 8}
    models = {tmp_path / f"llama-{name}": sparsened(base_of("llama"), way) for name, way in ways.items()}
    models |= {tmp_path / name: sparsened(base_of(name), NARROW) for name in ("gemma2", "gpt_oss")}
    check_both_ways_to_load(models, tmp_path)


FIVE = [
    {"op": "gqa", "kv_heads": [2, 1]},
    {"op": "duo_attention", "streaming_ratio": 0.34, "sinks": 2, "window": 4, "scores": "scores.txt"},
    {"op": "sparse_prefill", "heads": "retrieval", "method": "pooled", "density": 0.3, "block": BLOCK},
    {"op": "sink_calibration", "method": "zero_tuning", "gamma": 2.0},
    {"op": "moh", "active_ratio": 0.5, "shared_ratio": 0.0, "router": "random"},
]


@pytest.mark.parametrize("base", ["llama", "gpt_oss"], indirect=True)
def test_five_operations_in_one_checkpoint(base, tmp_path, monkeypatch):
    """gqa, head split, sparse retrieval heads, a sink's weight, gates: what is sparse is where it is, and saved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.txt").write_text("1 2\n1\n")
    found = {}
    for name, below in (("sparse", 0), ("dense", 1024)):
        model = copy.deepcopy(base)
        steps = [step | ({"dense_below": below} if step["op"] == "sparse_prefill" else {}) for step in FIVE]
        package.apply(recipe(*steps), model)
        found[name] = model
    without = copy.deepcopy(base)
    package.apply(recipe(*FIVE[:2], *FIVE[3:]), without)
    ids, mask = batch(base, PADS, LENGTH)
    with torch.no_grad():
        want = without(**given(base, ids, mask), use_cache=False).logits
        dense, sparse = (found[name](**given(base, ids, mask), use_cache=False).logits for name in ("dense", "sparse"))
        alone = found["sparse"](input_ids=ids[1:2, PADS[1] :], use_cache=False).logits
    assert difference(dense, want, mask) <= 1e-5
    assert difference(sparse, want, mask) > 1e-3
    assert difference(alone, sparse[1:2, PADS[1] :], mask[1:2, PADS[1] :]) <= 1e-4
    assert difference(sparse[:, :24], want[:, :24], mask[:, :24]) <= 1e-5
    long = torch.randint(3, families.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(families, "TOKENS", long)
    check_both_ways_to_load({tmp_path / "five": found["sparse"]}, tmp_path)


def sparse_step(**fields) -> dict:
    return {"op": "sparse_prefill"} | fields


def test_the_operation_knows_every_method_and_setting():
    assert set(operation.METHODS) == set(estimators.estimator_names())
    for name, method in operation.METHODS.items():
        own = {key: method.model_fields[key].default for key in own_keys(method)}
        searched = ("density", "calibration_samples", "calibration_length") if name == "by_head" else ()
        known = estimators.estimator(name).defaults
        if name == "by_head":
            known["patterns"] = None  # searched
        assert {key: value for key, value in own.items() if key not in searched} == known, name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block": 100}, "block is 100, and must be a power of two"),
        ({"density": 1.5}, "at most 1"),
        ({"density": 0.0}, "greater than 0"),
        ({"layers": [5]}, r"layers \[5\]: there are layers 0 to 1"),
        ({"layers": []}, "must not be empty"),
        ({"per_layer": {9: {"block": 64}}}, r"per_layer \[9\]: there are layers 0 to 1"),
        ({"per_layer": {0: {"density": 3}}}, "per_layer 0: density of pooled is 3"),
        (
            {"method": "by_head", "density": 0.5, "per_layer": {1: {"block": 128}}},
            "per_layer 1: patterns are searched for all layers at once, and block would be for this one alone",
        ),
        ({"per_layer": {0: {"bock": 64}}}, "per_layer 0: there is no field 'bock'"),
        ({"per_layer": {1: {"block": 64}}, "layers": [0]}, r"per_layer \[1\]: sparse prefill is for layers \[0\]"),
        ({"density": 0.3, "gamma": 0.9}, "one of gamma, density, alpha; here it is gamma and density"),
        ({"method": "streaming", "gamma": 0.9}, "streaming has no setting 'gamma'"),
        ({"method": "streming"}, "streaming"),
        ({"delta": 7}, "delta is 7, and must divide the block of 128"),
        ({"heads": "retrieval"}, "needs streaming heads"),
        ({"method": "streaming", "window": [8, 8]}, "one for each query head"),
    ],
)
def test_bad_input(fields, says):
    with pytest.raises(SurgeryError, match=says):
        package.plan(recipe(sparse_step(**fields)), TINY["llama"]())


def test_two_methods_for_one_head_are_refused_with_both_names():
    twice = recipe(sparse_step(layers=[0]), sparse_step(method="streaming"))
    with pytest.raises(SurgeryError, match="sparse_prefill: sparse_prefill before it sets the visibility in prefill"):
        package.plan(twice, TINY["llama"]())
    model = TINY["llama"]()
    package.apply(recipe(sparse_step(layers=[0], block=16)), model)
    with pytest.raises(SurgeryError, match=r"checkpoint sets the visibility in prefill .* already, in layers 0"):
        package.plan(recipe(sparse_step(method="streaming")), model)
    package.apply(recipe(sparse_step(method="streaming", layers=[1])), model)
    assert [layer["sparse"]["method"] for layer in model.config.surgery["layers"]] == ["pooled", "streaming"]


def test_a_plan_says_what_is_read_and_where_chunks_matter():
    exact = package.plan(recipe(sparse_step(density=0.25)), TINY["llama"]())
    assert exact.tier == "surgical"
    assert any("where chunks end at multiples of 128 tokens" in note for note in exact.notes)
    assert any(note.startswith("of the blocks before a query, 27% at 8,192 tokens and 25%") for note in exact.notes)
    for fields in ({"method": "tri_shape"}, {"last_rows_dense": 64}):
        notes = package.plan(recipe(sparse_step(**fields)), TINY["llama"]()).notes
        assert any("in chunks gets other blocks than in one piece" in note for note in notes)
    short = package.plan(recipe(sparse_step(block=4096)), TINY["llama"]())
    assert any("takes 64 tokens: no prompt becomes sparse" in note for note in short.notes)
    windows = package.plan(recipe(sparse_step()), TINY["gemma2"]())
    assert "in 1 of 2 layers" in windows.changes[0]
    with pytest.raises(SurgeryError, match="no head of these layers sees all"):
        package.plan(recipe(sparse_step()), TINY["mistral"]())


def test_overrides_of_a_layer_and_a_rule_in_place_of_another():
    model = TINY["llama"]()
    step = sparse_step(gamma=0.9, block=32, per_layer={1: {"density": 0.5, "dense_below": 64}})
    package.apply(recipe(step), model)
    first, second = (layer["sparse"] for layer in model.config.surgery["layers"])
    assert (first["gamma"], first["block"], first["dense_below"]) == (0.9, 32, 1024)
    assert "gamma" not in second
    assert (second["density"], second["block"], second["dense_below"]) == (0.5, 32, 64)


def test_a_layer_of_another_method_takes_none_of_the_others_settings():
    model = TINY["llama"]()
    step = sparse_step(gamma=0.9, queries="mean", block=32, delta=8, per_layer={1: {"method": "block_topk", "top": 3}})
    package.apply(recipe(step), model)
    second = model.config.surgery["layers"][1]["sparse"]
    rest = {"block": 32, "dense_below": 1024, "last_rows_dense": 0, "delta": 8}
    assert second == {"method": "block_topk", "top": 3} | rest


@pytest.mark.parametrize(
    ("sparse", "says"),
    [
        ("pooled", "names no method"),
        ({"method": "polled"}, "there is no method 'polled'"),
        ({"method": "pooled", "block": 24}, "block is 24"),
        ({"method": "pooled", "block": None}, "block is 0"),
        ({"method": "pooled", "settings": {"gamma": 0.9}}, "has no setting 'settings'"),
        ({"method": "pooled", "dense_below": -1}, "dense_below is -1"),
        ({"method": "pooled", "delta": 3}, "delta is 3"),
        ({"method": "pooled", "gama": 0.9}, "has no setting 'gama'"),
    ],
)
def test_a_block_edited_by_hand_is_refused(sparse, says):
    model = sparsened(base_of("llama"), NARROW)
    model.config.surgery["layers"] = [{"sparse": sparse}] * 2
    with pytest.raises(ValueError, match=f"layer 0 of the surgery block has sparse prefill that cannot be: .*{says}"):
        type(model)(model.config)


def test_through_the_command_and_later_generations(surgery, model, tmp_path):
    """A head split, then sparse retrieval heads, checked in both ways to load, at a length where prefill is sparse."""
    steps = [
        {
            "op": "duo_attention",
            "streaming_ratio": 0.5,
            "sinks": 2,
            "window": 6,
            "calibration_length": 160,
            "calibration_samples": 2,
        },
        sparse_step(heads="retrieval", block=16, dense_below=32, density=0.3),
    ]
    (tmp_path / "both.yaml").write_text(json.dumps(recipe(*steps)))
    done = surgery("apply", "both.yaml", model, "-o", "out")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["loads with trust_remote_code"] == statuses["both ways to load agree"] == "passed"
    block = json.loads((tmp_path / "out" / "config.json").read_text())["surgery"]["layers"]
    assert all(("sparse" in layer) == (len(layer["streaming"]) < 3) for layer in block)
    shown = surgery("inspect", "out")
    assert "sparse prefill: pooled" in shown.out
    again = surgery("apply", "both.yaml", "out", "-o", "again")
    assert again.code == 2


def test_patterns_by_head_are_searched_and_kept(surgery, model, tmp_path):
    (tmp_path / "search.yaml").write_text(
        json.dumps(
            recipe(sparse_step(method="by_head", density=0.5, block=16, calibration_samples=1, calibration_length=128))
        )
    )
    done = surgery("apply", "search.yaml", model, "-o", "out", "--no-check")
    assert done.code == 0, done.err
    block = json.loads((tmp_path / "out" / "config.json").read_text())["surgery"]["layers"]
    step = json.loads((tmp_path / "out" / "surgery.json").read_text())["operations"][0]
    for layer, recovered in zip(block, step["record"]["recovered"], strict=True):
        assert len(layer["sparse"]["patterns"]) == len(recovered) == 9
        assert "density" not in layer["sparse"]
    given = sparse_step(method="by_head", patterns=[{"method": "streaming", "window": 64}] * 8)
    assert package.plan(recipe(given), TINY["llama"]()).tier == "surgical"
    split = {"op": "duo_attention", "streaming_ratio": 0.5, "sinks": 4, "window": 16}
    with pytest.raises(SurgeryError, match="the search of patterns needs heads that see all keys"):
        package.plan(recipe(split, sparse_step(method="by_head")), TINY["llama"]())


@torch.no_grad()
def test_measuring_a_sparse_model_measures_it_dense():
    from surgery.calibration.attention_hook import hook_attention

    base = base_of("llama")
    model = sparsened(base, NARROW)
    ids, mask = batch(base, (0,), LENGTH)
    want = model(**given(model, ids, mask), use_cache=False).logits
    with hook_attention(model):
        inside = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(inside, base(**given(base, ids, mask), use_cache=False).logits, mask) <= 1e-5
    assert torch.equal(model(**given(model, ids, mask), use_cache=False).logits, want)
