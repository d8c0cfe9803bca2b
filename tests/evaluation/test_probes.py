"""The registry of probes: what each class promises, both spellings of a recipe, the command, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import WORDS

from surgery.config import recipe as recipes
from surgery.config.evaluate import Evaluate
from surgery.errors import SurgeryError
from surgery.evaluation import probes
from surgery.evaluation.probes import settings
from surgery.report.gate import gate

STEP = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}


def asked(evaluate: dict) -> dict[str, dict]:
    """Probe -> settings of a recipe, by way of its checked form and of what surgery.json keeps."""
    loaded = recipes.load(STEP | {"evaluate": evaluate})
    kept = settings.requested_probes(json.loads(json.dumps(loaded.to_dict()["evaluate"])))
    assert kept == loaded.evaluate.asked
    again = recipes.load(loaded)
    assert again.evaluate.asked == loaded.evaluate.asked, "a recipe that is loaded again asks for the same"
    assert again.evaluate.limits == loaded.evaluate.limits
    return {probe.name: probe.model_dump() for probe in loaded.evaluate.asked}


# --- what a class promises ------------------------------------------------------------------------------------------


def test_one_probe_is_always_run():
    assert [cls.main for cls in probes.every()].count(True) == 1


@pytest.mark.parametrize("name", probes.REGISTRY)
def test_a_class_keeps_the_contract(name):
    cls = probes.find(name)
    assert cls.name == name
    assert cls.summary
    assert cls.__doc__
    assert all(info.description for info in cls.model_fields.values()), "a setting says what it is"
    assert cls() == cls.model_validate(cls().model_dump(exclude_unset=True)), "every setting has a default"
    for limit, bound in cls.limits.items():
        assert limit.startswith("min_" if bound.at_least else "max_")
        assert bound.description
        assert limit not in cls.model_fields
    flags, known = cls.aliases.flags.values(), cls.model_fields
    assert {flag.key for flag in flags} | {alias.key for alias in cls.aliases.recipe.values()} <= set(known)
    assert set(cls.aliases.last) <= set(cls.aliases.limits) <= set(cls.limits)
    assert cls.paragraph({"status": "not run", "reason": "no room"}) if not cls.main else True


def test_names_of_limits_and_of_keys_do_not_collide():
    limits = [name for cls in probes.every() for name in cls.limits]
    assert len(limits) == len(set(limits)) == len(probes.limits())
    flat = [name for cls in probes.every() for name in (*cls.aliases.recipe, *cls.aliases.limits)]
    assert len(flat) == len(set(flat))
    assert set(Evaluate.model_fields) == {"text", "probes", *flat}


@pytest.mark.parametrize("name", probes.REGISTRY)
def test_a_limit_without_figures_is_not_run_and_never_passed(name):
    sides = {"perplexity": 2.0, "cross_entropy": 0.7}
    done = {"status": "done", "base": sides, "out": sides, "kl": {"mean": 0.0}, "top1_agreement": 1.0}
    cls = probes.find(name)
    for limit in cls.limits:
        if not cls.main:
            by_item = cls.limits[limit].by_item
            limits, said = {limit: {"piqa": 0.0} if by_item else 0.0}, f"{limit} piqa" if by_item else limit
            status, (reason,) = gate(done, limits)
            assert status == "not run"
            assert reason.startswith(f"{said}: ")
            status, reasons = gate(done | {name: {"status": "not run", "reason": "no room"}}, limits)
            assert (status, reasons) == ("not run", [f"{said}: no room"])


def test_the_command_and_the_schema_import_nothing_heavy():
    code = (
        "import sys, surgery.cli.main\n"
        "from surgery.config.recipe import schema\n"
        "from surgery.evaluation import probes\n"
        "schema(); probes.every()\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_other_module_names_a_probe():
    """As a text: to branch on, or to look up with. `compare` may, and so may functions that are named as probes."""
    package = Path(probes.__file__).parents[2]
    home = Path(probes.__file__).parent
    others = {name for name in probes.REGISTRY if not probes.find(name).main}
    for path in package.rglob("*.py"):
        named = package / "evaluation/evaluate.py", package / "evaluation/comparison/measures.py"
        if path.parent == home or path in named or "data" in path.parts:
            continue
        text = path.read_text(encoding="utf-8").replace('("prompt", "choices", "answer")', "")
        if path.parent.name == "harness":  # lm-eval's own word
            text = text.replace('"tasks"', "")
        if path.name == "llama_cpp_server.py":  # a key of the answers of llama.cpp's server
            text = text.replace('"choices"', "")
        for name in others:
            assert f'"{name}"' not in text, path


# --- both spellings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "block"),
    [
        ({"windows": 3, "length": 64}, {"perplexity": {"windows": 3, "length": 64}}),
        ({"needles": 24}, {"needles": {"cases": 24, "length": 1024}}),
        ({"needles": 10, "needle_length": 512}, {"needles": {"cases": 10, "length": 512}}),
        ({"choices": 40}, {"choices": {"items": 40}}),
        ({"needles": 8, "choices": 40}, {"needles": {"cases": 8, "length": 1024}, "choices": {"items": 40}}),
    ],
)
@pytest.mark.parametrize("text", ["builtin", "words.txt"])
def test_an_alias_and_a_block_ask_for_the_same(flat, block, text):
    assert asked({"text": text, **flat}) == asked({"text": text, "probes": block})


def test_limits_of_both_spellings_are_one_gate():
    flat = {"max_kl": 1.0, "needles": 24, "min_needles": 0.9}
    blocks = {"perplexity": {"max_kl": 1.0}, "needles": {"cases": 24, "length": 1024, "min_needles": 0.9}}
    loaded = [recipes.load(STEP | {"evaluate": each}).evaluate for each in (flat, {"probes": blocks})]
    assert loaded[0].limits == loaded[1].limits == {"max_kl": 1.0, "min_needles": 0.9}
    assert loaded[0].asked == loaded[1].asked


def test_the_main_probe_is_asked_and_others_only_where_they_are_named():
    assert list(asked({})) == ["perplexity"]
    assert list(asked({"probes": {"choices": {}}})) == ["perplexity", "choices"]
    assert list(asked({"probes": {"choices": None}})) == ["perplexity"]
    assert list(asked({"needles": 0, "choices": 0})) == ["perplexity"]


def test_a_block_may_have_a_text_of_its_own():
    found = asked({"text": "a.txt", "probes": {"needles": {"text": "b.txt"}, "choices": {"labelled": "q.jsonl"}}})
    assert [each["text"] for each in found.values()] == ["a.txt", "b.txt", "builtin"]


@pytest.mark.parametrize(
    ("given", "places", "repetitions"),
    [
        ({"cases": 24, "length": 512}, (0.1, 0.25, 0.4, 0.55), 6),
        ({"cases": 5, "lengths": "512,1k", "depths": 1}, (0.5,), 3),
        ({"cases": 4, "depths": [0.0, 1.0], "length": 64}, (0.0, 1.0), 2),
        ({"depths": 3, "samples": 7}, (0.25, 0.5, 0.75), 7),
    ],
)
def test_needles_in_all_are_at_least_so_many(given, places, repetitions):
    probe = settings.make("needles", given)
    assert (probe.depth_shares, probe.repetitions) == (places, repetitions)
    if "cases" in given:
        cells = len(probe.tokens) * len(places)
        assert given["cases"] <= cells * repetitions < given["cases"] + cells


def test_what_surgery_json_keeps_of_a_recipe_without_blocks_has_no_new_key():
    kept = recipes.load(STEP | {"evaluate": {"needles": 3}}).to_dict()["evaluate"]
    assert "probes" not in kept
    assert set(kept) == set(Evaluate.model_fields) - {"probes"}, "every default is written out"


def test_overrides_reach_into_a_block():
    texts = ["evaluate.probes.needles.cases=8", "needles.length=512", "evaluate.probes.needles.min_needles=0.5"]
    loaded = recipes.load("duo-after-gqa", ["evaluate={max_kl: 1}", *texts]).evaluate
    assert loaded.asked[1].model_dump(exclude_unset=True) == {"cases": 8, "length": 512, "text": "builtin"}
    assert loaded.limits == {"max_kl": 1.0, "min_needles": 0.5}
    again = recipes.load(recipes.load("expand-kv"), ["evaluate.probes.choices.items=5"])
    assert [probe.name for probe in again.evaluate.asked] == ["perplexity", "choices"]


def test_healing_reads_the_blocks_of_the_record_and_of_overrides():
    from surgery.config.heal_overrides import settings as heal_settings

    known = {"heal": {"method": "full", "tokens": 1000}}
    known["evaluate"] = recipes.load(
        STEP | {"evaluate": {"max_kl": 1, "probes": {"choices": {"items": 5}}}}
    ).to_dict()["evaluate"]
    texts = ["evaluate.probes.choices.items=7", "evaluate.probes.needles.cases=4", "evaluate.max_kl=2"]
    _, judged_by = heal_settings(known, overrides=texts)
    assert [probe.name for probe in judged_by.asked] == ["perplexity", "needles", "choices"]
    assert judged_by.asked[2].items == 7
    assert judged_by.limits == {"max_kl": 2.0}
    with pytest.raises(SurgeryError, match=r"evaluate\.probes\.needles\.cases=0'?: cases should be at least 1"):
        heal_settings(known, overrides=["evaluate.probes.needles.cases=0"])


# --- the command ----------------------------------------------------------------------------------------------------


def sentence_text(tmp_path) -> str:
    import random

    (tmp_path / "long.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=900)))
    return "long.txt"


def test_a_probe_by_its_name_says_what_its_flags_say(surgery, model, tmp_path):
    text = sentence_text(tmp_path)
    for flags, name, given in (
        (("--windows", "2", "--length", "16"), "perplexity", ("windows=2", "length=16")),
        (("--choices", "--choice-items", "3"), "choices", ("items=3",)),
    ):
        for more in ((), ("--json",)):
            old = surgery("eval", model, "--base", model, *flags, "--text", text, *more)
            new = surgery("eval", model, f"text={text}", *given, "--base", model, "--probe", name, *more)
            assert old.code == new.code == 0, old.err + new.err
            assert old.out == new.out


def test_the_help_lists_the_probes(surgery):
    shown = " ".join(surgery("eval", "--help").out.split())
    assert f"--probe NAME Measure with this probe: {', '.join(probes.REGISTRY)}." in shown
    for option in ("--needles", "--choice-items", "--windows", "--plot FILE.png"):
        assert option in shown


def test_blocks_of_a_recipe_from_end_to_end(surgery, model, tmp_path):
    text = sentence_text(tmp_path)
    blocks = {"perplexity": {"windows": 1, "length": 64}, "choices": {"items": 6, "min_choices": 0}}
    evaluate = {"text": text, "probes": blocks}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(STEP | {"evaluate": evaluate}))
    ran = surgery("apply", "r.yaml", model, "-o", "out", "--no-check")
    assert ran.code in (0, 3), ran.err
    assert "choices right" in ran.out
    data = json.loads((tmp_path / "out/surgery.json").read_text())
    assert data["evaluation"]["text"]["windows"] == 1
    assert data["evaluation"]["choices"]["base"]["of"] == 6
    assert data["gate"]["limits"] == {"min_choices": 0}
    assert data["recipe"]["evaluate"]["probes"] == {**blocks, "choices": {"items": 6, "min_choices": 0.0}}
    assert "Multiple choice" in (tmp_path / "out/README.md").read_text()
    later = surgery("apply", "r.yaml", model, "-o", "later", "--no-check", "--no-eval")
    assert later.code == 0, later.err
    scored = surgery(
        "eval", "later", "--base", model, "--probe", "perplexity", f"text={text}", "windows=1", "length=64"
    )
    assert scored.code == 0, scored.err
    assert "not added" not in scored.out
    assert json.loads((tmp_path / "later/surgery.json").read_text())["evaluation"]["text"]["windows"] == 1


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown probe": (("--probe", "needls"), ["unknown probe 'needls'", "choices: ", "did you mean 'needles'?"]),
    "a word of its summary": (("--probe", "recall"), ["unknown probe 'recall'", "did you mean 'verbatim'?"]),
    "help": (("--probe", "help"), ["unknown probe 'help'", "perplexity: ", "needles: ", "choices: "]),
    "unknown key": (("--probe", "needles", "deths=3"), ["unknown key 'deths'", "lengths", "did you mean 'depths'?"]),
    "another probe's key": (
        ("--probe", "choices", "depths=3"),
        ["unknown key 'depths' of the probe choices", "items", "it is a key of the probe needles"],
    ),
    "a limit": (("--probe", "needles", "min_needles=1"), ["unknown key 'min_needles'", "belongs in a recipe"]),
    "not key=value": (("--probe", "needles", "depths"), ["is written key=value", "depths (Places in the text"]),
    "twice": (("--probe", "needles", "seed=1", "seed=2"), ["'seed' is given twice"]),
    "not YAML": (("--probe", "needles", "depths=[1"), ["the value of depths is not YAML"]),
    "all faults at once": (
        ("--probe", "needles", "depths=x", "samples=0"),
        ["depths should be a whole number or a list; it is 'x'", "samples should be at least 1; it is 0"],
    ),
    "a word": (("--probe", "needles", "secret=digit"), ["no secret 'digit'", "digits, words", "use digits"]),
    "a form": (("--probe", "needles", "form=chatty"), ["no form 'chatty'", "auto, chat, plain"]),
    "lengths": (("--probe", "needles", "lengths=2x"), ["not '2x'", "write 512,2k"]),
    "depth": (("--probe", "needles", "depths=[0.5, 2]"), ["depth 2.0 is outside of the text"]),
    "two ways in one": (("--probe", "needles", "cases=4", "samples=2"), ["cases and samples are two ways"]),
    "questions": (("--probe", "choices", "labelled=q.jsonl", "items=3"), ["items is not for questions of a file"]),
    "flag and name": (("--probe", "needles", "--depths", "3"), ["either --depths or --probe", "write depths="]),
    "switch and name": (("--probe", "needles", "--needles"), ["use either --needles or --probe, not both"]),
    "other flag and name": (("--probe", "choices", "--depths", "3"), ["use either --depths or --probe, not both"]),
    "a setting without a probe": (("depths=3",), ["'depths=3' is a setting of a probe", "--probe needles"]),
    "a setting beside a switch": (("--needles", "depths=3"), ["'depths=3' is a setting", "name the probe: --probe"]),
    "no picture": (("--probe", "perplexity", "--plot", "x.png"), ["--plot is only for needles"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses(refused, model, case):
    options, says = REFUSED[case]
    refused("eval", model, *options, says=says)


RECIPES = {
    "unknown probe": ({"probes": {"needls": {}}}, ["r.yaml:", "unknown probe 'needls'", "did you mean 'needles'?"]),
    "unknown key": ({"probes": {"needles": {"deths": 3}}}, ["unknown key 'deths'", "did you mean 'depths'?"]),
    "another probe's key": (
        {"probes": {"needles": {"items": 3}}},
        ["unknown key 'items' of the probe needles", "it is a key of the probe choices"],
    ),
    "alias and block": (
        {"needles": 24, "probes": {"needles": {"cases": 12}}},
        ["needles and probes.needles are two ways to say the same", "write it as probes.needles.cases"],
    ),
    "default alias and block": (
        {"windows": 8, "probes": {"perplexity": {"windows": 4}}},
        ["windows and probes.perplexity are two ways", "probes.perplexity.windows"],
    ),
    "limit and block": (
        {"min_needles": 0.5, "probes": {"needles": {"cases": 12}}},
        ["min_needles and probes.needles are two ways", "probes.needles.min_needles"],
    ),
    "bad value": ({"probes": {"needles": {"cases": 0}}}, ["cases should be at least 1; it is 0"]),
    "bad limit": ({"probes": {"needles": {"min_needles": 2}}}, ["min_needles should be at most 1; it is 2"]),
    "own words": ({"probes": {"needles": {"secret": "digit"}}}, ["no secret 'digit'", "use digits"]),
    "no mapping": ({"probes": {"needles": 3}}, ["needles should be a mapping of keys; it is 3"]),
    "no mapping at all": ({"probes": 3}, ["probes should be a mapping of keys; it is 3"]),
    "a file elsewhere": (
        {"probes": {"choices": {"labelled": "/etc/passwd"}}},
        ["evaluate.probes.choices.labelled of a recipe file may not be absolute"],
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_is_refused(refused, model, tmp_path, case):
    evaluate, says = RECIPES[case]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(STEP | {"evaluate": evaluate}))
    refused("plan", "r.yaml", model, says=["r.yaml:", *says])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluate.probes.needls.cases=3", ["unknown probe 'needls'", "did you mean 'needles'?"]),
        ("evaluate.probes.needles.items=3", ["it is a key of the probe choices"]),
        ("evaluate.probes.needles=3", ["needles should be a mapping of keys"]),
        ("evaluate.probes.needles.depths=0", ["'evaluate.probes.needles.depths=0': needles need at least one"]),
        ("evaluate.probes.needles.cases.x=3", ["cases should be a whole number"]),
    ],
)
def test_an_override_is_refused(refused, model, override, says):
    refused("plan", "mqa", model, override, says=says)
    refused("plan", "mqa", model, "evaluate=5", override, says=["evaluate should be a mapping"])


def test_an_override_finds_a_probe_in_the_recipe_s_spelling():
    """A shipped recipe has the earlier keys; whoever sets a block's key means that probe with its other settings."""
    from surgery.config.recipe import load

    shipped = load("duo-attention")
    needles = next(probe for probe in shipped.evaluate.asked if probe.name == "needles")
    assert "min_needles" in shipped.evaluate.limits

    changed = load("duo-attention", ["evaluate.probes.needles.cases=5"])
    asked = next(probe for probe in changed.evaluate.asked if probe.name == "needles")
    assert (asked.cases, asked.length, asked.text) == (5, needles.length, needles.text)
    assert changed.evaluate.limits == shipped.evaluate.limits

    again = load(changed, ["evaluate.needles=7", "min_needles=0.25"])
    assert next(probe for probe in again.evaluate.asked if probe.name == "needles").cases == 7
    assert again.evaluate.limits == shipped.evaluate.limits | {"min_needles": 0.25}

    for blocks in (
        ["evaluate.probes.needles={cases: 5}", "evaluate.probes.perplexity={windows: 4}"],
        ["evaluate.probes={needles: {cases: 5}, perplexity: {windows: 4}}"],
    ):
        for recipe in ("duo-attention", changed):
            whole = load(recipe, blocks)
            by_name = {probe.name: probe for probe in whole.evaluate.asked}
            assert (by_name["needles"].cases, by_name["perplexity"].windows) == (5, 4)
            assert whole.evaluate.limits == shipped.evaluate.limits, "a gate is lowered by its name alone"
    lower = load("duo-attention", ["evaluate.probes.needles={cases: 5, min_needles: 0.1}"])
    assert lower.evaluate.limits == shipped.evaluate.limits | {"min_needles": 0.1}
    for recipe in ("duo-attention", changed):
        assert load(recipe, ["evaluate.needles=0"]).evaluate.limits == shipped.evaluate.limits
    labelled = load("duo-attention", ["evaluate.choices=40", "evaluate.probes.choices.labelled=q.jsonl"])
    assert next(probe for probe in labelled.evaluate.asked if probe.name == "choices").labelled == "q.jsonl"

    for nothing in ("evaluate.needles=0", "evaluate.probes.needles=null"):
        for recipe in ("duo-attention", changed):
            assert "needles" not in [probe.name for probe in load(recipe, [nothing]).evaluate.asked]

    later = load("duo-attention", ["evaluate.probes.needles.samples=2", "evaluate.probes.needles.lengths=512,2k"])
    asked = next(probe for probe in later.evaluate.asked if probe.name == "needles")
    assert (asked.samples, asked.cases, asked.lengths, asked.length) == (2, None, (512, 2000), None)

    none = {
        "version": 1,
        "name": "x",
        "operations": [{"op": "expand"}],
        "evaluate": {"needles": 0, "needle_length": 300},
    }
    asked = next(p for p in load(none, ["evaluate.probes.needles.samples=2"]).evaluate.asked if p.name == "needles")
    assert (asked.samples, asked.cases, asked.length) == (2, None, 300)


