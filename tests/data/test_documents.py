"""Data of healing: every source, what is wrong with it, packing, and text that the base writes itself."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from conftest import TEXT, WORDS
from families import TINY, one_thread  # noqa: F401 (one_thread: a fixture)
from transformers import AutoTokenizer

from surgery.config.heal import Heal
from surgery.data import documents as data
from surgery.data import generated as self_text
from surgery.data import text_sources
from surgery.data.documents import Documents, Packed, documents, even_shares, first_documents, share_of_base
from surgery.data.generated import _sample_tokens, sample
from surgery.data.packing import IGNORED, arguments, isolates_documents
from surgery.data.text import load_text
from surgery.errors import SurgeryError
from surgery.runtime import modeling_surgery as runtime

TEMPLATE = "<s>{% for m in messages %}{{ m.role }} {{ m.content }} </s>{% endfor %}"
CONVERSATION = (
    "<s>{% for m in messages %}{{ 'cat ' if m.role == 'user' }}{{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %} mat sat {% endif %}"
)


def heal(**fields):
    return Heal.model_construct(**{"data": "builtin", "length": 16} | fields)  # unchecked: one has no budget


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def with_bos(tiny_llama):
    """One that begins a text with BOS and ends it with EOS."""
    from tokenizers.processors import TemplateProcessing

    made = AutoTokenizer.from_pretrained(tiny_llama)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


@pytest.fixture
def read(tiny_llama, tokenizer):
    def run(source, *, rows=10_000, tokenizer=tokenizer, **fields):
        named = source if isinstance(source, list) else str(source)
        return documents(heal(data=named, **fields), tokenizer, tiny_llama, rows_needed=rows)

    return run


def ids_of(text: str) -> list[int]:
    """By hand: `tiny_llama`'s tokenizer."""
    return [4 + WORDS.index(word) for word in text.split()]


def lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- sources ------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document(read, text):
    documents = read(text)
    assert list(documents) == [ids_of(TEXT)]
    assert documents.begin == []
    raw = TEXT.encode()
    want = hashlib.sha256(f"{len(raw)}\0".encode() + raw).hexdigest()
    assert documents.record == {"data": "words.txt", "sha256": want, "documents": 1, "tokens": 400}


def test_builtin_is_the_calibration_part(read, tokenizer):
    documents = read("builtin")
    part = load_text("builtin", "calibration")
    assert list(documents) == [tokenizer(part.text)["input_ids"]]
    assert documents.title == part.title


def test_lines_are_documents(read, tmp_path):
    texts = [" ".join(WORDS[i : i + 9]) for i in range(5)]
    lines(tmp_path / "rows.jsonl", [{"text": text, "other": 1} for text in texts])
    assert list(read(tmp_path / "rows.jsonl")) == [ids_of(text) for text in texts]
    lines(tmp_path / "rows.jsonl", [{"body": text, "text": None} for text in [*texts, " "]])
    assert list(read(tmp_path / "rows.jsonl", column="body")) == [ids_of(text) for text in texts]


def test_a_folder_is_its_files_in_order(read, tmp_path):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "b.txt").write_text("cat " * 20)
    (folder / "below" / "c.md").write_text("dogs " * 20)
    lines(folder / "a.jsonl", [{"text": "rain " * 3}, {"text": "mat"}])
    (folder / "picture.png").write_bytes(b"\0\1")
    want = [ids_of(text) for text in ("rain " * 3, "mat", "cat " * 20, "dogs " * 20)]
    assert list(read(folder)) == want


def test_a_folders_own_papers_are_no_text(read, tmp_path):
    """A data set's folder has a README; training on that would be no error and no use."""
    datasets, folder = pytest.importorskip("datasets"), tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("README.md", "LICENSE.txt", ".cache/left.txt"):
        (folder / name).write_text("mat " * 50)
    datasets.Dataset.from_dict({"text": ["cat " * 10, "dogs " * 10]}).to_parquet(str(folder / "data/train.parquet"))
    assert list(read(folder)) == [ids_of("cat " * 10), ids_of("dogs " * 10)]
    (folder / "more.txt").write_text("rain " * 20)
    with pytest.raises(SurgeryError, match=r"both text and tables(.|\n)*more.txt, data.train.parquet"):
        read(folder)
    (folder / "data/train.parquet").unlink()
    assert list(read(folder)) == [ids_of("rain " * 20)]


def test_chats_are_written_by_the_template(read, tmp_path, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "cat", "content": "the mat"}, {"role": "dogs", "content": "ran past"}]
    lines(tmp_path / "chats.jsonl", [{"messages": messages}] * 3)
    (one, *_) = documents = read(tmp_path / "chats.jsonl", chat=True, tokenizer=tokenizer)
    assert one == [1, *ids_of("cat the mat"), 2, *ids_of("dogs ran past"), 2]
    assert len(documents) == 3


