"""Requests in the chat template: alone as ever, and after a text of at most so many tokens; what is refused."""

from __future__ import annotations

import re

import pytest
from tokenizers_of_bytes import byte_tokenizer

from surgery.data.requests import REQUESTS, make_requests
from surgery.data.text import Text, load_text
from surgery.errors import SurgeryError

TEXT = load_text("builtin", "held-out")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(chat=True)


def alone(tokenizer, words: str) -> tuple[int, ...]:
    """The prompt of a request without a text, by the template alone."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
    )
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_without_a_text_the_prompts_are_the_template_s_own_to_the_bit(tokenizer):
    made = make_requests(tokenizer, REQUESTS)
    assert [case.prompt for case in made] == [alone(tokenizer, words) for words in REQUESTS]
    assert {(case.length, case.text) for case in made} == {(0, 0)}
    assert make_requests(tokenizer, REQUESTS, (0, 64), TEXT)[:10] == made


@pytest.mark.parametrize("length", [40, 512, 3000])
def test_a_text_of_so_many_tokens_stands_before_the_request(tokenizer, length):
    made, seen = make_requests(tokenizer, REQUESTS, (length,), TEXT), set()
    for case in made:
        said = tokenizer.decode(case.prompt)
        match = re.fullmatch(
            r"<s>\[user\] Please read this text first\.\n\n(.*)\n"
            r"\[assistant\] I have read the text\. What can I do for you\?\n"
            rf"\[user\] {re.escape(case.words)}\n\[model\] ",
            said,
            re.DOTALL,
        )
        assert match, said[-200:]
        text = match[1]
        size = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert size == case.text <= length
        start = TEXT.text.find(text[:30])
        assert start >= 0
        rest = TEXT.text[start:].strip()
        if rest.startswith(text) and len(rest) > len(text) + 20:
            more = re.match(r"\s*\S{1,16}", rest[len(text) :])[0]
            assert len((text + more).encode()) > length, "it is shorter by less than a word"
        assert case.prompt[-len(alone(tokenizer, case.words)) + 1 :] == alone(tokenizer, case.words)[1:]
        seen.add(text[:30])
    assert len(seen) == len(REQUESTS), "each request has another stretch"
    assert made == make_requests(tokenizer, REQUESTS, (length,), TEXT)


def test_every_length_has_all_requests(tokenizer):
    made = make_requests(tokenizer, ("Hi", "Who?"), (0, 50, 90), TEXT)
    assert [(case.length, case.words) for case in made] == [(n, w) for n in (0, 50, 90) for w in ("Hi", "Who?")]


def test_a_stretch_goes_on_at_the_beginning_of_the_text(tokenizer):
    short = Text("short", "0" * 64, "One two three. Four five six. Seven eight nine.")
    *_, last = make_requests(tokenizer, ("a", "b", "c"), (45,), short)
    assert "Seven eight nine.\n\nOne two three. Four five\n" in tokenizer.decode(last.prompt)


def test_refused(tokenizer):
    short = Text("short", "0" * 64, "One two three. Four five six.")
    with pytest.raises(SurgeryError, match="the text is too short: it has 29 tokens, and 64 are") as raised:
        make_requests(tokenizer, ("Hi",), (64,), short)
    most = int(re.search(r"length=(\d+)", str(raised.value))[1])
    assert make_requests(tokenizer, ("Hi",), (most,), short)[0].text == most, "the remedy works"
    with pytest.raises(SurgeryError, match="2 tokens are too few for a text") as raised:
        make_requests(tokenizer, ("Hi",), (2,), short)
    least = int(re.search(r"length=(\d+)", str(raised.value))[1])
    assert make_requests(tokenizer, ("Hi",), (least,), short)[0].text == least
    last_only = byte_tokenizer(chat=True)
    last_only.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(SurgeryError, match="leaves out an earlier message"):
        make_requests(last_only, ("Hi",), (20,), short)
    assert make_requests(last_only, ("Hi",)), "and asks without one"
    one_turn = byte_tokenizer(chat=True)
    one_turn.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}x"
    with pytest.raises(SurgeryError, match="the chat template does not work: one"):
        make_requests(one_turn, ("Hi",), (20,), short)
    silent = byte_tokenizer(chat=True)
    silent.chat_template = "{{ '' }}"
    with pytest.raises(SurgeryError, match="writes nothing of a message"):
        make_requests(silent, ("Hi",))
