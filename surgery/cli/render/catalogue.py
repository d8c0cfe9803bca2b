"""Output of `surgery ls`: recipes to choose from, one recipe or operation in full, or all parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from surgery.cli.render.console import console
from surgery.cli.render.layout import columns, hanging, show
from surgery.config.catalogue import Entry
from surgery.config.recipe import Recipe
from surgery.operations.base import LOADS_WITH, PURPOSES, Operation
from surgery.operations.variants import Variants, describe_method, inline_schema

TRAINING = {"no": "no training", "included": "trains for itself", "needed": "to be trained before use"}
STYLES = {"native": "green", "surgical": "cyan"}
DEMO = "smollm2-135m"
LEGEND = "native: stock Transformers loads it. /heal: NAME-heal includes training."
FEW = 2  # recipes of one operation that each have a row
TRAINED = "-heal"  # ends the name of a recipe that is another one with training included


def recipes(entries: list[Entry], others: Iterable[str], broken: dict[str, str]) -> None:
    """Print the recipes, grouped by purpose, so that they fit on a screen.

    NAME-heal stands in the row of NAME. Recipes of one operation that load and train alike have one row, and the names
    of the others stand below it.

    Args:
        others: operations that no recipe uses.
        broken: operations of other packages that do not load -> their error.
    """
    out, names = console(), {entry.name for entry in entries}
    listed = [entry for entry in entries if entry.name.removesuffix(TRAINED) not in names - {entry.name}]
    listed, others_of = _folded(listed, names)
    width = max(len(entry.name) for entry in listed)
    rows: list[list[Text | str]] = [
        [Text(word, style="dim") for word in ("recipe".ljust(width), "tier", "training", "what it does")]
    ]
    headings = {}
    for entry in listed:
        if entry.purpose not in headings:
            headings[entry.purpose] = len(rows)
        tier = Text(entry.tier, style=STYLES[entry.tier])
        training = f"{entry.training}/heal" if f"{entry.name}{TRAINED}" in names else entry.training
        rows.append([Text(entry.name, style="bold"), tier, training, entry.line])
    ends = [*headings.values(), len(rows)]
    columns_of_rows = _aligned(rows)
    columns(out, columns_of_rows[:1], cut=True)
    for purpose, (first, last) in zip(headings, pairwise(ends), strict=True):
        blank = "\n" if first > 1 else ""
        out.print(Text(f"{blank}{PURPOSES[purpose]}", style="bold underline" if out.is_terminal else ""))
        for row, entry in zip(columns_of_rows[first:last], listed[first - 1 : last - 1], strict=True):
            columns(out, [row], cut=True)
            if entry.name in others_of:
                hanging(out, "  or", ", ".join(others_of[entry.name]), 4, "dim")
    out.print()
    hanging(out, "", LEGEND, 0, "dim")
    without = f"; without a recipe: {', '.join(others)}" if (others := list(others)) else ""
    hanging(out, "Settings:", f"surgery ls NAME; all: surgery ls --all{without}", 0)
    for op, error in broken.items():
        hanging(out, Text(f"{op} ", style="bold red"), f"does not load: {error}", 4)


def _folded(listed: list[Entry], names: set[str]) -> tuple[list[Entry], dict[str, list[str]]]:
    """The recipes with a row of their own, and for each the names that stand below it, where they are several.

    The row is that of the recipe with the operation's name or its usual method, or else of the first.

    Args:
        names: of all recipes, those that train others among them.
    """
    families: dict[tuple, list[Entry]] = {}
    for entry in listed:
        alike = entry.purpose, entry.tier, entry.training, f"{entry.name}{TRAINED}" in names
        families.setdefault((entry.ops if len(entry.ops) == 1 else entry.name, *alike), []).append(entry)
    first = {}
    for family in families.values():
        if len(family) <= FEW:
            first |= {entry.name: [] for entry in family}
            continue
        chosen = min(family, key=lambda entry: (entry.ops[0].replace("_", "-") != entry.name, not entry.usual))
        first[chosen.name] = [entry.name for entry in family if entry is not chosen]
    rows = [entry for entry in listed if entry.name in first]
    return rows, {name: others for name, others in first.items() if others}


def _aligned(rows: list[list[Text | str]]) -> list[list[Text | str]]:
    """Rows with every cell but the last padded to the width of its column, so that groups of rows line up."""
    texts = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in column) for column in list(zip(*texts, strict=True))[:-1]]
    for row in texts:
        for cell, width in zip(row, widths, strict=False):
            cell.append(" " * (width - cell.cell_len))
    return texts  # type: ignore[return-value]


def recipe(loaded: Recipe, entry: Entry) -> None:
    """Print one recipe: what it does, its settings with their values in it, and a command to copy."""
    out = console()
    hanging(out, Text(f"{entry.name}:", style="bold"), loaded.description, 4)
    out.print(f"{LOADS_WITH[entry.tier]}, {TRAINING[entry.training]}")
    if limits := loaded.evaluate and loaded.evaluate.limits:
        out.print(f"quality gate: {', '.join(f'{key} {value:g}' for key, value in limits.items())}")
    for operation in loaded.operations:
        out.print()
        hanging(out, Text(operation.op, style="bold cyan"), type(operation).summary, len(operation.op) + 2)
        _settings(out, type(operation), operation, others=True)
    if loaded.heal is not None:
        out.print()
        hanging(out, Text("heal", style="bold cyan"), "Training after the surgery (heal.KEY=VALUE).", 6)
        _settings(out, type(loaded.heal), loaded.heal, others=True)
    out.print()
    name = entry.name if "/" in entry.name or " " not in entry.name else repr(entry.name)
    _example(out, f"surgery apply {name} {DEMO} -o out {_override(loaded)}".rstrip())


def operation(cls: type[Operation]) -> None:
    """Print one operation: its settings with their defaults, method by method, and how to use it in a recipe."""
    out, op = console(), cls.model_fields["op"].default
    hanging(out, Text(f"{op}:", style="bold"), cls.summary, 4)
    _settings(out, cls, None, others=False)
    for name, method in (cls.METHODS if issubclass(cls, Variants) else {}).items():
        described = describe_method(method)
        out.print()
        hanging(out, Text.assemble("method: ", (name, "bold cyan")), described["description"], 10 + len(name))
        _fields(out, described["fields"], described["required"], {}, {})
    out.print()
    required = inline_schema(cls).get("required", [])
    lines = [f"  - op: {op}", *(f"    {key}: ..." for key in required if key != "op")]
    out.print(Text("In a recipe:\n", style="dim") + Text("\n".join(["operations:", *lines])), soft_wrap=True)


def _settings(out, cls: type[BaseModel], values: BaseModel | None, others: bool) -> None:
    """Print the settings of an operation or a heal block.

    Args:
        values: an object whose values are shown in place of defaults.
        others: name the other methods that the operation has.
    """
    schema = inline_schema(cls)
    if isinstance(values, Variants):
        own, shown = set(type(values).model_fields), schema["properties"]
        fields = {key: field for key, field in shown.items() if key in own}
    elif issubclass(cls, Variants):
        of_methods = {key for method in cls.METHODS.values() for key in describe_method(method)["fields"]}
        fields = {key: field for key, field in schema["properties"].items() if key not in of_methods}
    else:
        fields = schema["properties"]
    fields = {key: field for key, field in fields.items() if key != "op"}
    union = next((base for base in cls.__mro__ if issubclass(base, Variants) and vars(base).get("METHODS")), None)
    if others and union is not None and "method" in fields:
        fields["method"] = fields["method"] | {"enum": list(union.METHODS)}  # type: ignore[attr-defined]
        fields["method"] |= {"description": union.model_fields["method"].description}
    _fields(out, fields, schema.get("required", []), schema.get("$defs", {}), _plain(values))


def _plain(values: BaseModel | None) -> dict:
    return {} if values is None else values.model_dump(mode="json")


def _fields(out, fields: dict[str, dict], required: list[str], known: dict, values: dict) -> None:
    """Print a line for each setting with its name, value or default, and legal values; below it its description."""
    labels = {}
    for name, field in fields.items():
        value = values.get(name, field.get("default"))
        labels[name] = f"{name}=" + ("" if value is None else _written(value))
    width = min(max((len(label) for label in labels.values()), default=0), 24) + 4
    for name, field in fields.items():
        label = Text.assemble("  ", (labels[name], "bold"))
        legal = kind(field, known)
        legal += ", required" if name in required and name not in values else ""
        legal += ", optional" if field.get("default") is None and name not in required else ""
        hanging(out, label, legal, width, "dim")
        if description := field.get("description", ""):
            hanging(out, "", _sentence(description, field.get("default")), 6)


def _sentence(description: str, default: object) -> str:
    """The description with a capital, unless it begins with a value as it is typed: "mean: the mean of all"."""
    typed = description.split()[0] == default or re.match(r"[\w-]+(?:[:,]| \()", description)
    return description if typed else description[:1].upper() + description[1:]


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _override(loaded: Recipe) -> str:
    """An override as an example, one that changes less; "" if none is known."""
    settings = [(operation.op, setting) for operation in loaded.operations if (setting := operation.milder())]
    return "".join(setting if len(loaded.operations) == 1 else f"{op}.{setting}" for op, setting in settings[:1])


def _example(out, command: str) -> None:
    hanging(out, Text("Example:", style="dim"), command, 9)


def parameters(entries: list[Entry], classes: dict[str, type[Operation]], broken: dict[str, str]) -> None:
    """Print recipes with the operations they use, and operations with their fields, for `ls --all`."""
    out = console()
    table = Table("recipe", "uses", "what it does", title="Recipes", title_justify="left", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(entry.name, " + ".join(entry.ops), entry.description)
    show(out, table)
    for op, cls in classes.items():
        out.print(Text.assemble("\n", (op, "bold"), "  ", cls.summary))
        schema, methods = inline_schema(cls), cls.METHODS if issubclass(cls, Variants) else {}
        methods_info = {name: describe_method(method) for name, method in methods.items()}
        own_fields = {key for method_info in methods_info.values() for key in method_info["fields"]}
        common = {name: field for name, field in schema["properties"].items() if name not in own_fields | {"op"}}
        show(out, _table(common, schema))
        for name, method_info in methods_info.items():
            out.print(Text.assemble("  method: ", (name, "bold"), ("  " + method_info["description"], "dim")))
            if method_info["fields"]:
                show(out, _table(method_info["fields"], method_info, indent=4))
    for op, error in broken.items():
        out.print(Text.assemble("\n", (op, "bold red"), "  ", error))


WIDE = 60  # characters; a wider column would push the descriptions out of the terminal


def _table(fields: dict[str, dict], schema: dict, indent: int = 2) -> Table:
    """A row for each field: name, legal values, default, description."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
    for name, field in fields.items():
        empty = "optional" if field.get("default") is None else f"default {_written(field['default'])}"
        default = "required" if name in schema.get("required", []) else empty
        legal = kind(field, schema.get("$defs", {}))
        legal = "one of those below" if name == "method" and len(legal) > WIDE else legal
        table.add_row(" " * indent + name, legal, Text(default, style="dim"), field.get("description", ""))
    return table


