"""Evaluates a model as its recipe asks: runs the probes on the model and its base, and compares them with the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from surgery.errors import SettingError, SurgeryError
from surgery.evaluation.probes.base import UNASKED, Probe, Progress
from surgery.evaluation.probes.settings import requested_probes, unknown_items
from surgery.evaluation.result import without_cases
from surgery.io.model_in_memory import weights_version
from surgery.machine.placement import AUTO, conditions, current
from surgery.report.lineage import recipe_probe, same_settings

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.config.recipe import Evaluate
    from surgery.evaluation.figures import Evaluation
    from surgery.evaluation.result import Result
    from surgery.io.loading import ModelSource
    from surgery.report.report import Report

# Loaded model -> what is called with its report's data after each score, such as the trackers of its training.
SCORE_LISTENERS: WeakKeyDictionary[Any, Callable[[dict[str, Any]], None]] = WeakKeyDictionary()


def refuse_unscorable(base: Path, settings: Evaluate, out: Anatomy) -> None:
    """Raise, before anything is written, the errors that the evaluation would raise at the end.

    Args:
        out: of the model that will be scored.
    """
    for probe in settings.asked:
        probe.refuse(base, out)
    refuse_unknown_items(settings.asked, settings.limits)


def refuse_unknown_items(asked: Iterable[Probe], limits: Mapping[str, Any]) -> None:
    """Raise where a limit bounds an item that no probe measures, such as a task that is not run.

    Args:
        asked: the probes that are run.
        limits: name of a limit -> its value.
    """
    faults = [fault for probe in asked for fault in unknown_items(probe, limits, look_up=True)]
    if faults:
        first, *rest = (SettingError(f"{f.where} {f.what}", exists=f.exists, fix=f.fix) for f in faults)
        raise SettingError(first.what, exists=first.exists, fix=first.fix, others=tuple(rest))


def evaluate_report(
    report: Report, base: Path, settings: Evaluate, progress: Progress | None = None, allow_pickle: bool = False
) -> None:
    """Measure the report's folder as its recipe asks, record the figures, and compare them with the gate's limits."""
    options = {"progress": progress, "allow_pickle": allow_pickle}
    report.record_evaluation(_measure_all(settings.asked, cast("Path", report.folder), base, **options).to_dict())


def evaluate_in_memory(
    report: Report,
    model: Any,
    base: ModelSource | None,
    probe: Probe | None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Result:
    """Measure a loaded model, add the figures to its report, and compare them with the gate's limits.

    Args:
        probe: the probe to run; default: all that the report's recipe asks for.

    Raises:
        SurgeryError: there is no base, the settings are not those of the recipe, or another probe runs before the
            main one.
    """
    if base is None:
        fix = "surgery.evaluate(model, base, report=report)"
        raise SurgeryError("a score in a report is compared with the base, and none was given", where="base", fix=fix)
    measured: dict[str, Any] | None = report.data["evaluation"]
    options = {"tokenizer": tokenizer, "progress": progress}
    if probe is None:
        asked = requested_probes(report.data["recipe"].get("evaluate") or {})
        refuse_unknown_items(asked, report.data["gate"]["limits"])
        result: Result = _measure_all(asked, model, base, **options)
        report.record_evaluation(result.to_dict(), conditions(model))
    else:
        _refuse_other_settings(report.data, probe)
        if not probe.main and (measured or {}).get("status") != "done":
            raise SurgeryError(
                f"figures of {probe.name} are added after the perplexity, and this report has no perplexity yet",
                where="report",
                fix="surgery.evaluate(model, base, report=report) first",
            )
        if not probe.main and (report.data.get("in_memory") or {}).get("scored") not in (None, weights_version(model)):
            raise SurgeryError(
                f"the weights were changed after the perplexity was measured, so figures of {probe.name} would be of "
                "another model",
                where="report",
                fix="surgery.evaluate(model, base, report=report) first",
            )
        result = probe.measure(model, base, **options)
        if probe.main:
            report.record_evaluation(result.to_dict(), conditions(model))
        else:
            report.record_probe(probe.name, result.to_dict(), conditions(model))
    if listener := SCORE_LISTENERS.get(model):
        listener(report.data)
    report.data["in_memory"] = (report.data.get("in_memory") or {}) | {"scored": weights_version(model)}
    return result


def _refuse_other_settings(data: dict[str, Any], probe: Probe) -> None:
    """Raise if a probe has other settings than the recipe's, since the gate could not judge its figures."""
    wanted = recipe_probe(data, type(probe))
    if wanted is not None and not same_settings(wanted, probe):
        asked = ", ".join(f"{key}={value!r}" for key, value in wanted.model_dump(exclude_unset=True).items())
        raise SurgeryError(
            f"these are not the settings by which the report's recipe judges ({asked or 'the defaults'})",
            where="report",
            fix="leave the settings out; or leave out report=, and only the result has the figures",
            code="invalid-setting",
        )


def _measure_all(
    asked: Iterable[Probe],
    out: ModelSource,
    base: ModelSource,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    allow_pickle: bool = False,
) -> Evaluation:
    """The result of the main probe, which holds the records of the others."""
    main, *others = sorted(asked, key=lambda probe: not probe.main)
    options: dict[str, Any] = {"tokenizer": tokenizer, "progress": progress, "allow_pickle": allow_pickle}
    result = cast("Evaluation", main.measure(out, base, **options))
    if isinstance(out, str | Path) and (dtype := current().dtype) != AUTO:
        result.notes.append(f"measured in {dtype}")
    if result.status == "done":
        result.probes = {probe.name: _measure(probe, out, base, **options) for probe in others}
    return result


def _measure(probe: Probe, out: ModelSource, base: ModelSource, **options: Any) -> dict[str, Any]:
    """The record of a probe. Errors are recorded, not raised: an unsuited tokenizer or text is no model fault."""
    if reason := probe.unasked(base, options["tokenizer"]):
        return {"status": UNASKED, "reason": reason}
    try:
        return without_cases(probe.measure(out, base, **options).to_dict())
    except SurgeryError as error:
        return {"status": "not run", "reason": error.what}
