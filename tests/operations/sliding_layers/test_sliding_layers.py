"""Layers with a window: stock models against a mask for each layer, their cache, their choice, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from closed_form import recipe
from dense import PADS, batch, chunked, given
from dense import difference as spread
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
from surgery.data.passkeys import calibration, plain_windows
from surgery.data.text import load_text
from surgery.engines import find
from surgery.errors import SurgeryError
from surgery.evaluation.check import _probe_length
from surgery.operations.sliding_layers.ablation import choose_layers
from surgery.operations.sliding_layers.operation import SlidingLayers, spans
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
def test_modules_say_of_windows_what_stock_modules_say(name):
    """Each attribute that a loaded stock model has, the model in memory has with the same value."""
    model = base(name)
    listed(model, 3)
    stock = type(model)(copy.deepcopy(model.config))
    assert type(model).__module__.startswith("transformers.")
    for (path, ours), (same, made) in zip(model.named_modules(), stock.named_modules(), strict=True):
        assert path == same
        if type(made).__name__.endswith(("Attention", "DecoderLayer", "Model")):
            assert type(ours) is type(made), path
        for attribute, value in vars(made).items():
            if isinstance(value, (int, str, bool, type(None))) and not attribute.startswith("_"):
                assert getattr(ours, attribute) == value or attribute == "training", (path, attribute)
    assert model._no_split_modules == stock._no_split_modules
    assert model.base_model._no_split_modules == stock.base_model._no_split_modules


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_padding_and_chunks_change_nothing(name):
    model = base(name)
    listed(model, 3)
    ids, mask = batch(model)
    whole = model(**given(model, ids, mask), use_cache=False).logits
    for row, pad in enumerate(PADS):
        alone = ids[row : row + 1, pad:]
        want = model(**given(model, alone, torch.ones_like(alone)), use_cache=False).logits
        assert spread(whole[row : row + 1, pad:], want, torch.ones_like(alone)) <= 1e-5
    assert spread(chunked(model, ids, mask, [20, 1, 24]), whole, mask) <= 1e-5


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
    """The KLs are those of stock models whose layers have the window; each round tries beside those chosen before."""
    length, layers, base_model = 512, 6, {}

    def made():
        if "model" not in base_model:
            base_model["model"] = maker("Llama", DEEP | {"num_hidden_layers": layers})()
        return copy.deepcopy(base_model["model"])

    rows = torch.arange(WINDOW, length, 2)
    options = {"sinks": 0, "window": WINDOW, "samples": 2, "length": length, "keys": 4, "seed": 0}
    recalls, _ = calibration(made(), Letters(), "builtin", **options)
    texts = {
        "answers": [(recall.ids, recall.rows) for recall in recalls],
        "plain text": [(ids, rows) for ids in plain_windows(
            load_text("builtin", "calibration"), Letters(), length, 2, 0)],
    }  # fmt: skip

    def lost(kind: str, *slide: int) -> float:
        other, total = made(), 0.0
        listed(other, *slide)
        for ids, asked in texts[kind]:
            before, after = (logits_of(each, ids[None])[0, asked].log_softmax(-1) for each in (made(), other))
            total += float((before.exp() * (before - after)).sum(-1).mean())
        return total / len(texts[kind])

    for weight in (0.0, 5.0):
        model = made()
        fields = {"calibration_length": length, "calibration_samples": 2, "rounds": 2, "answers": weight}
        report = convert(model, tokenizer=Letters(), sliding=0.5, **fields)
        noted = report.data["operations"][0]["record"]
        assert len(noted["measured"]["rounds"]) == 2
        before: list[int] = []
        for tried in noted["measured"]["rounds"]:
            left = set(range(layers)) - {*before}
            for kind, losses in tried["lost"].items():
                assert set(losses) == left
                for index, loss in losses.items():
                    assert loss == pytest.approx(lost(kind, *before, index), rel=1e-3), (kind, before, index)
            cost = {i: tried["lost"]["plain text"][i] + weight * tried["lost"]["answers"][i] for i in left}
            size = len(tried["chosen"]) - len(before)
            before = sorted([*before, *sorted(left, key=cost.get)[:size]])
            assert tried["chosen"] == before
        assert noted["sliding"] == before
        windows = [layer.window for layer in Anatomy.of(model).layers]
        assert windows == [WINDOW if index in before else None for index in range(layers)]


@pytest.mark.parametrize(("weight", "chosen"), [(0.0, [2, 3]), (1.0, [0, 3]), (100.0, [0, 1])])
def test_answers_count_by_their_weight(monkeypatch, weight, chosen):
    """Losses on which plain text and answers disagree."""
    table = {"answers": [0.0, 1.0, 6.0, 2.0], "plain text": [3.5, 5.0, 1.0, 1.2]}
    kinds = iter(["answers", "plain text"] * 2)

    def losses(model, hook, ids, rows, window, before, left):
        return list(zip(left, (table[kind][index] for kind in [next(kinds)] for index in left), strict=True))

    monkeypatch.setattr("surgery.operations.sliding_layers.ablation._losses", losses)
    search = WindowSearch(WINDOW, 2, 2, weight, "builtin", 512, 1, 0)
    assert choose_layers(base("llama"), Letters(), range(LAYERS), search)[0] == chosen


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


LATER = {
    "gqa mean": {"op": "gqa", "kv_heads": 2, "method": "mean"},
    "expand": {"op": "expand"},
    "gqa closed_form": {
        "op": "gqa", "kv_heads": 2, "method": "closed_form", "calibration_text": "builtin",
        "calibration_samples": 6, "calibration_length": 24,
    },
    "prune_heads": {"op": "prune_heads", "granularity": "kv_group", "per_layer": 1, "refit": False},
}  # fmt: skip


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("method", ["listed", "ablation"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_weights_are_rewritten_after_it(name, method, later, tmp_path):
    """The model in memory, its saved folder and its config agree, whatever is rewritten later."""
    model = base(name)
    fields = {"layers": [1, 2]} if method == "listed" else {"calibration_length": 512, "rounds": 1}
    convert(model, LATER[later], method=method, tokenizer=Letters(), **fields)
    config, heads = model.config, Anatomy.of(model).layers[0].kv_heads
    assert heads != 4
    assert config.num_key_value_heads == heads or hasattr(config, "surgery")
    for index, layer in enumerate(model.model.layers):
        slides = config.layer_types[index] == "sliding_attention"
        assert layer.self_attn.sliding_window == (WINDOW if slides else None)
    model.save_pretrained(tmp_path / "out")
    assert difference(logits_of(surgery.load(tmp_path / "out")), logits_of(model)) <= 1e-5
    assert Anatomy.of(tmp_path / "out").layers[0].kv_heads == heads


def test_a_forward_that_hooks_wrap_slides_and_one_that_was_replaced_is_refused():
    from accelerate import dispatch_model

    hooked = dispatch_model(base("llama"), {"": "cpu"}, force_hooks=True)
    listed(hooked, 1)
    assert difference(logits_of(hooked), masked_logits(base("llama"), [None, WINDOW, None, None])) <= 1e-5
    patched = base("llama")
    forward = patched.model.forward
    patched.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(SurgeryError, match="the forward of a LlamaModel was replaced"):
        listed(patched, 1)
    assert type(patched).__name__ == "LlamaForCausalLM"


def test_a_window_as_long_as_the_context_is_none():
    model = build("Ministral", **(DEEP | {"head_dim": 16, "sliding_window": 1024}))
    assert {layer.window for layer in Anatomy.of(model).layers} == {1024}
    listed(model, 1)
    assert [layer.window for layer in Anatomy.of(model).layers] == [None, WINDOW, None, None]


def test_a_folder_of_another_head_is_refused_and_code_is_not_carried(tmp_path):
    step = {"op": "sliding_layers", "method": "listed", "layers": [1], "window": WINDOW}
    config = base("llama").config
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "head")
    with pytest.raises(SurgeryError, match="is a causal model, and this is a LlamaForSequenceClassification"):
        surgery.apply(recipe(step), str(tmp_path / "head"), output=tmp_path / "out")
    base("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}))
    surgery.apply(recipe(step), str(tmp_path / "base"), output=tmp_path / "out", check=False)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_an_error_at_the_end_leaves_the_model_as_it_was(monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("surgery.architecture.sliding.empty_model", fails)
    for name in ("llama", "qwen2"):
        model = base(name)
        with pytest.raises((MemoryError, SurgeryError)):
            listed(model, 1)
        assert model.config.to_dict() == base(name).config.to_dict()
        assert torch.equal(logits_of(model), logits_of(base(name)))


def test_what_slid_before_is_counted_and_named():
    model = base("gemma2")
    report = listed(model, 3)
    change = surgery.plan(
        recipe({"op": "sliding_layers", "method": "listed", "layers": [3], "window": 6}), base("gemma2")
    )
    assert change.steps[0].change.lines == ("a window of 6 tokens in 1 of 4 layers (3)",)
    assert "2 layers had the window before: layers 0, 2" in change.steps[0].change.notes
    words = SlidingLayers(method="listed", layers=[3], window=6).in_words(change.before, change.after, {})
    assert words.title == "a window of 6 tokens in 3 of 4 layers"
    assert "3 of its 4 layers see only the last 6 tokens of a sequence (2 of them did so before)" in words.done
    assert report.data["tier"] == "native"
    assert spans([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7, 8"


def test_applied_copies_no_weights(monkeypatch):
    from surgery.config import recipe as recipes
    from surgery.conversion.applied_block import _rewritten

    step = {"op": "sliding_layers", "method": "listed", "layers": [1], "window": WINDOW}
    model = base("llama")
    want = logits_of(model)
    assert _rewritten(recipes.load(recipe(step)), model) == []
    with surgery.applied(recipe(step), model):
        assert difference(logits_of(model), want) > 1e-3
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits_of(model), want)


@pytest.mark.parametrize(("name", "engine", "says"), [
    ("llama", "llama.cpp", "does not know the family ministral"),
    ("qwen2", "llama.cpp", "windows in some layers of qwen2: llama.cpp does not read which layers slide"),
    ("gemma2", "llama.cpp", "windows in some layers of gemma2"),
    ("qwen3", "vllm", "windows in some layers of qwen3: vLLM refuses them"),
])  # fmt: skip
def test_engines_that_cannot_run_it_say_so(name, engine, says):
    model = base(name)
    listed(model, 3)
    assert says in " ".join(obstacle.what for obstacle in find(engine).obstacles(Anatomy.of(model)))
    if name == "gemma2":  # whose own windows llama.cpp knows
        assert not find(engine).obstacles(Anatomy.of(base(name)))


def test_it_does_not_follow_a_surgery_beyond_stock_models():
    model = base("llama")
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 4}
    step = {"op": "sliding_layers", "method": "listed", "layers": [1], "window": WINDOW}
    with pytest.raises(SurgeryError, match="weight rewrites come before duo_attention"):
        surgery.apply(recipe(split, step), model)
    surgery.apply(recipe(split), model)
    with pytest.raises(SurgeryError, match=r"checkpoint sets the visibility .*, and weight rewrites come before"):
        surgery.apply(recipe(step), model)
    merge = {"op": "gqa", "kv_heads": [4, 2, 4, 4], "method": "mean"}
    with pytest.raises(SurgeryError, match="beyond a stock model: put sliding_layers before that surgery"):
        surgery.apply(recipe(merge, step), base("llama"))


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("gemma2", {"method": "listed", "layers": [3], "window": 8}, "that of this gemma2 is 6: window=6"),
        ("llama", {"method": "listed", "layers": [3], "window": 1024}, "a window of 1,024 leaves nothing out"),
        ("llama", {"method": "listed", "layers": [3], "window": 0}, "window should be at least 2"),
        ("llama", {"method": "listed", "layers": [0, 1, 2, 3]}, "no layer would see all tokens"),
        ("gemma2", {"method": "listed", "layers": [1, 3]}, "no layer would see all tokens"),
        ("llama", {"method": "every", "full_every": 5}, "no layer would see all tokens"),
        ("llama", {"method": "every", "full_every": 1}, "full_every should be at least 2"),
        ("llama", {"method": "listed", "layers": [4]}, "layers: [4]: there are layers 0 to 3"),
        ("gemma2", {"method": "listed", "layers": [2, 3]}, "layers: [2] have the window already"),
        ("llama", {"sliding": 0.05}, "sliding: 0.05 of 4 full layers is none"),
        ("llama", {"sliding": 1.0}, "sliding should be less than 1"),
        ("llama", {"calibration_length": 261}, "calibration_length: 255 tokens beyond the window are too few"),
        ("llama", {"window": 1000}, "24 tokens beyond the window are too few"),
        ("llama", {"window": 1000}, "a window of up to 768, as this model takes 1,024"),
        ("llama", {"calibration_text": "self"}, "no such text file: 'self' (available: builtin; a UTF-8 text file)"),
        ("llama", {"answers": float("inf")}, "answers"),
        ("llama", {"answers": -1.0}, "answers should be at least 0"),
        ("llama", {"method": "listed", "layers": [1, 1]}, "layers names a layer twice"),
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
        (lambda: TINY["granite"](), "no stock model computes what granite does and lists which layers slide; duo_att"),
        (lambda: TINY["falcon_new"](), "no stock model computes what falcon does and lists which layers slide"),
        (lambda: TINY["gemma3_image_text"](), "gemma3 is more than a text model"),
        (lambda: build("Olmo3", **DEEP), "layers of olmo3 that slide have another RoPE"),
        (lambda: build("Cohere2", **DEEP), "layers of cohere2 that slide have RoPE"),
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
    assert plan.steps[0].change.lines == ("a window of 6 tokens in 2 of 4 layers",)
    assert "the result is a stock ministral, which computes what llama does" in plan.steps[0].change.notes
    assert plan.steps[0].change.measurements[0].passes == (4 + 3) + 2 * 4  # two layers in two rounds
    assert plan.steps[0].change.measurements[0].flops > 1e6
    assert plan.after.kv_bytes_per_token * 2 == plan.before.kv_bytes_per_token
    assert SlidingLayers(sliding=0.5).milder() == "sliding=0.25"
    assert SlidingLayers(method="every").milder() == ""
    assert SlidingLayers(method="every", full_every=3).wanted(Anatomy.of(base("llama"))) == [0, 1, 3]


def test_the_check_reads_beyond_the_window():
    model = build("Llama", **(DEEP | {"max_position_embeddings": 2048}))
    assert _probe_length(Anatomy.of(model), torch.device("cpu")) == 24
    convert(model, method="listed", layers=[1], window=512)
    assert _probe_length(Anatomy.of(model), torch.device("cpu")) > 512
