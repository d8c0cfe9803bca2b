"""Numbers at their ends: windows of one token, weights without a limit, rows of nothing but padding, odd chunks.

What is expected comes from the stock model: as it is, or in float64 with a mask of its own for every head.
"""

from __future__ import annotations

import copy

import pytest
import torch
from families import TINY
from tokenizers_of_bytes import byte_tokenizer

import surgery
from surgery.runtime.modeling_surgery import CACHE

SEED = 11


def recipe(*steps) -> dict:
    return {"version": 1, "name": "x", "operations": list(steps), "evaluate": None}


def apply(model, *steps, **more):
    surgery.apply(recipe(*steps), model, **more)
    return model.eval()


def split(sinks: int, window: int, ratio: float = 1.0, **more) -> dict:
    return {"op": "duo_attention", "streaming_ratio": ratio, "sinks": sinks, "window": window} | more


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(SEED))


def padded(lengths, width: int, left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = left
        mask[row, :length] |= not left
    return ids, mask


def masked(stock, sinks: int, window: int, layers: dict[int, list[int]] | None = None, bias: float = 0.0):
    """The stock model in float64, whose heads see what a head split says; `bias` is added to the first token's score.

    Args:
        layers: layer -> query heads that stream; default all of all layers.
    """
    model = copy.deepcopy(stock).double().eval()
    model.set_attn_implementation("eager")
    model.config.use_cache = False

    def hook(module, args, kwargs):
        given = kwargs["attention_mask"]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        length, heads = hidden.shape[1], model.config.num_attention_heads
        at = torch.arange(length)
        if given is None:
            given = torch.zeros(1, 1, length, length).masked_fill(at[:, None] < at, -torch.inf)
        seen = given > -1e30
        first = seen.any(-2).int().argmax(-1)[:, :, None, None]  # the first real token of each row
        near = (at[:, None] - at < window) | (at - first < sinks)
        streams = torch.zeros(heads, dtype=torch.bool)
        streams[range(heads) if layers is None else layers.get(module.layer_idx, [])] = True
        seen = seen & (near | ~streams[:, None, None])
        score = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
        kwargs["attention_mask"] = score + bias * (at == first)
        return args, kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def run(model, ids, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.double()


def chunked(model, ids, sizes, mask=None) -> torch.Tensor:
    """Logits of chunks of these sizes, the last of which takes the rest."""
    cache, begin, logits = None, 0, []
    for size in [*sizes, ids.shape[1] - sum(sizes)]:
        end = begin + size
        more = {} if mask is None else {
            "attention_mask": mask[:, :end], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        }  # fmt: skip
        with torch.no_grad():
            out = model(input_ids=ids[:, begin:end], use_cache=True, **{CACHE: cache}, **more)
        cache = out[CACHE]
        logits.append(out.logits.double())
        begin = end
    return torch.cat(logits, 1)


def close(got, expected, tolerance: float = 1e-4) -> bool:
    return bool(got.isfinite().all()) and (got - expected).abs().max().item() <= tolerance * expected.std().item()


# --- sinks and windows ----------------------------------------------------------------------------

REACHES = [(0, 1), (1, 1), (0, 2), (3, 1), (7, 5), (40, 1), (0, 29), (29, 1), (0, 1000), (1000, 1), (130, 3)]


@pytest.mark.parametrize(("sinks", "window"), REACHES)
@pytest.mark.parametrize("length", [1, 2, 30, 129, 260])
def test_reach(sinks, window, length):
    """At once, in chunks and one by one, whatever is longer: the text, the window, the sinks or a block of queries."""
    model = TINY["llama"]()
    expected = run(masked(model, sinks, window), ids := tokens(2, length))
    apply(model, split(sinks, window))
    assert close(run(model, ids, use_cache=False), expected)
    assert close(run(model, ids, use_cache=True), expected)
    sizes = {1: [[]], 2: [[1]], 30: [[1] * 29, [7, 1, 1, 13]], 129: [[128], [1, 127]], 260: [[127, 1, 1], [3, 129]]}
    for each in sizes[length]:
        assert close(chunked(model, ids, each), expected), each


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (1, 2), (3, 4), (30, 1), (9, 30)])
def test_padding(sinks, window, left):
    """Rows of one token, of all and of none: real tokens are those of the row alone, and nothing is NaN."""
    model, lengths, width = TINY["llama"](), (20, 1, 13, 0, 2), 20
    oracle = masked(model, sinks, window)
    ids, mask = padded(lengths, width, left)
    apply(model, split(sinks, window))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for got in (
        run(model, ids, attention_mask=mask, position_ids=positions, use_cache=False),
        run(model, ids, attention_mask=mask.bool(), position_ids=positions, use_cache=True),
        chunked(model, ids, [9, 1, 1, 6], mask),
    ):
        assert got.isfinite().all()
        for row, length in enumerate(lengths):
            if length:
                real = slice(width - length, width) if left else slice(0, length)
                assert close(got[row : row + 1, real], run(oracle, ids[row : row + 1, real])), row


