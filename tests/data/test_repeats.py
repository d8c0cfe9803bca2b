"""Rows in which something comes back: their length, what comes back and how far, tokenizers, nothing of the judge.

What comes back is found here by a search of its own in the finished rows.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, WORDS
from families import one_thread  # noqa: F401 (a fixture)
from tokenizers_of_bytes import byte_tokenizer, letters_tokenizer

from surgery.data import haystack, name_list
from surgery.data.documents import Documents
from surgery.data.packing import IGNORED, Packed
from surgery.data.recall_rows import repeat_rows, training_rows, words_of
from surgery.data.repeats import KINDS, LabelledLine, Marks
from surgery.data.text import begin_of_text, load_text
from surgery.errors import ModelMismatchError, TextError
from surgery.healing.trainer import Rows

LENGTH = 96
MARKS = Marks((900, 901), (902,), (903,), (904,))
ENTRIES = [LabelledLine((902, 1000 + i, 905), (2000 + 7 * i, 2001 + 7 * i)) for i in range(20)]


def settings(**fields):
    return SimpleNamespace(**({"recall": 0.4, "length": LENGTH, "seed": 0, "data": "builtin"} | fields))


def documents_of(text, tokenizer, pieces=1) -> Documents:
    size = -(-len(text) // pieces)
    parts = [text[first : first + size] for first in range(0, len(text), size)]
    ids = [tokenizer(part, verbose=False)["input_ids"] for part in parts]
    return Documents("a text", "0" * 64, ids, begin_of_text(tokenizer))


def numbered(tokens, seed=0):
    """Sentences of tokens that all differ, so that a copy can be found."""
    draw, sentences, token = random.Random(seed), [], 10_000
    while token < 10_000 + tokens:
        length = draw.randint(1, 30)
        sentences.append(list(range(token, token + length)))
        token += length
    return sentences


@pytest.fixture(scope="module")
def builtin():
    return load_text("builtin", "calibration").text[:60_000]


@pytest.fixture(scope="module", params=["bytes", "bytes with BOS"])
def tokenizer(request):
    return byte_tokenizer(bos=request.param == "bytes with BOS")


@pytest.mark.parametrize("size", [63, 64, 97, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_length_and_the_repeats_that_it_names(kind, size):
    """The text is there once and in order; each repeat is what stood so many tokens before it."""
    for seed in range(40):
        text, draw = numbered(size, seed), random.Random(seed)
        row = KINDS[kind](text, size, seed / 40, draw, MARKS, ENTRIES)
        assert len(row.ids) == size
        assert row.kind == kind
        body = [token for token in row.ids if token >= 10_000]
        if kind in ("code", "lookup"):  # up to the end of a sentence
            assert body == list(range(10_000 + row.used - len(body), 10_000 + row.used))
            assert row.used in [sentence[-1] + 1 - 10_000 for sentence in text]
        else:
            assert list(dict.fromkeys(body)) == list(range(10_000, 10_000 + row.used)) or kind == "quote"
            assert set(body) == set(range(10_000, 10_000 + row.used)), "each token of the text that it used"
        assert row.repeats or kind == "quote"
        for repeat in row.repeats:
            assert 0 < repeat.distance <= repeat.first < repeat.end <= size
            again = row.ids[repeat.first : repeat.end]
            assert again == row.ids[repeat.first - repeat.distance : repeat.end - repeat.distance]
            assert again
            if kind in ("code", "lookup"):  # the whole line was there, and its value belongs to this label alone
                line = row.ids[repeat.first - 3 : repeat.end]
                assert line in [list(entry.ids) for entry in ENTRIES]
            if kind == "quote":
                assert (row.ids[repeat.first - 1], row.ids[repeat.end]) == (903, 904)
            if kind == "passage":
                assert repeat.end - repeat.first >= 8
        fresh = random.Random(seed)
        assert KINDS[kind](text, size, seed / 40, fresh, MARKS, ENTRIES) == row, "nothing but the draw is random"


@pytest.mark.parametrize("kind", ["passage", "quote"])
def test_no_copy_begins_or_ends_with_an_empty_line(kind):
    """Nor is a passage between two empty lines where the text has one."""
    breaks = frozenset({900, 901, 902, 77})
    marks = Marks(MARKS.gap, MARKS.line, MARKS.opening, MARKS.closing, breaks)
    for seed in range(60):
        text = [each for sentence in numbered(300, seed) for each in (sentence, [77])]
        row = KINDS[kind](text, 200, seed / 60, random.Random(seed), marks)
        assert len(row.ids) == 200
        for repeat in row.repeats:
            again = row.ids[repeat.first : repeat.end]
            assert again == row.ids[repeat.first - repeat.distance : repeat.end - repeat.distance]
            assert not {again[0], again[-1]} & breaks
            if kind == "passage":
                assert row.ids[repeat.first - 2 : repeat.first] == [900, 901] or row.ids[repeat.first - 1] == 77
                assert row.ids[repeat.end : repeat.end + 2] == [900, 901][: 200 - repeat.end] or (
                    row.ids[repeat.end] == 77
                )


@pytest.mark.parametrize("kind", ["code", "lookup"])
def test_lines_come_back_in_another_order(kind):
    for seed in range(40):
        row = KINDS[kind](numbered(512, seed), 512, 0.3, random.Random(seed), MARKS, ENTRIES)
        labels = [token for token in row.ids if 1000 <= token < 1020]
        again = [row.ids[repeat.first - 2] for repeat in row.repeats]
        assert labels[-len(again) :] == again, "at the end"
        first = [label for label in labels[: -len(again)] if label in again]
        assert sorted(first) == sorted(again)
        assert first != again or len(again) == 1
        if kind == "code":
            assert len(again) == len(labels) // 2, "all of them"
        else:
            assert 1 <= len(again) < len(labels) - len(again), "some of them"
    whole = KINDS["lookup"](numbered(512), 512, 1.0, random.Random(0), MARKS, ENTRIES)
    assert whole.ids[:3] == list(ENTRIES[0].label), "the list begins the row where the distance is the whole row"


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_spread_over_the_row(kind):
    size, found = 512, []
    for seed in range(200):
        row = KINDS[kind](numbered(size, seed), size, seed / 200, random.Random(seed), MARKS, ENTRIES)
        found += [repeat.distance / size for repeat in row.repeats]
    quarters = [sum(low <= each < low + 0.25 for each in found) / len(found) for low in (0, 0.25, 0.5, 0.75)]
    assert max(found) > 0.85
    assert min(found) < 0.1
    assert min(quarters) > 0.1, quarters


@pytest.mark.parametrize("pieces", [1, 40, 400])
def test_rows_of_a_text_keep_whole_and_use_their_text_alone(tokenizer, builtin, pieces):
    """One long document, documents of a few rows, and documents shorter than a row."""
    texts = documents_of(builtin, tokenizer, pieces)
    packed, record = training_rows(texts, tokenizer, settings())
    rows, left = repeat_rows(texts, tokenizer, settings())
    marked = packed.repeating.nonzero()[:, 0].tolist()
    assert record["recall"]["rows"] == len(rows) == len(marked)
    assert sum(record["recall"][kind] for kind in KINDS) == len(rows)
    assert max(record["recall"][kind] for kind in KINDS) - min(record["recall"][kind] for kind in KINDS) <= 1
    assert len(rows) / len(packed) == pytest.approx(0.4, abs=0.02)
    for index, row in zip(marked, rows, strict=True):
        item = packed[index]
        assert item["input_ids"].tolist() == [*texts.begin, *row.ids]
        assert item["position_ids"].tolist() == list(range(LENGTH)), "one document"
        assert (item["labels"] == IGNORED).tolist() == [True] + [False] * (LENGTH - 1)
    plain = Packed(Documents("", "", left, texts.begin), LENGTH)
    assert torch.equal(packed.ids[~packed.repeating], plain.ids)
    assert torch.equal(packed.positions[~packed.repeating], plain.positions)
    if pieces > 1:
        assert 0.2 < sum(index % 8 == 0 for index in marked) / -(-len(packed) // 8) < 0.6, "validation rows are mixed"


def test_no_text_is_in_both_kinds_of_rows(builtin):
    """Every token of the text is written as a letter of its own, so that its place can be read from any row."""

    class Places:
        all_special_ids, unk_token_id, bos_token_id = (), None, None

        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    letters = "".join(chr(0x4E00 + i) if i % 11 else "." for i in range(18_000))
    places = Places()
    texts = Documents("a text", "0" * 64, [[ord(letter) for letter in letters]], [])
    rows, left = repeat_rows(texts, places, settings())
    unique = {token for stretch in left for token in stretch} - {ord(".")}
    both = {token for row in rows for token in row.ids if token >= 0x4E00} & unique
    labels = {ord(letter) for word in words_of(letters) for letter in word}
    bodies = {token for row in rows if row.kind in ("passage", "quote") for token in row.ids if token >= 0x4E00}
    assert not bodies & unique
    assert both <= labels, "but for words as labels"
    assert len(rows) > 20


def test_the_same_seed_gives_the_same_rows(tokenizer, builtin):
    texts = documents_of(builtin, tokenizer, 30)
    first, again, other = (training_rows(texts, tokenizer, settings(seed=seed), True)[0].sha256 for seed in (3, 3, 4))
    assert first == again != other
    plain = training_rows(texts, tokenizer, settings(recall=0.0))
    assert plain[0].sha256 == Packed(texts, LENGTH).sha256
    assert plain[1] == {}


def needle_words() -> set[str]:
    """By hand, from the tables of the judging needles."""
    return set(f"{haystack.KEYS} {haystack.WORDS} {name_list.NAMES}".lower().split())


def lines_of(text: str) -> list[str]:
    return [line for line in text.split("\n") if re.fullmatch(r"\S+: \S+( \S+)?", line)]


def test_the_recall_tests_share_nothing_with_these_rows(builtin):
    """No key word and no word of a secret, no sentence of a template, no paragraph of the held-out text."""
    tokenizer = byte_tokenizer()
    spoiled = re.sub(r"\bfunction\b", "garden", re.sub(r"\bobject\b", "Oslo", builtin))
    spoiled = re.sub(r"\bexpression\b", "Alice", spoiled)
    assert spoiled.count("garden") > 20
    rows, _ = repeat_rows(documents_of(spoiled, tokenizer), tokenizer, settings(length=512, recall=0.6))
    written = [tokenizer.decode(row.ids) for row in rows]
    assert len(written) > 20
    for text in written:
        assert not needle_words() & set(re.findall("[a-z]+", text.lower()))
    whole = "\n".join(written)
    sentences = [part for pair in (*haystack.TEMPLATES, *name_list.FACTS) for part in pair]
    for fixed in (piece.strip() for part in sentences for piece in re.split(r"\{\w+\}", part)):
        assert len(fixed) < 8 or fixed.lower() not in whole.lower()
    of_templates = {word for part in sentences for word in part.lower().split()}
    lines = lines_of(whole)
    assert len(lines) > 50
    assert not {line.partition(":")[0].lower() for line in lines} & of_templates
    codes = [line.partition(": ")[2] for line in lines]
    hidden = [tokenizer.decode(row.ids[r.first : r.end]) for row in rows if row.kind == "code" for r in row.repeats]
    assert all(any(sign.isdigit() for sign in code) or code.isupper() for code in hidden), "codes, not words"
    assert not [code for code in codes if re.fullmatch(r"\d{5}", code)], "the needles' secrets have five digits"
    held_out = load_text("builtin", "held-out").text
    paragraphs = {part.strip() for part in held_out.split("\n\n") if len(part.strip()) >= 40}
    needles = haystack.make_needles(tokenizer, lengths=(2048,), depths=2, samples=2, form="plain")
    assert not [part for text in written for part in text.split("\n\n") if part.strip() in paragraphs]
    for needle in needles:
        prompt = tokenizer.decode(needle.prompt)
        assert not [line for line in set(lines) if f"\n{line}\n" in prompt]


@pytest.mark.parametrize(
    "text",
    [
        "Die Katze saß auf der Matte und schaute in den Regen. Sieben Hunde liefen an alten Türen vorbei! ",
        "猫坐在垫子上看着外面的雨。七只狗跑过了老房子的绿色大门。孩子们在院子里玩耍。",
        "แมวนั่งอยู่บนเสื่อและมองดูฝน สุนัขเจ็ดตัววิ่งผ่านประตูสีเขียวของบ้านเก่า ",
        "बिल्ली चटाई पर बैठी थी और बारिश देख रही थी। सात कुत्ते पुराने दरवाज़े के पास से भागे। ",
        "القط جلس على الحصيرة ونظر إلى المطر. سبعة كلاب ركضت أمام الأبواب الخضراء القديمة. ",
    ],
)
def test_every_language(text, tokenizer):
    """Labels are words of the text: lines have no letter that the text does not have but codes."""
    texts = documents_of(text * 60, tokenizer, 9)
    rows, _ = repeat_rows(texts, tokenizer, settings(length=192))
    assert {row.kind for row in rows} == set(KINDS)
    for row in rows:
        assert len(row.ids) == 192 - len(texts.begin)
        for repeat in row.repeats if row.kind in ("code", "lookup") else ():
            before = tokenizer.decode(row.ids[: repeat.first]).rpartition("\n")[2]
            assert before.rstrip(": ") in text, before


def test_a_tokenizer_of_few_words(tiny_llama):
    """Without punctuation, digits and line ends: labels and values are words, and nothing is unknown."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = documents_of(TEXT * 8, tokenizer)
    rows, _ = repeat_rows(texts, tokenizer, settings(length=64))
    assert {row.kind for row in rows} == set(KINDS)
    assert {token for row in rows for token in row.ids} <= set(range(4, 4 + len(WORDS)))
    assert all(len(row.ids) == 64 for row in rows)


