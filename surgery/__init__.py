"""Attention surgery: rewrite the attention of a pretrained Hugging Face checkpoint from a declarative recipe.

    import surgery
    plan = surgery.plan("mqa", "smollm2-135m")          # what would change; touches no weight
    report = surgery.apply("mqa", model)                 # a loaded model, in place
    report = surgery.apply("mqa", "folder", output="out")  # a folder, streamed

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.api import apply, check, evaluate, evaluate_choices, evaluate_needles, heal, load, plan, push, save
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer
    from surgery.config.recipe import Recipe
    from surgery.conversion.plan import Plan
    from surgery.errors import CheckError, GateError, MachineError, SurgeryError
    from surgery.healing.callbacks import SurgeryCallback
    from surgery.operations.base import ApplyContext, Operation, PlannedChange, WeightRewrite
    from surgery.report.report import Report
    from surgery.runtime import register


_PUBLIC = {
    "plan": "api",
    "apply": "api",
    "check": "api",
    "evaluate": "api",
    "evaluate_choices": "api",
    "evaluate_needles": "api",
    "heal": "api",
    "SurgeryCallback": "healing.callbacks",
    "load": "api",
    "save": "api",
    "push": "api",
    "register": "runtime",
    "Anatomy": "architecture.anatomy",
    "Report": "report.report",
    "Recipe": "config.recipe",
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
}
__all__ = [
    "Anatomy",
    "ApplyContext",
    "AttentionLayer",
    "CheckError",
    "GateError",
    "LayerAnatomy",
    "MachineError",
    "Operation",
    "Plan",
    "PlannedChange",
    "Recipe",
    "Report",
    "SurgeryCallback",
    "SurgeryError",
    "WeightRewrite",
    "__version__",
    "apply",
    "check",
    "evaluate",
    "evaluate_choices",
    "evaluate_needles",
    "heal",
    "load",
    "plan",
    "push",
    "register",
    "save",
]


_OLD_NAMES = {"Change": "PlannedChange"}  # still understood


def __getattr__(name: str):
    name = _OLD_NAMES.get(name, name)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