def test_no_more_is_read_than_is_needed(read, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXTS_AT_ONCE", 2)
    lines(tmp_path / "rows.jsonl", [{"text": "cat " * 10}] * 50)
    documents = read(tmp_path / "rows.jsonl", rows=2)
    assert len(documents) == 4  # 2 rows of 16 tokens are in 4 documents of 10, read 2 by 2
    assert documents.sha256 != read(tmp_path / "rows.jsonl").sha256


def test_bos_and_eos_are_the_tokenizers(read, text, with_bos):
    documents = read(text, tokenizer=with_bos)
    assert list(documents) == [[1, *ids_of(TEXT), 2]]
    assert documents.begin == [1]


class FakeDatasets(ModuleType):
    """`datasets.load_dataset` as we call it."""

    def __init__(self, rows):
        super().__init__("datasets")
        self.rows, self.asked = rows, []

    def load_dataset(self, name, config, split, streaming):
        self.asked.append((name, config, split, streaming))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such data set\nand more lines")
        return iter(self.rows)


def test_a_data_set_is_a_stream(read, monkeypatch, tmp_path):
    fake = FakeDatasets({"text": "cat " * 10} for _ in iter(int, 1))  # without end
    monkeypatch.setitem(sys.modules, "datasets", fake)
    documents = read("owner/name:config", rows=8)
    assert fake.asked == [("owner/name", "config", "train", True)]
    assert documents.tokens >= 8 * 16
    assert documents.title == "owner/name:config"
    with pytest.raises(SurgeryError, match="cannot be read: no such data set") as raised:
        read("nobody/nothing")
    assert "and more lines" not in str(raised.value)
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "part.parquet").write_bytes(b"PAR1")
    read(folder, rows=1)
    assert fake.asked[-1] == (str(folder), None, "train", True)


def test_a_real_data_set_on_disk(read, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "tables"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["cat " * 10, "dogs " * 10]}).to_parquet(str(folder / "train.parquet"))
    assert list(read(folder)) == [ids_of("cat " * 10), ids_of("dogs " * 10)]


# --- several sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("available", [[7, 7, 7], [1, 50, 50], [1, 2, 3], [100, 4, math.inf], [0, 9], [math.inf] * 2])
@pytest.mark.parametrize("wanted", [0, 1, 2, 20, 31])
def test_shares_are_even(available, wanted):
    """By hand: one token after another, to a source that has some left and was given fewest."""
    given = [0] * len(available)
    for _ in range(wanted):
        open_ones = [index for index, most in enumerate(available) if given[index] < most]
        if open_ones:
            given[min(open_ones, key=lambda index: given[index])] += 1
    shares = even_shares(available, wanted)
    assert sum(shares) == sum(given) == min(wanted, sum(available))
    assert sorted(shares) == pytest.approx(sorted(given), abs=1)
    assert all(share <= most for share, most in zip(shares, available, strict=True))


@pytest.fixture
def three(tmp_path):
    """A short text, a long one, and rows that go on."""
    (tmp_path / "short.txt").write_text("mat " * 20)
    (tmp_path / "long.txt").write_text(" ".join(WORDS[index % 7] for index in range(700)))
    lines(tmp_path / "rows.jsonl", [{"text": "cat " * 10}] * 500)
    return [str(tmp_path / name) for name in ("short.txt", "long.txt", "rows.jsonl")]


def test_each_source_gives_as_much_as_the_others(read, three):
    documents = read(three, rows=20)
    short, long, rows = documents.record["sources"]
    assert [each["data"] for each in documents.record["sources"]] == ["short.txt", "long.txt", "rows.jsonl"]
    assert documents.title == "short.txt + long.txt + rows.jsonl"
    assert short["tokens"] == 20  # all of it; the others share what is left of the 320
    assert abs(long["tokens"] - 150) <= 16  # whole pieces of a row
    assert abs(rows["tokens"] - 150) <= 16
    assert documents.tokens == short["tokens"] + long["tokens"] + rows["tokens"]
    assert len(Packed(documents, 16)) in (20, 21)
    assert documents.sha256 == read(three, rows=20).sha256 != read(three[1:], rows=20).sha256


