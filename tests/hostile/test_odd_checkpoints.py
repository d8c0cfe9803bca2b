"""Model folders and configs that are odd and possible: they are converted rightly, or refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_tensors
from families import TINY
from safetensors.torch import load_file, save_file
from tokenizers_of_bytes import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import surgery as library
from surgery import SurgeryError
from surgery.io import manifest

MERGE = {"op": "gqa", "kv_heads": 2, "method": "mean"}
SAME = {"op": "gqa", "kv_heads": 4, "method": "mean"}
SPLIT = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 6}
WIDE = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 0, "window": 64}
QUICK = {"check": False, "evaluate": False}
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(3))
WEIGHTS = "model.safetensors"


def recipe(*steps, **more) -> dict:
    return {"version": 1, "name": "x", "operations": list(steps), "evaluate": None} | more


def convert(folder, out, *steps, **more):
    return library.apply(recipe(*steps), str(folder), output=out, **(QUICK | more))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def of_folder(folder) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def saved(folder: Path, family: str = "llama", **fields) -> Path:
    TINY[family](**fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def shards(folder: Path, places: dict[str, list[str]], **index) -> None:
    """Put the tensors of the single file into shards: file -> tensors; the index says the same unless told."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for file, names in places.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, names in places.items() for name in names}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | index))


def halves(folder: Path, first: str, second: str) -> dict[str, list[str]]:
    names = sorted(load_file(folder / WEIGHTS))
    return {first: names[::2], second: names[1::2]}


# --- embeddings, tensors and shards ---------------------------------------------------------------


def test_tied_by_the_config_and_stored_twice(tmp_path):
    """Both tables are in the file, equal: the result keeps both, and says what its base says."""
    folder = saved(tmp_path / "base")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert(folder, tmp_path / "out", SAME)
    convert(folder, tmp_path / "split", WIDE)
    expected = of_folder(folder)
    assert torch.equal(of_folder(tmp_path / "out"), expected)
    assert torch.allclose(logits(library.load(tmp_path / "split")), expected, atol=1e-5)


def test_tied_by_the_config_and_stored_apart(tmp_path):
    """The two tables differ: the engines agree with what Transformers makes of the base."""
    folder = saved(tmp_path / "base")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}))
    convert(folder, tmp_path / "out", SAME)
    convert(folder, tmp_path / "split", WIDE)
    expected = of_folder(folder)
    assert torch.equal(of_folder(tmp_path / "out"), expected)
    assert torch.allclose(logits(library.load(tmp_path / "split")), expected, atol=1e-5)


def test_untied_and_without_a_head(surgery, base):
    """The head is missing: Transformers would fill it with random numbers, and no check passes that."""
    edit_json(base / "config.json", tie_word_embeddings=False)
    ran = surgery("apply", "mqa", base, "-o", "out", "--no-eval")
    assert ran.code in (2, 4), ran.out
    assert "lm_head.weight" in ran.err
    assert "Traceback" not in ran.err
    split = surgery("apply", "streaming", base, "-o", "split", "--no-eval", "--no-check")
    assert split.code == 2
    assert "lm_head.weight" in split.err


NAMES = {
    "spaces and other letters": ("weights \u03b1 \u00e9.safetensors", "b \u2192 c.safetensors"),
    "quotes and percent": ("a'\"%s.safetensors", "{0}$HOME.safetensors"),
    "a folder below": ("sub/one.safetensors", "sub/two.safetensors"),
    "capitals apart": ("A.safetensors", "a.safetensors"),
    "a leading dash": ("-a.safetensors", "--b.safetensors"),
    "a line's end": ("a\nb.safetensors", "c\td.safetensors"),
    "hidden": (".a.safetensors", ".b.safetensors"),
    "names of ours": ("a.safetensors.unfinished", "surgery-progress.json.safetensors"),
    "no ending": ("one", "two"),
}


@pytest.mark.parametrize("name", NAMES)
def test_shards_of_odd_names(tmp_path, name):
    """The single file and the shards give the same tensors, and the index names files that are there."""
    folder = saved(tmp_path / "base")
    convert(folder, tmp_path / "whole", MERGE)
    shards(folder, halves(folder, *NAMES[name]))
    try:
        report = convert(folder, tmp_path / "out", MERGE)
    except SurgeryError:
        assert not list(tmp_path.glob("out*"))
        return
    index = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert set(index.values()) == set(NAMES[name]) == set(report.data["files"])
    got = {k: v for file in set(index.values()) for k, v in load_file(tmp_path / "out" / file).items()}
    expected = load_file(tmp_path / "whole" / WEIGHTS)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert manifest.differences(tmp_path / "out", report.data, report.intact) == []


