"""Numbers, second round: probes against brute force, sparse prompts behind a head split, weights that cancel.

What is expected is written out here in float64, or is what the definition of a probe says of a model whose answers are
known: one without attention, each token of which has one successor.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from families import TINY
from tokenizers_of_bytes import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.data.text import Text
from surgery.evaluation.answers import goes_in_circles
from surgery.runtime.modeling_surgery import CACHE

MERGE = {"op": "gqa", "kv_heads": 2, "method": "mean"}


def recipe(*steps) -> dict:
    return {"version": 1, "name": "x", "operations": list(steps), "evaluate": None}


def apply(model, *steps):
    surgery.apply(recipe(*steps), model)
    return model.eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(5))


def run(model, ids, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.double()


def close(got, expected, tolerance: float = 1e-4) -> bool:
    return bool(got.isfinite().all()) and (got - expected).abs().max().item() <= tolerance * expected.std().item()


# --- a chat whose answers are known ---------------------------------------------------------------

TOKENIZER = byte_tokenizer(chat=True)
END = TOKENIZER.eos_token_id
VOCAB = 300


def letter(text: str) -> int:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"][0]


def chain(successors: dict[str, str | dict], default: str = "</s>") -> LlamaForCausalLM:
    """A model whose next token follows from the last one alone: one successor, or probabilities of several."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=VOCAB, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    head = torch.full((VOCAB, VOCAB), -30.0)
    names = {letter(name): value for name, value in successors.items()}
    for token in range(VOCAB):
        value = names.get(token, default)
        for name, share in (value if isinstance(value, dict) else {value: 1.0}).items():
            head[END if name == "</s>" else letter(name), token] = math.log(share)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(head / VOCAB**0.5)  # a normalised row of the identity is sqrt(VOCAB) long
    return model


REQUESTS = Text("two requests", "0" * 64, "Hello!\nWhat is two plus three?\n")


def chat(out, base=None, **settings) -> dict:
    settings = {"tokens": 20, "requests": REQUESTS} | settings
    return surgery.evaluate(out, base, probe="chat", tokenizer=TOKENIZER, **settings).to_dict()


HELLO = {" ": "H", "H": "i"}


def test_an_answer_that_ends():
    record = chat(chain(HELLO), chain(HELLO))
    assert [record[side]["answered"] for side in ("base", "out")] == [2, 2]
    assert record["kept"]["share"] == 1.0
    assert {case["out"]["text"] for case in record["cases"]} == {"Hi"}
    assert {case["out"]["tokens"] for case in record["cases"]} == {3}


