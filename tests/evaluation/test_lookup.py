"""Names in a list: what the prompts hold, who is right, and what the command, the gate and the card say."""

from __future__ import annotations

import re

import pytest
from families import TINY, one_thread  # noqa: F401 (the last is a fixture)
from readers import Config, Reader, reading_model  # noqa: F401 (the last is a fixture)
from tokenizers_of_bytes import byte_tokenizer

from surgery.data.name_list import FACTS, MOST, NAMES
from surgery.errors import SurgeryError
from surgery.evaluation.probes.lookup import Lookup
from surgery.evaluation.probes.settings import make
from surgery.evaluation.recall import Outcome
from surgery.report.gate import gate

DONE = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}, "kl": {"mean": 0.0}}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def cases_of(tokenizer, **settings):
    return make("lookup", settings).make_cases(tokenizer, {"out": Config()})


def said(text: str) -> list[tuple[str, str, str]]:
    """Every statement of a text, by a pattern: its fact's words, the name, the number; in the text's order."""
    rows = []
    for statement, _ in FACTS:
        pattern = re.escape(statement).replace(r"\{name\}", r"(\w+)") + r" (\d{5})\."
        rows += [(match.start(), statement, *match.groups()) for match in re.finditer(pattern, text)]
    return [row[1:] for row in sorted(rows)]


@pytest.mark.parametrize("names", [2, 12, MOST])
def test_a_prompt_is_a_list_and_a_question_about_one_of_its_names(tokenizer, names):
    result = cases_of(tokenizer, names=names, cases=5)
    places = []
    for needle in result.cases:
        text = tokenizer.decode(needle.prompt)
        rows = said(text)
        assert len(rows) == len({name for _, name, _ in rows}) == len({number for *_, number in rows}) == names
        assert len({statement for statement, *_ in rows}) == 1, "only the name tells them apart"
        assert {name for _, name, _ in rows} <= set(NAMES.split())
        ((statement, name, number),) = [row for row in rows if row[2] == needle.secret]
        question = dict(FACTS)[statement].format(name=name)
        assert text.endswith(f"\n\n{question}\n\n{statement.format(name=name)}")
        assert tokenizer.decode(needle.answer) == f" {number}"
        assert tokenizer.decode(needle.prompt[slice(*needle.span)]) == f"{statement.format(name=name)} {number}."
        assert tokenizer.decode(needle.prompt[needle.question :]).startswith(question)
        place = [row[1] for row in rows].index(name)
        places.append(place)
        assert needle.depth == place / (names - 1)
        assert needle.length == len(needle.prompt)
    assert (places[0], places[-1], places) == (0, names - 1, sorted(places)), "from the first line to the last"


def test_the_same_settings_give_the_same_prompts_and_another_seed_others(tokenizer):
    one, two, other = (cases_of(tokenizer, cases=3, seed=seed).cases for seed in (0, 0, 1))
    assert one == two
    assert not {needle.secret for needle in one} & {needle.secret for needle in other}


def test_who_reads_the_name_is_right_and_who_takes_the_last_line_is_not(tokenizer):
    result = cases_of(tokenizer, cases=4)

    def by_name(text: str) -> str:
        asked = text.rpartition("\n\n")[2]
        return next(number for _, name, number in said(text) if name in asked)

    def last(text: str) -> str:
        return said(text)[-1][2]

    hits = [
        [each.hit for each in Lookup().run(Reader(tokenizer, how), result, lambda done: None)]
        for how in (by_name, last)
    ]
    assert hits == [[True] * 4, [False] * 3 + [True]], "the last line is the last that is asked for"


def test_gate_card_and_closing_line(tokenizer):
    result = cases_of(tokenizer, cases=3)
    result.outcomes = {"base": [Outcome(hit, 0.5) for hit in (True, True, False)]}
    result.outcomes["out"] = [Outcome(hit, 0.5) for hit in (True, False, True)]
    record = result.to_dict()
    assert gate(DONE | {"lookup": record}, {"min_lookup": 0.5}) == ("passed", [])
    assert gate(DONE | {"lookup": record}, {"min_lookup": 0.6})[0] == "failed"
    assert Lookup.sentence(record) == "names found in a list of 12 kept 1 of 2"
    words = (
        "Names in a list (12 with a number each, one asked for): the base answers 2 of 3, the converted model 2 of 3."
    )
    assert Lookup.paragraph(record).startswith(words)
    assert "it keeps 1 of 2" in Lookup.paragraph(record)
    alone = {name: value for name, value in record.items() if name not in ("base", "kept")}
    assert Lookup.paragraph(alone).endswith("one asked for): the model answers 2 of 3.")


def test_what_a_window_sees_does_not_count_and_is_said(tokenizer):
    result = cases_of(tokenizer, cases=3)
    result.reach = (0, 4096)
    result.outcomes = {label: [Outcome(label == "base", 0.5)] * 3 for label in ("base", "out")}
    record = result.to_dict()
    why = "all prompts lie within sinks and window, which streaming heads see: ask longer ones"
    assert gate(DONE | {"lookup": record}, {"min_lookup": 0.5}) == ("not run", [f"min_lookup: {why}"])
    assert "3 of them lie within sinks and window and prove nothing." in Lookup.paragraph(record)
    said = [line for line in Lookup.lines(result) if isinstance(line, str)]
    assert "3 of 3 prompts prove nothing and do not count: they lie within the 0 sinks and 4096 tokens" in said[0]


def test_lists_are_cut_to_what_a_model_takes():
    config = TINY["llama"](vocab_size=258, max_position_embeddings=256).config
    assert Lookup(names=24).cuts(config) == {"names": 12}
    assert Lookup(names=8).cuts(config) == {}


def test_the_command(surgery, reading_model):
    done = surgery("eval", reading_model, "--base", reading_model, "--probe", "lookup", "cases=2", "names=3")
    assert done.code == 0, done.err
    assert "names found in a list of 3, share of prompts" in done.out
    said = (
        "2 plain prompts (3 with a number each, one asked for), seed 0; a guess among the numbers of the list is right"
    )
    assert f"{said} with probability 33%." in done.out
    facts = surgery("eval", reading_model, "--probe", "lookup", "cases=2", "names=3", "--json").json
    assert (facts["prompts"], facts["settings"]["names"], facts["kept"]) == (2, 3, None)


def test_refused(refused, reading_model):
    for setting, says in (
        ("names=1", ["names should be at least 2; it is 1"]),
        ("names=99", [f"names should be at most {MOST}; it is 99"]),
        ("form=cat", ["no form 'cat'", "use chat"]),
        ("form=chat", ["no chat template", "use the form plain"]),
        ("names=24", ["1024 positions, prompt and answer have", "fewer names"]),
    ):
        refused("eval", reading_model, "--probe", "lookup", setting, says=says)


def test_a_tokenizer_without_digits_is_refused(tokenizer):
    class NoDigits:
        chat_template = None

        def __call__(self, text, **kwargs):
            return tokenizer(re.sub(r"\d", "", text), **kwargs)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    with pytest.raises(SurgeryError, match="cannot write"):
        cases_of(NoDigits(), cases=1)
