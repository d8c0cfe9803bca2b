"""The lines that `apply` ends with: what changed, what a search chose, what it cost, what to type next.

What `surgery ls` prints: recipes with the operations they use, operations with their fields and legal values.
"""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console, labelled
from surgery.cli.render.durations import lasted
from surgery.cli.render.verdict import Command, gate_words, next_command, notes, verdict
from surgery.evaluation import probes
from surgery.operations.base import SURGICAL
from surgery.operations.variants import Variants, describe_method, inline_schema
from surgery.report.card_sections import healed, searched
from surgery.report.report import Report


def summary(report: Report, command: Command, seconds: float) -> None:
    """Print the lines that `apply` and `heal` end with.

    Args:
        report: of a folder that was just written.
        command: what the user typed, for a command to copy.
        seconds: that it took.
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
    """The texts that weights were fitted to, as `searched` ends its sentences of them."""
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


def print_catalogue(recipes: dict[str, dict], classes: dict, broken: dict) -> None:
    """What `ls` shows: recipes with the operations they use, operations with their fields."""
    out = console()
    table = Table("recipe", "uses", "what it does", title="Recipes", title_justify="left", box=None, pad_edge=False)
    for name, info in recipes.items():
        table.add_row(name, " + ".join(info["ops"]), info["description"])
    out.print(table)
    for op, cls in classes.items():
        out.print(Text.assemble("\n", (op, "bold"), "  ", cls.summary))
        schema, methods = inline_schema(cls), cls.METHODS if issubclass(cls, Variants) else {}
        methods_info = {name: describe_method(method) for name, method in methods.items()}
        own_fields = {key for method_info in methods_info.values() for key in method_info["fields"]}
        common = {name: field for name, field in schema["properties"].items() if name not in own_fields | {"op"}}
        out.print(_fields(common, schema))
        for name, method_info in methods_info.items():
            out.print(Text.assemble("  method: ", (name, "bold"), ("  " + method_info["description"], "dim")))
            if method_info["fields"]:
                out.print(_fields(method_info["fields"], method_info, indent=4))
    for op, error in broken.items():
        out.print(Text.assemble("\n", (op, "bold red"), "  ", error))


WIDE = 60  # a column of so many names would push the descriptions out of the terminal


def _fields(fields: dict[str, dict], schema: dict, indent: int = 2) -> Table:
    """A row for each field: name, what it takes, its default, what it is."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
    for name, field in fields.items():
        empty = "optional" if field.get("default") is None else f"default {json.dumps(field['default'])}"
        default = "required" if name in schema.get("required", []) else empty.replace('"', "")
        legal = kind(field, schema.get("$defs", {}))
        legal = "one of those below" if name == "method" and len(legal) > WIDE else legal
        table.add_row(" " * indent + name, legal, Text(default, style="dim"), field.get("description", ""))
    return table


def kind(field: dict, known: dict) -> str:
    """What a field takes, from its JSON Schema: "mean | first | random", "whole number ≥ 1"."""
    if "$ref" in field:
        return kind(known.get(field["$ref"].rsplit("/", 1)[-1], {}), known)
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    if "anyOf" in field:
        choices = (choice for choice in field["anyOf"] if choice.get("type") != "null")
        return " | ".join(dict.fromkeys(kind(choice, known) for choice in choices))
    if field.get("type") == "array":
        return f"list of {kind(field.get('items', {}), known)}"
    words = {"integer": "whole number", "string": "text", "boolean": "true | false", "object": "mapping"}
    low, high = (
        f"{sign} {field[key]:g}" if key in field else "" for sign, key in (("≥", "minimum"), ("≤", "maximum"))
    )
    return " ".join(filter(None, (words.get(field.get("type"), field.get("type") or "anything"), low, high)))
