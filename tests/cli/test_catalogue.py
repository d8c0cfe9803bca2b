"""`surgery ls`: recipes grouped, one in full, everything; it fits a screen, and follows from the operations."""

from __future__ import annotations

import io
import re

import pytest
from rich.text import Text

from surgery.cli.render import catalogue as render
from surgery.cli.render.console import _Console
from surgery.cli.render.layout import columns, hanging
from surgery.config import recipe as recipes
from surgery.config.catalogue import Entry, entries
from surgery.operations import builtin_names
from surgery.operations.base import NATIVE, PURPOSES, SURGICAL


def terminal(width: int) -> _Console:
    """A terminal without colour, whose text `file` keeps."""
    return _Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)


def lines_of(out: _Console) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", out.file.getvalue()).splitlines()


def test_ls_is_one_screen(surgery):
    lines = surgery("ls").out.splitlines()
    assert len(lines) < 45
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()], "a pipe gets no padding"
    headings = [line for line in lines if line in PURPOSES.values()]
    assert headings == list(PURPOSES.values()), "every group has a recipe, in this order"
    rows = [re.match(r"^(\S+) +(native|surgical) +(no|included|needed)(/heal)? ", line) for line in lines]
    named = {row[1] for row in rows if row} | {f"{row[1]}-heal" for row in rows if row and row[4]}
    named |= {name for line in lines if line.startswith("  or ") for name in line.removeprefix("  or ").split(", ")}
    assert named == set(recipes.shipped())


@pytest.mark.parametrize("width", [30, 80, 200])
def test_ls_fits_any_terminal(monkeypatch, width):
    out = terminal(width)
    monkeypatch.setattr(render, "console", lambda: out)
    render.recipes(entries(), ["head_mask"], {})
    longest = max(map(len, lines_of(out)))
    assert longest <= max(width, 41), "41: the first three columns, which are not broken"


def test_groups_follow_from_operations_and_settings():
    def entry(name, *overrides):
        return Entry.of(recipes.load(name, overrides))

    assert (entry("gqa").purpose, entry("gqa").training, entry("gqa").tier) == ("cache", "no", SURGICAL)
    plain = entry("mqa")
    assert (plain.purpose, plain.training) == ("training", "needed"), "the mean alone is a start"
    assert entry("gqa", "kv_heads=1").tier == NATIVE
    assert entry("gqa", "kv_heads=1", "keep_layers=0.5").tier == SURGICAL
    assert entry("mqa", "kv_heads=[1, 3]").tier == SURGICAL
    assert entry("mqa", "kv_heads=[3, 3]").tier == NATIVE
    assert entry("prune-heads", "granularity=head").tier == SURGICAL
    assert entry("duo-heal").training == "included"
    assert entry("duo-heal", "heal=null").purpose == "cache", "without its training it is a head split"


def test_a_recipe_of_ones_own_needs_no_group(tmp_path, surgery):
    (tmp_path / "mine.yaml").write_text(
        "version: 1\nname: mine\noperations:\n  - op: duo_attention\n    streaming_ratio: 0.25\n"
    )
    mine = Entry.of(recipes.load(tmp_path / "mine.yaml"), "mine.yaml")
    assert (mine.purpose, mine.tier, mine.training, mine.line) == ("cache", SURGICAL, "no", "")
    shown = surgery("ls", "mine.yaml")
    assert shown.code == 0, shown.err
    assert "streaming_ratio=0.25 " in shown.out
    assert "surgery apply mine.yaml smollm2-135m -o out streaming_ratio=0.125" in shown.out


@pytest.mark.parametrize("name", [*sorted(recipes.shipped()), *builtin_names()])
def test_ls_of_one_shows_every_setting(surgery, name):
    """Every key of its operations stands there, with its description; nothing is padded."""
    shown = surgery("ls", name)
    assert shown.code == 0, shown.err
    assert shown.out == "".join(f"{line.rstrip()}\n" for line in shown.out.splitlines())
    is_recipe = name in recipes.shipped()
    for step in recipes.load(name).operations if is_recipe else ():
        for key in type(step).model_fields:
            assert key == "op" or re.search(rf"^  {key}=", shown.out, re.M), key
    example = re.search(r"^Example: (surgery apply .*)$", shown.out, re.M)
    assert bool(example) == is_recipe
    if example:  # it is a command that is understood
        _, _, recipe, _, _, _, *overrides = example[1].split()
        assert recipes.load(recipe, overrides)


def test_ls_of_one_as_data(surgery):
    data = surgery("ls", "gqa", "--json").json
    assert data["recipe"]["operations"][0]["kv_heads"] is None
    assert data["operations"]["gqa"]["kv_heads"]["description"]
    assert (data["tier"], data["training"]) == ("surgical", "no")
    assert surgery("ls", "head_mask", "--json").json["operations"]["head_mask"]


def test_ls_of_what_there_is_not(refused):
    refused("ls", "gaq", says=["no recipe or operation 'gaq'", "available: ", "did you mean 'gqa'?"])
    refused("ls", "no.yaml", says=["does not exist"])


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"type": "number", "minimum": 0, "maximum": 1}, "number from 0 to 1"),
        ({"type": "number", "exclusiveMinimum": 0}, "number above 0"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "number from 0, below 1"),
        ({"type": "number", "maximum": 1}, "number up to 1"),
        ({"type": "integer", "minimum": 1, "maximum": 2**20}, "whole number from 1"),
        ({"type": "array", "items": {"type": "integer", "minimum": 0}}, "list of whole numbers from 0"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "whole number"),
        ({"anyOf": [{"const": "auto"}, {"type": "number"}]}, "auto or number"),
        ({"type": "boolean"}, "true | false"),
        ({"$ref": "#/$defs/A"}, "a | b"),
    ],
)
def test_a_range_in_words(field, words):
    assert render.kind(field, {"A": {"enum": ["a", "b"]}}) == words


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 60, 80])
def test_words_hang_below_themselves(width):
    """No line is longer than the terminal, none but the first begins at its left, and no word is lost."""
    out, words = terminal(width), "one two three four five six seven eight nine ten " * 4
    hanging(out, Text("label"), words, 10)
    first, *rest = lines_of(out)
    assert first.startswith("label     one")
    assert max(map(len, (first, *rest))) <= width
    assert all(line.startswith(" " * 4) for line in rest)
    assert " ".join((first, *rest)).split() == ["label", *words.split()]


def test_columns_that_do_not_fit_are_cut():
    out = terminal(30)
    columns(out, [["name", "a text that is longer than there is room for it"], ["n", "short"]], cut=True)
    lines = lines_of(out)
    assert [len(line) <= 30 for line in lines] == [True, True]
    assert lines[0].endswith("…")
    assert lines[1] == "n     short"
