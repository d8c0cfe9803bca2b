"""Decoding from latent vectors: what stock `deepseek_v3` computes, in float64, and no keys and values of the past."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from closed_form import recipe
from families import TINY, TOKENS, build, difference, load_without_package, logits_of
from families import one_thread as one_thread  # a fixture
from tokenizers_of_bytes import Letters

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.runtime.modeling_surgery import CACHE
from surgery.runtime.surgery_latent import ABSORBED

TEXT = {"calibration_text": "builtin", "calibration_samples": 4, "calibration_length": 64}
RANK, ROPE = 20, 12
PAYS = 60  # queries up to which reading the vectors pays: 20 * (14 + 16) / (2 * 20 - 14 - 16)
LONG = 90
EXACT = 1e-9  # of logits in float64


@pytest.fixture(scope="module")
def stock():
    """A model in float64 whose latent attention loses something, so that its parts differ from the base's."""
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = build("Llama", vocab_size=128, head_dim=16, intermediate_size=96, max_position_embeddings=256, **fields)
    surgery.apply(recipe({"op": "mla", "rank": RANK, "rope": ROPE} | TEXT), model, tokenizer=Letters())
    assert model.model.layers[0].self_attn.qk_nope_head_dim == 14
    return model.double().eval()


@pytest.fixture
def absorbed(stock):
    model = copy.deepcopy(stock)
    surgery.apply(recipe({"op": "absorb"}), model)
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The number of tokens for which keys and values are made, one entry a layer."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    seen, stock = [], DeepseekV3Attention.expand_kv

    def expand_kv(module, vectors, rotated):
        seen.append(vectors.shape[2])
        return stock(module, vectors, rotated)

    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", expand_kv)
    return seen


@pytest.mark.parametrize("length", [1, 2, PAYS, PAYS + 1, LONG])
def test_a_call_without_a_cache(stock, absorbed, made, length):
    got = absorbed(tokens(2, length)).logits
    taken = list(made)
    assert difference(got, stock(tokens(2, length)).logits) <= EXACT
    assert taken == ([] if length <= PAYS else [length] * 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [PAYS, LONG])
def test_padding(stock, absorbed, side, length):
    """Each row as it is alone; a row of padding alone gives no NaN."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, :9], mask[2] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = tokens(3, length)
    got = absorbed(inputs, attention_mask=mask, position_ids=positions).logits
    assert got.isfinite().all()
    for row in range(2):
        alone = stock(inputs[row : row + 1, mask[row].bool()]).logits[0]
        assert difference(got[row, mask[row].bool()], alone) <= EXACT


@pytest.mark.parametrize("chunks", [(1,) * 6, (20, 1, 30, 1), (61, 7, 22), (90, 1, 2), (50, 65, 1)])
def test_a_text_in_pieces(stock, absorbed, made, chunks):
    """Chunks on both sides of the break-even, with the model's own cache, and with a plain one."""
    text = tokens(2, sum(chunks))
    want = stock(text).logits
    made.clear()
    for cache in (absorbed.make_cache(), transformers.DynamicCache()):
        parts, first = [], 0
        for length in chunks:
            parts.append(absorbed(text[:, first : first + length], **{CACHE: cache}).logits)
            first += length
        assert difference(torch.cat(parts, 1), want) <= EXACT
    ends = [sum(chunks[: index + 1]) for index, length in enumerate(chunks) if length > PAYS]
    assert made == [end for end in ends for _ in range(2)] * 2, "a call of few tokens makes no keys of the past"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generation(stock, absorbed, options):
    mask = torch.ones(2 if "prompt_lookup_num_tokens" not in options else 1, 30, dtype=torch.long)
    if len(mask) > 1:
        mask[0, :5] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "pad_token_id": 0} | options
    prompt = tokens(len(mask), 30)
    got, want = (model.generate(prompt, **asked) for model in (absorbed, stock))
    assert torch.equal(got, want)


def test_its_cache_holds_what_the_stock_cache_holds(absorbed):
    cache = absorbed.make_cache()
    absorbed(tokens(2, 300), **{CACHE: cache})
    held = {tensor.shape for layer in cache.layers for tensor in layer.stores[0].tensors.values()}
    assert held == {(2, 1, 300, RANK), (2, 1, 300, ROPE)}
    assert cache.nbytes == 2 * 2 * 300 * (RANK + ROPE) * 8
    assert Anatomy.of(absorbed).kv_bytes_per_token == 2 * (RANK + ROPE) * 8
    absorbed(tokens(2, 1), **{CACHE: cache})
    cache.crop(-1)
    again = absorbed(tokens(2, 1), **{CACHE: cache}).logits
    whole = absorbed(torch.cat([tokens(2, 300), tokens(2, 1)], 1)).logits[:, -1:]
    assert difference(again, whole) <= EXACT


def test_packed_rows(stock, absorbed):
    """Two sequences in one row, told apart by their positions: one below the break-even, one above."""
    first, second = tokens(1, 20), tokens(1, 70)
    positions = torch.cat([torch.arange(20), torch.arange(70)])[None]
    got = absorbed(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    assert difference(got, torch.cat([stock(first).logits, stock(second).logits], 1)) <= EXACT


@pytest.mark.parametrize("length", [30, LONG])
def test_gradients_are_those_of_the_stock_model(stock, absorbed, length):
    grads = []
    for model in (stock, absorbed):
        model.zero_grad()
        model(tokens(2, length), labels=tokens(2, length)).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-7, atol=1e-10)


