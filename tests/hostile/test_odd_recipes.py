"""Recipes and overrides that are odd: numbers in other spellings, the same word twice, fields of another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import TINY
from transformers import AutoModelForCausalLM

from surgery import SurgeryError
from surgery import apply as apply_recipe
from surgery import load as load_folder
from surgery import plan as make_plan

GQA = "version: 1\nname: x\noperations: [{op: gqa, kv_heads: 2, method: mean}]\nevaluate: null\n"
MASK = "version: 1\nname: x\noperations: [{op: head_mask, values: %s}]\nevaluate: null\n"
QUICK = {"check": False, "evaluate": False}
IDS = torch.arange(3, 23)[None]


def known(*operations, **more) -> dict:
    return {"version": 1, "name": "x", "operations": list(operations), "evaluate": None} | more


def written(text: str) -> str:
    Path("r.yaml").write_bytes(text.encode())
    return "r.yaml"


# --- texts that are refused, in one sentence ------------------------------------------------------

LONG = "9" * 5000
REFUSED = {
    "merge key": (GQA.replace("{op", "{<<: {seed: 1}, op"), "r.yaml:3"),
    "a key that is a list": (f"{GQA}? [a, b]\n: 1\n", "r.yaml:5"),
    "two documents": (f"{GQA}---\n{GQA}", "r.yaml:5"),
    "another version of YAML": (f"%YAML 9.9\n---\n{GQA}", "r.yaml:1"),
    "a no-break space for a space": (GQA.replace("kv_heads: 2", "kv_heads:\u00a02"), "did you mean 'kv_heads'?"),
    "a Cyrillic letter": (GQA.replace("heads", "he\u0430ds"), "did you mean 'kv_heads'?"),
    "a wide digit": (GQA.replace("2", "\uff12"), "kv_heads should be a whole number"),
    "half a letter": (f'{GQA}description: "\\ud800"\n', "r.yaml:5"),
    "a digit group": (GQA.replace("2", "2_0"), "cannot become 20"),
    "minutes and seconds": (GQA.replace("2", "1:02"), "cannot become 62"),
    "a power of ten": (GQA.replace("2", "2e0"), "kv_heads should be a whole number"),
    "a name that is yes": (GQA.replace("name: x", "name: yes"), "r.yaml:2: name should be text; it is True"),
    "a name that is a date": (GQA.replace("name: x", "name: 2020-01-01"), "r.yaml:2: name should be text"),
    "align: no": (GQA.replace("mean}", "mean, align: no}"), "align should be 'none' or 'procrustes'; it is False"),
    "method: on": (GQA.replace("mean", "on"), "method should be"),
    "kv_heads: off": (GQA.replace("2", "off"), "kv_heads should be a whole number"),
    "a layer that is true": (GQA.replace("2", "[true, 2]"), "kv_heads should be"),
    "a layer below nothing": (GQA.replace("2", "[-1, 2]"), "kv_heads should be"),
    "no layers": (GQA.replace("2", "[]"), "kv_heads lists 0 layers, the model has 2"),
    "many layers": (GQA.replace("2", f"[{', '.join('2' * 60_000)}]"), "kv_heads lists 60000 layers"),
    "lists in a list": (GQA.replace("2", "[[2, 2]]"), "kv_heads should be"),
    "a set": (GQA.replace("2", "{2, 2}"), "'2' is given twice"),
    "no operations": (GQA.replace("[{op: gqa, kv_heads: 2, method: mean}]", "[]"), "operations should be a list"),
    "one operation, no list": (GQA.replace("[{", "{").replace("}]", "}"), "operations should be a list"),
    "an operation in capitals": (GQA.replace("op: gqa", "op: GQA"), "unknown operation 'GQA'"),
    "an operation and a space": (GQA.replace("op: gqa", "op: 'gqa '"), "did you mean 'gqa'?"),
    "an operation as a module": (GQA.replace("op: gqa", "op: 'gqa.operation:GQA'"), "unknown operation"),
    "healing in an operation": (GQA.replace("mean}", "mean, heal: {steps: 1}}"), "unknown key 'heal'"),
    "a field of an operation at the top": (f"{GQA}kv_heads: 2\n", "r.yaml:5: unknown key 'kv_heads'"),
    "a field of evaluate at the top": (f"{GQA}max_kl: 2\n", "r.yaml:5: unknown key 'max_kl'"),
    "operations in healing": (GQA.replace("evaluate: null", "heal: {steps: 1, operations: []}"), "unknown key"),
    "probes in a probe": (GQA.replace("null", "{probes: {perplexity: {probes: {}}}}"), "unknown key 'probes'"),
    "a probe in capitals": (GQA.replace("null", "{probes: {Perplexity: {}}}"), "unknown probe 'Perplexity'"),
    "a probe by its number": (GQA.replace("null", "{probes: {1: {}}}"), "the key 1 is not text"),
    "probes as a list": (GQA.replace("null", "{probes: [perplexity]}"), "probes should be a mapping of keys"),
    "needles of no length": (GQA.replace("null", "{probes: {needles: {lengths: []}}}"), "at least one length"),
    "one key of several": (GQA.replace("null", "{probes: {multi_needle: {keys: 1}}}"), "keys should be at least 2"),
    "a limit that is no number": (GQA.replace("null", "{max_kl: .nan}"), "max_kl should be a finite number"),
    "a limit without end": (GQA.replace("null", "{probes: {perplexity: {max_kl: -.inf}}}"), "should be"),
    "a share above one": (GQA.replace("null", "{min_top1: 1.01}"), "r.yaml:4"),
    "no text": (GQA.replace("null", "{text: ''}"), "r.yaml:4"),
    "a gate that is no number": (MASK % "{0: {0: .nan}}", "values should be"),
    "a gate without end": (MASK % "{0: [.inf, 1, 1, 1, 1, 1, 1, 1]}", "values should be"),
    "a layer before the first": (MASK % "{-1: {0: 0.0}}", "the key -1 is not text"),
    "a layer and a half": (MASK % "{0.5: {0: 0.0}}", "the key 0.5 is not text"),
    "a layer in two spellings": (MASK % "{0: {0: 0.0}, '0': {1: 0.0}}", "'0' is given twice"),
    "a layer with a zero before it": (MASK % "{'00': {0: 0.0}, 0: {1: 0.0}}", "values should be"),
    "a head in two spellings": (MASK % "{0: {1: 0.0, '1': 0.5}}", "'1' is given twice"),
    "a layer without gates": (MASK % "{0: []}", "layer 0 has 8 query heads (0 to 7), and 0 gates"),
    "a limit as people write it": (GQA.replace("null", "{max_kl: 1e-3}"), "1.0e-3"),
    "a limit in a block": (GQA.replace("null", "{probes: {perplexity: {max_kl: 5E2}}}"), "5.0e+2"),
    "a gate as people write it": (MASK % "{0: {0: -1.5e3}}", "-1.5e+3"),
    "a layer of 5,000 digits": (MASK % f"{{? '{LONG}' : {{0: 0.0}}}}", "values should be"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_a_text_that_is_refused(refused, base, text, says):
    written(text)
    ran = refused("plan", "r.yaml", base, says=[says])
    assert len(ran.err) < 3000


# --- texts that are odd and right -----------------------------------------------------------------

ACCEPTED = {
    "a byte-order mark": (f"\ufeff{GQA}", 2),
    "lines of Windows": (GQA.replace("\n", "\r\n"), 2),
    "lines of old Macs": (GQA.replace("\n", "\r"), 2),
    "a version of YAML": (f"%YAML 1.2\n---\n{GQA}", 2),
    "one document that ends": (f"---\n{GQA}...\n", 2),
    "hexadecimal": (GQA.replace("2", "0x2"), 2),
    "keys in quotes": (GQA.replace("kv_heads", "'kv_heads'"), 2),
    "all as JSON": (json.dumps(known({"op": "gqa", "kv_heads": 2, "method": "mean"})), 2),
    "the same thrice": (GQA.replace("}]", "}, {op: gqa, kv_heads: 2}, {op: gqa, kv_heads: 2, method: first}]"), 2),
    "a limit of minus zero": (GQA.replace("null", "{max_kl: -0.0}"), 2),
    "a limit of 39 digits": (GQA.replace("null", f"{{max_kl: {'9' * 39}}}"), 2),
    "no probe by its name": (GQA.replace("null", "{probes: {perplexity: null, needles: ~}}"), 2),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_text_that_is_right(surgery, base, name):
    text, kv_heads = ACCEPTED[name]
    ran = surgery("plan", written(text), base, "--json")
    assert ran.code == 0, ran.out
    assert [layer["after"]["kv_heads"] for layer in ran.json["layers"]] == [kv_heads] * 2


# --- overrides ------------------------------------------------------------------------------------

BAD_OVERRIDES = [
    "operations.\u00b2.kv_heads=1",
    f"operations.{LONG}.kv_heads=1",
    "operations.-1.kv_heads=1",
    "operations.2.kv_heads=1",
    "operations.0=5",
    "operations=[]",
    "version=1",
    "grouping=",
    "kv_heads==1",
    "kv_heads=1=1",
    "kv_heads='1'",
    "kv_heads=1\nmethod: first",
    "kv_heads=!!int 1",
    "kv_heads=&a 1",
    "kv_heads={1: 1}",
    "kv_heads=2020-01-01",
    "kv_heads=\x00",
    "kv_heads=\udcff",
    "\udcff=1",
    "gqa.=1",
    "gqa..kv_heads=1",
    "gqa.op=expand",
    "evaluate=5",
    "evaluate.probes.=1",
    "evaluate.probes.perplexity.windows.x=1",
    "evaluate.max_kl=.inf",
    "heal=[]",
    "heal.=1",
    "heal.steps=nan",
]


@pytest.mark.parametrize("override", BAD_OVERRIDES, ids=lambda text: repr(text)[1:40])
def test_an_override_that_is_refused(surgery, base, override):
    ran = surgery("plan", written(GQA), base, override)
    assert ran.code == 2, ran.err[-300:]
    assert ran.err.count("error:") == 1
    assert "Traceback" not in ran.err
    assert "override" in ran.err


def test_an_override_that_repeats(surgery, base):
    """The last one is meant, as of options everywhere."""
    ran = surgery("plan", written(GQA), base, "kv_heads=4", "gqa.kv_heads=2", "operations.0.kv_heads=1", "--json")
    assert ran.json["recipe"]["operations"][0]["kv_heads"] == 1
    assert [layer["after"]["kv_heads"] for layer in ran.json["layers"]] == [1, 1]


def test_one_budget_takes_the_place_of_another(base):
    made = make_plan(known({"op": "gqa", "kv_heads": 2, "method": "mean"}), base, overrides=["heal.steps=1"])
    assert made.recipe.heal.steps == 1
    again = make_plan(made.recipe, base, overrides=["heal.tokens=64", "heal.steps=3", "heal.minutes=1"])
    assert (again.recipe.heal.steps, again.recipe.heal.tokens, again.recipe.heal.minutes) == (None, None, 1)


def test_a_limit_of_a_block_that_is_null(surgery, base):
    ran = surgery("plan", written(GQA), base, "evaluate.max_kl=1", "evaluate=null", "--json")
    assert ran.json["recipe"]["evaluate"] is None


def test_an_override_reads_no_more_than_one_field(surgery, base):
    """A comment and the mark of a document are YAML's; what follows them is no field."""
    ran = surgery("plan", written(GQA), base, "kv_heads=1 # {method: first}", "--json")
    assert ran.json["recipe"]["operations"][0]["kv_heads"] == 1
    assert ran.json["recipe"]["operations"][0]["method"] == "mean"


