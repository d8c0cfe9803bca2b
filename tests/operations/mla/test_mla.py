"""Latent attention: its joint rank against brute force, its identity, its stock model against float64 by hand."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers
from closed_form import Stopped, Tokens, recipe, stop
from closed_form import numbers as numbers  # a fixture
from families import TINY, TOKENS, build, difference, load_without_package, logits_of
from families import one_thread as one_thread  # a fixture
from tokenizers_of_bytes import Letters, byte_tokenizer

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.architecture.latent import vectors_at_scale
from surgery.calibration.closed_form.joint_rank import joint_rank
from surgery.calibration.closed_form.low_rank import merge_rotated_keys
from surgery.engines import find
from surgery.errors import SurgeryError
from surgery.evaluation.benchmark.models import compare
from surgery.operations.base import ApplyContext
from surgery.operations.head_scorers.scorers import score
from surgery.operations.mla.operation import MLA
from surgery.runtime.modeling_surgery import CACHE

LLAMA = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "intermediate_size": 96, "max_position_embeddings": 256,
}  # fmt: skip
QWEN2 = {name: value for name, value in LLAMA.items() if name != "head_dim"}
TEXT = {"calibration_text": "builtin", "calibration_samples": 6, "calibration_length": 64}


def llama(kv_heads: int, **fields):
    return build("Llama", num_key_value_heads=kv_heads, **(LLAMA | fields))


def biased(family: str, kv_heads: int, **fields):
    """A base with biases, that of the keys large, as Qwen2's are."""
    wanted = QWEN2 if family == "Qwen2" else LLAMA | {"attention_bias": True}
    model = build(family, num_key_value_heads=kv_heads, **(wanted | fields))
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data *= 20
    return model


def convert(model, **fields):
    return surgery.apply(recipe({"op": "mla"} | TEXT | fields), model, tokenizer=Letters())


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def missed(blocks, weights, x, vector, maps) -> float:
    """The weighted error over samples x [N, n], by its definition."""
    total = 0.0
    for block, weight, own in zip(blocks, weights, maps, strict=True):
        error = x @ block.T - x @ vector.T @ own.T
        total += float(torch.einsum("ta,ab,tb->", error, weight, error)) / len(x)
    return total


def problem():
    x = rand(300, 12, seed=0) @ rand(12, 12, seed=1)
    blocks = [rand(5, 12, seed=2), rand(3, 12, seed=3), 4 * rand(4, 12, seed=4)]
    weights = [root @ root.T for root in (rand(5, 5, seed=5), rand(3, 3, seed=6), 0.1 * rand(4, 4, seed=7))]
    return x, blocks, weights


def test_the_joint_rank_is_the_best_of_its_rank():
    """It loses what it says, and no gradient step from it or from random starts loses less."""
    x, blocks, weights = problem()
    found = joint_rank(blocks, weights, x.T @ x / len(x), rank=3)
    lost = missed(blocks, weights, x, found.vector, found.maps)
    assert lost == pytest.approx(found.lost, rel=1e-9)
    nothing = [torch.zeros(len(block), 3, dtype=torch.float64) for block in blocks]
    whole = missed(blocks, weights, x, torch.zeros(3, 12, dtype=torch.float64), nothing)
    assert whole == pytest.approx(found.energy, rel=1e-9)
    for seed in range(4):
        assert descended(blocks, weights, x, seed) >= lost * (1 - 1e-6)


def descended(blocks, weights, x, seed: int) -> float:
    """The weighted error that a descent from random numbers reaches."""
    parts = [rand(3, 12, seed=10 + seed), *(rand(len(block), 3, seed=20 + seed) for block in blocks)]
    parts = [part.requires_grad_() for part in parts]

    def loss():
        total = torch.zeros((), dtype=torch.float64)
        for block, weight, own in zip(blocks, weights, parts[1:], strict=True):
            error = x @ block.T - x @ parts[0].T @ own.T
            total = total + torch.einsum("ta,ab,tb->", error, weight, error) / len(x)
        return total

    return least(loss, parts)


