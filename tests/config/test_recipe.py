"""Recipes: every mistake in one is one message with its line and the nearest key, and nothing is written."""

from __future__ import annotations

import pytest
import yaml

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.conversion.plan import make_plan
from surgery.errors import SurgeryError

GOOD = """\
version: 1
name: mine
operations:
  - op: gqa
    kv_heads: 1
    method: mean
heal: null
evaluate: null
"""
BOMB = "version: 1\nname: x\na: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

FAULTS = {
    "misspelt key": (
        GOOD.replace("method: mean", "metod: mean"),
        ["mine.yaml:6: unknown key 'metod'", "available: op, kv_heads, method", "did you mean 'method'?"],
    ),
    "misspelt key at the top": (
        GOOD.replace("evaluate: null", "evalute: null"),
        ["mine.yaml:8: unknown key 'evalute'", "did you mean 'evaluate'?"],
    ),
    "misspelt key in evaluate": (
        GOOD.replace("evaluate: null", "evaluate: {max_kll: 1}"),
        ["mine.yaml:8: unknown key 'max_kll'", "did you mean 'max_kl'?"],
    ),
    "wrong type": (
        GOOD.replace("kv_heads: 1", "kv_heads: many"),
        ["mine.yaml:5: kv_heads should be a whole number or a list; it is 'many'"],
    ),
    "wrong choice": (
        GOOD.replace("method: mean", "method: average"),
        ["mine.yaml:6: method should be", "'mean', 'first' or 'random'", "it is 'average'"],
    ),
    "true is no number": (GOOD.replace("kv_heads: 1", "kv_heads: true"), ["mine.yaml:5: kv_heads", "it is True"]),
    "1.0 is no whole number": (GOOD.replace("kv_heads: 1", "kv_heads: 1.0"), ["mine.yaml:5: kv_heads", "it is 1.0"]),
    "two errors at once": (
        GOOD.replace("method: mean", "metod: mean").replace("heal: null", "heal: {method: lora}"),
        ["mine.yaml:6: unknown key 'metod'", "mine.yaml:7: heal names one of tokens, steps, minutes; it has none"],
    ),
    "missing field": (GOOD.replace("    kv_heads: 1\n", ""), ["mine.yaml:4: the key 'kv_heads' is missing"]),
    "missing operations": ("version: 1\nname: x\n", ["the key 'operations' is missing"]),
    "no operation": ("version: 1\nname: x\noperations: []\n", ["mine.yaml:3: operations should"]),
    "operation that is a word": ("version: 1\nname: x\noperations: [gqa]\n", ["mine.yaml:3", "key op"]),
    "unknown operation": (
        GOOD.replace("op: gqa", "op: qga"),
        [
            "mine.yaml:4: unknown operation 'qga'",
            "available: absorb, duo_attention, expand, gqa",
            "did you mean 'gqa'?",
        ],
    ),
    "operation of a later version": (
        GOOD.replace("op: gqa", "op: wavelets"),
        ["mine.yaml:4: unknown operation 'wavelets'", "newer version of attention-surgery"],
    ),
    "version 2": (GOOD.replace("version: 1", "version: 2"), ["mine.yaml:1: version should be 1; it is 2"]),
    "true is no version": (GOOD.replace("version: 1", "version: true"), ["mine.yaml:1: version should be 1"]),
    "1.0 is no version": (GOOD.replace("version: 1", "version: 1.0"), ["mine.yaml:1: version should be 1; it is 1.0"]),
    "true is no limit": (
        GOOD.replace("evaluate: null", "evaluate: {max_kl: true, windows: true, length: '16'}"),
        ["max_kl should be a number; it is True", "windows should be a whole number", "it is '16'"],
    ),
    "strict in every operation": (
        GOOD.replace("op: gqa", "op: expand")
        .replace("kv_heads: 1", "kv_heads: 9.0")
        .replace("    method: mean\n", ""),
        ["mine.yaml:5: kv_heads should be a whole number; it is 9.0"],
    ),
    "text from the root": (
        GOOD.replace("evaluate: null", "evaluate: {text: /etc/passwd}"),
        ["mine.yaml:8: evaluate.text of a recipe file", "evaluate.text=FILE"],
    ),
    "text above": (GOOD.replace("evaluate: null", "evaluate: {text: ../x}"), ["mine.yaml:8: evaluate.text", "'../x'"]),
    "text of Windows": (GOOD.replace("evaluate: null", "evaluate: {text: 'C:\\x'}"), ["mine.yaml:8: evaluate.text"]),
    "text at home": (GOOD.replace("evaluate: null", "evaluate: {text: ~/x}"), ["mine.yaml:8: evaluate.text"]),
    "healing": (
        GOOD.replace("heal: null", "heal: lora"),
        ["mine.yaml:7: heal should be a mapping of keys; it is 'lora'"],
    ),
    "duplicate key": (GOOD + "name: again\n", ["mine.yaml:9: 'name' is given twice"]),
    "alias bomb": (BOMB, ["mine.yaml:3: anchors and aliases", "not allowed"]),
    "tag": (
        GOOD.replace("name: mine", "name: !!python/object/apply:os.system ['touch run']"),
        ["mine.yaml:2: the tag", "not allowed"],
    ),
    "not YAML": ("version: [1\nname: x\n", ["mine.yaml:", "this is not YAML"]),
    "empty": ("", ["mine.yaml: the recipe is empty", "version, name", "surgery cp gqa"]),
    "only comments": ("# later\n", ["the recipe is empty"]),
    "a list": ("- op: gqa\n", ["mine.yaml: a recipe is a mapping", "surgery cp gqa"]),
    "a number for a key": (GOOD + "1: x\n", ["mine.yaml:9: the key 1 is not text"]),
    "nothing for a key": (GOOD + "~: x\n", ["mine.yaml:9: the key ~ is not text"]),
    "a date": (GOOD.replace("name: mine", "name: 2025-01-01"), ["mine.yaml:2: name should be text"]),
    "an impossible date": (GOOD.replace("name: mine", "name: 2025-13-45"), ["mine.yaml:2: this YAML cannot be read"]),
    "deep": ("x: " + "[" * 100_000, ["mine.yaml", "YAML"]),
    "huge": ("# " + "x" * (1 << 20) + "\n" + GOOD, ["mine.yaml: the file has 1,048,", "a recipe has at most 262,144"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_with_its_line(refused, model, tmp_path, name):
    content, says = FAULTS[name]
    (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
    refused("apply", "./mine.yaml", model, "-o", "out", says=says)
    refused("plan", tmp_path / "mine.yaml", model, says=says)


def test_two_errors_are_two_lines_and_one_object(refused, surgery, model, tmp_path):
    (tmp_path / "mine.yaml").write_text(FAULTS["two errors at once"][0], encoding="utf-8")
    assert len(surgery("plan", "./mine.yaml", model, "--json").json["others"]) == 1


def test_a_binary_file_is_no_recipe(refused, model, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\x93NUMPY\xff\xfe\x00" * 9)
    refused("apply", "mine.yaml", model, "-o", "out", says=["mine.yaml: the file is not UTF-8 text"])
    (tmp_path / "mine.yaml").write_bytes(b"\0" * 64)
    refused("apply", "mine.yaml", model, "-o", "out", says=["mine.yaml", "this is not YAML"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mqqa", ["unknown recipe 'mqqa'", "flexprefill, gqa-distill, gqa-uptrain, gqa", "did you mean 'mqa'?"]),
        ("zzzzzz", ["unknown recipe 'zzzzzz'", "flexprefill, gqa-distill, gqa-uptrain, gqa", "ends in .yaml"]),
        ("none.yaml", ["none.yaml: the recipe file does not exist", "surgery cp NAME"]),
        ("model/none", ["model/none: the recipe file does not exist", "surgery cp NAME"]),
        ("folder.yaml", ["folder.yaml: this is a folder, and a recipe is wanted"]),
        ("", ["unknown recipe ''", "flexprefill, gqa-distill, gqa-uptrain, gqa"]),
        ("ours", ["unknown recipe 'ours'", "did you mean 'ours.yaml'?"]),
        ("model", ["unknown recipe 'model'", "the recipe comes first, then the model"]),
    ],
)
def test_an_unknown_recipe_names_the_nearest(refused, model, tmp_path, name, says):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "ours.yaml").write_text(GOOD, encoding="utf-8")
    refused("apply", name, model, "-o", "out", says=says)
    refused("cp", name, says=says, has_json=False)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("kv_heads", ["override 'kv_heads'", "written key=value"]),
        ("=1", ["override '=1'", "written key=value"]),
        ("kv_head=1", ["no field 'kv_head'", "kv_heads, method", "did you mean 'kv_heads'?"]),
        ("expand.kv_heads=1", ["no field 'expand.kv_heads'", "kv_heads"]),
        ("version=2", ["no field 'version'"]),
        ("kv_heads=0", ["override 'kv_heads=0': kv_heads should be at least 1", "it is 0"]),
        ("kv_heads=-1", ["override 'kv_heads=-1': kv_heads should be", "it is -1"]),
        ("kv_heads=true", ["override 'kv_heads=true': kv_heads should be", "it is True"]),
        ("kv_heads=1.0", ["override 'kv_heads=1.0': kv_heads should be", "it is 1.0"]),
        ("grouping=", ["override 'grouping='", "it is None"]),
        ("kv_heads=[1", ["override 'kv_heads=[1'", "not YAML"]),
        ("kv_heads=&a 1", ["override 'kv_heads=&a 1'", "anchors", "in quotes"]),
        ("heal.freeze=*router*", ["override 'heal.freeze=*router*'", "not YAML", """such as '["*router*"]'"""]),
        ("heal.freeze=[*x]", ["anchors and aliases", """such as '["*router*"]'"""]),
        ("kv_heads=!!python/name:os.system x", ["not allowed"]),
        ("evaluate.max_kll=1", ["no field 'evaluate.max_kll'", "did you mean 'evaluate.max_kl'?"]),
        ("max_kl=-1", ["override 'max_kl=-1': max_kl should be at least 0"]),
        ("max_kl=.inf", ["max_kl should be a finite number; it is inf"]),
        ("max_kl=.nan", ["max_kl should be"]),
        ("kv_heads=0x" + "f" * 5000, ["kv_heads", "so many digits"]),
        ("method=" + "x" * 5000, ["method should be", "'xxxxx", "..."]),
        ("evaluate=5", ["override 'evaluate=5': evaluate should be"]),
        ("heal=lora", ["override 'heal=lora': heal should be a mapping of keys; it is 'lora'"]),
        ("heal.stpes=1", ["no field 'heal.stpes'", "did you mean 'heal.steps'?"]),
        ("operations.7.kv_heads=1", ["no field 'operations.7.kv_heads'"]),
    ],
)
def test_a_bad_override_names_itself(refused, model, override, says):
    refused("apply", "gqa", model, override, "-o", "out", says=says)


TWO = GOOD.replace("kv_heads: 1", "kv_heads: 3").replace("heal:", "  - op: expand\n    kv_heads: 9\nheal:")


def test_an_ambiguous_override_asks_for_the_whole_name(refused, surgery, model, tmp_path):
    (tmp_path / "two.yaml").write_text(TWO, encoding="utf-8")
    says = ["'kv_heads' could mean several fields", "operations.0.kv_heads, operations.1.kv_heads", "write one"]
    refused("apply", "two.yaml", model, "kv_heads=1", "-o", "out", says=says)
    for override, result in (("gqa.kv_heads=1", 9), ("operations.1.kv_heads=3", 3), ("method=first", 9)):
        plan = surgery("plan", "two.yaml", model, override, "--json").json
        assert plan["layers"][0]["after"]["kv_heads"] == result


def test_overrides_of_the_gate_and_of_a_recipe_without_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD, encoding="utf-8")
    loaded = recipes.load(tmp_path / "mine.yaml", ["max_kl=0.5", "evaluate.windows=2", "seed=3"])
    assert loaded.evaluate.limits == {"max_kl": 0.5}
    assert loaded.evaluate.windows == 2
    assert loaded.operations[0].seed == 3
    assert recipes.load("gqa", kv_heads=3).operations[0].kv_heads == 3
    assert recipes.load("gqa", ["evaluate=null"]).evaluate is None


def test_data_in_place_of_a_file_is_checked_as_a_file_is():
    data = yaml.safe_load(GOOD)
    assert recipes.load(data).name == "mine"
    assert "evaluate" in data, "the caller's data is untouched"
    with pytest.raises(SurgeryError, match="unknown key 'nme'"):
        recipes.load(data | {"nme": 1})
    loaded = recipes.load("gqa")
    assert recipes.load(loaded) == loaded


def test_data_that_yaml_has_no_word_for_is_refused():
    with pytest.raises(SurgeryError):
        recipes.load({"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": object()}]})
    with pytest.raises(SurgeryError):
        recipes.load("gqa", kv_heads=object())