def test_an_index_that_forgets_a_tensor(tmp_path):
    """A shard holds a tensor that the index does not name: Transformers loads it, and so it is converted."""
    folder = saved(tmp_path / "base")
    places = halves(folder, "a.safetensors", "b.safetensors")
    named = {name: file for file, names in places.items() for name in names}
    del named["model.layers.1.self_attn.k_proj.weight"]
    shards(folder, places, weight_map=named)
    convert(folder, tmp_path / "out", SAME)
    assert torch.equal(of_folder(tmp_path / "out"), of_folder(folder))


def test_an_index_whose_sizes_are_wrong(tmp_path):
    folder = saved(tmp_path / "base")
    shards(
        folder, halves(folder, "a.safetensors", "b.safetensors"), metadata={"total_size": -5, "total_parameters": 7}
    )
    convert(folder, tmp_path / "out", MERGE)
    metadata = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())["metadata"]
    tensors = [tensor for file in ("a", "b") for tensor in load_file(tmp_path / f"out/{file}.safetensors").values()]
    assert metadata["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert metadata["total_parameters"] == sum(tensor.numel() for tensor in tensors)


EXTRA = {
    "nothing in it": torch.empty(0),
    "no rows": torch.empty(0, 64),
    "one number": torch.tensor(3.5),
    "whole numbers": torch.arange(5),
    "yes and no": torch.tensor([True, False]),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "fp8": torch.zeros(3).to(torch.float8_e4m3fn),
    "half": torch.tensor([65504.0, -0.0, 6e-8], dtype=torch.float16),
    "NaN": torch.tensor([float("nan")]),
}


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_of_other_kinds_are_carried(tmp_path, name):
    """What is no part of attention is the same bytes afterwards."""
    folder, tensor = saved(tmp_path / "base"), EXTRA[name]
    edit_tensors(folder, lambda t: t.update({"extra": tensor}))
    convert(folder, tmp_path / "out", MERGE)
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert after["extra"].dtype == tensor.dtype
    assert after["extra"].shape == tensor.shape
    assert after["extra"].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_names_without_the_models_prefix(tmp_path):
    """GPT-2 as its authors stored it: no prefix, and masks that nobody reads."""
    folder = saved(tmp_path / "base", "gpt2", vocab_size=300)
    expected = of_folder(folder)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, rename)
    assert torch.equal(of_folder(folder), expected)
    convert(folder, tmp_path / "out", WIDE)
    assert torch.allclose(logits(library.load(tmp_path / "out")), expected, atol=1e-5)


def test_more_layers_than_the_config_has(tmp_path):
    """A layer of a further head (MTP) lies behind the last one: it is carried, and its weights stay as they are."""
    folder = saved(tmp_path / "base")
    names = [name for name in load_file(folder / WEIGHTS) if name.startswith("model.layers.1.")]

    def more(tensors):
        for name in names:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()

    edit_tensors(folder, more)
    before = load_file(folder / WEIGHTS)
    convert(folder, tmp_path / "out", MERGE)
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(after[name], before[name]) for name in before if ".layers.2." in name)
    assert after["model.layers.1.self_attn.k_proj.weight"].shape[0] == 16


