"""Rows that are too short to show what a surgery does are said to be: in a plan, an evaluation and a healing."""

from __future__ import annotations

import pytest
import torch
from families import TINY
from tokenizers_of_bytes import byte_tokenizer

import surgery
from surgery.config import recipe as recipes
from surgery.data.text import Text
from surgery.evaluation import probes
from surgery.evaluation.lengths import too_short
from surgery.evaluation.probes.base import CaseProbe
from surgery.evaluation.probes.settings import fitted, make

SPLIT = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 6}
SPARSE = {"op": "sparse_prefill", "method": "streaming", "block": 16, "dense_below": 40, "sinks": 1, "window": 16}


def recipe(*operations, length=32, **rest) -> dict:
    return {"version": 1, "name": "x", "operations": list(operations), "evaluate": {"length": length}} | rest


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    TINY["llama"](vocab_size=258).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


MERGE = {"op": "gqa", "kv_heads": 1, "method": "mean"}


@pytest.mark.parametrize(
    ("operations", "unchanged", "op"),
    [
        ([SPLIT], 8, "duo_attention"),
        ([SPARSE], 32, "sparse_prefill"),  # blocks of 16 that end by position 40
        ([SPARSE | {"per_layer": {0: {"dense_below": 16}}}], 16, "sparse_prefill"),
        ([SPLIT, SPARSE | {"heads": "retrieval"}], 32, "sparse_prefill"),
        ([MERGE, SPLIT], 8, "duo_attention"),
    ],
)
def test_rows_must_show_every_operation(operations, unchanged, op):
    made = recipes.load(recipe(*operations))
    for length in (unchanged, unchanged + 1, 4 * unchanged - 1):
        note = made.too_short(length, "rows", "length")
        assert op in note
        assert f"{unchanged} " in note
    assert made.too_short(4 * unchanged, "rows", "length") == ""


def test_every_row_shows_a_merge():
    assert recipes.load(recipe(MERGE)).too_short(1, "rows", "length") == ""


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("operation", [SPLIT, SPARSE])
def test_a_row_of_so_many_tokens_gives_the_base_s_logits_and_a_longer_one_others(operation, extra):
    torch.manual_seed(0)
    model = TINY["llama"](vocab_size=258).eval()
    made = recipes.load(recipe(operation))
    length = made.operations[0].unchanged_within + extra * (1 if operation is SPLIT else 128)
    ids = torch.randint(3, 60, (1, length))
    with torch.no_grad():
        before = model(ids).logits
        surgery.apply(recipe(operation), model, tokenizer=byte_tokenizer())
        after = model(ids).logits
    assert torch.allclose(before, after, atol=1e-5) is (extra == 0)  # the last bit of logits of 10, which is 1e-6


@pytest.mark.parametrize(
    ("length", "positions", "words"),
    [
        (8, None, ["lie within the 8 tokens", "length=32"]),
        (9, None, ["show little", "first 8", "length=32"]),
        (31, 64, ["length=32"]),
        (20, 24, ["length=24"]),
        (32, None, []),
        (24, 24, []),  # the model has no room for more
    ],
)
def test_the_note_names_a_length_that_is_long_enough_and_fits(length, positions, words):
    note = too_short(length, 8, "op", rows="rows", key="length", positions=positions)
    assert bool(note) is bool(words)
    assert all(word in note for word in words), note


def test_plan_evaluation_and_healing_say_so(base, tmp_path):
    heal = {"heal": {"steps": 1, "length": 16, "batch_tokens": 16, "data": "builtin"}}
    plan = surgery.plan(recipe(SPLIT, length=16, **heal), str(base))
    assert any("windows of 16 tokens show little" in note and "evaluate.length=32" in note for note in plan.notes)
    assert any("rows of 16 tokens show little" in line and "heal.length=32" in line for line in plan.heal.lines)
    assert not any("windows" in note for note in surgery.plan(recipe(SPLIT, length=32), str(base)).notes)

    surgery.apply(recipe(SPLIT, length=16), str(base), output=tmp_path / "out", check=False, evaluate=False)
    shown = {}
    for length in (8, 16, 32):
        result = surgery.evaluate(tmp_path / "out", base, windows=1, length=length)
        shown[length] = [note for note in result.notes if "windows of" in note]
    assert "lie within" in shown[8][0]
    assert shown[16][0].endswith("which leaves the first 8 of them unchanged; 32 tokens show it")
    assert not shown[32]


