"""gqa and expand: the merge itself, number formats, refusals, families not in the table, models in memory."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import (
    COMMON,
    KV,
    OFF_THE_INTERFACE,
    QUERIES,
    TOKENS,
    VOCAB,
    WITHOUT_KV_FIELD,
    attention_modules,
    base,
    build,
    copy_of,
    difference,
    get_head,
    kv_heads_of,
    logits_of,
    one_thread,  # noqa: F401
    randomise,
    set_head,
)
from safetensors.torch import load_file, save_file

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import unpack
from surgery.errors import SurgeryError
from surgery.operations.gqa.merge import mean_head, permute_kv_heads

K_NAME, V_NAME = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"


def recipe(op: str = "gqa", **fields) -> dict:
    return {"version": 1, "name": "test", "operations": [{"op": op, **fields}], "evaluate": None}


def convert(steps: dict, folder: Path, output: Path, **options):
    return surgery.apply(steps, str(folder), output=output, check=False, evaluate=False, **options)


def saved(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


# The merge


def test_a_number_that_does_not_divide_weighs_by_readers():
    """12 query heads, 4 KV heads → 3: each new head is the mean over its own 4 query heads of what they read."""
    fields = COMMON | {"hidden_size": 96, "num_attention_heads": 12}
    old = build("Llama", seed=1, **fields, num_key_value_heads=4)
    model, wide = copy_of(old), build("Llama", seed=1, **fields, num_key_value_heads=12)
    wide.load_state_dict(
        {k: v for k, v in old.state_dict().items() if "k_proj" not in k and "v_proj" not in k}, strict=False
    )
    plan = surgery.plan(recipe(kv_heads=3), old)
    assert any("3 does not divide 4" in note for note in plan.notes)
    surgery.apply(recipe(kv_heads=3), model)
    for before, after, wide_module in zip(*map(attention_modules, (old, model, wide)), strict=True):
        for projection in "kv":
            for new in range(3):
                read = [get_head(old, before, projection, query // 3) for query in range(4 * new, 4 * new + 4)]
                mean = sum(read) / 4
                assert torch.allclose(get_head(model, after, projection, new), mean, rtol=0, atol=2e-7)
                for query in range(4 * new, 4 * new + 4):
                    set_head(wide, wide_module, projection, query, mean)
    assert difference(logits_of(model), logits_of(wide.double())) < 1e-4
    first = copy_of(old)
    surgery.apply(recipe(kv_heads=3, method="first"), first)
    before, after = attention_modules(old)[0], attention_modules(first)[0]
    assert [get_head(first, after, "k", g).equal(get_head(old, before, "k", s)) for g, s in enumerate((0, 1, 2))] == [
        True
    ] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_means_are_rounded_once(dtype, tmp_path):
    model = copy_of(base("qwen2")).to(dtype)
    name, old = "model.layers.0.self_attn.k_proj", model.state_dict()
    convert(recipe(kv_heads=1), saved(model, tmp_path / "in"), tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in new.values()} == {dtype}
    for kind in ("weight", "bias"):
        heads = old[f"{name}.{kind}"].double().reshape(KV, 8, -1)
        exact = (heads[0] + heads[1] + heads[2] + heads[3]) / KV
        assert torch.equal(new[f"{name}.{kind}"].double().reshape(8, -1), exact.to(dtype).double())
    surgery.apply(recipe(kv_heads=1), model)
    assert all(torch.equal(new[n], t) for n, t in model.state_dict().items() if n in new)
    tokens = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == TOKENS.shape[1] + 3


def test_mean_of_equal_heads_is_that_head_to_the_bit():
    """Three copies of 0.1 must not become 0.1 + 1 ulp, in any dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        old = build("Llama", seed=2, **COMMON | {"hidden_size": 96, "num_attention_heads": 12}, num_key_value_heads=1)
        old = old.to(dtype)
        model = copy_of(old)
        for steps in (recipe("expand", kv_heads=6), recipe(kv_heads=2), recipe(kv_heads=1)):
            surgery.apply(steps, model)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), old.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_means_of_equal_heads_of_any_group_size(dtype):
    """Float64 as well, where a sum of three equal numbers divided by three can be another number."""
    head = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).double()
    for size in range(1, 18):
        for counts in ([1] * size, list(range(1, size + 1))):
            assert torch.equal(mean_head(head.expand(size, 8, 32), counts), head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_are_the_exact_mean_rounded_once(dtype):
    from fractions import Fraction

    heads = torch.randn(5, 8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    counts = [1, 2, 3, 1, 2]
    got = mean_head(heads.double(), counts).to(dtype)
    for row in range(8):
        for column in range(32):
            values = [Fraction(value) for value in heads[:, row, column].tolist()]
            exact = sum(w * v for w, v in zip(counts, values, strict=True)) / sum(counts)
            assert got[row, column] == torch.tensor(float(exact), dtype=torch.float64).to(dtype)


def test_random_heads_know_nothing_and_keep_the_scale():
    old = base("phi")
    models = [copy_of(old) for _ in range(3)]
    for seed, model in zip((0, 0, 1), models, strict=True):
        surgery.apply(recipe(kv_heads=2, method="random", seed=seed), model)
    same, again, other = (attention_modules(m)[0] for m in models)
    second, before = attention_modules(models[0])[1], attention_modules(old)[0].k_proj.weight.detach()
    assert torch.equal(same.k_proj.weight, again.k_proj.weight)
    draws = [same.k_proj, same.v_proj, other.k_proj, second.k_proj]  # of parts, seeds and layers: unlike one another
    table = torch.corrcoef(torch.stack([d.weight.detach().flatten() for d in draws] + [before[:16].flatten()]))
    assert table.fill_diagonal_(0).abs().max() < 0.15
    new = same.k_proj.weight.detach()
    assert new.square().mean().sqrt().item() == pytest.approx(before.square().mean().sqrt().item(), rel=0.15)
    assert not same.k_proj.bias.any()


@pytest.mark.parametrize(
    "name", ["qwen2", "gpt_oss", "cohere_qk_norm", "stablelm_qk_layernorm", "olmo2", "falcon_new", "phi3"]
)
def test_permuted_heads_are_the_same_model(name):
    """Grouping moves query heads, output columns, biases, norms and sinks with their KV heads."""
    from surgery.architecture.weights import pack

    old, model = base(name), copy_of(base(name))
    for anatomy in Anatomy.of(model).layers:
        module = model.get_submodule(anatomy.path)
        layer = unpack(anatomy, {n: module.get_parameter(n).detach() for n in anatomy.tensor_names})
        for n, tensor in pack(permute_kv_heads(layer, [2, 0, 3, 1])).items():
            assert not torch.equal(module.get_parameter(n), tensor) or n.startswith("o_norm"), n
            module.get_parameter(n).data.copy_(tensor)
    assert difference(logits_of(model), logits_of(old)) < 1e-5


@pytest.mark.parametrize("projection", ["k", "v"])
def test_grouping_sees_keys_and_values(projection):
    """Like keys alone, or like values alone, are enough to share a group."""
    model = copy_of(base("llama"))
    for module in attention_modules(model):
        for head in (2, 3):
            set_head(model, module, projection, head, get_head(model, module, projection, head - 2))
    report = surgery.apply(recipe(kv_heads=2, grouping="similarity"), model)
    record = report.data["operations"][0]["record"]
    assert record == {f"model.layers.{i}.self_attn": {"kv_head_order": [0, 2, 1, 3]} for i in range(2)}


def test_qk_norm_keys_are_not_aligned_and_the_plan_says_so():
    for name in ("qwen3", "gemma3", "cohere_qk_norm", "phi_qk_layernorm", "stablelm_qk_layernorm", "olmo2"):
        aligned, plain = copy_of(base(name)), copy_of(base(name))
        plan = surgery.plan(recipe(kv_heads=2, align="procrustes"), aligned)
        assert any("keys are not aligned" in note for note in plan.notes), name
        surgery.apply(recipe(kv_heads=2, align="procrustes"), aligned)
        surgery.apply(recipe(kv_heads=2), plain)
        for a, b in zip(attention_modules(aligned), attention_modules(plain), strict=True):
            for projection, equal in (("q", True), ("k", True), ("v", False)):
                assert get_head(aligned, a, projection, 1).equal(get_head(plain, b, projection, 1)) is equal, (
                    name,
                    projection,
                )
    for name in ("llama", "cohere", "stablelm", "phi"):
        assert not surgery.plan(recipe(kv_heads=2, align="procrustes"), base(name)).notes


def test_aligned_reference_head_keeps_its_bits():
    """The first head of a group is not turned: its queries and output columns stay as they were."""
    old, model = base("llama_bias"), copy_of(base("llama_bias"))
    surgery.apply(recipe(kv_heads=2, align="procrustes", method="first"), model)
    for before, after in zip(attention_modules(old), attention_modules(model), strict=True):
        for new, head in enumerate((0, 2)):
            for projection in "kv":
                assert torch.equal(get_head(model, after, projection, new), get_head(old, before, projection, head))
            for query in (2 * head, 2 * head + 1):
                assert torch.equal(get_head(model, after, "q", query), get_head(old, before, "q", query))
                columns = slice(query * 8, query * 8 + 8)
                assert torch.equal(after.o_proj.weight[:, columns], before.o_proj.weight[:, columns])
        assert torch.equal(after.o_proj.bias, before.o_proj.bias)


def test_falcon_says_that_its_cache_does_not_shrink():
    """Before Transformers 5.25 the new-decoder Falcon repeats its KV heads before it caches them."""
    note = "repeats KV heads before its cache here"
    assert [
        note in " ".join(surgery.plan(recipe(kv_heads=1), base(n)).notes) for n in ("falcon_new", "falcon_old")
    ] == ["falcon_new" in OFF_THE_INTERFACE, False]


# Files


@pytest.mark.parametrize("field", [None, "absent"])
def test_multi_head_model_whose_config_has_no_number(field, tmp_path):
    """Configs older than GQA have no num_key_value_heads, or null: every query head has its own."""
    old = build("Llama", seed=3, **COMMON, num_key_value_heads=QUERIES)
    folder = saved(old, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_key_value_heads"] = None
    if field:
        del config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    convert(recipe(kv_heads=2), folder, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_key_value_heads == 2
    wide = copy_of(old).double()
    for before, module in zip(attention_modules(old), attention_modules(wide), strict=True):
        for projection in "kv":
            for head in range(QUERIES):
                first = head // 4 * 4
                set_head(
                    wide,
                    module,
                    projection,
                    head,
                    sum(get_head(old, before, projection, first + i) for i in range(4)) / 4,
                )
    assert difference(logits_of(loaded), logits_of(wide)) < 1e-4


def test_tied_embeddings_stay_tied(tmp_path):
    out = tmp_path / "out"
    convert(recipe(kv_heads=2), saved(base("llama"), tmp_path / "in"), out)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    for model in (transformers.AutoModelForCausalLM.from_pretrained(out), copy_of(base("llama"))):
        if kv_heads_of(model) == KV:
            surgery.apply(recipe(kv_heads=2), model)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "stablelm_qk_layernorm", "qwen3_moe"])
def test_shards_give_what_one_file_gives(name, tmp_path):
    one, many = saved(base(name), tmp_path / "one"), saved(base(name), tmp_path / "many", max_shard_size="40KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    for i, steps in enumerate([recipe(kv_heads=1), recipe("expand")]):
        for folder in (one, many):
            convert(steps, folder, tmp_path / f"{folder.name}-{i}")
        one_file = load_file(tmp_path / f"one-{i}" / "model.safetensors")
        files = sorted((tmp_path / f"many-{i}").glob("*.safetensors"))
        assert [f.name for f in files] == [f.name for f in sorted(many.glob("*.safetensors"))]
        shards = [load_file(file) for file in files]
        index = json.loads((tmp_path / f"many-{i}" / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["weight_map"] == {n: f.name for f, shard in zip(files, shards, strict=True) for n in shard}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in one_file.values())
        joined = {n: t for shard in shards for n, t in shard.items()}
        assert joined.keys() == one_file.keys()
        assert all(torch.equal(joined[n], one_file[n]) for n in one_file)


def test_checkpoint_of_the_base_model_without_its_prefix(tmp_path):
    """`LlamaModel` saves "layers.0...", not "model.layers.0...": converted under the names that are there."""
    folder = saved(base("llama").model, tmp_path / "in")
    assert "layers.0.self_attn.k_proj.weight" in load_file(folder / "model.safetensors")
    convert(recipe(kv_heads=2), folder, tmp_path / "out")
    model = copy_of(base("llama"))
    surgery.apply(recipe(kv_heads=2), model)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(made), logits_of(model))
    bare = copy_of(base("llama").model)
    surgery.apply(recipe(kv_heads=2), bare)
    assert torch.equal(bare.layers[1].self_attn.k_proj.weight, model.model.layers[1].self_attn.k_proj.weight)


# Refusals


@pytest.mark.parametrize("name", [*WITHOUT_KV_FIELD, "falcon_old", "falcon_alibi"])
def test_families_without_a_number_are_refused_in_words(name, tmp_path):
    folder = saved(base(name), tmp_path / "in")
    for steps in (recipe(kv_heads=2), recipe(kv_heads=4, method="first")):
        with pytest.raises(SurgeryError, match="what would work: a family that honours the number") as caught:
            convert(steps, folder, tmp_path / "out")
        assert caught.value.exit_code == 2
        if name.startswith("falcon"):
            assert "1 KV head or 8 are possible" in str(caught.value)
        else:
            assert base(name).config.model_type in str(caught.value)
        model = copy_of(base(name))
        with pytest.raises(SurgeryError, match="what would work"):
            surgery.apply(steps, model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base(name).parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_impossible_numbers_name_the_possible_ones():
    for number, words in ((3, "possible: 1, 2, 4"), (8, "`expand` repeats heads"), (5, "possible: 1, 2, 4")):
        with pytest.raises(SurgeryError, match=words):
            surgery.plan(recipe(kv_heads=number), base("llama"))
    with pytest.raises(SurgeryError, match="possible: 4, 8"):
        surgery.plan(recipe("expand", kv_heads=2), base("llama"))
    with pytest.raises(SurgeryError, match="counts heads by its config"):
        surgery.plan(recipe(kv_heads=[1, 2]), base("phi3"))
    with pytest.raises(SurgeryError, match="drop one of them"):
        surgery.plan(recipe(kv_heads=1, method="random", align="procrustes"), base("llama"))
    twelve = build("Llama", **COMMON | {"hidden_size": 96, "num_attention_heads": 12}, num_key_value_heads=4)
    with pytest.raises(SurgeryError, match="equal size"):
        surgery.plan(recipe(kv_heads=3, grouping="similarity"), twelve)


def test_damaged_weights_are_refused_and_nothing_is_changed(tmp_path):
    model = copy_of(base("llama"))
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=r"layers\.1\.self_attn\.v_proj\.weight holds NaN"):
        surgery.apply(recipe(kv_heads=2), model)
    assert model.config.num_key_value_heads == KV
    assert all(
        torch.equal(a, b) or a.isnan().any() for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(SurgeryError, match="holds NaN"):
        convert(recipe(kv_heads=2), saved(model, tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Families that are not in the table


def llamalike(folder: Path, **fields) -> Path:
    saved(base("llama_bias"), folder)
    edit_json(folder / "config.json", model_type="llamalike", architectures=["LlamalikeForCausalLM"], **fields)
    return folder


def test_an_unknown_family_is_understood_by_shape_and_called_a_guess(tmp_path):
    folder = llamalike(tmp_path / "in")
    plan = surgery.plan(recipe(kv_heads=2), str(folder))
    assert any("llamalike is not a known family" in note and "a guess" in note for note in plan.notes)
    assert plan.to_dict()["guess"] is True
    convert(recipe(kv_heads=2), folder, tmp_path / "out")
    model = copy_of(base("llama_bias"))
    surgery.apply(recipe(kv_heads=2), model)
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(new[n], t) for n, t in model.state_dict().items())
    with pytest.raises(SurgeryError, match="use align: none"):
        surgery.plan(recipe(kv_heads=2, align="procrustes"), str(folder))
    with pytest.raises(SurgeryError, match="use grouping: neighbours"):
        surgery.plan(recipe(kv_heads=2, grouping="similarity"), str(folder))


@pytest.mark.parametrize("family", ["Olmo3", "Olmoe"])
def test_a_guess_sees_a_norm_over_the_whole_projection(family, tmp_path):
    """Their k_norm has a weight for every KV head: it must shrink with them, or no stock class loads the result."""
    model = build(family, **COMMON, num_key_value_heads=KV, num_experts=4, num_experts_per_tok=2)
    convert(recipe(kv_heads=2), saved(model, tmp_path / "in"), tmp_path / "out")
    made, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["mismatched_keys"]
    surgery.apply(recipe(kv_heads=2), model)
    assert difference(logits_of(made), logits_of(model)) < 1e-6
    expanded = build(family, **COMMON, num_key_value_heads=KV, num_experts=4, num_experts_per_tok=2)
    old = logits_of(expanded)
    surgery.apply(recipe("expand"), expanded)
    assert difference(logits_of(expanded), old) < 1e-4


def test_a_guess_refuses_what_may_follow_the_heads(tmp_path):
    folder = llamalike(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    path = "model.layers.1.self_attn"
    harmless = {f"{path}.rotary_emb.inv_freq": torch.ones(4), f"{path}.key_layernorm.weight": torch.ones(8)}
    save_file(tensors | harmless, folder / "model.safetensors")
    surgery.plan(recipe(kv_heads=2), str(folder))
    for extra in ({f"{path}.sinks": torch.ones(QUERIES)}, {f"{path}.k_layernorm.weight": torch.ones(32)}):
        save_file(tensors | extra, folder / "model.safetensors")
        with pytest.raises(SurgeryError, match="is not understood: it may follow the heads"):
            surgery.plan(recipe(kv_heads=2), str(folder))


def test_other_names_are_an_error_that_lists_modules(tmp_path):
    folder = llamalike(tmp_path / "in")
    short = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    tensors = load_file(folder / "model.safetensors")
    for old, new in short.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeryError, match="not understood") as caught:
        convert(recipe(kv_heads=2), folder, tmp_path / "out")
    assert "model.layers.N.self_attn.wk.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_models_are_refused_in_words(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    others = {
        "bert": transformers.BertModel(transformers.BertConfig(**small, vocab_size=VOCAB)),
        "vit": transformers.ViTModel(transformers.ViTConfig(**small, image_size=28, patch_size=14)),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
    }
    for kind, model in others.items():
        for source in (model, str(saved(model, tmp_path / kind))):
            with pytest.raises(SurgeryError, match=f"{kind} is not a decoder language model") as caught:
                surgery.plan(recipe(kv_heads=2), source)
            assert "surgery converts causal language models" in str(caught.value)


def test_partial_and_wrong_checkpoints_are_errors(tmp_path):
    folder = saved(base("llama"), tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    for lost, words in (
        (K_NAME, "k_proj.weight is missing"),
        ("model.layers.1.self_attn.o_proj.weight", "is missing"),
    ):
        shutil.copytree(folder, tmp_path / lost)
        save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / lost / "model.safetensors")
        with pytest.raises(SurgeryError, match=words):
            surgery.plan(recipe(kv_heads=2), str(tmp_path / lost))
    edit_json(folder / "config.json", num_key_value_heads=2)
    with pytest.raises(SurgeryError, match="does not fit the config"):
        surgery.plan(recipe(kv_heads=1), str(folder))


# Models in memory


def test_a_model_in_memory_keeps_its_state(tmp_path):
    """Training mode, `requires_grad`, hooks of gradients, dtype; its config and modules say the new number."""
    model = copy_of(base("qwen2")).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name or "embed" in name)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    report = surgery.apply(recipe(kv_heads=2), model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.config.num_key_value_heads == 2
    for module in attention_modules(model):
        assert module.num_key_value_groups == QUERIES // 2
        assert module.k_proj.out_features == 16
        assert module.config is model.config
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all((parameter.grad is not None) == flags[name] for name, parameter in model.named_parameters())
    model.eval()
    surgery.save(model, tmp_path / "out", report)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(made), logits_of(model))


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3", "gpt_oss", "smollm3", "cohere_qk_norm", "falcon_new", "phi3"]
)
def test_generation_with_cache_and_left_padding(name):
    """Greedy tokens: cached = not cached, padded = not padded; the cache has the new number of heads."""
    model = copy_of(base(name))
    surgery.apply(recipe(kv_heads=2), model)
    prompt = TOKENS[:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    slow = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(prompt)], dim=1)
    left = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(plain, slow)
    assert torch.equal(plain, left[:, 3:])
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    # Before Transformers 5.25 Falcon repeats heads before it caches them.
    stored = QUERIES if name == "falcon_new" and name in OFF_THE_INTERFACE else 2
    assert cache.layers[0].keys.shape[1] == stored


def test_lists_of_norms_shrink_and_grow():
    """StableLM has one norm module for each head."""
    model = copy_of(base("stablelm_qk_layernorm"))
    for steps, kv_heads in ((recipe(kv_heads=2), 2), (recipe("expand"), QUERIES), (recipe(kv_heads=1), 1)):
        surgery.apply(steps, model)
        for module in attention_modules(model):
            assert len(module.k_layernorm.norms) == kv_heads
            assert len(module.q_layernorm.norms) == QUERIES
            assert len({id(norm.weight) for norm in module.k_layernorm.norms}) == kv_heads
        assert logits_of(model).isfinite().all()


def test_adapters_are_refused_and_merged_ones_work():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        copy_of(base("llama")), LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    )
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(SurgeryError, match="merge_and_unload"):
            surgery.apply(recipe(kv_heads=2), model)
    merged = wrapped.merge_and_unload()
    expected = copy_of(merged)
    surgery.apply(recipe(kv_heads=2), merged)
    heads = expected.model.layers[0].self_attn.k_proj.weight.view(2, 2, 8, -1).double().mean(1).flatten(0, 1)
    assert torch.equal(merged.model.layers[0].self_attn.k_proj.weight.double(), heads.float().double())
    with pytest.raises(SurgeryError, match="loaded model"):
        surgery.apply(recipe(kv_heads=1), merged, output="out")


