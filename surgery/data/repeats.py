"""Rows of text in which something said earlier comes back, from short distances to the whole row.

    passage   passages of the text again, word for word, a third of the row in all
    code      lines of a label and a random code, hidden in the text, and given again at the end
    lookup    a list of names and values; some of its lines again at the end, in another order. Where all of the row's
              text is between them, the list begins the row
    quote     sentences of the text in quotation marks, later in the text

Everything here is a pure function of token lists and a seeded `random.Random`. Text is a list of sentences (token
lists), so that parts are put between sentences. Words, codes and punctuation as tokens come from `recall_rows`.

Ordinary text repeats little at a distance. That models learn to copy from repeats is the observation of Olsson et al.
2022, "In-context Learning and Induction Heads", arXiv 2209.11895; distillation on such rows asks the base for it.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

SHORTEST_PASSAGE = 8  # tokens of a passage that comes back
PASSAGES = 1 / 3  # of the row, that the passages which come back have in all, and a single one at most
QUOTE = 16, 64  # tokens of a quotation, in a row that is long enough
TOKENS_A_QUOTE, QUOTES = 128, 3  # one quotation for so many tokens of a row at most, or so many in a shorter row
LINES = 32  # most hidden lines of a row
FEWEST_LINES, LINE_SHARE = 2, 5  # so many lines at least; none is longer than a fifth of the row
LIST_SHARES = 0.15, 0.6  # of the row, for a list and its repeated lines


@dataclass(frozen=True)
class Marks:
    """Punctuation as tokens. Each is empty where the tokenizer cannot write it.

    Attributes:
        gap: an empty line.
        line: the end of a line.
        opening, closing: quotation marks.
        breaks: tokens that are nothing but ends of lines. No copy begins or ends with one.
    """

    gap: tuple[int, ...] = ()
    line: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    breaks: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LabelledLine:
    """A line as tokens: the label with the end of the line before it and the mark after it, and the value."""

    label: tuple[int, ...]
    value: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens of the line."""
        return self.label + self.value


@dataclass(frozen=True)
class Repeat:
    """Tokens of a row that were in it before: [first, end), and how many tokens earlier they were first."""

    first: int
    end: int
    distance: int


@dataclass(frozen=True)
class RepeatRow:
    """A row, without the tokens with which every text begins.

    Attributes:
        kind: one of `KINDS`.
        ids: its tokens, exactly as many as were asked for.
        used: how many tokens of the text it uses up, from the text's beginning on.
        repeats: what comes back.
    """

    kind: str
    ids: list[int]
    used: int
    repeats: tuple[Repeat, ...]


Text = Sequence[Sequence[int]]


def passage(text: Text, size: int, where: float, draw: random.Random, marks: Marks, entries=()) -> RepeatRow:
    """Passages come back word for word, as paragraphs of their own.

    Args:
        text: sentences with at least `size` tokens in all.
        size: tokens of the row.
        where: from 0 to 1: the first passage's distance, from the shortest to the whole row. The others' are evenly
            spread from it on.
        draw: for all that is random.
        entries: not read.
    """
    longest = max(1.0, PASSAGES * size / SHORTEST_PASSAGE)
    wanted: list[int] = []
    while (left := round(PASSAGES * size) - sum(wanted)) >= SHORTEST_PASSAGE or not wanted:
        wanted.append(max(SHORTEST_PASSAGE, min(left, round(SHORTEST_PASSAGE * longest ** draw.random()))))
    return _with_copies("passage", text, size, _spread(where, wanted), draw, marks)


