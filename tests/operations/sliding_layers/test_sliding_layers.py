"""Layers with a window: stock models against a mask for each layer, their cache, their choice, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from closed_form import recipe
from families import (
    GROUPED,
    MOE,
    TINY,
    TOKENS,
    build,
    difference,
    double,
    load_without_package,
    logits_of,
    maker,
)
from families import one_thread as one_thread  # a fixture
from tokenizers_of_bytes import Letters, byte_tokenizer

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.architecture.sliding import HOSTS, TOLD
from surgery.data.passkeys import plain_windows
from surgery.data.text import load_text
from surgery.errors import SurgeryError
from surgery.operations.sliding_layers.operation import SlidingLayers
from surgery.operations.sliding_layers.window_search import WindowSearch
from surgery.runtime.modeling_surgery import CACHE

WINDOW, LAYERS = 6, 4
DEEP = GROUPED | {"num_hidden_layers": LAYERS, "max_position_embeddings": 1024}
KINDS = ["sliding_attention", "full_attention"] * 2
OWN = {"layer_types": KINDS, "sliding_window": WINDOW}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ONE_ROPE = {kind: {"rope_type": "default", "rope_theta": 500.0} for kind in KINDS[:2]}
BASES = {  # name -> a model of four layers, layers 1 to 3 of which may get a window
    "llama": maker("Llama", DEEP, tie_word_embeddings=True),
    "llama3": maker("Llama", DEEP, rope_parameters=LLAMA3, head_dim=16),
    "mistral": maker("Mistral", DEEP, head_dim=16, sliding_window=None),
    "ministral": maker("Ministral", DEEP, head_dim=16, **OWN),
    "qwen2": maker("Qwen2", DEEP),
    "qwen3": maker("Qwen3", DEEP, head_dim=16),
    "smollm3": maker("SmolLM3", DEEP, no_rope_layers=[1, 0, 1, 0]),
    "gemma2": maker("Gemma2", DEEP, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, **OWN),
    "gemma3": maker("Gemma3", DEEP, head_dim=16, query_pre_attn_scalar=16, rope_parameters=ONE_ROPE, **OWN),
    "gpt_oss": maker("GptOss", DEEP, head_dim=16, **OWN, **MOE),
}


def base(name: str):
    return BASES[name]()


def convert(model, *later, tokenizer=None, **fields):
    step = {"op": "sliding_layers", "window": WINDOW} | fields
    return surgery.apply(recipe(step, *later), model, tokenizer=tokenizer)


def listed(model, *layers):
    return convert(model, method="listed", layers=list(layers))


def masked_logits(model, windows: list[int | None]) -> torch.Tensor:
    """Logits on TOKENS in float64 by Transformers' eager attention, with a mask for each layer written out here."""
    model = double(model)
    model.set_attn_implementation("eager")
    length = TOKENS.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for layer, window in zip(model.base_model.layers, windows, strict=True):
        seen = (distance >= 0) & (distance < (window or length))
        mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~seen, -1e300)

        def before(_, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask}

        layer.register_forward_pre_hook(before, with_kwargs=True)
    return logits_of(model)


def test_every_family_that_can_hold_windows_is_tried():
    tried = {base(name).config.model_type for name in BASES}
    assert tried == {*HOSTS}


