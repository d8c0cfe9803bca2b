"""Questions about which of two passages of a text came first: the sequence order recall of Pink et al. 2024
("Assessing Episodic Memory in LLMs with Sequence Order Recall Tasks", arXiv 2410.08133).

A prompt has the text, and then both passages again, as A and B. Each pair is asked twice, with its passages in either
order, so that a preference for a letter, or for what was named last, cancels.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.data.haystack import (
    CUT,
    SENTENCE_START,
    WORD_START,
    Composed,
    Needle,
    NeedleMaker,
    asked,
    common,
    form_for,
    in_tokens,
)
from surgery.data.text import BUILTIN, Text, load_text
from surgery.errors import ModelMismatchError, SettingError, TextError

QUESTION = 'Which of these two passages comes first in the text?\n\nA: "{a}"\n\nB: "{b}"'
LEAD = "The passage that comes first in the text is passage"
LABELS = ("A", "B")
TRIES = 20  # most stretches of text that are tried for a pair of passages
USED = 0.9  # share of the text that surely fits, in which passages are chosen


@dataclass(frozen=True)
class Ordering:
    """A pair of passages, asked in both orders.

    Attributes:
        length: requested number of tokens of the prompts.
        sample, seed: together with the length, they determine everything that is random.
        distance: tokens from the beginning of the first passage to that of the second.
        asked: the two prompts. In one the right answer is A, in the other it is B. An answer is the token at which the
            two answers differ. The span is that of the passage that comes first, and `more` has the second.
        wrong: the token of the wrong answer to each.
    """

    length: int
    sample: int
    seed: int
    distance: int
    asked: tuple[Needle, Needle]
    wrong: tuple[int, int]

    def outside(self, sinks: int, window: int) -> bool:
        """Whether the question sees neither passage through sinks + window (see `Needle.outside`)."""
        return all(needle.outside(sinks, window) for needle in self.asked)


def make_orderings(
    tokenizer,
    *,
    length: int = 1024,
    cases: int = 48,
    words: int = 12,
    seed: int = 0,
    text: str | Path | Text = BUILTIN,
    form: str = "auto",
) -> list[Ordering]:
    """Pairs of passages in stretches of a text. The same arguments give the same prompts.

    Args:
        length: tokens of the prompts, which may be shorter by a word of the text.
        words: words of a passage. A passage begins where a sentence begins, and occurs once in the text.
        text: see `surgery.data.text.load_text`; the held-out part of the built-in text.
        form: as for `make_needles`.

    Raises:
        SurgeryError: the length has no room for the question, the text has no two such passages, or the tokenizer
            cannot tell the answers apart.
    """
    if min(length, cases, words) < 1:
        raise SettingError("length, cases and words are at least 1", fix="for example length=1024 cases=48 words=12")
    source = load_text(text, part="held-out")
    maker = NeedleMaker(tokenizer, source, form_for(tokenizer, form), "digits", 1)
    return [_ordering(maker, length, words, seed, sample) for sample in range(cases)]


def _ordering(maker: NeedleMaker, length: int, words: int, seed: int, sample: int) -> Ordering:
    draw = random.Random(f"{seed} order {length} {words} {sample}")
    for _ in range(TRIES):
        hay = maker.stretch(draw, length)
        room = int(USED * length * maker.letters_per_token) - len(QUESTION) - len(LEAD)
        found = _passages(hay[: max(0, room)], hay, words)
        while len(found) >= 2:
            pair = sorted(draw.sample(found, 2))
            if (cut := _fitting_cut(maker, hay, pair, length)) is not None:
                return _encoded(maker, hay[:cut].rstrip(), pair, (length, sample, seed))
            found = [passage for passage in found if passage[1] < pair[1][1]]  # the second was too near the end
    raise TextError(
        f"a prompt of {length} tokens has no room for two passages of {words} words and the question about them",
        where=maker.title,
        fix="a longer length, or fewer words",
    )


def _passages(part: str, hay: str, words: int) -> list[tuple[int, int]]:
    """The letters [first, end) of passages in a part of the text that occur once, each at the start of a sentence."""
    one = re.compile(rf"\S+(?:\s+\S+){{{words - 1}}}")
    for pattern in (SENTENCE_START, WORD_START):
        starts = [0, *(match.end() for match in pattern.finditer(part))]
        matches = [match for start in starts if (match := one.match(part, start))]
        found: list[tuple[int, int]] = []
        for match in matches:  # those that do not overlap
            if hay.count(match[0]) == 1 and (not found or match.start() >= found[-1][1]):
                found.append(match.span())
        if len(found) >= 2:
            return found
    return []


def _fitting_cut(maker: NeedleMaker, hay: str, pair: list[tuple[int, int]], length: int) -> int | None:
    """The letter at which the text is cut so that both prompts have `length` tokens; None: it cuts the passages."""
    cuts = [match.end() for match in CUT.finditer(hay) if match.end() >= pair[1][1]]

    def tokens(cut: int) -> int:
        return max(_up_to_the_answer(maker, _composed(maker, hay[:cut].rstrip(), pair, order)) for order in (0, 1))

    fits = bisect_right(cuts, length, key=tokens)
    return cuts[fits - 1] if fits else None


def _up_to_the_answer(maker: NeedleMaker, composed: Composed) -> int:
    """The number of tokens before the one at which the two answers differ."""
    return common(*(maker.ids(f"{composed.text} {label}") for label in LABELS))


def _composed(maker: NeedleMaker, hay: str, pair: list[tuple[int, int]], order: int) -> Composed:
    """The prompt. Order 0 names the passage that comes first as A, order 1 as B."""
    quoted = [" ".join(hay[first:end].split()) for first, end in pair]
    a, b = quoted if order == 0 else reversed(quoted)
    question = QUESTION.format(a=a, b=b)
    content = f"{hay}\n\n{question}"
    text, shift = asked(maker.tokenizer, maker.form, content, LEAD)
    first, second = ((shift + begin, shift + end) for begin, end in pair)
    return Composed(text, first, shift + len(content) - len(question), (second,))


def _encoded(maker: NeedleMaker, hay: str, pair: list[tuple[int, int]], drawn: tuple[int, int, int]) -> Ordering:
    length, sample, seed = drawn
    needles, wrong = [], []
    for order, right in enumerate(LABELS):
        composed = _composed(maker, hay, pair, order)
        fix = "another probe: this one needs a tokenizer that can write A and B"
        mine, other = (
            in_tokens(maker.tokenizer, maker.ids, label, composed, fix) for label in (right, LABELS[1 - order])
        )
        full, others = (each["prompt"] + each["answer"] for each in (mine, other))
        cut = common(full, others)
        if cut == min(len(full), len(others)):
            raise ModelMismatchError("the tokenizer gives A and B tokens that begin alike", fix=fix)
        needle = Needle(length, pair[0][0] / len(hay), sample, seed, right, **mine)
        needles.append(replace(needle, prompt=full[:cut], answer=(full[cut],)))
        wrong.append(others[cut])
    first, second = needles
    distance = first.more[0][0] - first.span[0]
    return Ordering(length, sample, seed, distance, (first, second), (wrong[0], wrong[1]))
