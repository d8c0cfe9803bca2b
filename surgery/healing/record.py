"""The record of a healing: settings, data, first and last loss, and the recovered share of the damage."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.config.heal_overrides import published
from surgery.errors import SurgeryError
from surgery.healing.callbacks import METRICS, read
from surgery.healing.sparse_attention import record_of
from surgery.report.gate import finite
from surgery.report.report import versions

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.config.recipe import Evaluate

LEAST_GAP = 0.01  # nats; for a smaller damage, no recovered share is recorded
CURVE = "loss.png"
CURVE_ENDS = 5  # the first and last loss are means of this many lines of metrics, at most of a quarter


def new_record(heal: Heal, training: dict, earlier: dict | None) -> dict:
    """The record of one healing.

    Args:
        training: the record that `run.train` returned.
        earlier: the record of the previous healing, which contains those before it; None if there was none.
    """
    before = [*earlier.pop("earlier", []), earlier] if earlier else []
    return {"settings": published(heal), **training, "versions": _versions(), "earlier": before}


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("accelerate", "peft")}


def report_after_healing(data: dict, heal: Heal, judged_by: Evaluate | None) -> dict:
    """The report of a converted model, without the entries that a healing makes outdated."""
    import torch

    limits = judged_by.limits if judged_by is not None else data["gate"]["limits"]
    data = {key: value for key, value in data.items() if key != "repository"}  # the healed model has none yet
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
    """The converted model's figures, and the share of its damage that the healing recovered.

    Args:
        before, after: `Evaluation.to_dict()` of the converted and of the healed model, on the same text and base.
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
    """The recovered share of the distance between the converted model and the base."""
    if not all(map(finite, (base, converted, healed))) or converted - base < LEAST_GAP:
        return None
    return (converted - healed) / (converted - base)


def of_metrics(lines: list[dict]) -> dict:
    """The entries of the record that follow from metrics.jsonl."""
    losses = [line["loss"] for line in lines if _kind(line) == _kind(lines[0])]
    span = max(1, min(CURVE_ENDS, len(losses) // 4))
    loss = {"first": _mean(losses[:span]), "last": _mean(losses[-span:])}
    of = {"of": lines[0]["trains"]} if lines and "trains" in lines[0] else {}
    return {"loss": loss | of} | record_of(lines)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def draw(run: Path, settings: Heal, limits: dict[str, float]) -> None:
    """Plot the losses of the training, if matplotlib is installed.

    A step's loss is the loss of the model before the step. So it is drawn at the number of tokens read before the
    step, and the first point is the untrained model. Training rows and held-out windows differ in length, so they have
    separate panels.

    Args:
        run: the folder of metrics.jsonl, to which the picture is written.
        limits: the gate's limits; `max_kl` is drawn.
    """
    from surgery.healing import losses
    from surgery.report.plots import Line, Panel, curves

    lines = read(run / METRICS)
    if len(lines) < 2:
        return
    before = [line["tokens"] - lines[0]["tokens"] // lines[0]["step"] for line in lines]
    goal = losses.written(settings.loss)
    first = {"marker": "o", "markevery": [0]}
    shown = {}
    for kind in dict.fromkeys(map(_kind, lines)):
        points = [(at, line["loss"]) for at, line in zip(before, lines, strict=True) if _kind(line) == kind]
        shown[f"loss ({goal}){kind}"] = Line(*zip(*points, strict=True), style=first)
    known = [line for line in lines if "kl" in line]
    if any(line["kl"] != line["loss"] for line in known):  # else KL is the loss
        at = dict(zip(map(id, lines), before, strict=True))
        kl = [line["kl"] for line in known]
        shown["KL to the base"] = Line([at[id(line)] for line in known], kl, style=first | {"marker": "s"})
    what = "nats per token" if len(shown) > 1 else f"loss ({goal}), nats per token"
    panels = [Panel(shown, what, "text that it trains on")]
    points = [(line["tokens"], line["held_out_kl"]) for line in lines if "held_out_kl" in line]
    start = lines[0].get("held_out_before") or {}
    if points := [*([(0, start["held_out_kl"])] if start else []), *points]:
        held_out = {"KL to the base": Line(*zip(*points, strict=True))}
        levels = {f"the gate: at most {limits['max_kl']:g}": limits["max_kl"]} if limits.get("max_kl") else {}
        panels.append(Panel(held_out, "KL to the base, nats per token", "held-out text", levels))
    try:
        title = f"Healing ({settings.method}): what is left of the damage as it trains"
        curves(run / CURVE, panels, x_label="tokens trained on", title=title)
    except SurgeryError:  # without matplotlib, the figures are still in metrics.jsonl
        return


def _kind(line: dict) -> str:
    """What sets a step's loss apart from that of others, with which it is not compared; "" where nothing does."""
    full = ", full attention" * bool(line.get("full_attention"))  # where others had sparse attention
    return full + (f", {line['trains']} train" if "trains" in line else "")  # with one expert drawn, or their mixture