# --- plain data in place of a file ----------------------------------------------------------------


def test_one_list_for_several_layers(base):
    """A keyword holds one Python list twice, as dict.fromkeys gives it."""
    made = make_plan(known({"op": "head_mask", "values": {}}), base, values=dict.fromkeys(range(2), [0.0] + [1.0] * 7))
    assert made.recipe.operations[0].values == {0: [0.0] + [1.0] * 7, 1: [0.0] + [1.0] * 7}


def test_one_list_for_several_layers_in_the_data(base):
    made = make_plan(known({"op": "head_mask", "values": dict.fromkeys(range(2), [0.0] + [1.0] * 7)}), base)
    assert made.recipe.operations[0].values[1] == [0.0] + [1.0] * 7


def endless() -> dict:
    data = known({"op": "gqa", "kv_heads": 2})
    data["operations"][0]["seed"] = data
    return data


def deep() -> dict:
    value: list = []
    for _ in range(3000):
        value = [value]
    return known({"op": "gqa", "kv_heads": value})


DATA = {
    "holds itself": endless,
    "nested 3,000 deep": deep,
    "a key that is None": lambda: known({"op": "gqa", "kv_heads": 2}, **{"x": 1}) | {None: 1},
    "a key that is 5": lambda: known({"op": "gqa", "kv_heads": 2, 5: 1}),
    "a key that is True": lambda: known({"op": "gqa", "kv_heads": 2, True: 1}),
    "a gate in words": lambda: known({"op": "head_mask", "values": {0: {0: "loud"}}}),
    "a long key": lambda: known({"op": "head_mask", "values": {LONG: {0: 0.0}}}),
    "a long head": lambda: known({"op": "head_mask", "values": {0: {LONG: 0.0}}}),
    "a tensor": lambda: known({"op": "gqa", "kv_heads": torch.tensor(2)}),
    "a lambda": lambda: known({"op": "gqa", "kv_heads": lambda: 2}),
    "bytes": lambda: known({"op": "gqa", "kv_heads": 2, "method": b"mean"}),
    "nothing but a name": lambda: {"name": "x"},
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_are_refused(base, name):
    with pytest.raises(SurgeryError) as fault:
        make_plan(DATA[name](), base)
    assert len(str(fault.value)) < 3000


def test_a_keyword_that_is_nested_deep_is_refused(base):
    with pytest.raises(SurgeryError, match="kv_heads: this is nested more than 100 levels deep"):
        make_plan(known({"op": "gqa", "kv_heads": 2}), base, kv_heads=deep())


def test_data_stay_as_they_were(base):
    """What a script holds is not changed by overrides, and a later change of it does not reach the plan."""
    data = known({"op": "gqa", "kv_heads": 2, "method": "mean"})
    before = json.dumps(data)
    made = make_plan(data, base, overrides=["kv_heads=1", "heal.steps=1", "evaluate.max_kl=0"])
    assert json.dumps(data) == before
    data["operations"][0]["kv_heads"] = 4
    assert made.recipe.operations[0].kv_heads == 1


# --- operations that meet -------------------------------------------------------------------------


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_same_mask_twice_is_its_square():
    step = {"op": "head_mask", "values": {0: {1: 0.5}, 1: {7: -3.0}}}
    model, before = TINY["llama"](), TINY["llama"]()
    apply_recipe(known(step, step), model)
    expected = [before.model.layers[i].self_attn.o_proj.weight.detach().clone() for i in range(2)]
    expected[0][:, 8:16] *= 0.25
    expected[1][:, 56:64] *= 9.0
    for i in range(2):
        assert torch.allclose(model.model.layers[i].self_attn.o_proj.weight, expected[i], rtol=1e-6, atol=0)


def test_a_mask_that_is_undone():
    model, before = TINY["llama"](), TINY["llama"]()
    step = [{"op": "head_mask", "values": {0: [gate] * 8, 1: [gate] * 8}} for gate in (4.0, 0.25)]
    apply_recipe(known(*step), model)
    assert torch.equal(logits(model), logits(before))


def test_heads_are_repeated_and_merged_again():
    """The mean of equal heads is that head, to the bit."""
    model, before = TINY["qwen3"](), TINY["qwen3"]()
    apply_recipe(known({"op": "expand", "kv_heads": 8}, {"op": "gqa", "kv_heads": 4, "method": "mean"}), model)
    after, expected = model.state_dict(), before.state_dict()
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_two_merges_are_one():
    model, other = TINY["llama"](), TINY["llama"]()
    step = [{"op": "gqa", "kv_heads": n, "method": "mean"} for n in (2, 1)]
    apply_recipe(known(*step), model)
    apply_recipe(known(step[1]), other)
    for name, tensor in other.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, atol=1e-6), name


