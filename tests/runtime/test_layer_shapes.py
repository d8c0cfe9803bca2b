"""Layers of different shape: KV heads layer by layer, query groups of unequal size; values, loading, caches, peft."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import chunked, given
from families import TINY, VOCAB, build, difference, double, load_without_package, logits_of, maker, one_thread  # noqa: F401

import surgery
from surgery.errors import SurgeryError
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime.surgery_config import exported_files, per_layer_config

SHAPED = {"num_hidden_layers": 3, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}
BUDGET = [3, 1, 3]
GROUPS = [3, 3, 2]  # 8 query heads on 3 KV heads: the last query head is gone
NAMES = ("llama", "qwen3", "gpt_oss")
IDS = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(3))


def base_of(name: str, **fields):
    if name == "gpt_oss":
        fields["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    return TINY[name](**SHAPED, **fields)


def layers_of(model):
    return [layer.self_attn for layer in model.model.layers]


def without_last_query_head(model):
    """The stock model in float64 whose last query head says nothing: its output columns are zero."""
    wide = double(model)
    for attention in layers_of(wide):
        attention.o_proj.weight.data[:, 8 * 8 :] = 0
    return wide


def cut(model):
    """The same function with that head really gone, as the runtime stores it."""
    model = copy.deepcopy(model)
    entries = []
    for attention in layers_of(model):
        for linear, dim in ((attention.q_proj, 0), (attention.o_proj, 1)):
            linear.weight = torch.nn.Parameter(linear.weight.data.narrow(dim, 0, 64).clone())
            linear.out_features, linear.in_features = linear.weight.shape
        if attention.q_proj.bias is not None:
            attention.q_proj.bias = torch.nn.Parameter(attention.q_proj.bias.data[:64].clone())
        if hasattr(attention, "sinks"):
            attention.sinks = torch.nn.Parameter(attention.sinks.data[:8].clone())
        shapes = {
            name: list(parameter.shape)
            for name, parameter in attention.named_parameters()
            if name.startswith(("q_proj", "o_proj.weight", "sinks"))
        }
        entries.append({"num_attention_heads": 8, "query_groups": GROUPS, "shapes": shapes})
    runtime.patch(model, {"layers": entries})
    return model


def spread(model):
    """The stock model in float64 whose second layer has three times the mean of its KV heads: what 3 → 1 means."""
    wide = double(model)
    attention = layers_of(wide)[1]
    for linear in (attention.k_proj, attention.v_proj):
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                heads = tensor.data.view(3, 8, -1)
                heads.copy_(heads.mean(0, keepdim=True).expand(3, -1, -1).clone())
    return wide


@pytest.mark.parametrize("name", NAMES)
def test_values_of_a_kv_budget(name):
    base = base_of(name)
    model = copy.deepcopy(base)
    report = surgery.apply("mqa", model, kv_heads=BUDGET)
    assert [a.k_proj.out_features // 8 for a in layers_of(model)] == BUDGET
    assert report.data["tier"] == "surgical"
    assert difference(logits_of(model, IDS), logits_of(spread(base), IDS)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_values_of_unequal_query_groups(name):
    base = base_of(name)
    model = cut(base)
    assert difference(logits_of(model, IDS), logits_of(without_last_query_head(base), IDS)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["budget", "groups"])
def test_cached_is_uncached_with_padding_and_a_head_split(name, change):
    model = copy.deepcopy(base_of(name))
    model = cut(model) if change == "groups" else model
    if change == "budget":
        surgery.apply("mqa", model, kv_heads=BUDGET)
    split = [{"streaming": heads, "sinks": 2, "window": 4} for heads in ([0, 2], [0], [1])]
    runtime.patch(model, {"layers": split})
    mask, holder = torch.ones_like(IDS), []
    mask[1, :6] = 0
    with torch.no_grad():
        whole = model(**given(model, IDS, mask), use_cache=False).logits
        pieces = chunked(model, IDS, mask, (9, 1, 7, 4), holder)
    assert (pieces - whole)[mask.bool()].abs().max() < 1e-4
    held = [
        sum(t.shape[1] for s in layer.stores for n, t in s.tensors.items() if n == "keys")
        for layer in holder[0].layers
    ]
    assert held == (BUDGET if change == "budget" else [3, 3, 3])


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_greedy_do_not_depend_on_the_cache(name):
    model = cut(base_of(name))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 3):
        both = [
            model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), num_beams=beams, use_cache=c, **settings)
            for c in (True, False)
        ]
        assert torch.equal(*both)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every change of every family: in memory and saved, streamed from a folder, loaded and saved again."""
    root, found = tmp_path_factory.mktemp("shapes"), {}
    for name in NAMES:
        base = base_of(name)
        base.save_pretrained(root / name)
        for change in ("budget", "groups"):
            model = copy.deepcopy(base)
            if change == "groups":
                model = cut(model)
            else:
                surgery.apply("mqa", model, kv_heads=BUDGET)
            model.save_pretrained(root / f"{name}-{change}")
            again = surgery.load(root / f"{name}-{change}")
            again.save_pretrained(root / f"{name}-{change}-again")
            found[root / f"{name}-{change}"] = found[root / f"{name}-{change}-again"] = model
        for engine in ("streaming", "loaded"):
            out = root / f"{name}-{engine}"
            surgery.apply("mqa", root / name, output=out, kv_heads=BUDGET, engine=engine, evaluate=False, check=False)
            found[out] = found[root / f"{name}-budget"]
    return found, load_without_package(list(found), root, trust=True)


