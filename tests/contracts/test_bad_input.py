"""A user's mistake in one of the commands: one message that says what, where, what exists and how to mend it.

Recipes are in test_recipe.py, damaged models in test_checkpoint.py, the output folder in test_output.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import edit_json, edit_tensors, listing

FAST = ("--no-check", "--no-eval")
SCORED = ("evaluate.windows=1", "evaluate.length=16")


@pytest.fixture
def out(surgery, model, tmp_path):
    """A folder that surgery wrote and nobody checked."""
    assert surgery("apply", "gqa", model, "kv_heads=1", "method=mean", "-o", "out", *FAST).code == 0
    return tmp_path / "out"


# --- the command line itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["plan", "gqa"], "Missing argument 'MODEL'"),
        (["plan", "gqa", "model", "--speed"], "No such option: --speed"),
        (["eval", "model", "--windows", "0"], "--windows"),
        (["eval", "model", "--windows", "x"], "--windows"),
        (["check", "model", "--memory", "much"], "--memory"),
        (["apply", "gqa", "model", "-o"], "-o"),
    ],
)
def test_usage(surgery, args, says):
    plain = surgery(*args)
    assert plain.code == 2
    assert plain.out == ""
    assert says in plain.err
    assert plain.err.lower().count("error:") == 1
    if args[-1] != "-o":
        spoken = surgery(*args, "--json")
        assert spoken.code == 2
        assert spoken.json["exit_code"] == 2
        assert says in spoken.json["error"]
        assert spoken.err == ""


def test_a_bug_of_ours_is_said_to_be_one(surgery, model, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("surgery.api.make_plan", broken)
    plain = surgery("plan", "gqa", model)
    assert plain.code == 1
    assert "ZeroDivisionError: oops" in plain.err
    assert plain.err.endswith("error: this is a bug in surgery; please report the lines above\n")
    spoken = surgery("plan", "gqa", model, "--json")
    assert (spoken.code, spoken.json["exit_code"]) == (1, 1)


def test_the_real_process_gives_the_code_and_one_message(model, tmp_path):
    before = listing(tmp_path)
    command = [sys.executable, "-m", "surgery", "apply", "gqa", "model", "kv_heads=4", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model: gqa: 3 KV heads on 9 query heads cannot become 4; possible: 1, 3")
    assert len(done.stderr.splitlines()) == 1
    assert listing(tmp_path) == before


# --- what a model cannot become -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["kv_heads=4"], ["gqa: 3 KV heads on 9 query heads cannot become 4; possible: 1, 3"]),
        (["kv_heads=2"], ["cannot become 2; possible: 1, 3"]),
        (["kv_heads=9"], ["cannot become 9; possible: 1, 3; `expand` repeats heads"]),
        (["kv_heads=99"], ["cannot become 99; possible: 1, 3"]),
        (["kv_heads=99999999999999999999"], ["cannot become 99999999999999999999; possible: 1, 3"]),
        (["kv_heads=[1, 3, 1]"], ["gqa: kv_heads lists 3 layers, the model has 2"]),
        (["kv_heads=1", "method=random", "align=procrustes"], ["align", "method: random", "drop one of them"]),
    ],
)
def test_kv_heads_that_do_not_fit(refused, model, overrides, says):
    refused("apply", "gqa", model, *overrides, "-o", "out", says=["model: ", *says])
    refused("plan", "gqa", model, *overrides, says=says)


def test_fewer_heads_by_expand(refused, model):
    says = ["expand: 3 KV heads on 9 query heads cannot become 1; possible: 3, 9"]
    refused("apply", "expand-kv", model, "kv_heads=1", "-o", "out", says=says)


def test_both_problems_are_shown_at_once(refused, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path / "gpt2")
    says = ["gpt2 has no KV-head number", "what would work", "drop one of them"]
    args = ("kv_heads=1", "method=random", "align=procrustes")
    refused("apply", "gqa", tmp_path / "gpt2", *args, "-o", "out", says=says)


# --- the model is not there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("inspect",), ("plan", "mqa"), ("apply", "mqa"), ("eval",)])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./modle", ["./modle: no such folder", "./model", "existing folder or a Hub id"]),
        ("/nowhere/at/all", ["/nowhere/at/all: no such folder", "existing folder or a Hub id"]),
        ("model/config.json", ["model/config.json: a file, not a folder", "the folder that holds config.json"]),
        ("model/config", ["model/config: no such folder", "`model/config@main`"]),
        ("a b c", ["not a Hub id", "`owner/name`"]),
        ("", ["no model was named"]),
    ],
)
def test_no_such_model(refused, model, command, name, says):
    more = ("-o", "out", *FAST) if command[0] == "apply" else ()
    refused(*command, name, *more, says=says)


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    says = ["empty: no config.json", "name a Hugging Face model folder"]
    refused("apply", "mqa", "empty", "-o", "out", says=says)


# --- the evaluation can be seen to fail before anything is written ------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("missing.txt", ["missing.txt: no such text file", "check the path"]),
        ("short.txt", ["the text is too short: it has 3 tokens", "need 16"]),
        ("empty.txt", ["empty.txt: the text file is empty"]),
        ("binary.txt", ["binary.txt: not UTF-8 text"]),
        ("zeros.txt", ["zeros.txt: a binary file, not text"]),
        ("model", ["model: this is a folder, not a text file"]),
    ],
)
def test_a_text_that_cannot_be_scored(refused, model, tmp_path, text, says):
    (tmp_path / "short.txt").write_text("the cat sat")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 50)
    (tmp_path / "zeros.txt").write_bytes(b"\0" * 50)
    refused("eval", model, "--text", text, "--windows", "1", "--length", "16", says=says)
    refused("apply", "mqa", model, f"evaluate.text={text}", *SCORED, "-o", "out", says=says)


def test_apply_to_a_model_without_a_tokenizer(refused, surgery, model):
    (model / "tokenizer.json").unlink()
    refused("apply", "mqa", model, "-o", "out", says=["no tokenizer files", "copy the base's tokenizer"])
    assert surgery("apply", "mqa", model, "-o", "out", *FAST).code == 0


def test_windows_longer_than_the_model_takes(refused, model, text):
    edit_json(model / "config.json", max_position_embeddings=128)
    says = ["it takes 128 tokens, the windows have 512", "--length 128"]
    refused("eval", model, "--text", text, "--windows", "1", "--length", "512", says=says)


def test_eval_against_a_model_of_another_vocabulary(refused, out, model, tmp_path, text):
    edit_json(model / "config.json", vocab_size=65)
    says = ["different vocabularies", "65 and 64", "the one it was made from"]
    refused("eval", out, "--base", model, "--text", text, "--windows", "1", "--length", "16", says=says)


# --- check --------------------------------------------------------------------------------------------------


def test_check_of_a_folder_that_surgery_did_not_write(refused, model, tmp_path):
    says = ["model: no surgery.json: not a checkpoint that surgery wrote", "surgery apply RECIPE MODEL -o OUT"]
    refused("check", model, says=says)
    refused("check", "nowhere", says=["nowhere: no such folder"])
    (model / "surgery.json").write_text("{")
    refused("check", model, says=["surgery.json is not JSON"], code=4)
    for content in ("{}", '{"format": 99}'):
        (model / "surgery.json").write_text(content)
        refused("check", model, says=["surgery.json has format", "known: 1"], code=4)
    (model / "surgery.json").write_text("[]")
    refused("check", model, says=["surgery.json holds no JSON object"], code=4)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"files": {"model.safetensors": {}}}, "the entry of model.safetensors has no bytes and sha256"),
        ({"files": []}, "files is []"),
        ({"gate": 5}, "gate is 5"),
        ({"gate": {}}, "gate has no status and limits"),
        ({"check": {"passed": True}}, "check has no passed and items"),
        ({"check": {"passed": True, "items": [5]}}, "check has no passed and items"),
        ({"evaluation": "good"}, "evaluation is 'good'"),
        ({"evaluation": {"out": 5}}, "evaluation.out is 5"),
        ({"plan": {"parameters": 5}}, "plan.parameters is 5"),
        ({"recipe": {"operations": [5]}}, "recipe has no operations"),
        ({"base": None}, "base is None"),
        ({"history": [5]}, "history holds something else"),
    ],
)
def test_a_damaged_record_is_one_error(refused, out, part, says):
    edit_json(out / "surgery.json", **part)
    refused("check", out, says=[f"surgery.json is damaged: {says}", "as it was written"], code=4)


def test_a_record_without_a_part_is_one_error(refused, out):
    (out / "surgery.json").write_text('{"format": 1}')
    refused("check", out, says=["surgery.json is damaged: it has no base"], code=4)


def flip_a_byte(out):
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)[0]
        file.seek(-1000, 2)
        file.write(bytes([byte ^ 1]))


FAULTS = {
    "a byte flipped": (flip_a_byte, ["hashes: model.safetensors is not the file that was written"]),
    "weights gone": (lambda out: (out / "model.safetensors").unlink(), ["hashes: model.safetensors is missing"]),
    "weights cut": (
        lambda out: (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-9]),
        ["hashes: model.safetensors is not the file", "cut short"],
    ),
    "other heads": (
        lambda out: edit_json(out / "config.json", num_key_value_heads=3),
        ["k_proj.weight has shape [8, 72], which does not fit the config", "3 KV heads"],
    ),
    "config gone": (lambda out: (out / "config.json").unlink(), ["no config.json"]),
    "config broken": (lambda out: (out / "config.json").write_text("{"), ["config.json is not JSON"]),
    "other width": (
        lambda out: edit_json(out / "config.json", intermediate_size=50),
        ["loads with stock Transformers", "mlp"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_what_changed(surgery, out, name):
    spoil, says = FAULTS[name]
    spoil(out)
    found = surgery("check", out, "--json")
    assert found.code == 4
    assert found.json["passed"] is False
    assert found.err.count("error:") == 1
    assert "the check found a fault" in found.err
    assert "Traceback" not in found.err
    assert not [word for word in says if word not in found.err], found.err
    report = json.loads((out / "surgery.json").read_text())
    assert report["check"] == found.json, "kept in the record, as the card says"


# --- push ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


def test_push_of_a_folder_nobody_checked(refused, out, no_token):
    says = ["has not passed `surgery check`", f"run `surgery check {out}`"]
    refused("push", out, "me/model", says=says)
    refused("push", out, "me/model", "--dry-run", says=says)


def test_push_of_other_folders(refused, model, no_token):
    refused("push", model, "me/model", says=["not made by surgery", "push the folder that `surgery apply` wrote"])
    refused("push", "nowhere", "me/model", says=["not made by surgery"])


def test_push_after_check(surgery, refused, out, no_token):
    assert surgery("check", out).code == 0
    dry = surgery("push", out, "me/model", "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert dry.json["visibility"] == "private"
    assert {"model.safetensors", "README.md", "surgery.json", "config.json"} <= {f["name"] for f in dry.json["files"]}
    assert any("quality gate" in warning for warning in dry.json["warnings"])
    shown = surgery("push", out, "me/model", "--dry-run")
    assert "nothing was sent" in shown.out
    assert "(private)" in shown.out
    refused("push", out, "me/model", says=["needs a Hub token", "hf auth login", "HF_TOKEN"])
    refused("push", out, "a b", says=["not a Hub id", "`owner/name`"])
    edit_tensors(out, lambda tensors: tensors["model.norm.weight"].zero_())
    refused("push", out, "me/model", says=["changed since it was checked: model.safetensors", f"surgery check {out}"])