def test_fields_of_a_recipe_run_nothing(refused, model, tmp_path):
    """A field that names a module or holds a template is text like any other."""
    (tmp_path / "mine.yaml").write_text(GOOD.replace("op: gqa", "op: os.path"), encoding="utf-8")
    refused("plan", "mine.yaml", model, says=["unknown operation 'os.path'"])
    (tmp_path / "mine.yaml").write_text(GOOD.replace("op: gqa", "op: ../gqa"), encoding="utf-8")
    refused("plan", "mine.yaml", model, says=["unknown operation '../gqa'"])


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_a_recipe_that_was_written_out_means_the_same(model, name):
    """As in surgery.json, and as the search makes its options: every default is named."""
    fewer = {"last_layers_full": 1} if name == "moba-heal" else {}  # this model has two layers, and 1,024 positions
    rows = ["heal.length=1024"] if name in ("gqa-distill", "hybrid-swa-heal", "moba-heal") else []
    once = recipes.load(name, rows, **fewer)
    again = recipes.load(once.to_dict())
    assert again.to_dict() == once.to_dict()
    anatomy = Anatomy.of(model)
    plans = [make_plan(each, anatomy, "m", model) for each in (once, again)]
    assert plans[0].to_dict() == plans[1].to_dict()


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_every_shipped_recipe_loads_and_plans(surgery, model, name):
    fewer = ["last_layers_full=1"] if name == "moba-heal" else []  # this model has two layers, and 1,024 positions
    fewer += ["heal.length=1024"] if name in ("gqa-distill", "hybrid-swa-heal", "moba-heal") else []
    planned = surgery("plan", name, model, *fewer, "--json")
    assert planned.code == 0, planned.err
    assert planned.json["recipe"]["name"] == name, "a recipe is named as its file"
    assert planned.json["layers"][0]["before"]["kv_heads"] == 3
    assert recipes.load(name).description


