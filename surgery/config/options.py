"""The options of one run, which are not part of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.machine.progress import Progress

ENGINES = ("auto", "streaming", "loaded")


@dataclass(frozen=True)
class RunOptions:
    """Options of one run, passed from the command or the public function to the modules that read them.

    Attributes:
        check: load and compare the result afterwards.
        evaluate: score the result against the base, if the recipe evaluates.
        gate: let a failed quality gate fail the run; otherwise it is recorded as skipped.
        resume: continue an unfinished earlier output.
        overwrite: replace a finished earlier output, and drop an unfinished one.
        allow_pickle: read .bin weights of the base (with `weights_only=True`).
        engine: how the conversion runs, one of `ENGINES`; auto: streaming where the recipe allows it.
        progress: called with done, total and a label.
        on_plan: called with the plan (a `Plan`; a `HealPlan` where only a healing runs) before anything is done.
    """

    check: bool = True
    evaluate: bool = True
    gate: bool = True
    resume: bool = False
    overwrite: bool = False
    allow_pickle: bool = False
    engine: str = "auto"
    progress: Progress | None = None
    on_plan: Callable[[Any], None] | None = None