def test_of_a_long_text_pieces_come_from_all_of_it():
    whole = Documents("numbers", "", [list(range(700))], [])
    pieces = list(whole.spread(150, 16))
    starts = [piece[0] for piece in pieces]
    assert all(piece == list(range(start, start + 16)) for piece, start in zip(pieces, starts, strict=True))
    assert len(pieces) == 10
    assert starts[0] < 70
    assert starts[-1] > 600
    assert max(after - before for before, after in pairwise(starts)) <= 112  # 70 on average
    begun = Documents("numbers", "", [[1, *range(10, 310)], [1, 2]], [1]).spread(100, 16)
    assert all(piece[0] == 1 and len(piece) <= 16 for piece in begun)
    assert whole.spread(690, 16) is whole  # hardly more


@pytest.mark.parametrize("seed", range(8))
def test_uneven_documents_give_their_share_too(seed):
    """Long and short documents, one long in twelve: never less than asked, and less than a row more."""
    draw = random.Random(seed)
    lengths = [640 if index % 12 == 0 else 8 for index in range(120)] if seed < 2 else None
    lengths = lengths or [max(1, round(draw.lognormvariate(3, 1.5))) for _ in range(200)]
    whole = Documents("drawn", "", [list(range(length)) for length in lengths], [])
    for wanted in (1, 16, 64, 200, 640, whole.tokens - 70):
        given = whole.spread(wanted, 64)
        assert wanted <= given.tokens < wanted + 64
        assert all(len(piece) <= 64 for piece in given)


def test_progress_of_several_is_their_sum(three, tokenizer, tiny_llama):
    seen = []
    documents(heal(data=three), tokenizer, tiny_llama, rows_needed=40, progress=lambda *each: seen.append(each))
    done = [count for count, _, _ in seen]
    assert {(total, label) for _, total, label in seen} == {(640, "training text")}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 640)


def test_the_beginning_is_all_that_was_read(three, tokenizer, tiny_llama):
    """What is refused early is judged on as much as a single source would give."""
    assert first_documents(heal(data=three[2]), tokenizer, tiny_llama, 1).tokens == 64 * 10
    assert first_documents(heal(data=three), tokenizer, tiny_llama, 1).tokens == 20 + 700 + 64 * 10
    assert first_documents(heal(data=["self", three[1]]), tokenizer, tiny_llama, 1).tokens == 700
    assert first_documents(heal(data="self"), tokenizer, tiny_llama, 1) is None


def test_how_much_the_base_will_write(three):
    assert share_of_base(heal(data="self"), 1000) == 1000
    assert share_of_base(heal(data="self", self_tokens=300), 1000) == 300
    assert share_of_base(heal(data=three), 1000) == 0
    assert share_of_base(heal(data=["self", three[0]]), 1000) == 1000 - 20  # 80 bytes
    assert share_of_base(heal(data=["self", "owner/name", three[0]]), 1000) == 490
    assert share_of_base(heal(data=["self", "conversations", three[0]], self_tokens=300), 1000) == 600


def test_a_stream_is_read_no_further_than_its_share(read, three, monkeypatch):
    monkeypatch.setattr(data, "TEXTS_AT_ONCE", 2)
    seen = []
    monkeypatch.setattr(text_sources, "_text_of", lambda row, *_: seen.append(row) or row["text"])
    read(three, rows=20)
    assert len(seen) <= 16 + 2  # its share and what one batch is more, not the 320 tokens that are wanted in all


def test_the_base_writes_beside_files(read, three):
    documents = read(["self", *three[:2]], rows=20, self_tokens=48)
    own, short, long = documents.record["sources"]
    assert own["data"] == "text that the base wrote itself"
    assert 48 <= own["tokens"] <= 48 + 16
    assert short["tokens"] == 20
    assert abs(long["tokens"] - (320 - 48 - 20)) <= 16
    assert read("self", rows=20, self_tokens=48).tokens < 48 + 64


def test_little_text_is_enough_beside_others(read, three, tmp_path):
    (tmp_path / "word.txt").write_text("mat")
    assert read([*three, str(tmp_path / "word.txt")], rows=4).record["sources"][3]["tokens"] == 1
    (tmp_path / "other.txt").write_text("cat")
    with pytest.raises(SurgeryError, match=r"word.txt, .*other.txt: the text is too short: it has 2 tokens"):
        read([str(tmp_path / "word.txt"), str(tmp_path / "other.txt")])


@pytest.mark.parametrize(
    ("names", "fields", "says"),
    [
        ((1, 2), {"chat": True}, "long.txt: heal.chat: true needs rows with columns"),
        ((0, 1), {"column": "body"}, "short.txt: heal.column: body needs rows with columns"),
        ((1, 2), {"column": "body"}, "no column 'body'(.|\n)*heal.column=text"),
    ],
)
def test_columns_of_several(read, three, names, fields, says):
    with pytest.raises(SurgeryError, match=says):
        read([three[index] for index in names], **fields)
    assert read([three[1], three[2]], column="text", rows=4).tokens