UNSOUND = {
    "nothing": {" ": "</s>"},
    "one letter without end": {" ": "a", "a": "a"},
    "two letters in turn": {" ": "a", "a": "b", "b": "a"},
    "white space alone": {" ": "\n", "\n": "\t"},
    "more than was asked for": dict(itertools.pairwise(" abcdefghijklmnopqrstuvwxyz")),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_answers_that_do_not_count(name):
    record = chat(chain(UNSOUND[name]), chain(HELLO))
    assert record["out"]["answered"] == 0
    assert record["kept"] == record["kept"] | {"of": 2, "kept": 0, "share": 0.0}
    assert record["out"]["ended"] == (2 if name in ("nothing", "white space alone") else 0)
    assert record["out"]["loops"] == (2 if name in ("one letter without end", "two letters in turn") else 0)


@pytest.mark.parametrize(("margin", "kept"), [(0.0, 0), (0.134, 0), (0.136, 2)])
def test_the_margin_is_in_nats_a_token(margin, kept):
    """The base says "Hi" at 0.7 * 0.6 * 1 and "Ho" at 0.7 * 0.4 * 1: a third of log 1.5 less a token."""
    base = chain({" ": {"H": 0.7, "a": 0.3}, "H": {"i": 0.6, "o": 0.4}, "i": "</s>", "o": "</s>"})
    out = chain({" ": "H", "H": "o"})
    record = chat(out, base, margin=margin)
    per_token = (math.log(0.6) - math.log(0.4)) / 3
    assert record["base"]["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.6)) / 3, abs=1e-4)
    assert record["out"]["nll"] - record["base"]["nll"] == pytest.approx(per_token, abs=1e-4)
    assert record["kept"]["kept"] == (2 if per_token <= margin else 0) == kept


def test_a_model_may_end_with_a_token_that_the_base_does_not_end_with():
    """Ends are a model's own: its generation config, and what the tokenizer says."""
    out = chain({" ": "H", "H": "!", "!": "!"})
    out.generation_config.eos_token_id = [END, letter("!")]
    record = chat(out, chain(HELLO), margin=100.0)
    assert record["out"]["answered"] == record["kept"]["kept"] == 2
    assert {case["out"]["text"] for case in record["cases"]} == {"H"}


def test_circles_against_every_block():
    """All words of two letters up to 14 long, and a few long ones, against the definition in three loops."""

    def by_definition(ids) -> bool:
        for size in range(1, 33):
            for begin in range(len(ids)):
                times = 1
                while ids[begin : begin + size] == ids[begin + times * size : begin + (times + 1) * size] != ():
                    times += 1
                whole = times * size
                rest = 0  # a block that is cut still goes on in the circle
                while begin + whole + rest < len(ids) and ids[begin + whole + rest] == ids[begin + rest]:
                    rest += 1
                if begin + size <= len(ids) and times >= 3 and whole + rest >= 12:
                    return True
        return False

    draw = torch.Generator().manual_seed(0)
    words = [tuple(word) for length in (11, 12, 13) for word in itertools.product((0, 1), repeat=length)][::7]
    blocks = [torch.randint(9, (size,), generator=draw).tolist() for size in (1, 4, 5, 31, 32, 33)]
    words += [tuple(block * times + block[:cut]) for block in blocks for times in (2, 3, 4) for cut in (0, 1)]
    wrong = [word for word in words if goes_in_circles(word) != by_definition(word)]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "count"), [("a\nb\n\n c \n", 3), ("a\r\nb\r\n", 2), ("a\u2028b\u0085c\x0bd\x1ce\n", 1)]
)
def test_a_request_is_a_line(tmp_path, text, count):
    """Lines end as in every text file; other marks of Unicode stand within a request."""
    (tmp_path / "r.txt").write_bytes(text.encode())
    assert chat(chain(HELLO), requests=str(tmp_path / "r.txt"))["requests"] == count


def test_greedy_answers_are_those_of_the_whole_text_read_again():
    """By the cache of a surgical model with a window of four tokens, against a run of everything at each step."""
    model = TINY["llama"](vocab_size=300, max_position_embeddings=1024)
    apply(model, {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 4})
    result = surgery.evaluate(model, probe="chat", tokenizer=TOKENIZER, tokens=6, requests=REQUESTS)
    for case, answer in list(zip(result.cases, result.outcomes["out"], strict=True)):
        ids = list(case.prompt)
        for token in answer.ids:
            assert run(model, torch.tensor([ids]), use_cache=False)[0, -1].argmax().item() == token
            ids.append(token)


# --- perplexity and KL against brute force --------------------------------------------------------


def brute(out, base, ids) -> tuple[float, float, float]:
    one, other = (run(model, ids).log_softmax(-1)[:, :-1] for model in (out, base))
    loss = -one.gather(2, ids[:, 1:, None]).mean().item()
    kl = (other.exp() * (other - one)).sum(-1).mean().item()
    return loss, kl, (one.argmax(-1) == other.argmax(-1)).double().mean().item()


@pytest.mark.parametrize(("length", "count", "top_k"), [(2, 5, 300), (17, 3, 100_000), (840, 1, 300)])
def test_scores_of_windows(tmp_path, length, count, top_k):
    """Windows that do not divide the text; all probabilities are kept where more are asked for than there are."""
    draw = torch.randint(26, (840,), generator=torch.Generator().manual_seed(1))
    words = "".join(chr(97 + number) for number in draw.tolist())
    (tmp_path / "t.txt").write_text(words)
    base = TINY["llama"](vocab_size=300, max_position_embeddings=1024)
    out = apply(copy.deepcopy(base), MERGE)
    from surgery.data.text import windows

    ids = windows(words, TOKENIZER, length, count)
    whole = TOKENIZER(words, add_special_tokens=False)["input_ids"]
    begin = 0
    for row in ids.tolist():  # each of them lies behind the one before
        begin = next(i for i in range(begin, 840) if whole[i : i + length] == row) + length
    loss, kl, same = brute(out, base, ids)
    result = surgery.evaluate(
        out, base, tokenizer=TOKENIZER, text=str(tmp_path / "t.txt"), windows=count, length=length, top_k=top_k
    )
    assert math.log(result.out.perplexity) == pytest.approx(loss, rel=1e-5)
    assert result.kl["mean"] == pytest.approx(kl, rel=1e-4)
    assert result.top1_agreement == pytest.approx(same)


