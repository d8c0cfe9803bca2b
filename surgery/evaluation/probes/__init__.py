"""The registry of probes: name -> class. The module of a probe is imported when the probe is asked for.

A probe measures one property of a model and of its base. A new probe needs a file here, a line in `REGISTRY` and a
test. The command `surgery eval --probe`, the recipe's `evaluate: {probes: ...}`, the gate, the card and the closing
lines of `apply` follow from its class (see `base.Probe`).
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING

from surgery.errors import SettingError, nearest

if TYPE_CHECKING:
    from surgery.evaluation.probes.base import Limit, Probe

REGISTRY = {  # name -> "module:class", in the order in which probes are run and shown
    "perplexity": "perplexity:Perplexity",
    "needles": "needles:Needles",
    "choices": "choices:Choices",
    "multi_needle": "multi_needle:MultiNeedle",
    "repeats": "repeats:Repeats",
    "lookup": "lookup:Lookup",
    "order": "order:Order",
    "verbatim": "verbatim:Verbatim",
    "chat": "chat:Chat",
    "tasks": "tasks:Tasks",
    "massive": "massive:MassiveActivations",
}


def find(name: str) -> type[Probe]:
    """The class of a probe.

    Raises:
        SurgeryError: there is no such probe.
    """
    if isinstance(name, str) and name in REGISTRY:
        module, cls = REGISTRY[name].split(":")
        return getattr(import_module(f"{__name__}.{module}"), cls)
    close = (nearest(name, REGISTRY) or _said_by(name)) if isinstance(name, str) else ""
    raise SettingError(
        f"unknown probe {name!r}",
        exists="; ".join(f"{cls.name}: {cls.summary}" for cls in every()),
        fix=f"did you mean {close!r}?" if close else "--probe with one of these names",
    )


def _said_by(word: str) -> str:
    """The first probe whose summary has this word; "" if none has."""
    return next((cls.name for cls in every() if word.lower() in re.findall(r"\w+", cls.summary.lower())), "")


def every() -> list[type[Probe]]:
    """All classes, in the order of the registry."""
    return [find(name) for name in REGISTRY]


def main() -> type[Probe]:
    """The probe that every evaluation runs. Its record is the top level of a report's `evaluation`."""
    return next(cls for cls in every() if cls.main)


def record_of(evaluation: dict, cls: type[Probe]) -> dict:
    """The record of one probe in a report's `evaluation`; {} if the probe was not asked for."""
    return evaluation if cls.main else evaluation.get(cls.name) or {}


def done(evaluation: dict) -> list[tuple[type[Probe], dict]]:
    """The probes for which an evaluation has figures, with their records."""
    records = [(cls, record_of(evaluation, cls)) for cls in every()]
    return [(cls, record) for cls, record in records if record and record.get("status", "done") == "done"]


def limits() -> dict[str, tuple[type[Probe], Limit]]:
    """Name of every limit that a gate may have -> its probe, and the `Limit`."""
    bounded = {name: (cls, limit) for cls in every() for name, limit in cls.limits.items()}
    last = [name for cls in every() for name in cls.aliases.last]
    return {name: bounded[name] for name in [*(name for name in bounded if name not in last), *last]}