def test_one_bad_source_is_named(read, three, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    for name, says in (("nope.txt", "no such text file"), ("empty.jsonl", "there is no text in it")):
        with pytest.raises(SurgeryError, match=f"{name}: {says}"):
            read([*three, str(tmp_path / name)])


# --- what is wrong ------------------------------------------------------------------------------------------


def test_data_that_cannot_be_used_is_refused(read, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    write = {
        "empty.txt": b"",
        "short.txt": b"cat " * 9,
        "binary.txt": b"cat\0" * 100,
        "latin.txt": b"caf\xe9 " * 100,
        "words.txt": b"cat " * 99,
        "bad.jsonl": b'{"text": "cat"}\n{"text": \n',
        "list.jsonl": b"[1]\n",
        "number.jsonl": b'{"text": 3}\n',
        "turns.jsonl": b'{"text": [{"role": "user"}]}\n',
        "named.jsonl": b'{"body": "cat", "id": 3}\n',
        "blank.jsonl": b'{"text": " "}\n{"text": ""}\n',
    }
    for name, raw in write.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "nothing").mkdir()
    cases = [
        ("empty.txt", {}, ["empty"]),
        ("short.txt", {}, ["too short", "has 9 tokens, one row has 16", "heal.length=9"]),
        ("binary.txt", {}, ["a binary file"]),
        ("latin.txt", {}, ["not UTF-8"]),
        ("missing.txt", {}, ["no such text file", "self"]),
        ("word.txt", {}, ["no such text file", "available: words.txt"]),
        ("bad.jsonl", {}, ["not a line of JSON", "bad.jsonl:2"]),
        ("list.jsonl", {}, ["no JSON object", "list.jsonl:1"]),
        ("number.jsonl", {}, ["column 'text' holds no text"]),
        ("turns.jsonl", {}, ["column 'text' holds no text", "heal.chat=true"]),
        ("named.jsonl", {}, ["no column 'text'", "available: body, id", "heal.column=body"]),
        ("named.jsonl", {"column": "boby"}, ["no column 'boby'", "heal.column=body"]),
        ("named.jsonl", {"chat": True}, ["no column 'messages'"]),
        ("named.jsonl", {"chat": True, "column": "body"}, ["no chat template"]),
        ("blank.jsonl", {}, ["there is no text in it"]),
        ("words.txt", {"column": "body"}, ["heal.column: body needs rows with columns"]),
        ("words.txt", {"chat": True}, ["heal.chat: true needs rows with columns"]),
        ("nothing", {}, [".jsonl, .ndjson file in this folder", "attention-surgery[data]"]),
    ]
    for name, fields, says in cases:
        with pytest.raises(SurgeryError) as raised:
            read(tmp_path / name, **fields)
        assert not [word for word in says if word not in str(raised.value)], f"{name}: {raised.value}"
    for name in ("owner/name", "wikitext"):
        with pytest.raises(SurgeryError, match=r"no file or folder has this name(.|\n)*attention-surgery\[data\]"):
            read(name)
    with pytest.raises(SurgeryError, match="did you mean builtin"):
        read("buildin")
    with pytest.raises(SurgeryError, match="no such text file, folder or data set"):
        read("a name with spaces")
    with pytest.raises(SurgeryError, match=r"a list is written heal.data='\[self, builtin\]'"):
        read("self,builtin")
    with pytest.raises(SurgeryError, match="check the path"):
        read("novel, part 1.txt")
    with pytest.raises(SurgeryError, match="needs rows with columns"):
        read("builtin", column="body")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer, text):
    model = TINY["llama"](vocab_size=10)
    with pytest.raises(SurgeryError, match=r"gives token \d+, the model knows 10"):
        documents(heal(data=str(text)), tokenizer, model, rows_needed=1)


def test_a_broken_template_is_said(read, tmp_path, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    lines(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "cat"}]}])
    with pytest.raises(SurgeryError, match="does not take column 'messages': roles must alternate"):
        read(tmp_path / "chats.jsonl", chat=True, tokenizer=tokenizer)


# --- packing ------------------------------------------------------------------------------------------------


def test_rows_are_full_and_positions_start_anew():
    rows = Packed([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]], 5)
    assert rows.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert rows[0]["labels"].tolist() == [-100, 2, 3, -100, -100]
    assert rows[1]["labels"].tolist() == [-100, 7, 8, 9, 10]
    assert all(tensor.dtype == torch.long for tensor in rows[0].values())


