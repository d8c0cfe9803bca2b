"""Repeats of random words: what the prompts hold, who is right, and what command and card say."""

from __future__ import annotations

import re

import pytest
from families import TINY, one_thread  # noqa: F401 (the last is a fixture)
from readers import Config, Reader, reading_model  # noqa: F401 (the last is a fixture)
from tokenizers_of_bytes import byte_tokenizer

from surgery.data.text import Text, load_text
from surgery.data.word_list import LEAD
from surgery.errors import SurgeryError
from surgery.evaluation.probes.repeats import Repeats
from surgery.evaluation.probes.settings import make
from surgery.evaluation.recall import Outcome

FEW = {"distances": [300, 1500], "samples": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def cases_of(tokenizer, **settings):
    return make("repeats", settings).make_cases(tokenizer, {"out": Config()})


@pytest.mark.parametrize(("cue", "words"), [(16, 2), (1, 1), (3, 6)])
def test_only_the_cue_comes_twice_and_the_answer_follows_it(tokenizer, cue, words):
    known = set(re.findall(r"\w+", load_text("builtin").text))
    for needle in cases_of(tokenizer, cue=cue, words=words, **FEW).cases:
        prompt, answer = tokenizer.decode(needle.prompt), tokenizer.decode(needle.answer)
        said = prompt.split(" ")
        assert set(said) <= known
        again, before = said[-cue:], said[:-cue]
        assert len(set(before)) == len(before), "no other word comes twice"
        place = before.index(again[0])
        assert before[place : place + cue] == again
        assert answer.split(" ")[1:] == before[place + cue : place + cue + words] == needle.secret.split(" ")
        assert place == LEAD
        span = tokenizer.decode(needle.prompt[slice(*needle.span)]).strip()
        assert span == " ".join([*again, needle.secret])
        back = len(tokenizer(" ".join(before), add_special_tokens=False)["input_ids"])
        first = len(tokenizer(" ".join(before[:place]), add_special_tokens=False)["input_ids"])
        assert needle.length - 15 <= back - first <= needle.length, "tokens from the cue to its return, but for a word"


def test_the_same_settings_give_the_same_prompts_and_another_seed_others(tokenizer):
    one, two, other = (cases_of(tokenizer, seed=seed, **FEW).cases for seed in (0, 0, 1))
    assert one == two
    assert not {needle.secret for needle in one} & {needle.secret for needle in other}


def test_who_goes_on_as_before_is_right_and_who_repeats_the_cue_is_not(tokenizer):
    result = cases_of(tokenizer, **FEW)

    def as_before(text: str) -> str:
        cue = " ".join(text.split(" ")[-16:])
        return " ".join(text.split(f"{cue} ", 1)[1].split(" ")[:2])

    def the_cue(text: str) -> str:
        return " ".join(text.split(" ")[-16:-14])

    hits = [
        [o.hit for o in Repeats().run(Reader(tokenizer, how), result, lambda done: None)]
        for how in (as_before, the_cue)
    ]
    assert hits == [[True] * 4, [False] * 4]


def test_what_a_window_sees_does_not_count(tokenizer):
    result = cases_of(tokenizer, **FEW)
    result.reach = (16, 400)
    result.outcomes = {label: [Outcome(True, 0.1)] * 4 for label in ("base", "out")}
    assert result.compare()["of"] == 2, "the two of 300 tokens are inside the window"
    record = result.to_dict()
    assert [case["distance"] for case in record["cases"]] == [300, 300, 1500, 1500]
    assert "that the base answers and that lie outside sinks and window, it keeps 2 of 2" in Repeats.paragraph(record)
    assert Repeats.sentence(record) == "repeated words continued kept 2 of 2"


def test_the_command(surgery, reading_model):
    done = surgery("eval", reading_model, "--base", reading_model, "--probe", "repeats", "distances=200", "samples=2")
    assert done.code == 0, done.err
    assert "repeated words continued, share of prompts" in done.out
    assert "2 plain prompts (2 words after 16 that come again 200 tokens later), seed 0" in done.out
    assert "The text is Python" in done.out


def test_distances_are_cut_and_prompts_left_out_that_a_model_does_not_take(tokenizer):
    config = TINY["llama"](vocab_size=258, max_position_embeddings=1024).config
    cut = Repeats().cuts(config)["distances"]
    assert cut[:3] == [200, 400, 800]
    result = Repeats(distances=cut, samples=2).make_cases(tokenizer, {"out": config})
    assert result.notes == ["4 of 8 prompts are longer than the 1,024 tokens that the model takes, and were left out"]
    assert result.settings["distances"] == [200, 400]
    assert max(len(case.prompt) + len(case.answer) for case in result.cases) <= 1024
    assert Repeats(distances=(200,)).cuts(config) == {}


def test_the_same_distance_twice_is_one(tokenizer):
    assert len(cases_of(tokenizer, distances=[300, 300], samples=2).cases) == 2


def test_refused(refused, reading_model, tokenizer):
    for setting, says in (
        ("distances=0", ["need at least one distance"]),
        ("distances=[]", ["need at least one distance"]),
        ("distances=20", ["a distance of 20 tokens is too short for 18 words", "at least"]),
        ("words=0", ["words should be at least 1; it is 0"]),
        ("distances=2000", ["1024 positions, prompt and answer have 2000 tokens", "shorter distances"]),
    ):
        refused("eval", reading_model, "--probe", "repeats", setting, says=says)
    few = Text("few", "0" * 64, " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)))
    with pytest.raises(SurgeryError, match="60 different words, which are too few for a distance of 1,500") as raised:
        cases_of(tokenizer, text=few, distances=[1500])
    most = int(re.search(r"of about (\d+) at most", str(raised.value))[1])
    assert cases_of(tokenizer, text=few, distances=[most]).cases, "the remedy works"
    with pytest.raises(SurgeryError, match="12 different words, and a prompt needs 42 at least"):
        cases_of(tokenizer, text=Text("short", "0" * 64, few.text[:47]), distances=[200])
    other = Text("other", "0" * 64, " ".join(chr(0x430 + i % 32) * 2 + chr(0x430 + i // 32) for i in range(900)))
    for needle in cases_of(tokenizer, text=other, distances=[900]).cases:
        assert re.fullmatch(r"[\u0430-\u044f ]+", needle.secret), "a text of another script has words too"
