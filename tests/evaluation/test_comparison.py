"""Several models beside their base: the table's numbers, one run of the base, resuming, what is refused; sweeps."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from conftest import TEXT, edit_record, edit_tensors
from families import one_thread  # noqa: F401 (a fixture)

import surgery as package
from surgery.errors import MachineError, SurgeryError
from surgery.evaluation.comparison import measures
from surgery.evaluation.comparison import run as running
from surgery.evaluation.comparison.measures import MEASURES, Column, chosen
from surgery.search.sweep import combinations, split

ONLY = ["loss-512", "choices", "cache"]
SMALL = {"loss-512": (("windows", 2), ("length", 64)), "loss-2048": (("windows", 1), ("length", 96))}
SMALL |= {"choices": (("items", 6), ("context", 12))}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The same measurements on fewer and shorter texts."""
    from dataclasses import replace

    found = tuple(replace(m, settings=SMALL.get(m.name, m.settings)) for m in MEASURES)
    monkeypatch.setattr(measures, "MEASURES", found)


@pytest.fixture
def text(tmp_path):
    """Sentences of words that the tiny tokenizer knows."""
    words = TEXT.split()
    sentences = [" ".join(words[at : at + 9]).capitalize() + "." for at in range(0, len(words) - 9, 3)]
    (tmp_path / "words.txt").write_text(" ".join(sentences).lower().replace(".", " ."), encoding="utf-8")
    return tmp_path / "words.txt"


@pytest.fixture
def made(model, tmp_path):
    """A merged and a streaming child of the tiny model."""
    for name, recipe, fields in (
        ("merged", "gqa", {"method": "mean"}),
        ("short", "streaming", {"sinks": 1, "window": 3}),
    ):
        package.apply(recipe, model, output=tmp_path / name, check=False, evaluate=False, **fields)
    return tmp_path


def hits(kept: int, of: int, base: int, asked: int = 48) -> dict:
    """The record of a recall test or of short requests."""
    share = {"kept": kept, "of": of, "share": kept / of if of else None}
    return {"status": "done", "base": {"hits": base, "of": asked}, "out": {"hits": kept + 1}, "kept": share}


def written(kv: float, kl: float, needles: dict, late: dict, own: float | None) -> dict:
    """The records of a model, as they are kept."""
    losses = {"base": {"cross_entropy": 2.5}, "out": {"cross_entropy": 2.5 + kl}, "kl": {"mean": kl}}
    cache = {"base": {"per_token": 100, "long_mib": 8.0}, "out": {"per_token": 40, "long_mib": kv}}
    speed = {"ratio": {"prefill": 2.0, "decode": 1.25, "own": own}}
    done = {"status": "done"}
    return {
        "loss-512": done | losses,
        "loss-2048": done | losses | {"notes": ["windows end early"]},
        "choices": done | {"base": {"right": 90, "of": 200}, "out": {"right": 80, "of": 200}},
        "needles": needles,
        "late": late,
        "chat": hits(7, 9, 9, 10),
        "cache": done | cache,
        "speed": done | speed,
    }


def test_every_cell_number_and_point_of_the_picture(tmp_path, monkeypatch):
    """From records that were written by hand: what is kept, out of what, and where a model stands in the picture."""
    from surgery.evaluation.comparison.result import Comparison
    from surgery.report import plots

    records = {
        "a": written(2.0, 0.125, hits(40, 44, 44), hits(11, 44, 44), 1.5),
        "b": written(6.0, 0.5, hits(39, 44, 44), hits(44, 44, 44), None),
    }
    found = Comparison("m", MEASURES, records)
    titles = [column.title for _, column in found.columns]
    cells = {
        model: dict(zip(titles, (found.cell(model, *each) for each in found.columns), strict=True))
        for model in ("the base", "a", "b")
    }
    assert cells["the base"] == {
        "loss 512": "2.500", "loss 2,048": "2.500", "KL 2,048": "0.0000", "choices": "90/200", "needles": "44/48",
        "late": "44/48", "chat": "9/10", "KV/token": "100", "KV at 8k": "8.0", "prompt": "1.00", "decode": "1.00",
        "own": "",
    }  # fmt: skip
    assert cells["a"] == {
        "loss 512": "2.625", "loss 2,048": "2.625", "KL 2,048": "0.1250", "choices": "80/200", "needles": "40/44",
        "late": "11/44", "chat": "7/9", "KV/token": "40", "KV at 8k": "2.0", "prompt": "2.00", "decode": "1.25",
        "own": "1.50",
    }  # fmt: skip
    assert (cells["b"]["needles"], cells["b"]["late"], cells["b"]["own"]) == ("39/44", "44/44", "")
    assert "none:" not in str(found)
    rows = {row["model"]: row for row in found.to_dict()["rows"]}
    assert (rows["a"]["needles"], rows["a"]["late"], rows["b"]["late"]) == (40, 11, 44)
    few = "10 short requests are few: 48 make the share reportable (surgery eval OUT --base BASE --probe chat "
    few += "requests=FILE)"
    assert found.all_notes == ["loss on windows of 2,048 tokens: windows end early", few], "of all models, so once"
    for each in records.values():
        each["choices"] |= {"chance": 0.25, "base": {"right": 54, "of": 200, "low": 0.213}}
    guess = (
        "multiple choice: the base answers no more than a guess does (54 of 200, 95% interval from 21.3%; a guess 25%)"
    )
    assert found.all_notes[1] == f"{guess}: its column proves nothing"
    drawn = {}
    monkeypatch.setattr(
        plots, "points", lambda path, marks, **words: drawn.update(marks) or said.append(words["kinds"])
    )
    said = []
    found.plot(tmp_path / "x.png")
    assert {name: (mark.x, mark.y, mark.filled) for name, mark in drawn.items()} == {
        "a": (0.25, 0.125, True), "b": (0.75, 0.5, False), "the base": (1.0, 0.0, True),
    }  # fmt: skip
    records["b"]["needles"] = hits(0, 0, 44)
    found.plot(tmp_path / "x.png")
    records["c"] = records["a"] | {"needles": {"status": "not run", "reason": "no tokenizer"}}
    found.plot(tmp_path / "x.png")
    for record in records.values():
        del record["needles"]
    found.plot(tmp_path / "x.png")
    hollow = ["fewer", "fewer, or none counts", "fewer, or none counts, or not measured"]
    assert said == [*(("keeps 90% of the needles", words) for words in hollow), None]


