"""The page: self-contained, every text escaped, small, and what stands in it; in a browser at two widths."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import TEXT, edit_record, edit_tensors
from families import one_thread  # noqa: F401 (a fixture)
from test_card import REPORT

import surgery as package
from surgery.evaluation.conversation import Reply
from surgery.io.card_text import literal
from surgery.io.printing import Table
from surgery.report.card import render_card
from surgery.report.page import LARGEST, Answers, compared_page, render_page

KEPT = {"of": 4, "kept": 3, "share": 0.75, "low": 0.3, "high": 0.95}
EVIL = '<script>alert("x")</script><img src=http://evil.example/x.png>'


class Tags(HTMLParser):
    """Collects tags with their attributes, and the tags that are left open."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def refuse_requests(text: str) -> Tags:
    """The tags of a page that asks for nothing."""
    page = Tags(text)
    assert not page.open
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], "no code in attributes"
        source = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
        assert source is None or source.startswith("data:"), attributes
        if tag == "a":
            assert attributes["href"].startswith(("https://", "#"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert len(text.encode()) < 1_000_000
    return page


def reply(text: str) -> Reply:
    return Reply(text, 3, 4, 0.5, 8.0, 2_000_000, True)


def test_the_page_says_what_the_card_says():
    answers = [Answers("What?", {"the base": reply("This."), "this model": reply("That.")})]
    text = render_page(REPORT, None, ["gqa on Base", "├── a branch"], answers)
    refuse_requests(text)
    for words in ("KV heads 3 → 1 in 30 layers", "├── a branch", "What?", "This.", "That.", "8.0 tokens a second"):
        assert words in text
    assert text.index("What it costs") < text.index("Answers, side by side") < text.index("How it was made")
    assert "<summary>The recipe, with every setting</summary>" in text, "folded, and not as text"
    assert "kv_heads: 1" in text


def test_every_text_is_escaped():
    report = REPORT | {
        "base": REPORT["base"] | {"name": EVIL, "hub_id": None, "base_model": None},
        "recipe": REPORT["recipe"] | {"description": EVIL, "name": EVIL},
        "plan": REPORT["plan"] | {"changes": [EVIL, "[x](javascript:alert(1))"]},
        "gate": {"status": "failed", "limits": {"max_kl": 1.0}, "reasons": [EVIL]},
        "check": {"passed": False, "items": [{"name": EVIL, "status": "failed", "detail": EVIL}]},
    }
    text = render_page(report, None, [EVIL], [Answers(EVIL, {EVIL: reply(EVIL)})])
    page = refuse_requests(text)
    assert "evil.example" in text, "it is there, as text"
    assert not [attributes for tag, attributes in page.tags if tag == "img"]
    refuse_requests(compared_page(EVIL, [(EVIL, Table(("", EVIL), [[EVIL, EVIL]]), [EVIL])], [EVIL], None))


def test_words_of_models_and_texts_are_no_markdown():
    link, product = "[docs](https://evil.example) <https://evil.example>", "What is 2*3*4?"
    side = {"answered": 1, "of": 1}
    chat = {"status": "done", "settings": {"requests": "_a*b*c_.txt", "tokens": 8, "margin": 1.0}, "kept": {}}
    chat |= {"base": side, "out": side, "example": {"request": product, "answer": "[x](https://evil.example)"}}
    figures = {"perplexity": 2.0, "cross_entropy": 0.7}
    report = REPORT | {
        "evaluation": {"status": "done", "base": figures, "out": figures, "kl": {"mean": 0.1}, "chat": chat},
        "gate": {"status": "failed", "limits": {"max_kl": 1.0}, "reasons": [link]},
        "check": {"passed": False, "items": [{"name": "hashes", "status": "failed", "detail": link}]},
    }
    page = refuse_requests(text := render_page(report, None))
    assert not [each for tag, each in page.tags if tag == "a" and "evil" in each.get("href", "")]
    for words in (link.replace("<", "&lt;").replace(">", "&gt;"), product, "_a*b*c_.txt", "[x](https://evil.example)"):
        assert words in text, words
    card = render_card(report, None)
    assert "[docs](" not in card
    assert "the converted model 1 of 1" in card


@pytest.mark.parametrize(
    "words",
    ["__init__", "a __b c__ d", "___x___", "_x_ and gqa_2", "a|b", "2*3*4", "*x*", "~~no~~", "&copy; &lt;", "C:\\d\\",
     "a ` b", "[x](https://e.example)", "<b>", "``", "\\[x]"],
)  # fmt: skip
def test_words_are_shown_as_they_are(words):
    from markdown_it import MarkdownIt

    rendered = MarkdownIt("commonmark").enable("strikethrough").renderInline(f"{literal(words)}.")
    assert unescape(rendered) == f"{words}."


def test_words_keep_their_code_and_stay_in_one_line():
    assert literal("see `eval [A] <B> __c__`, *x*") == r"see `eval [A] <B> __c__`, \*x\*"
    assert literal("one\n\n# two\r* three") == "one # two * three"


def test_a_record_with_nothing_measured_has_a_page():
    few = {key: REPORT[key] for key in ("format", "base", "recipe", "plan", "operations", "files")}
    text = render_page(few, None)
    refuse_requests(text)
    assert "not measured" in text
    assert "Needles by length" not in text


def test_the_needles_are_a_grid_of_shares():
    side = {"hits": 3, "of": 4, "accuracy": 0.75}
    settings = {"lengths": [512, 2048], "depths": [0.25, 0.75]}
    needles = {"status": "done", "settings": settings, "kept": KEPT}
    needles |= {"base": side | {"grid": [[1.0, 1.0], [0.5, None]]}, "out": side | {"grid": [[0.0, 0.25], [1.0, 0.0]]}}
    figures = {"perplexity": 2.0, "cross_entropy": 0.7}
    evaluation = {"status": "done", "base": figures, "out": figures, "kl": {"mean": 0.1}, "needles": needles}
    page = render_page(REPORT | {"evaluation": evaluation}, None)
    cells = [part.partition("</td>")[0].rpartition(">")[2] for part in page.split('<td class="cell"')[1:]]
    assert cells == ["100%", "100%", "50%", "", "0%", "25%", "100%", "0%"]
    assert "2,048 tokens" in page
    assert "A cell of 1 needle has no share of its own: 48 make it reportable" in page
    right = {"right": 3, "of": 4, "low": 0.3, "high": 0.95, "accuracy": 0.75}
    paired = {"both": 3, "only_base": 0, "only_out": 0, "neither": 1, "p": 1.0}
    choices = {"status": "done", "settings": {"items": 4}, "kept": KEPT, "chance": 0.25}
    choices |= {"base": right, "out": right, "paired": paired}
    page = render_page(REPORT | {"evaluation": evaluation | {"choices": choices}}, None)
    assert page.count("has no share of its own") == 1, "of the needles, and not of the probe behind them"


def test_pictures_are_inside_and_too_large_ones_are_left_out(tmp_path):
    report = REPORT | {"other_files": {"heads.png": {}, "healing/loss.png": {}, "secret.png": {}}}
    (tmp_path / "healing").mkdir()
    (tmp_path / "heads.png").write_bytes(b"\x89PNG small")
    (tmp_path / "healing/loss.png").write_bytes(os.urandom(LARGEST))
    (tmp_path / "secret.png").write_bytes(b"other")
    text = render_page(report, tmp_path)
    page = refuse_requests(text)
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img"] == [
        "data:image/png;base64,iVBORyBzbWFsbA=="
    ]
    assert "A picture is left out" in text


def test_the_command_writes_it_and_the_check_knows_it(surgery, model, tmp_path):
    package.apply("streaming", str(model), output=tmp_path / "out", evaluate=False, sinks=1, window=3)
    ran = surgery("report", "out")
    assert (ran.code, ran.out) == (0, "wrote out/report.html\n")
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    refuse_requests(text)
    assert "Answers, side by side" not in text
    assert "├── model.layers.0-1.self_attn" in text, "the plan as a tree, since the base is here"
    model.rename(tmp_path / "gone")
    assert surgery("report", "out", "-o", "without.html").code == 0
    text = (tmp_path / "without.html").read_text(encoding="utf-8")
    assert "<pre>6 of 6 KV heads see only 1 sinks + 3 tokens\n\nThe plan as a tree is not shown: " in text
    assert "surgery report OUT --base MODEL" in text
    assert "├── " not in text
    (tmp_path / "gone").rename(model)
    assert package.check(tmp_path / "out").passed
    assert surgery("report", "out", "-o", "mine.html", "--json").json["page"] == "mine.html"
    asked = surgery("report", "out", "--base", model, "-p", "the cat sat", "-p", "old <b>green</b> doors")
    assert asked.code == 0, asked.err
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    refuse_requests(text)
    assert text.count("<strong>the base</strong>") == text.count("<strong>this model</strong>") == 2
    assert "old &lt;b&gt;green&lt;/b&gt; doors" in text
    assert "2 KV heads" not in text


def test_what_the_command_refuses(refused, model, tmp_path):
    package.apply("streaming", str(model), output=tmp_path / "out", check=False, evaluate=False, sinks=1, window=3)
    refused("report", "out", "-p", "Hello", says=["--prompt asks both models", "--base MODEL"])
    refused("report", model, says=["no surgery.json"])
    edit_tensors(shutil.copytree(model, tmp_path / "other"), lambda tensors: next(iter(tensors.values())).add_(1))
    refused("report", "out", "--base", "./other", says=["not the base it was made from"])
    refused("report", "out", "--base", "./nowhere", says=["nowhere"])
    refused("report", "out", "-o", "no/x.html", says=["no: cannot write the page: no such folder", "make it first"])
    (tmp_path / "folder.html").mkdir()
    refused("report", "out", "-o", "folder.html", says=["folder.html: cannot write the page: this is a folder"])
    for name in ("model.safetensors", "surgery.json", "README.md"):
        refused("report", "out", "-o", f"out/{name}", says=["the name of the page ends in .html or .htm"])
    (tmp_path / "null.html").symlink_to("/dev/null")
    refused("report", "out", "-o", "null.html", says=["null.html: cannot write the page: this is no file"])
    folders = ("--base", model, "--html")
    refused("compare", "out", model, *folders, "no/x.html", says=["no: cannot write the page: no such folder"])
    refused("sweep", "gqa", model, "kv_heads=1,3", "--html", "folder.html", says=["write the page: this is a"])


def test_nothing_is_fetched_for_the_plan(surgery, model, tmp_path, monkeypatch):
    """The recorded base may be gigabytes on the Hub, and nobody asked for its answers."""
    from surgery.io import hub

    package.apply("streaming", str(model), output=tmp_path / "out", check=False, evaluate=False, sinks=1, window=3)
    base = package.Report.of(tmp_path / "out").data["base"]
    edit_record(tmp_path / "out", base=base | {"name": "owner/base", "hub_id": "owner/base", "revision": "a" * 40})
    asked = []

    def found(name, *, weights=True, cached_only=False):
        asked.append((name, cached_only))
        return hub.ResolvedModel(model, name, hub_id="owner/base", revision="a" * 40)

    monkeypatch.setattr("surgery.pipeline.resolve", found)
    monkeypatch.setattr(hub, "resolve", found)
    page = package.write_page(tmp_path / "out").read_text(encoding="utf-8")
    assert asked == [(f"owner/base@{'a' * 40}", True)]
    assert "├── model.layers.0-1.self_attn" in page


def test_an_edited_record_is_told(model, tmp_path):
    package.apply("streaming", str(model), output=tmp_path / "out", check=False, evaluate=False, sinks=1, window=3)
    words = "surgery.json was edited after surgery wrote it"
    assert words not in package.write_page(tmp_path / "out").read_text(encoding="utf-8")
    file = tmp_path / "out/surgery.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"window": 3', '"window": 4'))
    assert words in package.write_page(tmp_path / "out").read_text(encoding="utf-8")
    assert words in package.write_page(tmp_path / "out").read_text(encoding="utf-8"), "also where it was saved since"


# --- in a browser ---------------------------------------------------------------------------------------------------


@functools.cache
def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@dataclass
class Viewed:
    """What a browser saw of a page: messages of its console, requests, and the document."""

    said: list[str]
    asked: list[str]
    wide: int
    pictures: list[bool | int]
    answer_columns: int
    unfolded: bool


def viewed(file: Path, width: int) -> Viewed:
    """Open a page in a window of a width in pixels."""
    if chromium() is None:
        if os.environ.get("SURGERY_BROWSER") == "required":
            pytest.fail("there is no Chromium: .ci/run installs it")
        pytest.skip("there is no Chromium")
    from playwright.sync_api import sync_playwright

    said, asked = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        answers = page.query_selector(".answers")
        columns = answers.evaluate("part => getComputedStyle(part).gridTemplateColumns") if answers else ""
        pictures = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
        if folded := page.query_selector("summary"):
            folded.click()
        unfolded = page.is_visible("details pre")
        browser.close()
    return Viewed(said, asked, wide, pictures, len(columns.split()), unfolded)


WIDTHS = pytest.mark.parametrize("width", [390, 1280])


@WIDTHS
def test_in_a_browser(width, tmp_path):
    report = REPORT | {"other_files": {"heads.png": {}}}
    pixel = bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f6"
        "45400000000049454e44ae426082"
    )
    (tmp_path / "heads.png").write_bytes(pixel)
    long = "word " * 60 + "x" * 300
    answers = [Answers("What?", {"the base": reply(long), "this model": reply(EVIL)})]
    page_file = tmp_path / "report.html"
    page_file.write_text(render_page(report, tmp_path, ["a plan " * 30], answers), encoding="utf-8")
    page = viewed(page_file, width)
    assert not page.said
    assert page.asked == [page_file.as_uri()]
    assert page.wide == width, "nothing is wider than the window"
    assert page.answer_columns == (1 if width < 700 else 2), "side by side where there is room"
    assert page.pictures == [1]
    assert page.unfolded


