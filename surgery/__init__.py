"""Attention surgery: rewrite the attention of a pretrained Hugging Face checkpoint from a declarative recipe.

    import surgery
    plan = surgery.plan("mqa", "smollm2-135m")             # what would change; touches no weight
    report = surgery.apply("mqa", "folder", output="out")  # a folder, streamed
    model, tokenizer = surgery.load("smollm2-135m"), surgery.load_tokenizer("smollm2-135m")
    report = surgery.apply("mqa", model)                   # a loaded model, in place
    print(report, report.kv_bytes, report.passed)

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.api import (
        applied,
        apply,
        check,
        compare,
        evaluate,
        evaluate_choices,
        evaluate_needles,
        export,
        fit,
        heal,
        load,
        load_tokenizer,
        plan,
        push,
        reproduce,
        save,
        sweep,
        text_windows,
    )
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer
    from surgery.config.heal import Heal
    from surgery.config.recipe import Recipe
    from surgery.conversion.plan import Plan
    from surgery.errors import CheckError, GateError, MachineError, SurgeryError, TrainingError
    from surgery.evaluation.figures import Evaluation
    from surgery.evaluation.probes.choices import ChoiceResult
    from surgery.evaluation.probes.needles import NeedleResult
    from surgery.evaluation.result import Result
    from surgery.healing.callbacks import SurgeryCallback
    from surgery.healing.plan import HealPlan
    from surgery.operations.base import NATIVE, SURGICAL, ApplyContext, Operation, PlannedChange, WeightRewrite
    from surgery.pipeline import write_page
    from surgery.report.report import Report
    from surgery.runtime import register


_PUBLIC = {
    "plan": "api",
    "apply": "api",
    "applied": "api",
    "reproduce": "api",
    "check": "api",
    "evaluate": "api",
    "evaluate_choices": "api",
    "evaluate_needles": "api",
    "compare": "api",
    "sweep": "api",
    "fit": "api",
    "heal": "api",
    "SurgeryCallback": "healing.callbacks",
    "load": "api",
    "load_tokenizer": "api",
    "text_windows": "api",
    "save": "api",
    "export": "api",
    "push": "api",
    "write_page": "pipeline",
    "register": "runtime",
    "Anatomy": "architecture.anatomy",
    "Report": "report.report",
    "Recipe": "config.recipe",
    "Heal": "config.heal",
    "HealPlan": "healing.plan",
    "Result": "evaluation.result",
    "Evaluation": "evaluation.probes.perplexity",
    "NeedleResult": "evaluation.probes.needles",
    "ChoiceResult": "evaluation.probes.choices",
    "NATIVE": "operations.base",
    "SURGICAL": "operations.base",
    "Operation": "operations.base",
    "WeightRewrite": "operations.base",
    "PlannedChange": "operations.base",
    "ApplyContext": "operations.base",
    "AttentionLayer": "architecture.weights",
    "LayerAnatomy": "architecture.layer",
    "Plan": "conversion.plan",
    "SurgeryError": "errors",
    "GateError": "errors",
    "CheckError": "errors",
    "MachineError": "errors",
    "TrainingError": "errors",
}
__all__ = [
    "NATIVE",
    "SURGICAL",
    "Anatomy",
    "ApplyContext",
    "AttentionLayer",
    "CheckError",
    "ChoiceResult",
    "Evaluation",
    "GateError",
    "Heal",
    "HealPlan",
    "LayerAnatomy",
    "MachineError",
    "NeedleResult",
    "Operation",
    "Plan",
    "PlannedChange",
    "Recipe",
    "Report",
    "Result",
    "SurgeryCallback",
    "SurgeryError",
    "TrainingError",
    "WeightRewrite",
    "__version__",
    "applied",
    "apply",
    "check",
    "compare",
    "evaluate",
    "evaluate_choices",
    "evaluate_needles",
    "export",
    "fit",
    "heal",
    "load",
    "load_tokenizer",
    "plan",
    "push",
    "register",
    "reproduce",
    "save",
    "sweep",
    "text_windows",
    "write_page",
]


_OLD_NAMES = {"Change": "PlannedChange"}  # name in earlier versions -> present name; both work


def __getattr__(name: str):
    name = _OLD_NAMES.get(name, name)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
