"""Decoding steps that read a part of the cache: identity, each rule against a reference in float64, what is stored."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import LENGTH, PADS, batch, chunked, difference, given
from families import TINY, check_both_ways_to_load, double
from head_split import FAMILIES, entries, operated, random_split
from head_split import base as base  # fixtures
from head_split import bases as bases
from reading import reading_model
from transformers import DynamicCache

from surgery.architecture.anatomy import Anatomy
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_config

SMALL = {"sinks": 2, "recent": 4}
RULES: dict[str, dict] = {
    "index": {"name": "index", "keys": 6},
    "index, largest": {"name": "index", "keys": 6, "group": "max"},
    "loki": {"name": "loki", "keys": 6, "dims": 3},
    "recycled": {"name": "recycled", "keys": 6, "every": 4},
    "tokenselect": {"name": "tokenselect", "keys": 6, "similarity": 0.3, "every": 32},
    "tokenselect, largest": {"name": "tokenselect", "keys": 6, "similarity": 0.9, "every": 3, "group": "max"},
    "tree": {"name": "tree", "keys": 8, "block": 2},
    "adaptive": {"name": "adaptive", "share": 0.7},
    "threshold": {"name": "threshold", "threshold": 0.2},
    "random": {"name": "random", "keys": 6, "seed": 1},
}
WHOLE = {"keys": LENGTH + 1, "share": 0.0, "threshold": 0.0}  # with one of these a rule reads all
PROMPT = 20
GENERATED = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

every_rule = pytest.mark.parametrize("rule", list(RULES))
some = pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2", "gpt_oss"], indirect=True)


def heads_of(model) -> tuple[int, int]:
    layer = Anatomy.of(model).layers[0]
    return layer.kv_heads, layer.head_dim


def bases_of(model, dims: int) -> list[torch.Tensor]:
    """Random orthonormal directions for each layer, [KV heads, head_dim, dims]."""
    generator = torch.Generator().manual_seed(4)
    kv_heads, size = heads_of(model)
    layers = range(model.config.get_text_config().num_hidden_layers)
    return [
        torch.linalg.qr(torch.randn(kv_heads, size, size, generator=generator).double()).Q[..., :dims] for _ in layers
    ]


def settings_of(rule: str, **changed) -> dict:
    return SMALL | RULES[rule] | {name: value for name, value in changed.items() if name in (SMALL | RULES[rule])}


def under(model, rule: str, *more: dict, heads=None, **changed):
    """The model with a reader in every layer, and other entries."""
    settings = settings_of(rule, **changed) | ({} if heads is None else {"heads": heads})
    model, layers = copy.deepcopy(model).eval(), model.config.get_text_config().num_hidden_layers
    shapes, (kv_heads, size) = {}, heads_of(model)
    if settings["name"] == "loki":
        shapes = {"parameters": {"surgery_read_basis": [kv_heads, size, settings["dims"]]}}
    runtime.patch(model, {"layers": [{"read": settings} | shapes | entry for entry in (more or [{}] * layers)]})
    if shapes:
        for module, basis in zip(runtime.attention_modules(model), bases_of(model, settings["dims"]), strict=True):
            module.surgery_read_basis.data.copy_(basis)
    return model


def reference(model, rule: str, prompt: int = PROMPT, **changed):
    settings = settings_of(rule, **changed)
    layers = model.config.get_text_config().num_hidden_layers
    each = [dict(settings) for _ in range(layers)]
    if settings["name"] == "loki":
        for one, basis in zip(each, bases_of(model, settings["dims"]), strict=True):
            one["basis"] = basis.float()
    return reading_model(model, each, prompt)


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
@torch.no_grad()
def test_what_reads_all_is_the_base(base):
    ids, mask = batch(base)
    want = base(**given(base, ids, mask), use_cache=False).logits
    for rule in RULES:
        model = under(base, rule, **WHOLE)
        assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-5
        assert difference(chunked(model, ids, mask, [PROMPT, *[1] * 5, 7, *[1] * 13]), want, mask) <= 1e-5


@some
@every_rule
@torch.no_grad()
def test_each_rule_is_its_formula(base, rule):
    """A row of a padded batch is the row alone, step by step behind a prompt in one call or in two."""
    model, (ids, mask) = double(under(base, rule)), batch(base)
    steps = LENGTH - PROMPT
    got = chunked(model, ids, mask, [PROMPT, *[1] * steps])
    assert difference(chunked(model, ids, mask, [PROMPT - 7, 7, *[1] * steps]), got, mask) <= 1e-9
    changed = difference(got, base(**given(base, ids, mask), use_cache=False).logits, mask)
    assert changed > 1e-3
    for row, pad in enumerate(PADS):
        one = ids[row : row + 1, pad:]
        real = torch.ones_like(one)
        alone = chunked(model, one, real, [PROMPT - pad, *[1] * steps])
        assert difference(got[row : row + 1, pad:], alone, real) <= 1e-9
        if rule != "random":
            held = reference(base, rule, PROMPT - pad)
            want = held(**given(held, one, real), use_cache=False).logits
            assert difference(alone, want, real) <= 1e-9
            if rule == "tokenselect" and not pad:
                assert any(getattr(each, "reused", 0) for each in held.rules.values())


@some
@every_rule
def test_generation(base, rule):
    """A padded batch is its rows, and a prompt in chunks is the prompt; beams move what a reader remembers."""
    model, (ids, mask) = under(base, rule), batch(base)
    asked = {"input_ids": ids, "attention_mask": mask, **GENERATED}
    want = model.generate(**asked)
    assert torch.equal(model.generate(**asked, prefill_chunk_size=7), want)
    for row, pad in enumerate(PADS):
        alone = {"input_ids": ids[row : row + 1, pad:], "attention_mask": mask[row : row + 1, pad:], **GENERATED}
        assert torch.equal(model.generate(**alone)[0, LENGTH - pad :], want[row, LENGTH:])
    whole = under(base, rule, **WHOLE | {"keys": 2 * LENGTH})
    assert torch.equal(whole.generate(**asked, num_beams=3), base.generate(**asked, num_beams=3))
    beams = model.generate(**asked, num_beams=3, num_return_sequences=3)
    assert beams.shape == (3 * len(PADS), LENGTH + GENERATED["max_new_tokens"])
    with pytest.raises(ValueError, match="assisted decoding hides it"):
        model.generate(**asked | {"input_ids": ids[:1], "attention_mask": mask[:1]}, prompt_lookup_num_tokens=3)


@every_rule
@torch.no_grad()
def test_rows_are_moved_with_what_is_remembered(rule):
    """What is moved gives what was computed in that order."""
    base = TINY["llama"]().eval()
    model, (ids, mask) = double(under(base, rule)), batch(base)
    order = torch.tensor([2, 1, 1, 3, 0, 0])
    more = torch.randint(3, 60, (len(order), 5), generator=torch.Generator().manual_seed(3))
    everything = torch.cat([ids[order], more], 1), torch.cat([mask[order], torch.ones_like(more)], 1)
    want = chunked(model, *everything, [LENGTH - 2, *[1] * 7])
    for change in ("reorder_cache", "batch_select_indices"):
        holder = []
        chunked(model, ids, mask, [LENGTH - 2, 1, 1], holder)
        getattr(holder[0], change)(order)
        for step in range(5):
            end = LENGTH + step + 1
            some = everything[0][:, :end], everything[1][:, :end]
            got = model(**given(model, *some, end - 1), use_cache=True, **{runtime.CACHE: holder[0]}).logits
            assert difference(got, want[:, end - 1 : end], torch.ones_like(got[..., 0])) <= 1e-9


@pytest.mark.parametrize("rule", ["index", "recycled", "tokenselect", "adaptive", "loki"])
@torch.no_grad()
def test_after_tokens_are_taken_back_a_choice_is_made_anew(rule):
    base = TINY["llama"]().eval()
    model, (ids, mask), holder = double(under(base, rule)), batch(base, (0, 3)), []
    chunked(model, ids, mask, [PROMPT, 1, 1, 1, 1, 1], holder)
    holder[0].crop(-3)
    end = PROMPT + 2
    got = model(
        **given(model, ids[:, : end + 1], mask[:, : end + 1], end), use_cache=True, **{runtime.CACHE: holder[0]}
    )
    fresh = []
    chunked(model, ids, mask, [PROMPT, 1, 1], fresh)
    for layer in fresh[0].layers:
        layer.stores[0].state = {}
    want = model(
        **given(model, ids[:, : end + 1], mask[:, : end + 1], end), use_cache=True, **{runtime.CACHE: fresh[0]}
    )
    assert difference(got.logits, want.logits, torch.ones_like(got.logits[..., 0])) <= 1e-9


@some
@torch.no_grad()
def test_on_some_heads_beside_a_split_and_a_policy(base):
    """Three kinds of heads in one layer: one streams or evicts, one reads a part, the others read all."""
    ids, mask = batch(base)
    split = entries(random_split(base, 1))
    both, alone = under(base, "index", *split, keys=LENGTH), operated(base, random_split(base, 1))
    steps = [PROMPT, *[1] * (LENGTH - PROMPT)]
    assert difference(chunked(both, ids, mask, steps), chunked(alone, ids, mask, steps), mask) <= 1e-5
    kv_heads, _ = heads_of(base)
    policy = {"policy": {"name": "norm", "keys": 5, "sinks": 2, "recent": 4, "interval": 8, "heads": [0]}}
    layers = base.config.get_text_config().num_hidden_layers
    three = under(base, "index", *[policy] * layers, heads=[1], keys=LENGTH)
    evicting = copy.deepcopy(base)
    runtime.patch(evicting, {"layers": [policy] * layers})
    assert difference(chunked(three, ids, mask, steps), chunked(evicting, ids, mask, steps), mask) <= 1e-5
    some = double(under(base, "index", heads=[1]))
    want = reading_model(base, [settings_of("index") | {"heads": [1]}] * layers, PROMPT)
    one = ids[:1]
    got = chunked(some, one, torch.ones_like(one), steps)
    assert difference(got, want(**given(want, one, torch.ones_like(one))).logits, torch.ones_like(one)) <= 1e-9
    assert kv_heads > 1


@torch.no_grad()
def test_with_a_weight_on_the_first_token():
    base = TINY["llama"]().eval()
    text, (ids, mask) = base.config, batch(base)
    shape = {"parameters": {"surgery_log_gamma": [text.num_attention_heads]}}
    model = under(base, "index", *[shape] * text.num_hidden_layers, keys=LENGTH)
    alone = copy.deepcopy(base)
    runtime.patch(alone, {"layers": [shape] * text.num_hidden_layers})
    for each in (model, alone):
        for module in runtime.attention_modules(each):
            module.surgery_log_gamma.copy_(torch.linspace(-1, 1.5, text.num_attention_heads))
    steps = [PROMPT, *[1] * (LENGTH - PROMPT)]
    assert difference(chunked(model, ids, mask, steps), chunked(alone, ids, mask, steps), mask) <= 1e-5
    few = double(under(base, "index", *[shape] * text.num_hidden_layers))
    for module in runtime.attention_modules(few):
        module.surgery_log_gamma.copy_(torch.linspace(-1, 1.5, text.num_attention_heads))
    gammas = [torch.linspace(-1, 1.5, text.num_attention_heads)] * text.num_hidden_layers
    for row, pad in enumerate(PADS):
        held = reading_model(base, [settings_of("index")] * text.num_hidden_layers, PROMPT - pad, gammas)
        one = ids[row : row + 1, pad:]
        want = held(**given(held, one, torch.ones_like(one)), use_cache=False).logits
        got = chunked(few, ids, mask, steps)[row : row + 1, pad:]
        assert difference(got, want, torch.ones_like(one)) <= 1e-6  # the gammas are float32


@torch.no_grad()
def test_the_cache_stays_whole_and_is_what_the_plan_says():
    base = TINY["llama"]().eval()
    ids, mask = batch(base, (0, 0), 300)
    for rule in ("index", "loki", "recycled", "adaptive"):
        model, holder = under(base, rule), []
        chunked(model, ids, mask, [290, *[1] * 10], holder)
        anatomy = Anatomy.of(model)
        more = 1 + 3 / (2 * base.config.head_dim) if rule == "loki" else 1
        assert anatomy.kv_bytes_per_token == round(Anatomy.of(base).kv_bytes_per_token * more)
        stores = [store for layer in holder[0].layers for store in layer.stores]
        used = sum(tensor[:, :, : store.stored].nbytes for store in stores for tensor in store.tensors.values())
        assert used == 2 * 300 * anatomy.kv_bytes_per_token


@pytest.mark.parametrize("rule", ["index", "loki", "tokenselect", "tree", "random"])
@torch.no_grad()
def test_a_step_reads_as_many_keys_as_it_says(rule):
    """Sinks, recent tokens and `keys` others, each once, at every length behind them."""
    base = TINY["llama"]().eval()
    ids, mask = batch(base, (0,), 60)
    model, read = under(base, rule), []
    reader = runtime.attention_modules(model)[0].surgery_keepers["read"].reader
    choose = reader.choose

    def listen(step):
        slots = choose(step)
        read.append(slots)
        return slots

    reader.choose = listen
    chunked(model, ids, mask, [8, *[1] * 52])
    settings = settings_of(rule)
    wanted = settings["sinks"] + settings["recent"] + settings["keys"]
    newer = 0
    for slots in read:
        rows = [[slot for slot in head if slot >= 0] for head in slots[0].tolist()]
        assert all(len({*row}) == len(row) for row in rows)
        newer = max(max(map(len, rows)) - wanted, newer)
        cut = settings.get("block", 1) - 1  # the last block may be
        assert all(len(row) >= wanted - cut for row in rows)
    assert newer == 0 or rule == "tokenselect"  # which reads what is newer than its choice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_rule
def test_in_half_precision(rule, dtype):
    base = TINY["llama"]().eval().to(dtype)
    ids, mask = batch(base)
    asked = {"input_ids": ids, "attention_mask": mask, **GENERATED}
    whole = under(base, rule, **WHOLE | {"keys": 2 * LENGTH}).generate(**asked)
    assert torch.equal(whole, base.generate(**asked))
    assert under(base, rule).generate(**asked).shape == whole.shape


@torch.no_grad()
def test_another_cache_is_refused():
    base = TINY["llama"]().eval()
    ids, mask = batch(base, (0,))
    model = under(base, "index")
    with pytest.raises(ValueError, match="leave the cache out"):
        model(**given(model, ids, mask), **{runtime.CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="would undo the surgery"):
        model.generate(input_ids=ids, cache_implementation="static", max_new_tokens=2)


def test_every_rule_is_saved_and_loaded_both_ways(tmp_path):
    base = TINY["llama"]().eval()
    models = {tmp_path / rule.replace(", ", "-"): under(base, rule) for rule in RULES}
    check_both_ways_to_load(models, tmp_path)
    code = {path.name for path in (tmp_path / "loki").glob("*.py")}
    assert code == set(surgery_config.exported_files([])) | {
        f"surgery_kv_{name}.py" for name in ("entry", "read", "read_loki")
    }


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"read": {"name": "no"}}, "names no reader; there is: adaptive, index, loki"),
        ({"read": "index"}, "names no reader"),
        ({"read": {"name": "index", "dims": 3}}, "has no 'dims'"),
        ({"read": {"name": "index", "keys": 0}}, "keys is 0"),
        ({"read": {"name": "index", "recent": 0}}, "recent is 0"),
        ({"read": {"name": "index", "sinks": -1}}, "sinks is -1"),
        ({"read": {"name": "index", "group": "mean"}}, "group is 'mean'"),
        ({"read": {"name": "recycled", "every": 0}}, "every is 0"),
        ({"read": {"name": "tokenselect", "similarity": 2}}, "similarity is 2"),
        ({"read": {"name": "adaptive", "share": 2}}, "share is 2"),
        ({"read": {"name": "adaptive", "keys": 2}}, "has no 'keys'"),
        ({"read": {"name": "threshold", "threshold": 1}}, "threshold is 1"),
        ({"read": {"name": "tree", "keys": 4, "block": 8}}, "block is 8"),
        ({"read": {"name": "loki"}}, "has a reader whose parameters are {}"),
        ({"read": {"name": "index", "heads": [9]}}, "each once, not"),
        ({"read": {"name": "index"}, "policy": {"name": "norm", "keys": 4}}, "a reader and a policy for KV heads"),
        (
            {"read": {"name": "index"}, "act": {"alpha": 5.0}, "parameters": {"surgery_log_beta": [8]}},
            "reader and act, which needs all keys",
        ),
    ],
)
def test_what_cannot_be_is_refused(entry, says):
    base = TINY["llama"]()
    with pytest.raises(ValueError, match=says):
        runtime.patch(base, {"layers": [entry] * base.config.num_hidden_layers})
    assert not hasattr(base.config, "surgery")
