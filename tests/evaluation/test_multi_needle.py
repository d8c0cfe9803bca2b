"""Several keys in one text: what the prompts hold, who is right, and all that follows from the class."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from families import one_thread  # noqa: F401 (a fixture)
from readers import Config, Reader, reading_model  # noqa: F401 (the last is a fixture)
from tokenizers_of_bytes import byte_tokenizer

from surgery.config import recipe as recipes
from surgery.data.haystack import KEYS, TEMPLATES
from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.evaluation.paired import wilson
from surgery.evaluation.probes.multi_needle import MultiNeedle, MultiNeedleResult
from surgery.evaluation.probes.settings import make
from surgery.evaluation.recall import Outcome
from surgery.report.card import render_card
from surgery.report.gate import gate

DONE = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}, "kl": {"mean": 0.0}}
SMALL = {"length": 700, "cases": 3, "depths": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def cases_of(tokenizer, **settings) -> MultiNeedleResult:
    return make("multi_needle", settings).make_cases(tokenizer, {"out": Config()})


def spoken(text: str, secret: str = "digits") -> list[tuple[str, str, str]]:
    """Every statement of a text: its words, its key, its secret; in the order of the text."""
    value = r"(\d{5})" if secret == "digits" else r"([a-z]+ [a-z]+ [a-z]+)"
    found = []
    for statement, _ in TEMPLATES:
        pattern = re.escape(statement).replace(r"\{key\}", r"(\w+)") + f" {value}\\."
        found += [(match.start(), statement, *match.groups()) for match in re.finditer(pattern, text)]
    return [each[1:] for each in sorted(found)]


@pytest.mark.parametrize("secret", ["digits", "words"])
@pytest.mark.parametrize("keys", [2, 4, 7])
def test_a_prompt_holds_so_many_keys_in_the_same_words_and_asks_for_one(tokenizer, keys, secret):
    result = cases_of(tokenizer, keys=keys, secret=secret, **(SMALL | {"length": 1200}))
    assert len(result.cases) == 3
    for needle in result.cases:
        text = tokenizer.decode(needle.prompt)
        known = spoken(text, secret)
        assert len(known) == keys
        assert len({statement for statement, _, _ in known}) == 1, "only the key tells them apart"
        assert len({key for _, key, _ in known}) == len({value for _, _, value in known}) == keys
        assert {key for _, key, _ in known} <= set(KEYS.split())
        ((statement, key, _),) = [each for each in known if each[2] == needle.secret]
        asked = tokenizer.decode(needle.prompt[needle.question :])
        assert [other for other in KEYS.split() if re.search(rf"\b{other}\b", asked)] == [key]
        assert asked.endswith(statement.format(key=key))
        assert tokenizer.decode(needle.answer) == f" {needle.secret}"
        own = tokenizer.decode(needle.prompt[slice(*needle.span)])
        assert own.strip() == f"{statement.format(key=key)} {needle.secret}."
        assert 1168 < len(needle.prompt) <= 1200
        assert needle.span[0] / needle.question == pytest.approx(needle.depth, abs=0.15)


def test_the_same_settings_give_the_same_prompts_and_another_seed_others(tokenizer):
    one, two, other = (cases_of(tokenizer, **SMALL, seed=seed).cases for seed in (0, 0, 1))
    assert one == two
    assert not {needle.secret for needle in one} & {needle.secret for needle in other}
    assert cases_of(tokenizer, **(SMALL | {"depths": [0.5], "cases": 1})).cases == one[1:2], "a cell is its own"


def test_who_matches_the_key_is_right_and_who_takes_the_first_secret_is_not(tokenizer):
    result = cases_of(tokenizer, keys=4, **SMALL)

    def by_key(text: str) -> str:
        asked = max(KEYS.split(), key=lambda key: text.rfind(key))
        return next(value for _, key, value in spoken(text) if key == asked)

    def first(text: str) -> str:
        return spoken(text)[0][2]

    probe = MultiNeedle()
    assert all(each.hit for each in probe.run(Reader(tokenizer, by_key), result, lambda done: None))
    hits = [each.hit for each in probe.run(Reader(tokenizer, first), result, lambda done: None)]
    assert hits == [first(tokenizer.decode(case.prompt)) == case.secret for case in result.cases]
    assert not all(hits)


def facts_of(tokenizer, base: list[bool], out: list[bool], **more) -> dict:
    result = cases_of(tokenizer, **(SMALL | {"cases": len(base), "depths": [0.5]}))
    result.outcomes = {"base": [Outcome(hit, 0.5) for hit in base], "out": [Outcome(hit, 0.5) for hit in out]}
    return json.loads(json.dumps(result.to_dict(), allow_nan=False)) | more


def test_gate_and_card_and_sentence_follow(tokenizer):
    limit = {"min_multi_needle": 0.7}
    facts = facts_of(tokenizer, [True, True, True, False], [True, True, False, True])
    assert gate(DONE | {"multi_needle": facts}, {"min_multi_needle": 0.66}) == ("passed", [])
    assert gate(DONE | {"multi_needle": facts}, limit) == ("failed", ["min_multi_needle: 0.6667, the limit is 0.7"])
    none = facts_of(tokenizer, [False], [True])
    why = "min_multi_needle: the base answers none of the prompts that count"
    assert gate(DONE | {"multi_needle": none}, limit) == ("not run", [why])
    assert gate(DONE, limit) == ("not run", ["min_multi_needle: it was not asked for"])
    assert MultiNeedle.sentence(facts) == "right one of 4 hidden secrets kept 2 of 3"
    card = render_card({"evaluation": DONE | {"multi_needle": facts}}, None)
    assert "| right one of 4 hidden secrets, share of prompts | 75.0% | 75.0% | 1.000 |" in card
    low, high = (f"{end:.1%}" for end in wilson(2, 3))
    assert "the base answers 3 of 4, the converted model 3 of 4." in card
    assert f"Of those that the base answers, it keeps 2 of 3 (95 % interval {low} to {high})" in card
    assert MultiNeedle.sentence(none) == ""
    failed = {"status": "not run", "reason": "no room"}
    assert "Several needles in one text were **not run**: no room." in render_card(
        {"evaluation": DONE | {"multi_needle": failed}}, None
    )


def test_a_base_at_the_floor_is_not_judged(tokenizer):
    """A guess among four secrets is right in 12 of 48."""
    facts = facts_of(tokenizer, [n < 12 for n in range(48)], [n < 12 for n in range(48)])
    status, reasons = gate(DONE | {"multi_needle": facts}, {"min_multi_needle": 0.5})
    assert status == "not run"
    assert "the base answers no more than a guess does (12 of 48" in reasons[0]
    assert MultiNeedle.sentence(facts) == ""
    card = MultiNeedle.paragraph(facts)
    assert "The base answers no more than a guess does" in card
    assert "it keeps" not in card
    ((data, (share,)),) = MultiNeedle.metrics(facts)
    assert data["name"].startswith("Several needles in one text: ")
    assert (data["keys"], share.name, share.value) == (4, "right one of 4 hidden secrets", 0.25)
    MultiNeedle.paragraph(facts | {"settings": facts["settings"] | {"keys": 99}})  # edited: shown all the same
    above = facts_of(tokenizer, [n < 40 for n in range(48)], [n < 40 for n in range(48)])
    assert gate(DONE | {"multi_needle": above}, {"min_multi_needle": 0.5}) == ("passed", [])


def test_the_command(surgery, reading_model, tmp_path):
    options = ("--probe", "multi_needle", "length=700", "cases=2", "depths=2", "keys=3")
    done = surgery("eval", reading_model, "--base", reading_model, *options)
    assert done.code == 0, done.err
    row = "right one of 3 hidden secrets, share of prompts  0.0%  0.0%"
    for words in ("base  converted", row, "2 plain prompts (3 keys with digits each in a prompt of 700 tokens"):
        assert words in done.out
    facts = surgery("eval", reading_model, *options, "--json").json
    assert (facts["prompts"], facts["settings"]["keys"], facts["kept"]) == (2, 3, None)
    assert "multi_needle" in surgery("eval", "--help").out


def test_a_recipe_from_end_to_end(surgery, reading_model, tmp_path):
    step = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}]}
    block = {"cases": 2, "length": 700, "depths": 1, "min_multi_needle": 0.5}
    step["evaluate"] = {"windows": 1, "length": 64, "probes": {"multi_needle": block}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(step))
    ran = surgery("apply", "r.yaml", reading_model, "-o", "out", "--no-check")
    assert ran.code == 0, ran.err
    data = json.loads((tmp_path / "out/surgery.json").read_text())
    assert data["evaluation"]["multi_needle"]["base"]["of"] == 2
    assert "cases" not in data["evaluation"]["multi_needle"]
    assert data["gate"]["limits"] == {"min_multi_needle": 0.5}
    assert data["gate"]["status"] == "not run", "this base answers nothing"
    assert "Several needles in one text (4 keys with digits each" in (tmp_path / "out/README.md").read_text()
    loaded = recipes.load("expand-kv", ["multi_needle.cases=3", "evaluate.probes.multi_needle.min_multi_needle=0.5"])
    assert loaded.evaluate.limits == {"max_kl": 0.001, "min_multi_needle": 0.5}


def test_refused(refused, reading_model, tokenizer):
    for setting, says in (
        ("keys=1", ["keys should be at least 2; it is 1"]),
        ("keys=17", ["keys should be at most 16; it is 17"]),
        ("samples=3", ["unknown key 'samples' of the probe multi_needle", "it is a key of the probe needles"]),
        ("secret=digit", ["no secret 'digit'", "use digits"]),
        ("depths=[2]", ["depth 2.0 is outside"]),
        ("length=2000", ["1024 positions, prompt and answer have 2000 tokens", "a shorter length"]),
    ):
        refused("eval", reading_model, "--probe", "multi_needle", setting, says=says)
    with pytest.raises(SurgeryError, match="no room for 16 keys in 400 tokens"):
        cases_of(tokenizer, length=400, keys=16, cases=1)
    with pytest.raises(SurgeryError, match="no room for 4 keys"):
        cases_of(tokenizer, text=Text("one", "0" * 64, "a word " * 2000), length=900, cases=1)
