"""The comparison of an engine's log-probabilities with Transformers', on made-up figures."""

from __future__ import annotations

import math

import pytest
import torch

from surgery.engines.base import EngineAnswers
from surgery.engines.proof import compare

# Probabilities of three tokens at two positions; the second has a near tie of tokens 0 and 1.
ROWS = torch.tensor([[0.7, 0.2, 0.1], [0.4001, 0.4, 0.1999]], dtype=torch.float64).log()


def answered(
    changes: dict | None = None, order: tuple = ((0, 1, 2), (0, 1, 2)), text: tuple = (5, 6)
) -> EngineAnswers:
    values = {(row, token): float(ROWS[row, token]) for row in range(2) for token in range(3)} | (changes or {})
    best = [[(token, values[row, token]) for token in order[row]] for row in range(2)]
    return EngineAnswers([row[0][0] for row in best], best, list(text))


def agreement(**options):
    return compare(ROWS, answered(**options), [5, 6])


def test_the_same_figures_agree():
    found = agreement()
    assert found.faults(exact=True) == []
    assert (found.tokens, found.compared, found.same_best, found.near_ties) == (2, 6, 2, 0)
    assert found.largest_difference == 0


@pytest.mark.parametrize(("shift", "faulty"), [(0.0009, False), (-0.0011, True), (0.0011, True)])
def test_the_largest_difference_is_judged_for_exact_weights_alone(shift, faulty):
    found = agreement(changes={(1, 2): float(ROWS[1, 2]) + shift})
    assert found.largest_difference == pytest.approx(abs(shift), rel=1e-9)
    assert bool(found.faults(exact=True)) == faulty
    assert found.faults(exact=False) == []


def test_another_best_token_is_a_fault_unless_the_two_best_are_close():
    tie = agreement(order=((0, 1, 2), (1, 0, 2)))
    assert (tie.same_best, tie.near_ties, tie.faults(exact=True)) == (1, 1, [])
    third = agreement(order=((0, 1, 2), (2, 0, 1)))
    assert (third.same_best, third.near_ties) == (1, 0), "a tie of two others excuses no third token"
    other = agreement(order=((1, 0, 2), (0, 1, 2)))
    assert other.faults(exact=True) == ["another best token at 1 of 2 positions"]
    assert other.faults(exact=False) == []


def test_rounded_weights_with_other_best_tokens_at_most_positions_are_a_fault():
    found = agreement(order=((1, 0, 2), (2, 0, 1)))
    assert found.faults(exact=False) == ["another best token at 2 of 2 positions"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_fault_of_every_type(value):
    found = agreement(changes={(0, 0): value})
    assert found.largest_difference is None
    for exact in (True, False):
        assert found.faults(exact)[0] == "its log-probabilities are not numbers (NaN)"


def test_nan_is_not_forgotten_at_the_next_figure():
    assert agreement(changes={(0, 1): math.nan}).largest_difference is None


def test_no_figure_is_no_agreement():
    assert compare(ROWS, EngineAnswers([0, 0], [[], []], [5, 6]), [5, 6]).faults(exact=True)


def test_a_vocabulary_that_splits_text_otherwise_is_a_fault_of_every_type():
    for exact in (True, False):
        assert "splits a sentence" in agreement(text=(5, 7)).faults(exact)[0]