SPLIT = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 4}
CONFLICTS = {
    "split twice": ([SPLIT, SPLIT], "duo_attention before it sets the visibility"),
    "a merge after a split": ([SPLIT, {"op": "gqa", "kv_heads": 2, "method": "mean"}], "weight rewrites come before"),
    "gates of two kinds": ([{"op": "moh", "router": "zero"}, {"op": "mae", "router": "zero"}], "sets the gate"),
    "a share and a threshold": ([SPLIT | {"threshold": 0.5}], "threshold both choose the heads"),
    "all kept and all streaming": ([SPLIT | {"per_layer_min_retrieval": 5}], "a layer has only 4 KV heads"),
    "a layer that is not there": ([SPLIT | {"protect_layers": [2]}], "there are layers 0 to 1"),
    "values and scores": ([{"op": "head_mask", "values": {}, "scores": "s.json"}], "either values or scores"),
    "a mask of a head that went": (
        [{"op": "prune_heads", "granularity": "head", "heads": [[3], [3]], "refit": False},
         {"op": "head_mask", "values": {0: {3: 0.0}}}],
        "layer 0 has no query heads [3]",
    ),
    "heads that went twice": (
        [{"op": "prune_heads", "granularity": "head", "heads": [[3], [3]], "refit": False}] * 2,
        "3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_operations_that_cannot_meet(base, tmp_path, name):
    steps, says = CONFLICTS[name]
    for call in (
        lambda: make_plan(known(*steps), base),
        lambda: apply_recipe(known(*steps), AutoModelForCausalLM.from_pretrained(base)),
        lambda: apply_recipe(known(*steps), base, output=tmp_path / "out", **QUICK),
    ):
        with pytest.raises(SurgeryError) as fault:
            call()
        assert says in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_layer_listed_twice_counts_once(base):
    made = make_plan(known(SPLIT | {"protect_layers": [0, 0, 0]}), base)
    assert [len(layer.streaming) for layer in made.after.layers] == [0, 4]


# --- the gate at its ends -------------------------------------------------------------------------

EVALUATE = {"text": "builtin", "windows": 1, "length": 32, "max_kl": 0, "max_perplexity_ratio": 1}
SAME = {"op": "head_mask", "values": {}}


@pytest.mark.parametrize(
    ("step", "more", "status"),
    [
        (SAME, {}, "passed"),
        (SAME, {"max_kl": 1e-300}, "passed"),
        ({"op": "head_mask", "values": {0: {0: 0.0}}}, {}, "failed"),
        ({"op": "head_mask", "values": {0: {0: 0.0}}}, {"max_kl": 1e300, "max_perplexity_ratio": 1e300}, "passed"),
        (SAME, {"max_perplexity_ratio": 0}, "failed"),
        (SAME, {"max_kl": None, "max_perplexity_ratio": None}, None),
    ],
    ids=["no change, limits of nothing", "tiny limit", "a change, limits of nothing", "huge", "ratio 0", "no limit"],
)
def test_limits_at_their_ends(base, tmp_path, step, more, status):
    """A model that says what its base says is within a limit of nothing."""
    recipe = known(step, evaluate=EVALUATE | more)
    report = apply_recipe(recipe, base, output=tmp_path / "out", check=False)
    assert report.gate == (status or report.gate)
    assert status is not None or report.gate not in ("passed", "failed")


def test_gates_as_small_and_large_as_numbers_go(base, tmp_path):
    """A weight that float32 cannot hold is refused; one that it rounds to nothing silences the head."""
    with pytest.raises(SurgeryError, match="larger than float32 holds"):
        apply_recipe(known({"op": "head_mask", "values": {0: {0: 1e300}}}), base, output=tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    step = {"op": "head_mask", "values": {0: {0: 5e-324, 1: -0.0}}}
    apply_recipe(known(step), base, output=tmp_path / "out", **QUICK)
    weight = load_folder(tmp_path / "out").model.layers[0].self_attn.o_proj.weight
    assert not weight[:, :16].any()
    assert weight[:, 16:].abs().min() > 0


def test_names_that_need_care(surgery, base, tmp_path):
    """A name may hold what Markdown, YAML and a shell read as their own."""
    name = "a: |b` $(id) <script>\n---\n# x"
    recipe = known({"op": "gqa", "kv_heads": 2, "method": "mean"}) | {"name": name, "description": "{{ x }} \u202e"}
    apply_recipe(recipe, base, output=tmp_path / "out", **QUICK)
    assert json.loads((tmp_path / "out/surgery.json").read_text())["recipe"]["name"] == name
    from surgery.io.files import split_card

    metadata, _ = split_card((tmp_path / "out/README.md").read_text())
    assert metadata
    assert surgery("check", "out").code == 0


def test_a_name_that_is_no_text(base, tmp_path):
    recipe = known({"op": "gqa", "kv_heads": 2, "method": "mean"}) | {"name": "x\ud800"}
    with pytest.raises(SurgeryError):
        apply_recipe(recipe, base, output=tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
