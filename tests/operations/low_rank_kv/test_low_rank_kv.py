"""Keys and values of low rank: their identity in every family, their cache, steps and weights against float64."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from closed_form import Stopped, recipe, stop
from families import OFF_THE_INTERFACE, TINY, TOKENS, build, difference, double, load_without_package, logits_of
from families import one_thread as one_thread  # a fixture
from tokenizers_of_bytes import Letters, byte_tokenizer

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.runtime import surgery_low_rank
from surgery.runtime.modeling_surgery import CACHE
from surgery.runtime.surgery_low_rank import _most_read

TEXT = {"calibration_text": "builtin", "calibration_samples": 6, "calibration_length": 64}
SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA = SHAPE | {"head_dim": 16}
EXACT = 1e-12


def can(name: str) -> bool:
    anatomy = Anatomy.of(TINY[name]())
    slides = all(layer.window is not None for layer in anatomy.layers)
    layout = anatomy.layers[0].layout
    return not (anatomy.composite or anatomy.latent or slides or layout.qkv or layout.angles == "nothing")


FAMILIES = [name for name in TINY if name not in OFF_THE_INTERFACE and can(name)]


def step(**fields) -> dict:
    return {"op": "low_rank_kv"} | TEXT | fields


def convert(model, **fields):
    return surgery.apply(recipe(step(**fields)), model, tokenizer=Letters())


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def gap(got, want) -> float:
    return float((got - want).abs().max() / want.std())


@torch.no_grad()
def pieces(model, text, lengths, cache=None, **given):
    """The logits of a text that comes in calls of these lengths, and the cache."""
    parts, first = [], 0
    for length in lengths:
        out = model(text[:, first : first + length], use_cache=True, **({CACHE: cache} if cache is not None else {}))
        parts, first, cache = [*parts, out.logits], first + length, out[CACHE]
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_at_full_rank_nothing_is_lost(name):
    """In float64, in one call and in pieces; layers with a window of their own stay as they are."""
    base = double(TINY[name]()).eval()
    model, anatomy = copy.deepcopy(base), Anatomy.of(base)
    full = next(layer for layer in anatomy.layers if layer.window is None)
    most = min(2 * full.kv_heads * full.head_dim, anatomy.config.get_text_config().hidden_size)
    report = convert(model, rank=most, refit=[], calibration_length=24)
    assert report.data["tier"] == "surgical"
    want, near = base(TOKENS).logits, 1e-6 if anatomy.layers[0].soft_cap else 1e-9  # softmax of the base in float32
    assert gap(model(TOKENS, use_cache=False).logits, want) <= near
    cached, cache = pieces(model, TOKENS, (3, 1, TOKENS.shape[1] - 5, 1))
    assert gap(cached, want) <= near
    after = Anatomy.of(model)
    assert [bool(layer.vector) for layer in after.layers] == [layer.window is None for layer in anatomy.layers]
    assert cache.nbytes == len(TOKENS) * (after.kv_bytes_at(TOKENS.shape[1]) + spare_bytes(cache))


def spare_bytes(cache) -> int:
    """Bytes of slots that a row's buffers have beyond the tokens that came."""
    stores = [store for layer in cache.layers for store in layer.stores if hasattr(store, "stored")]
    return sum(
        tensor[0, :, store.stored :].numel() * tensor.element_size()
        for store in stores
        for tensor in store.tensors.values()
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("phi3", "one matrix makes queries, keys and values"),
        ("gpt2", "one matrix makes queries, keys and values"),
        ("gpt_neox", "one matrix makes queries, keys and values"),
        ("mistral", "every layer of this model has a sliding window"),
        ("gptj", "attention turns its keys by itself"),
    ],
)
def test_families_that_cannot_are_refused(name, says):
    with pytest.raises(SurgeryError, match=says):
        convert(TINY[name](), refit=[])


@pytest.mark.parametrize("refit", [[], ["q", "k", "o", "mlp"]])
def test_rank_of_the_inputs_is_exact_at_half_the_cache(refit):
    """With a KV head for each query head, keys and values are maps of `hidden_size` channels: half as many numbers."""
    base = build("Llama", **(LLAMA | {"num_key_value_heads": 4}))
    model = copy.deepcopy(base)
    report = convert(model, keep_kv=0.5, refit=refit)
    assert any("stay exact" in note for note in report.data["plan"]["notes"])
    assert difference(logits_of(model), logits_of(base)) <= 1e-4