def test_what_goes_on_in_the_next_row_begins_as_a_document_does():
    class Begun(list):
        begin = (1,)

    rows = Packed(Begun([[1, 20, 21, 22, 23, 24, 25, 26], [1, 30, 31, 32, 33]]), 4)
    assert rows.ids.tolist() == [[1, 20, 21, 22], [1, 23, 24, 25], [1, 26, 1, 30], [1, 31, 32, 33]]
    assert rows.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("begin", [(), (1,)])
def test_no_token_is_lost(begin):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 40, (50,), generator=generator).tolist()
    made = [[*begin, *torch.randint(3, 99, (n,), generator=generator).tolist()] for n in lengths]
    documents = type("Held", (list,), {"begin": begin})(made)
    rows = Packed(documents, 16)
    flat = [token for row in rows.ids.tolist() for token in row if token not in begin]
    want = [token for document in made for token in document if token not in begin]
    assert flat == want[: len(flat)]
    assert len(want) - len(flat) < 16


def test_too_little_is_no_row():
    assert len(Packed([[1, 2, 3]], 4)) == 0


def test_the_hash_is_of_tokens_and_borders():
    made = [Packed(each, 4).sha256 for each in ([[1, 2, 3, 4]], [[1, 2], [3, 4]], [[1, 2, 3, 5]], [[1, 2, 3, 4, 5]])]
    assert len(set(made)) == 3  # what does not fill a row is not part of it
    assert made[0] == made[3]


def split_heads(base):
    """A surgical model: each layer has a head that sees 2 sinks and a window of 4."""
    runtime.patch(base, {"layers": [{"streaming": [layer], "sinks": 2, "window": 4} for layer in (0, 1)]})
    return base


@pytest.mark.parametrize("surgical", [False, True])
@torch.no_grad()
def test_a_packed_row_is_its_documents_by_themselves(surgical):
    model = TINY["llama"]()
    model = split_heads(model) if surgical else model
    documents = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 1, 22)]
    rows = Packed(documents, 32)
    batch = {name: tensor[None] for name, tensor in rows[0].items()}
    packed = model(**arguments(model, batch, hidden=False)).logits[0]
    single = [model(input_ids=torch.tensor([each]), use_cache=False).logits[0] for each in documents]
    assert (packed - torch.cat(single)).abs().max() < 1e-4
    crossing = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    assert (packed - crossing).abs().max() > 0.1  # without positions they see each other


ONE_TEXT = {"gpt_oss", "opt", "bloom", "mpt"}  # whose forwards keep positions from their masks


@pytest.mark.parametrize("family", sorted(TINY))
@torch.no_grad()
def test_a_row_is_what_the_model_takes_it_for(family):
    """Its documents by themselves, or one text from its first token to its last."""
    model = TINY[family]().eval()
    documents = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 15)]
    rows = Packed(documents, 24, isolates_documents(model))
    batch = {name: tensor[None] for name, tensor in rows[0].items()}
    packed = model(**arguments(model, batch, hidden=False)).logits[0]
    texts = [documents[0] + documents[1]] if family in ONE_TEXT else documents
    single = [model(input_ids=torch.tensor([each]), use_cache=False).logits[0] for each in texts]
    assert (packed - torch.cat(single)).abs().max() < 1e-4 * max(1, packed.abs().max())
    assert [position for position, label in enumerate(batch["labels"][0].tolist()) if label == IGNORED] == [0, 9]


def test_some_rows():
    rows = Packed([list(range(3, 60))], 8)
    selected = rows.select([5, 2])
    assert len(selected) == 2
    assert [selected[n]["input_ids"].tolist() for n in (0, 1)] == [rows[n]["input_ids"].tolist() for n in (5, 2)]
    assert len(rows) == 7
    assert selected.sha256 != rows.sha256


# --- text of the base ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer():
    """A model of `tiny_llama`'s vocabulary, that ends a text now and then."""
    model = TINY["llama"](vocab_size=64, tie_word_embeddings=False)
    model.lm_head.weight.data *= 0.5
    return model


def test_the_base_writes_what_is_needed(writer, tokenizer):
    documents = sample(writer, tokenizer, heal(), 600, batch=8)
    assert 600 <= sum(map(len, documents)) < 600 + 8 * 16
    assert all(2 <= len(each) <= 16 for each in documents)
    words = {tokenizer.convert_tokens_to_ids(word) for word in WORDS}
    assert {each[0] for each in documents} <= words
    assert len({each[0] for each in documents}) > 8
    assert not any(2 in each[:-1] for each in documents)  # EOS ends a document
    assert all(each[-1] == 2 for each in documents if len(each) < 16)
    assert any(each[-1] == 2 for each in documents)
    assert len({tuple(each) for each in documents}) == len(documents)


