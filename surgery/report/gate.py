"""The gate: what was measured, held against a recipe's limits."""

from __future__ import annotations

import math

from surgery.errors import SurgeryError, nearest

LIMITS = ("max_kl", "max_perplexity_ratio", "min_needles", "min_choices", "min_top1")


def gate(evaluation: dict, limits: dict) -> tuple[str, list[str]]:
    """Hold an `Evaluation.to_dict()` against a recipe's limits.

    Args:
        limits: any of max_kl (mean, nats per token), max_perplexity_ratio (out / base), min_needles and min_top1
            (shares, 0 to 1), min_choices (right answers, out / base); None is no limit.

    Returns:
        ("passed" | "failed" | "not run", reasons). A figure that is NaN fails; one that was not measured
        makes the gate "not run", never "passed".

    Raises:
        SurgeryError: an unknown limit, or one that is not a number.
    """
    for name, limit in limits.items():
        if name not in LIMITS:
            raise SurgeryError(
                f"no limit {name!r}",
                exists=", ".join(LIMITS),
                fix=f"use {nearest(name, LIMITS) or LIMITS[0]}",
            )
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit)):
            raise SurgeryError(f"{name} is {limit!r}, not a number", fix=f"{name}: 0.5")
    if evaluation.get("status") != "done":
        return "not run", [evaluation.get("reason") or "the evaluation was not run"]

    out = evaluation["out"]
    failed, missing = [], []
    if not _is_number(out.get("perplexity")):
        failed.append(f"the patched model's perplexity is not a number ({out.get('nonfinite_tokens')} tokens are NaN)")
    wanted = {name: limit for name, limit in limits.items() if limit is not None}
    for name, limit in wanted.items():
        if evaluation.get("base") is None:
            missing.append(f"{name} needs the base model to compare with")
        elif reason := _why_missing(name, evaluation):
            missing.append(f"{name}: {reason}")
        elif not _is_number(value := _figure(name, evaluation)):
            failed.append(f"{name}: the figure is not a number")
        elif value < limit if name.startswith("min_") else value > limit:
            failed.append(f"{name}: {value:.4g}, the limit is {limit:g}")
    return ("failed" if failed else "not run" if missing else "passed"), failed + missing


def _why_missing(name: str, evaluation: dict) -> str:
    """Why there is nothing to hold against a limit of needles or choices, or ""."""
    if name == "min_needles":
        needles = evaluation.get("needles") or {}
        counted = (needles.get("kept") or {}).get("of")
        return "" if counted else needles.get("reason") or "the base answers no needle that counts"
    if name == "min_choices":
        choices = evaluation.get("choices") or {}
        counted = (choices.get("base") or {}).get("right")
        return "" if counted else choices.get("reason") or "the base has no question right"
    return ""


def _figure(name: str, evaluation: dict):
    """What a limit is held against; not a number where it could not be computed."""
    out, base = evaluation["out"], evaluation["base"]
    if name == "min_needles":
        return evaluation["needles"]["kept"]["share"]
    if name == "min_choices":
        return evaluation["choices"]["out"]["right"] / evaluation["choices"]["base"]["right"]
    if name == "max_kl":
        return (evaluation.get("kl") or {}).get("mean")
    if name == "min_top1":
        return evaluation.get("top1_agreement")
    both = (out.get("perplexity"), base.get("perplexity"))
    return both[0] / both[1] if all(map(_is_number, both)) else None


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


DAMAGE_RATIO, DAMAGE_KL = 2.0, 1.0  # beyond these a model is said to be not usable before healing


def damage(evaluation: dict | None) -> list[str]:
    """What makes a model useless as it is: perplexity more than doubled, mean KL above 1, or NaN.

    Args:
        evaluation: `Evaluation.to_dict()`; where there is none, or it was not run, nothing is known: [].
    """
    if not evaluation or evaluation.get("status", "done") != "done":
        return []
    base, out, kl = (evaluation.get(key) or {} for key in ("base", "out", "kl"))
    before, after, mean, costs = base.get("perplexity"), out.get("perplexity"), kl.get("mean"), []
    # JSON has null for NaN, which is not the same as a figure that is not there.
    if "perplexity" in out and not finite(after):
        costs.append("its perplexity is not a number")
    elif finite(before) and finite(after) and before > 0 and after / before > DAMAGE_RATIO:
        costs.append(f"its perplexity is {after / before:.3g} times the base's")
    if "mean" in kl and not finite(mean):
        costs.append("its KL to the base is not a number")
    elif finite(mean) and mean > DAMAGE_KL:
        costs.append(f"its mean KL to the base is {mean:.3g} nats per token")
    return costs


def finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
