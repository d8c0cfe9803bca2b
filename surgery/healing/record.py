"""What is kept of a healing: settings, data, the curve's ends, and how much of the damage came back."""

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

LEAST_GAP = 0.01  # nats: of a smaller one no share is told
CURVE = "loss.png"


def made(asked: Heal, facts: dict, earlier: dict | None) -> dict:
    """The record of one healing; `earlier`: of those before it, if any."""
    before = [*earlier.pop("earlier", []), earlier] if earlier else []
    return {"settings": published(asked), **facts, "versions": _versions(), "earlier": before}


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("accelerate", "peft")}


def renewed(data: dict, asked: Heal, judged_by: Evaluate | None) -> dict:
    """The report of a converted model, without what is no longer so when it was healed."""
    import torch

    limits = judged_by.limits if judged_by is not None else data["gate"]["limits"]
    return copy.deepcopy(data) | {
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seeds": data["seeds"] | {"heal": asked.seed},
        "check": None,
        "evaluation": None,
        "gate": {"status": "not run", "limits": limits},
        "code": None,
        "recipe": data["recipe"] | {"heal": published(asked)},
    }


def compared(before: dict, after: dict) -> dict:
    """The converted model's figures, and the share of its damage that came back.

    Args:
        before, after: `Evaluation.to_dict()` of converted and healed model, on one text and one base.
    """
    if before.get("status") != "done" or after.get("status") != "done":
        return {"converted": None, "recovered": None}
    base, out, healed = before["base"], before["out"], after["out"]
    known = {
        "cross_entropy": out.get("cross_entropy"),
        "perplexity": out.get("perplexity"),
        "kl": (before.get("kl") or {}).get("mean"),
        "top1_agreement": before.get("top1_agreement"),
    }
    shares = {
        "cross_entropy": _share(base.get("cross_entropy"), known["cross_entropy"], healed.get("cross_entropy")),
        "kl": _share(0.0, known["kl"], (after.get("kl") or {}).get("mean")),
    }
    return {"converted": known, "recovered": shares}


def _share(base, converted, healed) -> float | None:
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
        some = [line for line in lines if name in line]
        if some:
            shown[label] = ([line["tokens"] for line in some], [line[name] for line in some])
    try:
        curves(run / CURVE, shown, x_label="tokens", y_label="nats per token", title="healing")
    except SurgeryError:  # no matplotlib: the figures are in metrics.jsonl
        return