# --- what the model does not take is cut ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluate", "positions", "kept"),
    [
        ({"windows": 2}, 512, {}),
        ({"windows": 2}, 511, {"length": 511}),
        ({"windows": 2}, 0, {}),  # no limit is named
        ({"needles": 4}, 1056, {}),  # a prompt leaves 32 positions for its answer
        ({"needles": 4}, 1055, {"needle_length": 1023}),
        ({"needles": 4, "needle_length": 100}, 95, {"length": 95}),  # too short to ask: as it was, and refused
        ({"probes": {"perplexity": {"length": 900}}}, 600, {"probes": {"perplexity": {"length": 600}}}),
        (
            {"probes": {"needles": {"lengths": [256, 512, 900]}}, "length": 64},
            544,
            {"probes": {"needles": {"lengths": [256, 512]}}},
        ),
        (
            {"probes": {"multi_needle": {"cases": 4}}, "length": 64},
            544,
            {"probes": {"multi_needle": {"length": 512, "cases": 4}}},
        ),
    ],
)
def test_lengths_are_cut_to_what_the_model_takes(evaluate, positions, kept):
    made = recipes.load({"version": 1, "name": "x", "operations": [MERGE], "evaluate": evaluate})
    config = TINY["llama"](vocab_size=258).config
    config.max_position_embeddings = positions
    cut, notes = made.cut_to(config)
    wanted = recipes.load({"version": 1, "name": "x", "operations": [MERGE], "evaluate": evaluate | kept})
    assert cut.to_dict() == wanted.to_dict()
    assert len(notes) == bool(kept)
    assert all(f"the model takes {positions:,} tokens" in note for note in notes)
    assert cut.cut_to(config) == (cut, [])


def test_a_recipe_for_longer_models_is_judged_on_what_this_one_takes(base, tmp_path):
    """Plan, record, score, next command and a later run agree on the length."""
    asked = recipe(SPLIT, length=2048) | {"name": "long"}
    asked["evaluate"] |= {"windows": 1, "max_kl": 9.0}
    plan = surgery.plan(asked, str(base))
    assert "evaluate.length is cut from 2,048 to 64: the model takes 64 tokens" in plan.notes
    report = surgery.apply(asked, str(base), output=tmp_path / "out", check=False)
    assert report.gate == "passed"
    assert report.data["evaluation"]["text"]["length"] == report.data["recipe"]["evaluate"]["length"] == 64
    again = surgery.apply(asked, str(base), output=tmp_path / "out", check=False, resume=True)
    assert again.data["plan_hash"] == report.data["plan_hash"]
    model = TINY["llama"](vocab_size=258)
    in_memory = surgery.apply(asked, model, tokenizer=byte_tokenizer())
    surgery.evaluate(model, base, tokenizer=byte_tokenizer(), report=in_memory)
    assert in_memory.data["evaluation"]["text"]["length"] == 64


def test_a_healing_of_such_a_recipe_is_judged_and_resumed_alike(base, tmp_path):
    asked = recipe(SPLIT, length=2048, heal={"steps": 1, "length": 32, "batch_tokens": 32, "data": "builtin"})
    asked["evaluate"] |= {"windows": 1}
    report = surgery.apply(asked, str(base), output=tmp_path / "out", check=False)
    assert report.data["evaluation"]["text"]["length"] == 64
    assert report.data["heal"]["recovered"] is not None
    again = surgery.apply(asked, str(base), output=tmp_path / "out", check=False, resume=True)
    assert again.data["created"] == report.data["created"]


