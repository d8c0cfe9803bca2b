"""Attention surgery: rewrite the attention of a pretrained Hugging Face checkpoint from a declarative recipe.

    import surgery
    plan = surgery.plan("mqa", "smollm2-135m")          # what would change; touches no weight
    report = surgery.apply("mqa", model)                 # a loaded model, in place
    report = surgery.apply("mqa", "folder", output="out")  # a folder, streamed

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "plan": "api",
    "apply": "api",
    "check": "api",
    "evaluate": "api",
    "load": "api",
    "save": "api",
    "push": "api",
    "register": "runtime",
    "Anatomy": "anatomy",
    "Report": "report",
    "Recipe": "recipe",
    "Operation": "operation",
    "WeightRewrite": "operation",
    "Change": "operation",
    "SurgeryError": "errors",
    "GateError": "errors",
    "CheckError": "errors",
    "MachineError": "errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