def test_schema_knows_every_key_of_every_shipped_recipe(surgery):
    schema = surgery("schema").json
    assert schema["$schema"].startswith("https://json-schema.org/")
    operations = {
        part["properties"]["op"]["const"]: part for part in schema["properties"]["operations"]["items"]["oneOf"]
    }
    evaluate = schema["$defs"]["Evaluate"]["properties"]
    for file in recipes.shipped().values():
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert set(data) <= set(schema["properties"])
        assert set(data["evaluate"] or {}) <= set(evaluate)
        for step in data["operations"]:
            part = operations[step["op"]]
            assert set(part["required"]) <= set(step) <= set(part["properties"])
            assert part["additionalProperties"] is False
            assert all(field.get("description") for name, field in part["properties"].items() if name != "op")
    assert set(schema["required"]) == {"version", "name", "operations"}
    assert "#/$defs" not in str(schema["properties"]["operations"]), "an operation's references must resolve"


def test_cp_then_edit_then_apply_by_path(surgery, refused, model, tmp_path):
    assert surgery("cp", "gqa").out == "wrote gqa.yaml\n"
    refused("cp", "gqa", says=["gqa.yaml: the file exists", "name another file"], has_json=False)
    refused("cp", "gqa", tmp_path / "none" / "x.yaml", says=["none"], code=5, has_json=False)
    (tmp_path / "mine").mkdir()
    assert surgery("cp", "gqa", "mine").out == "wrote mine/gqa.yaml\n"
    copied = tmp_path / "gqa.yaml"
    assert copied.read_bytes() == recipes.shipped()["gqa"].read_bytes()
    copied.write_text(copied.read_text(encoding="utf-8").replace("kv_heads: null", "kv_heads: 3"), encoding="utf-8")
    done = surgery("apply", "gqa.yaml", model, "-o", "out", "--no-check", "--no-eval", "--json")
    assert done.code == 0, done.err
    assert done.json["plan"]["changes"] == ["nothing: there are 3 KV heads already"]