def test_a_count_out_of_nothing_is_no_zero():
    """A model that still sees every prompt by its design has no needle that counts; 0 would say that it finds none."""
    from surgery.evaluation.comparison.result import Comparison

    records = {"a": written(2.0, 0.1, hits(0, 0, 44), hits(0, 44, 44), None)}
    found = Comparison("m", MEASURES, records)
    of = {column.title: (measure, column) for measure, column in found.columns}
    assert [found.cell(model, *of["needles"]) for model in ("the base", "a")] == ["44/48", "none"]
    assert found.cell("a", *of["late"]) == "0/44"
    assert [found.number("a", *of[title]) for title in ("needles", "late")] == [None, 0]
    assert (found.whole("a", *of["late"]), found.whole("a", *of["KV/token"])) == (44, None)
    assert "none: the base answers no prompt that counts for this model" in str(found)


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["out-a", "out-b"], ["out-a", "out-b"]),
        (["/far/away/a", "/far/away/b"], ["a", "b"]),
        (["far/away/a", "far/b"], ["away/a", "b"]),
        (["a/out", "b/out"], ["a/out", "b/out"]),
        (["out", "out/inner"], ["out", "out/inner"]),
        (["owner/a", "other/a"], ["owner/a", "other/a"]),
        (["./the base", "./b"],) * 2,
        (["/far/kv=1", "/far/kv=2"], ["kv=1", "kv=2"]),
    ],
)
def test_the_table_leaves_out_the_folder_that_all_models_lie_in(models, names):
    from surgery.evaluation.comparison.result import Comparison

    record, shown = written(2.0, 0.1, hits(4, 4, 4), hits(4, 4, 4), None), running.short_names(models)
    found = Comparison("m", MEASURES, dict.fromkeys(models, record), names=shown)
    ((_, table, _), _) = found.tables
    assert [row[0] for row in table.rows] == ["the base", *names]
    rows = found.to_dict()["rows"]
    assert [row["model"] for row in rows] == ["the base", *models], "the record has the whole name"
    assert [row["name"] for row in rows] == ["the base", *names], "and the one by which the notes call it"


def test_names_that_are_no_paths_are_shown_whole():
    """Those of a sweep: settings, whose values may be paths."""
    from surgery.evaluation.comparison.result import Comparison

    tries = ["calibration_text=/a/b", "calibration_text=/a/c"]
    record = written(2.0, 0.1, hits(4, 4, 4), hits(4, 4, 4), None)
    ((_, table, _), _) = Comparison("m", MEASURES, dict.fromkeys(tries, record)).tables
    assert [row[0] for row in table.rows] == ["the base", *tries]


def test_what_the_windows_do_not_show_is_said(model, text, tmp_path):
    """They lie within the prompt that this sparse prefill reads whole."""
    package.apply("sparse-prefill", model, output=tmp_path / "sparse", check=False, evaluate=False, dense_below=512)
    package.apply("gqa", model, output=tmp_path / "merged", check=False, evaluate=False, method="mean")
    models = [tmp_path / "sparse", tmp_path / "merged"]
    found = package.compare(models, model, folder=tmp_path / "c", text=str(text), only=["loss-512"])
    (note,) = [note for note in found.all_notes if "show nothing of it" in note]
    assert "sparse_prefill leaves unchanged" in note
    assert note.endswith("(sparse)")


def test_a_converted_model_is_no_base(refused, made, model, tmp_path):
    """Its weights are the base's: a head split leaves them. A model that was made from it has it as its base."""
    package.apply("streaming", model, output=tmp_path / "other", check=False, evaluate=False, sinks=2, window=9)
    second = [tmp_path / "second", tmp_path / "third"]
    for head, out in enumerate(second):
        gates = {"op": "head_mask", "values": {0: {head: 0.5}}}
        step = {"version": 1, "name": "masked", "operations": [gates]}
        package.apply(step, made / "short", output=out, check=False, evaluate=False)
    pair = (made / "merged", made / "short")
    refused("compare", *pair, "--base", tmp_path / "other", "--only", "cache", says=["is itself a converted model"])
    refused("compare", *second, "--base", tmp_path / "other", "--only", "cache", says=["is itself a converted model"])
    assert package.compare(second, made / "short", folder=tmp_path / "c1", only=["cache"])
    package.apply("streaming", model, output=tmp_path / "again", check=False, evaluate=False, sinks=1, window=3)
    assert package.compare(second, tmp_path / "again", folder=tmp_path / "c3", only=["cache"]), "the same, made again"
    assert package.compare([*pair, *second], model, folder=tmp_path / "c2", only=["cache"])
    with pytest.raises(SurgeryError, match="is itself a converted model"):
        package.reproduce(made / "short", tmp_path / "other")
    refused(
        "report", made / "short", "--base", tmp_path / "other", says=["is itself a converted model"], has_json=False
    )


