"""Prompts that quote a paragraph of prose and begin it again later: does the model continue it word for word?

    lead . paragraph . other prose . beginning of the paragraph  ->  how the paragraph goes on

Every part is a piece of one text as tokens and ends where a paragraph ends, so all lengths are exact. For each prompt
there is a second one with another piece of the text in the place of the paragraph. What a model knows of the prose
without having read it shows there: the floor.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from surgery.data.haystack import Needle
from surgery.data.text import BUILTIN, CLOSERS, STOPS, Text, begin_of_text, load_text
from surgery.data.word_list import refuse_distances
from surgery.errors import SettingError, TextError

LEAD = 64  # tokens before the paragraph, so that it is not among the first tokens, which streaming heads keep
LONGEST = 256  # tokens of a paragraph, at most
LETTER_TOKENS = 4  # most tokens of a letter: the bytes of UTF-8


@dataclass(frozen=True)
class Quotation(Needle):
    """One prompt. `length` is the distance, `depth` is 0, the span is the paragraph, `secret` how it goes on.

    Attributes:
        unread: the prompt with another piece of the text in place of the paragraph; as many tokens as `prompt`.
    """

    unread: tuple[int, ...] = field(kw_only=True)


class Passage(NamedTuple):
    """Tokens [first, end) of a text: a paragraph, or a run of sentences."""

    first: int
    end: int


def make_quotations(
    tokenizer,
    *,
    distances: Sequence[int] = (128, 512, 1024),
    samples: int = 16,
    cue: int = 16,
    tokens: int = 16,
    seed: int = 0,
    text: str | Path | Text = BUILTIN,
) -> list[Quotation]:
    """Prompts that begin a paragraph a second time, `samples` for each distance.

    The same paragraphs are asked for at every distance, and what stands between is the end of the same piece of text.
    So distances differ in nothing else. No prompt has the beginning or the continuation a third time.

    Args:
        distances: tokens of other prose between the paragraph and its second beginning.
        cue, tokens: tokens that are given the second time, and tokens that the model continues.
        text: the prose (see `load_text`); the held-out part of the built-in text. A text without empty lines is cut at
            sentences.

    Raises:
        SurgeryError: an argument makes no sense, or the text has too few paragraphs that are long enough, or no room
            for a distance.
    """
    refuse_distances(distances, "quotations")
    if min(samples, cue, tokens) < 1:
        raise SettingError("quotations need a sample, a cue and a token", fix="samples=16 cue=16 tokens=16")
    prose = _Prose(tokenizer, load_text(text, part="held-out"), cue, tokens)
    parts = prose.parts(samples, max(distances), random.Random(f"{seed} quotations"))
    begin = begin_of_text(tokenizer)
    return [
        _quotation(tokenizer, prose, part, begin, distance=distance, sample=sample, seed=seed)
        for distance in distances
        for sample, part in enumerate(parts)
    ]


class _Parts(NamedTuple):
    """A paragraph, and where the other pieces of its prompts end: lead, what stands between, what replaces it."""

    paragraph: Passage
    between: int
    lead: int
    other: int


def _quotation(
    tokenizer: Any, prose: _Prose, parts: _Parts, begin: list[int], *, distance: int, sample: int, seed: int
) -> Quotation:
    """One quotation of a paragraph at a distance."""
    first, end = parts.paragraph
    second = prose.ids[first : first + prose.cue]
    answer = prose.ids[first + prose.cue : first + prose.cue + prose.tokens]
    lead = [*begin, *prose.before(parts.lead, LEAD)]
    between = prose.before(parts.between, distance)
    prompt, unread = (
        (*lead, *piece, *between, *second) for piece in (prose.ids[first:end], prose.before(parts.other, end - first))
    )
    span, question = (len(lead), len(lead) + end - first), len(prompt) - prose.cue
    secret = tokenizer.decode(answer)
    return Quotation(distance, 0.0, sample, seed, secret, prompt, tuple(answer), span, question, unread=unread)


class _Prose:
    """A text as tokens, with the paragraphs that can be quoted.

    Attributes:
        ids: the tokens of the whole text.
        ends: first tokens of paragraphs, where the piece before may end.
        passages: what may be quoted, in the text's order.
    """

    def __init__(self, tokenizer: Any, text: Text, cue: int, tokens: int):
        self.title, self.cue, self.tokens = text.title, cue, tokens
        self.ids = tokenizer(text.text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
        self._written = "".join(map(chr, self.ids))  # a letter for each token, for fast search
        pieces = {token: tokenizer.decode([token]) for token in set(self.ids)}
        need, most = cue + tokens, max(LONGEST, cue + tokens)
        breaks, self.ends = _paragraphs(self.ids, pieces)
        following = zip(self.ends, (_next(breaks, start + 1) for start in self.ends), strict=True)
        plain = set(self.ends)  # a paragraph that code follows would end with the code's indentation
        found = [Passage(start, end) for start, end in following if end in plain]
        if not any(end - first >= need for first, end in found):
            self.ends = _sentences(tokenizer, self.ids, pieces)
            found = [Passage(one, end) for one in self.ends if (end := _next(self.ends, one + need)) is not None]
        self.passages = self._unique([each for each in found if need <= each.end - each.first <= most])

    def before(self, end: int, size: int) -> list[int]:
        """The `size` tokens that end at `end`."""
        return self.ids[end - size : end]

    def parts(self, samples: int, longest: int, draw: random.Random) -> list[_Parts]:
        """The parts of `samples` prompts, each with another paragraph; `longest`: the longest distance."""
        found = list(self._all_parts(samples, longest, draw))
        if len(found) < samples:
            need, room = self.cue + self.tokens, len(self.ids)
            fits = f"samples={len(found)}" if found else "shorter distances"
            raise TextError(
                f"this text has {len(self.passages):,} paragraphs of {need} to {max(LONGEST, need)} tokens, and "
                f"{len(found)} of them with {longest:,} tokens of other prose; {samples} are needed "
                f"({room:,} tokens in all)",
                where=self.title,
                fix=f"a longer text, fewer tokens to continue, or {fits}",
            )
        return found

    def _all_parts(self, samples: int, longest: int, draw: random.Random) -> Iterator[_Parts]:
        found = 0
        for paragraph in draw.sample(self.passages, len(self.passages)):
            taken, ends = [paragraph], []
            for size in (longest, LEAD, paragraph.end - paragraph.first):
                free = [end for end in self.ends if end >= size and _is_free(end - size, end, taken)]
                if not free:
                    break
                ends.append(draw.choice(free))
                taken.append(Passage(ends[-1] - size, ends[-1]))
            else:
                yield _Parts(paragraph, *ends)
                found += 1
            if found == samples:
                return

    def _unique(self, passages: list[Passage]) -> list[Passage]:
        """The passages of which the text has the beginning, and what follows it, only once."""
        cues = self._repeated([each.first for each in passages], self.cue)
        answers = self._repeated([each.first + self.cue for each in passages], self.tokens)
        return [each for each in passages if each.first not in cues and each.first + self.cue not in answers]

    def _repeated(self, places: list[int], size: int) -> set[int]:
        """Of the places those whose next `size` tokens stand elsewhere too. The text is read once for all of them."""
        times = dict.fromkeys((self._written[place : place + size] for place in places), 0)
        for first in range(len(self._written) - size + 1):
            if (part := self._written[first : first + size]) in times:
                times[part] += 1
        return {place for place in places if times[self._written[place : place + size]] > 1}


def _is_free(first: int, end: int, taken: Sequence[Passage]) -> bool:
    return all(end <= other.first or first >= other.end for other in taken)


def _next(places: Sequence[int], least: int) -> int | None:
    """The first of the places, which are sorted, at `least` or after it."""
    index = bisect_left(places, least)
    return places[index] if index < len(places) else None


def _paragraphs(ids: Sequence[int], pieces: dict[int, str]) -> tuple[list[int], list[int]]:
    """First tokens after an empty line; and those of them that are not indented, as code is.

    Args:
        pieces: what each token writes.
    """
    breaks, starts, blank = [], [], ""
    for index, token in enumerate(ids):
        body = pieces[token].strip()
        before, _, _ = pieces[token].partition(body) if body else (pieces[token], "", "")
        blank += before
        if body:
            if blank.count("\n") > 1:
                breaks.append(index)
                starts += [index] if blank.endswith("\n") else []
            blank = pieces[token][len(pieces[token].rstrip()) :]
    return breaks, starts


def _sentences(tokenizer: Any, ids: Sequence[int], pieces: dict[int, str]) -> list[int]:
    """First tokens of sentences."""

    def ends(index: int) -> bool:
        text = pieces[ids[index]]
        if "\ufffd" in text:  # a byte of a letter
            text = tokenizer.decode(ids[max(0, index + 1 - LETTER_TOKENS) : index + 1])
        return text.rstrip().rstrip(CLOSERS).endswith(STOPS)

    ended = [ends(index) for index in range(len(ids))]
    return [index + 1 for index in range(len(ids) - 1) if ended[index] and not ended[index + 1]]