def test_an_override_inside_a_word_names_the_word(refused, model, tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD.replace("evaluate: null", "evaluate: 5"), encoding="utf-8")
    says = ["mine.yaml:8: evaluate should be a mapping of keys; it is 5"]
    refused("plan", "mine.yaml", model, "max_kl=1", says=says)


def test_an_override_may_name_any_text(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD.replace("evaluate: null", "evaluate: {text: /x}"), encoding="utf-8")
    assert recipes.load(tmp_path / "mine.yaml", ["evaluate.text=../y"]).evaluate.text == "../y"
    assert recipes.load(tmp_path / "mine.yaml", ["evaluate={text: /z}"]).evaluate.text == "/z"
    assert recipes.load("gqa", ["evaluate.text=/y"]).evaluate.text == "/y"


def test_a_recipe_of_plain_operations_is_one_error():
    with pytest.raises(SurgeryError, match="a Recipe holds operations") as caught:
        recipes.Recipe(operations=[{"op": "gqa", "kv_heads": 1}])
    assert "plain data" in caught.value.fix


def test_a_recipe_knows_where_it_is_from_and_what_was_changed(tmp_path):
    loaded = recipes.load("gqa", ["method=first"], kv_heads=3)
    assert (loaded.source, loaded.overrides) == ("gqa", ("method=first", "kv_heads=3"))
    again = recipes.load(loaded, **{"evaluate.max_kl": 2, "description": "two words"})
    assert again.source == "gqa"
    assert again.overrides == ("method=first", "kv_heads=3", "evaluate.max_kl=2", "description=two words")
    (tmp_path / "gqa.yaml").write_text(GOOD, encoding="utf-8")
    assert recipes.load(tmp_path / "gqa.yaml").source == "file"
    assert recipes.load(yaml.safe_load(GOOD)).source == "data"


def test_whole_numbers_are_numbers():
    assert recipes.load("gqa", ["max_kl=1"]).evaluate.max_kl == 1.0
    assert recipes.load("duo-attention", streaming_ratio=1).operations[0].streaming_ratio == 1.0
