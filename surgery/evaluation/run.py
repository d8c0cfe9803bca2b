"""What a recipe judges a checkpoint on: its score beside the base's, needles, choices, and the gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.config.recipe import Evaluate
    from surgery.report.report import Report

DEPTHS = (0.1, 0.25, 0.4, 0.55)  # far from the question, where a head split could lose a needle


def refuse_unscorable(base: Path, settings: Evaluate) -> None:
    """Raise before anything is written what the evaluation would raise when all is done."""
    from surgery.evaluation.perplexity import tokens_to_score

    tokens_to_score({"base": base}, settings.text, settings.windows, settings.length)


def evaluate_report(report: Report, base: Path, settings: Evaluate, progress=None, allow_pickle: bool = False) -> None:
    """Measure the report's folder as its recipe asks, keep the figures, and hold them against the gate."""
    from surgery.evaluation.perplexity import evaluate

    result = evaluate(
        report.folder,
        base,
        text=settings.text,
        windows=settings.windows,
        length=settings.length,
        allow_pickle=allow_pickle,
        progress=progress,
    ).to_dict()
    if result["status"] == "done":
        if settings.needles:
            from surgery.evaluation.needles import evaluate_needles

            samples = -(-settings.needles // len(DEPTHS))
            drawn = {"samples": samples, "lengths": (settings.needle_length,), "depths": DEPTHS}
            result["needles"] = _asked("needles", evaluate_needles, report, base, settings, progress, drawn)
        if settings.choices:
            from surgery.evaluation.multiple_choice import evaluate_choices

            drawn = {"items": settings.choices}
            result["choices"] = _asked("choices", evaluate_choices, report, base, settings, progress, drawn)
    report.record_evaluation(result)


def _asked(kind: str, ask: Callable, report: Report, base: Path, settings: Evaluate, progress, drawn: dict) -> dict:
    """What became of needles or choices; that tokenizer or text cannot make them is no fault of the checkpoint."""

    def tick(done: int, total: int, label: str) -> None:
        if progress:
            progress(done, total, kind)

    try:
        result = ask(report.folder, base, text=settings.text, progress=tick, **drawn).to_dict()
    except SurgeryError as error:
        return {"status": "not run", "reason": error.what}
    return {key: value for key, value in result.items() if key != "cases"}
