"""The surgical runtime on tiny models of every family: values against an explicit dense mask, caches, generation."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from dense import LENGTH, PADS, batch, chunked, dense_logits, difference, given
from families import TINY, maker
from head_split import FAMILIES, SINKS, WINDOW, entries, kv_heads, operated, random_split
from head_split import base as base  # fixtures
from head_split import bases as bases
from transformers import DynamicCache, StaticCache

from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_attention as attention
from surgery.runtime.surgery_attention import fused

every_family = pytest.mark.parametrize("base", FAMILIES, indirect=True)
some = pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2", "gpt_oss", "mistral"], indirect=True)


@every_family
@torch.no_grad()
def test_identity(base):
    """Window >= length, and no streaming heads: the base's logits, cached and not, alone and left-padded."""
    ids, mask = batch(base)
    everything = [list(range(kv_heads(base)))] * base.config.get_text_config().num_hidden_layers
    for model in (operated(base, everything, window=LENGTH), operated(base, [[] for _ in everything])):
        for rows in (slice(0, 1), slice(None)):
            part = (ids[rows], mask[rows])
            want = base(**given(base, *part), use_cache=False).logits
            assert difference(model(**given(model, *part), use_cache=False).logits, want, part[1]) <= 1e-5
            assert difference(chunked(model, *part, [20, 1, 24]), want, part[1]) <= 1e-5


@every_family
@torch.no_grad()
def test_values_against_a_dense_mask(base):
    ids, mask = batch(base)
    split = random_split(base, 1)
    assert any(split)
    want = dense_logits(base, entries(split), ids, mask)
    model = operated(base, split)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    for chunks in ([LENGTH], [1] * LENGTH, [7] * 6 + [3], [30, 1, 1, 13]):
        assert difference(chunked(model, ids, mask, chunks), want, mask) <= 1e-4
    full = dense_logits(base, [{} for _ in split], ids, mask)
    assert difference(full, want, mask) > 1e-3, "the split changes nothing here: the test has no power"


@some
@torch.no_grad()
def test_right_padding_and_blocks_longer_than_one(base, monkeypatch):
    monkeypatch.setattr("surgery.runtime.surgery_attention.BLOCK", 16)
    ids, mask = batch(base, (0, 0, 0, 0))
    mask[1, -9:] = 0
    mask[2, 2:] = 0  # shorter than the sinks
    split = random_split(base, 2)
    want = dense_logits(base, entries(split), ids, mask)
    model = operated(base, split)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4


@some
def test_generation(base):
    """Left-padded batch = rows alone; beams, chunked prefill, prompt lookup and an assistant = plain decoding."""
    model = operated(base, random_split(base, 3))
    ids, mask = batch(base)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, pad in enumerate(PADS):
        alone = model.generate(input_ids=ids[row : row + 1, pad:], attention_mask=mask[row : row + 1, pad:], **options)
        assert torch.equal(alone[0, LENGTH - pad :], made[row, LENGTH:])
    uncached = model.generate(input_ids=ids, attention_mask=mask, **options, use_cache=False)
    assert torch.equal(made, uncached)
    pieces = model.generate(input_ids=ids, attention_mask=mask, **options, prefill_chunk_size=7)
    assert torch.equal(made, pieces)
    beams = [
        model.generate(input_ids=ids, attention_mask=mask, **options, num_beams=3, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)
    one = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    plain = model.generate(**one, **options)
    assert torch.equal(plain, model.generate(**one, **options, prompt_lookup_num_tokens=3))
    assert torch.equal(plain, model.generate(**one, **options, assistant_model=copy.deepcopy(model)))


@some
@pytest.mark.parametrize(
    "more", [{"do_sample": False}, {"do_sample": True, "temperature": 2.0}], ids=["best", "drawn"]
)
def test_it_drafts_for_its_base(base, more):
    """In every round some of its tokens are taken back, long after its windows moved on."""
    model = operated(base, random_split(base, 3))
    ids = batch(base)[0][:1]
    options = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None, **more}
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    torch.manual_seed(0)
    drafted = base.generate(**asked, assistant_model=model)
    assert drafted.shape[1] == ids.shape[1] + 40
    if not more["do_sample"]:
        assert torch.equal(drafted, base.generate(**asked))
    assert torch.equal(model.generate(**asked | {"do_sample": False}), model.generate(**asked | {"do_sample": False}))


@pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2", "mistral"], indirect=True)  # stock gpt_oss knows none
@torch.no_grad()
def test_packed_rows_are_separate_rows(base):
    model = operated(base, random_split(base, 4))
    ids, _ = batch(base, (0,))
    lengths = (13, 1, 31)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    parts = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert difference(packed, torch.cat(parts, 1), torch.ones_like(ids)) <= 1e-5


@torch.no_grad()
def test_cache_holds_sinks_and_window_and_no_more():
    base = TINY["llama"]().eval()
    layers, heads = base.config.num_hidden_layers, base.config.num_key_value_heads
    model = operated(base, [list(range(heads))] * layers)
    ids, mask = batch(base, length=40)
    out = model(**given(model, ids, mask), use_cache=True)
    cache, size = out[runtime.CACHE], base.config.head_dim
    held = sum(t.numel() for layer in cache.layers for store in layer.stores for t in store.tensors.values())
    assert held == layers * 2 * len(ids) * heads * (SINKS + WINDOW) * size
    assert cache.nbytes == held * 4
    before = cache.nbytes
    for _ in range(5):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        out = model(**given(model, ids, mask, -1), **{runtime.CACHE: cache})
    assert cache.nbytes == before
    assert cache.get_seq_length() == 45


@torch.no_grad()
def test_full_heads_grow_by_blocks():
    base = TINY["llama"]().eval()
    model = operated(base, [[] for _ in range(base.config.num_hidden_layers)])
    ids, _ = batch(base, (0,))
    cache = model.make_cache()
    model(input_ids=ids, **{runtime.CACHE: cache})
    model(input_ids=ids[:, :1], **{runtime.CACHE: cache})
    store = cache.layers[0].stores[0]
    place = store.tensors["keys"].data_ptr()
    for _ in range(20):
        model(input_ids=ids[:, :1], **{runtime.CACHE: cache})
    assert store.tensors["keys"].data_ptr() == place, "a new token copied the past"


@torch.no_grad()
def test_cache_operations():
    """crop with and without recording, batch selection and repetition, reset: as if it had never been otherwise."""
    base = TINY["llama"]().eval()
    model = operated(base, random_split(base, 5))
    ids, _ = batch(base)
    cache = model.make_cache()
    model(input_ids=ids, **{runtime.CACHE: cache})
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(input_ids=ids[:, :6], **{runtime.CACHE: cache})
    cache.crop(-4)
    got = model(input_ids=ids[:, 9:12], **{runtime.CACHE: cache}).logits
    want = model(input_ids=torch.cat([ids, ids[:, :2], ids[:, 9:12]], 1), use_cache=False).logits[:, -3:]
    assert (got - want).abs().max() < 1e-4
    short = model.make_cache()
    model(input_ids=ids[:, :5], **{runtime.CACHE: short})
    short.crop(-1)
    got = model(input_ids=ids[:, 9:12], **{runtime.CACHE: short}).logits
    want = model(input_ids=torch.cat([ids[:, :4], ids[:, 9:12]], 1), use_cache=False).logits[:, -3:]
    assert (got - want).abs().max() < 1e-4
    short.batch_select_indices(torch.tensor([2, 0]))
    short.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    got = model(input_ids=ids[rows, 20:23], **{runtime.CACHE: short}).logits
    want = model(input_ids=torch.cat([ids[rows, :4], ids[rows, 9:12], ids[rows, 20:23]], 1), use_cache=False).logits
    assert (got - want[:, -3:]).abs().max() < 1e-4
    short.reset()
    assert short.get_seq_length() == 0
    got = model(input_ids=ids, **{runtime.CACHE: short}).logits
    assert (got - model(input_ids=ids, use_cache=False).logits).abs().max() < 1e-4


@torch.no_grad()
def test_a_plain_dynamic_cache_gives_right_results():
    base = TINY["llama"]().eval()
    model = operated(base, random_split(base, 6))
    ids, _ = batch(base, (0,))
    cache = DynamicCache()
    parts = [model(input_ids=part, **{runtime.CACHE: cache}).logits for part in ids.split([20, 1, 24], dim=1)]
    want = model(input_ids=ids, use_cache=False).logits
    assert (torch.cat(parts, 1) - want).abs().max() < 1e-4


