"""Quoted paragraphs: what the prompts hold, their exact lengths, every kind of text and tokenizer, what is refused.

Paragraphs are found here by a split of their own in the text.
"""

from __future__ import annotations

import random
import re
import time

import pytest
from conftest import WORDS
from tokenizers_of_bytes import byte_tokenizer, letters_tokenizer

from surgery.data.quotations import LEAD, LONGEST, _Prose, make_quotations
from surgery.data.text import Text, begin_of_text, load_text
from surgery.errors import SurgeryError

FEW = {"distances": (100, 700), "samples": 3, "cue": 20, "tokens": 30}
TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bytes with BOS": lambda: byte_tokenizer(bos=True),
    "empty lines as one token": lambda: byte_tokenizer(merges=(("Ċ", "Ċ"),)),
    "stops with the line's end": lambda: byte_tokenizer(merges=((".", "Ċ"),)),
    "letters with a mark for spaces": letters_tokenizer,
}


def prose(paragraphs=60, seed=0, gap="\n\n") -> str:
    """Paragraphs of random words; no beginning comes twice."""
    draw = random.Random(seed)
    return gap.join(
        " ".join(draw.choices(WORDS, k=draw.randint(14, 40))).capitalize() + "." for _ in range(paragraphs)
    )


def named(text: str) -> Text:
    return Text("a text", "0" * 64, text)