@pytest.fixture(scope="module")
def half():
    """A base and a model with half of its numbers a token, in float64."""
    base = build("Llama", **LLAMA)
    model = copy.deepcopy(base)
    convert(model, keep_kv=0.5)
    return base.double().eval(), model.double().eval()


@torch.no_grad()
def test_a_layer_computes_what_its_weights_say(half):
    """Against causal attention by hand, from the stored tensors."""
    _, model = half
    seen, module = [], model.model.layers[1].self_attn
    handle = module.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    text = tokens(2, 60)
    model(text, use_cache=False)
    _, cache = pieces(model, text, (59, 1))
    handle.remove()
    (whole, out), _, (last, step_out) = seen
    assert gap(last, whole[:, -1:]) <= EXACT
    weights, x = module.state_dict(), whole[1]
    vector = x @ weights["kv_vector.weight"].T
    rows = {letter: x @ weights["q_proj.weight"].T if letter == "q" else vector @ weights[f"{letter}_proj.up.weight"].T
            for letter in "qkv"}  # fmt: skip
    heads = {letter: each.view(60, -1, 16).transpose(0, 1) for letter, each in rows.items()}
    angles = torch.arange(60.0, dtype=torch.float64)[:, None] * 10_000.0 ** -(torch.arange(8.0).double() / 8)

    def turn(z):
        pairs = torch.complex(z[..., :8], z[..., 8:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    keys, values = (heads[letter].repeat_interleave(2, 0) for letter in "kv")
    scores = turn(heads["q"]) @ turn(keys).mT / 4
    scores = scores.masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf)
    by_hand = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1) @ weights["o_proj.weight"].T
    assert gap(out[1], by_hand) <= 1e-6  # the base's cosines are of float32
    assert gap(step_out[1, -1], by_hand[-1]) <= 1e-6
    held = [sorted(tensor.shape for tensor in layer.stores[0].tensors.values()) for layer in cache.layers]
    assert [[shape[-1] for shape in shapes] for shapes in held] == [[16, 16, 32], [32], [32]]


@pytest.mark.parametrize("lengths", [(1,) * 8, (20, 1, 30, 1), (90, 2, 1), (1, 70, 5)])
def test_a_text_in_pieces(half, lengths):
    """With the model's own cache, in steps that read vectors and in chunks that make values, and with a plain one."""
    _, model = half
    text = tokens(2, sum(lengths))
    with torch.no_grad():
        want = model(text, use_cache=False).logits
    for cache in (None, transformers.DynamicCache()):
        assert gap(pieces(model, text, lengths, cache)[0], want) <= EXACT


def test_the_calls_that_read_vectors(half, monkeypatch):
    """Few queries behind a past make no values of it; a hook on the values is not passed over."""
    _, model = copy.deepcopy(half)
    most = _most_read(32, torch.empty(1, 4, 1, 16), torch.empty(1, 2, 1, 16))
    assert most == 16 < surgery_low_rank.FEW  # 2 * 32 * 16 products of a token's values, 4 * 16 more of a query
    read = []
    real = surgery_low_rank._read
    monkeypatch.setattr(
        surgery_low_rank, "_read", lambda query, *rest: read.append(query.shape[2]) or real(query, *rest)
    )
    text = tokens(1, 80)
    want, _ = pieces(model, text, (40, most, 1, most + 1))
    assert read == [most] * 3 + [1] * 3
    read.clear()
    for layer in model.model.layers:
        layer.self_attn.v_proj.up.register_forward_hook(lambda module, args, output: 2 * output)
        layer.self_attn.o_proj.weight.data /= 2
    got, _ = pieces(model, text, (40, most, 1, most + 1))
    assert read == []
    assert gap(got, want) <= EXACT
    for layer in model.model.layers:  # hooks on the projections by the base's names
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda module, args, output: 1.5 * output)
    got, _ = pieces(model, text, (40, most, 1, most + 1))
    with torch.no_grad():
        assert gap(got, model(text[:, : got.shape[1]], use_cache=False).logits) <= EXACT
    assert read == []