@pytest.mark.parametrize("name", BASES)
def test_the_values_are_those_of_a_mask_for_each_layer(name):
    """In memory, from the saved folder and after the folder's own conversion."""
    model = base(name)
    windows = [layer.window for layer in Anatomy.of(model).layers]
    windows[3] = WINDOW
    want = masked_logits(model, windows)
    assert difference(masked_logits(model, [None] * LAYERS), want) > 1e-3, "the window acts"
    report = listed(model, 3)
    assert report.data["tier"] == "native"
    assert difference(logits_of(model), want) <= 1e-5
    assert [layer.window for layer in Anatomy.of(model).layers] == windows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folders: the base, its conversion by the folder, its conversion in memory."""
    root, made = tmp_path_factory.mktemp("sliding"), {}
    for name in BASES:
        model = base(name)
        paths = [root / f"{name}-{kind}" for kind in ("base", "converted", "saved")]
        model.save_pretrained(paths[0])
        step = {"op": "sliding_layers", "method": "listed", "layers": [1, 3], "window": WINDOW}
        if name in ("ministral", "gemma2", "gemma3", "gpt_oss"):
            step["layers"] = [3]
        surgery.apply(recipe(step), str(paths[0]), output=paths[1], check=False)
        surgery.apply(recipe(step), model)
        model.save_pretrained(paths[2])
        made[name] = paths
    return made


def test_both_ways_of_conversion_give_one_stock_checkpoint(folders, tmp_path):
    """In a process without the package: the same logits, those of the mask; its weights are the base's bytes."""
    every = [folder for paths in folders.values() for folder in paths[1:]]
    answers = load_without_package(every, tmp_path)
    for name, (origin, converted, saved) in folders.items():
        for folder in (converted, saved):
            answer = answers[folder]
            assert "error" not in answer, f"{folder.name}: {answer}"
            assert answer["missing"] == answer["unexpected"] == answer["mismatched"] == []
        windows = [layer.window for layer in Anatomy.of(converted).layers]
        assert windows == [layer.window for layer in Anatomy.of(saved).layers]
        assert windows[3] == WINDOW
        want = masked_logits(base(name), windows)
        assert difference(answers[converted]["logits"], want) <= 1e-5, name
        assert torch.equal(answers[converted]["logits"], answers[saved]["logits"]), name
        assert (converted / "model.safetensors").read_bytes() == (origin / "model.safetensors").read_bytes(), name
        assert not [path for path in converted.iterdir() if path.suffix == ".py"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_its_cache_stops_growing_and_generates_the_same(name, folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name][1])
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(3))
    cache = model(ids, use_cache=True)[CACHE]
    for layer, kept in zip(Anatomy.of(model).layers, cache.layers, strict=True):
        # The stock cache leaves out the query's own token, which it adds for each call.
        assert kept.keys.shape[-2] == (WINDOW - 1 if layer.window else 40)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    anatomy, size = Anatomy.of(model), 4 * 2 * 4
    full = sum(layer.window is None for layer in anatomy.layers)
    assert anatomy.kv_bytes_per_token == size * anatomy.layers[0].head_dim * full
    assert anatomy.kv_bytes_fixed == size * anatomy.layers[0].head_dim * (LAYERS - full) * WINDOW


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_window_that_holds_the_text_changes_nothing(name):
    """To the bit, in float64 and in float32."""
    model, length = base(name), TOKENS.shape[1]
    want, wide = logits_of(model), copy.deepcopy(model).double()
    convert(model, method="every", full_every=2, window=length)
    assert torch.equal(logits_of(model), want)
    convert(wide, method="every", full_every=2, window=length)
    assert torch.equal(logits_of(wide), logits_of(base(name).double()))


def test_layers_are_chosen_in_rounds_by_what_their_window_costs():
    """The KLs are those of models whose layers have the window; each round tries beside those chosen before."""
    model, length = base("llama"), 512
    rows = torch.arange(WINDOW, length, 2)
    plain = plain_windows(load_text("builtin", "calibration"), Letters(), length, 2, 0)

    def lost(*layers: int) -> float:
        """KL from the base on plain text, of a stock model."""
        other, total = base("llama"), 0.0
        listed(other, *layers)
        for ids in plain:
            before, after = (logits_of(each, ids[None])[0, rows].log_softmax(-1) for each in (base("llama"), other))
            total += float((before.exp() * (before - after)).sum(-1).mean())
        return total / len(plain)

    fields = {"calibration_length": length, "calibration_samples": 2, "rounds": 2, "answers": 5.0}
    report = convert(model, tokenizer=Letters(), sliding=0.5, **fields)
    noted = report.data["operations"][0]["record"]
    first, second = noted["measured"]["rounds"]
    for index, loss in first["lost"]["plain text"].items():
        assert loss == pytest.approx(lost(index), rel=1e-3)
    (begun,) = first["chosen"]
    assert set(second["lost"]["plain text"]) == set(range(LAYERS)) - {begun}
    for index, loss in second["lost"]["plain text"].items():
        assert loss == pytest.approx(lost(begun, index), rel=1e-3)
    cost = {i: first["lost"]["plain text"][i] + 5 * first["lost"]["answers"][i] for i in range(LAYERS)}
    assert begun == min(cost, key=cost.get)
    assert noted["sliding"] == second["chosen"]
    windows = [layer.window for layer in Anatomy.of(model).layers]
    assert windows == [WINDOW if index in noted["sliding"] else None for index in range(LAYERS)]


