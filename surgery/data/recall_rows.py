"""Training rows in which something said earlier comes back, made from the documents of `heal.data`.

The forms of such rows are in `repeats`. Here a tokenizer gives them their parts: sentences of the documents, words of
the documents as labels, random codes, and punctuation. Nothing is in a language: a label is a word of the text itself.

An operation's calibration text may have such rows too (`calibration_recall`).

Documents are cut into stretches of a row at most. Stretches are used for these rows in a random order, until the rows
have their share (`heal.recall`). All other stretches are packed into plain rows, so no text is in both. Conversations
that the base writes are in plain rows alone. Within the rows with repeats a sentence is left out if it has a key or a
secret word of a recall test (`haystack.KEYS`, `WORDS`, `name_list.NAMES`).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from surgery.data import haystack, name_list
from surgery.data.documents import TURN, Documents
from surgery.data.packing import Packed
from surgery.data.repeats import KINDS, LINE_SHARE, LabelledLine, Marks, RepeatRow
from surgery.data.text import CLOSERS, RECALL_ROWS, SHORTEST_RECALL, STOPS, source_names
from surgery.errors import ModelMismatchError, TextError

SENTENCE = 64  # tokens; a longer sentence is cut
LETTER_TOKENS = 4  # most tokens of a letter: the bytes of UTF-8
WORD_LETTERS = 2, 14  # of a label
PIECE = 4  # letters of a label in a script without spaces
MOST_WORDS = 4096  # most words that are kept as labels
WORD_TOKENS = 400_000  # of so many tokens the words are taken
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = 3, 4, 6, 7, 8  # of a code; the judging needles' have five
FORMS = ("\n{label}: {value}", "\n{label} {value}", " {label} {value}")  # the first that a tokenizer can write
FEWEST, MOST = 16, 64  # lines that are drawn for a list, by the length of the row
PER_LINE = 10  # tokens of a row for each of them
TRIES = 8  # draws of a line that the tokenizer should be able to write


class Names(NamedTuple):
    """How errors name the settings of rows with repeats.

    Attributes:
        recall, length, data: their keys.
        more: what gives more text.
    """

    recall: str = "heal.recall"
    length: str = "heal.length"
    data: str = "heal.data"
    more: str = "name longer data, a shorter heal.length"


HEAL = Names()
ValueForm = Callable[[random.Random], str]  # draws a value
BEFORE = "a"  # a text before parts that are written inside a text

# No row with repeats has a word that needles, multi_needle and lookup hide or ask for, and no label is a word of their
# sentences. The words of the probe `repeats` are those of the held-out text, which are everybody's words.
JUDGING_WORDS = frozenset(f"{haystack.KEYS} {haystack.WORDS} {name_list.NAMES}".lower().split())
_SENTENCES = " ".join(part for pair in (*haystack.TEMPLATES, *name_list.FACTS) for part in pair)
JUDGING_LABELS = JUDGING_WORDS | frozenset(re.findall("[a-z]+", re.sub(r"\{\w+\}", "", _SENTENCES).lower()))


def training_rows(texts: Documents, tokenizer, heal, isolated: bool = True) -> tuple[Packed, dict]:
    """The rows of a training, and the record of those with repeats: {} with `heal.recall` 0.

    The record is {"recall": {"rows": how many, kind: how many of it, ...}}.

    Args:
        texts: the documents of `heal.data`.
        tokenizer: their tokenizer.
        heal: its recall, length and seed are read.
        isolated: as for `Packed`.

    Raises:
        SurgeryError: the text is too short for a plain row and a row with repeats, or the tokenizer cannot write them.
    """
    if not heal.recall:
        return Packed(texts, heal.length, isolated), {}
    rows, left = repeat_rows(texts, tokenizer, heal)
    plain = Packed(replace(texts, ids=left), heal.length, isolated)
    whole = Packed([[*texts.begin, *row.ids] for row in rows], heal.length, isolated)
    counts = Counter(row.kind for row in rows)
    record = {"rows": len(rows)} | {kind: counts[kind] for kind in KINDS if counts[kind]}
    return plain.mixed_with(whole, heal.seed), {"recall": record}


def repeat_rows(
    texts: Documents, tokenizer, heal, most: int | None = None, names: Names = HEAL
) -> tuple[list[RepeatRow], list[list[int]]]:
    """Rows with repeats, as many as `heal.recall` asks for, and the stretches of text that they do not use.

    Args:
        most: make so many rows at most.
        names: how errors name the settings.
        others: as for `training_rows`; and raises as it does.
    """
    stretches = texts.stretches(heal.length)
    order = list(range(len(stretches)))
    random.Random(f"{heal.seed} recall").shuffle(order)
    maker = _RowMaker(tokenizer, texts, heal, [stretches[index] for index in order[: _enough(stretches)]], names)
    left_tokens, apart, taken = sum(map(len, stretches)), sum(map(len, texts.conversations)), set()

    def more() -> Iterator[list[int]]:
        nonlocal left_tokens
        for index in order:
            if left_tokens - len(stretches[index]) < heal.length:  # what is left should fill a plain row
                return
            taken.add(index)
            left_tokens -= len(stretches[index])
            yield stretches[index]

    source, rows = _Sentences(maker, more()), []
    while len(rows) < heal.recall * (len(rows) + (left_tokens + apart) // heal.length) and len(rows) != most:
        row = maker.make(len(rows), source)
        if row is None:
            break
        rows.append(row)
    if not rows:
        raise _too_short(texts, heal, names)
    return rows, [stretch for index, stretch in enumerate(stretches) if index not in taken]


def _too_short(texts: Documents, heal, names: Names) -> TextError:
    tokens = sum(map(len, texts.ids))  # without conversations
    return TextError(
        f"the text is too short for {names.recall}: it has {tokens:,} tokens, and a plain row and a row in "
        f"which something comes back need about {RECALL_ROWS * heal.length:,}",
        where=f"{names.data}: {', '.join(source_names(heal.data))}",
        fix=f"{names.more}, or {names.recall}=0",
    )


def _enough(stretches: Sequence[Sequence[int]]) -> int:
    """How many stretches of mean length have the tokens of which words are taken."""
    mean = max(1, sum(map(len, stretches)) // max(1, len(stretches)))
    return max(1, WORD_TOKENS // mean)


class _Sentences:
    """The sentences of stretches, one after another, each once.

    Args:
        maker: cuts a stretch into sentences.
        stretches: the stretches.
    """

    def __init__(self, maker: _RowMaker, stretches: Iterator[list[int]]):
        self.maker, self.stretches, self.waiting = maker, stretches, []

    def first(self, tokens: int) -> list[list[int]] | None:
        """The next sentences with so many tokens in all, without removing them; None if there are not so many."""
        while sum(map(len, self.waiting)) < tokens:
            stretch = next(self.stretches, None)
            if stretch is None:
                return None
            sentences = self.maker.sentences(stretch)
            gap = list(self.maker.marks.gap)
            apart = gap and self.waiting and sentences and self.waiting[-1][-1] not in self.maker.breaks
            self.waiting += [gap, *sentences] if apart else sentences
            self._skip_breaks()
        return list(self.waiting)

    def drop(self, tokens: int) -> None:
        """Remove the sentences of the next `tokens` tokens; a sentence that is begun goes as a whole."""
        while tokens > 0:
            tokens -= len(self.waiting.pop(0))
        self._skip_breaks()

    def _skip_breaks(self) -> None:
        """No row begins with empty lines."""
        while self.waiting and self.maker.breaks.issuperset(self.waiting[0]):
            self.waiting.pop(0)


class _RowMaker:
    """Makes rows with one tokenizer.

    Args:
        sample: stretches whose words become labels.
        names: as for `repeat_rows`.
    """

    def __init__(self, tokenizer, texts: Documents, heal, sample: Sequence[Sequence[int]], names: Names):
        self.tokenizer, self.heal, self.texts, self.settings = tokenizer, heal, texts, names
        self.size = heal.length - len(texts.begin)
        self.specials, self.endings = set(tokenizer.all_special_ids), {}
        self.breaks: set[int] = set()  # tokens that are nothing but ends of lines
        self.writer = _Writer(tokenizer)
        self.marks = self.writer.marks()
        for token in (*self.marks.gap, *self.marks.line):
            self._ends(token)
        self.words = self._words(sample)
        self.codes, self.names = self._codes(), [self._some_words] if len(self.words) >= 4 else []

    def make(self, index: int, source: _Sentences) -> RepeatRow | None:
        """The row of this index, from the next sentences; None if they are too few."""
        draw = random.Random(f"{self.heal.seed} recall {index}")
        kind = list(KINDS)[index % len(KINDS)]
        where = (index // len(KINDS) * TURN + draw.random() / 8) % 1
        # Of a code that is hidden in the text a base is sure; of words at such a place it is less so.
        forms = {"code": self.codes or self.names, "lookup": self.codes + self.names}.get(kind)
        entries = self._entries(draw, forms) if forms is not None else ()
        while (text := source.first(self.size)) is not None:
            marks = replace(self.marks, breaks=frozenset(self.breaks))
            row = KINDS[kind](text, self.size, where, draw, marks, entries)
            source.drop(row.used)
            if not self._judged(row.ids):  # a word may come about where sentences meet
                return row
        return None

    def sentences(self, stretch: Sequence[int]) -> list[list[int]]:
        """The sentences of a stretch, without special tokens and without sentences that have a judging word."""
        found, sentence = [], []
        for token in stretch:
            if token in self.specials:
                continue
            sentence.append(token)
            if self._ends(token) or (len(sentence) >= SENTENCE and self._is_whole(sentence)):
                found.append(sentence)
                sentence = []
        found += [sentence] if sentence else []
        return [each for each in found if not self._judged(each)]

    def _ends(self, token: int) -> bool:
        """Whether a token ends a sentence. It also notes tokens that are nothing but ends of lines."""
        if token not in self.endings:
            written = self.tokenizer.decode([token])
            self.endings[token] = "\n" in written or written.rstrip().rstrip(CLOSERS).endswith(STOPS)
            if "\n" in written and not written.strip():
                self.breaks.add(token)
        return self.endings[token]

    def _is_whole(self, ids: Sequence[int]) -> bool:
        """Whether tokens end with a whole letter, which may be several tokens."""
        return not self.tokenizer.decode(list(ids[-LETTER_TOKENS:])).endswith("\ufffd")

    def _judged(self, ids: Sequence[int]) -> bool:
        words = re.findall("[a-z]+", self.tokenizer.decode(list(ids)).lower())
        return not JUDGING_WORDS.isdisjoint(words)

    def _words(self, sample: Sequence[Sequence[int]]) -> list[str]:
        """Words of the text that may be labels, in an order that follows from text and seed."""
        found: set[str] = set()
        for stretch in sample:
            text = self.tokenizer.decode([token for token in stretch if token not in self.specials])
            whole = re.fullmatch(r"\S*(\s.*\s)\S*", text, re.DOTALL)  # a stretch may begin and end inside a word
            found |= words_of(whole[1] if whole else text)
            if len(found) > 4 * MOST_WORDS:
                break
        words = sorted(word for word in found if word.lower() not in JUDGING_LABELS)
        random.Random(f"{self.heal.seed} labels").shuffle(words)
        return words[:MOST_WORDS]

    def _codes(self) -> list[ValueForm]:
        """The kinds of random codes that the tokenizer can write: digits, letters and digits."""
        tried = {_digits: "0123456789", _mixed: LETTERS + "0123456789"}
        return [make for make, signs in tried.items() if all(map(self.writer.can_write, signs))]

    def _some_words(self, draw: random.Random) -> str:
        return " ".join(draw.sample(self.words, draw.randint(1, 2)))

    def _entries(self, draw: random.Random, forms: Sequence[ValueForm]) -> list[LabelledLine]:
        """Lines with different labels, whose values all have one form; none is longer than a fifth of the row."""
        count, longest = min(MOST, max(FEWEST, self.size // PER_LINE)), self.size // LINE_SHARE
        form, entries, shortest = draw.choice(forms) if forms else None, [], 0
        for label in draw.sample(self.words, min(len(self.words), TRIES * count)):
            entry = self.writer.entry(label, form(draw)) if form else None
            if entry is None:
                continue
            shortest = min(shortest or len(entry.ids), len(entry.ids))
            if len(entry.ids) <= longest:
                entries.append(entry)
            if len(entries) == count:
                break
        if len(entries) < 2:
            raise self._no_lines(shortest)
        return entries

    def _no_lines(self, shortest: int) -> Exception:
        recall, length, data, _ = self.settings
        if shortest:
            enough = max(SHORTEST_RECALL, LINE_SHARE * shortest + len(self.texts.begin))
            return TextError(
                f"rows of {self.heal.length} tokens are too short for {recall}: a line of a word and a code has "
                f"{shortest} tokens, and a row should have {LINE_SHARE} times as many",
                where=length,
                fix=f"{length}={enough}, or {recall}=0",
            )
        return ModelMismatchError(
            f"{recall} makes lines of words of the text, and this text has {len(self.words)} words that the "
            "tokenizer can write",
            where=f"{data}: {', '.join(source_names(self.heal.data))}",
            fix=f"name other data, or {recall}=0",
        )


class _Writer:
    """Text as tokens, as it is written inside a text and not at its beginning."""

    def __init__(self, tokenizer):
        self.tokenizer, self.unknown = tokenizer, getattr(tokenizer, "unk_token_id", None)
        self.before = self._encode(BEFORE)

    def marks(self) -> Marks:
        """The punctuation that the tokenizer can write."""
        gap, line, quoted = (tuple(self._written(text) or ()) for text in ("\n\n", "\n", '"'))
        return Marks(gap, line, tuple(self._written(' "') or ()) or quoted, quoted)

    def can_write(self, text: str) -> bool:
        """Whether the tokens of a text give the text again."""
        return bool(self._written(text))

    def entry(self, label: str, value: str) -> LabelledLine | None:
        """A line with this label and value; None if the tokenizer cannot write it."""
        for form in FORMS:
            ids = self._written(form.format(label=label, value=value))
            if not ids:
                continue
            before = self._ids(form.format(label=label, value="").rstrip())
            cut = haystack.common(before, ids)
            if 0 < cut < len(ids):
                return LabelledLine(tuple(ids[:cut]), tuple(ids[cut:]))
        return None

    def _written(self, text: str) -> list[int] | None:
        ids = self._ids(text)
        if not ids or self.unknown in ids:
            return None
        again = self.tokenizer.decode(ids)
        return ids if _signs(again) == _signs(text) and again.count("\n") == text.count("\n") else None

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text that follows another one. Some tokenizers add a space to the beginning of a text."""
        whole, count = self._encode(BEFORE + text), len(self.before)
        return whole[count:] if whole[:count] == self.before else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _signs(text: str) -> str:
    """The text without spaces and capitals, which tokenizers may change."""
    return "".join(text.split()).lower()


def words_of(text: str) -> set[str]:
    """The words of a text that can be labels. Scripts without spaces give pieces of a few letters."""
    least, most = WORD_LETTERS
    words: set[str] = set()
    for run in "".join(sign if unicodedata.category(sign)[0] in "LM" else " " for sign in text).split():
        if len(run) > most or unicodedata.east_asian_width(run[0]) in ("W", "F"):
            words |= {run[first : first + PIECE] for first in range(0, len(run), PIECE)}
        else:
            words.add(run)
    return {word for word in words if least <= len(word)}


def _digits(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789", k=draw.choice(DIGITS)))


def _mixed(draw: random.Random) -> str:
    return "".join(draw.choice(LETTERS if draw.random() < 0.5 else "0123456789") for _ in range(draw.choice((4, 6))))