def test_an_adapter_on_the_maps_counts_in_every_call(stock, absorbed):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = peft.get_peft_model(copy.deepcopy(stock), settings).eval()
    ours = peft.get_peft_model(absorbed, settings).eval()
    ours.load_state_dict(plain.state_dict())
    assert difference(plain(TOKENS).logits, stock(TOKENS).logits) > 1e-3
    assert difference(ours(TOKENS).logits, plain(TOKENS).logits) <= EXACT
    assert difference(ours.merge_and_unload()(TOKENS).logits, plain(TOKENS).logits) <= EXACT


def test_a_hook_on_the_maps_is_not_passed_over(stock, absorbed):
    plain = copy.deepcopy(stock)
    for model in (plain, absorbed):
        model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda module, args, output: 0.5 * output)
    assert difference(plain(TOKENS).logits, stock(TOKENS).logits) > 1e-3
    assert difference(absorbed(TOKENS).logits, plain(TOKENS).logits) <= EXACT


def test_it_is_timed_beside_its_base(absorbed, tmp_path):
    """The stock module cannot read its cache, so no third model is timed."""
    from surgery.evaluation.benchmark.run import bench

    base = build("Llama", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=4, head_dim=16, intermediate_size=96, max_position_embeddings=256)  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    absorbed.float().save_pretrained(tmp_path / "out")
    (row,) = bench(tmp_path / "out", tmp_path / "base", lengths=(64,), rounds=1, decode=2, synthetic=True).ratios()
    assert row["decode_vs_stock"] > 0


def test_saved_and_opened_in_both_ways(stock, absorbed, tmp_path):
    """Without the package its code comes from the folder; with it, from the package. A second save changes nothing."""
    model = absorbed.float()
    model.save_pretrained(tmp_path / "out")
    again = surgery.load(tmp_path / "out")
    assert type(again).__name__ == "SurgeryDeepseekV3ForCausalLM"
    assert [layer.entry for layer in Anatomy.of(again).layers] == [{"latent": ABSORBED}] * 2
    again.save_pretrained(tmp_path / "again")
    want = logits_of(model)
    assert torch.equal(logits_of(again), want)
    assert difference(want, logits_of(stock.float())) <= 1e-4
    stock.double()
    found = load_without_package([tmp_path / "out", tmp_path / "again"], tmp_path, trust=True)
    for answer in found.values():
        assert torch.equal(answer["logits"], want)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_steps_of_a_check(absorbed, monkeypatch, wrong):
    """Wrong steps are found, although prompts and both ways to load show nothing of them."""
    from surgery.evaluation import check, fresh_process
    from surgery.runtime import surgery_latent

    if wrong:
        absorb = surgery_latent._absorbed
        monkeypatch.setattr(surgery_latent, "_absorbed", lambda *args: lambda *block: 0.9 * absorb(*args)(*block))
    text = tokens(1, LONG)
    with torch.no_grad():
        found = fresh_process.step_difference(absorbed, text, absorbed(text).logits, 4)
    (item,) = check._steps({"step_difference": found, "dtype": "float32"})
    assert item.status == ("failed" if wrong else "passed")
    assert check._steps({}) == []


def test_a_check_reads_the_last_tokens_one_by_one(stock, tmp_path):
    copy.deepcopy(stock).float().save_pretrained(tmp_path / "base")
    surgery.apply(recipe({"op": "absorb"}), tmp_path / "base", output=tmp_path / "out", check=False, evaluate=False)
    items = {item["name"]: item["status"] for item in surgery.check(tmp_path / "out").data["check"]["items"]}
    assert items["decodes what it reads"] == "passed"
    assert "failed" not in items.values()


def test_queries_of_a_vector_of_their_own_and_experts():
    """As in DeepSeek-V3 itself, whose queries have a rank and whose later layers are experts."""
    sizes = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    experts |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1}
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"vocab_size": 128}
    model = build("DeepseekV3", intermediate_size=96, **config, **sizes, **experts).eval()
    ids = tokens(2, 30)
    with torch.no_grad():
        want = model(ids).logits
        surgery.apply(recipe({"op": "absorb"}), model)
        cache = model(ids[:, :29], use_cache=True)[CACHE]
        got = model(ids[:, 29:], **{CACHE: cache}).logits
    assert (got[:, 0] - want[:, 29]).abs().max() <= 1e-5 * want.abs().max()  # experts have no float64


def test_it_is_undone_after_a_block(stock):
    model = copy.deepcopy(stock)
    want = logits_of(model)
    with surgery.applied(recipe({"op": "absorb"}), model):
        assert hasattr(model, "make_cache")
        assert difference(logits_of(model), want) <= EXACT
    assert type(model) is transformers.DeepseekV3ForCausalLM
    assert not {"expand_kv", "surgery_latent"} & {*vars(model.model.layers[0].self_attn)}
    assert torch.equal(logits_of(model), want)


def test_models_that_it_is_not_for(stock, absorbed, monkeypatch):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    steps = {
        "no latent attention; put mla before it": (TINY["llama"](), {"op": "absorb"}),
        "sets the way of decoding already": (absorbed, {"op": "absorb"}),
        "whose heads it cannot change: start from its base": (absorbed, {"op": "expand"}),
    }
    for says, (model, step) in steps.items():
        with pytest.raises(SurgeryError) as caught:
            surgery.apply(recipe(step), model)
        assert says in str(caught.value)
    monkeypatch.delattr(DeepseekV3Attention, "expand_kv")
    with pytest.raises(SurgeryError, match="makes keys and values before its cache"):
        surgery.apply(recipe({"op": "absorb"}), copy.deepcopy(stock))


@pytest.mark.parametrize("value", [True, "fast", None])
def test_a_block_that_says_something_else_is_refused(absorbed, value):
    absorbed.config.surgery["layers"][1]["latent"] = value
    with pytest.raises(ValueError, match="layer 1 of the surgery block has latent"):
        surgery.runtime.surgery_config.validate(absorbed.config)