def test_all_rows_are_padding():
    model = apply(TINY["llama"](), split(2, 3))
    assert run(model, tokens(2, 9), attention_mask=torch.zeros(2, 9, dtype=torch.long)).isfinite().all()


HEADS = {0: [0, 1, 4, 5], 1: [2, 3]}


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (2, 3), (0, 200)])
def test_some_heads_of_some_layers(tmp_path, sinks, window):
    """KV heads 0 and 2 of the first layer and 1 of the second stream, by a file of scores."""
    import json

    from surgery.calibration.head_scores import HeadScores

    scores = HeadScores("mine", [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    (tmp_path / "s.json").write_text(json.dumps(scores.to_dict()))
    model = TINY["llama"]()
    expected = run(masked(model, sinks, window, HEADS), ids := tokens(3, 150))
    surgery.apply(
        recipe(split(sinks, window, None, threshold=0.5, scores=str(tmp_path / "s.json"))), model, tokenizer=None
    )
    assert close(run(model.eval(), ids), expected)
    assert close(chunked(model, ids, [5, 128, 1]), expected)


@pytest.mark.parametrize("base_window", [1, 2, 6, 1000])
@pytest.mark.parametrize("window", [1, 3, 6, 64])
def test_the_bases_own_window(base_window, window):
    model = TINY["mistral"](sliding_window=base_window)
    expected = run(masked(model, 2, window), ids := tokens(2, 40))
    apply(model, split(2, window))
    assert close(run(model, ids), expected)
    assert close(chunked(model, ids, [3, 1, 17]), expected)


# --- generating -----------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3},
    "sampled": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "beams that are sampled": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (1, 4)])
def test_generate(way, sinks, window):
    """Beyond the positions that the model was made for, from rows of unequal length, as without a cache."""
    model = TINY["llama"](max_position_embeddings=16)
    oracle = masked(model, sinks, window)
    apply(model, split(sinks, window))
    ids, mask = padded((10, 3, 1), 10)
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2} | WAYS[way]
    got = []
    for each, cached in ((oracle, False), (model, True)):
        torch.manual_seed(5)
        got.append(each.generate(ids, attention_mask=mask, use_cache=cached, **options))
    assert torch.equal(*got)


def test_prompt_lookup():
    """Tokens that were guessed and taken back leave no trace, though the window has moved on."""
    model = TINY["llama"]()
    oracle = masked(model, 1, 3)
    apply(model, split(1, 3))
    ids = tokens(1, 6).repeat(1, 4)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    expected = oracle.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **options), expected)


def test_embeddings_and_positions_in_place_of_tokens():
    model = TINY["llama"]()
    ids = tokens(2, 17)
    embedded, positions = model.model.embed_tokens(ids).detach(), torch.arange(1000, 1017)[None].expand(2, -1)
    with torch.no_grad():
        expected = model(inputs_embeds=embedded, position_ids=positions, logits_to_keep=3, labels=None).logits
    apply(model, split(17, 1))
    with torch.no_grad():
        got = model(inputs_embeds=embedded, position_ids=positions, logits_to_keep=3).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_gradients():
    """Of every weight, through windows of three tokens and blocks of queries, after a forward in inference mode."""
    model = TINY["llama"]()
    oracle = masked(model, 1, 3)
    apply(model, split(1, 3))
    ids = tokens(2, 140)
    with torch.inference_mode():
        model(input_ids=ids)
    for each in (model, oracle):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        assert close(parameter.grad.double(), expected[name].grad, 1e-3), name


# --- weights --------------------------------------------------------------------------------------


def scaled(name: str, factor: float):
    def change(model):
        for layer in model.model.layers:
            getattr(layer.self_attn, name).weight.data.mul_(factor)

    return change


def embedded(factor: float):
    return lambda model: model.model.embed_tokens.weight.data.mul_(factor)


def row_of_nothing(model):
    model.model.embed_tokens.weight.data[5:40] = 0
    model.model.layers[0].self_attn.q_proj.weight.data[3:20] = 0