HUGE = 1e5  # larger bounds are not shown: they exist only for the file format


def kind(field: dict, known: dict) -> str:
    """The legal values of a field, from its JSON Schema: "mean | first | random", "whole number from 1"."""
    if "$ref" in field:
        return kind(known.get(field["$ref"].rsplit("/", 1)[-1], {}), known)
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    if "anyOf" in field:
        choices = (choice for choice in field["anyOf"] if choice.get("type") != "null")
        return " or ".join(dict.fromkeys(kind(choice, known) for choice in choices))
    if field.get("type") == "array":
        return f"list of {_plural(kind(field.get('items', {}), known))}"
    words = {"integer": "whole number", "string": "text", "boolean": "true | false", "object": "mapping"}
    word = words.get(field.get("type", ""), field.get("type") or "anything")
    return " ".join(filter(None, (word, _range(field))))


def _range(field: dict) -> str:
    """ "from 0 to 1", "above 0 and up to 1", "from 1"."""
    low, above, high, below = (
        None if (bound := field.get(key)) is None or abs(bound) >= HUGE else f"{bound:g}"
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    )
    start = f"from {low}" if low else f"above {above}" if above else ""
    if high:
        end = f"to {high}" if low else f"up to {high}"
    else:
        end = f"below {below}" if below else ""
    return f"{start}, {end}" if start and end and not (low and high) else f"{start} {end}".strip()


def _plural(words: str) -> str:
    """ "whole numbers from 0" for "whole number from 0"."""
    for one, many in (("number", "numbers"), ("text", "texts"), ("mapping", "mappings"), ("list of", "lists of")):
        if one in words and many not in words:
            return words.replace(one, many, 1)
    return words
