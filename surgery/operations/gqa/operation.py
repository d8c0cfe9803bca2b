"""The operation `gqa`: its methods, one line each."""

from __future__ import annotations

from surgery.operations.gqa.base import GQA
from surgery.operations.gqa.closed_form_method import ClosedForm
from surgery.operations.gqa.merge_methods import First, Mean, Random

METHODS = GQA.union(
    ClosedForm,
    Mean,
    First,
    Random,
)
