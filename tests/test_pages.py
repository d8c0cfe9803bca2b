"""Pages: tables and plots are those of the results and of the code, figures in sentences too; links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "recipes", ".github", "kernels", "surgery", "surgery/*", "examples/*")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md"))
SETTINGS = {  # numbers in sentences that were chosen or worked out, not measured
    "README.md": {"3.11", "5.24", "5.25", "0.001", "0.002"},
    "duo-attention.md": {"10%", "40%", "95%", "1.5", "2.0"},
    "gqa.md": {"70%", "0.8"},
    "moh.md": {"75%", "2.632"},
    "sparse-prefill.md": {"60%", "1.02"},
}
FIGURE = re.compile(r"(?<![\w.=/-])(?:\d[\d,]*\.\d+%?|\d+%)(?!\w|\.\d)")


@pytest.fixture
def modules(monkeypatch):
    """tables, results, plots and reference of examples/benchmarks, imported anew."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    names = ("results", "plots", "reference", "tables")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def copied(modules, monkeypatch, tmp_path):
    """The same modules with results, pages and plots in a folder of the test."""
    results, plots, tables = modules["results"], modules["plots"], modules["tables"]
    for path in (*results.FOLDER.glob("*.json"), *plots.FOLDER.glob("*.svg"), *tables.pages()):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for module in modules.values():
        for name in ("ROOT", "FOLDER"):
            if hasattr(module, name) and module is not modules["reference"]:
                monkeypatch.setattr(module, name, tmp_path / getattr(module, name).relative_to(ROOT))
    return modules


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path.name, old, text.count(old))
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_tables_and_plots_are_those_of_results_and_code(modules):
    assert list(modules["tables"].stale()) == [], "python examples/benchmarks/tables.py --write"


def test_every_results_file_and_every_plot_stands_on_a_page(modules):
    tables = modules["tables"]
    found = [block for page in tables.pages() for block in tables.blocks(page)]
    assert {block.name for block in found if block.kind == "results"} == set(modules["results"].names())
    assert {block.name for block in found if block.kind == "plot"} == set(modules["plots"].PLOTS)
    assert {block.name for block in found if block.kind == "reference"} == set(modules["reference"].REFERENCES)
    drawn = {path.stem for path in modules["plots"].FOLDER.iterdir()}
    assert drawn == set(modules["plots"].PLOTS)


def test_every_recipe_has_a_row_of_the_index_and_a_page_that_names_it(modules):
    rows = [
        re.fullmatch(r"\[`([\w-]+)`\]\(([\w-]+\.md)\)", cells[0])
        for cells in modules["results"].read("recipes").texts()
    ]
    index = {row[1]: row[2] for row in rows}
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(index) == recipes, f"rows of recipes.json: missing or too many: {set(index) ^ recipes}"
    for recipe, page in index.items():
        assert f"`{recipe}`" in (ROOT / "recipes" / page).read_text(encoding="utf-8"), (recipe, page)
    second = {cells[0].strip("`") for cells in modules["results"].read("gemma3-270m").texts()}
    assert second == recipes, f"rows of gemma3-270m.json: missing or too many: {second ^ recipes}"


def test_the_table_of_papers_names_tests_that_exist(modules, monkeypatch):
    monkeypatch.delitem(sys.modules, "papers", raising=False)
    papers = importlib.import_module("papers")
    assert papers.missing_tests() == []
    monkeypatch.setattr(papers, "TESTS", ROOT / "examples")
    assert "runtime/test_estimators.py::test_kept_blocks_are_those_of_the_formula" in papers.missing_tests()
    sys.modules.pop("papers", None)


def test_the_index_is_short():
    assert len((ROOT / "recipes" / "README.md").read_text(encoding="utf-8").split()) < 900


def test_figures_in_sentences_are_those_of_the_page(modules):
    """Rounded, as the sentence has them; a share must be a share."""
    tables, results = modules["tables"], modules["results"]
    for page in tables.pages():
        names = [block.name for block in tables.blocks(page) if block.kind == "results"]
        cells = [cell for name in names for row in results.read(name).texts() for cell in row]
        cells += [column.name for name in names for column in results.read(name).columns]
        known = [figure for cell in cells for figure in re.findall(r"\d[\d,]*\.?\d*%?", cell)]
        prose = re.sub(r"```.*?```", "", tables.MARK.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)
        for figure in FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose)) if names else ():
            digits, percent = len(figure.strip("%").partition(".")[2]), figure.endswith("%")
            measured = any(
                round(number(other), digits) == number(figure) for other in known if other.endswith("%") == percent
            )
            assert measured or figure in SETTINGS.get(page.name, ()), f"{page.name}: {figure}"


def number(figure: str) -> float:
    return float(figure.rstrip("%").replace(",", ""))


def test_a_changed_figure_is_named_by_page_and_row(copied):
    results, tables = copied["results"], copied["tables"]
    edit(results.FOLDER / "gqa-means.json", "12934", "12935")
    faults = list(tables.stale())
    assert len(faults) == 4, faults
    assert faults[0].startswith("recipes/README.md: results recipes: lacks | [`mqa`](gqa.md)"), (
        "a row that refers to it"
    )
    assert "gqa.md: results gqa-means: lacks | `mean` | 12,935 | 9.468" in faults[1]
    assert "should not have | `mean` | 12,934 |" in faults[1]
    assert faults[2].startswith("recipes/papers.md: results papers: lacks | MQA"), "a row that refers to it"
    assert faults[3] == "recipes/plots/gqa.svg: the figures of gqa-closed-form, gqa-means are others"