def test_rounds_choose_as_many_layers_as_asked():
    for count in range(1, 12):
        for rounds in range(1, 6):
            search = WindowSearch(WINDOW, count, rounds, 0.1, "builtin", 64, 1, 0)
            sizes = search.chosen_in_rounds()
            assert sum(sizes) == count
            assert len(sizes) == min(rounds, count)
            assert max(sizes) - min(sizes) <= 1
    assert WindowSearch(WINDOW, 6, 3, 0.1, "builtin", 64, 1, 0).trials(10) == 10 + 8 + 6


def test_a_folder_is_converted_by_measurement(tmp_path):
    """The command's way: the measurement runs on the loaded model, the result is stock, and passes its check."""
    model = build("Llama", seed=3, **(DEEP | {"vocab_size": 300}))
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    step = {"op": "sliding_layers", "window": 32, "calibration_samples": 1}
    report = surgery.apply(recipe(step), str(tmp_path / "base"), output=tmp_path / "out")
    assert report.data["tier"] == "native"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "ministral"
    assert config["layer_types"].count("sliding_attention") == 2
    assert config["sliding_window"] == 32
    assert surgery.check(tmp_path / "out").passed


def test_an_older_config_keeps_its_numbers(tmp_path):
    """A Llama config of an earlier Transformers: RoPE under two keys, no head size, no numbers of KV heads."""
    model = build("Llama", **(DEEP | {"num_key_value_heads": 8, "rope_parameters": LLAMA3}))
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "hidden_act", "initializer_range"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    step = {"op": "sliding_layers", "method": "listed", "layers": [1], "window": WINDOW}
    surgery.apply(recipe(step), str(tmp_path / "base"), output=tmp_path / "out", check=False)
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = masked_logits(transformers.AutoModelForCausalLM.from_pretrained(path.parent), [None, WINDOW, None, None])
    assert type(out).__name__ == "MinistralForCausalLM"
    assert difference(logits_of(out), want) <= 1e-5


def test_what_the_hosts_config_is_not_told_has_one_default():
    ours = transformers.MinistralConfig().to_dict()
    skipped = {*TOLD, "model_type", "architectures", "head_dim", "layer_types", "sliding_window"}
    for other in (transformers.LlamaConfig(), transformers.MistralConfig()):
        theirs = other.to_dict()
        for name in (ours.keys() & theirs.keys()) - skipped:
            assert ours[name] == theirs[name], name


def test_after_gqa_and_before_a_head_split(tmp_path):
    model = base("llama")
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 4}
    step = {"op": "sliding_layers", "method": "listed", "layers": [1], "window": WINDOW}
    merge = {"op": "gqa", "kv_heads": 2, "method": "mean"}
    merged = copy.deepcopy(model)
    surgery.apply(recipe(merge), merged)
    want = masked_logits(merged, [None, WINDOW, None, None])
    both = copy.deepcopy(model)
    surgery.apply(recipe(merge, step), both)
    assert difference(logits_of(both), want) <= 1e-5
    surgery.apply(recipe(merge, step, split), model)
    model.save_pretrained(tmp_path / "out")
    answer = load_without_package([tmp_path / "out"], tmp_path, trust=True)[tmp_path / "out"]
    assert torch.equal(answer["logits"], logits_of(surgery.load(tmp_path / "out")).float())
    assert model.config.surgery["base_model_type"] == "ministral"
    assert [layer.window for layer in Anatomy.of(tmp_path / "out").layers] == [None, WINDOW, None, None]