@torch.no_grad()
def test_a_cache_under_its_old_name_and_by_position():
    base = TINY["llama"]().eval()
    model = operated(base, random_split(base, 6))
    ids, _ = batch(base, (0,))
    want = model(input_ids=ids, use_cache=False).logits[:, -1]
    for give in (lambda cache: {"past_key_values": cache}, lambda cache: {runtime.CACHE: cache}):
        cache = model(input_ids=ids[:, :-1], use_cache=True)[runtime.CACHE]
        assert (model(input_ids=ids[:, -1:], **give(cache)).logits[:, -1] - want).abs().max() < 1e-4
    cache = model(input_ids=ids[:, :-1], use_cache=True)[runtime.CACHE]
    assert (model(ids[:, -1:], None, None, cache).logits[:, -1] - want).abs().max() < 1e-4


@torch.no_grad()
def test_a_cache_that_drops_keys_itself_is_refused():
    base = TINY["mistral"]().eval()
    model = operated(base, random_split(base, 6))
    ids, _ = batch(base, (0,))
    with pytest.raises(ValueError, match="without a config"):
        model(input_ids=ids, **{runtime.CACHE: DynamicCache(config=base.config)})


def test_packed_rows_in_training_are_separate_rows():
    base = TINY["llama"]()
    model = operated(base, random_split(base, 4)).train().requires_grad_(True)
    ids, _ = batch(base, (0,))
    positions = torch.cat([torch.arange(n) for n in (13, 32)])[None]
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        packed = model(input_ids=ids, position_ids=positions).logits
        parts = [model(input_ids=part, use_cache=False).logits for part in ids.split((13, 32), dim=1)]
        assert (packed - torch.cat(parts, 1)).abs().max() < 1e-4


def test_inference_mode_leaves_nothing_behind():
    base = TINY["llama"]()
    model = operated(base, random_split(base, 5)).requires_grad_(True)
    ids, _ = batch(base, (0,))
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :20], use_cache=True)[runtime.CACHE]
    with torch.no_grad():
        got = model(input_ids=ids[:, 20:21], **{runtime.CACHE: cache}).logits
        assert (got - model(input_ids=ids[:, :21], use_cache=False).logits[:, -1:]).abs().max() < 1e-4
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    got = model(input_ids=ids[:, 21:22], **{runtime.CACHE: cache}).logits
    assert (got - model(input_ids=ids[:, :22], use_cache=False).logits[:, -1:]).abs().max() < 1e-4
    got.sum().backward()


def test_models_that_could_not_be_saved_are_refused():
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    base = TINY["llama"]()
    block = {"layers": [{"streaming": [0], "sinks": 1, "window": 4}] * base.config.num_hidden_layers}

    class Mine(LlamaForCausalLM):
        pass

    for kind in (LlamaForSequenceClassification, Mine):
        model = kind(copy.deepcopy(base.config))
        with pytest.raises(ValueError, match="not a causal language model"):
            runtime.patch(model, block)
        assert type(model) is kind
        assert not hasattr(model.config, "surgery")


def test_what_would_undo_the_surgery_is_refused():
    base = TINY["llama"]().eval()
    model = operated(base, random_split(base, 7))
    ids, mask = batch(base, (0,))
    with pytest.raises(ValueError, match="undo the surgery"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="undo the surgery"):
        model.generate(input_ids=ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="undo the surgery"):
        model.generate_batch([ids[0].tolist()])
    with pytest.raises(ValueError, match="keeps its own cache"):
        model(input_ids=ids, **{runtime.CACHE: StaticCache(config=base.config, max_cache_len=64)})
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match="4 dimensions"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, LENGTH, LENGTH))
    holes = mask.clone()
    holes[0, 5:9] = 0
    with pytest.raises(ValueError, match="holes"):
        model(input_ids=ids, attention_mask=holes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format"),
        ({"layers": []}, "layers"),
        ({"layers": [{"streaming": [9], "sinks": 1, "window": 1}] * 2}, "streaming"),
        ({"layers": [{"streaming": [0], "sinks": -1, "window": 1}] * 2}, "sinks"),
        ({"layers": [{"streaming": [0], "sinks": 1, "window": 0}] * 2}, "window"),
        ({"layers": [{"streming": [0]}] * 2}, "other keys"),
        ({"layers": [{"streaming": [0]}] * 2}, "without sinks and window"),
        ({"layers": [{"streaming": [0, 0], "sinks": 1, "window": 1}] * 2}, "each once"),
        ({"layers": [{"streaming": [True], "sinks": 1, "window": 1}] * 2}, "streaming"),
        ({"layers": [{"streaming": [[0]], "sinks": 1, "window": 1}] * 2}, "streaming"),
        ({"layers": [{"streaming": [0], "sinks": True, "window": 1}] * 2}, "sinks"),
    ],
)
def test_a_block_edited_by_hand_is_refused(change, says):
    model = operated(TINY["llama"](), [[0], []])
    model.config.surgery |= change
    with pytest.raises(ValueError, match=says):
        type(model)(model.config)


