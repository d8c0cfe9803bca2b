"""Text that the model writes from openings of many kinds, and the calibration text that is made with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers_of_bytes import byte_tokenizer
from transformers import AutoTokenizer

import surgery as package
from surgery.data.calibration_text import calibration_sequences, calibration_source
from surgery.data.generated import OPENING, Begin, sample
from surgery.data.openings import KINDS, OPENINGS
from surgery.errors import SurgeryError

TEMPLATE = "{% for m in messages %}cat mat {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}sat{% endif %}"
SHORT = ("cat mat sat cat mat", "mat cat sat", "sat sat cat mat")  # of words that the tokenizer knows


@pytest.fixture(scope="module")
def writer(tiny_llama):
    return package.load(tiny_llama)


@pytest.fixture
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def ids_of(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def written(model, tokenizer, tokens: int, openings=(), *, length: int = 16, chat: bool = False, batch: int = 8):
    settings = SimpleNamespace(length=length, chat=chat, seed=0, openings=openings)
    return sample(model, tokenizer, settings, tokens, batch=batch)


def test_openings_are_of_all_kinds_in_turn_and_differ_in_the_words_that_are_taken():
    assert len({" ".join(opening.split()[:OPENING]) for opening in OPENINGS}) == len(OPENINGS) >= 40
    assert min(len(opening.split()) for opening in OPENINGS) > OPENING
    kind = {opening: name for name, openings in KINDS.items() for opening in openings}
    for first in range(len(OPENINGS) - len(KINDS)):
        assert {kind[opening] for opening in OPENINGS[first : first + len(KINDS)]} == set(KINDS)


@pytest.mark.parametrize("bos", [False, True])
def test_a_batch_takes_the_openings_in_their_order_from_a_random_one_on(writer, bos):
    tokenizer = byte_tokenizer(bos=bos)
    begin = Begin.of(writer, tokenizer, False, 200, OPENINGS)
    words = [" ".join(opening.split()[:OPENING]).encode() for opening in OPENINGS]
    shortest = min(map(len, words))
    assert begin.prefix == ((tokenizer.bos_token_id,) if bos else ())
    assert begin.words == ()
    assert begin.openings == tuple(ids_of(tokenizer, each.decode())[:shortest] for each in words)
    firsts = set()
    for seed in range(6):
        drawn = begin.draw(len(OPENINGS) + 3, torch.Generator().manual_seed(seed)).tolist()
        assert all(row[: len(begin.prefix)] == list(begin.prefix) for row in drawn)
        places = [begin.openings.index(tuple(row[len(begin.prefix) :])) for row in drawn]
        assert places == [(places[0] + index) % len(OPENINGS) for index in range(len(drawn))]
        firsts.add(places[0])
    assert len(firsts) > 2


def test_openings_are_as_long_as_the_shortest_and_leave_half_of_a_text_to_the_model(writer, tokenizer):
    known = {text: ids_of(tokenizer, text) for text in SHORT}
    assert Begin.of(writer, tokenizer, False, 64, SHORT).openings == tuple(ids[:3] for ids in known.values())
    assert Begin.of(writer, tokenizer, False, 4, SHORT).openings == tuple(ids[:2] for ids in known.values())
    same = Begin.of(writer, tokenizer, False, 2, (*SHORT, "cat sat"))  # two of them begin with the same token
    assert same.openings == tuple(ids[:1] for ids in known.values())


def test_openings_of_which_the_tokenizer_knows_a_word_not_are_left_out(writer, tokenizer):
    strange = "cat xylophone sat"
    assert tokenizer.unk_token_id in ids_of(tokenizer, strange)
    found = Begin.of(writer, tokenizer, False, 64, (strange, *SHORT, ""))
    assert found == Begin.of(writer, tokenizer, False, 64, SHORT)
    with pytest.raises(SurgeryError, match=r"does not know the English words(.|\n)*calibration_text: mixed"):
        Begin.of(writer, tokenizer, False, 64, (strange, ""))


def test_texts_begin_with_openings_and_conversations_do_not(writer, tokenizer):
    texts = written(writer, tokenizer, 300, SHORT)
    begins = [ids_of(tokenizer, each)[:3] for each in SHORT]
    assert {tuple(text[:3]) for text in texts} == set(begins)
    assert texts == written(writer, tokenizer, 300, SHORT)
    assert len({tuple(text[3:]) for text in texts}) > len(begins), "the model goes on in its own way"
    tokenizer.chat_template = TEMPLATE
    assert written(writer, tokenizer, 200, SHORT, chat=True) == written(writer, tokenizer, 200, chat=True)


def test_without_openings_a_text_begins_with_a_random_word_as_it_always_did(writer, tokenizer):
    """The name of its file, too, is that of texts that were written before there were openings."""
    begin = Begin.of(writer, tokenizer, False, 16)
    draw, own = (torch.Generator().manual_seed(5) for _ in range(2))
    want = torch.tensor(begin.words)[torch.randint(len(begin.words), (9, 1), generator=draw)]
    assert torch.equal(begin.draw(9, own), want)
    assert "openings" not in repr(begin)


def test_half_of_a_varied_text_begins_with_openings(writer, tokenizer, tmp_path, monkeypatch):
    """The rest is as in a mixed text. A resumed run finds the text, and takes no other for it."""
    with pytest.raises(SurgeryError, match="English words"):
        calibration_sequences(writer, tokenizer, "varied", 32, 8)
    monkeypatch.setattr("surgery.data.calibration_text.OPENINGS", SHORT)
    mixed = calibration_sequences(writer, tokenizer, "mixed", 32, 8, tmp_path)
    varied = calibration_sequences(writer, tokenizer, "varied", 32, 8, tmp_path)
    assert torch.equal(varied[:4], mixed[:4])
    texts = written(writer, tokenizer, 4 * 32, SHORT, length=32, batch=5)
    assert varied[4:].flatten().tolist() == [token for text in texts for token in text][: 4 * 32]
    tokenizer.chat_template = TEMPLATE  # it is not needed, and not used
    monkeypatch.setattr("surgery.data.generated._write", None)
    assert torch.equal(calibration_sequences(writer, tokenizer, "varied", 32, 8, tmp_path), varied)
    assert torch.equal(calibration_sequences(writer, tokenizer, "mixed", 32, 8, tmp_path), mixed)


def test_the_record_of_a_varied_text():
    said = calibration_source("varied", 8)
    assert said["text"].endswith(", and as much that the model writes from English openings of many kinds")
    assert len(said["sha256"]) == 12
    assert calibration_source("varied", 1) == calibration_source("builtin", 1), "of one sample the model writes none"


@pytest.mark.parametrize("recipe", ["gqa", "mla"])
def test_a_fit_takes_a_varied_text_and_says_so(tiny_llama, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("surgery.data.calibration_text.OPENINGS", SHORT)
    settings = {"calibration_text": "varied", "calibration_samples": 4, "calibration_length": 32}
    settings |= {"kv_heads": 1} if recipe == "gqa" else {"rope": 8}
    if recipe == "gqa":
        plan = package.plan(recipe, tiny_llama, **settings)
        assert "text, half of it written by the model from openings of many kinds" in str(plan)
    report = package.apply(recipe, tiny_llama, output=tmp_path / "out", check=False, evaluate=False, **settings)
    assert "from English openings of many kinds" in str(report.data["operations"])
