"""Recipes and overrides, second round: probes of `evaluate`, seeds, YAML's own kinds of values, control letters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers_of_bytes import byte_tokenizer

import surgery as library
from surgery import SurgeryError

GQA = "version: 1\nname: x\noperations: [{op: gqa, kv_heads: 2, method: mean}]\nevaluate: null\n"
QUICK = {"check": False, "evaluate": False}
LINES = GQA.count("\n")


def written(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def chat(settings: str) -> str:
    return GQA.replace("null", f"{{windows: 1, length: 32, text: t.txt, probes: {{chat: {settings}}}}}")


# --- refused in one sentence ----------------------------------------------------------------------

REFUSED = {
    "chat that is true": (chat("true"), "chat should be a mapping of keys; it is True"),
    "chat as a list": (chat("[]"), "chat should be a mapping of keys"),
    "chat in words": (chat("hello"), "chat should be a mapping of keys"),
    "chat in capitals": (GQA.replace("null", "{probes: {Chat: {}}}"), "unknown probe 'Chat'"),
    "a limit of chat above all": (chat("{min_chat: 1.5}"), "min_chat should be at most 1"),
    "a limit of chat below nothing": (chat("{min_chat: -0.1}"), "min_chat should be at least 0"),
    "a limit of chat beside its block": (GQA.replace("null", "{min_chat: 0.5}"), "unknown key 'min_chat'"),
    "a limit of another probe": (chat("{min_needles: 0.5}"), "unknown key 'min_needles' of the probe chat"),
    "requests above the folder": (chat("{requests: ../x.txt}"), "may not be absolute or hold .."),
    "requests of the system": (chat("{requests: /etc/passwd}"), "may not be absolute or hold .."),
    "requests of another home": (chat("{requests: ~root/x.txt}"), "may not be absolute or hold .."),
    "requests of Windows": (chat("{requests: 'C:\\x.txt'}"), "may not be absolute or hold .."),
    "requests in the recipe": (chat("{requests: [Hello]}"), "requests should be text"),
    "no token": (chat("{tokens: 0}"), "tokens should be at least 1"),
    "a token and a half": (chat("{tokens: 1.5}"), "tokens should be a whole number"),
    "a margin below nothing": (chat("{margin: -0.5}"), "margin should be at least 0"),
    "an endless margin": (chat("{margin: .inf}"), "margin should be a finite number"),
    "anchors": (GQA.replace("{op", "&a {op"), "anchors and aliases"),
    "aliases that hold themselves": (GQA.replace("[{op: gqa, kv_heads: 2, method: mean}]", "&a [*a]"), "anchors"),
    "a tag of a text": (GQA.replace("2", "!!str 2"), "the tag tag:yaml.org,2002:str is not allowed"),
    "a tag of bytes": (GQA.replace("mean", "!!binary bWVhbg=="), "the tag tag:yaml.org,2002:binary is not allowed"),
    "a tag of Python": (GQA.replace("mean", "!!python/name:os.system x"), "is not allowed"),
    "a date that is none": (GQA.replace("name: x", "name: 2020-99-99"), "r.yaml:2"),
    "an hour that is none": (GQA.replace("name: x", "name: 2020-01-01 99:00:00"), "r.yaml:2"),
    "a seed that numpy has not": (f"{GQA}heal: {{steps: 1, seed: {2**32}}}\n", "seed should be at most"),
    "a seed of 70 bits": (f"{GQA}heal: {{steps: 1, seed: {2**70}}}\n", "seed should be at most"),
    "a seed of heads": (GQA.replace("mean", f"random, seed: {2**70}"), "seed should be at most"),
    "a seed of routers": (GQA.replace("{op: gqa, kv_heads: 2, method: mean}", f"{{op: moh, seed: {2**64}}}"),
                          "seed should be at most"),
    "a loss by its number": (f"{GQA}heal: {{loss: {{1: 1}}, steps: 1}}\n", "the key 1 is not text"),
    "a loss in a loss": (f"{GQA}heal: {{loss: {{kl: {{ce: 1}}}}, steps: 1}}\n", "the weight of kl should be"),
    "steps beyond numbers": (f"{GQA}heal: {{steps: 1.0e+400}}\n", "steps should be a whole number"),
    "a teacher that is not asked": (f"{GQA}heal: {{loss: ce, teacher: stored, data: builtin, steps: 1}}\n", "teacher"),
    "hidden states of a stored teacher": (f"{GQA}heal: {{hidden: 1, teacher: stored, steps: 1}}\n", "hidden states"),
    "tokens of no teacher": (f"{GQA}heal: {{top_k: 5, steps: 1}}\n", "top_k is read with teacher: stored"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_a_text_that_is_refused(refused, base, text, says):
    written(text)
    ran = refused("plan", "r.yaml", base, says=[says])
    assert len(ran.err) < 3000


# --- overrides ------------------------------------------------------------------------------------

BAD_OVERRIDES = [
    "evaluate.probes.chat=true",
    "evaluate.probes.chat.tokens.x=1",
    "evaluate.probes.chat.tokens=[1]",
    "evaluate.probes.chat.min_chat=2",
    "evaluate.probes=[chat]",
    "evaluate.min_chat=0.5",
    "operations.00.kv_heads=1",
    "operations.+0.kv_heads=1",
    "operations. 0.kv_heads=1",
    "gqa.gqa.kv_heads=1",
    ".kv_heads=1",
    "kv_heads.=1",
    ".=1",
    "KV_HEADS=1",
    "kv_heads=- 1.5",
    "kv_heads=? 1",
    "kv_heads=<<",
    "kv_heads=%",
    "method=mean\x1b[31m",
    f"seed={2**70}",
    f"heal.seed={2**32}",
    "heal.loss={}",
    "heal.method=[lora]",
]


@pytest.mark.parametrize("override", BAD_OVERRIDES, ids=lambda text: repr(text)[1:40])
def test_an_override_that_is_refused(surgery, base, override):
    ran = surgery("plan", written(GQA), base, override)
    assert ran.code == 2, ran.out[-300:]
    assert ran.err.count("error:") == 1
    assert "Traceback" not in ran.err
    assert "\x1b" not in ran.err


@pytest.mark.parametrize(
    ("override", "tokens"),
    [("evaluate.probes.chat.tokens=5", 5), ("chat.tokens=6", 6), ("evaluate.probes={chat: {tokens: 7}}", 7)],
)
def test_spellings_of_a_setting_of_chat(surgery, base, override, tokens):
    ran = surgery("plan", written(chat("{min_chat: 0.25, tokens: 9}")), base, override, "--json")
    assert ran.code == 0, ran.out
    block = ran.json["recipe"]["evaluate"]["probes"]["chat"]
    assert block["tokens"] == tokens
    assert block["min_chat"] == 0.25, "a gate is lowered by its name alone"


def test_chat_that_is_taken_back(surgery, base):
    ran = surgery("plan", written(chat("{min_chat: 0.5}")), base, "evaluate.probes.chat=null", "--json")
    assert "chat" not in (ran.json["recipe"]["evaluate"].get("probes") or {})


# --- what is read late is refused early -----------------------------------------------------------

LATE = {
    "requests that are not there": ("{requests: nope.txt}", "nope.txt"),
    "requests that are empty": ("{requests: empty.txt}", "empty"),
}


@pytest.mark.parametrize("name", LATE)
def test_requests_that_cannot_be_read(refused, base, name):
    """Found before a weight is read, like a text of perplexity: not when hours of conversion and healing are over."""
    settings, says = LATE[name]
    Path("empty.txt").write_text("\n \n")
    Path("t.txt").write_text("The quick brown fox. " * 9)
    written(chat(settings))
    refused("apply", "r.yaml", base, "-o", "out", "--no-check", says=[says])


def test_answers_longer_than_the_model(surgery, base):
    """A checkpoint is not at fault where its base has too few positions for a chat: it is not run, and says so."""
    Path("t.txt").write_text("The quick brown fox. " * 9)
    written(chat("{tokens: 100000, min_chat: 0.5}"))
    ran = surgery("apply", "r.yaml", base, "-o", "out", "--no-check")
    assert ran.code == 0, ran.err
    assert "gate:      not run" in ran.out
    assert "positions" in library.Report.of("out").data["evaluation"]["chat"]["reason"]


# --- control letters ------------------------------------------------------------------------------

CONTROL = {
    "a name": GQA.replace("name: x", 'name: "\\e[31mred\\a"'),
    "a description": f'{GQA}description: "\\e]0;title\\a"\n',
    "a name that wipes the screen": GQA.replace("name: x", 'name: "\\e[2J\\e[H"'),
    "a name of eight-bit controls": GQA.replace("name: x", 'name: "\\x9b31m"'),
}


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("verb", ["plan", "apply", "ls"])
def test_control_letters_reach_no_terminal(surgery, base, name, verb):
    """A recipe from elsewhere may not write to the terminal what is no letter."""
    file = written(CONTROL[name])
    arguments = {"plan": (file, base), "apply": (file, base, "-o", "out", "--no-check", "--no-eval"), "ls": (file,)}
    ran = surgery(verb, *arguments[verb])
    assert not set(ran.out + ran.err) & {"\x1b", "\x07", "\x9b"}


def test_control_letters_of_an_answer(surgery, base):
    """What a model says in a chat is shown as letters."""
    ran = surgery("eval", base, "--probe", "chat", "tokens=4", "-q")
    assert ran.code == 0
    assert all(letter.isprintable() or letter == "\n" for letter in ran.out)


def test_control_letters_of_a_request(surgery, base):
    Path("r.txt").write_text("Hello\x1b[31m\n")
    ran = surgery("eval", base, "--probe", "chat", "tokens=2", "requests=r.txt", "-q")
    assert "\x1b" not in ran.out + ran.err


# --- plain data -----------------------------------------------------------------------------------


class Odd(dict):
    """A mapping of a user's own."""

    def items(self):
        raise RuntimeError("mine")


