"""The API from Python: models in memory, what is saved of them, and mistakes that are one clear error."""

from __future__ import annotations

import json
import shutil

import pytest

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
        assert f"`{file}` sha256 `{digest}`" in card
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
    assert "This folder holds no licence or notice file" in (tmp_path / "bare/README.md").read_text()


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
    from surgery.io.files import published

    assert published("../secret/words.txt") == published("/home/me/words.txt") == "words.txt"
    assert published("~/words.txt") == published("C:\\Users\\me\\words.txt") == "words.txt"
    assert published("builtin") == "builtin"
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

    from surgery.api import anatomy_of, fitting_recipes

    def fits(**fields):
        return fitting_recipes(anatomy_of(TINY["llama"](**fields)))

    short = fits(max_position_embeddings=512)
    assert "it takes 512 tokens, the windows have 4096" in short["flexprefill"][0]
    assert "takes 512 tokens, sinks + window are 512" in short["sparse-duo"][0]
    assert short["gqa"] == short["duo-attention"] == []
    assert not any(fits(max_position_embeddings=8192).values())
    single = fits(num_key_value_heads=1, max_position_embeddings=8192)
    assert single["mqa"] == ["it changes nothing: there is 1 KV head already"]
    assert single["duo-attention"] == []
    changes = surgery.plan("streaming", TINY["llama"](max_position_embeddings=512)).notes
    assert changes == ["this model takes 512 tokens, all of which these heads see: nothing changes"]