def test_a_long_chunk_is_not_read_as_vectors(monkeypatch):
    """A read holds the scores of all keys at once, also where it takes fewer products: rank up to the head's size."""
    base = build("Llama", **(LLAMA | {"num_key_value_heads": 1}))
    convert(base, refit=[])
    model, read, real = base.double().eval(), [], surgery_low_rank._read
    monkeypatch.setattr(
        surgery_low_rank, "_read", lambda query, *rest: read.append(query.shape[2]) or real(query, *rest)
    )
    text = tokens(2, 120)
    got, _ = pieces(model, text, (40, 1, surgery_low_rank.FEW, 47))
    assert set(read) == {1, surgery_low_rank.FEW}
    with torch.no_grad():
        assert gap(got, model(text, use_cache=False).logits) <= EXACT


def test_large_scores_in_float16_are_finite():
    """A product of query and key may be beyond float16 before its scale, as with large biases of keys."""
    model = build("Llama", **LLAMA)
    convert(model, refit=[])
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 300
        layer.self_attn.k_proj.up.weight.data *= 60
    model, text = model.half().eval(), tokens(1, 40)
    cached, cache = pieces(model, text, (39, 1))
    assert cached.isfinite().all()
    keys = model.model.layers[0].self_attn.k_proj.up(cache.layers[0].stores[0].vectors("cpu")[:, 0])
    queries = model.model.layers[0].self_attn.q_proj(model.model.embed_tokens(text))
    assert keys.float().abs().max() * queries.float().abs().max() > 65504, "the case is one"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt_oss", "phi", "smollm3"])
def test_the_planned_bytes_in_each_dtype(name, dtype):
    """Also where cosines and sines stay in float32 (olmo2), and in another dtype than the model was converted in."""
    model = TINY[name]()
    convert(model, keep_kv=0.4, refit=[], calibration_length=24)
    model = model.to(dtype).eval()
    cached, cache = pieces(model, TOKENS, (5, TOKENS.shape[1] - 5))
    assert cached.isfinite().all()
    assert cache.nbytes == len(TOKENS) * (Anatomy.of(model).kv_bytes_at(TOKENS.shape[1]) + spare_bytes(cache))


def test_angles_stay_where_all_layers_read_them(half):
    """A cache that offloads sends a layer's vectors away, and not the angles, which other layers read."""
    _, model = half
    _, cache = pieces(model, tokens(1, 30), (29, 1))
    first = cache.layers[0].stores[0]
    before = dict(first.tensors)
    moved = []
    cache.layers[0].change(lambda tensor: moved.append(tensor) or tensor.clone(), moves=True)
    assert [tensor is before["keys"] for tensor in moved] == [True]
    assert all(first.tensors[name] is before[name] for name in ("cos", "sin"))
    cache.layers[0].offload()
    assert first.tensors["cos"] is before["cos"]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(half, side):
    """Each row as it is alone, in prompts and steps; a row of padding alone gives no NaN."""
    _, model = half
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, :9], mask[2] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    positions, inputs = (mask.cumsum(1) - 1).clamp(min=0), tokens(3, 40)
    got = model(inputs, attention_mask=mask, position_ids=positions, use_cache=True)
    assert got.logits.isfinite().all()
    for row in range(2):
        alone = model(inputs[row : row + 1, mask[row].bool()], use_cache=False).logits[0]
        assert gap(got.logits[row, mask[row].bool()], alone) <= EXACT
    if side == "right":
        return
    more = torch.cat([mask, mask.new_ones(3, 2)], 1)
    places = (more.cumsum(1) - 1)[:, 40:].clamp(min=0)
    step = model(tokens(3, 2, seed=1), attention_mask=more, position_ids=places, **{CACHE: got[CACHE]}).logits
    for row in range(2):
        whole = torch.cat([inputs[row : row + 1, mask[row].bool()], tokens(3, 2, seed=1)[row : row + 1]], 1)
        assert gap(step[row], model(whole, use_cache=False).logits[0, -2:]) <= EXACT


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generation(half, options):
    """Beams move the rows of vectors and angles, and assisted decoding takes tokens back; a plain cache agrees."""
    _, model = half
    mask = torch.ones(2 if "prompt_lookup_num_tokens" not in options else 1, 30, dtype=torch.long)
    if len(mask) > 1:
        mask[0, :5] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "pad_token_id": 0} | options
    prompt = tokens(len(mask), 30)
    want = model.generate(prompt, use_cache=False, **asked | {"prompt_lookup_num_tokens": None})
    assert torch.equal(model.generate(prompt, **asked), want)