def test_a_tokenizer_that_begins_every_text_with_a_space(builtin):
    """As Llama's: letters, a mark for spaces, and bytes for the rest. Lines are as inside a text."""
    tokenizer = letters_tokenizer()
    assert tokenizer.decode(tokenizer("a\nb", add_special_tokens=False)["input_ids"]) == "a\nb"
    rows, _ = repeat_rows(documents_of(builtin, tokenizer, 9), tokenizer, settings(length=128))
    assert {row.kind for row in rows} == set(KINDS)
    lines = 0
    for row in rows:
        assert len(row.ids) == 127
        for repeat in row.repeats if row.kind in ("code", "lookup") else ():
            line = tokenizer.decode(row.ids[: repeat.end]).rpartition("\n")[2]
            assert re.fullmatch(r"[^\W\d_]+: \S+( \S+)?", line), line
            lines += 1
    assert lines > 20


def test_special_tokens_stay_in_plain_rows(builtin):
    tokenizer = byte_tokenizer(bos=True)
    texts = documents_of(builtin, tokenizer, 100)
    ended = Documents(texts.title, texts.sha256, [[*ids, tokenizer.eos_token_id] for ids in texts.ids], texts.begin)
    rows, left = repeat_rows(ended, tokenizer, settings())
    assert not {0, 1} & {token for row in rows for token in row.ids}
    assert all(stretch[0] == 0 for stretch in left)


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_conversations_stay_in_plain_rows(builtin, share):
    """Each is there whole, and counts in the share of the rows with repeats."""
    tokenizer = byte_tokenizer()
    texts, talk = documents_of(builtin, tokenizer, pieces=60), [[60, 59, 60, 59]] * 6000
    given = Documents(texts.title, texts.sha256, texts.ids, texts.begin, (), talk)
    rows, record = training_rows(given, tokenizer, settings(recall=share))
    both = {tuple(row[at : at + 2]) for row in rows.ids[rows.repeating].tolist() for at in range(LENGTH - 1)}
    assert (60, 59) not in both
    assert (59, 60) not in both
    plain = rows.ids[~rows.repeating]
    starts = (rows.positions[~rows.repeating] == 0).logical_and(plain == 60)
    assert 6000 - 24 <= starts.sum() <= 6000 + len(plain)  # the last row may be left out, and rows cut some
    assert record["recall"]["rows"] / len(rows) == pytest.approx(share, abs=0.01)