def test_tokens_are_drawn_from_the_whole_distribution(writer, tokenizer):
    """Of many samples the share of each second token, given the first, against the model's probabilities."""
    documents = sample(writer, tokenizer, heal(length=3), 3 * 30_000, batch=3000)
    first = max({each[0] for each in documents}, key=lambda token: sum(each[0] == token for each in documents))
    seconds = torch.tensor([each[1] for each in documents if each[0] == first])
    with torch.no_grad():
        p = writer(input_ids=torch.tensor([[first]])).logits[0, 0].softmax(-1)
    share = torch.bincount(seconds, minlength=64) / len(seconds)
    error = (p * (1 - p) / len(seconds)).sqrt()
    assert ((share - p).abs() <= 5 * error + 3 / len(seconds)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_that_overflows_writes_nothing(value):
    logits = torch.zeros(3, 64)
    logits[1, :] = value
    with pytest.raises(SurgeryError, match="no probabilities for its next token"):
        _sample_tokens(logits, torch.Generator().manual_seed(0))


def alone(model, start: list[int], answer: tuple[int, ...], ends: set[int], length: int = 16) -> list[int]:
    """The row that begins with `start`, by a loop over whole texts that always takes the most probable token."""
    row, answered = list(start), not answer
    while len(row) < length:
        token = int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax())
        if not answered and token == answer[0]:
            row, answered = [*row, *answer], True
        elif token in ends:
            return [*row, token]
        else:
            row.append(token)
    return row[:length]


@pytest.mark.parametrize("answer", [0, 1, 3])
@pytest.mark.parametrize("growing", [True, False])
@torch.no_grad()
def test_rows_that_ended_are_not_computed_and_the_others_go_on(growing, answer):
    """With logits so far apart that chance has no say, each row is what a loop over whole texts finds for it alone.

    Where the model ends a user's message, the tokens of the answer's beginning follow. Other tokens that end texts end
    the conversation, in a message and in an answer.
    """
    model = TINY["llama"](vocab_size=64, tie_word_embeddings=False)
    model.lm_head.weight.data *= 1e6
    starts = torch.arange(4, 24)[:, None]
    endless = [alone(model, start, (), set()) for start in starts.tolist()]
    seconds = [row[1] for row in endless]
    ends = {max(seconds, key=seconds.count), endless[0][5], endless[1][8], endless[2][3]}
    begins = (max(seconds, key=seconds.count), *[token for token in range(64) if token not in ends])[:answer]
    want = [alone(model, start, begins, ends) for start in starts.tolist()]
    writer, sizes = self_text.fast_writer(model) if growing else model, []
    writer.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
    speakers = self_text.Speakers(self_text.Begin((), (), tuple(ends), begins), len(starts))
    rows, lengths = self_text._write(writer, starts, 16, speakers, torch.Generator().manual_seed(0))
    assert [row[:length] for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)] == want
    assert len(set(map(len, want))) > 2
    assert sum(tuple(row[at : at + answer]) == begins for row in want for at in range(16)) >= 4
    assert sizes[0] == 20
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 20


def test_penalties_of_the_model_are_not_applied(writer, tokenizer):
    import copy

    fussy = copy.deepcopy(writer)
    fussy.generation_config.update(repetition_penalty=9.0, top_k=1, temperature=0.1)
    plain = sample(writer, tokenizer, heal(), 200, batch=8)
    assert sample(fussy, tokenizer, heal(), 200, batch=8) == plain


def test_seeds_give_other_texts_and_the_same_seed_the_same(writer, tokenizer):
    one, again, other = (sample(writer, tokenizer, heal(seed=seed), 300, batch=4) for seed in (1, 1, 2))
    assert one == again
    assert not {tuple(each) for each in one} & {tuple(each) for each in other}


def test_the_callers_random_numbers_are_left_alone(writer, tokenizer):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    sample(writer, tokenizer, heal(), 100, batch=4)
    assert torch.equal(torch.rand(3), want)


def test_a_tokenizer_with_bos_begins_from_it_alone(writer, with_bos):
    documents = sample(writer, with_bos, heal(), 600, batch=16)
    assert {each[0] for each in documents} == {1}
    assert len({each[1] for each in documents}) > 8