@torch.no_grad()
def test_tokens_taken_back(half):
    _, model = half
    text = tokens(2, 50)
    _, cache = pieces(model, text, (40, 1, 1))
    cache.crop(-2)
    again = model(text[:, 40:], **{CACHE: cache}).logits
    assert gap(again, model(text, use_cache=False).logits[:, 40:]) <= EXACT


def test_packed_rows(half):
    """Two sequences in one row, told apart by their positions."""
    _, model = half
    first, second = tokens(1, 20), tokens(1, 33, seed=1)
    positions = torch.cat([torch.arange(20), torch.arange(33)])[None]
    with torch.no_grad():
        got = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        want = torch.cat([model(each, use_cache=False).logits for each in (first, second)], 1)
    assert gap(got, want) <= EXACT


def test_gradients_through_the_cache(half):
    """A loss behind a cached prompt has the gradients of the whole text in one call."""
    _, model = copy.deepcopy(half)
    text, grads = tokens(1, 30), []
    for lengths in ((30,), (20, 9, 1)):
        model.zero_grad()
        parts, first, cache = [], 0, model.make_cache()
        for length in lengths:
            parts.append(model(text[:, first : first + length], **{CACHE: cache}).logits)
            first += length
        torch.cat(parts, 1).square().mean().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-7, atol=1e-10)


def test_saved_and_opened_in_both_ways(tmp_path):
    """Families with biases, norms and learned sinks too. A second save changes nothing; a lost tensor is an error."""
    models = {}
    for name in ("llama", "qwen2", "olmo2", "stablelm", "gpt_oss", "glm4", "gemma2"):
        model = TINY[name]()
        convert(model, keep_kv=0.4, calibration_length=24)
        model.save_pretrained(tmp_path / name)
        again = surgery.load(tmp_path / name)
        assert torch.equal(logits_of(again), logits_of(model))
        again.save_pretrained(tmp_path / f"{name} again")
        models |= {tmp_path / name: model, tmp_path / f"{name} again": model}
    found = load_without_package(list(models), tmp_path, trust=True)
    for folder, model in models.items():
        assert torch.equal(found[folder]["logits"], logits_of(model)), folder.name
    weights = tmp_path / "llama" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    del tensors["model.layers.1.self_attn.kv_vector.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises((ValueError, SurgeryError), match="kv_vector"):
        surgery.load(tmp_path / "llama")


def test_more_rank_loses_less_and_refits_help():
    base, lost = build("Llama", **LLAMA), {}
    text = torch.tensor(
        [Letters()("They had slept in the valley, where no one asked for their names. " * 2)["input_ids"]]
    )
    for name, fields in {
        "12": {"rank": 12, "refit": []},
        "24": {"rank": 24, "refit": []},
        "48": {"rank": 48, "refit": []},
        "12 refitted": {"rank": 12},
    }.items():
        model = copy.deepcopy(base)
        convert(model, calibration_samples=24, **fields)
        with torch.no_grad():
            want, got = (each(text).logits.double().log_softmax(-1) for each in (base, model))
        lost[name] = float((want.exp() * (want - got)).sum(-1).mean())
    assert lost["48"] < lost["24"] < lost["12"]
    assert lost["12 refitted"] < 0.9 * lost["12"]


def test_an_adapter_counts_in_every_call(half):
    peft = pytest.importorskip("peft")
    _, model = copy.deepcopy(half)
    names = ["kv_vector", "k_proj.up", "v_proj.up", "q_proj"]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    text = tokens(2, 40)
    with torch.no_grad():
        want = adapted(text, use_cache=False).logits
        assert gap(want, half[1](text, use_cache=False).logits) > 1e-3
        out = adapted(text[:, :30], use_cache=True)
        cached = [out.logits, *(adapted(text[:, i : i + 1], **{CACHE: out[CACHE]}).logits for i in range(30, 40))]
        assert gap(torch.cat(cached, 1), want) <= EXACT
        assert gap(adapted.merge_and_unload()(text, use_cache=False).logits, want) <= 1e-9


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_from_folder_to_folder(family, tmp_path):
    """The plan's shapes, `check`, stock Transformers, one step of `heal` by each method."""
    fields = LLAMA if family == "Llama" else SHAPE
    base = build(family, **(fields | {"vocab_size": 260, "max_position_embeddings": 1024}))
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    plan = surgery.plan(recipe(step(rank=24)), tmp_path / "base")
    surgery.apply(recipe(step(rank=24)), tmp_path / "base", output=tmp_path / "out", evaluate=False)  # checks it too
    model = surgery.load(tmp_path / "out")
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape for name, shape in plan.shapes.items() if shape} == {
        name: shape for name, shape in stored.items() if ".self_attn." in name and not name.endswith("o_proj.bias")
    }
    heal = {"steps": 1, "length": 64, "batch_tokens": 64, "data": "builtin", "learning_rate": 1e-3}
    for method in ("full", "lora", "parts"):
        healed = tmp_path / method
        surgery.heal(
            tmp_path / "out", tmp_path / "base", output=healed, settings=heal | {"method": method}, evaluate=False
        )
        got = load_without_package([healed], tmp_path, trust=True)[healed]["logits"].double()
        assert 1e-5 < (got - logits_of(model)).abs().max() / logits_of(model).std() < 0.5, method
        for name in ("kv_vector", "k_proj.up", "v_proj.up"):
            own, old = (each.model.layers[0].self_attn.get_submodule(name) for each in (surgery.load(healed), model))
            assert not torch.equal(own.weight, old.weight), (method, name)