def test_the_page_has_the_rows(surgery, made, model):
    page = made / "c.html"
    done = surgery("compare", made / "merged", made / "short", "--base", model, "--only", "cache", "--html", page)
    assert done.code == 0, done.err
    text = page.read_text(encoding="utf-8")
    for word in ("the base", ">merged<", ">short<", "KV/token"):
        assert word in text
    assert str(made) not in text, "a page is passed on"


def test_two_runs_do_not_share_a_folder(made, model, text):
    from surgery.io.output_folder import used_alone

    asked = {"folder": made / "c", "text": str(text), "only": ONLY}
    with used_alone(made / "c", "wait"), pytest.raises(MachineError, match="another run uses this folder"):
        package.compare([made / "merged", made / "short"], model, **asked)
    assert package.compare([made / "merged", made / "short"], model, **asked).to_dict()["rows"]


def test_the_table_has_what_each_probe_says_alone(made, model, text):
    found = package.compare([made / "merged", made / "short"], model, folder=made / "c", text=str(text), only=ONLY)
    rows = {row["model"]: row for row in found.to_dict()["rows"]}
    assert list(rows) == ["the base", str(made / "merged"), str(made / "short")]
    for name in ("merged", "short"):
        alone = package.evaluate(made / name, model, text=str(text), windows=2, length=64)
        row = rows[str(made / name)]
        assert row["loss 512"] == alone["out"]["cross_entropy"]
        assert rows["the base"]["loss 512"] == alone["base"]["cross_entropy"]
        right = package.evaluate_choices(made / name, model, text=str(text), items=6, context=12)
        assert row["choices"] == right["out"]["right"]
        assert row["KV/token"] == alone["out"]["kv_bytes_per_token"]
    base, merged, short = rows.values()
    assert base["KV/token"] == 2 * 2 * 3 * 8 * 2  # K and V, layers, KV heads, head size, bytes
    assert base["KV at 8k"] == base["KV/token"] * 8192 / 2**20
    assert merged["KV/token"] == base["KV/token"] / 3
    assert (short["KV/token"], short["KV at 8k"]) == (0, 4 * base["KV/token"] / 2**20)
    assert "choices: multiple-choice questions right" in str(found)
    assert str(found).splitlines()[1].split()[:2] == ["the", "base"]
    assert len(str(found).splitlines()[2].split()) == 3, "a model, its loss, its choices"


def test_the_base_runs_once(made, model, text, monkeypatch):
    from surgery.evaluation import paired
    from surgery.evaluation.probes import perplexity

    loaded, scored = [], []
    of_cases, of_windows = paired.loaded, perplexity.score_model
    monkeypatch.setattr(paired, "loaded", lambda source, **rest: (loaded.append(source), of_cases(source, **rest))[1])
    monkeypatch.setattr(
        perplexity, "score_model", lambda source, *rest: (scored.append(source), of_windows(source, *rest))[1]
    )
    models = [made / "merged", made / "short"]
    first = package.compare(models, model, folder=made / "c", text=str(text), only=ONLY)
    assert loaded == scored == [model, *models]
    again = package.compare(models, model, folder=made / "c", text=str(text), only=ONLY)
    assert loaded == scored == [model, *models], "what is finished is not measured again"
    assert again.to_dict() == first.to_dict()
    package.apply("streaming", model, output=made / "added", check=False, evaluate=False, sinks=2, window=5)
    loaded.clear(), scored.clear()
    more = package.compare([*models, made / "added"], model, folder=made / "c", text=str(text), only=ONLY)
    assert loaded == scored == [made / "added"], "a further model costs only itself"
    assert more.to_dict()["rows"][:3] == first.to_dict()["rows"]
    apart = package.compare([*models, made / "added"], model, folder=made / "d", text=str(text), only=ONLY)
    assert apart.to_dict() == more.to_dict(), "and it would be the same"


def test_a_model_that_does_not_fit_is_not_run_though_the_answers_of_the_base_are_there(made, model, text, monkeypatch):
    from surgery.evaluation import paired

    asked = {"folder": made / "c", "text": str(text), "only": ["choices"]}
    package.compare([made / "merged", made / "short"], model, **asked)
    package.apply("streaming", model, output=made / "large", check=False, evaluate=False, sinks=2, window=5)
    monkeypatch.setattr(paired, "too_big", lambda weights, extra: "it needs more memory than is free")
    found = package.compare([made / "merged", made / "large"], model, **asked).to_dict()
    assert found["records"][str(made / "large")]["choices"]["status"] == "not run"
    assert [row["choices"] is None for row in found["rows"]] == [False, False, True]


