"""MoBA's attention: each query of each head reads its own blocks. Against loops over queries and heads in float64."""

from __future__ import annotations

import copy
import weakref

import families
import pytest
import torch
from dense import batch, chunked, difference, given
from families import check_both_ways_to_load, one_thread  # noqa: F401 (one_thread: a fixture)
from sparse import BLOCK, LENGTH, PADS, base, base_of, bases, draw, recipe, sparsened  # noqa: F401
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

import surgery as package
from surgery.errors import SurgeryError
from surgery.operations.sparse_prefill.prompt_share import (
    dense_until,
    last_query_reads,
    nearly_dense_until,
    share_read,
)
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_query_blocks
from surgery.runtime.surgery_estimators import choose, settings_problems
from surgery.runtime.surgery_gated_compute import counted
from surgery.runtime.surgery_sparse_prefill import PART, Sparse

MOBA = {"method": "block_topk", "exact": True, "block": BLOCK, "top": 3}
some = pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2", "gpt_oss"], indirect=True)


def read_by(query, key, place: int, block: int, top: int, below: int = 0) -> list[int]:
    """The keys that one query of one head reads; query [d], key [N, d]."""
    own = place // block
    means = [key[J * block : (J + 1) * block].double().mean(0) for J in range(own)]
    gate = sorted(((-float(query.double() @ mean), J) for J, mean in enumerate(means)))
    blocks = range(own) if (own + 1) * block <= below else sorted(J for _, J in gate[: top - 1])
    earlier = [j for J in blocks for j in range(J * block, (J + 1) * block)]
    return [*earlier, *range(own * block, place + 1)]


