"""What a recipe judges a checkpoint on: the probes that it asks for, compared with the base, and the gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError
from surgery.evaluation.probes.base import UNASKED, Probe, Progress

if TYPE_CHECKING:
    from surgery.config.recipe import Evaluate
    from surgery.report.report import Report


def refuse_unscorable(base: Path, settings: Evaluate) -> None:
    """Raise before anything is written what the evaluation would raise when all is done."""
    settings.main.refuse(base)


def evaluate_report(
    report: Report, base: Path, settings: Evaluate, progress: Progress | None = None, allow_pickle: bool = False
) -> None:
    """Measure the report's folder as its recipe asks, keep the figures, and compare them with the gate's limits."""
    main, *others = sorted(settings.asked, key=lambda probe: not probe.main)
    result = main.measure(report.folder, base, allow_pickle=allow_pickle, progress=progress).to_dict()
    if result["status"] == "done":
        result |= {probe.name: _measure(probe, report, base, progress) for probe in others}
    report.record_evaluation(result)


def _measure(probe: Probe, report: Report, base: Path, progress: Progress | None) -> dict:
    """What became of a probe; that tokenizer or text cannot make its cases is no fault of the checkpoint."""
    if reason := probe.unasked(base):
        return {"status": UNASKED, "reason": reason}
    try:
        result = probe.measure(report.folder, base, progress=progress).to_dict()
    except SurgeryError as error:
        return {"status": "not run", "reason": error.what}
    return {key: value for key, value in result.items() if key != "cases"}