def normless(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.zero_()


CHANGES = {
    "equal keys": scaled("k_proj", 0.0),
    "no values": scaled("v_proj", 0.0),
    "huge scores": scaled("k_proj", 1e3),
    "endless scores": scaled("k_proj", 1e20),
    "tiny keys": scaled("k_proj", 1e-38),
    "denormal values": scaled("v_proj", 1e-41),
    "huge values": scaled("v_proj", 1e30),
    "huge embeddings": embedded(1e15),
    "embeddings beyond their squares": embedded(1e25),
    "rows of nothing": row_of_nothing,
    "norms of nothing": normless,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_weights_at_their_ends(name, dtype):
    """A split that changes nothing gives what stock attention gives, where that is finite at all."""
    if (name, dtype) in [("endless scores", torch.float16), ("huge values", torch.float16)]:
        pytest.skip("such weights are infinite in this dtype")
    model = TINY["llama"]()
    CHANGES[name](model)
    model = model.to(dtype)
    ids = tokens(2, 24)
    expected = run(model, ids)
    apply(model, split(3, 64))
    for got in (run(model, ids), chunked(model, ids, [5, 1, 1, 9])):
        finite = expected.isfinite()
        assert torch.equal(finite, got.isfinite())
        if bool(finite.all()):
            spread = expected.std().item()
            assert (got - expected).abs().max().item() <= {4: 1e-4, 2: 0.15}[dtype.itemsize] * max(spread, 1e-30)


@pytest.mark.parametrize("name", ["equal keys", "huge scores", "tiny keys", "rows of nothing", "huge values"])
def test_weights_at_their_ends_in_a_window(name):
    model = TINY["llama"]()
    CHANGES[name](model)
    expected = run(masked(model, 1, 3), ids := tokens(2, 24))
    apply(model, split(1, 3))
    tolerance = 1e-2 if name == "huge scores" else 1e-4
    assert close(run(model, ids), expected, tolerance)
    assert close(chunked(model, ids, [5, 1, 1, 9]), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_a_mean_of_the_largest_numbers(tmp_path, dtype):
    """It is computed in float64 and rounded once: no sum overflows on the way."""
    from safetensors.torch import load_file

    model = TINY["llama"]().to(dtype)
    largest = torch.finfo(dtype).max
    weight = model.model.layers[0].self_attn.k_proj.weight.data
    weight[:, :8] = largest
    weight[:8, 8:16] = -largest
    weight[:, 16:24] = torch.finfo(dtype).smallest_normal
    old = weight.double().view(4, 8, 64)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    expected = ((old[0::2] + old[1::2]) / 2).to(dtype).view(16, 64)
    surgery.apply(
        recipe({"op": "gqa", "kv_heads": 2, "method": "mean"}),
        str(tmp_path / "base"), output=tmp_path / "out", check=False, evaluate=False,
    )  # fmt: skip
    got = load_file(tmp_path / "out/model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert torch.allclose(got.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=0)


def test_groups_that_do_not_divide(tmp_path):
    """Four KV heads of twelve query heads become three: a head that enters two groups counts by its readers."""
    model = TINY["llama"](num_attention_heads=12, num_key_value_heads=4, head_dim=8, hidden_size=60)
    old = [layer.self_attn.v_proj.weight.detach().double().view(4, 8, 60) for layer in model.model.layers]
    surgery.apply(recipe({"op": "gqa", "kv_heads": 3, "method": "mean"}), model)
    for before, layer in zip(old, model.model.layers, strict=True):
        readers = [before[query // 3] for query in range(12)]
        expected = torch.stack([torch.stack(readers[4 * group : 4 * group + 4]).mean(0) for group in range(3)])
        assert torch.allclose(layer.self_attn.v_proj.weight.double().view(3, 8, 60), expected, atol=1e-6)


# --- terms of the scores --------------------------------------------------------------------------

GAMMAS = [1e-300, 1e-30, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.5, 1.0, 100.0, 1e6, 1e8, 1e38, 1e300]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gamma_at_its_ends(gamma):
    """A gamma adds its logarithm to the first token's score; the first token's own output does not depend on it."""
    import math

    model = TINY["llama"]()
    expected = run(masked(model, 0, 1000, bias=math.log(gamma)), ids := tokens(2, 20))
    try:
        apply(model, {"op": "sink_calibration", "method": "zero_tuning", "gamma": gamma})
    except surgery.SurgeryError:
        return
    assert close(run(model, ids), expected, 1e-3)
    assert close(chunked(model, ids, [1, 4, 1]), expected, 1e-3)


LOGITS = [-1e300, -1e38, -1e4, -80.0, 0.0, 80.0, 1e4, 1e38, 1e300]


@pytest.mark.parametrize("logit", LOGITS)
def test_a_learned_logit_at_its_ends(logit):
    """One more key without a value: a share of exp(logit) of every head's attention goes nowhere."""
    model = TINY["llama"]()
    oracle = copy.deepcopy(model).double()
    oracle.set_attn_implementation("eager")
    from transformers.models.llama import modeling_llama as code

    def attention(module, query, key, value, attention_mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * scaling
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
        scores = torch.cat([scores, torch.full_like(scores[..., :1], logit)], -1)
        return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "eager_attention_forward", attention)
        expected = run(oracle, ids := tokens(2, 20), use_cache=False)
    try:
        apply(model, {"op": "sink_calibration", "method": "learned", "logit": logit})
    except surgery.SurgeryError:
        return
    assert close(run(model, ids), expected, 1e-3)
    assert close(chunked(model, ids, [1, 4, 1]), expected, 1e-3)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("field", ["gamma", "logit"])
def test_terms_that_are_no_number(field, value):
    method = {"gamma": "zero_tuning", "logit": "learned"}[field]
    with pytest.raises(surgery.SurgeryError):
        apply(TINY["llama"](), {"op": "sink_calibration", "method": method, field: float(value)})


@pytest.mark.parametrize("ratio", [5e-324, 1e-9, 0.124, 0.126, 0.999, 1.0])
def test_a_share_of_heads_at_its_ends(ratio):
    """Of eight heads at least one is on, and at a share of all of them nothing changes."""
    model = TINY["llama"]()
    expected = run(model, ids := tokens(2, 20))
    step = {"op": "moh", "active_ratio": ratio, "shared_ratio": 0.0, "router": "random"}
    if ratio < 0.01:
        with pytest.raises(surgery.SurgeryError, match="give at least 1/8"):
            apply(model, step)
        return
    apply(model, step)
    got = run(model, ids)
    assert got.isfinite().all()
    assert close(got, expected, 1e-4) == (ratio >= 0.999)
    assert close(chunked(model, ids, [1, 4, 1]), got)


# --- sparse prefill -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 64, 65])
def test_sparse_prefill_that_leaves_nothing_out(length):
    """Blocks of 16 tokens, all of which are read: at once, padded, and in chunks that end anywhere."""
    model = TINY["llama"]()
    ids, mask = padded((length, max(length - 7, 1), 0), length)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = run(model, ids, attention_mask=mask, position_ids=positions)
    plain = run(model, ids[:1])
    apply(model, {"op": "sparse_prefill", "method": "minference", "block": 16, "dense_below": 0} | ALL_BLOCKS)
    got = run(model, ids, attention_mask=mask, position_ids=positions)
    assert got.isfinite().all()
    real = mask.bool()
    assert close(got[real], expected[real])
    assert close(run(model, ids[:1]), plain)
    for sizes in ([], [1], [length // 2], [1, length // 3]):
        assert close(chunked(model, ids[:1], [size for size in sizes if 0 < size < length]), plain)


ALL_BLOCKS = {"method": "streaming", "sinks": 1000, "window": 1000}


# --- surgery of surgery ---------------------------------------------------------------------------


def test_one_after_another_on_disk(tmp_path):
    """Merged, saved, split, saved, weighted, saved: the same as a recipe of all three, and as the oracle."""
    import math

    steps = [
        {"op": "gqa", "kv_heads": 2, "method": "mean"},
        split(1, 3),
        {"op": "sink_calibration", "method": "zero_tuning", "gamma": 2.5},
    ]
    model = TINY["llama"]()
    merged = copy.deepcopy(model)
    surgery.apply(recipe(steps[0]), merged)
    expected = run(masked(merged, 1, 3, bias=math.log(2.5)), ids := tokens(2, 40))
    apply(once := copy.deepcopy(model), *steps)
    model.save_pretrained(tmp_path / "0")
    byte_tokenizer().save_pretrained(tmp_path / "0")
    for number, step in enumerate(steps):
        before, after = tmp_path / str(number), tmp_path / str(number + 1)
        surgery.apply(recipe(step), str(before), output=after, check=False, evaluate=False)
    again = surgery.load(tmp_path / "3").eval()
    assert [len(surgery.Report.of(tmp_path / n).data["history"]) for n in "123"] == [0, 1, 2]
    for each in (once, again):
        assert close(run(each, ids), expected)
        assert close(chunked(each, ids, [3, 1, 1, 20]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (2, 5)])
def test_half_precision(dtype, sinks, window):
    """Rounded as a stock model of the same dtype is, against float64 of the same weights."""
    model = TINY["llama"]().to(dtype)
    stock = (run(model, ids := tokens(2, 60)) - run(masked(model, 0, 1000), ids)).abs().max().item()
    expected = run(masked(model, sinks, window), ids)
    apply(model, split(sinks, window))
    assert (run(model, ids) - expected).abs().max().item() <= 3 * stock
    assert (chunked(model, ids, [1, 30, 1]) - expected).abs().max().item() <= 3 * stock