def quote(text: Text, size: int, where: float, draw: random.Random, marks: Marks, entries=()) -> RepeatRow:
    """Some sentences come back in quotation marks; arguments as for `passage`."""
    quotes = max(size // TOKENS_A_QUOTE, min(QUOTES, size // (4 * SHORTEST_PASSAGE)))
    count = draw.randint(1, max(1, quotes))
    shortest, longest = (max(SHORTEST_PASSAGE, min(most, size // (3 * count))) for most in QUOTE)
    wanted = [draw.randint(shortest, longest) for _ in range(count)]
    return _with_copies("quote", text, size, _spread(where, wanted), draw, marks)


def code(
    text: Text, size: int, where: float, draw: random.Random, marks: Marks, entries: Sequence[LabelledLine] = ()
) -> RepeatRow:
    """Lines are hidden in the text, evenly spread, and given again at the end in another order.

    Args:
        where: from 0 to 1: moves the hidden lines towards the end.
        entries: at least FEWEST_LINES lines; the first of them are taken, as many as fit.
        others: as for `passage`.
    """
    room = size // 2 if where < 0.5 else 4 * size // 5
    chosen = _fitting(entries, room, lambda entry: 2 * len(entry.ids) + len(marks.line), draw.randint(2, LINES))
    again = _another_order(chosen, draw)
    listed = sum(len(entry.ids) for entry in again)
    hidden = [entry.ids + marks.line for entry in chosen]
    count = size - listed - sum(map(len, hidden))
    body, ends, used = _up_to_a_sentence(text, count)
    wanted = [round((index + where) / len(chosen) * count) for index in range(len(chosen))]
    places = [_nearest(ends, place, 0, count) for place in wanted]
    ids, starts = _inserted(body, list(zip(places, hidden, strict=True)))
    originals = dict(zip(chosen, starts, strict=True))
    return _with_list_again("code", ids, used, again, originals)


def lookup(
    text: Text, size: int, where: float, draw: random.Random, marks: Marks, entries: Sequence[LabelledLine] = ()
) -> RepeatRow:
    """A list of lines, then text, and at the end half of the lines in another order.

    Args:
        where: from 0 to 1: the text between list and end, from none to all of it; the rest is before the list.
        others: as for `code`.
    """
    room = round(size * draw.uniform(*LIST_SHARES))
    listed = _fitting(entries, room, lambda entry: 1.5 * len(entry.ids), len(entries))
    again = _another_order(listed, draw)[: max(1, len(listed) // 2)]
    first = list(chain.from_iterable(entry.ids for entry in listed))
    tail = sum(len(entry.ids) for entry in again)
    count = size - len(first) - len(marks.gap) - tail
    body, ends, used = _up_to_a_sentence(text, count)
    begins = _nearest(ends, round((1 - where) * count), 0, count)
    starts = accumulate((len(entry.ids) for entry in listed[:-1]), initial=begins)
    originals = dict(zip(listed, starts, strict=True))
    ids = [*body[:begins], *first, *marks.gap, *body[begins:]]
    return _with_list_again("lookup", ids, used, again, originals)


KINDS: dict[str, Callable[..., RepeatRow]] = {"passage": passage, "code": code, "lookup": lookup, "quote": quote}


def _spread(where: float, wanted: Sequence[int]) -> list[tuple[float, int]]:
    """The distance and the most tokens of each copy: distances evenly spread over [0, 1), the first one at `where`."""
    return [((where + index / len(wanted)) % 1, most) for index, most in enumerate(wanted)]


def _with_copies(
    kind: str, text: Text, size: int, copies: Sequence[tuple[float, int]], draw: random.Random, marks: Marks
) -> RepeatRow:
    """A row of text into which copies of its own passages are put, between empty lines or in quotation marks.

    Args:
        copies: for each copy its distance, from 0 (at once) to 1 (the whole row), and its most tokens.
    """
    opening, closing = (marks.gap, marks.gap) if kind == "passage" else (marks.opening, marks.closing)
    body, ends = list(chain.from_iterable(text)), _ends(text)
    room = size - sum(most + len(opening + closing) for _, most in copies)
    spans = []
    for where, most in copies:
        gap = round(where * max(0, room - most))  # from the passage's end to its copy
        latest = max(0, room - most - gap)
        first = _nearest(ends, draw.randint(0, latest), 0, latest)
        first, end = _trimmed(body, first, _last(ends, first + max(SHORTEST_PASSAGE, most // 2), first + most), marks)
        spans.append((_nearest(ends, end + gap, end, room), first, end))
    spans.sort()
    parts = []
    for place, first, end in spans:
        before, after = opening, closing
        if kind == "passage":  # one empty line is enough
            before = () if body[place - 1 : place] and body[place - 1] in marks.breaks else before
            after = () if body[place] in marks.breaks else after
        parts.append((place, len(before), (*before, *body[first:end], *after)))
    used = size - sum(len(part) for *_, part in parts)
    ids, starts = _inserted(body[:used], [(place, part) for place, _, part in parts])
    repeats = []
    for (_, first, end), (_, lead, _), start in zip(spans, parts, starts, strict=True):
        begins = start + lead
        moved = sum(len(part) for place, _, part in parts if place <= first)  # by what was put in before it
        if not any(first < place < end for place, *_ in parts):  # another copy may cut it
            repeats.append(Repeat(begins, begins + end - first, begins - first - moved))
    return RepeatRow(kind, ids, used, tuple(repeats))


def _trimmed(body: Sequence[int], first: int, end: int, marks: Marks) -> tuple[int, int]:
    """[first, end) without ends of lines at its own ends; as it was where nothing else is in it."""
    kept = [index for index in range(first, end) if body[index] not in marks.breaks]
    return (kept[0], kept[-1] + 1) if kept else (first, end)


def _with_list_again(
    kind: str, ids: list[int], used: int, again: Sequence[LabelledLine], originals: dict[LabelledLine, int]
) -> RepeatRow:
    """The row that ends with lines of `again`; their values come back. `originals`: where each line was first."""
    ids, repeats = list(ids), []
    for entry in again:
        start = len(ids)
        ids += entry.ids
        repeats.append(Repeat(start + len(entry.label), len(ids), start - originals[entry]))
    return RepeatRow(kind, ids, used, tuple(repeats))


def _fitting(
    entries: Sequence[LabelledLine], room: float, cost: Callable[[LabelledLine], float], most: int
) -> list[LabelledLine]:
    """The first entries that fit into `room` tokens: FEWEST_LINES at least, `most` at most."""
    costs = accumulate(map(cost, entries))
    count = sum(total <= room for total in costs)
    return list(entries[: max(FEWEST_LINES, min(count, most))])


def _another_order(entries: Sequence[LabelledLine], draw: random.Random) -> list[LabelledLine]:
    """The entries, shuffled; never in the same order."""
    shuffled = list(entries)
    while len(set(entries)) > 1 and shuffled == list(entries):
        draw.shuffle(shuffled)
    return shuffled


def _inserted(body: Sequence[int], parts: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[int], list[int]]:
    """The tokens with parts put in before the tokens `place`, in order of place, and where each part begins."""
    ids: list[int] = []
    starts, done = [], 0
    for place, part in parts:
        ids += body[done:place]
        starts.append(len(ids))
        ids += part
        done = place
    return [*ids, *body[done:]], starts


def _up_to_a_sentence(text: Text, count: int) -> tuple[list[int], list[int], int]:
    """`count` tokens up to the end of a sentence, where sentences end in them, and how much of the text this uses up.

    The lines that follow them begin after a whole sentence. What is too much is cut off at the beginning.
    """
    ends = _ends(text)
    last = bisect_left(ends, count)
    cut = ends[last] - count
    body = list(chain.from_iterable(text[:last]))[cut:]
    return body, [0, *(end - cut for end in ends[: last + 1] if end > cut)], ends[last]


def _ends(text: Text) -> list[int]:
    """Where sentences end, beginning with 0."""
    return list(accumulate(map(len, text), initial=0))


def _nearest(ends: list[int], wanted: int, low: int, high: int) -> int:
    """The end of a sentence that is nearest to `wanted` and in [low, high]; without one, `wanted` itself."""
    inside = ends[bisect_left(ends, low) : bisect_right(ends, high)]
    return min(inside, key=lambda end: abs(end - wanted), default=min(max(wanted, low), high))


def _last(ends: list[int], low: int, high: int) -> int:
    """The last end of a sentence in [low, high]; without one, `high`."""
    position = bisect_right(ends, high)
    return ends[position - 1] if position and ends[position - 1] >= low else high