def test_what_the_base_answered_is_kept_before_a_model_runs(made, model, text, monkeypatch):
    from surgery.evaluation import paired

    loaded, load = [], paired.loaded

    def fails_once(source, **options):
        loaded.append(source)
        if len(loaded) == 2:
            raise MachineError("the memory is full")
        return load(source, **options)

    monkeypatch.setattr(paired, "loaded", fails_once)
    models, asked = [made / "merged", made / "short"], {"folder": made / "c", "text": str(text), "only": ["choices"]}
    with pytest.raises(MachineError, match="full"):
        package.compare(models, model, **asked)
    package.compare(models, model, **asked)
    assert loaded == [model, models[0], *models]


def test_a_comparison_that_was_stopped_goes_on(made, model, text, monkeypatch):
    models, measured = [made / "merged", made / "short"], []
    whole = package.compare(models, model, folder=made / "whole", text=str(text), only=ONLY).to_dict()
    measure = running._measured

    def stop(measured_now, *rest):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(measured_now.name)
        return measure(measured_now, *rest)

    monkeypatch.setattr(running, "_measured", stop)
    with pytest.raises(KeyboardInterrupt):
        package.compare(models, model, folder=made / "c", text=str(text), only=ONLY)
    measured.clear()
    assert package.compare(models, model, folder=made / "c", text=str(text), only=ONLY).to_dict() == whole
    assert measured == ["choices", "cache"]


def test_a_model_that_changed_is_measured_again_and_one_can_be_added(made, model, text):
    models = [made / "merged", made / "short"]
    package.compare(models, model, folder=made / "c", text=str(text), only=["loss-512"])
    shutil.rmtree(made / "merged")
    package.apply("gqa", model, output=made / "merged", check=False, evaluate=False, method="first")
    found = package.compare([*models, model], model, folder=made / "c", text=str(text), only=["loss-512"])
    alone = package.evaluate(made / "merged", model, text=str(text), windows=2, length=64)
    rows = {row["model"]: row["loss 512"] for row in found.to_dict()["rows"]}
    assert rows[str(made / "merged")] == alone["out"]["cross_entropy"]
    assert rows[str(model)] == rows["the base"]


def test_figures_of_the_record_are_taken(made, model, text):
    probes = {"perplexity": {"windows": 2, "length": 64}, "choices": {"items": 6, "context": 12}}
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    recipe |= {"evaluate": {"text": str(text), "probes": probes}}
    package.apply(recipe, model, output=made / "scored", check=False, gate=False)
    record = json.loads((made / "scored/surgery.json").read_text())
    models = [made / "scored", made / "merged"]
    found = package.compare(models, model, folder=made / "c", text=str(text), only=ONLY)
    assert found.taken == {str(made / "scored"): ["loss-512", "choices"], str(made / "merged"): []}
    assert "taken from surgery.json" in str(found)
    rows = {row["model"]: row for row in found.to_dict()["rows"]}
    assert rows[str(made / "scored")]["loss 512"] == record["evaluation"]["out"]["cross_entropy"]
    mine, other = (rows[str(path)] for path in models)
    names = {"model": "", "name": ""}
    assert {**mine, **names} == {**other, **names}, "the same weights, measured now"


def test_what_cannot_be_asked_is_left_empty_with_the_reason(made, model, text):
    models = [made / "merged", made / "short"]
    found = package.compare(models, model, folder=made / "c", text=str(text), only=["chat", "cache"])
    record = found.to_dict()["records"][str(made / "merged")]["chat"]
    assert record["status"] == "not run"
    assert "chat template" in record["reason"]
    assert found.to_dict()["rows"][1]["chat"] is None
    assert found.cell(str(made / "merged"), *found.columns[0]) == ""
    assert "short requests of" in str(found)
    assert "not run: " in str(found), "and it is said why"
    assert "chat" not in json.loads((made / "c/compare.json").read_text())["models"][str(made / "merged")]["records"]


def test_an_error_of_the_machine_is_raised_and_the_next_run_goes_on(made, model, text, monkeypatch):
    models, cache = [made / "merged", made / "short"], running._cache

    def full(*_):
        raise MachineError("the disk is full", code="disk-full")

    monkeypatch.setattr(running, "_cache", full)
    with pytest.raises(MachineError, match="full"):
        package.compare(models, model, folder=made / "c", text=str(text), only=["loss-512", "cache"])
    monkeypatch.setattr(running, "_cache", cache)
    found = package.compare(models, model, folder=made / "c", text=str(text), only=["loss-512", "cache"])
    assert found.to_dict()["rows"][1]["KV/token"]


# --- figures that may not be taken ----------------------------------------------------------------------------------


def test_a_change_of_the_config_alone_is_another_model(made, model, text):
    models = [made / "merged", made / "short"]
    before = package.compare(models, model, folder=made / "c", text=str(text), only=ONLY).to_dict()["rows"][2]
    package.apply(
        "streaming", model, output=made / "short", check=False, evaluate=False, overwrite=True, sinks=1, window=30
    )
    after = package.compare(models, model, folder=made / "c", text=str(text), only=ONLY).to_dict()["rows"][2]
    fresh = package.compare(models, model, folder=made / "d", text=str(text), only=ONLY).to_dict()["rows"][2]
    assert after == fresh != before


