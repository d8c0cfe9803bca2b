"""The lines that `apply` and `heal` end with: changes, results of searches, cost, verdict, and what to type next."""

from __future__ import annotations

import json

from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console, labelled
from surgery.cli.render.durations import lasted
from surgery.cli.render.next_command import Typed, next_command
from surgery.operations.base import SURGICAL
from surgery.report.report import Report
from surgery.report.summary import blocks

ELSEWHERE = ("recipe", "check", "folder")  # lines of a report that were printed above, or follow from `next`


def summary(report: Report, command: Typed, seconds: float) -> None:
    """Print the lines that `apply` and `heal` end with.

    Args:
        report: the report of the folder that was just written.
        command: what the user typed, for a command to copy.
        seconds: how long the command took.
    """
    data, gate = report.data, report.data["gate"]
    folder = report.folder.name if report.folder.parent.samefile(".") else str(report.folder)
    for label, words in blocks(data, report.folder):
        if label not in ELSEWHERE:
            style = STATUS_STYLE.get(gate["status"], "") if label == "gate" and gate["limits"] else ""
            labelled(label, Text(words, style=style))
    if (data["check"] or {}).get("passed"):
        labelled("load", _loading(data, folder), copied=True)
    labelled("next", next_command(data, folder, command), copied=True)
    console().print(f"done in {lasted(seconds)}")


def _loading(data: dict, folder: str) -> str:
    auto = "AutoModelForImageTextToText" if data["base"].get("composite") else "AutoModelForCausalLM"
    loader = "surgery.load" if data["tier"] == SURGICAL else f"{auto}.from_pretrained"
    return f"{loader}({json.dumps(folder, ensure_ascii=False)})"
