"""Greetings and short requests in the chat template, at the beginning of a conversation or after a long text.

With a text there are two earlier messages: the user gives the text to read, and the model says that it has read it.
The request is a message of its own, and does not need the text. So a conversation goes on about something else after
a document. The request is thus written exactly as it is without a text. In one message with the text it would be a
question about the text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.data.haystack import CUT, SENTENCE_START, chat_prompt
from surgery.data.text import Text
from surgery.errors import SettingError, TextError, UnsupportedModelError

REQUESTS = (
    "Hello!",
    "Good morning! How are you?",
    "What is your name?",
    "What is the capital of France?",
    "Name three colours.",
    "What is two plus three?",
    "Write one sentence about the sea.",
    "Thank you very much for your help.",
    'Translate "thank you" into French.',
    "Can you help me with my homework?",
)
GIVEN = "Please read this text first.\n\n{text}"  # the user's message with the text
TAKEN = "I have read the text. What can I do for you?"  # what the model says to it
FIX = "choose another probe"


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        words: the user's words.
        prompt: token ids of the conversation, up to where the model answers.
        length: requested number of tokens of the text before it; 0: there is none.
        text: tokens that the text has: at most `length`, fewer by less than a word.
    """

    words: str
    prompt: tuple[int, ...]
    length: int = 0
    text: int = 0


def make_requests(
    tokenizer, words: Sequence[str], lengths: Sequence[int] = (0,), text: Text | None = None
) -> list[Request]:
    """Each request, after a text of each length. The same arguments give the same prompts.

    Every request of a length follows another stretch of the text. Stretches begin at sentences that are evenly spread,
    and go on at the text's beginning after its end.

    Args:
        lengths: tokens of the text before the request, at most; 0: no text.
        text: is read where a length is not 0.

    Raises:
        SurgeryError: the template raises, writes nothing of a message, or changes or drops the text; or the text has
            fewer tokens than a length.
    """
    asked = []
    for length in lengths:
        for index, request in enumerate(words):
            share = index / len(words)
            stretch, size = _stretch(tokenizer, text, length, share) if length and text is not None else ("", 0)
            asked.append(Request(request, tuple(_prompt(tokenizer, request, stretch)), length, size))
    if not all(case.prompt for case in asked):
        raise UnsupportedModelError("the chat template writes nothing of a message", fix=FIX)
    return asked


def _prompt(tokenizer, request: str, stretch: str) -> list[int]:
    """The tokens of the conversation in the chat template, up to where the model answers."""
    given = GIVEN.format(text=stretch)
    before = [{"role": "user", "content": given}, {"role": "assistant", "content": TAKEN}] if stretch else ()
    text = chat_prompt(tokenizer, request, fix=FIX, before=before)
    if stretch and given not in text:
        raise UnsupportedModelError(
            "the chat template changes or leaves out an earlier message", fix="length=0: requests without a text"
        )
    return _ids(tokenizer, text)


def _stretch(tokenizer, text: Text, length: int, share: float) -> tuple[str, int]:
    """A stretch of a text that has at most `length` tokens, cut at a word, and its number of tokens.

    Args:
        share: where it begins, from 0 to 1 of the text, at the sentence there.
    """
    whole = text.text.strip()
    starts = [0, *(match.end() for match in SENTENCE_START.finditer(whole))]
    start = starts[bisect_right(starts, share * len(whole)) - 1]
    turned = f"{whole[start:]}\n\n{whole[:start]}".strip()
    letters = length
    while (tokens := len(_ids(tokenizer, turned[:letters]))) <= length and letters < len(turned):
        letters *= 2
    if tokens < length:
        raise TextError(
            f"the text is too short: it has {tokens:,} tokens, and {length:,} are to stand before a request",
            where=text.title,
            fix=f"a longer text, or length={tokens} at most",
        )
    cuts = [match.end() for match in CUT.finditer(turned[:letters])]

    def size(cut: int) -> int:
        return len(_ids(tokenizer, turned[:cut].rstrip()))

    fits = bisect_right(cuts, length, key=size)
    if not fits:
        raise SettingError(f"{length} tokens are too few for a text", fix=f"length={size(cuts[0])}, or more")
    return turned[: cuts[fits - 1]].rstrip(), size(cuts[fits - 1])


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