DATA = {
    "bytes as a key": {b"version": 1, "name": "x", "operations": []},
    "a tuple of operations": {"version": 1, "name": "x", "operations": ({"op": "gqa", "kv_heads": 2},)},
    "a set of operations": {"version": 1, "name": "x", "operations": {1, 2}},
    "a generator": {"version": 1, "name": "x", "operations": (each for each in [{"op": "gqa", "kv_heads": 2}])},
    "an operation that is an object": {"version": 1, "name": "x", "operations": [object()]},
    "version as numpy": {"version": __import__("numpy").int64(1), "name": "x", "operations": [{"op": "gqa"}]},
    "a path as a name": {"version": 1, "name": Path("x"), "operations": [{"op": "gqa", "kv_heads": 2}]},
    "an endless number": {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": float("inf")}]},
    "a class": {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": int}]},
}


@pytest.mark.parametrize("name", DATA)
def test_plain_data_of_other_kinds(base, name):
    """A plan, or one sentence."""
    said, made = "", None
    try:
        made = library.plan(DATA[name], base)
    except SurgeryError as fault:
        said = str(fault)
    assert len(said) < 3000
    assert said or made.recipe.name == "x"


def test_a_recipe_that_was_planned_is_plain_data_again(base):
    """What a report holds of a recipe gives the same plan."""
    text = {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}],
            "evaluate": {"windows": 1, "length": 32, "probes": {"chat": {"tokens": 3, "min_chat": 0.5}}}}  # fmt: skip
    made = library.plan(text, base)
    again = library.plan(json.loads(json.dumps(made.recipe.identity())), base)
    assert again.recipe.identity() == made.recipe.identity()
    assert again.changes == made.changes


def test_no_template_and_a_gate_of_chat(base, tmp_path):
    """A model that was never trained on conversations is not asked, and no gate waits for it."""
    (base / "chat_template.jinja").unlink(missing_ok=True)
    byte_tokenizer().save_pretrained(base)
    (tmp_path / "t.txt").write_text("The quick brown fox. " * 9)
    data = {"version": 1, "name": "x", "operations": [{"op": "head_mask", "values": {}}],
            "evaluate": {"windows": 1, "length": 32, "text": str(tmp_path / "t.txt"),
                         "probes": {"chat": {"tokens": 3, "min_chat": 1.0}}}}  # fmt: skip
    report = library.apply(data, base, output=tmp_path / "out", check=False)
    assert report.gate == "passed"
    assert report.data["evaluation"]["chat"]["status"] == "not asked"
