"""Shell completion of recipes, models, folders that surgery wrote, and settings. No weight library is imported.

Each function takes the word as typed so far and returns (word, help) pairs. Where it fails it offers nothing, since an
error would be printed into the user's prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

Offer = tuple[str, str]
DEMO = "smollm2-135m"


def _silent(offers: Callable[..., Iterator[Offer]]) -> Callable[..., list[Offer]]:
    """A completion that offers nothing, and prints nothing, where it fails."""

    @functools.wraps(offers)
    def listed(*args: Any, **kwargs: Any) -> list[Offer]:
        try:
            return list(offers(*args, **kwargs))
        except Exception:  # a recipe that is being edited, a folder that may not be read
            return []

    return listed


@_silent
def recipes(incomplete: str) -> Iterator[Offer]:
    """The shipped recipes, and the recipe files in the folder that is typed."""
    from surgery.config import recipe

    for name, info in recipe.descriptions().items():
        yield name, info["description"]
    for path in _below(incomplete):
        if path.suffix in recipe.SUFFIXES:
            yield _as_typed(path, incomplete), ""


@_silent
def recipes_and_operations(incomplete: str) -> Iterator[Offer]:
    """The recipes and operations that `surgery ls NAME` describes."""
    from surgery.operations import builtin_names, third_party

    offered = recipes(incomplete)
    yield from offered
    known = {name for name, _ in offered}
    yield from ((name, "operation") for name in (*builtin_names(), *third_party()) if name not in known)


@_silent
def models(incomplete: str) -> Iterator[Offer]:
    """The demo model, and the model folders in the folder that is typed."""
    yield DEMO, "the demo model"
    yield from _folders_with("config.json", incomplete)


@_silent
def outputs(incomplete: str) -> Iterator[Offer]:
    """The folders that surgery wrote, in the folder that is typed."""
    yield from _folders_with("surgery.json", incomplete)


@_silent
def recipe_settings(ctx: typer.Context, incomplete: str) -> Iterator[Offer]:
    """KEY= for each setting of the recipe that was named, and KEY=VALUE where its values are words."""
    from surgery.config import recipe

    if not (name := ctx.params.get("recipe")):
        return
    data = recipe.read(name)
    steps = [step for step in data.get("operations") or [] if isinstance(step, dict)]
    yield from _offered(ctx, incomplete, _fields_of_recipe(steps, data.get("heal") is not None))


@_silent
def heal_settings(ctx: typer.Context, incomplete: str) -> Iterator[Offer]:
    """KEY= for each field of a heal: block."""
    from surgery.config.heal import Heal
    from surgery.operations.variants import inline_schema

    yield from _offered(ctx, incomplete, inline_schema(Heal)["properties"])


@_silent
def probe_settings(ctx: typer.Context, incomplete: str) -> Iterator[Offer]:
    """KEY= for each setting of the probe that --probe names."""
    from surgery.evaluation import probes

    if name := ctx.params.get("probe"):
        yield from _offered(ctx, incomplete, probes.find(name).model_json_schema()["properties"])


@_silent
def probe_names(incomplete: str) -> Iterator[Offer]:
    """The probes of `surgery eval --probe`."""
    from surgery.evaluation import probes

    yield from ((cls.name, cls.summary) for cls in probes.every())


@_silent
def score_methods(incomplete: str) -> Iterator[Offer]:
    """The ways to score heads."""
    from surgery.operations.head_scorers.scorers import METHODS

    yield from ((name, "") for name in METHODS)


def head_kinds(incomplete: str) -> list[Offer]:
    """The kinds of heads that `surgery score` measures."""
    return [("kv-heads", "a number for each KV head"), ("heads", "a number for each query head")]


def engines(incomplete: str) -> list[Offer]:
    """The ways to convert."""
    return [
        ("auto", "layer by layer if the recipe allows it"),
        ("streaming", "layer by layer"),
        ("loaded", "the model in memory"),
    ]


def devices(incomplete: str) -> list[Offer]:
    """The devices that a model may run on."""
    return [("auto", "a GPU where the model fits, else the CPU"), ("cpu", ""), ("cuda", ""), ("mps", "")]


def dtypes(incomplete: str) -> list[Offer]:
    """The dtypes that a model may run in."""
    return [("auto", "that of the weights"), ("float32", ""), ("bfloat16", ""), ("float16", ""), ("float64", "")]


def serving_engines(incomplete: str) -> list[Offer]:
    """The engines of `surgery export --for`."""
    from surgery.engines import ENGINES

    return [(name, "") for name in ENGINES]


@_silent
def weight_types(ctx: typer.Context, incomplete: str) -> Iterator[Offer]:
    """The number formats of `surgery export --type`, of the engine that --for names."""
    from surgery.engines import ENGINES, find

    yield from ((kind, "") for kind in find(ctx.params.get("engine") or next(iter(ENGINES))).types)


def _fields_of_recipe(steps: list[dict], heals: bool) -> dict[str, dict]:
    """Key -> JSON Schema of its field, by its dotted key; also by its bare key, where only one operation has it."""
    from surgery import operations
    from surgery.config.evaluate import Evaluate
    from surgery.config.heal import Heal
    from surgery.operations.variants import inline_schema

    fields: dict[str, dict] = {}
    ops = [str(step.get("op")) for step in steps]
    schemas = {op: inline_schema(operations.find(op))["properties"] for op in dict.fromkeys(ops)}
    owners = [key for op in ops for key in schemas[op]]
    for op, schema in schemas.items():
        for key, field in schema.items():
            if key != "op":
                fields |= {key: field} if owners.count(key) == 1 else {}
                fields[f"{op}.{key}"] = field
    sections = {"evaluate": Evaluate.model_json_schema()["properties"]}
    sections |= {"heal": inline_schema(Heal)["properties"]} if heals else {}
    return fields | {f"{name}.{key}": field for name, section in sections.items() for key, field in section.items()}


def _offered(ctx: typer.Context, incomplete: str, fields: dict[str, dict]) -> Iterator[Offer]:
    """KEY= for each field; KEY=VALUE where the field takes words and the user has typed the start of the key.

    bash splits words at `=`: for "method=me" it asks to complete "me", after the words "method" and "=".
    """
    typed = [*(ctx.params.get("overrides") or ctx.params.get("settings") or ()), *ctx.args]
    if len(typed) > 1 and typed[-1] == "=":
        yield from ((value, "") for value in _values(fields.get(typed[-2], {})))
        return
    # There are many dotted keys. They are offered only after a dot, or where no bare key fits.
    dotted = "." in incomplete or not any(key.startswith(incomplete) for key in fields if "." not in key)
    for key, field in fields.items():
        if dotted or "." not in key:
            values = _values(field) if incomplete else []
            yield from ((f"{key}={value}", field.get("description", "")) for value in values or [""])


def _values(field: dict) -> list[str]:
    """The words that a field takes."""
    choices = [field, *field.get("anyOf", ())]
    words = [value for choice in choices for value in choice.get("enum", [choice.get("const")])]
    if any(choice.get("type") == "boolean" for choice in choices):
        words += ["true", "false"]
    return [str(word) for word in words if word is not None]


def _below(incomplete: str) -> list[Path]:
    """The files and folders in the folder that was typed so far, without hidden ones."""
    folder = Path(incomplete).expanduser() if incomplete.endswith("/") else Path(incomplete).expanduser().parent
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _folders_with(name: str, incomplete: str) -> Iterator[Offer]:
    for path in _below(incomplete):
        if (path / name).is_file():
            yield _as_typed(path, incomplete), ""


def _as_typed(path: Path, incomplete: str) -> str:
    """The path in the user's spelling: "out", "./out", "~/out"."""
    return incomplete[: incomplete.rfind("/") + 1] + path.name