def test_it_does_not_follow_a_surgery_beyond_stock_models():
    model = base("llama")
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 4}
    step = {"op": "sliding_layers", "method": "listed", "layers": [1], "window": WINDOW}
    with pytest.raises(SurgeryError, match="weight rewrites come before duo_attention"):
        surgery.apply(recipe(split, step), model)
    surgery.apply(recipe(split), model)
    with pytest.raises(SurgeryError, match="this checkpoint sets the visibility, and weight rewrites come before"):
        surgery.apply(recipe(step), model)
    merge = {"op": "gqa", "kv_heads": [4, 2, 4, 4], "method": "mean"}
    with pytest.raises(SurgeryError, match="beyond a stock model: put sliding_layers before that surgery"):
        surgery.apply(recipe(merge, step), base("llama"))


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("gemma2", {"method": "listed", "layers": [3], "window": 8}, "layers of this gemma2 have 6 tokens: window=6"),
        ("llama", {"method": "listed", "layers": [3], "window": 1024}, "a window of 1,024 leaves nothing out"),
        ("llama", {"method": "listed", "layers": [3], "window": 0}, "window should be at least 2"),
        ("llama", {"method": "listed", "layers": [0, 1, 2, 3]}, "no layer would see all tokens"),
        ("gemma2", {"method": "listed", "layers": [1, 3]}, "no layer would see all tokens"),
        ("llama", {"method": "every", "full_every": 5}, "no layer would see all tokens"),
        ("llama", {"method": "every", "full_every": 1}, "full_every should be at least 2"),
        ("llama", {"method": "listed", "layers": [4]}, "layers: [4]: there are layers 0 to 3"),
        ("gemma2", {"method": "listed", "layers": [2, 3]}, "layers: [2] slide already"),
        ("llama", {"sliding": 0.05}, "sliding: 0.05 of 4 full layers is none"),
        ("llama", {"sliding": 1.0}, "sliding should be less than 1"),
        ("llama", {"calibration_length": 6}, "texts of 6 tokens show nothing of a window of 6"),
        ("llama", {"calibration_text": "self"}, "calibration_text: self is not for this operation"),
        ("llama", {"method": "listed", "layers": [1], "sliding": 0.25}, "sliding is for method: ablation"),
        ("llama", {"method": "listed"}, "layers"),
    ],
)
def test_settings_that_do_not_fit(name, fields, says):
    model = base(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError) as caught:
        convert(model, tokenizer=Letters(), **fields)
    assert says in str(caught.value)
    assert model.config.to_dict() == base(name).config.to_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: TINY["llama_bias"](), "stock ministral, which would hold it, has no biases"),
        (lambda: TINY["gemma3"](), "layers of gemma3_text that slide have another RoPE"),
        (lambda: TINY["mistral"](), "all layers of this mistral slide already"),
        (lambda: TINY["granite"](), "stock granite has one kind of attention for all layers"),
        (lambda: TINY["gemma3_image_text"](), "stock gemma3 has one kind of attention"),
    ],
)
def test_bases_that_do_not_fit(model, says):
    with pytest.raises(SurgeryError) as caught:
        listed(model(), 1)
    assert says in str(caught.value), str(caught.value)


def test_other_classes_of_a_family_without_windows_are_refused():
    model = transformers.LlamaForSequenceClassification(base("llama").config)
    with pytest.raises(SurgeryError, match="is not a causal model of Transformers"):
        listed(model, 1)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.model_type == "llama"


def test_what_hangs_on_the_modules_stays():
    model, calls = base("llama"), []
    model.gradient_checkpointing_enable()
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    inner, attention = model.model, model.model.layers[1].self_attn
    listed(model, 1)
    assert model.model is inner
    assert model.model.layers[1].self_attn is attention
    assert model.is_gradient_checkpointing
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits_of(model)
    assert calls
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0


def test_saved_with_its_report_and_measured_beside_its_base(tmp_path):
    model = base("llama")
    model.save_pretrained(tmp_path / "base")
    report = listed(model, 1)
    surgery.save(model, tmp_path / "out", report)
    assert surgery.check(tmp_path / "out").passed
    assert Path(tmp_path / "out" / "README.md").is_file()
    assert "a window of 6 tokens in 1 of 4 layers" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SurgeryError, match="the report is of"):
        surgery.save(TINY["qwen3"](), tmp_path / "other", report)


def test_the_plan_says_layers_family_and_a_milder_setting():
    plan = surgery.plan(recipe({"op": "sliding_layers", "window": WINDOW}), base("llama"))
    assert plan.steps[0].change.lines == ("2 of 4 layers see the last 6 tokens alone",)
    assert "the result is a stock ministral, which computes what llama does" in plan.steps[0].change.notes
    assert plan.steps[0].change.measurements[0].passes == 4 + 3  # two layers in two rounds
    assert plan.after.kv_bytes_per_token * 2 == plan.before.kv_bytes_per_token
    assert SlidingLayers(sliding=0.5).milder() == "sliding=0.25"
    assert SlidingLayers(method="every").milder() == ""
    assert SlidingLayers(method="every", full_every=3).wanted(Anatomy.of(base("llama"))) == [0, 1, 3]