@pytest.mark.parametrize("call", ["load", "evaluate"])
def test_an_index_that_names_a_pickle(base, call):
    """A pickle is read with --allow-pickle alone, whatever the index that names it is called."""
    torch.save(load_file(base / WEIGHTS), base / "weights.bin")
    names = list(load_file(base / WEIGHTS))
    (base / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (base / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(SurgeryError):
        library.load(base) if call == "load" else library.evaluate(str(base), windows=1, length=32)


def test_a_folder_without_a_tokenizer(surgery, base):
    """All heads stream, nothing is measured and nothing scored: the model in memory needs none either."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    arguments = ("streaming", base, "-o", "out", "sinks=2", "window=4", "--no-eval", "--no-check")
    assert surgery("apply", *arguments).code == 0


def test_a_folder_without_a_tokenizer_that_is_asked_for(refused, base):
    """What measures text needs one: the sentence says so of the folder, and nothing is left."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    says = [str(base), "needs the tokenizer", "no tokenizer files", "copy the base's"]
    refused("apply", "mqa", base, "-o", "out", "method=closed_form", "--no-eval", "--no-check", says=says)


# --- configs --------------------------------------------------------------------------------------

SHAPES = {
    "head size apart from the hidden size": {"head_dim": 24},
    "heads wider than all": {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "one layer": {"num_hidden_layers": 1},
    "no number of KV heads": {"num_key_value_heads": None, "num_attention_heads": 4},
    "groups of three": {"num_attention_heads": 12, "head_dim": 8, "hidden_size": 60},
    "groups of five": {"num_attention_heads": 20, "head_dim": 4, "hidden_size": 60},
}


@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes(tmp_path, name):
    """Equal KV heads merge to themselves: the result says what its base says, however heads and sizes relate."""
    fields = SHAPES[name]
    model = TINY["llama"](**fields)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            one = projection.weight.data[: len(projection.weight) // kv_heads]
            projection.weight.data.copy_(one.repeat(kv_heads, 1))
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for target in [number for number in range(1, kv_heads + 1) if heads % number == 0]:
        out = tmp_path / f"out{target}"
        convert(tmp_path / "base", out, MERGE | {"kv_heads": target})
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert merged.config.num_key_value_heads == target
        assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    convert(tmp_path / "base", tmp_path / "split", WIDE)
    assert torch.allclose(logits(library.load(tmp_path / "split")), logits(model), atol=1e-5)


def test_one_head_of_everything(tmp_path):
    folder = saved(tmp_path / "base", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    convert(folder, tmp_path / "out", {"op": "expand", "kv_heads": 1}, MERGE | {"kv_heads": 1})
    convert(folder, tmp_path / "split", WIDE)
    assert torch.equal(of_folder(tmp_path / "out"), of_folder(folder))
    assert torch.allclose(logits(library.load(tmp_path / "split")), of_folder(folder), atol=1e-5)


ROPES = {
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_positions_that_are_scaled(tmp_path, name):
    """A prompt longer than the original length, and tokens after it through the cache."""
    folder = saved(tmp_path / "base", rope_parameters=ROPES[name])
    convert(folder, tmp_path / "split", WIDE)
    stock, split = AutoModelForCausalLM.from_pretrained(folder), library.load(tmp_path / "split")
    assert torch.allclose(logits(split), logits(stock), atol=1e-5)
    outputs = []
    for model in (stock, split):
        with torch.no_grad():
            first = model(input_ids=IDS[:, :10], use_cache=True)
            outputs.append(model(input_ids=IDS[:, 10:], past_key_values=first.past_key_values).logits)
    assert torch.allclose(*outputs, atol=1e-4)


REFUSED = {
    "a window of nothing, in words": ({"sliding_window": "none"}, "sliding_window"),
    "layers as a share": ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
    "heads that are true": ({"num_key_value_heads": True}, "num_key_value_heads"),
    "a head size below nothing": ({"head_dim": -8}, "head size -8"),
    "a head size that is odd": ({"head_dim": 7}, "head_dim"),
    "a tie in words": ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "a dtype that is none": ({"dtype": "float7"}, "float7"),
    "a text config within": ({"text_config": {"hidden_size": 64}}, "num_hidden_layers"),
    "a RoPE that is none": ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "rope"),
    "an activation that is none": ({"hidden_act": "nope"}, "hidden_act"),
    "weights of another name": ({"transformers_weights": "x.safetensors.index.json"}, "transformers_weights"),
    "a vocabulary larger than its table": ({"vocab_size": 400}, "embed_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_are_refused(surgery, base, name):
    """The sentence names what is wrong, whichever engine reads the folder."""
    fields, says = REFUSED[name]
    edit_json(base / "config.json", **fields)
    ran = surgery("apply", "streaming", base, "-o", "out", "--no-eval", "--no-check", "sinks=2", "window=4")
    assert ran.code == 2
    assert ran.err.count("error:") == 1
    assert "Traceback" not in ran.err
    assert says in ran.err.replace("/base", "")


def test_a_config_that_asks_for_tuples(surgery, base):
    """Stock Transformers cannot run such a model: the user is told so, in one sentence."""
    edit_json(base / "config.json", return_dict=False)
    ran = surgery("eval", base, "--windows", "1", "--length", "32")
    assert ran.code in (0, 2)
    assert "Traceback" not in ran.err


CONFIGS = {
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
    "no architecture": {"architectures": None},
    "end tokens beyond the vocabulary": {"eos_token_id": [1, 299, 5000]},
    "padding before the first token": {"pad_token_id": -1},
    "a version to come": {"transformers_version": "99.0"},
    "many labels": {"id2label": {str(i): "x" for i in range(5000)}},
    "no number of positions": {"max_position_embeddings": 0},
    "a task's settings": {
        "task_specific_params": {"x": {"y": [0] * 1000}},
        "custom_pipelines": {"a": {"impl": "b.C"}},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_work(base, tmp_path, name):
    """Logits are those of the base, by both engines."""
    expected = of_folder(base)
    edit_json(base / "config.json", **CONFIGS[name])
    convert(base, tmp_path / "out", SAME)
    convert(base, tmp_path / "split", WIDE)
    assert torch.equal(of_folder(tmp_path / "out"), expected)
    assert torch.allclose(logits(library.load(tmp_path / "split")), expected, atol=1e-5)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert all(written[key] == value for key, value in CONFIGS[name].items())


def test_a_classifier(tmp_path):
    """Its head is no language model's: the weights are merged as asked, and what is loaded is never a random head."""
    TINY["llama"]().save_pretrained(tmp_path / "lm")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    model.save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base/config.json", tie_word_embeddings=False)
    convert(tmp_path / "base", tmp_path / "out", SAME)
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SurgeryError):
        convert(tmp_path / "base", tmp_path / "split", WIDE)
    assert not list(tmp_path.glob("split*"))


# --- what generates -------------------------------------------------------------------------------

GENERATION = {
    "temperature without sampling": {"do_sample": False, "temperature": 0.5, "top_p": 0.1},
    "a cache that is static": {"cache_implementation": "static"},
    "a cache of two kinds": {"cache_implementation": "hybrid"},
    "a cache of integers": {"cache_implementation": "quantized"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "a length below nothing": {"max_length": -5},
    "a million words": {"bad_words_ids": [[i] for i in range(3, 250)], "note": "x" * 1_000_000},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "attention weights": {"output_attentions": True, "return_dict_in_generate": True},
    "code of somebody's": {"custom_generate": "evil/decoding", "trust_remote_code": True},
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_configs(base, tmp_path, name):
    """A surgical model made of it generates what a stock model of the same keys does, without further arguments."""
    edit_json(base / "generation_config.json", **GENERATION[name])
    convert(base, tmp_path / "split", WIDE)
    expected = AutoModelForCausalLM.from_pretrained(base)
    expected.generation_config = type(expected.generation_config)()
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    wanted = expected.generate(IDS, **arguments)
    model = library.load(tmp_path / "split")
    if name in ("beams", "a million words"):
        model.generation_config.num_beams, model.generation_config.num_return_sequences = 1, 1
        model.generation_config.bad_words_ids = None
    if name == "attention weights":
        model.generation_config.output_attentions = model.generation_config.return_dict_in_generate = False
    got = model.generate(IDS[:1], **arguments) if name == "prompt lookup" else model.generate(IDS, **arguments)
    assert torch.equal(got, wanted[: len(got)])


def test_the_cache_of_a_model_in_memory(base, tmp_path):
    """The model generates after its surgery, the saved one too, and the report says what was left out."""
    edit_json(base / "generation_config.json", cache_implementation="static")
    model = AutoModelForCausalLM.from_pretrained(base)
    report = library.apply(recipe(WIDE), model)
    assert any("'static'" in note for note in report.data["plan"]["notes"])
    library.save(model, tmp_path / "out", report)
    for each in (model, library.load(tmp_path / "out")):
        assert each.generate(IDS, max_new_tokens=2).shape[1] > IDS.shape[1]


# --- tokenizers and templates ---------------------------------------------------------------------

TEMPLATES = {
    "raises": "{{ raise_exception('no such role') }}",
    "is no template": "{% if %}{{",
    "without end": "{% for i in range(10**12) %}x{% endfor %}",
    "says nothing": "",
    "drops the message": "hello",
    "says the message twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "is a mapping": "{{ messages.x.y.z }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "climbs": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "turns the words round": "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(surgery, base, name):
    """Needles are asked without a template, or the user is told in one sentence what the template does."""
    (base / "chat_template.jinja").write_text(TEMPLATES[name])
    ran = surgery("eval", base, "--probe", "needles", "lengths=400", "depths=1", "samples=1")
    assert ran.code in (0, 2), ran.err[-500:]
    assert "Traceback" not in ran.err
    assert "/etc/passwd" not in ran.out
    assert "root:" not in ran.out + ran.err


def test_special_tokens_beyond_the_table(surgery, base):
    """The tokenizer knows words that the model has no row for, and the text has none of them."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_{i}>" for i in range(100)]})
    tokenizer.save_pretrained(base)
    assert len(tokenizer) > 300
    short = ("evaluate.windows=1", "evaluate.length=32")
    assert surgery("apply", "mqa", base, *short, "-o", "out", "--no-check", "--no-gate").code == 0
    ran = surgery("eval", base, "--windows", "1", "--length", "32")
    assert ran.code == 0


def test_a_text_of_tokens_that_the_model_has_not(surgery, base, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    tokenizer.save_pretrained(base)
    (tmp_path / "t.txt").write_text(" ".join(f"word{i % 100}" for i in range(50, 2050)))
    ran = surgery("eval", base, "--text", "t.txt", "--windows", "1", "--length", "32")
    assert ran.code == 2
    assert "knows 300" in ran.err


# --- folders --------------------------------------------------------------------------------------

FOLDERS = [
    "\u6a21\u578b \u03b1",
    "a\nb",
    "-m",
    "--json",
    "a=b",
    "a@b",
    "%s{0}$HOME",
    "'quoted\"",
    "x" * 200,
    "~",
    "gqa.yaml",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_odd_names(surgery, base, tmp_path, name):
    """The folder is found by its path, its name alone is recorded, and the result passes its check."""
    folder = base.rename(tmp_path / name)
    out = tmp_path / f"out of {name}"
    ran = surgery("apply", "mqa", folder, "-o", out, "--no-eval", "--no-check")
    assert ran.code == 0, ran.err
    record = json.loads((out / "surgery.json").read_text())
    assert record["base"]["name"] == name
    assert str(tmp_path) not in (out / "surgery.json").read_text()
    assert surgery("inspect", out).code == 0


@pytest.mark.parametrize("name", ["base ", "base\n", "\tbase"])
def test_a_folder_beside_one_of_nearly_its_name(surgery, base, tmp_path, monkeypatch, name):
    """Of two folders the one that was named is converted."""
    saved(tmp_path / name, num_key_value_heads=8)
    monkeypatch.chdir(tmp_path)
    ran = surgery("inspect", name, "--json")
    assert ran.code == 0
    assert ran.json["layers"][0]["kv_heads"] == 8


def test_a_folder_whose_name_is_not_utf8(surgery, base, tmp_path):
    folder = base.rename(Path(os.fsdecode(bytes(tmp_path) + b"/m\xff")))
    ran = surgery("apply", "mqa", folder, "-o", "out", "--no-eval", "--no-check")
    assert ran.code in (0, 2), ran.err[-300:]
    assert "Traceback" not in ran.err
    assert ran.code == 0 or not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("arguments", [("sinks=2", "window=4", "--no-eval"), ("sinks=2", "window=4")])
def test_a_folder_to_load_whose_name_is_not_utf8(refused, base, tmp_path, arguments):
    """Transformers cannot load it, and nothing is left."""
    folder = base.rename(Path(os.fsdecode(bytes(tmp_path) + b"/m\xff")))
    arguments = ("evaluate.length=512", *arguments)
    refused("apply", "streaming", folder, "-o", "out", *arguments, says=["not UTF-8", "rename it"])


def test_an_output_whose_name_is_not_utf8(surgery, base, tmp_path):
    out = Path(os.fsdecode(bytes(tmp_path) + b"/o\xff"))
    ran = surgery("apply", "mqa", base, "-o", out, "--no-eval", "--no-check")
    assert ran.code in (0, 2), ran.err[-300:]
    assert "Traceback" not in ran.err
    assert ran.code == 0 or {path.name for path in tmp_path.iterdir()} == {"base"}


def test_files_that_cannot_be_written(base, tmp_path):
    """Every file of the base is for reading alone: those of the result are not."""
    (base / "LICENSE").write_text("free")
    for path in base.iterdir():
        path.chmod(0o444)
    base.chmod(0o555)
    try:
        convert(base, tmp_path / "out", MERGE)
    finally:
        base.chmod(0o755)
    assert all(os.stat(path).st_mode & 0o200 for path in (tmp_path / "out").iterdir())
    convert(base, tmp_path / "out", MERGE, overwrite=True)


def test_names_that_differ_in_capitals_alone(base, tmp_path):
    for name in ("LICENSE", "License", "license", "Tokenizer.JSON", "readme.md"):
        (base / name).write_text(name)
    report = convert(base, tmp_path / "out", MERGE)
    for name in ("LICENSE", "License", "license"):
        assert (tmp_path / "out" / name).read_text() == name
    assert "readme.md" in report.data["left_behind"]


def test_folders_where_files_are_expected(base, tmp_path):
    for name in ("surgery.json", "LICENSE", "README.md", "base-card.md", "logo.png", "surgery-progress.json"):
        (base / name).mkdir()
        (base / name / "inside").write_text("x")
    report = convert(base, tmp_path / "out", MERGE)
    assert (tmp_path / "out/surgery.json").is_file()
    assert report.data["history"] == []


@pytest.mark.parametrize("kind", ["a pipe", "a socket"])
def test_what_is_no_file_in_a_model_folder(base, tmp_path, kind):
    """It is not read: a pipe that nobody writes to would block for ever."""
    if kind == "a pipe":
        os.mkfifo(base / "LICENSE")
        os.mkfifo(base / "generation.txt")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as end:
            here = os.getcwd()
            os.chdir(base)
            end.bind("NOTICE")
            os.chdir(here)
    convert(base, tmp_path / "out", MERGE)
    assert not (tmp_path / "out/LICENSE").exists()


@pytest.mark.parametrize("name", ["surgery_notes.py", "modeling_surgery.py"])
def test_code_of_the_base_that_is_called_as_ours(base, tmp_path, name):
    """The base is a stock model: its file is carried, or listed as left behind."""
    (base / name).write_text("VALUE = 1\n")
    report = convert(base, tmp_path / "out", MERGE)
    assert (tmp_path / "out" / name).exists() or name in report.data["left_behind"]


def test_code_of_the_base_that_is_called_as_what_the_result_runs(base, tmp_path):
    """A surgical result has code of that name: the base's is listed as left behind, and other files are carried."""
    for name in ("surgery_stores.py", "surgery_notes.py"):
        (base / name).write_text("VALUE = 1\n")
    report = convert(base, tmp_path / "out", WIDE, check=True)
    assert report.data["left_behind"] == ["surgery_stores.py"]
    assert (tmp_path / "out/surgery_notes.py").read_text() == "VALUE = 1\n"
    again = convert(tmp_path / "out", tmp_path / "again", {"op": "moh", "router": "zero"})
    assert again.data["left_behind"] == ["surgery_notes.py"]


def test_a_composite_is_whole_and_in_order(tmp_path):
    """Its tower, its text and its embeddings are carried; what a head split cannot do is said."""
    folder = saved(tmp_path / "base", "gemma3_image_text")
    before = load_file(folder / WEIGHTS)
    convert(folder, tmp_path / "out", MERGE)
    after = load_file(tmp_path / "out" / WEIGHTS)
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed
    assert all(".self_attn.k_proj" in name or ".self_attn.v_proj" in name for name in changed)
    assert not any("vision" in name for name in changed)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in changed)
    for step in (SPLIT, {"op": "moh", "router": "zero"}, {"op": "sparse_prefill", "gamma": 1.0}):
        with pytest.raises(SurgeryError, match="composites"):
            convert(folder, tmp_path / "split", step)


def test_a_base_that_lies_below_a_folder_of_the_same_name(base, tmp_path, monkeypatch):
    """A path is read from where the command runs, and a trailing slash, a dot or two slashes change nothing."""
    shutil.copytree(base, tmp_path / "run/base")
    edit_tensors(tmp_path / "run/base", lambda t: t["model.norm.weight"].zero_())
    monkeypatch.chdir(tmp_path / "run")
    for spelling in ("base", "base/", "./base", "base/.", "../run//base"):
        assert not load_file(library_path(spelling))["model.norm.weight"].any()
        report = convert(spelling, tmp_path / "out", MERGE, overwrite=True)
        assert not load_file(tmp_path / "out" / WEIGHTS)["model.norm.weight"].any()
        assert report.data["base"]["name"] == "base"


def library_path(spelling: str) -> str:
    from surgery.io.hub import resolve

    return str(resolve(spelling).path / WEIGHTS)