def test_a_composite_in_memory():
    model = copy_of(base("gemma3_image_text"))
    surgery.apply(recipe(kv_heads=2), model)
    assert model.config.text_config.num_key_value_heads == 2
    assert model.config.get_text_config() is model.model.language_model.config
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "cohere2"])
def test_a_composite_with_a_tower_of_the_same_names(kind, tmp_path):
    """A vision tower that has q_proj, k_proj and v_proj too, of the same size: known family (SmolVLM) and guess."""
    text = COMMON | {"model_type": kind, "num_key_value_heads": KV}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    vision |= {"image_size": 28, "patch_size": 14}
    if kind == "llama":
        config = transformers.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=120, pad_token_id=0)
        model = randomise(transformers.SmolVLMForConditionalGeneration(config), 1)
        tower, language = model.model.vision_model, model.model.text_model
    else:
        vision |= {"model_type": "siglip_vision_model"}
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=120)
        model = randomise(transformers.LlavaForConditionalGeneration(config), 1)
        tower, language = model.model.vision_tower, model.model.language_model
    convert(recipe(kv_heads=2), saved(model, tmp_path / "in"), tmp_path / "out")
    before, old = copy.deepcopy(tower.state_dict()), logits_of(model)
    surgery.apply(recipe(kv_heads=2), model)
    assert language.layers[0].self_attn.k_proj.out_features == 16
    assert all(torch.equal(a, b) for a, b in zip(before.values(), tower.state_dict().values(), strict=True))
    assert difference(logits_of(model), old) > 1e-2
    made, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(logits_of(made), logits_of(model)) < 1e-5


def test_layers_that_differ_are_refused(tmp_path):
    """Gemma 4 has another head size in its global layers."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "global_head_dim": 16}
    config = transformers.Gemma4TextConfig(**COMMON, num_key_value_heads=KV, **layers)
    with pytest.raises(SurgeryError, match="layers of this gemma4_text differ in head_dim"):
        surgery.plan(recipe(kv_heads=2), config)