def test_what_another_base_scored_is_not_used(made, model, text, tmp_path):
    other = tmp_path / "another-base"
    shutil.copytree(model, other)
    edit_tensors(other, lambda tensors: tensors.update({name: t * 1.5 for name, t in tensors.items()}))
    package.apply("gqa", other, output=made / "x", check=False, evaluate=False, method="mean")
    package.apply("streaming", other, output=made / "y", check=False, evaluate=False, sinks=1, window=3)
    options = {"text": str(text), "only": ["loss-512"]}
    package.compare([made / "merged", made / "short"], model, folder=made / "c", **options)
    (made / "c/compare.json").unlink()  # as a user does who is told that it cannot be read
    found = package.compare([made / "x", made / "y"], other, folder=made / "c", **options)
    fresh = package.compare([made / "x", made / "y"], other, folder=made / "d", **options)
    assert found.to_dict() == fresh.to_dict()


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_scores_of_a_model_that_was_changed_since_are_not_taken(made, model, text, changed):
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    recipe |= {"evaluate": {"text": str(text), "windows": 2, "length": 64}}
    out = made / "scored"
    package.apply(recipe, model, output=out, check=False, gate=False)
    if changed == "config.json":
        config = json.loads((out / changed).read_text())
        (out / changed).write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    else:
        edit_tensors(out, lambda tensors: tensors.update({name: 3 * each for name, each in tensors.items()}))
    models = [out, made / "merged"]
    found = package.compare(models, model, folder=made / "c", text=str(text), only=["loss-512"])
    assert found.taken[str(out)] == []
    why = f"scored: nothing is taken from its surgery.json, since its folder is not as that describes it: {changed} is"
    assert why in str(found)
    alone = package.evaluate(out, model, text=str(text), windows=2, length=64)
    assert found.to_dict()["rows"][1]["loss 512"] == alone["out"]["cross_entropy"]


@pytest.mark.parametrize("fact", [{"surgery": "0.0.1"}, {"device": "cuda"}, {"dtype": "bfloat16"}, None])
def test_scores_of_another_version_or_device_are_not_taken(scored, made, model, text, fact):
    evaluation = json.loads((scored / "surgery.json").read_text())["evaluation"]
    known = evaluation.pop("scored_in")
    assert known == {"surgery": package.__version__, "device": "cpu", "dtype": "auto"}
    edit_record(scored, evaluation=evaluation | ({"scored_in": known | fact} if fact else {}))
    found = package.compare([scored, made / "merged"], model, folder=made / "c", text=str(text), only=["loss-512"])
    assert found.taken[str(scored)] == []


@pytest.fixture
def scored(made, model, text):
    """A conversion with the scores that `compare` asks for, and a generation config."""
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    recipe |= {"evaluate": {"text": str(text), "windows": 2, "length": 64}}
    package.apply(recipe, model, output=made / "scored", check=False, gate=False)
    return made / "scored"


def linked(folder):
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.json")]:
        target = folder.parent / f"blob-{file.name}"
        file.rename(target)
        file.symlink_to(target)


def saved_again(folder):
    from transformers import AutoModelForCausalLM

    before = (folder / "config.json").read_bytes()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "config.json").read_bytes() != before


def with_other_files(folder):
    names = "model.gguf", "checkpoint-3/model.safetensors", "runs/x.pt", "scheduler.bin", "consolidated.safetensors"
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of a trainer")


@pytest.mark.parametrize("change", [linked, saved_again, with_other_files])
def test_scores_are_taken_where_the_model_is_the_same(scored, made, model, text, change):
    change(scored)
    found = package.compare([scored, made / "merged"], model, folder=made / "c", text=str(text), only=["loss-512"])
    assert found.taken[str(scored)] == ["loss-512"]
    assert "nothing is taken" not in str(found)


@pytest.mark.parametrize("name", ["generation_config.json", "adapter_model.safetensors"])
def test_scores_are_not_taken_where_a_file_was_added_that_is_loaded(scored, made, model, text, name):
    (scored / "generation_config.json").unlink(missing_ok=True)
    files = json.loads((scored / "surgery.json").read_text())["other_files"]
    files.pop("generation_config.json", None)
    edit_record(scored, other_files=files)
    (scored / name).write_text('{"repetition_penalty": 9.0}')
    found = package.compare([scored, made / "merged"], model, folder=made / "c", text=str(text), only=["loss-512"])
    assert found.taken[str(scored)] == []
    assert f"{name} was added" in str(found)