def test_a_chat_begins_with_the_users_turn(writer, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(SurgeryError, match="no chat template"):
        sample(writer, tokenizer, heal(chat=True), 100)
    tokenizer.chat_template = "<s>{% for m in messages %} cat {{ m.content }} </s>{% endfor %}"
    documents = sample(writer, tokenizer, heal(chat=True), 300, batch=8)
    assert {tuple(each[:2]) for each in documents} == {(1, *ids_of("cat"))}
    refused = {
        "{{ raise_exception('no system message') }}": "does not take a user's message: no system message",
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}": "leaves out a user's",
        "<s>{% for m in messages %}"
        + 8 * " cat"
        + "{{ m.content }}{% endfor %}": "takes 9 of 16 (.|\n)*heal.length=18",
    }
    for tokenizer.chat_template, message in refused.items():
        with pytest.raises(SurgeryError, match=message):
            sample(writer, tokenizer, heal(chat=True), 100)


def test_a_conversation_begins_with_bos_or_a_word_as_other_texts_do(writer, with_bos, tokenizer):
    with_bos.chat_template = "{% for m in messages %}cat {{ m.content }}</s>{% endfor %}"
    documents = sample(writer, with_bos, heal(chat=True), 300, batch=8)
    assert {tuple(each[:2]) for each in documents} == {(1, *ids_of("cat"))}
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    begins = {each[0] for each in sample(writer, tokenizer, heal(chat=True), 600, batch=16)}
    assert begins <= {each[0] for each in sample(writer, tokenizer, heal(), 6000, batch=64)}
    assert len(begins) > 5


def test_the_text_does_not_depend_on_the_day(writer, tiny_llama, monkeypatch):
    import datetime

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz).replace(month=1, day=9)

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "<s>{% if strftime_now is defined and strftime_now('%d') == '09' %} cat{% endif %}"
        "{% if date_string is defined %} mat{% endif %}{% for m in messages %} sat {{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    today = tokenizer.apply_chat_template([{"role": "user", "content": "dogs"}], tokenize=False)
    assert today == "<s> cat sat dogs"
    documents = sample(writer, tokenizer, heal(chat=True), 100, batch=8)
    assert {tuple(each[:3]) for each in documents} == {(1, *ids_of("mat sat"))}


def test_progress_never_goes_back(writer, tiny_llama):
    """A conversation's first tokens are not sampled, and short ones take many batches."""
    tokenizer, done = AutoTokenizer.from_pretrained(tiny_llama), []
    tokenizer.chat_template = "<s>{% for m in messages %}" + 15 * " cat" + "{{ m.content }}{% endfor %}"
    sample(writer, tokenizer, heal(chat=True, length=34), 600, batch=4, progress=lambda *args: done.append(args[0]))
    assert len(set(done)) > 8
    assert done == sorted(done)
    assert done[-1] == 600


