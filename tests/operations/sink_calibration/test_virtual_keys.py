"""Bias and virtual keys: the closed forms, the runtime against explicit weights in float64, files, the operation."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import KINDS, LENGTH, PADS, batch, chunked, dense_logits, difference, given, random_terms
from families import TINY, TOKENS, check_both_ways_to_load, double, load_without_package, one_thread  # noqa: F401 (one_thread: a fixture)
from sink_terms import FAMILIES, SPLITS, WINDOW, entries, operated, random_attention

from surgery.runtime import modeling_surgery as runtime
from surgery.runtime.surgery_bias import add_keys, scale_key


@pytest.fixture(scope="module")
def bases():
    return {name: TINY[name]().eval().requires_grad_(False) for name in FAMILIES}


@torch.no_grad()
def test_a_stand_in_ends_where_the_bases_own_window_does(bases):
    """A query whose own sliding window does not reach the first token gets no stand-in for it."""
    base = TINY["gemma2"](sliding_window=8).eval()
    assert base.config.layer_types[0] == "sliding_attention"
    ids, _ = batch(base, (0,))
    one = base.config.num_attention_heads
    named = [{"surgery_sink_logit": torch.full((one, 1), logit)} for logit in (-1e4, 3.0)]
    states = []
    for first in named:
        model = operated(base, 0, [first, {"surgery_sink_logit": torch.full((one, 1), -1e4)}], stand_in=True)
        outputs: list = []
        hook = runtime.attention_modules(model)[0].register_forward_hook(
            lambda *args, to=outputs: to.append(args[-1][0])
        )
        model(input_ids=ids, use_cache=False)
        hook.remove()
        states.append(outputs[0][0])
    differs = (states[0] - states[1]).abs().amax(-1) > 1e-6
    assert differs.tolist() == [WINDOW <= position < 8 for position in range(ids.shape[1])]


# --- the closed forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_closed_forms_equal_the_whole_softmax(seed):
    query, key, value = random_attention(seed)
    scores, (more, more_values) = query @ key.mT, (query @ key[:, :, :2].mT * 0.7, value[:, :, :2] + 1)
    out, lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
    got, got_lse = add_keys(out, lse, more, more_values)
    every = torch.cat([scores, more], -1)
    assert (got - every.softmax(-1) @ torch.cat([value, more_values], 2)).abs().max() < 1e-12
    assert (got_lse - every.logsumexp(-1)).abs().max() < 1e-12
    got, _ = add_keys(out, lse, more)
    assert (got - every.softmax(-1)[..., :7] @ value).abs().max() < 1e-12
    log_gamma = torch.linspace(-3, 3, 3, dtype=torch.float64)[:, None]
    biased = scores.clone()
    biased[..., 4] += log_gamma
    got, got_lse = scale_key(out, lse, scores[..., 4], value[:, :, 4:5], log_gamma)
    assert (got - biased.softmax(-1) @ value).abs().max() < 1e-12
    assert (got_lse - biased.logsumexp(-1)).abs().max() < 1e-12


def test_closed_forms_keep_empty_and_unseeing_rows():
    query, key, value = random_attention()
    scores = (query @ key.mT).requires_grad_()
    out, lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
    empty = torch.tensor([False, True, False, False, True])
    out, lse = out.masked_fill(empty[:, None], 0.0), lse.masked_fill(empty, -torch.inf)
    seen = torch.tensor([True, True, False, False, True])
    log_gamma = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    got, got_lse = scale_key(out, lse, scores[..., 0], value[:, :, :1], log_gamma, seen)
    assert torch.equal(got[:, :, 1:], out[:, :, 1:])
    assert torch.equal(got_lse[:, :, 1:], lse[:, :, 1:])
    assert not torch.equal(got[:, :, 0], out[:, :, 0])
    logits = torch.zeros(2, 3, 5, 1, dtype=torch.float64).masked_fill(~seen[:, None], -torch.inf).requires_grad_()
    got, got_lse = add_keys(got, got_lse, logits, value[:, :, :1])
    assert torch.equal(got[:, :, empty], torch.zeros_like(got[:, :, empty]))
    assert (got_lse[:, :, empty] == -torch.inf).all()
    assert (got[:, :, 2:4] - out[:, :, 2:4]).abs().max() < 1e-14
    got.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (scores, log_gamma, logits))


def test_gradients():
    query, key, value = (tensor[:1, :2].clone().requires_grad_() for tensor in random_attention())
    more_key, more_value = (tensor[:1, :2, :2].detach().clone().requires_grad_() for tensor in (key, value))
    logit, log_gamma = torch.randn(2, 1, 2).double().requires_grad_(), torch.randn(2, 1).double().requires_grad_()

    def function(query, key, value, more_key, more_value, logit, log_gamma):
        scores = (query @ key.mT).masked_fill(torch.ones(5, 7).triu(1).bool(), -torch.inf)
        out, lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
        out, lse = scale_key(out, lse, scores[..., 0], value[:, :, :1], log_gamma)
        return add_keys(out, lse, query @ more_key.mT + logit, more_value)

    assert torch.autograd.gradcheck(function, (query, key, value, more_key, more_value, logit, log_gamma))


# --- the runtime ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["all", "act"])
@pytest.mark.parametrize("sinks", SPLITS.values(), ids=SPLITS)
@torch.no_grad()
def test_identity(bases, family, kind, sinks):
    """What a fresh parameter holds changes nothing, cached and not, alone and left-padded."""
    base = bases[family]
    plain, model = copy.deepcopy(base), copy.deepcopy(base)
    tensors, none = random_terms(base, kind, 0), [{}, {}]
    runtime.patch(plain, {"layers": entries(base, sinks, none, False)})
    runtime.patch(model, {"layers": entries(base, sinks, tensors, False)})
    ids, mask = batch(base)
    want = (base if sinks is None else plain)(**given(base, ids, mask), use_cache=False).logits
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-5
    assert difference(chunked(model, ids, mask, [20, 1, 24]), want, mask) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", SPLITS.values(), ids=SPLITS)
@torch.no_grad()
def test_values_against_explicit_weights(bases, family, kind, sinks):
    base, stand_in = bases[family], kind == "stand in"
    if stand_in and sinks is None:
        pytest.skip("no head lost its first token to a split: nothing to stand in for")
    tensors = random_terms(base, kind, 1)
    ids, mask = batch(base)
    want = dense_logits(base, entries(base, sinks, tensors, stand_in), ids, mask, tensors)
    model = operated(base, sinks, tensors, stand_in)
    # What ACT leaves of a row that sinks have nearly all of is a difference of near equals: in float32 some digits are
    # lost, how many depends on the processor. In float64 it is exact.
    wide = [{name: tensor.double() for name, tensor in layer.items()} for layer in tensors]
    exact = operated(double(base), sinks, wide, stand_in)
    bound = 1e-3 if kind == "act" else 1e-4
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= bound
    for chunks in ([LENGTH], [1] * LENGTH, [7] * 6 + [3], [30, 1, 1, 13]):
        assert difference(chunked(model, ids, mask, chunks), want, mask) <= bound
        if len(chunks) < LENGTH:
            distance = (chunked(exact, ids, mask, chunks).double() - want.double()) * mask[..., None]
            assert distance.abs().max() <= 1e-9
    without = operated(base, sinks, [{}, {}])(**given(base, ids, mask), use_cache=False).logits
    if not (stand_in and sinks):
        assert difference(without, want, mask) > 1e-3, "the term changes nothing here: the test has no power"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_reach_the_terms_and_equal_those_of_finite_steps(bases, family):
    """Through the whole model in training mode, against central differences."""
    base = bases[family]
    model = operated(double(base), 0, [{k: t.double() for k, t in t.items()} for t in random_terms(base, "all", 2)])
    model.train()
    ids, mask = batch(base, PADS[:2])
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(*ids.shape, base.config.vocab_size, generator=generator).double() * mask[..., None]

    def loss():
        return (model(**given(model, ids, mask), use_cache=False).logits * weights).sum()

    loss().backward()
    module = runtime.attention_modules(model)[0]
    for name in ("surgery_log_gamma", "surgery_sink_logit", "surgery_key", "surgery_value"):
        parameter = getattr(module, name)
        step = 1e-3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += step
            above = loss()
            parameter -= 2 * step
            expected = (above - loss()) / 2
            parameter += step
        got = (parameter.grad * step).sum()
        assert abs(got - expected) <= 5e-3 * abs(expected) + 1e-5, name  # norms compute in float32


@torch.no_grad()
def test_packed_rows_are_separate_rows(bases):
    model = operated(bases["qwen3"], 0, random_terms(bases["qwen3"], "all", 3))
    ids, _ = batch(model, (0,))
    lengths = (13, 1, 31)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    rows = [model(input_ids=row, use_cache=False).logits for row in ids.split(lengths, dim=1)]
    assert difference(packed, torch.cat(rows, 1), torch.ones_like(ids)) <= 1e-5


def test_generation_of_a_padded_batch(bases):
    model = operated(bases["gpt_oss"], 0, random_terms(bases["gpt_oss"], "all", 4))
    ids, mask = batch(model)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(made, model.generate(input_ids=ids, attention_mask=mask, **options, use_cache=False))
    for row, pad in enumerate(PADS):
        unpadded = model.generate(
            input_ids=ids[row : row + 1, pad:], attention_mask=mask[row : row + 1, pad:], **options
        )
        assert torch.equal(unpadded[0, LENGTH - pad :], made[row, LENGTH:])


@torch.no_grad()
def test_without_terms_no_log_sum_exp_is_asked_for(bases, monkeypatch):
    """A checkpoint without terms runs what it ran before there were any: plain SDPA."""
    from surgery.runtime import surgery_attention as attention

    lse_asked, fused = [], attention.fused
    monkeypatch.setattr(attention, "fused", lambda *a, **k: lse_asked.append(a[4]) or fused(*a, **k))
    for tensors, expected in (([{}, {}], {False}), (random_terms(bases["llama"], "gamma", 0), {True})):
        lse_asked.clear()
        model = operated(bases["llama"], 2, tensors)
        ids, mask = batch(model)
        chunked(model, ids, mask, [30, 1, 14])
        assert set(lse_asked) == expected


# --- files ----------------------------------------------------------------------------------------------------------


def test_saved_files_through_both_doors(bases, tmp_path):

    kinds = dict.fromkeys(FAMILIES, "all") | {"gpt_oss": "act and keys"}
    models = {
        tmp_path / name: operated(bases[name], 0, random_terms(bases[name], kinds[name], 5)) for name in FAMILIES
    }
    check_both_ways_to_load(models, tmp_path)


def test_a_missing_tensor_raises_through_both_doors(bases, tmp_path):
    from conftest import edit_tensors
    from transformers import AutoModelForCausalLM

    import surgery

    operated(bases["llama"], 0, random_terms(bases["llama"], "all", 5)).save_pretrained(tmp_path / "out")
    edit_tensors(tmp_path / "out", lambda tensors: tensors.pop("model.layers.1.self_attn.surgery_key"))
    surgery.register()
    with pytest.raises(ValueError, match=r"1 parameters .* model.layers.1.self_attn.surgery_key"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(surgery.SurgeryError, match="surgery_key"):
        surgery.load(tmp_path / "out")
    answer = load_without_package([tmp_path / "out"], tmp_path, trust=True)[tmp_path / "out"]
    assert "surgery_key" in answer["error"]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"parameters": {"surgery_gamma": [8]}}, "other parameters"),
        ({"parameters": {"surgery_log_gamma": [4]}}, r"surgery_log_gamma the shape \[4\]; it is \[8\]"),
        ({"parameters": {"surgery_sink_logit": [8]}}, "virtual keys"),
        ({"parameters": {"surgery_sink_logit": [8, 0]}}, "virtual keys"),
        ({"parameters": {"surgery_key": [4, 1, 8]}}, "without surgery_sink_logit"),
        ({"parameters": {"surgery_sink_logit": [8, 1], "surgery_value": [8, 1, 8]}}, r"it is \[4, 1, 8\]"),
        ({"parameters": {"surgery_log_gamma": [8]}, "stand_in": True}, "stand_in"),
        ({"parameters": []}, "other parameters"),
        ({"parameters": {"surgery_log_beta": [8]}}, "without the other"),
        ({"parameters": {"surgery_sink_probe": [8, 10]}}, "without the other"),
        ({"parameters": {"surgery_log_beta": [8], "surgery_sink_probe": [8, 8]}}, r"it is \[8, 10\]"),
        (
            {"parameters": {"surgery_log_beta": [8], "surgery_sink_probe": [8, 10], "surgery_log_gamma": [8]}},
            "one bias",
        ),
    ],
)
def test_a_block_edited_by_hand_is_refused(bases, entry, says):
    with pytest.raises(ValueError, match=says):
        runtime.patch(copy.deepcopy(bases["llama"]), {"layers": [entry, {}]})
