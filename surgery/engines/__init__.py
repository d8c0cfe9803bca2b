"""Files for other engines: write a converted checkpoint in an engine's format, and prove that the engine agrees.

An engine is one file with a subclass of `ServingEngine` (base.py), and a line in `ENGINES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError, nearest

if TYPE_CHECKING:
    from surgery.engines.base import ServingEngine

ENGINES = {"llama.cpp": "llama_cpp:LlamaCpp", "vllm": "vllm:VLLM"}  # name -> module and class


def find(name: str) -> ServingEngine:
    """The engine of this name.

    Raises:
        SurgeryError: there is none.
    """
    if name not in ENGINES:
        close = nearest(name, ENGINES) or next(iter(ENGINES))
        raise SurgeryError(f"no engine {name!r}", where="--for", exists=", ".join(ENGINES), fix=f"--for {close}")
    module, _, cls = ENGINES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), cls)()
