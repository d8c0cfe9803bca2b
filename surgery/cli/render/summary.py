"""The lines that `apply` ends with: what changed, what a search chose, what it cost, what to type next.

What `surgery ls` prints: recipes with the operations they use, operations with their fields and legal values.
"""

from __future__ import annotations

import json
import shlex

from rich.table import Table
from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console
from surgery.evaluation import probes
from surgery.evaluation.probes.settings import requested_probes
from surgery.operations.base import SURGICAL
from surgery.operations.variants import Variants, describe_method, inline_schema
from surgery.report.card_sections import healed, searched
from surgery.report.gate import damage


def summary(report, base: str) -> None:
    """Print the lines that `apply` ends with.

    Args:
        report: of a folder that was just written.
        base: the model as the user typed it, for a command to copy.
    """
    data, out = report.data, console()
    kv, fixed = data["plan"]["kv_bytes_per_token"], (data["plan"].get("kv_bytes_fixed") or {}).get("after")
    also = f" and {fixed:,} bytes of sinks and windows" if fixed else ""
    out.print(
        f"changed: {'; '.join(data['plan']['changes'])}; KV cache {kv['before']:,} → {kv['after']:,} bytes per token"
        + also
    )
    for line in searched(data):
        out.print(f"found:   {line}")
    for line in healed(data):
        out.print(f"healed:  {line}")
    gate = data["gate"]
    verdict = ("gate ", (gate["status"], STATUS_STYLE.get(gate["status"], ""))) if gate["limits"] else ("no gate",)
    out.print(Text.assemble("cost:    ", _cost(data), ", ", *verdict))
    folder = report.folder.name if report.folder.parent.samefile(".") else str(report.folder)
    out.print(f"next:    {_next(data, folder, base)}")


def _cost(data: dict) -> str:
    result = data["evaluation"]
    if not result:
        return "not measured"
    if result["status"] != "done":
        return f"not measured ({result.get('reason', '')})"
    sentences = [(cls, cls.sentence(record)) for cls, record in probes.done(result)]
    if not all(sentence for cls, sentence in sentences if cls.main):
        return "the model gives NaN: not usable"
    usable = f": not usable{'' if data.get('heal') else ' before healing'}" if damage(result) else ""
    return ", ".join(sentence for _, sentence in sentences if sentence) + usable


def _next(data: dict, folder: str, base: str) -> str:
    quoted, model = shlex.quote(folder), shlex.quote(base)
    if data["check"] is None:
        return f"surgery check {quoted} --base {model}"
    if not data["check"]["passed"]:
        return f"surgery check {quoted} names the fault; the base is untouched"
    if data["evaluation"] is None:
        return f"surgery eval {quoted} --base {model}{_requested_options(data)}"
    if data["evaluation"]["status"] != "done":
        return f"surgery eval {quoted} --base {model}{_requested_options(data)}, on a machine with more memory"
    train = f"surgery heal {quoted} tokens=1e6 -o HEALED --base {model}"
    if damage(data["evaluation"]) and data.get("heal"):
        return (
            "train it longer (heal.tokens=...), or choose a milder setting (surgery plan shows what it would change)"
        )
    if damage(data["evaluation"]):
        return f"{train}, or choose a milder setting (surgery plan shows what one would change)"
    if data["gate"]["status"] == "failed":
        return f"choose a milder setting, {train}, or accept what it costs (--no-gate)"
    auto = "AutoModelForImageTextToText" if data["base"].get("composite") else "AutoModelForCausalLM"
    loader = "surgery.load" if data["tier"] == SURGICAL else f"{auto}.from_pretrained"
    return f"{loader}({json.dumps(folder, ensure_ascii=False)}), or surgery push {quoted} OWNER/NAME"


def _requested_options(data: dict) -> str:
    """The options of `eval` that make its result the one that the recipe asks for."""
    settings = data["recipe"].get("evaluate") or {}
    probe = next(probe for probe in requested_probes(settings) if probe.main)
    flags = {option: (getattr(probe, flag.key), flag.key) for option, flag in probe.aliases.flags.items()}
    return "".join(
        f" --{option.replace('_', '-')} {shlex.quote(str(value))}"
        for option, (value, key) in flags.items()
        if value != type(probe).model_fields[key].default
    )


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