@pytest.mark.parametrize("factor", [1e4])
def test_logits_without_measure(factor):
    """A loss that no perplexity can hold is infinite, not an error; JSON has no word for it and gets null."""
    import json

    base = TINY["llama"](vocab_size=300, max_position_embeddings=1024)
    out = copy.deepcopy(base)
    out.config.tie_word_embeddings = False
    out.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() * factor)
    few = {
        "tokenizer": TOKENIZER,
        "windows": 1,
        "length": 16,
        "text": Text("letters", "0" * 64, "The quick brown fox. " * 9),
    }
    result = surgery.evaluate(out, base, **few)
    assert result.out.perplexity == math.inf
    assert result.kl["mean"] > 0
    assert result.top1_agreement == 1.0
    assert "Infinity" not in json.dumps(result.to_dict(), allow_nan=False)
    assert surgery.evaluate(base, out, **few).base.perplexity == math.inf


# --- sparse prompts behind a head split -----------------------------------------------------------


def blocks_kept(queries: int, block: int, sinks: int, window: int, dense_below: int, last: int) -> torch.Tensor:
    """bool [queries, queries], by the words of recipes/README and surgery_sparse_prefill.py, pair by pair."""
    seen = torch.ones(queries, queries, dtype=torch.bool).tril()
    for row in range(queries // block):  # a block that the prompt holds only a part of reads all
        if (row + 1) * block <= dense_below or (row + 1) * block > queries - last:
            continue
        kept = [
            column
            for column in range(row + 1)
            if column == 0  # the first block is kept by every method
            or any(
                key < sinks or query - key < window
                for query in range(row * block, (row + 1) * block)
                for key in range(column * block, min((column + 1) * block, query + 1))
            )
        ]
        if len(kept) > 0.6 * (row + 1):
            continue
        for column in set(range(row)) - set(kept):
            seen[row * block : (row + 1) * block, column * block : (column + 1) * block] = False
    return seen


def oracle(stock, streaming: list[int], sinks: int, window: int, sparse: torch.Tensor):
    """The stock model in float64: heads of `streaming` see sinks + window, all others what `sparse` says."""
    model = copy.deepcopy(stock).double().eval()
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    at = torch.arange(len(sparse))
    near = (at[:, None] >= at) & ((at[:, None] - at < window) | (at < sinks))

    def hook(module, args, kwargs):
        seen = torch.stack([near if head in streaming else sparse for head in range(8)])[None]
        kwargs["attention_mask"] = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
        return args, kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    return model


SETTINGS = [
    {"sinks": 1, "window": 1},
    {"sinks": 0, "window": 17},
    {"sinks": 17, "window": 16, "dense_below": 64},
    {"sinks": 1, "window": 1, "dense_below": 50, "last_rows_dense": 20},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [97, 203])
def test_a_split_and_a_sparse_prompt(tmp_path, setting, length):
    """KV heads 0 and 2 stream; the others read blocks of 16: at once, cached, padded, and one token after."""
    import json

    from surgery.calibration.head_scores import HeadScores

    scores = HeadScores("mine", [[0.0, 1.0, 0.0, 1.0]] * 2)
    (tmp_path / "s.json").write_text(json.dumps(scores.to_dict()))
    model = TINY["llama"]()
    sparse = {"sinks": 0, "window": 1, "dense_below": 0, "last_rows_dense": 0} | setting
    last = sparse.pop("last_rows_dense")
    seen = blocks_kept(length, 16, last=last, **sparse)
    ids = tokens(1, length)
    expected = run(oracle(model, [0, 1, 4, 5], 2, 5, seen), ids)
    split = {"op": "duo_attention", "streaming_ratio": None, "threshold": 0.5, "sinks": 2, "window": 5}
    blocks = {
        "op": "sparse_prefill",
        "method": "streaming",
        "block": 16,
        "heads": "retrieval",
        "last_rows_dense": last,
    }
    apply(model, split | {"scores": str(tmp_path / "s.json")}, blocks | sparse)
    assert close(run(model, ids, use_cache=False), expected)
    assert close(run(model, ids, use_cache=True), expected)
    wide = torch.cat([tokens(1, 9), ids], 1)
    mask = (torch.arange(length + 9) >= 9).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert close(run(model, wide, attention_mask=mask, position_ids=positions)[:, 9:], expected)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True)[CACHE]
        got = model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache}).logits.double()
    before = run(oracle(model_of(ids), [0, 1, 4, 5], 2, 5, step_of(length, last, sparse)), ids)
    assert close(got[:, -1], before[:, -1])