def occurrences(whole, part) -> int:
    return sum(tuple(whole[i : i + len(part)]) == tuple(part) for i in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_has_its_parts_and_their_exact_lengths(kind):
    tokenizer, text = TOKENIZERS[kind](), prose()
    begin = begin_of_text(tokenizer)
    paragraphs = set(text.split("\n\n"))
    for each in make_quotations(tokenizer, text=named(text), **FEW):
        prompt, (first, end) = list(each.prompt), each.span
        size = end - first
        assert each.length in FEW["distances"]
        assert prompt[: len(begin)] == begin
        assert (first, each.question) == (len(begin) + LEAD, len(begin) + LEAD + size + each.length)
        assert len(prompt) == len(each.unread) == each.question + 20
        assert prompt[each.question :] == prompt[first : first + 20], "the paragraph begins again"
        assert list(each.answer) == prompt[first + 20 : first + 50], "and goes on as it did"
        assert 50 <= size <= LONGEST
        assert tokenizer.decode(prompt[first:end]).strip() in paragraphs, "a whole paragraph"
        other = list(each.unread)
        assert other[:first] + prompt[first:end] + other[end:] == prompt, "nothing else differs"
        assert other[first:end] != prompt[first:end]
        assert occurrences(prompt, each.answer) == occurrences(other, prompt[each.question :]) == 1
        assert occurrences(other, each.answer) == 0
        assert tokenizer.decode(each.answer) == each.secret
        for place in (first, end, each.question):  # pieces meet where paragraphs do
            before = tokenizer.decode(prompt[max(0, place - 3) : place])
            assert before.endswith("\n\n") or tokenizer.decode(prompt[place : place + 2]) == "\n\n"


def test_distances_differ_in_nothing_else():
    cases = make_quotations(byte_tokenizer(), text=named(prose()), **FEW)
    for near, far in zip(cases[:3], cases[3:], strict=True):
        assert (near.length, far.length, near.sample) == (100, 700, far.sample)
        assert near.answer == far.answer
        assert near.prompt[: near.span[1]] == far.prompt[: far.span[1]]
        assert near.prompt[near.span[1] :] == far.prompt[-120:]
    assert len({case.answer for case in cases}) == 3, "each sample has a paragraph of its own"


def test_the_same_settings_give_the_same_prompts_and_another_seed_others():
    one, two, other = (make_quotations(byte_tokenizer(), seed=seed, **FEW) for seed in (0, 0, 1))
    assert one == two
    assert {case.answer for case in one} != {case.answer for case in other}


def test_code_and_what_comes_twice_are_not_quoted():
    code = "    value = compute(first, second)\n    return value + 1234567890 * other_value"
    twice = "This paragraph is in the text two times, and a prompt with it would quote it once more than it says."
    text = "\n\n".join([*(f"{code}_{i}\n\n{p}" for i, p in enumerate(prose(30).split("\n\n"))), twice, "End.", twice])
    for case in make_quotations(byte_tokenizer(), text=named(text), distances=(60,), samples=1, cue=20, tokens=30):
        assert "value" not in case.secret
    mixed = f"{prose(20)}\n\n{twice}\n\nShort one.\n\n{code}\n\n{twice}\n\n{prose(20, seed=1)}"
    cases = make_quotations(byte_tokenizer(), text=named(mixed), distances=(60,), samples=20, cue=20, tokens=30)
    for case in cases:
        quoted = byte_tokenizer().decode(case.prompt[slice(*case.span)])
        assert "value" not in quoted
        assert "two times" not in quoted
    prose_of = _Prose(byte_tokenizer(), named(mixed), 20, 30)
    for passage in prose_of.passages:
        for first, size in ((passage.first, 20), (passage.first + 20, 30)):
            assert occurrences(prose_of.ids, prose_of.ids[first : first + size]) == 1
    held_out = make_quotations(byte_tokenizer(), distances=(60,), samples=20)
    assert not [case for case in held_out if re.match(r"\s{3}", byte_tokenizer().decode(case.prompt[case.span[0] :]))]


@pytest.mark.parametrize(
    ("sentence", "stop"),
    [("the {} cat looked at {} dogs and {} birds", ". "), ("猫{}坐在垫子{}上看着外面{}的雨", "。")],
)
def test_a_text_without_empty_lines_is_cut_at_sentences(sentence, stop):
    draw, signs = random.Random(0), "abcdefgh甲乙丙丁"
    text = "".join(sentence.format(*("".join(draw.choices(signs, k=6)) for _ in range(3))) + stop for _ in range(90))
    tokenizer = byte_tokenizer()
    for case in make_quotations(tokenizer, text=named(text), **FEW):
        first, end = case.span
        quoted = tokenizer.decode(case.prompt[first:end]).strip()
        assert quoted.endswith(stop.strip())
        assert text.count(quoted) == 1
        assert text[: text.index(quoted)].strip().endswith(stop.strip())
        assert case.question - end == case.length


def test_a_text_of_a_megabyte_is_read_in_time_that_grows_with_it():
    """Not once for each of its paragraphs: that took a time that grows with the square."""

    class Characters:
        """A token for each character."""

        def __call__(self, text, **_):
            return {"input_ids": list(map(ord, text))}

        def decode(self, ids):
            return "".join(map(chr, ids))

    def seconds(paragraphs: int) -> float:
        text, started = named(prose(paragraphs, seed=1)), time.process_time()
        assert _Prose(Characters(), text, 40, 40).passages
        return time.process_time() - started

    assert seconds(4000) < 30 * min(seconds(400) for _ in range(3)), "10 times as long; the square would be 100"


def test_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(SurgeryError, match="quotations need at least one distance of 1 token or more"):
        make_quotations(tokenizer, distances=())
    with pytest.raises(SurgeryError, match="need a sample, a cue and a token"):
        make_quotations(tokenizer, cue=0)
    with pytest.raises(SurgeryError, match=r"this text has \d+ paragraphs of 50 to 256 tokens") as raised:
        make_quotations(tokenizer, text=named(prose(12)), **FEW | {"samples": 50})
    fits = int(re.search(r"samples=(\d+)", str(raised.value))[1])
    assert len(make_quotations(tokenizer, text=named(prose(12)), **FEW | {"samples": fits})) == 2 * fits, "the remedy"
    with pytest.raises(SurgeryError, match="0 of them with 90,000 tokens of other prose") as raised:
        make_quotations(tokenizer, text=named(prose()), **FEW | {"distances": (90_000,)})
    assert "shorter distances" in str(raised.value)
    with pytest.raises(SurgeryError, match="this text has 0 paragraphs"):
        make_quotations(tokenizer, text=named("word " * 900), **FEW)
    assert load_text("builtin").text, "the default text serves with the defaults"
    assert len(make_quotations(tokenizer)) == 48