def test_what_a_measurement_leaves_at_its_default_is_cut_too(base, tmp_path):
    """To what the model takes, and its base; what the user asked for is refused, as without a default."""
    torch.manual_seed(0)
    longer = TINY["llama"](vocab_size=258, max_position_embeddings=80)
    longer.save_pretrained(tmp_path / "longer")
    byte_tokenizer().save_pretrained(tmp_path / "longer")
    for out, beside in (base, None), (base, tmp_path / "longer"), (tmp_path / "longer", base):
        result = surgery.evaluate(out, beside, windows=2)
        assert result["text"]["length"] == 64
        shortest = "the base" if beside == base else "the model"
        assert result.notes[-1] == f"length is cut from 512 to 64: {shortest} takes 64 tokens"
    with pytest.raises(surgery.SurgeryError, match="it takes 64 tokens, the windows have 65"):
        surgery.evaluate(base, windows=2, length=65)
    result = surgery.evaluate(TINY["llama"](vocab_size=258).eval(), tokenizer=byte_tokenizer(), windows=2)
    assert result["text"]["length"] == 64


def test_what_the_user_set_stays_when_a_default_is_cut():
    """The text too, which may be no file, and a setting that says the default by null."""
    config = TINY["llama"](vocab_size=258).config
    config.max_position_embeddings = 1024
    text = Text("builtin", "0" * 64, "Words of mine. " * 9)
    made, notes = fitted(make("needles", {"text": text, "length": None, "samples": 3}), {"the model": config})
    assert made.text == text
    assert (made.length, made.lengths, made.samples) == (None, (512, 992), 3)
    assert notes == ["lengths is cut from 512, 1,024, 2,048 to 512, 992: the model takes 1,024 tokens"]
    asked = make("needles", {"length": 1024})
    assert fitted(asked, {"the model": config}) == (asked, [])


@pytest.fixture
def short(tmp_path):
    """A model that takes 600 tokens."""
    TINY["llama"](vocab_size=258, max_position_embeddings=600).save_pretrained(tmp_path / "short")
    byte_tokenizer().save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def test_a_default_is_cut_beside_a_report(short):
    model, tokenizer = surgery.load(short), byte_tokenizer()
    report = surgery.apply(recipe(SPLIT) | {"evaluate": {"length": 32, "windows": 1}}, model, tokenizer=tokenizer)
    options = {"tokenizer": tokenizer, "report": report}
    surgery.evaluate(model, short, **options)
    result = surgery.evaluate(model, short, probe="multi_needle", cases=1, depths=1, **options)
    assert result.notes[-1] == "length is cut from 1,024 to 568: the model takes 600 tokens"


def test_a_default_is_cut_in_a_task(short, surgery):
    asked = ("eval", short, "--probe", "multi_needle", "cases=1", "depths=1")
    said = surgery(*asked, "--write-task", "task").out
    assert "note: length is cut from 1,024 to 568: the model takes 600 tokens" in said


def test_windows_of_a_models_full_length_are_not_called_short(base, tmp_path):
    """No longer ones would show more, so that no note asks for them."""
    split = recipe(SPLIT | {"window": 30}) | {"evaluate": {"windows": 1}}
    surgery.apply(split, base, output=tmp_path / "out", check=False, evaluate=False)
    result = surgery.evaluate(tmp_path / "out", base, windows=2)
    assert [note for note in result.notes if "windows of" in note or "show it" in note] == []
    assert "length is cut from 512 to 64: the model takes 64 tokens" in result.notes


def test_every_probe_with_a_length_measures_a_short_model_by_its_defaults():
    """As many tokens as it takes, with the answer."""
    config = TINY["llama"](vocab_size=258).config
    config.max_position_embeddings = 1024
    cut = {}
    for cls in probes.every():
        if cls.name != "tasks":
            made, notes = fitted(cls(), {"the model": config})
            cut[cls.name] = len(notes)
            if isinstance(made, CaseProbe):
                assert made.make_cases(byte_tokenizer(chat=True), {"out": config}).cases
    expected = ["multi_needle", "needles", "order", "repeats", "verbatim"]
    assert sorted(name for name, notes in cut.items() if notes) == expected