def least(loss, parts) -> float:
    """The loss that a descent reaches, which changes the parts in place."""
    optimiser = torch.optim.LBFGS(parts, max_iter=1000, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    return loss().item()


def test_a_full_rank_loses_nothing_and_signs_are_fixed():
    x, blocks, weights = problem()
    moments = x.T @ x / len(x)
    full = joint_rank(blocks, weights, moments, rank=12)
    for block, own in zip(blocks, full.maps, strict=True):
        torch.testing.assert_close(own @ full.vector, block)
    assert (full.vector @ moments * full.vector).sum(-1).mean() == pytest.approx(1)
    again = joint_rank(blocks, weights, moments, rank=12)
    assert torch.equal(full.vector, again.vector)


def test_blocks_without_readers_and_inputs_without_energy():
    blocks, zero = [rand(3, 6, seed=1)], torch.zeros(3, 3, dtype=torch.float64)
    found = joint_rank(blocks, [zero], torch.eye(6, dtype=torch.float64), rank=2)
    assert all(tensor.isfinite().all() for tensor in (found.vector, *found.maps))
    silent = joint_rank(blocks, [torch.eye(3, dtype=torch.float64)], torch.zeros(6, 6, dtype=torch.float64), rank=2)
    assert silent.vector.isfinite().all()
    assert silent.energy == 0


def test_a_folded_key_is_the_best_of_its_size():
    """It loses what it says, by the definition of the loss on samples, and no descent loses less."""
    x, heads, fold, size = rand(200, 12, seed=0) @ rand(12, 12, seed=1), 3, 2, 4
    keys, queries = rand(heads, fold * size, 12, seed=2), rand(heads, fold * size, fold * size, seed=3)
    found = merge_rotated_keys(keys, x.T @ x / len(x), queries @ queries.mT, positions="half", fold=fold)
    error = keys - found.maps @ found.head
    assert lost_of_folds(error, queries, x, fold) == pytest.approx(found.lost, rel=1e-9)
    assert lost_of_folds(keys, queries, x, fold) == pytest.approx(found.energy, rel=1e-9)
    for seed in range(3):
        head = rand(size, 12, seed=10 + seed).requires_grad_()
        factor = rand(2, heads * fold, size // 2, seed=20 + seed).requires_grad_()

        def loss(head=head, factor=factor):
            real, imag = (torch.diag_embed(part) for part in factor)
            maps = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)
            return lost_of_folds(keys - maps.view(heads, fold * size, size) @ head, queries, x, fold)

        assert least(loss, [head, factor]) >= found.lost * (1 - 1e-6)


def lost_of_folds(error, queries, x, fold):
    """The mean square of conj(q) k, summed over a fold, of keys `error` x and of queries Q z with white noise z."""
    total, size = 0.0, error.shape[1] // fold
    for of_keys, of_queries in zip(error, queries, strict=True):
        k, q = ((rows.view(fold, 2, size // 2, -1)) for rows in (of_keys @ x.T, of_queries))
        k, q = torch.complex(k[:, 0], k[:, 1]), torch.complex(q[:, 0], q[:, 1])  # [fold, frequency, samples]
        for frequency in range(size // 2):
            scores = torch.einsum("az,at->zt", q[:, frequency].conj(), k[:, frequency])
            total = total + scores.abs().square().sum() / x.shape[0]
    return total


@pytest.mark.parametrize(("refit", "tolerance"), [([], 1e-5), (["q", "k", "o", "mlp"], 1e-4)])
def test_of_one_kv_head_nothing_is_lost_at_full_rank(refit, tolerance):
    """Equal in float32; in float64, too, but for the norm's epsilon. Refits have sums in float32 and little to do."""
    base = llama(1)
    model = copy.deepcopy(base)
    report = convert(model, rank=16, rope=16, refit=refit)
    assert report.data["tier"] == "native"
    assert model.config.model_type == "deepseek_v3"
    assert difference(logits_of(model), logits_of(base)) <= tolerance
    if not refit:
        with torch.no_grad():
            want, got = base.double()(TOKENS).logits, model.double()(TOKENS).logits
        assert (got - want).abs().max() <= 5e-6 * want.std()


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_biases_of_one_kv_head_are_kept(family):
    base = biased(family, 1)
    with torch.no_grad():
        want = base.double()(TOKENS).logits
        for name, bias in base.named_parameters():
            if name.endswith("k_proj.bias"):
                bias.mul_(-1)
        assert (base(TOKENS).logits - want).abs().max() > 0.1 * want.std(), "the biases matter"
    # The refits' sums are in float32, in which so large biases cost digits.
    for refit, tolerance in (([], 5e-6), (["q", "k", "o", "mlp"], 1e-3)):
        model = biased(family, 1)
        convert(model, rank=16, rope=16, refit=refit)
        assert (model.config.model_type, model.config.q_lora_rank) == ("deepseek_v3", 72)
        with torch.no_grad():
            got = model.double()(TOKENS).logits
        assert (got - want).abs().max() <= tolerance * want.std()


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_result_with_biases_saved_read_and_healed(family, tmp_path):
    """From folder to folder: the plan's shapes, `check`, stock Transformers, one step of `heal`, `absorb`."""
    base = biased(family, 2, max_position_embeddings=1024, vocab_size=260)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    step = {"op": "mla", "rank": 20, "rope": 12} | TEXT
    plan = surgery.plan(recipe(step), tmp_path / "base")
    said = "queries, which have a bias, are made of a vector of 72: the layer's input and a 1"
    assert said in plan.notes
    surgery.apply(recipe(step), tmp_path / "base", output=tmp_path / "out", evaluate=False)  # checks it too
    model = surgery.load(tmp_path / "out")
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert all(stored[name] == shape for name, shape in plan.shapes.items() if shape)
    answer = load_without_package([tmp_path / "out"], tmp_path)[tmp_path / "out"]
    assert (answer["logits"].double() - logits_of(model)).abs().max() <= 1e-4
    if family == "Qwen2":
        assert not any(layer.self_attn.o_proj.bias.any() for layer in model.model.layers)
        assert not [name for name in vars(model.config) if "window" in name or name == "layer_types"]
    faster = copy.deepcopy(model)
    surgery.apply(recipe({"op": "absorb"}), faster)
    with torch.no_grad():
        cache = faster(TOKENS[:, :-1], use_cache=True)[CACHE]
        step_alone = faster(TOKENS[:, -1:], **{CACHE: cache}).logits[:, -1]
    assert (step_alone.double() - logits_of(model)[:, -1]).abs().max() <= 1e-4
    heal = {"steps": 1, "length": 64, "batch_tokens": 64, "data": "builtin", "learning_rate": 1e-4}
    for method in ("full", "lora", "parts"):
        healed = tmp_path / method
        settings = heal | {"method": method}
        surgery.heal(tmp_path / "out", tmp_path / "base", output=healed, settings=settings, evaluate=False)
        got = load_without_package([healed], tmp_path)[healed]["logits"].double()
        moved = (got - logits_of(model)).abs().max() / logits_of(model).std()
        assert 1e-5 < moved < 0.3, method
        down = surgery.load(healed).model.layers[0].self_attn.q_a_proj.weight
        assert not torch.equal(down, model.model.layers[0].self_attn.q_a_proj.weight), method


def test_fewer_frequencies_are_the_bases_first():
    """A base whose slow channels say nothing keeps its logits where these channels lose RoPE."""
    base = llama(1)
    for layer in base.model.layers:
        rows = layer.self_attn.k_proj.weight.data.view(1, 16, 64)
        rows[:, [4, 5, 6, 7, 12, 13, 14, 15]] = 0  # frequencies 4 to 7, of pairs (f, f + 8)
    model = copy.deepcopy(base)
    convert(model, rank=16, rope=8, refit=[])
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(10_000**0.5)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq[:4])
    assert difference(logits_of(model), logits_of(base)) <= 1e-5


def test_folded_frequencies_share_channels():
    """Nothing is lost where the frequencies are one, and the keys of two are a turn and a scale apart."""
    base = llama(1, rope_parameters={"rope_type": "default", "rope_theta": 1.0})
    convert(other := copy.deepcopy(base), rank=16, rope=8, fold=2, refit=[])
    assert difference(logits_of(other), logits_of(base)) > 1e-3, "keys of two frequencies have nothing in common"
    for layer in base.model.layers:
        rows = layer.self_attn.k_proj.weight.data
        keys = torch.complex(rows[:8], rows[8:])  # frequency f is a pair of channels (f, f + 8)
        keys[1::2] = keys[::2] * torch.complex(torch.rand(4, 1), torch.randn(4, 1))
        rows.copy_(torch.cat([keys.real, keys.imag]))
    convert(folded := copy.deepcopy(base), rank=16, rope=8, fold=2, refit=[])
    assert difference(logits_of(folded), logits_of(base)) <= 1e-5


@pytest.mark.parametrize(("fold", "rope"), [(2, 6), (4, 4)])
def test_a_fold_keeps_the_fastest_of_its_frequencies(fold, rope):
    base = llama(2)
    convert(model := copy.deepcopy(base), rank=12, fold=fold)
    assert model.config.qk_rope_head_dim == rope
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq[::fold][: rope // 2])
    plan = surgery.plan(recipe({"op": "mla", "rank": 12, "fold": fold} | TEXT), base)
    assert f"each {fold} neighbouring frequencies turn as the fastest of them" in plan.steps[0].change.notes


FOLDED_ROPE = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


def keyless(fold: int, **fields):
    """A base whose keys have the fastest frequency of each fold alone, with biases or not."""
    base = llama(1, **fields)
    silent = [channel for channel in range(16) if channel % 8 % fold]  # frequency f is a pair of channels (f, f + 8)
    for layer in base.model.layers:
        layer.self_attn.k_proj.weight.data[silent] = 0
        if fields.get("attention_bias"):
            layer.self_attn.k_proj.bias.data *= 20
            layer.self_attn.k_proj.bias.data[silent] = 0
    return base


@pytest.mark.parametrize("rope", FOLDED_ROPE, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("fold", [2, 4, 8])
def test_a_fold_turns_as_the_fastest_of_its_frequencies(rope, biases, fold):
    """Nothing is lost of a base whose keys have these frequencies alone."""
    base = keyless(fold, rope_parameters=rope, attention_bias=biases)
    convert(model := copy.deepcopy(base), rank=16, rope=16 // fold, fold=fold, refit=[])
    assert difference(logits_of(model), logits_of(base)) <= 1e-5


def test_a_folded_layer_refitted_saved_and_absorbed(tmp_path):
    """The refits see the frequencies that the stock model turns: they have nothing to do, and do nothing."""
    base = keyless(2)
    convert(model := copy.deepcopy(base), rank=16, rope=8, fold=2)
    want = logits_of(base)
    assert difference(logits_of(model), want) <= 1e-4
    model.save_pretrained(tmp_path / "out")
    answer = load_without_package([tmp_path / "out"], tmp_path)[tmp_path / "out"]
    assert difference(answer["logits"].double(), want) <= 1e-4
    for absorbed in (False, True):
        if absorbed:
            surgery.apply(recipe({"op": "absorb"}), model)
        with torch.no_grad():
            cache = model(TOKENS[:, :-1], use_cache=True)[CACHE]
            step = model(TOKENS[:, -1:], **{CACHE: cache}).logits[:, -1].double()
        assert (step - want[:, -1]).abs().max() <= 1e-4 * want.std()


def attention_by_hand(module, config, x):
    """Causal latent attention of one row [T, D] in float64, from its stored tensors."""
    weights = {name: tensor.detach().double() for name, tensor in module.state_dict().items()}
    heads, nope, rope, size = (
        config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
    )  # fmt: skip
    length, rank = len(x), config.kv_lora_rank
    made = x @ weights["kv_a_proj_with_mqa.weight"].T + weights.get("kv_a_proj_with_mqa.bias", 0.0)
    read = x
    if "q_a_proj.weight" in weights:
        read = x @ weights["q_a_proj.weight"].T + weights["q_a_proj.bias"]
        read = read / (read.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["q_a_layernorm.weight"]
    queries = weights["q_b_proj.weight" if "q_b_proj.weight" in weights else "q_proj.weight"]
    vector, shared = made[:, :rank], made[:, rank:]
    vector = vector / (vector.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["kv_a_layernorm.weight"]
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, rope, 2, dtype=torch.float64) / rope)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies

    def turn(z):
        pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    out = []
    for head in range(heads):
        q = read @ queries.view(heads, nope + rope, -1)[head].T
        maps = weights["kv_b_proj.weight"].view(heads, nope + size, rank)[head]
        keys, values = vector @ maps[:nope].T, vector @ maps[nope:].T
        scores = (q[:, :nope] @ keys.T + turn(q[:, nope:]) @ turn(shared).T) / (nope + rope) ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ values)
    return torch.cat(out, -1) @ weights["o_proj.weight"].T + weights.get("o_proj.bias", 0.0)


@torch.no_grad()
@pytest.mark.parametrize("biases", [False, True])
def test_the_stock_module_computes_what_its_weights_say(biases):
    model = biased("Llama", 2) if biases else llama(2)
    convert(model, rank=20, rope=12)
    seen = []
    handle = model.model.layers[1].self_attn.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    model(TOKENS)
    handle.remove()
    x, out = seen[0]
    want = attention_by_hand(model.model.layers[1].self_attn, model.config, x[1].double())
    assert (out[1] - want).abs().max() <= 1e-5 * want.std()


@pytest.mark.parametrize(("family", "fields"), [("Llama", LLAMA), ("Qwen2", QWEN2)])
def test_more_rank_loses_less_and_refits_help(family, fields):
    base, lost = build(family, num_key_value_heads=4, **(fields | {"num_hidden_layers": 3})), {}
    tokens = torch.tensor(
        [Letters()("They had slept in the valley, where no one asked for their names. " * 2)["input_ids"]]
    )
    for name, fields in {
        "16": {"rank": 16, "refit": []},
        "40": {"rank": 40, "refit": []},
        "60": {"rank": 60, "refit": []},
        "16 refitted": {"rank": 16, "calibration_samples": 24},
    }.items():
        model = copy.deepcopy(base)
        convert(model, rope=16, **fields)
        with torch.no_grad():
            want, got = (each(tokens).logits.double().log_softmax(-1) for each in (base, model))
        lost[name] = float((want.exp() * (want - got)).sum(-1).mean())
    assert lost["60"] < lost["40"] < lost["16"]
    assert lost["16 refitted"] < 0.9 * lost["16"]


def test_its_cache_holds_the_vector_and_the_rotated_key(tmp_path):
    model = llama(4, tie_word_embeddings=True)
    convert(model, rank=20, rope=12)
    model.save_pretrained(tmp_path / "out")
    answer = load_without_package([tmp_path / "out"], tmp_path)[tmp_path / "out"]
    assert (answer["logits"].double() - logits_of(model)).abs().max() <= 1e-4
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True)[CACHE]
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert stored == TOKENS.numel() * 2 * 32
    assert Anatomy.of(tmp_path / "out").kv_bytes_per_token == 4 * 2 * 32 == Anatomy.of(model).kv_bytes_per_token
    assert "lm_head.weight" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("biases", [False, True])
def test_a_bfloat16_base_keeps_the_vector(biases):
    base = (build("Qwen2", num_key_value_heads=2, **QWEN2) if biases else llama(2)).bfloat16()
    model = copy.deepcopy(base)
    convert(model, rank=44, rope=16, refit=[])
    wide = copy.deepcopy(base).float()
    convert(wide, rank=44, rope=16, refit=[])
    assert model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.dtype == torch.bfloat16
    want = logits_of(wide)
    assert (logits_of(model) - want).abs().max() <= 0.15 * want.std()


@pytest.mark.parametrize("biases", [False, True])
def test_the_scale_of_the_vectors_can_be_changed_and_back(biases):
    model = biased("Llama", 2) if biases else llama(2)
    convert(model, rank=20, rope=12)
    want, before = logits_of(model), copy.deepcopy(model.state_dict())
    with vectors_at_scale(model):
        attention = model.model.layers[0].self_attn
        rows = attention.kv_a_proj_with_mqa.weight[:20]
        assert rows.square().mean().sqrt().item() > 1e-3
        if biases:
            assert 0.25 <= attention.q_a_proj.weight[0, 0] == attention.q_a_proj.bias[64] <= 4
        assert difference(logits_of(model), want) <= 1e-5
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])
    plain = TINY["llama"]()
    with vectors_at_scale(plain):
        pass


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"rank": 65, "rope": 16},
            "rank: 65 is too much: with 16 rotated channels it is 81 numbers a token, and this model's cache holds "
            "64: take a rank of at most 48",
        ),
        ({"rank": 70, "kv": 4}, "rank: 70 is more than its keys and values have: take a rank of at most 64"),
        (
            {"keep_kv": 0.75, "kv": 4, "rope": 16},
            "keep_kv: 0.75 of 128 numbers a token leaves a vector of 80 numbers, and 64 hold all of its keys and "
            "values: take at most 0.62",
        ),
        ({"rope": 2, "theta": 50.0}, "rope: 2 drops fast frequencies, which need RoPE: take at least 4"),
        ({"rope": 18}, "rope: 18 is not an even number up to 16"),
        ({"rope": 7}, "rope: 7 is not an even number"),
        ({"rope": 10, "fold": 2}, "rope: 10 is not an even number up to 8, with fold: 2"),
        ({"rope": 2, "fold": 2, "theta": 10.0}, "rope: 2 drops fast frequencies, which need RoPE: take at least 4"),
        ({"rope": 24, "rank": 1}, "rope: 24 is not an even number up to 16"),
        ({"rope": 2, "keep_kv": 0.01, "theta": 50.0}, "rope: 2 drops fast frequencies"),
        ({"fold": 3}, "fold: 3 does not divide the 8 frequencies of this model"),
        ({"fold": 0}, "fold should be at least 1"),
        ({"rank": 0}, "rank should be at least 1"),
        (
            {"keep_kv": 0.2, "rope": 16},
            "keep_kv: 0.2 of 64 numbers a token leaves none beside 16 rotated channels: take at least 0.26, or a rope "
            "of at most 12",
        ),
        ({"keep_kv": 0.01}, "0.01 of 64 numbers a token leaves none beside 12 rotated channels: take at least 0.2"),
        ({"keep_kv": 0.0}, "keep_kv should be greater than 0"),
        ({"keep_kv": 1.5}, "keep_kv should be at most 1"),
        ({"refit": ["q", "q"]}, "names a projection twice"),
        ({"refit": ["v"]}, "refit"),
    ],
)
def test_settings_that_do_not_fit(fields, says):
    fields = dict(fields)
    rope = {"rope_type": "default", "rope_theta": fields.pop("theta", 10_000.0)}
    model = llama(fields.pop("kv", 2), rope_parameters=rope)
    with pytest.raises(SurgeryError) as caught:
        convert(model, **fields)
    assert says in str(caught.value)
    assert not caught.value.others


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("fields", [{}, {"rope": 16}, {"rope": 4}, {"fold": 2}], ids=str)
@pytest.mark.parametrize(("field", "asked"), [("rank", 500), ("keep_kv", 1.0), ("keep_kv", 0.01)])
def test_errors_name_the_largest_and_the_least(kv, fields, field, asked):
    """What is named is accepted, and what is one beyond it is not."""
    model = llama(kv)

    def plan(**more):
        return surgery.plan(recipe({"op": "mla"} | TEXT | fields | more), model)

    try:
        plan(**{field: asked})
    except SurgeryError as error:
        bound, step = re.search(r"at (most|least) ([\d.]+)", str(error)), 1 if field == "rank" else 0.01
        named = type(asked)(bound[2])
        plan(**{field: named})
        with pytest.raises(SurgeryError):
            plan(**{field: round(named + (step if bound[1] == "most" else -step), 2)})
        for rope in re.findall(r"a rope of at most (\d+)", str(error)):
            plan(**{field: asked, "rope": int(rope)})
    else:
        assert (field, asked) == ("keep_kv", 1.0)