def test_weights_are_read_once(scored, made, model, text, monkeypatch):
    from surgery.io.files import sha256

    read = []
    monkeypatch.setattr(running, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    package.compare([scored, made / "merged"], model, folder=made / "c", text=str(text), only=["loss-512"])
    assert read.count("model.safetensors") == 2, "once for each model"


def test_scores_beside_an_intermediate_model_are_not_taken(made, model, text):
    evaluate = {"text": str(text), "windows": 2, "length": 64}
    twice = {"version": 1, "name": "r", "operations": [{"op": "head_mask", "values": {0: {0: 0.5}}}]}
    package.apply(twice | {"evaluate": evaluate}, made / "merged", output=made / "twice", check=False, gate=False)
    found = package.compare(
        [made / "twice", made / "short"], model, folder=made / "c", text=str(text), only=["loss-512"]
    )
    assert found.taken[str(made / "twice")] == []
    alone = package.evaluate(made / "twice", model, text=str(text), windows=2, length=64)
    assert found.to_dict()["records"][str(made / "twice")]["loss-512"]["kl"]["mean"] == alone.kl["mean"]


def test_scores_on_another_text_of_the_same_name_are_not_taken(made, model, text, tmp_path):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / text.name
    other.write_text(" ".join(reversed(text.read_text().split())))
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    recipe |= {"evaluate": {"text": str(text), "windows": 2, "length": 64}}
    package.apply(recipe, model, output=made / "scored", check=False, gate=False)
    models = [made / "scored", made / "merged"]
    found = package.compare(models, model, folder=made / "c", text=str(other), only=["loss-512"])
    assert found.taken[str(made / "scored")] == []
    mine, same = found.to_dict()["rows"][1:]
    assert mine["loss 512"] == same["loss 512"]


def test_other_settings_of_a_measurement_are_measured(made, model, text, monkeypatch):
    from dataclasses import replace

    models = [made / "merged", made / "short"]
    options = {"folder": made / "c", "text": str(text), "only": ["loss-512"]}
    first = package.compare(models, model, **options).to_dict()["rows"]
    more = tuple(
        replace(m, settings=(("windows", 3), ("length", 80))) for m in measures.MEASURES if m.name == "loss-512"
    )
    monkeypatch.setattr(measures, "MEASURES", more)
    assert package.compare(models, model, **options).to_dict()["rows"] != first


def test_files_that_were_damaged(made, model, text, surgery):
    models = [made / "merged", made / "short"]
    args = ("compare", *models, "--base", model, "-o", "c", "--only", "loss-512", "--text", text)
    assert surgery(*args).code == 0
    (kept,) = (made / "c/base-runs").iterdir()
    (kept / "base.json").write_text("{")
    (made / "c/compare.json").unlink()
    assert surgery(*args).code == 0
    (kept / "1.safetensors").unlink()
    (made / "c/compare.json").unlink()
    assert surgery(*args).code == 0
    for content in ("[]", "5", "{}", '{"models": {"x": {}}}', '{"models": 3}'):
        (made / "c/compare.json").write_text(content)
        ran = surgery(*args)
        assert (ran.code, "these figures cannot be read" in ran.err) == (2, True), content
    (made / "file").write_text("")
    ran = surgery("compare", *models, "--base", model, "-o", "file")
    assert (ran.code, "a folder is needed" in ran.err) == (2, True)
    (made / "d/compare.json").mkdir(parents=True)
    (made / "e").mkdir()
    (made / "e/base-runs").write_text("")
    for folder, words in (
        ("d", "this is no file"),
        ("e", "this is no folder"),
        ("merged", "this folder holds a model"),
    ):
        ran = surgery("compare", *models, "--base", model, "-o", folder)
        assert (ran.code, words in ran.err, "Traceback" in ran.err) == (2, True, False), ran.err


def test_a_page_may_lie_in_the_folder_that_the_command_makes(surgery, refused, made, model):
    asked = ("compare", made / "merged", made / "short", "--base", model, "--only", "cache")
    done = surgery(*asked, "-o", "new", "--html", "new/page.html")
    assert done.code == 0, done.err
    assert "<title>" in (made / "new/page.html").read_text(encoding="utf-8")
    refused(*asked, "-o", "x.html", "--html", "x.html", says=["x.html: cannot write the page: this is a folder"])
    refused(*asked, "-o", "new", "--html", "new/compare.json", says=["the name of the page ends in .html or .htm"])
    refused(*asked, "--html", f"{'n' * 300}.html", says=["cannot write the page: File name too long"])
    assert surgery(*asked, "--html", f"{'n' * 240}.html").code == 0


def test_figures_of_an_edited_record_are_not_taken(made, model, text):
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    recipe |= {"evaluate": {"text": str(text), "windows": 2, "length": 64}}
    package.apply(recipe, model, output=made / "scored", check=False, gate=False)
    file = made / "scored/surgery.json"
    data = json.loads(file.read_text())
    true, data["evaluation"]["out"]["cross_entropy"] = data["evaluation"]["out"]["cross_entropy"], 0.123
    file.write_text(json.dumps(data))
    models = [made / "scored", made / "merged"]
    found = package.compare(models, model, folder=made / "c", text=str(text), only=["loss-512"])
    assert found.to_dict()["rows"][1]["loss 512"] == true
    assert found.taken[str(made / "scored")] == []
    assert "scored: surgery.json was edited after surgery wrote it" in str(found)


def test_what_is_cut_for_a_short_model_is_said(made, model, text, monkeypatch):
    """Titles name the lengths that are asked for; a model of 1,024 positions gets shorter ones."""
    loss = measures._loss(2048, 1)
    monkeypatch.setattr(measures, "MEASURES", (loss,))
    many = made / "many.txt"
    many.write_text(" ".join([text.read_text()] * 12))
    models = [made / "merged", made / "short"]
    found = package.compare(models, model, folder=made / "c", text=str(many), only=["loss-2048"])
    assert "loss on windows of 2,048 tokens: length 1,024 instead, since the base takes no more" in found.all_notes
    alone = package.evaluate(made / "merged", model, text=str(many), windows=1, length=1024)
    assert found.to_dict()["rows"][1]["loss 2,048"] == alone["out"]["cross_entropy"]


def test_python_is_told_what_is_wrong(made, model):
    for values, says in (("merged", "a list of names"), (5, "a list of names"), ([None, None], "NoneType")):
        with pytest.raises(SurgeryError, match=says):
            package.compare(values, model)
    with pytest.raises(SurgeryError, match="only is 'cache'"):
        package.compare([made / "merged", made / "short"], model, only="cache")
    with pytest.raises(SurgeryError, match="may not be called"):
        package.compare(["the base", made / "short"], model)
    with pytest.raises(SurgeryError, match="settings is"):
        package.sweep("gqa", model, "kv_heads=1,3")


def test_speed_is_beside_the_base(made, model, text, monkeypatch):
    monkeypatch.setattr(running, "PROMPT", 64)
    monkeypatch.setattr(running, "ROUNDS", 1)
    models = [made / "merged", made / "short"]
    found = package.compare(models, model, folder=made / "c", text=str(text), only=["speed"])
    for row in found.to_dict()["rows"]:
        assert row["prompt"] > 0
        assert row["decode"] > 0
    base, merged, short = found.to_dict()["rows"]
    assert base == {"model": "the base", "name": "the base", "prompt": 1.0, "decode": 1.0, "own": None}
    assert merged["own"] is None, "it decodes from the stock cache"
    assert short["own"] > 0
    assert f"torch {torch.__version__}" in found.records[str(models[0])]["speed"]["machine"]


def test_the_command_prints_draws_and_says_json(surgery, made, model, text):
    args = ("compare", made / "merged", made / "short", "--base", model, "-o", "c", "--text", text)
    ran = surgery(*args, "--only", "loss-2048,cache")
    assert ran.code == 0, ran.err
    assert "KV/token" in ran.out
    assert (made / "c/compare.png").stat().st_size > 5000
    data = surgery(*args, "--only", "loss-2048,cache", "--json").json
    assert [row["model"] for row in data["rows"]] == ["the base", str(made / "merged"), str(made / "short")]
    kept = json.loads((made / "c/compare.json").read_text())
    assert kept["comparison"]["rows"] == data["rows"]


def test_a_cell_of_a_measurement_that_was_not_run_is_empty():
    column = Column("x", "", lambda record, side: record[side], "{:.2f}", lambda record, side: 7)
    assert column.cell({"status": "done", "out": 1.0}, "out") == "1.00/7"
    assert column.cell({"status": "not run"}, "out") == column.cell(None, "out") == ""
    assert column.cell({"status": "done", "out": None}, "out") == ""


# --- what is refused ------------------------------------------------------------------------------------------------


def test_one_model_or_the_same_twice(refused, made, model):
    says = ["1 model to compare", "name two or more", "surgery eval"]
    refused("compare", made / "merged", "--base", model, says=says)
    refused("compare", "merged", made / "merged", "--base", model, says=["is named twice"])


def test_models_of_another_base_or_tokenizer_all_at_once(refused, made, model, tmp_path):
    import torch

    from surgery.io.loading import load_model

    torch.manual_seed(1)
    stranger = shutil.copytree(model, tmp_path / "stranger")
    changed = load_model(model)
    torch.nn.init.normal_(changed.model.embed_tokens.weight)
    changed.save_pretrained(stranger)
    package.apply("gqa", stranger, output=made / "other", check=False, evaluate=False, method="mean")
    speaks = shutil.copytree(model, tmp_path / "speaks")
    core = json.loads((speaks / "tokenizer.json").read_text())
    words = core["model"]["vocab"]
    words["the"], words["cat"] = words["cat"], words["the"]
    (speaks / "tokenizer.json").write_text(json.dumps(core))
    says = ["other is of another base", "speaks has another tokenizer", "compare models of one base"]
    refused("compare", made / "merged", made / "other", speaks, "--base", model, says=says)


def test_no_base_is_known(refused, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    refused("compare", model, copy, says=["no base is named", "--base MODEL"])


def test_a_measurement_that_is_not(refused, made, model):
    says = ["there is no measurement 'loss-513'", "choices", "did you mean 'loss-512'?"]
    refused("compare", made / "merged", made / "short", "--base", model, "--only", "loss-513", says=says)
    everything = ",".join(m.name for m in MEASURES)
    refused(
        "compare", made / "merged", made / "short", "--base", model, "--without", everything,
        says=["no measurement is left"],
    )  # fmt: skip
    assert [m.name for m in chosen(leave_out=["speed"])] == [m.name for m in MEASURES][:-1]


def test_a_folder_of_another_comparison(made, model, text, surgery):
    models = [made / "merged", made / "short"]
    package.compare(models, model, folder=made / "c", text=str(text), only=["loss-512"])
    ran = surgery("compare", *models, "--base", model, "-o", "c", "--only", "loss-512")
    assert ran.code == 2
    assert "another base, on another text, in another dtype or on another kind of device" in ran.err
    (made / "c/compare.json").write_text("{")
    ran = surgery("compare", *models, "--base", model, "-o", "c", "--only", "loss-512", "--text", text)
    assert ran.code == 2
    assert "these figures cannot be read" in ran.err


def test_a_model_without_a_record_is_noted(made, model, text):
    copy = shutil.copytree(model, made / "copy")
    found = package.compare([made / "merged", copy], model, folder=made / "c", text=str(text), only=["cache"])
    assert any("copy has no surgery.json" in note for note in found.notes)
    assert not any("merged" in note for note in found.notes)


# --- sweeps ---------------------------------------------------------------------------------------------------------


def test_values_are_split_outside_of_brackets():
    assert split("1,2, 3") == ["1", "2", "3"]
    assert split("[0, 1],[2]") == ["[0, 1]", "[2]"]
    assert split("{a: 1, b: 2}") == ["{a: 1, b: 2}"]
    tries = combinations(["kv_heads=1,3", "method=mean", "keep_layers=[0],[1]"])
    assert list(tries) == [
        "kv_heads=1 keep_layers=[0]", "kv_heads=1 keep_layers=[1]",
        "kv_heads=3 keep_layers=[0]", "kv_heads=3 keep_layers=[1]",
    ]  # fmt: skip
    assert tries["kv_heads=3 keep_layers=[1]"] == ["kv_heads=3", "method=mean", "keep_layers=[1]"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["kv_heads=1"], "no setting has two values"),
        (["kv_heads"], "is not of the form key=value,value"),
        (["kv_heads=1,"], "is not of the form key=value,value"),
        (["kv_heads=1,1"], "a value of kv_heads is given twice"),
        (["kv_heads=1,01"], "a value of kv_heads is given twice"),
        (["layers=[1,3"], "is not of the form key=value,value"),
        (["kv_heads=1,2", "kv_heads=3"], "kv_heads is given twice"),
    ],
)
def test_a_sweep_is_refused(settings, says):
    with pytest.raises(SurgeryError, match=says):
        combinations(settings)