def test_an_interrupted_conversion_goes_on(tmp_path):
    base = build("Llama", **(LLAMA | {"vocab_size": 260, "max_position_embeddings": 1024}))
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(Stopped):
        surgery.apply(recipe(step()), tmp_path / "base", output=tmp_path / "out", progress=stop_rank, evaluate=False)
    surgery.apply(recipe(step()), tmp_path / "base", output=tmp_path / "out", resume=True, evaluate=False)
    surgery.apply(recipe(step()), tmp_path / "base", output=tmp_path / "whole", evaluate=False)
    one, two = (surgery.load(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def stop_rank(done: int, total: int = 0, label: str = ""):
    if "rank" in label:
        stop(done, total, "layers")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"rank": 65},
            "rank: 65 is more than keys and values of 64 numbers have, made of 64 channels: take a rank of at most",
        ),
        ({"keep_kv": 0.001}, "keep_kv: 0.001 of 64 numbers a token is none: take at least 0.01"),
        ({"refit": ["q", "q"]}, "refit names a projection twice"),
        ({"calibration_recall": 0.5, "calibration_length": 16}, "calibration_recall: pieces of 16 tokens"),
    ],
)
def test_settings_that_cannot_be(fields, says):
    with pytest.raises(SurgeryError, match=says):
        convert(build("Llama", **LLAMA), **fields)


def test_a_cache_that_would_not_get_smaller_is_refused():
    """One KV head in one layer: the angles take what the vector saves."""
    base = build("Llama", **(LLAMA | {"num_key_value_heads": 1, "num_hidden_layers": 1}))
    with pytest.raises(
        SurgeryError, match=r"takes 192 bytes a token, and the base's 128: no vector is short enough to"
    ):
        convert(base)
    base = build("Llama", **(LLAMA | {"num_key_value_heads": 1, "num_hidden_layers": 2}))
    for fields, says in (({}, r"take at most 0\.48"), ({"rank": 16}, "take a rank of at most 15")):
        with pytest.raises(SurgeryError, match=rf"takes 256 bytes a token, and the base's 256: {says}"):
            convert(copy.deepcopy(base), **fields)
    for fields in ({"keep_kv": 0.48}, {"rank": 15}):
        assert surgery.plan(recipe(step(**fields)), base).after.kv_bytes_per_token < 256


@torch.no_grad()
def test_a_cache_of_another_rank_is_refused(half):
    other = build("Llama", **LLAMA)
    convert(other, keep_kv=0.3, refit=[])
    _, cache = pieces(half[1], tokens(1, 20), (20,))
    with pytest.raises(ValueError, match="begin a new one"):
        other.double()(tokens(1, 1), **{CACHE: cache})


