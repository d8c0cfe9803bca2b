"""A report in a few lines: what changed, what a search chose, what it cost, what was checked, and the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.evaluation import probes
from surgery.io.printing import Block
from surgery.report.card_sections import base_name, healed, searched
from surgery.report.gate import damage, finite

FAILED, PASSED = "failed", "passed"


def headline(data: dict[str, Any], folder: Path | None) -> str:
    """The surgery in one line: recipe and base, the change, KL, gate, folder."""
    changes = data["plan"].get("changes") or ["no change"]
    more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
    kl = ((data["evaluation"] or {}).get("kl") or {}).get("mean")
    facts = [f"{changes[0]}{more}"] + ([] if kl is None else [f"KL {kl:.3f}"])
    if data["gate"]["limits"]:
        facts.append(f"gate {data['gate']['status']}")
    if data["check"] and not data["check"]["passed"]:
        facts.append("check failed")
    name = data["recipe"].get("name") or "a recipe"
    return f"{name} on {base_name(data)}: {'; '.join(facts)}; {place(folder)}"


def place(folder: Path | None) -> str:
    """The folder as a user would type it, or "in memory"."""
    if folder is None:
        return "in memory"
    here = Path.cwd()
    path = folder.absolute()
    return f"./{path.relative_to(here)}" if path != here and path.is_relative_to(here) else str(folder)


def blocks(data: dict[str, Any], folder: Path | None) -> list[Block]:
    """The report as lines, each with a label."""
    kv, fixed = data["plan"].get("kv_bytes_per_token") or {}, data["plan"].get("kv_bytes_fixed") or {}
    changed = "; ".join(data["plan"].get("changes") or ["nothing"])
    lines: list[Block] = [("recipe", f"{data['recipe'].get('name') or 'a recipe'} on {base_name(data)}")]
    lines.append(("changed", changed))
    if {"before", "after"} <= kv.keys():
        also = f" and {fixed['after']:,} bytes of sinks and windows" if fixed.get("after") else ""
        lines.append(("KV cache", f"{kv['before']:,} → {kv['after']:,} bytes per token{also}"))
    lines += [("found", line) for line in searched(data)]
    lines += [("healed", line) for line in healed(data) or trained(data.get("heal"))]
    lines.append(("cost", cost(data["evaluation"], bool(data.get("heal")))))
    if data["gate"]["limits"]:
        lines.append(("gate", judged(data["gate"], data["evaluation"])))
    lines.append(("check", checked(data["check"])))
    lines.append(("folder", place(folder) if folder else "none: the model is in memory (surgery.save writes it)"))
    return lines


def cost(evaluation: dict[str, Any] | None, after_healing: bool) -> str:
    """What the surgery cost: a clause for each probe, and a warning if the model is not usable."""
    if not evaluation:
        return "not measured"
    if evaluation.get("status", "done") != "done":
        return f"not measured ({evaluation.get('reason', '')})"
    sentences = [(cls, cls.sentence(record)) for cls, record in probes.done(evaluation)]
    if not all(sentence for cls, sentence in sentences if cls.main):
        return "the model gives NaN: not usable"
    usable = f": not usable{'' if after_healing else ' before healing'}" if damage(evaluation) else ""
    return ", ".join(sentence for _, sentence in sentences if sentence) + usable


def judged(gate: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """The gate in a sentence: if it was passed, each limit with the figure; otherwise the reasons."""
    reasons = list(gate.get("reasons") or [])
    if gate["status"] == PASSED and evaluation:
        known = probes.limits()
        for name, value in gate["limits"].items():
            cls, limit = known.get(name, (None, None))
            record = probes.record_of(evaluation, cls) if cls else {}
            figure = limit.figure(record) if limit and record.get("status", "done") == "done" and record else None
            if finite(figure):
                reasons.append(f"{name} {value:g}, measured {figure:.4g}")
    return gate["status"] + (f" ({'; '.join(reasons)})" if reasons else "")


def trained(heal: dict[str, Any] | None) -> list[str]:
    """A line about a healing whose result was not scored; [] if there was no healing."""
    if not heal:
        return []
    settings, steps, tokens = heal["settings"], heal.get("steps"), heal.get("tokens")
    facts = [str(settings.get("method") or "trained"), *([f"{tokens:,} tokens"] if isinstance(tokens, int) else [])]
    facts += [f"{steps:,} {'step' if steps == 1 else 'steps'}"] if isinstance(steps, int) else []
    return [f"{', '.join(facts)}; how much came back was not measured"]


def checked(check: dict[str, Any] | None) -> str:
    """The result of the check in a sentence."""
    if check is None:
        return "not run"
    by_status: dict[str, list[dict[str, Any]]] = {}
    for item in check["items"]:
        by_status.setdefault(item["status"], []).append(item)
    if faults := by_status.get(FAILED):
        named = [f"{item['name']}: {item['detail']}" for item in faults]
        return f"failed: {'; '.join(named)}"
    done, left = len(by_status.get(PASSED, [])), by_status.get("not run", [])
    skipped = f"; not run: {', '.join(item['name'] for item in left)}" if left else ""
    return f"{done} {'check' if done == 1 else 'checks'} passed{skipped}"
