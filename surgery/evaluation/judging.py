"""What a recipe judges a finished checkpoint on: its score beside the base's, needles where asked for, the gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SurgeryError

if TYPE_CHECKING:
    from ..recipe import Evaluate
    from ..report import Report

DEPTHS = (0.1, 0.25, 0.4, 0.55)  # far from the question, where a head split could lose a needle


def refuse_unscorable(base: Path, settings: Evaluate) -> None:
    """Raise before anything is written what the evaluation would raise when all is done."""
    from .perplexity import tokens_to_score

    tokens_to_score({"base": base}, settings.text, settings.windows, settings.length)


def judge(report: Report, base: Path, settings: Evaluate, progress=None, allow_pickle: bool = False) -> None:
    """Measure the report's folder as its recipe asks, keep the figures, and hold them against the gate."""
    from .perplexity import evaluate

    result = evaluate(
        report.folder,
        base,
        text=settings.text,
        windows=settings.windows,
        length=settings.length,
        allow_pickle=allow_pickle,
        progress=progress,
    ).to_dict()
    if settings.needles and result["status"] == "done":
        result["needles"] = _needles(report.folder, base, settings, progress)
    report.record_evaluation(result)


def _needles(out: Path, base: Path, settings: Evaluate, progress) -> dict:
    """What became of the needles; that a tokenizer or a text cannot make them is no fault of the checkpoint."""
    from .needles import evaluate_needles

    samples, grid = -(-settings.needles // len(DEPTHS)), {"lengths": (settings.needle_length,), "depths": DEPTHS}

    def tick(done: int, total: int, label: str) -> None:
        if progress:
            progress(done, total, "needles")

    try:
        result = evaluate_needles(out, base, text=settings.text, samples=samples, progress=tick, **grid).to_dict()
    except SurgeryError as error:
        return {"status": "not run", "reason": error.what}
    return {key: value for key, value in result.items() if key != "cases"}
