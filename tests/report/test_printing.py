"""What plans, reports and results print: a line for repr, lines for str, escaped HTML for a notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import TEXT

import surgery
from surgery.io.printing import Table, as_html, as_text

VOID = {"br"}


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of a fragment; raises where tags are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert not attrs, "no styles, no handlers, no links"
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


@pytest.fixture(scope="module")
def shelf(tiny_llama, tmp_path_factory) -> dict[str, object]:
    """One of each object that a script prints."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("printed")
    (folder / "words.txt").write_text(TEXT)
    words, windows = str(folder / "words.txt"), {"windows": 2, "length": 16}
    limits = {"text": words, **windows, "max_kl": 5.0}
    recipe = {"version": 1, "name": "mine", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    report = surgery.apply(recipe | {"evaluate": limits}, tiny_llama, output=folder / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    heal = {"method": "parts", "steps": 1, "length": 16, "batch_tokens": 32, "data": words, "loss": "ce"}
    plans: list[object] = []
    in_memory = surgery.apply(recipe, model)
    healed = surgery.heal(model, tokenizer=surgery.load_tokenizer(tiny_llama), settings=heal, on_plan=plans.append)
    return {
        "plan": surgery.plan(recipe, tiny_llama),
        "split": surgery.plan("streaming", tiny_llama, window=8),
        "report": report,
        "in memory": in_memory,
        "healed": healed,
        "heal plan": plans[0],
        "evaluation": surgery.evaluate(folder / "out", tiny_llama, text=words, **windows),
        "alone": surgery.evaluate(tiny_llama, text=words, **windows),
        "kept": report.evaluation,
        "choices": surgery.evaluate_choices(folder / "out", tiny_llama, text=words, items=3, context=8),
        "choices alone": surgery.evaluate_choices(tiny_llama, text=words, items=3, context=8),
    }


KINDS = ("plan", "split", "report", "in memory", "healed", "heal plan", "evaluation", "alone", "kept", "choices")


@pytest.mark.parametrize("kind", KINDS)
def test_repr_is_a_line_str_are_lines_and_html_is_well_formed(shelf, kind):
    thing = shelf[kind]
    line, text = repr(thing), str(thing)
    assert line.startswith(f"<{type(thing).__name__} ")
    assert line.endswith(">")
    assert "\n" not in line
    assert len(line) < 300
    assert "{" not in line + text, "no raw data"
    assert "\x1b" not in text, "no colours"
    assert all(row == row.rstrip() for row in text.splitlines())
    page = Tags(thing._repr_html_())
    assert page.tags <= {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "pre"}
    for word in text.split():
        assert word.rstrip(":") in page.text, word


def test_a_report_says_what_the_surgery_did_and_cost(shelf):
    report = shelf["report"]
    line, text = repr(report), str(report)
    for part in ("mine on llama", "KV heads 3 → 1", f"KL {report.kl:.3f}", "gate passed", "out"):
        assert part in line
    kv = f"KV cache {report.base_kv_bytes:,} → {report.kv_bytes:,} bytes per token"
    for part in (kv, f"{report.base_perplexity:,.2f} → {report.perplexity:,.2f}", "≤ 5", "checks passed"):
        assert part in text
    assert "not measured" in str(shelf["in memory"])
    assert repr(shelf["in memory"]).endswith("in memory>")
    assert "healed:  parts, 32 tokens, 1 step" in str(shelf["healed"])


def test_a_plan_prints_its_layers(shelf):
    text = str(shelf["plan"])
    assert "native (loads with stock Transformers)" in text.splitlines()[0]
    assert "3 → 1 KV heads, each read by 9 query heads (3 before)" in text
    assert "k_proj.weight [24, 72] → [8, 72]" in text
    assert text.count("└──") >= 1
    assert "surgical (needs the bundled code)" in str(shelf["split"])


@pytest.mark.parametrize("kind", ["evaluation", "alone", "kept", "choices", "choices alone"])
def test_a_result_is_a_mapping_of_its_record(shelf, kind):
    result = shelf[kind]
    assert isinstance(result, Mapping)
    assert dict(result) == result.to_dict()
    assert result["out"] == result.to_dict()["out"]
    assert {**result}.keys() == set(result)
    with pytest.raises(KeyError):
        result["perplexity"]


def test_a_result_prints_what_the_command_prints(shelf, monkeypatch):
    from rich.console import Console

    from surgery.cli.render import tables
    from surgery.evaluation.probes import find

    for kind in ("evaluation", "alone", "choices"):
        result, file = shelf[kind], io.StringIO()
        plain = Console(file=file, width=200, color_system=None, highlight=False, soft_wrap=True)
        monkeypatch.setattr(tables, "console", lambda plain=plain: plain)
        tables.measured(find(type(result).PROBE), result)
        assert str(result) == "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def test_what_was_not_run_says_why():
    from surgery.evaluation.figures import Evaluation, Side

    result = Evaluation("not run", {}, Side(), reason="no memory")
    assert repr(result) == "<Evaluation not run: no memory>"
    assert str(result) == "not run: no memory"


def test_text_is_escaped_and_aligned():
    nasty = "<script>alert('x')</script> & \"more\""
    blocks = [("label", nasty), ("a longer label", "b"), nasty, Table(("h", nasty), [["1", "2"]]), "two\nlines"]
    page = Tags(as_html(nasty, blocks))
    assert "script" not in page.tags
    assert page.text.count("alert") == 4
    text = as_text([*blocks, Table(("one", "two"), [["10000", "2"]], "right")])
    assert text.splitlines()[0].index(nasty) == text.splitlines()[1].index("b", 16)
    assert text.splitlines()[-2:] == ["  one  two", "10000    2"]


def test_figures_of_a_report_are_those_of_its_record(shelf):
    report = shelf["report"]
    record, plan = report.data["evaluation"], report.data["plan"]
    assert report.perplexity == record["out"]["perplexity"]
    assert report.base_perplexity == record["base"]["perplexity"]
    assert report.kl == record["kl"]["mean"]
    assert (report.base_kv_bytes, report.kv_bytes) == tuple(plan["kv_bytes_per_token"].values())
    assert report.changes == plan["changes"]
    assert report.passed is True
    assert set(report.checks.values()) == {"passed"}
    assert report.gate == "passed"
    assert report.evaluation.to_dict() == {key: value for key, value in record.items() if key != "scored_in"}
    assert isinstance(report.path, Path)
    assert report.recall is None
    bare = shelf["in memory"]
    for name in ("perplexity", "base_perplexity", "kl", "recall", "passed", "evaluation", "path"):
        assert getattr(bare, name) is None, name
    assert bare.checks == {}
    assert bare.gate == "not run"
    kept = {"of": 4, "kept": 3, "share": 0.75}
    scored = surgery.Report(report.data | {"evaluation": record | {"needles": {"kept": kept}}})
    assert scored.recall == 0.75
    assert scored.evaluation.probes == {"needles": {"kept": kept}}


def test_a_record_of_an_earlier_version_prints(shelf):
    from surgery.evaluation.figures import Evaluation

    for record in ({"status": "done"}, {"out": {"perplexity": 3.0}, "base": {}}, {"kl": {}, "base": {"other": 1}}):
        result = Evaluation.of(record)
        assert str(result)
        assert repr(result)