def test_a_sweep_is_what_apply_and_compare_say(surgery, model, text, tmp_path):
    ran = surgery(
        "sweep", "streaming", model, "window=3,9", "sinks=1", "-o", "s", "--text", text, "--only", "loss-512,cache",
        "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = {row.pop("model"): row for row in ran.json["rows"]}
    assert list(rows) == ["the base", "window=3", "window=9"]
    for window in (3, 9):
        out = tmp_path / f"w{window}"
        package.apply("streaming", model, output=out, check=False, evaluate=False, window=window, sinks=1)
        alone = package.evaluate(out, model, text=str(text), windows=2, length=64)
        assert rows[f"window={window}"]["loss 512"] == alone["out"]["cross_entropy"]
        assert rows[f"window={window}"]["KV at 8k"] == rows["the base"]["KV/token"] * (window + 1) / 2**20
    assert sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir()) == ["base-runs"], "no weights"


def test_a_sweep_with_more_values_measures_those_alone(surgery, model, text, monkeypatch):
    from surgery.search import sweep

    args = ("sweep", "streaming", model, "sinks=1", "-o", "s", "--text", text, "--only", "loss-512")
    ran = surgery(*args, "window=3,9")
    assert "The same command with more values measures those alone." in ran.out
    converted, convert = [], sweep.convert_only
    monkeypatch.setattr(sweep, "convert_only", lambda *rest: (converted.append(rest[0]), convert(*rest))[1])
    more = surgery(*args, "window=3,9,12", "--json").json
    assert [each.operations[0].window for each in converted] == [12]
    assert [row["model"] for row in more["rows"]] == ["the base", "window=3", "window=9", "window=12"]