@some
def test_training(base):
    """Gradients equal those of the same attention written out; checkpointing changes nothing."""
    torch.manual_seed(0)
    split = random_split(base, 8)
    ids, _ = batch(base, (0, 0))
    grads = []
    for checkpointing, cached in ((False, False), (False, True), (True, None)):
        model = operated(base, split).train().requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids, use_cache=cached).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert grads[0].abs().max() > 0
    for other in grads[1:]:
        assert (other - grads[0]).norm() <= 1e-5 * grads[0].norm()


@pytest.mark.parametrize("base", ["llama", "gemma2", "gpt_oss", "mistral", "window 15"])
@pytest.mark.parametrize("block", [4, 7, 128])
@torch.no_grad()
def test_many_blocks_without_padding(base, block, monkeypatch):
    """A long row in many blocks, whose masks are shared: also where the base's own window loses the sinks again."""
    monkeypatch.setattr("surgery.runtime.surgery_attention.BLOCK", block)
    base = (maker("Mistral", head_dim=16, sliding_window=15) if base == "window 15" else TINY[base])().eval()
    split = random_split(base, 3)
    model = operated(base, split)
    for length, chunks in ((61, (61,)), (61, (3, 30, 28)), (17, (17,)), (9, (9,))):
        ids, mask = batch(base, (0,), length)
        want = dense_logits(base, entries(split), ids, mask)
        assert difference(chunked(model, ids, mask, chunks), want, mask) < 1e-4, (length, chunks)
        assert difference(model(**given(base, ids, mask), use_cache=False).logits, want, mask) < 1e-4, length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_one_query_of_each_head(dtype, with_lse, kv_heads):
    """Output and log-sum-exp of a decoding step, against the softmax in float64, head by head."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, heads, length, 16, generator=generator).to(dtype)
        for heads, length in ((6, 1), (kv_heads, 37), (kv_heads, 37))
    )
    out, lse = fused(query, keys, values, 0.3, with_lse)
    assert out.shape == query.shape
    assert out.dtype == dtype
    rough = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for row, head in itertools.product(range(2), range(6)):
        k, v = (part[row, head * kv_heads // 6].double() for part in (keys, values))
        scores = 0.3 * k @ query[row, head, 0].double()
        torch.testing.assert_close(out[row, head, 0].double(), scores.softmax(0) @ v, **rough)
        if with_lse:
            torch.testing.assert_close(lse[row, head, 0].double(), scores.logsumexp(0), **rough)
    assert (lse is not None) == with_lse


@pytest.mark.parametrize("base", ["llama", "qwen3", "mistral", "gpt_oss", "gemma2"])
@torch.no_grad()
def test_one_query_reads_many_keys_in_pieces(base, monkeypatch):
    """With and without keys left over, and with more pieces than threads; what has a soft-cap or sinks stays right."""
    called = []
    attend = attention._attend_in_splits
    monkeypatch.setattr(attention, "_attend_in_splits", lambda *given: called.append(1) or attend(*given))
    monkeypatch.setattr(attention, "LONG", 8)
    monkeypatch.setattr(attention, "SHORTEST", 3)
    base = TINY[base]().eval()
    split = random_split(base, 3)
    ids, mask = batch(base, (0,))
    want = dense_logits(base, entries(split), ids, mask)
    for threads in (1, 9):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        model = operated(base, split)
        assert difference(chunked(model, ids, mask, [7, *[1] * (LENGTH - 7)]), want, mask) < 1e-4
    assert called or base.config.model_type in ("gemma2", "mistral")
