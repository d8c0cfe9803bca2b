"""What a base answered is found again by a later process, exactly, and by nobody else."""

from __future__ import annotations

import math

import pytest

from surgery.calibration.scoring import Chosen
from surgery.data.haystack import Needle
from surgery.evaluation import base_runs
from surgery.evaluation.base_runs import BaseRuns
from surgery.evaluation.probes.order import Preference
from surgery.evaluation.probes.settings import make
from surgery.evaluation.recall import Outcome, Recitation

CASES = [Needle(512, 0.5, 0, 0, secret, (1, 2, 3), (token,), (0, 2), 2) for token, secret in enumerate("ab")]
THIRD = 1 / 3  # no decimal fraction
OUTCOMES = [
    (Outcome, [Outcome(True, THIRD), Outcome(False, math.inf)]),
    (Recitation, [Recitation(False, THIRD, 3, 2 * THIRD, 0), Recitation(True, 0.0, 7, 1e-300, 7)]),
    (Preference, [Preference((THIRD, -THIRD), 2.0), Preference((-1.5, 1e-9), THIRD)]),
    (Chosen, [Chosen(True, THIRD, (-THIRD, -2.5)), Chosen(False, 2.0, (-math.inf, -1e-9))]),
]


@pytest.mark.parametrize(("kind", "outcomes"), OUTCOMES, ids=lambda value: getattr(value, "__name__", ""))
def test_outcomes_are_found_again_exactly(kind, outcomes, tmp_path):
    BaseRuns(tmp_path / "base", "one").keep_answers("needles {}", CASES, kind, outcomes)
    assert BaseRuns(tmp_path / "base", "one").answers("needles {}", CASES, kind) == outcomes


def test_a_nan_is_found_again_as_a_nan(tmp_path):
    runs = BaseRuns(tmp_path, "one")
    runs.keep_answers("needles {}", CASES, Outcome, [Outcome(False, math.nan), Outcome(True, 1.0)])
    first, second = runs.answers("needles {}", CASES, Outcome)
    assert math.isnan(first.nll)
    assert second == Outcome(True, 1.0)


def test_others_are_not_found(tmp_path, monkeypatch):
    """Another base, other settings, other cases, another version of the package."""
    runs, outcomes = BaseRuns(tmp_path, "one"), [Outcome(True, 1.0), Outcome(False, 2.0)]
    runs.keep_answers("needles {}", CASES, Outcome, outcomes)
    assert BaseRuns(tmp_path, "two").answers("needles {}", CASES, Outcome) is None
    assert runs.answers('needles {"late": true}', CASES, Outcome) is None
    assert runs.answers("needles {}", CASES[::-1], Outcome) is None
    assert runs.answers("needles {}", CASES, Outcome) == outcomes
    monkeypatch.setattr(base_runs, "__version__", "0.0.0")
    assert runs.answers("needles {}", CASES, Outcome) is None


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_window_is_scored_again(damage, tiny, tmp_path):
    """Cut short by a full disk, for example: as where the base has not scored all windows."""
    text = tmp_path / "words.txt"
    text.write_text("the cat sat on the old green door and the dog slept . " * 40)
    probe, runs = make("perplexity", {"text": str(text), "windows": 2, "length": 16}), BaseRuns(tmp_path / "b", "one")
    first = probe.measure(tiny, tiny, shared=runs).to_dict()
    file = next((tmp_path / "b").glob("*/1.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert probe.measure(tiny, tiny, shared=runs).to_dict() == first
    assert file.read_bytes() == whole
    assert not list(file.parent.glob("*.unfinished"))


@pytest.mark.parametrize("content", ["", "[", "{}", '[{"hit": true}]', '[{"hit": true, "nll": 1.0}]'])
def test_a_damaged_file_is_no_answer(content, tmp_path):
    runs = BaseRuns(tmp_path, "one")
    runs.keep_answers("needles {}", CASES, Outcome, [Outcome(True, 1.0), Outcome(False, 2.0)])
    (file,) = tmp_path.glob("*.json")
    file.write_text(content)
    assert runs.answers("needles {}", CASES, Outcome) is None


def test_what_is_not_kept_leaves_no_file(tmp_path):
    runs = BaseRuns(tmp_path, "one")
    runs.keep_answers("chat {}", CASES, None, [Outcome(True, 1.0), Outcome(False, 2.0)])
    assert runs.answers("chat {}", CASES, None) is None
    assert not list(tmp_path.iterdir())


def test_every_kind_of_outcome_is_one_that_was_tried():
    """A new probe whose outcomes are kept joins the round trips above."""
    from surgery.evaluation.probes import every

    kinds = {probe.outcome for probe in every() if getattr(probe, "outcome", None)}
    assert kinds == {kind for kind, _ in OUTCOMES}
