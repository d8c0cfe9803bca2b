"""Needles and choices that a recipe asks for: run, recorded, on the card, in the gate; said where they cannot be."""

import json

import pytest

from surgery.calibration.scoring import Chosen
from surgery.data.haystack import Needle
from surgery.data.questions import Choice
from surgery.evaluation import run as judging
from surgery.evaluation.probes.choices import ChoiceResult
from surgery.evaluation.probes.needles import NeedleResult, Needles
from surgery.evaluation.probes.perplexity import Perplexity
from surgery.evaluation.recall import Outcome
from surgery.report.card import render_card
from surgery.report.gate import gate

DONE = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}, "kl": {"mean": 0.0}}


def result(base_hits: list[bool], out_hits: list[bool]) -> NeedleResult:
    needle = Needle(64, 0.5, 0, 0, "1", (1,) * 60, (2,), (10, 20), 50)
    settings = {"lengths": [64], "depths": [0.5], "samples": 1, "seed": 0, "secret": "digits", "form": "plain"}
    outcomes = {name: [Outcome(hit, 0.5) for hit in hits] for name, hits in (("base", base_hits), ("out", out_hits))}
    text = {"title": "a text", "sha256": "0"}
    return NeedleResult("done", settings | {"text": text, "chance": 1e-5}, [needle] * len(base_hits), outcomes)


@pytest.mark.parametrize(
    ("base", "out", "status"),
    [
        ([True, True, False], [True, True, False], "passed"),
        ([True, True, True, True], [True, True, True, False], "failed"),
        ([False, False], [True, False], "not run"),
    ],
)
def test_the_gate_holds_the_share_that_is_kept(base, out, status):
    facts = DONE | {"needles": result(base, out).to_dict()}
    assert gate(facts, {"min_needles": 0.8})[0] == status
    assert gate(DONE, {"min_needles": 0.8}) == ("not run", ["min_needles: it was not asked for"])


def chosen(base_right: list[bool], out_right: list[bool]) -> dict:
    items = [Choice((1,), ((2,), (3,), (4,), (5,)), 0)] * len(base_right)
    told = {
        name: [Chosen(right, 0.5, (-1.0,) * 4) for right in row]
        for name, row in (("base", base_right), ("out", out_right))
    }
    return ChoiceResult("done", {"text": {"title": "a text", "sha256": "0"}}, items, told).to_dict()


def test_the_gate_holds_right_answers_over_the_bases():
    facts = DONE | {"choices": chosen([True] * 4 + [False], [False] + [True] * 2 + [False] * 2)}
    assert gate(facts, {"min_choices": 0.5})[0] == "passed"
    assert gate(facts, {"min_choices": 0.51}) == ("failed", ["min_choices: 0.5, the limit is 0.51"])
    assert gate(DONE, {"min_choices": 0.5}) == ("not run", ["min_choices: the base has no question right"])
    assert gate(DONE | {"choices": chosen([False], [True])}, {"min_choices": 0.5})[0] == "not run"
    guessed = DONE | {"choices": chosen([True] * 14 + [False] * 36, [True] * 15 + [False] * 35)}
    status, (reason,) = gate(guessed, {"min_choices": 0.9})
    assert status == "not run"
    assert reason.startswith("min_choices: the base answers no more than a guess does (14 of 50, 95% interval from 17")
    card = render_card({"evaluation": facts}, None)
    assert "guessing gets 25%" in card
    assert "the base has 4 of 5 (37.6% to 96.4%) right, the converted model 2 of 5 (" in card
    assert "2 questions the base alone has right, 0 the converted model alone" in card
    facts["choices"] = {"status": "not run", "reason": "the text is too short"}
    assert "Multiple choice was **not run**: the text is too short." in render_card({"evaluation": facts}, None)
    assert gate(facts, {"min_choices": 0.5}) == ("not run", ["min_choices: the text is too short"])


def test_choices_of_a_recipe(surgery, model, text):
    (model.parent / "long.txt").write_text(text.read_text() * 3)
    scored = ["evaluate.text=long.txt", "evaluate.windows=1", "evaluate.length=64", "evaluate.choices=6"]
    ran = surgery("apply", "mqa", model, "-o", "out", "--no-check", *scored, "evaluate.min_choices=0")
    assert ran.code in (0, 3), ran.err
    data = json.loads((model.parent / "out" / "surgery.json").read_text())
    assert data["evaluation"]["choices"]["base"]["of"] == 6
    assert "cases" not in data["evaluation"]["choices"]
    assert data["gate"]["limits"]["min_choices"] == 0
    assert "Multiple choice" in (model.parent / "out" / "README.md").read_text()
    assert "choices right" in ran.out


def test_the_card_says_it():
    facts = DONE | {"needles": result([True] * 4 + [False], [True] * 3 + [False] * 2).to_dict()}
    card = render_card({"evaluation": facts}, None)
    assert "the base finds 4 of 5, the converted model 3 of 5. Of those that the base finds, it keeps 3 of 4" in card
    facts["needles"] = {"status": "not run", "reason": "the tokenizer cannot write it"}
    assert "**not run**: the tokenizer cannot write it." in render_card({"evaluation": facts}, None)


def test_a_tokenizer_that_cannot_write_the_secret_leaves_the_gate_not_run(surgery, model):
    settings = ["streaming_ratio=0.5", "sinks=1", "window=4", "calibration_length=200", "calibration_samples=1"]
    scored = ["evaluate.windows=1", "evaluate.length=64", "evaluate.max_perplexity_ratio=9"]
    ran = surgery("apply", "duo-attention", model, "-o", "out", *settings, *scored)
    assert ran.code == 0, ran.err
    data = json.loads((model.parent / "out" / "surgery.json").read_text())
    assert data["evaluation"]["needles"]["status"] == "not run"
    assert "tokenizer cannot write" in data["evaluation"]["needles"]["reason"]
    assert data["gate"]["status"] == "not run"


def test_needles_are_asked_as_the_recipe_says_and_kept_without_the_cases(monkeypatch, tmp_path):
    from surgery.config.recipe import Evaluate

    asked, drawn = {}, {}

    def needles(probe, out, base, **given):
        asked.update(probe.model_dump())
        drawn.update(lengths=probe.tokens, depths=probe.depth_shares, samples=probe.repetitions)
        return result([True], [True])

    class Kept:
        folder = tmp_path

        def record_evaluation(self, facts):
            self.facts = facts

    class Scored:
        status = "done"

        def __init__(self):
            self.probes = {}

        def to_dict(self):
            return DONE | self.probes

    monkeypatch.setattr(Needles, "measure", needles)
    monkeypatch.setattr(Perplexity, "measure", lambda *_, **__: Scored())
    report = Kept()
    judging.evaluate_report(report, tmp_path, Evaluate(needles=10, needle_length=512))
    assert (asked["cases"], asked["length"], asked["text"]) == (10, 512, "builtin")
    assert drawn == {"lengths": (512,), "depths": (0.1, 0.25, 0.4, 0.55), "samples": 3}
    assert report.facts["needles"]["kept"]["of"] == 1
    assert "cases" not in report.facts["needles"]
    judging.evaluate_report(report, tmp_path, Evaluate())
    assert "needles" not in report.facts


def test_a_recipe_file_may_not_name_scores_elsewhere(refused, model):
    step = "{op: duo_attention, scores: ../x.json}"
    (model.parent / "r.yaml").write_text(f"version: 1\nname: r\noperations:\n  - {step}\n")
    refused("plan", "r.yaml", model, says=["r.yaml:4", "scores of a recipe file may not be absolute or hold .."])
