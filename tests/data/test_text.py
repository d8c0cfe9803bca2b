"""The built-in text and its parts, text files, and windows cut from them."""

import hashlib
import re
import subprocess
import sys

import pytest
import torch

from surgery.data import text as module
from surgery.data.generated import _sample_tokens
from surgery.data.text import Text, load_text, plain, windows
from surgery.errors import SurgeryError


class Letters:
    """A tokenizer of one token a character: `ord`. With `bos` it begins every text with token 1."""

    def __init__(self, bos: bool = False):
        self.bos, self.bos_token_id = bos, 1

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * (self.bos and add_special_tokens) + [ord(letter) for letter in text]}


def test_parts_do_not_overlap():
    parts = [load_text(part=part) for part in ("calibration", "held-out")]
    words = [re.findall(r"\w+", part.text.lower()) for part in parts]
    grams = [{tuple(w[i : i + 20]) for i in range(len(w) - 20)} for w in words]
    assert not grams[0] & grams[1]  # not even inside paragraphs that differ elsewhere
    paragraphs = [{p.strip() for p in part.text.split("\n\n") if len(p) >= 40} for part in parts]
    assert not paragraphs[0] & paragraphs[1]
    assert 1.8 < len(parts[0].text) / len(parts[1].text) < 2.2
    assert len(parts[1].text) > 80_000
    assert parts[0].title != parts[1].title


def test_same_text_in_another_process():
    code = "from surgery.data.text import load_text as t; print(t().sha256, t(part='calibration').sha256)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [load_text().sha256, load_text(part="calibration").sha256]


def test_sha256_is_of_the_text():
    text = load_text()
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()


def test_builtin_is_free_of_markup():
    for part in module.PARTS:
        prose = "\n".join(p for p in load_text(part=part).text.split("\n\n") if not p.startswith("    "))
        for pattern in (r"^[*=~^-]{3,}$", r"::=", r"^[+|].*[+|]$", r"^\.\. ", r":\w+:`", r"-\[", "Related help"):
            assert not re.findall(pattern, prose, re.MULTILINE), pattern


def test_plain():
    topic = """The "with" statement
********************

The *with* statement, see :ref:`compound`, is self-
contained. [1] It reads "a[0]" and **never** "b*c*d":

   with A() as a:
       pass

   with B() as b: ...

Note:

  A note.

.. index:: with

   with_stmt ::= "with" expression

+-----+
| one |
+-----+

-[ Footnotes ]-

[1] A foot note.

Related help topics: try, CONTEXTMANAGERS
"""
    assert plain(topic) == [
        'The "with" statement',
        'The with statement, see compound, is self-contained. It reads "a[0]" and never "b*c*d":',
        "    with A() as a:\n        pass",
        "    with B() as b: ...",
        "A note.",
        "A foot note.",
    ]


def test_no_pydoc_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SurgeryError, match="--text FILE"):
        load_text()


def test_unknown_part():
    with pytest.raises(SurgeryError, match="use held-out"):
        load_text(part="heldout")


def test_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo – three\n".encode())
    text = load_text(file)
    assert (text.title, text.text) == ("a.txt", "one\ntwo – three\n")
    assert load_text(str(file), part="calibration") == text
    assert load_text(text) is text


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such"), (b"", "empty"), (b" \n\n", "empty"), (b"\x89PNG\xff\xfe", "not UTF-8"), (b"a\0b", "binary")],
)
def test_bad_file(tmp_path, content, says):
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SurgeryError, match=says) as caught:
        load_text(file)
    assert caught.value.where == str(file)
    with pytest.raises(SurgeryError, match="folder"):
        load_text(tmp_path)


def test_windows_are_spread_and_do_not_overlap():
    words = "".join(chr(1000 + i) for i in range(103))
    cut = windows(words, Letters(), length=10, count=7)
    assert cut.shape == (7, 10)
    flat = cut.flatten().tolist()
    assert len(set(flat)) == 70
    firsts = cut[:, 0] - 1000
    assert firsts.tolist() == [0, 14, 29, 44, 58, 73, 88]
    assert all((window.diff() == 1).all() for window in cut)


def test_windows_that_just_fit():
    words = "abcdefghijkl"
    assert windows(words, Letters(), length=4, count=3).flatten().tolist() == [ord(c) for c in words]
    with pytest.raises(SurgeryError, match="has 12 tokens, 3 windows of 5 need 15") as caught:
        windows(Text("mine", "", words), Letters(), length=5, count=3)
    assert (caught.value.where, "at most 2 windows" in caught.value.fix) == ("mine", True)
    for wrong in ({"length": 1}, {"count": 0}):
        with pytest.raises(SurgeryError, match="cannot be measured"):
            windows(words, Letters(), **wrong)


def test_bos_begins_every_window_if_the_tokenizer_adds_it():
    cut = windows("abcdefgh", Letters(bos=True), length=5, count=2)
    assert cut.tolist() == [[1, *map(ord, "abcd")], [1, *map(ord, "efgh")]]


def test_tokens_are_drawn_by_their_probability():
    probabilities, count = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0]), 20_000
    rows = probabilities.log().expand(count, -1)
    drawn = _sample_tokens(rows, torch.Generator().manual_seed(0))
    assert drawn.shape == (count, 1)
    frequencies = torch.bincount(drawn[:, 0], minlength=6) / count
    assert (frequencies[probabilities == 0] == 0).all()
    assert (frequencies - probabilities).abs().max() < 4 * (0.25 / count) ** 0.5
