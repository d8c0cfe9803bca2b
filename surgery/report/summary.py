"""A report in a few lines: what changed, what a search chose, what it cost, what was checked, and the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.evaluation import probes
from surgery.io.printing import Block, count
from surgery.report.card_healing import healed
from surgery.report.card_sections import base_name, searched
from surgery.report.verdict import gate_words, notes, verdict

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
    lines: list[Block] = [("recipe", f"{data['recipe'].get('name') or 'a recipe'} on {base_name(data)}")]
    lines.append(("changed", changed(data["plan"])))
    fitted = fitted_texts(data)
    lines += [("fitted on", line) for line in fitted]
    lines += [("found", line) for line in searched(data) if not line.endswith(tuple(fitted))]
    lines += [("healed", line) for line in healed(data) or trained(data.get("heal"))]
    lines.append(("cost", cost(data["evaluation"])))
    lines += [("note", note) for note in notes(data)]
    lines += [("gate", gate_words(data)), ("verdict", verdict(data))]
    lines.append(("check", checked(data["check"])))
    lines.append(("folder", place(folder) if folder else "none: the model is in memory (surgery.save writes it)"))
    return lines


def changed(plan: dict[str, Any]) -> str:
    """What changed, and the bytes of the KV cache before and after."""
    kv, fixed = plan.get("kv_bytes_per_token") or {}, plan.get("kv_bytes_fixed") or {}
    words = "; ".join(plan.get("changes") or ["nothing"])
    if not {"before", "after"} <= kv.keys():
        return words
    held, always = fixed.get("before") or 0, fixed.get("after") or 0
    once = f"{held:,} → {always:,}" if held and held != always else f"{always:,}"
    also = f", plus {once} bytes that do not grow" if always or held else ""
    return f"{words}; KV cache {kv['before']:,} → {kv['after']:,} bytes per token{also}"


def fitted_texts(data: dict[str, Any]) -> list[str]:
    """The texts that weights were fitted to, in the words with which `searched` ends its sentences on them."""
    texts = [(each.get("record") or {}).get("calibration") or {} for each in data["operations"]]
    digests = [f" (sha256 {text['sha256']})" if text.get("sha256") else "" for text in texts]
    lines = zip(texts, digests, strict=True)
    return [f"{text.get('tokens', 0):,} tokens: {text['text']}{digest}" for text, digest in lines if text.get("text")]


def cost(evaluation: dict[str, Any] | None) -> str:
    """What the surgery cost, in a sentence of each probe."""
    if not evaluation:
        return "not measured"
    if evaluation.get("status", "done") != "done":
        return f"not measured ({evaluation.get('reason', '')})"
    sentences = [(cls, cls.sentence(record)) for cls, record in probes.done(evaluation)]
    if not all(sentence for cls, sentence in sentences if cls.main):
        return "the model gives NaN"
    return ", ".join(sentence for _, sentence in sentences if sentence)


def trained(heal: dict[str, Any] | None) -> list[str]:
    """A line about a healing whose result was not scored; [] if there was no healing."""
    if not heal:
        return []
    settings, steps, tokens = heal["settings"], heal.get("steps"), heal.get("tokens")
    facts = [str(settings.get("method") or "trained"), *([f"{tokens:,} tokens"] if isinstance(tokens, int) else [])]
    facts += [count(steps, "step")] if isinstance(steps, int) else []
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
    return f"{count(done, 'check')} passed{skipped}"
