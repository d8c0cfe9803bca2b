"""The API from Python: models in memory, what is saved of them, and mistakes that are one clear error."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import yaml

import surgery
from surgery.errors import SurgeryError


@pytest.fixture
def loaded(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


def test_duo_attention_on_a_loaded_model(loaded, model, tmp_path):
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    report = surgery.apply("duo-attention", loaded, tokenizer=tokenizer, streaming_ratio=0.5)
    assert sum(map(len, report.data["operations"][0]["record"]["streaming"])) == 3
    assert report.data["overrides"] == ["streaming_ratio=0.5"]
    assert report.data["base"]["name"] == "model"
    saved = surgery.save(loaded, tmp_path / "out", report, tokenizer=tokenizer)
    card = (tmp_path / "out/README.md").read_text()
    for file, digest in saved.data["code"].items():
        assert f"`{file}`: sha256 `{digest}`" in card
    assert set(saved.data["code"]) == {path.name for path in (tmp_path / "out").glob("*.py")} != set()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        got, want = (each(input_ids=ids).logits for each in (surgery.load(tmp_path / "out"), loaded))
    assert (got - want).abs().max() <= 1e-4


def test_keywords_are_overrides_on_the_card(model, tmp_path):
    report = surgery.apply(
        "gqa", model, output=tmp_path / "out", check=False, evaluate=False, kv_heads=1, method="mean"
    )
    assert report.data["overrides"] == ["kv_heads=1", "method=mean"]
    assert "surgery apply gqa model -o OUT kv_heads=1 method=mean" in (tmp_path / "out/README.md").read_text()


def test_a_recipe_of_ones_own_has_no_command(model, tmp_path):
    from surgery.config.recipe import shipped

    shutil.copyfile(shipped()["mqa"], tmp_path / "mine.yaml")
    surgery.apply(tmp_path / "mine.yaml", model, output=tmp_path / "out", check=False, evaluate=False)
    card = (tmp_path / "out/README.md").read_text()
    assert "surgery apply mqa" not in card
    assert "The recipe was its author's own" in card


def test_what_is_saved_says_what_is_true(loaded, model, tmp_path):
    (model / "LICENSE").write_text("All yours.")
    (model / "README.md").write_text("---\nlicense: mit\n---\nThe base.")
    report = surgery.apply("gqa", loaded, kv_heads=1, method="mean")
    saved = surgery.save(loaded, tmp_path / "out", report)
    card = (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/LICENSE").read_text() == "All yours."
    assert "files are in this folder: `LICENSE`" in card
    assert "The base." in card
    assert "**mit**" in card
    assert "no command repeats it" in card
    assert saved.data["in_memory"] == {"class": "LlamaForCausalLM"}
    assert surgery.check(tmp_path / "out").data["check"]["passed"]
    (model / "LICENSE").unlink()
    surgery.save(loaded, tmp_path / "bare", report)
    assert (
        "Files of licence and notice, if the base has any, are in the base's folder"
        in (tmp_path / "bare/README.md").read_text()
    )


def test_history_and_commit_of_a_model_in_memory(loaded, model, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded.config._name_or_path, loaded.config._commit_hash = "org/name", "c" * 40
    first = surgery.apply("expand-kv", loaded)
    assert (first.data["base"]["hub_id"], first.data["base"]["revision"]) == ("org/name", "c" * 40)
    assert first.data["history"] == []
    second = surgery.apply("mqa", loaded)
    assert [old["recipe"]["name"] for old in second.data["history"]] == ["expand-kv"]
    surgery.save(loaded, tmp_path / "one", second)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    third = surgery.save(again, tmp_path / "two", surgery.apply("expand-kv", again))
    assert [old["recipe"]["name"] for old in third.data["history"]] == ["expand-kv", "mqa"]
    assert json.loads((tmp_path / "two/surgery.json").read_text()) == third.data


def test_save_refuses_the_report_of_another_model(loaded, model, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    report = surgery.apply("mqa", loaded)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(SurgeryError, match="the report is of a LlamaForCausalLM"):
        surgery.save(gpt2, tmp_path / "out", report)
    with pytest.raises(SurgeryError, match=r"1 KV heads .* this model has .* 3 KV heads"):
        surgery.save(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out", report)
    with pytest.raises(SurgeryError, match=r"not a surgery\.Report"):
        surgery.save(loaded, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
    assert surgery.save(loaded, tmp_path / "out", report).folder == tmp_path / "out"


@pytest.mark.parametrize("call", [surgery.apply, surgery.plan])
@pytest.mark.parametrize("wrong", [None, 5, {}])
def test_no_model(call, wrong):
    with pytest.raises(SurgeryError, match="is not a model"):
        call("mqa", wrong)


def test_a_config_can_be_planned_and_not_edited(loaded):
    assert surgery.plan("mqa", loaded.config).after.layers[0].kv_heads == 1
    with pytest.raises(SurgeryError, match="LlamaConfig is not a model"):
        surgery.apply("mqa", loaded.config)
    with pytest.raises(SurgeryError, match="None is not a model"):
        surgery.evaluate(None)


@pytest.mark.parametrize(
    "given", [{"resume": True}, {"overwrite": True}, {"allow_pickle": True}, {"engine": "streaming"}, {"output": "x"}]
)
def test_settings_of_folders_are_refused_for_a_model(loaded, given):
    with pytest.raises(SurgeryError, match=f"{next(iter(given))}: for a name or folder"):
        surgery.apply("mqa", loaded, **given)
    assert loaded.config.num_key_value_heads == 3


def test_no_folder_is_published(model, text, tmp_path):
    from surgery.io.files import published, published_list, published_override

    assert published("../secret/words.txt") == published("/home/me/words.txt") == "words.txt"
    assert published("~/words.txt") == published("C:\\Users\\me\\words.txt") == "words.txt"
    assert published("builtin") == "builtin"
    assert published_list(["self", "/home/me/a.txt", "./b.txt"]) == ["self", "a.txt", "b.txt"]
    assert published_list(["/me/one/x.txt", "/me/two/x.txt", "y.txt"]) == ["one/x.txt", "two/x.txt", "y.txt"]
    assert published_list(["/me/p/one/x.txt", "/me/q/one/x.txt"]) == ["p/one/x.txt", "q/one/x.txt"]
    assert published_list(["/home/me/a.txt", "/home/me/a.txt"]) == ["a.txt", "a.txt"]
    assert published_override("data=[self, /home/me/a.txt, b.txt]") == "data=[self, a.txt, b.txt]"
    assert published_override("heal.freeze=['*.mlp.*']") == "heal.freeze=['*.mlp.*']"
    assert published_override("kv_heads=[1, 3]") == "kv_heads=[1, 3]"
    for value, shown in (
        ("{text: /home/me/a.txt, windows: 1}", {"text": "a.txt", "windows": 1}),
        ("{names: [tk/mc.yaml], max_drop: {my_mc: 0.01}}", {"names": ["mc.yaml"], "max_drop": {"my_mc": 0.01}}),
        ("[{op: x, scores: /home/me/b.json}, {op: y}]", [{"op": "x", "scores": "b.json"}, {"op": "y"}]),
    ):
        key, _, said = published_override(f"evaluate={value}").partition("=")
        assert (key, yaml.safe_load(said)) == ("evaluate", shown)
    assert published_override("data=[/home/me/a.txt") == "data=a.txt"
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/scores.tsv").write_text("0\t0\t1\n0\t1\t1\n")
    settings = {"scores": str(tmp_path / "secret/scores.tsv"), "window": 6, "sinks": 2}
    surgery.apply("duo-attention", model, output=tmp_path / "out", check=False, evaluate=False, **settings)
    for name in ("surgery.json", "README.md"):
        assert "secret" not in (tmp_path / "out" / name).read_text(), name


def test_a_model_without_a_name_is_called_by_the_class_it_had(loaded):
    loaded.config._name_or_path = ""
    report = surgery.apply("streaming", loaded, window=6)
    assert report.data["base"]["name"] == "LlamaForCausalLM"
    assert report.data["in_memory"]["class"] == type(loaded).__name__ == "SurgeryLlamaForCausalLM"


def test_inspect_plans_with_the_models_limits():
    """What `inspect` says of a recipe is what `apply` does before it writes: of 512 positions, of one KV head."""
    from families import TINY

    from surgery.conversion.fit import anatomy_of, fitting_recipes

    def fits(**fields):
        return fitting_recipes(anatomy_of(TINY["llama"](**fields)))

    short = fits(max_position_embeddings=512)
    assert "leaves the first 1,024 tokens unchanged, and this model takes 512" in short["flexprefill"][0]
    assert "takes 512 tokens, sinks + window are 512" in short["sparse-duo"][0]
    assert short["gqa"] == []
    assert short["duo-attention"] == []
    long = fits(max_position_embeddings=8192)
    assert {name for name, problems in long.items() if problems} == {"moba-heal"}, "whose last 3 layers stay full"
    single = fits(num_key_value_heads=1, max_position_embeddings=8192)
    assert single["mqa"] == ["it changes nothing: there is 1 KV head already"]
    assert single["duo-attention"] == []
    changes = surgery.plan("streaming", TINY["llama"](max_position_embeddings=512)).notes
    words = "duo_attention leaves the first 1,024 tokens unchanged, and this model takes 512: nothing changes"
    assert changes[0] == words


SCORED = {
    "version": 1,
    "name": "mine",
    "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}],
}


def scored_recipe(text, **limits):
    return SCORED | {"evaluate": {"text": str(text), "windows": 2, "length": 16, **limits}}


def test_a_model_in_memory_is_scored_into_its_report(loaded, model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = surgery.load_tokenizer(model)
    recipe = scored_recipe(text.name, max_kl=5.0, choices=3, min_choices=0.0)
    report = surgery.apply(recipe, loaded)
    assert (report.gate, report.perplexity) == ("not run", None)
    result = surgery.evaluate(loaded, model, tokenizer=tokenizer, report=report)
    alone = surgery.evaluate(loaded, surgery.load(model), tokenizer=tokenizer, text=text, windows=2, length=16)
    assert result.out == alone.out
    assert report.kl == result.kl["mean"] == pytest.approx(alone.kl["mean"])
    assert set(result.probes) == {"choices"}, "all that the recipe asks for"
    saved = surgery.save(loaded, tmp_path / "out", report, tokenizer=tokenizer)
    kept = surgery.Report.of(tmp_path / "out")
    assert kept.kl == saved.kl == report.kl
    card = (tmp_path / "out/README.md").read_text()
    assert f"{report.perplexity:,.4g}" in card
    assert "Multiple choice" in card
    on_disk = surgery.evaluate(tmp_path / "out", model, text=text.name, windows=2, length=16)
    assert on_disk.out.cross_entropy == pytest.approx(report.evaluation.out.cross_entropy, rel=1e-3)


def test_gate_of_a_model_in_memory(loaded, model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = surgery.load_tokenizer(model)
    report = surgery.apply(scored_recipe(text.name, max_kl=1e-9), loaded)
    surgery.evaluate(loaded, model, tokenizer=tokenizer, report=report)
    assert report.gate == "failed"
    with pytest.raises(SurgeryError, match="not the settings by which the report's recipe judges") as caught:
        surgery.evaluate(loaded, model, tokenizer=tokenizer, report=report, windows=1)
    assert caught.value.code == "invalid-setting"
    with pytest.raises(SurgeryError, match="compared with the base, and none was given"):
        surgery.evaluate(loaded, tokenizer=tokenizer, report=report)
    surgery.evaluate_choices(loaded, model, tokenizer=tokenizer, report=report, text=text, items=3, context=8)
    assert report.evaluation.probes["choices"]["items"] == 3
    assert "cases" not in report.evaluation.probes["choices"]


def test_another_probe_needs_the_first_score(loaded, model, text):
    report = surgery.apply(SCORED, loaded)
    options = {"tokenizer": surgery.load_tokenizer(model), "report": report, "text": text, "items": 3, "context": 8}
    with pytest.raises(SurgeryError, match="this report has no perplexity yet"):
        surgery.evaluate_choices(loaded, model, **options)


def test_a_score_does_not_outlive_the_weights_that_it_is_of(loaded, model, text, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    report = surgery.apply(scored_recipe(text.name, max_kl=5.0), loaded)
    surgery.evaluate(loaded, model, tokenizer=surgery.load_tokenizer(model), report=report)
    assert surgery.save(loaded, tmp_path / "before", report).gate == "passed"
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1e-3)
    loaded(input_ids=torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
    optimizer.step()
    saved = surgery.save(loaded, tmp_path / "after", report)
    assert (saved.perplexity, saved.gate) == (None, "not run")
    assert "changed after the score" in str(saved)


def test_an_adapter_does_not_name_the_unconverted_base(model, tmp_path):
    """peft writes the name of the model into the adapter, and loads the adapter on the model of that name."""
    from peft import LoraConfig, get_peft_model

    def named(loaded) -> str:
        get_peft_model(loaded, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        return json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]

    converted = surgery.load(model)
    report = surgery.apply("streaming", converted, sinks=1, window=3)
    assert not named(converted)
    converted = surgery.load(model)
    report = surgery.apply("streaming", converted, sinks=1, window=3)
    surgery.save(converted, tmp_path / "out", report)
    assert named(converted) == str(tmp_path / "out")


def test_no_probe_makes_an_old_score_new(loaded, model, text, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    report = surgery.apply(scored_recipe(text.name, max_kl=5.0), loaded)
    options = {"tokenizer": surgery.load_tokenizer(model), "report": report}
    surgery.evaluate(loaded, model, **options)
    with torch.no_grad():
        loaded.model.embed_tokens.weight.mul_(2)
    with pytest.raises(SurgeryError, match="the weights were changed after the perplexity was measured"):
        surgery.evaluate_choices(loaded, model, text=text, items=3, context=8, **options)
    assert surgery.save(loaded, tmp_path / "out", report).perplexity is None


def test_the_report_of_another_model_gets_no_score(loaded, model):
    report = surgery.apply(SCORED, loaded)
    base = surgery.load(model)
    with pytest.raises(SurgeryError, match=r"1 KV heads .* this model has .* 3 KV heads"):
        surgery.evaluate(base, model, tokenizer=surgery.load_tokenizer(model), report=report)
    with pytest.raises(SurgeryError, match=r"not a surgery\.Report"):
        surgery.evaluate(base, model, report={})


def test_tokenizer_and_windows_of_a_name(model, text):
    from transformers import AutoTokenizer

    tokenizer = surgery.load_tokenizer(model)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()
    windows = surgery.text_windows(tokenizer, text, length=16, count=3)
    assert windows.shape == (3, 16)
    assert windows[0].tolist() == tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:16]


def test_settings_of_a_probe_are_written_out():
    from inspect import signature

    from surgery.evaluation.probes import find

    common = {"model", "base", "tokenizer", "report", "device", "dtype", "progress"}
    for function, name in ((surgery.evaluate_needles, "needles"), (surgery.evaluate_choices, "choices")):
        assert signature(function).parameters.keys() - common == find(name).model_fields.keys()
    own = signature(surgery.evaluate).parameters.keys() - common
    assert own == {"probe", "settings", *find("perplexity").model_fields}


def test_a_wrong_argument_is_named(loaded, model):
    report = surgery.Report({})
    calls = {
        "folder": [
            lambda: surgery.check(loaded),
            lambda: surgery.load(loaded),
            lambda: surgery.load_tokenizer(loaded),
            lambda: surgery.push(loaded, "me/mine"),
            lambda: surgery.save(model, loaded, report),
        ],
        "base": [
            lambda: surgery.check(model, loaded),
            lambda: surgery.evaluate(model, 5),
            lambda: surgery.heal(model, 5),
        ],
        "model": [
            lambda: surgery.plan(model, "mqa"),
            lambda: surgery.apply(loaded, "mqa", output="out"),
            lambda: surgery.evaluate(5),
            lambda: surgery.heal(5),
            lambda: surgery.apply("mqa", 5),
        ],
        "output": [lambda: surgery.apply("mqa", model, output=loaded), lambda: surgery.heal(model, output=5)],
        "tokenizer": [
            lambda: surgery.apply("mqa", loaded, tokenizer=str(model)),
            lambda: surgery.text_windows(str(model)),
        ],
        "progress": [lambda: surgery.evaluate(model, progress=True)],
        "probe": [lambda: surgery.evaluate(model, probe=5)],
        "repo": [lambda: surgery.push(model, None)],
        "overrides": [lambda: surgery.plan("mqa", model, overrides="kv_heads=1")],
    }
    for name, wrong in calls.items():
        for call in wrong:
            with pytest.raises(SurgeryError) as caught:
                call()
            assert caught.value.where == name
            assert caught.value.code == "invalid-argument"
            assert len(str(caught.value)) < 300, "no model printed over twenty lines"


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_every_file_of_an_output_has_the_mode_of_new_files(model, loaded, text, tmp_path):
    umask = 0o027
    before = os.umask(umask)
    try:
        surgery.apply("mqa", model, output=tmp_path / "streamed", check=False, evaluate=False)
        surgery.apply("mqa", model, output=tmp_path / "built", engine="loaded", check=False, evaluate=False)
        surgery.save(loaded, tmp_path / "saved", surgery.apply("mqa", loaded))
        heal = {"method": "parts", "steps": 1, "length": 16, "batch_tokens": 32, "data": str(text), "loss": "ce"}
        options = {"settings": heal, "check": False, "evaluate": False}
        surgery.heal(tmp_path / "streamed", model, output=tmp_path / "healed", **options)
    finally:
        os.umask(before)
    for name in ("streamed", "built", "saved", "healed"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert (tmp_path / name / "model.safetensors") in files
        assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}, name