def test_both_doors_and_later_generations_agree(saved):
    found, answers = saved
    for folder, model in found.items():
        assert "error" not in answers[folder], f"{folder.name}: {answers[folder]}"
        mine = surgery.load(folder)
        assert type(mine).__name__ == type(model).__name__
        for (name, tensor), other in zip(mine.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(tensor, other), f"{folder.name}: {name}"
        assert (answers[folder]["logits"] - logits_of(mine)).abs().max() == 0, folder.name


def test_the_streamed_folder_is_the_loaded_one(saved):
    import json

    folders = {folder.name: folder for folder in saved[0]}
    for name in NAMES:
        streamed, loaded = folders[f"{name}-streaming"], folders[f"{name}-loaded"]
        one, two = (json.loads((folder / "config.json").read_text()) for folder in (streamed, loaded))
        for field in ("model_type", "architectures", "auto_map", "surgery", "per_layer_config"):
            assert one[field] == two[field], field
        for file in exported_files([]):
            assert (streamed / file).read_bytes() == (loaded / file).read_bytes()


def test_config_json_says_the_heads_of_each_layer_as_transformers_does(saved):
    """What Transformers itself writes for a config with such layers, and what it reads from ours."""
    import json

    from transformers import LlamaConfig

    folder = next(folder for folder in saved[0] if folder.name == "llama-streaming")
    raw = json.loads((folder / "config.json").read_text())
    theirs = LlamaConfig(**SHAPED, per_layer_config={1: {"num_key_value_heads": 1}})
    assert raw["per_layer_config"] == theirs.to_diff_dict()["per_layer_config"] == {"1": {"num_key_value_heads": 1}}
    read = LlamaConfig.from_dict({key: value for key, value in raw.items() if key not in ("model_type", "surgery")})
    assert [layer.num_key_value_heads for layer in read.per_layer_config] == BUDGET
    mine = surgery.load(folder).config  # which every program may ask for one number, however it was made
    file = str(folder / "config.json")
    for config in (mine, copy.deepcopy(mine), type(mine).from_json_file(file), type(mine)(**mine.to_diff_dict())):
        assert (config.num_key_value_heads, config.is_heterogeneous) == (3, False)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{"num_key_value_heads": 1}] + [{}] * 10 + [{"num_attention_heads": 9, "num_key_value_heads": 9}],
         {"00": {"num_key_value_heads": 1}, "11": {"num_key_value_heads": 9}}),
        ([{"num_key_value_heads": 1}, {"num_attention_heads": 6, "num_key_value_heads": 3}], {}),
        ([{"num_key_value_heads": 3}] * 2, {}),
        ([{"num_key_value_heads": 1}, {"num_attention_heads": 8, "query_groups": [3, 3, 2]}], {}),
        ([{"num_key_value_heads": 1, "query_groups": [9]}, {}], {"0": {"num_key_value_heads": 1}}),
        ([{"num_key_value_heads": 1, "query_groups": None}, {}], {"0": {"num_key_value_heads": 1}}),
        ([{"num_key_value_heads": 1}, {"split": {"full": [0]}}], {}),
        ([{"num_key_value_heads": 1}, {"parameters": {"surgery_sink": [9]}}], {}),
    ],
)  # fmt: skip
def test_heads_of_layers_are_named_where_they_say_all(layers, expected):
    assert per_layer_config(layers, 9, 3) == expected
    assert per_layer_config(layers, 9, None) == {}, "a family that has no such number"


def test_a_config_with_a_faulty_block_can_be_printed(saved):
    mine = copy.deepcopy(next(model for folder, model in saved[0].items() if folder.name == "llama-loaded").config)
    mine.surgery = {"format": 1}
    assert "per_layer_config" not in str(mine)


def test_check_and_inspect_know_such_a_folder(saved, surgery):
    folder = next(folder for folder in saved[0] if folder.name == "llama-streaming")
    ran = surgery("check", folder, "--base", folder.with_name("llama"))
    assert ran.code == 0, ran.out + ran.err
    facts = surgery("inspect", folder, "--json").json
    assert [layer["kv_heads"] for layer in facts["layers"]] == BUDGET
    assert facts["kv_bytes_per_token"] == sum(BUDGET) * 2 * 8 * 4
    rows = surgery("inspect", folder).out.splitlines()
    assert [row.split()[:3] for row in rows[2:5]] == [["0", "9", "3"], ["1", "9", "1"], ["2", "9", "3"]]


