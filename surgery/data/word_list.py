"""Prompts of random words, a few of which come again: does the model write the words that followed them before?

    lead . passage (cue, answer) . other words . cue  ->  answer

Words are drawn from a text, and none but the cue comes twice. So nothing helps to predict the answer but its first
occurrence, `distance` tokens before. Olsson et al. 2022 ("In-context Learning and Induction Heads", arXiv 2209.11895)
find the heads that copy with such repeats.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from surgery.data.haystack import Composed, Needle, in_tokens
from surgery.data.text import BUILTIN, Text, begin_of_text, load_text
from surgery.errors import SettingError, TextError

WORD = re.compile(r"(?<!\w)\w{2,14}(?!\w)")  # names and numbers of code among them
LONG_WORD = 16  # tokens of a long word; a prompt may be shorter by one
LEAD = 24  # words before the passage, so that it is not among the first tokens, which streaming heads keep


def make_repeats(
    tokenizer,
    *,
    distances: Sequence[int] = (200, 400, 800, 1500),
    samples: int = 6,
    cue: int = 16,
    words: int = 2,
    seed: int = 0,
    text: str | Path | Text = BUILTIN,
) -> list[Needle]:
    """Prompts of random words whose last words came before, `samples` for each distance.

    Args:
        distances: tokens from the cue's first occurrence to its second; prompts may be shorter by a word.
        cue, words: how many words come again before the answer, and how many the answer has.
        text: where the words are from (see `load_text`); the held-out part of the built-in text.

    Returns:
        Needles. `length` is the distance, `depth` is 0, and the span is that of the passage, cue and answer.

    Raises:
        SurgeryError: an argument makes no sense, the text has too few different words, or the tokenizer cannot write
            them.
    """
    refuse_distances(distances)
    if min(samples, cue, words) < 1:
        raise SettingError("repeats need a sample, a cue and a word", fix="samples=6 cue=16 words=2")
    loaded = load_text(text, part="held-out")
    known, needed = sorted(set(WORD.findall(loaded.text))), LEAD + cue + words
    if len(known) < needed:
        raise TextError(
            f"this text has {len(known):,} different words, and a prompt needs {needed} at least",
            where=loaded.title,
            fix="a longer text, or fewer words in cue and answer",
        )
    maker = _RepeatMaker(tokenizer, loaded.title, known, cue, words)
    return [maker.make(distance, sample, seed) for distance in distances for sample in range(samples)]


def refuse_distances(distances: Sequence[int], what: str = "repeats") -> None:
    """Raise where there is no distance, or one that is no number of tokens; `what` needs it."""
    if not distances or min(distances) < 1:
        raise SettingError(f"{what} need at least one distance of 1 token or more", fix="distances=200,400")


class _RepeatMaker:
    """Makes repeats of one text's words with one tokenizer."""

    def __init__(self, tokenizer, title: str, known: list[str], cue: int, words: int):
        self.tokenizer, self.title, self.known, self.cue, self.words = tokenizer, title, known, cue, words
        self.bos = begin_of_text(tokenizer)

    def make(self, distance: int, sample: int, seed: int) -> Needle:
        draw = random.Random(f"{seed} repeats {distance} {sample}")
        drawn = draw.sample(self.known, len(self.known))
        lead, passage = " ".join(drawn[:LEAD]), drawn[LEAD : LEAD + self.cue + self.words]
        cue, secret = " ".join(passage[: self.cue]), " ".join(passage[self.cue :])
        own, rest = f"{lead} {cue} {secret}", drawn[LEAD + len(passage) :]
        before = len(self._ids(lead))

        def tokens(count: int) -> int:
            """Tokens between the beginnings of the passage and of its return, with so many words in between."""
            return len(self._ids(" ".join([own, *rest[:count]]))) - before

        count = bisect_right(range(len(rest) + 1), distance, key=tokens) - 1
        if count < 0:
            raise SettingError(
                f"a distance of {distance} tokens is too short for {self.cue + self.words} words",
                fix=f"at least {tokens(0)} tokens, or fewer words",
            )
        if count == len(rest) and distance - tokens(count) > LONG_WORD:
            raise TextError(
                f"this text has {len(self.known):,} different words, which are too few for a distance of "
                f"{distance:,} tokens",
                where=self.title,
                fix=f"distances of about {tokens(count):,} at most, or a longer text",
            )
        text = " ".join([own, *rest[:count], cue])
        composed = Composed(text, (len(lead) + 1, len(own)), len(text) - len(cue))
        fix = "name a text in a script that the tokenizer can write"
        return Needle(
            distance, 0.0, sample, seed, secret, **in_tokens(self.tokenizer, self._ids, secret, composed, fix)
        )

    def _ids(self, text: str) -> list[int]:
        return self.bos + self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