def test_bases_that_do_not_fit():
    cases = {
        "float16": llama(2).half(),
        "has no biases in its MLP": llama(2, mlp_bias=True),
        "has no sliding window": build("Mistral", num_key_value_heads=2, sliding_window=8, **LLAMA),
        "the layers of llama, mistral and qwen2": TINY["qwen3"](),
        "its RoPE is yarn": llama(2, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}),
    }
    for says, model in cases.items():
        with pytest.raises(SurgeryError) as caught:
            convert(model, rank=8, rope=4)
        assert says in str(caught.value), str(caught.value)


def test_nothing_follows_it():
    model = llama(2)
    convert(model, rank=8, rope=4)
    for step in ({"op": "gqa", "kv_heads": 1, "method": "mean"}, {"op": "mla"}, {"op": "duo_attention"}):
        with pytest.raises(SurgeryError, match="start from its base"):
            surgery.apply(recipe(step), model)


def test_a_stock_model_of_the_family_is_read_or_refused():
    """Its layers and cache are read from a config, also with queries of low rank, as in DeepSeek-V3 itself."""
    config = transformers.DeepseekV3Config(q_lora_rank=None, num_attention_heads=4, num_hidden_layers=2)
    layer = Anatomy.of(config).layers[0]
    assert (layer.heads, layer.kv_heads, layer.kv_width, layer.rotary) == (4, 1, 576, 64)
    assert layer.positions == "interleaved"
    layer = Anatomy.of(transformers.DeepseekV3Config()).layers[0]
    assert (layer.latent.queries, layer.layout.q, layer.kv_width) == (1536, "q_b_proj", 576)
    with pytest.raises(SurgeryError, match="q_lora_rank"):
        Anatomy.of(transformers.DeepseekV3Config(q_lora_rank=0))