def test_a_conversation_has_a_message_and_an_answer(writer, tiny_llama):
    """The template's tokens between the two follow the first end, and the conversation goes on to the second."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = CONVERSATION
    documents = sample(writer, tokenizer, heal(chat=True, length=64), 3000, batch=32)
    eos, whole = tokenizer.eos_token_id, 0
    for document in documents:
        ends = [position for position, token in enumerate(document) if token == eos]
        assert document[:2] == [1, *ids_of("cat")]
        if ends and ends[0] < 62:
            assert document[ends[0] + 1 : ends[0] + 3] == ids_of("mat sat")
        assert len(ends) <= 2
        whole += len(ends) == 2 and document[-1] == eos
        assert len(document) == 64 or len(ends) == 2
    assert whole > 3


def test_conversations_beside_running_text(tiny_llama, three, tmp_path):
    """They are documents of their own, written with the same settings as `chat: true` writes them."""
    tokenizer, seen = AutoTokenizer.from_pretrained(tiny_llama), []
    asked = heal(data=["self", "conversations", three[0]], self_tokens=64)

    def read(data, folder=None):
        return documents(
            data, tokenizer, tiny_llama, rows_needed=20, folder=folder, progress=lambda *each: seen.append(each)
        )

    with pytest.raises(SurgeryError, match=r"no chat template(.|\n)*heal.data=self and heal.chat=false"):
        read(asked)
    tokenizer.chat_template = CONVERSATION
    seen.clear()
    found = read(asked, tmp_path)
    own, conversations, short = found.record["sources"]
    assert conversations["data"] == "conversations that the base wrote itself"
    assert {tuple(each[:2]) for each in found.conversations} == {(1, *ids_of("cat"))}
    assert sum(map(len, found.conversations)) == conversations["tokens"] >= 64
    assert sum(map(len, found.ids)) == own["tokens"] + short["tokens"]
    assert len(found) == sum(source["documents"] for source in found.record["sources"])
    assert list(found)[-len(found.conversations) :] == list(map(list, found.conversations))
    assert {(total, label) for _, total, label in seen} == {(100, "training text")}
    done = [count for count, _, _ in seen]
    assert done == sorted(done), "one stage, which never goes back"
    assert (done[0], done[-1]) == (0, 100)
    assert read(asked, tmp_path).sha256 == found.sha256
    alone = read(heal(data="conversations", self_tokens=64))
    assert alone.conversations == found.conversations
    assert read(heal(data="self", chat=True, self_tokens=64)).ids == found.conversations


def test_a_template_that_ends_messages_with_words_leaves_them_to_the_model(writer, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "<s>{% for m in messages %} cat {{ m.content }} dog{% endfor %}"
    documents = sample(writer, tokenizer, heal(chat=True, length=64), 3000, batch=32)
    ended = [document for document in documents if len(document) < 64]
    assert {document.index(tokenizer.eos_token_id) - len(document) for document in ended} == {-1}
    assert {document[-1] for document in ended} == {tokenizer.eos_token_id}
    assert self_text.Begin.of(writer, tokenizer, True, 64).answer == ()


@pytest.mark.parametrize("chat", [False, True])
def test_a_killed_run_goes_on(writer, tokenizer, tmp_path, monkeypatch, chat):
    tokenizer.chat_template = CONVERSATION
    full = sample(writer, tokenizer, heal(chat=chat), 600, batch=8)

    class Killed(BaseException):
        pass

    def stop(done, *_):
        if done > 200:
            raise Killed

    with pytest.raises(Killed):
        sample(writer, tokenizer, heal(chat=chat), 600, batch=8, folder=tmp_path / "new", progress=stop)
    tmp_path = tmp_path / "new"
    saved = len(list(tmp_path.iterdir()))
    assert saved >= 2
    written = []
    real = self_text._write
    monkeypatch.setattr(self_text, "_write", lambda *args: written.append(1) or real(*args))
    assert sample(writer, tokenizer, heal(chat=chat), 600, batch=8, folder=tmp_path) == full
    assert len(written) == len(list(tmp_path.iterdir())) - saved
    before = len(written)
    sample(writer, tokenizer, heal(chat=chat, seed=1), 100, batch=8, folder=tmp_path)
    assert len(written) > before  # another seed finds nothing of it


def test_self_is_a_source(tiny_llama, tokenizer, read):
    documents = read("self", rows=4)
    assert documents.tokens >= 64
    assert documents.record["data"] == "text that the base wrote itself"
    assert documents.sha256 == read("self", rows=4).sha256
    assert len(Packed(documents, 16)) >= 4


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "bloom", "mpt"])
@torch.no_grad()
def test_a_growing_cache_changes_nothing(family):
    """Token by token the logits are those of the whole text, and the model is left as it was."""
    model = TINY[family]()
    writer = self_text.fast_writer(model)
    known = family not in ("bloom", "mpt")  # the runtime's families
    assert hasattr(writer, "make_cache") == known
    assert not hasattr(model, "make_cache")
    assert not hasattr(model.config, "surgery")
    ours, theirs = (dict(each.named_parameters()) for each in (writer, model))
    assert all(ours[name].data_ptr() == tensor.data_ptr() for name, tensor in theirs.items())
    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    out = writer(input_ids=ids[:, :1], use_cache=True)
    logits = [out.logits]
    for position in range(1, 20):
        cache = {runtime.CACHE: out[runtime.CACHE]}
        out = writer(input_ids=ids[:, position : position + 1], use_cache=True, **cache)
        logits.append(out.logits)
    assert (torch.cat(logits, 1) - model(input_ids=ids, use_cache=False).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen3", "phi3"])
@torch.no_grad()
def test_where_the_processor_has_bfloat16_it_writes_in_it(family, tokenizer, monkeypatch):
    """Weights are rounded, tied ones once; frequencies are not, and the model is left as it was."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    model = TINY[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer = self_text.fast_writer(model)
    ours, theirs = (dict(each.named_parameters(remove_duplicate=False)) for each in (writer, model))
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in theirs.items())
    assert len({id(p) for p in ours.values()}) == len({id(p) for p in theirs.values()})
    buffers = dict(model.named_buffers())
    assert all(tensor.dtype == buffers[name].dtype for name, tensor in writer.named_buffers() if name in buffers)
    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    exact, rounded = (each(input_ids=ids, use_cache=False).logits for each in (model, writer))
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()  # an expert may change
    assert sum(map(len, sample(model, tokenizer, heal(), 64, batch=4))) >= 64
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("family", ["bloom", "mpt", "gpt2", "falcon_alibi", "gemma3", "gpt_oss"])
def test_every_kind_of_family_writes(family, bfloat16, tokenizer, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": bfloat16}, raising=False)
    model = TINY[family]()
    assert sum(map(len, sample(model, tokenizer, heal(), 64, batch=4))) >= 64
