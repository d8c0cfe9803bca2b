"""What `surgery ls` prints: recipes with the operations they use, operations with their fields and legal values."""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from surgery.cli.render import console


def print_catalogue(recipes: dict[str, dict], classes: dict, broken: dict) -> None:
    """What `ls` shows: recipes with the operations they use, operations with their fields."""
    out = console()
    table = Table("recipe", "uses", "what it does", title="Recipes", title_justify="left", box=None, pad_edge=False)
    for name, facts in recipes.items():
        table.add_row(name, " + ".join(facts["ops"]), facts["description"])
    out.print(table)
    for op, cls in classes.items():
        out.print(Text.assemble("\n", (op, "bold"), "  ", cls.summary))
        fields, schema = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1)), cls.model_json_schema()
        for name, field in schema["properties"].items():
            if name != "op":
                empty = "optional" if field.get("default") is None else f"default {json.dumps(field['default'])}"
                default = "required" if name in schema.get("required", []) else empty.replace('"', "")
                legal = kind(field, schema.get("$defs", {}))
                fields.add_row(f"  {name}", legal, Text(default, style="dim"), field.get("description", ""))
        out.print(fields)
    for op, error in broken.items():
        out.print(Text.assemble("\n", (op, "bold red"), "  ", error))


def kind(field: dict, known: dict) -> str:
    """What a field takes, from its JSON Schema: "mean | first | random", "whole number ≥ 1"."""
    if "$ref" in field:
        return kind(known.get(field["$ref"].rsplit("/", 1)[-1], {}), known)
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    if "anyOf" in field:
        parts = (part for part in field["anyOf"] if part.get("type") != "null")
        return " | ".join(dict.fromkeys(kind(part, known) for part in parts))
    if field.get("type") == "array":
        return f"list of {kind(field.get('items', {}), known)}"
    words = {"integer": "whole number", "string": "text", "boolean": "true | false", "object": "mapping"}
    low, high = (
        f"{sign} {field[key]:g}" if key in field else "" for sign, key in (("≥", "minimum"), ("≤", "maximum"))
    )
    return " ".join(filter(None, (words.get(field.get("type"), field.get("type") or "anything"), low, high)))