def command(*args: object) -> None:
    """Run a command of `surgery`, which must succeed."""
    from surgery.cli.main import main

    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert not stopped.value.code


@pytest.fixture(scope="module")
def pages(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """The pages of two healed head splits with answers, and of their comparison, as the commands write them."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "words.txt").write_text(" ".join([TEXT] * 12), encoding="utf-8")  # 8 windows of 512 tokens
    split = {"op": "duo_attention", "sinks": 1, "window": 4}
    split |= {"calibration_samples": 1, "calibration_length": 48, "scoring": {"text": str(folder / "words.txt")}}
    heal = {"method": "lora", "loss": "ce", "data": str(folder / "words.txt"), "steps": 3, "length": 32}
    judge = {"text": str(folder / "words.txt"), "windows": 2, "length": 64}
    for name, ratio in (("a", 0.5), ("a-model-with-a-long-name", 0.34)):
        recipe = {"version": 1, "name": name, "operations": [split | {"streaming_ratio": ratio}]}
        recipe |= {"heal": heal | {"batch_tokens": 64}, "evaluate": judge}
        package.apply(recipe, tiny_llama, output=folder / name, gate=False)
    made = (folder / "a", folder / "a-model-with-a-long-name")
    command("report", made[0], "--base", tiny_llama, "-p", "the cat sat", "-p", "old green doors")
    compared = ("--base", tiny_llama, "--text", judge["text"], "--only", "loss-512,loss-2048,cache")
    command("compare", *made, *compared, "--out", folder / "figures", "--html", folder / "compared.html")
    return {"report": folder / "a/report.html", "comparison": folder / "compared.html"}


@WIDTHS
def test_the_page_of_a_real_conversion(width, pages):
    text = pages["report"].read_text(encoding="utf-8")
    refuse_requests(text)
    for words in ("What it costs", "Answers, side by side", "How it was made", "├── "):
        assert words in text
    page = viewed(pages["report"], width)
    assert not page.said
    assert page.asked == [pages["report"].as_uri()]
    assert page.wide == width
    assert page.answer_columns == (1 if width < 700 else 2)
    assert len(page.pictures) == 2, "the head map and the loss of the training"
    assert all(page.pictures)
    assert page.unfolded


@WIDTHS
def test_the_page_of_a_real_comparison(width, pages):
    refuse_requests(pages["comparison"].read_text(encoding="utf-8"))
    page = viewed(pages["comparison"], width)
    assert not page.said
    assert page.asked == [pages["comparison"].as_uri()]
    assert page.wide == width
    assert len(page.pictures) == 1, "the cache against the KL"
    assert all(page.pictures)


def test_files_for_other_engines():
    """Names and figures are those of the record, and a name in it is text."""
    entry = {"engine": "llama.cpp", "version": "xllamacpp 1", "type": "f32", "file": f"{EVIL}.gguf", "tokens": 64}
    entry |= {"largest_difference": 0.00025, "same_best": 63, "near_ties": 1}
    text = render_page(REPORT | {"exports": [entry, entry | {"type": "q8_0", "largest_difference": 0.47}]}, None)
    refuse_requests(text)
    for words in ("(type f32)", "at most 0.00025", "(type q8_0)", "at most 0.47", "the same at 63 of 64 positions"):
        assert words in text
    assert "surgery export" not in render_page(REPORT, None)