def model_of(ids):
    return TINY["llama"]()


def step_of(length: int, last: int, sparse: dict) -> torch.Tensor:
    """The prompt without its last token, then that token, which reads all."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[: length - 1, : length - 1] = blocks_kept(length - 1, 16, last=last, **sparse)
    return seen


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_repeated_heads_give_the_same(family, dtype):
    """expand copies KV heads: no weight is computed, and what the model says stays to rounding."""
    model = TINY[family]().to(dtype)
    before, ids = copy.deepcopy(model), tokens(2, 19)
    apply(model, {"op": "expand", "kv_heads": 8})
    exact = run(copy.deepcopy(before).double(), ids)
    rounded = (run(before, ids) - exact).abs().max().item()
    assert (run(model, ids) - exact).abs().max().item() <= 1.5 * rounded + 1e-6


def test_heads_that_cancel():
    """The mean of a head and its negative is nothing: values vanish, and the layer adds its bias alone."""
    model = TINY["llama_bias"]()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for part in (projection.weight, projection.bias):
                    part[8:16], part[24:32] = -part[:8], -part[16:24]
    biases = [layer.self_attn.o_proj.bias.detach().clone() for layer in model.model.layers]
    apply(model, MERGE)
    for layer, bias in zip(model.model.layers, biases, strict=True):
        assert not layer.self_attn.v_proj.weight.any()
        assert not layer.self_attn.v_proj.bias.any()
        given = []
        hook = layer.self_attn.register_forward_hook(lambda _, __, out, given=given: given.append(out[0]))
        run(model, tokens(2, 9))
        hook.remove()
        assert torch.equal(given[0], bias.expand_as(given[0]))


@pytest.mark.parametrize("heads", [[0], [7], [0, 1], [0, 3, 5, 6], [1, 2, 3, 4, 5, 6, 7]])
def test_pruned_heads_are_silent_heads(heads):
    """Removed heads say what heads of output zero say, in float64, whatever KV heads they shared."""
    model = TINY["llama"]().double()
    other, ids = copy.deepcopy(model), tokens(2, 21)
    for layer in other.model.layers:
        for head in heads:
            layer.self_attn.o_proj.weight.data[:, 8 * head : 8 * head + 8] = 0
    apply(model, {"op": "prune_heads", "granularity": "head", "heads": [heads, heads], "refit": False})
    assert close(run(model, ids), run(other, ids), 1e-12)
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=299)
    assert torch.equal(
        cached, other.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=299)
    )


@pytest.mark.parametrize("gates", [[2.0**-60] * 8, [2.0**60] * 8, [1.0, -1.0] * 4, [3.0] * 8])
def test_gates_are_factors_of_what_a_head_gives(gates):
    model = TINY["llama"]()
    weight = [layer.self_attn.o_proj.weight.detach().double().clone() for layer in model.model.layers]
    apply(model, {"op": "head_mask", "values": {0: gates, 1: gates}})
    factors = torch.tensor(gates, dtype=torch.float64).repeat_interleave(8)
    for layer, before in zip(model.model.layers, weight, strict=True):
        assert torch.equal(layer.self_attn.o_proj.weight.double(), (before * factors).float().double())


@pytest.mark.parametrize("position", [0, 10**4, 2**24 - 8])
def test_far_positions(position):
    """Windows are counted in tokens, not in positions: a text that begins at position 2^24 sees the same keys."""
    model = TINY["llama"]()
    ids = tokens(1, 24)
    positions = torch.arange(position, position + 24)[None]
    stock = run(model, ids, position_ids=positions)
    apply(model, {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 12, "window": 12})
    assert close(run(model, ids, position_ids=positions), stock, 1e-3)


def test_packed_rows_that_are_one_token_each():
    """Every token is a text of its own: it says what it says alone."""
    model = apply(TINY["llama"](), {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 2})
    ids = tokens(1, 7)
    got = run(model, ids, position_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=False)
    expected = run(model, ids.T, use_cache=False)
    assert close(got[0], expected[:, 0])