SCALED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("fields", "engine", "says"),
    [
        ({}, "vllm", ["a latent vector of 20 and a rotated key of 12: its attention takes 512 and 64 alone"]),
        ({}, "llama.cpp", []),
        ({"rope_parameters": SCALED}, "llama.cpp", ["latent attention with linear RoPE"]),
        ({"rope_parameters": SCALED}, "vllm", ["512 and 64 alone", "it takes every scaling for YaRN"]),
        ({"attention_bias": True}, "llama.cpp", ["latent attention with biases"]),
        ({"hidden_act": "gelu"}, "llama.cpp", ["gelu as the MLP's activation"]),
        ({"hidden_act": "gelu"}, "vllm", ["512 and 64 alone", "gelu as the MLP's activation"]),
    ],
)
def test_engines_that_cannot_run_it_say_so(fields, engine, says):
    model = llama(4, **fields)
    convert(model, rank=20, rope=12)
    obstacles = find(engine).obstacles(Anatomy.of(model))
    assert len(obstacles) == len(says)
    assert all(part in obstacle.what for part, obstacle in zip(says, obstacles, strict=True))


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_stock_models_that_engines_would_compute_otherwise(engine):
    """What `mla` writes has none of this; a stock model that `absorb` was applied to may."""
    fields = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 2}
    other = {"rope_interleave": False, "attention_bias": True, "first_k_dense_replace": 1}
    config = transformers.DeepseekV3Config(**fields | other)
    said = " ".join(obstacle.what for obstacle in find(engine).obstacles(Anatomy.of(config)))
    assert "in halves" in said
    assert "biases" in said
    assert "experts" in said
    low_rank = transformers.DeepseekV3Config(**fields | {"q_lora_rank": 64, "first_k_dense_replace": 2})
    assert "a vector of their own" in find(engine).obstacles(Anatomy.of(low_rank))[-1].what
    plain = transformers.DeepseekV3Config(**fields | {"first_k_dense_replace": 2, "rope_interleave": True})
    assert find(engine).obstacles(Anatomy.of(plain)) == []