def test_peft_trains_and_merges_on_unequal_layers():
    from peft import LoraConfig, get_peft_model

    model = cut(base_of("llama"))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "o_proj"]))
    loss = wrapped(input_ids=IDS, labels=IDS).loss
    loss.backward()
    moved = [p for n, p in wrapped.named_parameters() if "lora_A" in n and p.grad is not None]
    assert len(moved) == 9
    before = logits_of(wrapped, IDS)
    assert difference(logits_of(wrapped.merge_and_unload(), IDS), before) < 1e-4


def test_a_new_model_of_such_a_config_has_finite_weights(saved):
    folder = next(folder for folder in saved[0] if folder.name == "gpt_oss-groups")
    config = surgery.load(folder).config
    fresh = getattr(runtime, type(surgery.load(folder)).__name__)(config)
    for name, parameter in fresh.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 10, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 2}, "spreads 9 query heads over 2 KV heads"),
        ({"num_attention_heads": 8}, "spreads 8 query heads over 3 KV heads"),
        ({"query_groups": [4, 4, 2]}, "spreads 9 query heads"),
        ({"query_groups": [9, 0, 0]}, "spreads 9 query heads"),
        ({"num_attention_heads": 0}, "must be whole and from 1"),
        ({"shapes": {"q_proj.weight": [True, 72]}}, "no lists of whole numbers"),
        ({"shapes": {"w_proj.weight": [72, 72]}}, "w_proj.weight, which LlamaAttention does not have"),
    ],
)
def test_nonsense_in_the_block_is_refused(change, message):
    model = base_of("llama")
    with pytest.raises(ValueError, match=message):
        runtime.patch(model, {"layers": [change, {}, {}]})


def test_a_block_of_other_heads_than_the_weights_is_an_error_at_the_first_forward():
    model = base_of("llama")
    runtime.patch(model, {"layers": [{"num_attention_heads": 6, "num_key_value_heads": 3}, {}, {}]})
    with pytest.raises(ValueError, match="6 heads, this layer made 9"):
        logits_of(model, IDS)


def test_what_cannot_have_such_layers_is_refused():
    for name, word in (("phi3", "counts heads by its config"), ("gpt_neox", "KV"), ("bloom", "KV")):
        with pytest.raises(SurgeryError, match=word):
            surgery.plan("gqa", TINY[name](), kv_heads=[2, 1])
    with pytest.raises(SurgeryError, match="lists 2 layers, the model has 3"):
        surgery.plan("gqa", base_of("llama"), kv_heads=[3, 1])
    with pytest.raises(SurgeryError, match="cannot become 2"):
        surgery.plan("gqa", base_of("llama"), kv_heads=[3, 1, 2])
    model = base_of("llama")
    surgery.apply("mqa", model, kv_heads=BUDGET)
    with pytest.raises(SurgeryError, match="different heads already"):
        surgery.plan("gqa", model, kv_heads=1)


def test_equal_numbers_stay_native():
    assert surgery.plan("gqa", base_of("llama"), kv_heads=[1, 1, 1]).tier == "native"


def test_a_head_split_on_layers_of_different_shape_through_the_command(surgery, model):
    """gqa with a list, then duo_attention measured on it; a second surgery on the saved folder gives the same."""
    from surgery import load

    once = ["streaming_ratio=0.5", "sinks=1", "window=4", "calibration_length=200", "calibration_samples=1"]
    (model.parent / "both.yaml").write_text(
        "version: 1\nname: both\ndescription: x\noperations:\n"
        "  - {op: gqa, kv_heads: [3, 1]}\n"
        "  - {op: duo_attention, streaming_ratio: 0.5, sinks: 1, window: 4, calibration_length: 200, "
        "calibration_samples: 1}\n"
    )
    assert surgery("apply", "both.yaml", model, "-o", "one", "--no-eval").code == 0
    assert surgery("apply", "mqa", model, "kv_heads=[3, 1]", "-o", "shaped", "--no-eval", "--no-check").code == 0
    ran = surgery("apply", "duo-attention", "shaped", *once, "-o", "two", "--no-eval")
    assert ran.code == 0, ran.err
    one, two = load(model.parent / "one"), load(model.parent / "two")
    assert one.config.surgery == two.config.surgery
    assert sum(len(layer["streaming"]) for layer in one.config.surgery["layers"]) == 2
    assert (logits_of(one, IDS % 30) - logits_of(two, IDS % 30)).abs().max() == 0
    refused = surgery("apply", "gqa", "two", "kv_heads=1", "-o", "three")
    assert refused.code == 2
    assert "weight rewrites come before" in refused.err


def test_a_stock_class_of_another_kind_refuses_such_a_folder(saved):
    from transformers import AutoModelForSequenceClassification

    folder = next(folder for folder in saved[0] if folder.name == "llama-streaming")
    for trust in (False, True):
        with pytest.raises(ValueError, match=r"surgery|Surgery|Unrecognized"):
            AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust)