def test_a_missing_row_is_named(copied):
    results, tables = copied["results"], copied["tables"]
    path = results.FOLDER / "sparse-recipes.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in data["rows"] if row[0] != "`minference`"]
    path.write_text(json.dumps(data | {"rows": rows}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"sparse-recipes.json has no row '`minference`'; it has `sparse-prefill`"):
        list(tables.stale())
    page = tables.ROOT / "recipes" / "moh.md"
    edit(page, "| `mae` | 8 of 9 | 12.26 | 8 |\n", "")
    edit(results.FOLDER / "recipes.json", '"`minference`"', '"`flexprefill`"')
    assert any("moh.md: results moh-recipes: lacks | `mae` | 8 of 9" in fault for fault in tables.stale())


def test_what_was_edited_by_hand_is_put_right(copied, monkeypatch):
    tables, plots = copied["tables"], copied["plots"]
    page = tables.ROOT / "recipes" / "gqa.md"
    before = page.read_bytes()
    edit(page, "12,934", "1")
    (plots.FOLDER / "gqa.svg").unlink()
    assert sum("gqa" in fault for fault in tables.stale()) == 2
    monkeypatch.setattr(sys, "argv", ["tables.py", "--write"])
    assert tables.main() == 0
    assert page.read_bytes() == before
    assert list(tables.stale()) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("results: gqa-means", "results: nothing", "no results nothing: there is bench-duo"),
        ("plot: gqa", "plot: nothing", "gqa.md: no plot nothing: there is cost, cost-gemma, cost-mha, gqa"),
        (
            "<!-- plot: gqa -->",
            "<!-- plot: gqa -->\n<!-- results: gqa-means -->",
            "gqa.md: a mark has no <!-- end -->",
        ),
    ],
)
def test_marks_that_lead_nowhere(copied, old, new, says):
    edit(copied["tables"].ROOT / "recipes" / "gqa.md", old, new)
    with pytest.raises(SystemExit, match=says):
        list(copied["tables"].stale())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": [[1]]}, "a row of 1 cells under 2 columns: 1"),
        ({"machine": None, "date": "today"}, "its keys should be columns, command, machine, rows; it has"),
    ],
)
def test_results_files_of_another_form(copied, change, says):
    path = copied["results"].FOLDER / "new.json"
    path.write_text(
        json.dumps({"command": "c", "machine": "m", "columns": ["a", "b"], "rows": []} | change), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match=says):
        copied["results"].read("new")


def test_cells(copied):
    results = copied["results"]
    columns = ["what", {"name": "plain", "align": "left"}, {"name": "share", "format": "{:.0%}"}]
    rows = [
        ["a|b", 12934, 0.5],
        ["c", None, {"low": 0.25, "high": 1, "format": "{low} to {high}"}],
        ["d", "x", {"from": "gqa-means", "row": "`mean`", "format": "{2:.1f}"}],
        [
            "e",
            {"from": "gqa-means", "row": "`mean`", "column": "perplexity"},
            {"from": "new", "row": "a|b", "column": "share"},
        ],
    ]
    data = {"command": ["one", "two"], "machine": "a machine", "columns": columns, "rows": rows}
    (results.FOLDER / "new.json").write_text(json.dumps(data), encoding="utf-8")
    assert results.table("new").splitlines() == [
        "| what | plain | share |",
        "| --- | --- | ---: |",
        "| a\\|b | 12,934 | 50% |",
        "| c | | 0.25 to 1 |",
        "| d | x | 9.5 |",
        "| e | 12,934 | 50% |",
        "",
        "Printed by `one` · `two`, on a machine.",
    ]
    found = results.read("new")
    assert found.number(found.rows[0], "share") == 0.5
    assert found.number(found.rows[1], "share", "low") == 0.25
    assert found.number(found.rows[1], "plain") is None
    assert found.number(found.rows[3], "plain") == 12934
    with pytest.raises(SystemExit, match=r"new.json has no column 'other'; it has what, plain, share"):
        found.number(found.rows[0], "other")
    with pytest.raises(SystemExit, match="'x' below 'plain' is no number"):
        found.number(found.rows[2], "plain")


def test_a_plot_is_drawn_twice_with_the_same_bytes_and_has_no_date(modules):
    plots = modules["plots"]
    for plot in plots.PLOTS.values():
        text = plots.svg(plot)
        assert text == plots.svg(plot)
        assert "<dc:date>" not in text
        assert plot.says.endswith(".")
        axes = plots.figure(plot).axes[0]
        xs, ys = map(sorted, (axes.get_xlim(), axes.get_ylim()))
        points = [point for each in axes.collections for point in each.get_offsets().tolist()]
        points += [point for line in axes.lines if len(line.get_xydata()) > 2 for point in line.get_xydata().tolist()]
        assert all(xs[0] <= x <= xs[1] and ys[0] <= y <= ys[1] for x, y in points if x is not None), "cut off"
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_yticklabels()


def test_a_plot_that_was_drawn_otherwise_is_stale(copied):
    path = copied["plots"].FOLDER / "moh.svg"
    path.write_text(path.read_text(encoding="utf-8").replace("#0072b2", "#ff0000"), encoding="utf-8")
    assert list(copied["tables"].stale()) == ["recipes/plots/moh.svg: it is drawn otherwise"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") for words in headings}, heading