def test_saved_with_its_report_and_measured_beside_its_base(tmp_path):
    """`save`, `check`, `bench` and `heal` know a result whose family is not the base's."""
    base = llama(4)
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    report = convert(model, rank=20, rope=12)
    surgery.save(model, tmp_path / "out", report)
    assert surgery.check(tmp_path / "out").passed
    assert surgery.load(tmp_path / "out").config.model_type == "deepseek_v3"
    assert "rope_theta" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert compare(base.config, model.config, tmp_path / "base", tmp_path / "out")[0].startswith(
        "the base: it was made from a model in memory"
    )
    with pytest.raises(SurgeryError, match="the report is of"):
        surgery.save(TINY["qwen3"](), tmp_path / "other", report)


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_other_classes_are_refused_before_the_fit(kind):
    model = getattr(transformers, kind)(llama(2).config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="is not a causal model of Transformers"):
        convert(model, rank=8, rope=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_error_at_the_end_leaves_the_model_as_it_was(monkeypatch):
    model = llama(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("surgery.architecture.latent.write_latent", fails)
    with pytest.raises((MemoryError, SurgeryError)):
        convert(model, rank=8, rope=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_hangs_on_the_modules_stays():
    model, calls = llama(2), []
    model.gradient_checkpointing_enable()
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    inner, mlp = model.model, model.model.layers[1].mlp
    convert(model, rank=8, rope=4)
    assert model.model is inner
    assert model.model.layers[1].mlp is mlp
    assert model.is_gradient_checkpointing
    calls.clear()
    logits_of(model)
    assert calls


def test_a_stopped_run_goes_on_where_it_was(tmp_path, numbers):
    """Killed after a layer, the same command gives the same bits."""
    base = tmp_path / "base"
    llama(4).save_pretrained(base)
    step = {"op": "mla", "rank": 20, "rope": 12, "calibration_text": str(numbers)}
    step |= {"calibration_samples": 12, "calibration_length": 24}
    folder, results = tmp_path / "state", []
    for stops in (True, False, None):
        model = copy.deepcopy(llama(4))
        context = context_of(model, step, folder if stops is not None else None, stop if stops else None)
        if stops:
            with pytest.raises(Stopped):
                MLA(**step).apply(model, context)
            assert list(folder.glob("*.state*"))
        else:
            MLA(**step).apply(model, context)
            results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def context_of(model, step, folder, progress):
    before = Anatomy.of(model)
    if folder is not None:
        folder.mkdir(exist_ok=True)
    return ApplyContext(MLA(**step).plan(before), before, progress, Tokens(), folder=folder)


def test_the_plan_says_shapes_share_and_a_milder_setting():
    base = llama(4, max_position_embeddings=64)
    plan = surgery.plan(recipe({"op": "mla"} | TEXT), base)
    after = plan.after
    assert after.latent.width * 2 == 4 * 2 * 16, "half of the numbers"
    assert plan.after.kv_bytes_per_token * 2 == plan.before.kv_bytes_per_token
    assert after.latent.rope == 10, "waves of up to 12 x 64 tokens: frequencies 0 to 4 of 10,000^(-f/8)"
    model = copy.deepcopy(base)
    convert(model)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape for name, shape in plan.shapes.items() if shape} == {
        name: shape for name, shape in stored.items() if name in plan.shapes
    }
    assert MLA(keep_kv=0.5).milder() == "keep_kv=0.75"
    assert MLA(rank=1).milder() == "rank=2"
    assert MLA(keep_kv=0.8).milder() == "keep_kv=0.9"
    assert MLA(keep_kv=1.0).milder() == ""


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
])  # fmt: skip
def test_scaled_frequencies_are_the_bases(rope):
    base = llama(1, rope_parameters=rope)
    model = copy.deepcopy(base)
    convert(model, rank=16, rope=16, refit=[])
    assert difference(logits_of(model), logits_of(base)) <= 1e-5
    convert(fewer := copy.deepcopy(base), rank=16, rope=12, refit=[])
    torch.testing.assert_close(fewer.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq[:6])


def test_after_merged_heads_and_before_nothing():
    """`gqa` may come before it; scores of heads, which no recipe could use, are refused on its result."""
    model, base = (llama(4, max_position_embeddings=1024) for _ in range(2))
    steps = {"op": "gqa", "kv_heads": 2, "method": "mean"}, {"op": "mla", "rank": 20, "rope": 12} | TEXT
    surgery.apply(recipe(*steps), model, tokenizer=Letters())
    surgery.apply(recipe(steps[0]), base)
    convert(base, rank=20, rope=12)
    assert torch.equal(logits_of(model), logits_of(base))
    with pytest.raises(SurgeryError, match="has latent attention"):
        score(model, Letters(), "far-mass", samples=1, length=600, sinks=1, window=8)
