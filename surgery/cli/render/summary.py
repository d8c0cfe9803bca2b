"""The lines that `apply` and `heal` end with: changes, results of searches, cost, verdict, and what to type next."""

from __future__ import annotations

import json

from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console, labelled
from surgery.cli.render.durations import lasted
from surgery.cli.render.verdict import Command, gate_words, next_command, notes, verdict
from surgery.evaluation import probes
from surgery.operations.base import SURGICAL
from surgery.report.card_sections import healed, searched
from surgery.report.report import Report


def summary(report: Report, command: Command, seconds: float) -> None:
    """Print the lines that `apply` and `heal` end with.

    Args:
        report: the report of the folder that was just written.
        command: what the user typed, for a command to copy.
        seconds: how long the command took.
    """
    data, gate = report.data, report.data["gate"]
    folder = report.folder.name if report.folder.parent.samefile(".") else str(report.folder)
    labelled("changed", _changed(data["plan"]))
    fitted = _fitted(data)
    for line in fitted:
        labelled("fitted on", line)
    for line in searched(data):
        if not any(line.endswith(text) for text in fitted):
            labelled("found", line)
    for line in healed(data):
        labelled("healed", line)
    labelled("cost", _cost(data))
    for note in notes(data):
        labelled("note", note)
    labelled("gate", Text(gate_words(data), style=STATUS_STYLE.get(gate["status"], "") if gate["limits"] else ""))
    labelled("verdict", verdict(data))
    if (data["check"] or {}).get("passed"):
        labelled("load", _loading(data, folder), copied=True)
    labelled("next", next_command(data, folder, command), copied=True)
    console().print(f"done in {lasted(seconds)}")


def _changed(plan: dict) -> str:
    kv, fixed = plan["kv_bytes_per_token"], (plan.get("kv_bytes_fixed") or {}).get("after")
    also = f" and {fixed:,} bytes of sinks and windows" if fixed else ""
    return f"{'; '.join(plan['changes'])}; KV cache {kv['before']:,} → {kv['after']:,} bytes per token{also}"


def _fitted(data: dict) -> list[str]:
    """The texts that weights were fitted to, in the words with which `searched` ends its sentences on them."""
    texts = [(each.get("record") or {}).get("calibration") or {} for each in data["operations"]]
    digests = [f" (sha256 {text['sha256']})" if text.get("sha256") else "" for text in texts]
    lines = zip(texts, digests, strict=True)
    return [f"{text.get('tokens', 0):,} tokens: {text['text']}{digest}" for text, digest in lines if text.get("text")]


def _cost(data: dict) -> str:
    result = data["evaluation"]
    if not result:
        return "not measured"
    if result["status"] != "done":
        return f"not measured ({result.get('reason', '')})"
    sentences = [(cls, cls.sentence(record)) for cls, record in probes.done(result)]
    if not all(sentence for cls, sentence in sentences if cls.main):
        return "the model gives NaN"
    return ", ".join(sentence for _, sentence in sentences if sentence)


def _loading(data: dict, folder: str) -> str:
    auto = "AutoModelForImageTextToText" if data["base"].get("composite") else "AutoModelForCausalLM"
    loader = "surgery.load" if data["tier"] == SURGICAL else f"{auto}.from_pretrained"
    return f"{loader}({json.dumps(folder, ensure_ascii=False)})"