def test_a_share_above_what_the_inputs_have_is_refused():
    base = build("Llama", **(LLAMA | {"num_key_value_heads": 4}))
    with pytest.raises(SurgeryError, match=r"a vector of 64 loses nothing here: take at most 0\.5"):
        convert(base, keep_kv=0.6)


def test_nothing_follows_it(half):
    """Neither an operation of the same recipe nor one on the result."""
    later = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 4}
    for after in (later, {"op": "gqa", "kv_heads": 1, "method": "mean"}, step()):
        with pytest.raises(SurgeryError, match="are made of vectors"):
            surgery.apply(recipe(step(refit=[]), after), build("Llama", **LLAMA), tokenizer=Letters())
        with pytest.raises(SurgeryError, match="are made of vectors"):
            surgery.apply(recipe(after), copy.deepcopy(half[1]), tokenizer=Letters())


def test_a_block_that_cannot_be_is_refused(half):
    for entry, says in (
        ({"rank": 0, "head_dim": 16, "rotary": 16}, "has low_rank"),
        ({"rank": 4, "rotary": 16}, "has low_rank"),
        ({"rank": 4, "head_dim": 16, "rotary": 16, "norm": ["k_norm", "odd"]}, "has a norm"),
    ):
        config = copy.deepcopy(half[1].config)
        config.surgery["layers"][0]["low_rank"] = entry
        with pytest.raises(ValueError, match=says):
            type(half[1])(config)
    config = copy.deepcopy(half[1].config)
    config.surgery["layers"][0] |= {"streaming": [0], "sinks": 1, "window": 4}
    with pytest.raises(ValueError, match="low_rank and split"):
        type(half[1])(config)


def test_it_is_timed_beside_its_base(tmp_path):
    """Also with its weights and whole keys and values in the cache, which shows what the vectors cost."""
    from surgery.evaluation.benchmark.run import bench

    base = build("Llama", **LLAMA)
    model = copy.deepcopy(base)
    convert(model, refit=[])
    for each, name in ((base, "base"), (model, "out")):
        each.save_pretrained(tmp_path / name)
    for synthetic in (True, False):
        found = bench(tmp_path / "out", tmp_path / "base", lengths=(64,), rounds=1, decode=2, synthetic=synthetic)
        (row,) = found.ratios()
        assert row["decode_vs_stock"] > 0
        assert row["decode_vs_block_cache"] > 0


def test_it_undoes_itself_in_a_block():
    """`applied` gives the model back its projections and hooks; a second block converts it again."""
    model, tokenizer = build("Llama", **LLAMA), Letters()
    want, names = logits_of(model), list(model.state_dict())
    for _ in range(2):
        with surgery.applied(recipe(step(rank=20, refit=[])), model, tokenizer=tokenizer):
            assert difference(logits_of(model), want) > 1e-3
            assert "model.layers.0.self_attn.kv_vector.weight" in model.state_dict()
        assert torch.equal(logits_of(model), want)
        assert list(model.state_dict()) == names


def test_a_thread_sees_its_own_vectors(half):
    """Calls in threads of one model do not mix: each has the logits that it has alone."""
    from concurrent.futures import ThreadPoolExecutor

    _, model = half
    texts = [tokens(1, 40 + index, seed=index) for index in range(6)]
    with torch.no_grad():
        alone = [pieces(model, text, (30, 1, text.shape[1] - 31))[0] for text in texts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda text: pieces(model, text, (30, 1, text.shape[1] - 31))[0], texts))
    for one, other in zip(alone, together, strict=True):
        assert gap(other, one) <= EXACT


def test_a_replica_makes_vectors_of_its_own_weights(half):
    """As DataParallel does: a shallow copy of the module, with weights on its own device."""
    _, model = copy.deepcopy(half)
    assert not [name for name, module in model.named_modules() if module.training]
    wanted, text = copy.deepcopy(model), tokens(1, 30)
    layer, other = model.model.layers[0], wanted.model.layers[0].self_attn
    other.kv_vector.weight.data *= 2
    replica = layer.self_attn._replicate_for_data_parallel()
    replica.kv_vector = copy.deepcopy(other.kv_vector)
    layer.self_attn = replica
    with torch.no_grad():
        assert torch.equal(model(text).logits, wanted(text).logits)
        assert gap(model(text).logits, half[1](text).logits) > 1e-3
