"""The record of a healing: settings, data, first and last loss, and how much of the damage came back."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.config.heal_overrides import published
from surgery.errors import SurgeryError
from surgery.healing.callbacks import METRICS, read
from surgery.report.gate import finite
from surgery.report.report import versions

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.config.recipe import Evaluate

LEAST_GAP = 0.01  # nats: no share of a smaller damage is recorded
CURVE = "loss.png"


def new_record(heal: Heal, training: dict, earlier: dict | None) -> dict:
    """The record of one healing.

    Args:
        training: what `run.train` returned.
        earlier: the record of the healing before it, with those before that one; None: there was none.
    """
    before = [*earlier.pop("earlier", []), earlier] if earlier else []
    return {"settings": published(heal), **training, "versions": _versions(), "earlier": before}


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("accelerate", "peft")}


def report_after_healing(data: dict, heal: Heal, judged_by: Evaluate | None) -> dict:
    """The report of a converted model, without what a healing makes out of date."""
    import torch

    limits = judged_by.limits if judged_by is not None else data["gate"]["limits"]
    return copy.deepcopy(data) | {
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": data["versions"] | versions(),
        "threads": torch.get_num_threads(),
        "seeds": data["seeds"] | {"heal": heal.seed},
        "check": None,
        "evaluation": None,
        "gate": {"status": "not run", "limits": limits},
        "code": None,
        "recipe": data["recipe"] | {"heal": published(heal)},
    }


def recovery(before: dict, after: dict) -> dict:
    """The converted model's figures, and the share of its damage that came back.

    Args:
        before, after: `Evaluation.to_dict()` of converted and healed model, on one text and one base.
    """
    if before.get("status") != "done" or after.get("status") != "done":
        return {"converted": None, "recovered": None}
    base, out, healed = before["base"], before["out"], after["out"]
    converted = {
        "cross_entropy": out.get("cross_entropy"),
        "perplexity": out.get("perplexity"),
        "kl": (before.get("kl") or {}).get("mean"),
        "top1_agreement": before.get("top1_agreement"),
    }
    shares = {
        "cross_entropy": _recovered_fraction(
            base.get("cross_entropy"), converted["cross_entropy"], healed.get("cross_entropy")
        ),
        "kl": _recovered_fraction(0.0, converted["kl"], (after.get("kl") or {}).get("mean")),
    }
    return {"converted": converted, "recovered": shares}


def _recovered_fraction(base, converted, healed) -> float | None:
    """How much of the way from the converted model back to the base was gone."""
    if not all(map(finite, (base, converted, healed))) or converted - base < LEAST_GAP:
        return None
    return (converted - healed) / (converted - base)


def draw(run: Path) -> None:
    """The curve as a picture, where matplotlib is installed."""
    from surgery.report.plots import curves

    lines = read(run / METRICS)
    if len(lines) < 2:
        return
    shown = {"training": ([line["tokens"] for line in lines], [line["loss"] for line in lines])}
    for name, label in (("kl", "KL to the base"), ("held_out_kl", "KL to the base, held-out text")):
        measured = [line for line in lines if name in line]
        if measured:
            shown[label] = ([line["tokens"] for line in measured], [line[name] for line in measured])
    try:
        curves(run / CURVE, shown, x_label="tokens", y_label="nats per token", title="healing")
    except SurgeryError:  # no matplotlib: the figures are in metrics.jsonl
        return