def test_conversations_leave_a_plain_row_of_text(builtin):
    """Where they are most of the text, the share is not reached: running text is not used up for it."""
    tokenizer = byte_tokenizer()
    texts = documents_of(builtin[: 20 * LENGTH], tokenizer)
    given = Documents(texts.title, texts.sha256, texts.ids, texts.begin, (), [[60, 59] * LENGTH] * 40)
    rows, record = training_rows(given, tokenizer, settings(recall=0.8))
    plain = rows.ids[~rows.repeating]
    assert sum(not {60, 59} & set(row) for row in plain.tolist()) >= 1
    assert record["recall"]["rows"] < 0.4 * len(rows)
    short = documents_of(builtin[: LENGTH + 10], tokenizer)
    few = Documents("short", "", short.ids, short.begin, (), [[60, 59] * LENGTH] * 40)
    with pytest.raises(TextError, match=f"it has {short.tokens} tokens"):
        training_rows(few, tokenizer, settings())


def test_what_cannot_be_done_is_refused(tokenizer, builtin):
    short = documents_of(builtin[: LENGTH + 10], tokenizer)
    with pytest.raises(TextError, match=f"too short for heal.recall: it has .* need about {3 * LENGTH}"):
        training_rows(short, tokenizer, settings())
    wordless = documents_of("12 34. " * 400, tokenizer)
    with pytest.raises(ModelMismatchError, match="has 0 words that the tokenizer can write"):
        training_rows(wordless, tokenizer, settings())
    long_words = documents_of("Donaudampfer Schifffahrt. " * 100, tokenizer)
    with pytest.raises(TextError, match=r"rows of 64 tokens are too short for heal.recall") as caught:
        training_rows(long_words, tokenizer, settings(length=64))
    assert int(re.search(r"heal.length=(\d+)", str(caught.value))[1]) >= 64


def test_three_rows_of_text_are_enough(tokenizer, builtin):
    texts = documents_of(builtin[: 3 * LENGTH + 2], tokenizer)
    packed, record = training_rows(texts, tokenizer, settings(recall=0.01))
    assert record["recall"]["rows"] == 1
    assert len(packed) >= 2


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_every_part_of_a_training_reads_its_share(share):
    """In each round; any first rows have the rounded share, and a row is read once a round."""
    marks = torch.rand(97, generator=torch.Generator().manual_seed(1)) < share

    class Data(list):
        repeating = marks

    data, count = Data(range(97)), int(marks.sum())
    rows = Rows(data, 3 * 97, seed=5)
    for round_index in range(3):
        read = [rows.row(round_index * 97 + i) for i in range(97)]
        assert sorted(read) == list(range(97))
        for first in range(1, 98):
            assert abs(sum(bool(marks[row]) for row in read[:first]) - first * count / 97) <= 0.5
    plain = Rows(list(range(97)), 97, seed=5)
    order = [plain.row(i) for i in range(97)]
    assert [row for row in order if marks[row]] == [rows.row(i) for i in range(97) if marks[rows.row(i)]]