def loop(query, key, value, block, top, scale, softcap=None, below=0):
    """The definition: query [heads, n, d], key and value [KV heads, N, d]."""
    outs, lses = torch.zeros_like(query), torch.zeros_like(query[..., 0])
    (heads, n, _), (kv_heads, length, _) = query.shape, key.shape
    tops = top if isinstance(top, list) else [top] * heads
    rows = []
    for head in range(heads):
        near = key[head * kv_heads // heads], value[head * kv_heads // heads]
        for i in range(n):
            own = query[head, i]
            keys = read_by(own.detach(), near[0].detach(), length - n + i, block, tops[head], below)
            scores = near[0][keys] @ own * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            rows.append((scores.softmax(0) @ near[1][keys], scores.logsumexp(0)))
    outs, lses = (torch.stack(each) for each in zip(*rows, strict=True))
    return outs.reshape(query.shape), lses.reshape(heads, n)


SHAPES = [  # heads, KV heads, n, N, head size, block, top
    (4, 4, 80, 80, 8, 16, 2),
    (6, 2, 83, 83, 8, 16, 3),
    (6, 3, 37, 91, 8, 16, [1, 2, 3, 4, 5, 9]),
    (3, 1, 2, 75, 20, 16, 2),
    (6, 3, 70, 101, 8, 32, 2),
    (2, 1, 40, 40, 8, 16, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_output_log_sum_exp_and_gradients_are_those_of_the_loop(shape, softcap):
    heads, kv_heads, n, length, size, block, top = shape
    parts = [draw(i, 1, count, tokens, size, dtype=torch.float64).requires_grad_()
             for i, (count, tokens) in enumerate([(heads, n), (kv_heads, length), (kv_heads, length)])]  # fmt: skip
    others = [part.detach().clone().requires_grad_() for part in parts]
    sparse = Sparse("block_topk", block, settings={"top": top, "exact": True})
    out, lse, _ = sparse.attend(*parts, None, 0.4, softcap)
    want, want_lse = loop(*(part[0] for part in others), block, top, 0.4, softcap)
    assert (out[0] - want).abs().max() <= 1e-12
    assert (lse[0] - want_lse).abs().max() <= 1e-12
    to_out, to_lse = draw(5, *want.shape, dtype=torch.float64), draw(6, *want_lse.shape, dtype=torch.float64)
    for each, each_lse in ((out[0], lse[0]), (want, want_lse)):
        ((each * to_out).sum() + (each_lse * to_lse).sum()).backward()
    for one, other in zip(parts, others, strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-12


def test_large_tiles_are_split_and_give_the_same(monkeypatch):
    parts = [draw(i, 1, count, 90, 8, dtype=torch.float64).requires_grad_() for i, count in enumerate((6, 3, 3))]
    sparse, found = Sparse("block_topk", BLOCK, settings={"top": 3, "exact": True}), []
    for cells in (surgery_query_blocks.CELLS, 50):
        monkeypatch.setattr(surgery_query_blocks, "CELLS", cells)
        out, lse, _ = sparse.attend(*parts, None, 0.4, None)
        found.append((out, *torch.autograd.grad(out.square().sum() + lse.sum(), parts)))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    parts = [draw(i, 1, count, 90, 16, dtype=dtype).requires_grad_() for i, count in enumerate((6, 3, 3))]
    wide = [part.detach().double().requires_grad_() for part in parts]
    out, lse, _ = Sparse("block_topk", BLOCK, settings={"top": 3, "exact": True}).attend(*parts, None, 0.25, None)
    want, _ = loop(*(part[0] for part in wide), BLOCK, 3, 0.25)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert (out[0] - want).norm() <= 1e-2 * want.norm()
    out.square().sum().backward()
    want.square().sum().backward()
    for one, other in zip(parts, wide, strict=True):
        assert (one.grad - other.grad).norm() <= 2e-2 * other.grad.norm()


@pytest.mark.parametrize("settings", [{"dense_below": 40}, {"last_rows_dense": 20}])
@torch.no_grad()
def test_rows_that_stay_dense(settings):
    parts = [draw(i, 1, count, 90, 8, dtype=torch.float64) for i, count in enumerate((6, 3, 3))]
    out, _, _ = Sparse("block_topk", BLOCK, **settings, settings={"top": 2, "exact": True}).attend(
        *parts, None, 0.4, None
    )
    few = loop(*(part[0] for part in parts), BLOCK, 2, 0.4)[0]
    every = loop(*(part[0] for part in parts), BLOCK, 99, 0.4)[0]
    dense = (
        range(32) if "dense_below" in settings else range(64, 90)
    )  # blocks 0 and 1; blocks 4 and 5 hold the last 20
    rows = torch.tensor([i in dense for i in range(90)])
    assert (out[0, :, rows] - every[:, rows]).abs().max() <= 1e-12
    assert (out[0, :, ~rows] - few[:, ~rows]).abs().max() <= 1e-12
    assert (every - few)[:, rows].abs().max() > 1e-2 or "dense_below" in settings


def test_no_scores_are_kept_for_the_gradient_and_none_are_as_large_as_a_map(monkeypatch):
    """What autograd keeps grows with n; the largest tile holds a block's keys and no more rows than fit."""
    largest, saved, scores = [0], [], surgery_query_blocks._scores

    def watched(rows, keys, *others):
        found = scores(rows, keys, *others)
        largest[0] = max(largest[0], found[0].numel())
        return found

    monkeypatch.setattr(surgery_query_blocks, "_scores", watched)
    monkeypatch.setattr(surgery_query_blocks, "CELLS", 4096)
    n, heads = 512, 6
    parts = [draw(i, 1, count, n, 8).requires_grad_() for i, count in enumerate((heads, 3, 3))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(weakref.ref(t)) or t, lambda t: t):
        out, _, _ = Sparse("block_topk", BLOCK, settings={"top": 3, "exact": True}).attend(*parts, None, 0.4, None)
        kept = max(ref().numel() for ref in saved if ref() is not None)
    out.sum().backward()
    assert 0 < largest[0] <= 4096 < n * n
    assert kept <= heads * n * (n // BLOCK)  # which blocks each query chose


# --- models ---------------------------------------------------------------------------------------------------------


def looped(base, entry: dict):
    """The base with attention by the loop, in float64 inside; rows padded on the left run alone."""

    def attend(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **_):
        outs = []
        for row in range(len(query)):
            start = 0 if mask is None else int(mask[row].int().argmax())
            parts = [part[row, :, start:].double() for part in (query, key, value)]
            top, window = entry["top"] if sliding_window is None else 10**6, sliding_window
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if window is None:
                out, lse = loop(*parts, entry["block"], top, scale, softcap, entry.get("dense_below", 0))
            else:
                out, lse = windowed(*parts, window, scale, softcap)
            if s_aux is not None:
                out = out * torch.sigmoid(lse - s_aux.double()[:, None])[..., None]
            outs.append(pad(out.to(query.dtype).transpose(0, 1), (0, 0, 0, 0, start, 0)))
        return torch.stack(outs), None

    name = f"looped-{id(entry)}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *_, attention_mask=None, **__: attention_mask)
    model = copy.deepcopy(base)
    model.set_attn_implementation(name)
    return model


def windowed(query, key, value, window, scale, softcap):
    """Dense attention in the base's own window."""
    key, value = (part.repeat_interleave(len(query) // len(key), 0) for part in (key, value))
    scores = query @ key.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(query[0]))[:, None] - torch.arange(len(key[0]))
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@some
@torch.no_grad()
def test_a_model_is_the_loop_of_every_layer_and_row(base):
    """Odd length, left padding (blocks count from the first real token), and a soft-cap or sinks of the base."""
    ids, mask = batch(base, (0, 11), LENGTH)
    model = sparsened(base, MOBA)
    want = looped(base, MOBA)(**given(base, ids, mask), use_cache=False).logits
    got = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(got, want, mask) <= 1e-4
    alone = model(input_ids=ids[1:, 11:], use_cache=False).logits
    assert difference(alone, got[1:, 11:], mask[1:, 11:]) <= 1e-5
    full = base(**given(base, ids, mask), use_cache=False).logits
    assert difference(full, want, mask) > 1e-2
    start = slice(0, BLOCK * MOBA["top"])
    assert difference(full[:1, start], got[:1, start], mask[:1, start]) <= 1e-5, "three blocks are all there are"


@some
@torch.no_grad()
def test_any_cut_gives_what_one_piece_gives(base):
    """Left-padded rows too: a row's first tokens may come alone. Only a call of one token is decoding."""
    model = sparsened(base, MOBA)
    ids, mask = batch(base, PADS, LENGTH)
    want = model(**given(model, ids, mask), use_cache=False).logits
    for pieces in ([LENGTH], [50, 2, 98], [37, 38, 39, 36], [BLOCK] * 9 + [6], [143, 7]):
        assert difference(chunked(model, ids, mask, pieces), want, mask) <= 1e-5, pieces
    decoded = chunked(model, ids, mask, [LENGTH - 1, 1])[:, -1:]
    assert difference(decoded[:1], decoded_densely(model, ids[:1]), mask[:1, -1:]) <= 1e-4
    assert difference(decoded[:1], want[:1, -1:], mask[:1, -1:]) > 1e-3, "decoding reads all keys"


def decoded_densely(model, ids):
    """The logits of the last token, which reads all keys that the sparse prefill of the others made."""
    dense = copy.deepcopy(model)
    out = model(input_ids=ids[:, :-1], use_cache=True)
    for module in runtime.attention_modules(dense):
        module.surgery_sparse = None
    return dense(input_ids=ids[:, -1:], **{runtime.CACHE: out[runtime.CACHE]}).logits


@pytest.mark.parametrize("base", ["llama", "gemma2"], indirect=True)
def test_generation(base):
    """A left-padded batch = its rows alone; a prompt in odd pieces = the prompt; beams with and without padding."""
    model = sparsened(base, MOBA)
    ids, mask = batch(base, PADS, LENGTH)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, left in enumerate(PADS):
        alone = model.generate(
            input_ids=ids[row : row + 1, left:], attention_mask=mask[row : row + 1, left:], **options
        )
        assert torch.equal(alone[0, LENGTH - left :], made[row, LENGTH:])
    one = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    assert torch.equal(model.generate(**one, **options), model.generate(**one, **options, prefill_chunk_size=37))
    assert model.generate(**one, **options, num_beams=3).shape == (1, LENGTH + 6)


@torch.no_grad()
def test_right_padding_and_packed_rows():
    base = base_of("llama")
    model = sparsened(base, MOBA)
    ids, mask = batch(base, (0, 0), LENGTH)
    mask[1, -39:] = 0
    got = model(**given(model, ids, mask), use_cache=False).logits
    short = model(input_ids=ids[1:, :-39], use_cache=False).logits
    assert difference(got[1:, :-39], short, mask[1:, :-39]) <= 1e-5
    lengths = (90, 1, 59)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids[:1], position_ids=positions, use_cache=False).logits
    parts = [model(input_ids=part, use_cache=False).logits for part in ids[:1].split(lengths, dim=1)]
    assert difference(packed, torch.cat(parts, 1), torch.ones_like(ids[:1])) <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", ["llama", "gemma2"], indirect=True)
def test_gradients_of_a_model_are_those_of_the_loop(base, checkpointing):
    ids, mask = batch(base, (0, 11), 70)
    labels, found = ids.masked_fill(mask == 0, -100), []
    model = sparsened(base, MOBA | {"top": 2}).train().requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, looped(base, MOBA | {"top": 2}).train().requires_grad_(True)):
        each(**given(each, ids, mask), labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert (grad - found[1][name]).norm() <= 1e-3 * found[1][name].norm() + 1e-9, name


def test_training_under_autocast():
    model = sparsened(base_of("qwen3"), MOBA).train()
    ids, mask = batch(model, (0, 11), LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.requires_grad_(True)(**given(model, ids, mask), labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_the_block_attention_and_its_kernel_are_not_called(monkeypatch):
    """They have lists of query blocks."""

    def refused(*_, **__):
        raise AssertionError("lists of blocks of queries")

    model = sparsened(base_of("llama"), MOBA)
    monkeypatch.setattr("surgery.runtime.surgery_sparse_prefill.attend_blocks", refused)
    monkeypatch.setattr("surgery.runtime.surgery_sparse_prefill.choose", refused)
    ids, mask = batch(model, (0,), LENGTH)
    model(**given(model, ids, mask), use_cache=False)
    assert PART.methods({"sparse": MOBA}) == {"sparse.block_topk", "sparse.queries", "kernel.estimators"}
    lists = {"sparse.block_topk", "kernel.block_sparse_prefill", "kernel.estimators"}
    assert PART.methods({"sparse": MOBA | {"exact": False}}) == lists


@torch.no_grad()
def test_counted_pairs_are_those_that_are_read():
    base = base_of("llama")
    model = sparsened(base, MOBA | {"dense_below": 64})
    ids, mask = batch(model, (0, 11), LENGTH)
    with counted(model) as work:
        chunked(model, ids, mask, [70, 80])
    pairs = 0
    for real in (LENGTH, LENGTH - 11):
        pairs += sum(sum(len(range(J * 16, min(J * 16 + 16, i + 1))) for J in range(i // 16 + 1)) if i < 64 else
                     min(2, i // 16) * 16 + i % 16 + 1 for i in range(real))  # fmt: skip
    assert work.done["attention"] == pairs * 2 * 8 * 8 * 2  # scores and values, head size, heads, layers
    assert 0 < work.done["estimator"] < work.done["attention"]
    assert share_read(MOBA | {"dense_below": 64}, LENGTH) == pytest.approx(
        sum((i // 16 if i < 64 else min(2, i // 16)) * 16 + i % 16 + 1 for i in range(LENGTH)) / (LENGTH * 151 / 2)
    )


@torch.no_grad()
def test_with_a_head_split_act_and_virtual_keys():
    """Terms that ask which keys were read get the query's own blocks: ACT removes the weight of no unread sink."""
    from dense import random_terms

    base = base_of("llama")
    found = {}
    for top in (3, 10):
        tensors = random_terms(base, "act", 1)
        layers = [
            {"streaming": [1], "sinks": 2, "window": 5, "sparse": MOBA | {"top": top}}
            | {"parameters": {name: list(tensor.shape) for name, tensor in named.items()}}
            for named in tensors
        ]
        model = copy.deepcopy(base)
        runtime.patch(model, {"layers": layers})
        for module, named in zip(runtime.attention_modules(model), tensors, strict=True):
            for name, tensor in named.items():
                getattr(module, name).copy_(tensor)
        ids, mask = batch(base, (0, 11), LENGTH)
        one = model(**given(model, ids, mask), use_cache=False).logits
        assert difference(chunked(model, ids, mask, [70, 80]), one, mask) <= 1e-5
        found[top] = one
        for module in runtime.attention_modules(model):
            module.surgery_sparse = None
        full = model(**given(model, ids, mask), use_cache=False).logits
        assert (difference(one, full, mask) <= 1e-5) == (top == 10), "ten blocks are all there are"


# --- files, plans, errors -------------------------------------------------------------------------------------------


def test_both_ways_to_load(tmp_path, monkeypatch):
    long = torch.randint(3, families.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(families, "TOKENS", long)
    models = {tmp_path / name: sparsened(base_of(name), MOBA) for name in ("llama", "gemma2")}
    check_both_ways_to_load(models, tmp_path)
    carried = {path.name for path in (tmp_path / "llama").glob("*.py")}
    assert "surgery_query_blocks.py" in carried
    assert "block_sparse_prefill.py" not in carried


def step(**fields) -> dict:
    return {"op": "sparse_prefill", "method": "block_topk", "exact": True} | fields


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "pooled"}, "pooled has no setting 'exact'; block_topk has it"),
        ({"exact": "yes"}, "exact"),
        ({"votes": 0.5}, "votes are of a block's queries.* drop votes"),
        ({"delta": 8}, "delta corrects blocks of queries.* drop one of them"),
        ({"per_layer": {1: {"method": "pooled", "exact": True}}}, "per_layer 1: .*pooled has no setting 'exact'"),
        ({"top": [1, 2]}, "one for each query head"),
        ({"last_layers_full": 2}, "last_layers_full is 2, and there are 2 layers: none becomes sparse"),
        ({"last_layers_full": 1, "layers": [0]}, "drop last_layers_full, or layers"),
        ({"last_layers_full": -1}, "last_layers_full should be at least 0"),
    ],
)
def test_bad_input(fields, says):
    with pytest.raises(SurgeryError, match=says):
        package.plan(recipe(step(**fields)), families.TINY["llama"]())


def test_a_pattern_of_a_head_cannot_be_exact():
    pattern = {"method": "block_topk", "exact": True}
    assert "exact is for a whole layer" in settings_problems("by_head", {"patterns": [pattern] * 4}, 16, 4)[0]
    with pytest.raises(ValueError, match="no lists of query blocks"):
        choose("block_topk", draw(0, 1, 2, 32, 4), draw(1, 1, 1, 32, 4), 1.0, 16, {"exact": True})


def test_last_layers_stay_full_and_a_record_without_them_is_as_before():
    model = base_of("llama")
    report = package.apply(recipe(step(block=16, top=2, dense_below=0, last_layers_full=1)), model)
    layers = model.config.surgery["layers"]
    assert ["sparse" in layer for layer in layers] == [True, False]
    assert layers[0]["sparse"]["exact"] is True
    assert report.data["recipe"]["operations"][0]["last_layers_full"] == 1
    plain = base_of("llama")
    report = package.apply(recipe({"op": "sparse_prefill", "method": "block_topk"}), plain)
    assert not {"exact", "last_layers_full"} & report.data["recipe"]["operations"][0].keys()
    assert "exact" not in plain.config.surgery["layers"][0]["sparse"]


def test_the_share_is_the_papers_and_counted_by_a_loop():
    entry = {"exact": True, "block": 512, "top": 3, "dense_below": 0}
    assert last_query_reads(entry, 8192) == 1 - 0.8125
    assert last_query_reads(entry, 32768) == pytest.approx(1 - 0.9531, abs=1e-4)
    assert last_query_reads({"exact": True, "block": 4096, "top": 12, "dense_below": 0}, 1 << 20) == 1 - 0.953125
    assert last_query_reads({"exact": True, "block": 128, "top": 3, "dense_below": 0}, 2048) == 1 - 0.8125
    for settings, length in (({"top": [1, 3]}, 150), ({"dense_below": 100}, 90), ({"last_rows_dense": 20}, 150)):
        own = {"exact": True, "block": 16, "top": 2, "dense_below": 0} | settings
        read = 0.0
        for i in range(length):
            tops = own["top"] if isinstance(own["top"], list) else [own["top"]]
            late = (i // 16 + 1) * 16 > length - own.get("last_rows_dense", 0) and "last_rows_dense" in own
            dense = (i // 16 + 1) * 16 <= own["dense_below"] or late
            read += sum(i + 1 if dense else min(i // 16, top - 1) * 16 + i % 16 + 1 for top in tops) / len(tops)
        assert share_read(own, length) == pytest.approx(read / (length * (length + 1) / 2))
    assert dense_until(entry) == 1536
    for changed in ({}, {"top": [3, 9]}, {"dense_below": 9000}, {"block": 64}, {"exact": False}):
        for left_out in ((), ("top", "block"), ("dense_below",)):
            own = {key: value for key, value in (entry | changed).items() if key not in left_out}
            assert Sparse.of({"method": "block_topk", **own}).dense_until == dense_until(own), own
    assert share_read(entry, nearly_dense_until(entry, 0.9)) > 0.9
    assert share_read(entry, nearly_dense_until(entry, 0.9) + 512) <= 0.9


def test_a_plan_says_what_is_read_and_where_it_is_dense_in_disguise():
    from families import TINY

    model = TINY["llama"](max_position_embeddings=32768)
    notes = package.plan(recipe(step(block=512, top=3, dense_below=0)), model).notes
    read = (
        "of the keys before it, a query reads 88% at 2,048 tokens (the last 75%), 29% at 8,192 tokens (the last 19%)"
    )
    assert any(note.startswith(read) for note in notes), notes
    assert any("prompts of up to 1,536 tokens are read whole: there this is dense attention" in note for note in notes)
    assert any("wherever it is cut" in note for note in notes)
    notes = package.plan(recipe(step(block=128, top=6, dense_below=0)), model).notes
    assert any("up to 768 tokens are read whole, and of up to 1,024 more than 90%" in note for note in notes)
    large = package.plan(recipe(step(block=4096, top=12, dense_below=0)), TINY["llama"](max_position_embeddings=8192))
    assert any("takes 8192 tokens: no prompt becomes sparse" in note for note in large.notes)
    assert any("prompts of up to 49,152 tokens are read whole" in note for note in large.notes)