def killed(folder):
    """What a try leaves whose process is killed while it converts."""
    from surgery.io.output_folder import OutputFolder

    folder.mkdir()
    if not (process := os.fork()):
        try:
            with OutputFolder(folder / "out", None, "x").opened(1):
                (folder / "out.partial" / "model.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(process, 0)
    assert sorted(each.name for each in folder.iterdir()) == [".out.lock", "out.partial"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed in the middle")
def test_a_sweep_removes_nothing_of_the_user(model, text, tmp_path):
    for name in ("weights", "weights-of-last-year"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "mine").write_text("kept")
    killed(tmp_path / "s" / ".surgery-try-abcdefgh")
    mine = {".surgery-try-notes": "out.log", ".surgery-try-12345678": "out", ".surgery-try-abcdefg2": "outputs"}
    for name, file in (mine | {"surgery-sweep-qwen2_7b": "out/mine"}).items():
        (tmp_path / "s" / name / file).parent.mkdir(parents=True)
        (tmp_path / "s" / name / file).write_text("kept")
    options = {"folder": tmp_path / "s", "text": str(text), "only": ["cache"]}
    package.sweep("streaming", model, ["window=3,9", "sinks=1"], **options)
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == [*sorted(mine), "compare.json", "surgery-sweep-qwen2_7b", "weights", "weights-of-last-year"]
    killed(tmp_path / "s" / ".surgery-try-abcdefgh")
    package.sweep("streaming", model, ["window=3,9", "sinks=1"], **options)
    assert not (tmp_path / "s" / ".surgery-try-abcdefgh").exists(), "removed, though every figure is there"


def test_a_sweep_goes_on_and_refuses_before_it_converts(surgery, model, text, tmp_path, monkeypatch):
    args = ("sweep", "streaming", model, "sinks=1", "-o", "s", "--text", text, "--only", "loss-512", "--json")
    first = surgery(*args, "window=3,9").json
    applied = []
    monkeypatch.setattr("surgery.search.sweep.convert_only", lambda *rest: applied.append(rest))
    assert surgery(*args, "window=3,9").json["rows"] == first["rows"]
    assert not applied
    ran = surgery("sweep", "gqa", model, "kv_heads=1,2", "-o", "t", "--text", text)
    assert ran.code == 2
    assert "kv_heads" in ran.err or "KV heads" in ran.err
    assert not applied
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"version": 1}))
    assert surgery("sweep", "r.yaml", model, "kv_heads=1,3").code == 2