def test_a_healing_finds_a_probe_in_the_recipe_s_spelling():
    from surgery.config.heal_overrides import settings
    from surgery.config.recipe import load

    recorded = load("gqa-uptrain").identity()
    recorded["evaluate"] |= {"needles": 9, "min_needles": 0.5}
    _, evaluate = settings(recorded, overrides=["evaluate.probes.needles.length=512"])
    asked = next(probe for probe in evaluate.asked if probe.name == "needles")
    assert (asked.cases, asked.length, evaluate.limits["min_needles"]) == (9, 512, 0.5)
    blocks = copy.deepcopy(recorded)
    blocks["evaluate"] = {"probes": {"needles": {"samples": 4, "min_needles": 0.9}}}
    before = copy.deepcopy(blocks)
    for override in ("evaluate.needles=0", "evaluate.needles=3", "evaluate.min_needles=0.1", "loss={kl: 1}"):
        settings(blocks, overrides=[override])
        assert blocks == before, "the record of the converted model stays"
    _, evaluate = settings(recorded, overrides=["evaluate.probes.needles=null"])
    assert "needles" not in [probe.name for probe in evaluate.asked]
    assert "min_needles" not in evaluate.limits


def test_python_may_give_ranges_arrays_and_defaults():
    from surgery.evaluation.probes.settings import make

    needles = make("needles", {"lengths": range(512, 1025, 512), "depths": np.linspace(0.0, 1.0, 3)})
    assert (needles.lengths, needles.depths) == ((512, 1024), (0.0, 0.5, 1.0))
    assert make("needles", {"lengths": [np.int64(512)]}).lengths == (512,)
    assert make("choices", {"labelled": "q.jsonl", "text": "builtin", "seed": 0}).labelled == "q.jsonl"
    with pytest.raises(SurgeryError, match="seed is not for questions of a file"):
        make("choices", {"labelled": "q.jsonl", "seed": 1})


def test_python_is_told_the_same():
    import surgery

    with pytest.raises(SurgeryError, match="unknown probe 'needls'"):
        surgery.evaluate("nowhere", probe="needls")
    with pytest.raises(SurgeryError, match="it is a key of the probe needles"):
        surgery.evaluate("nowhere", depths=3)
    with pytest.raises(SurgeryError, match="windows should be at least 1; it is 0"):
        surgery.evaluate("nowhere", windows=0)
