"""Overrides of a recipe: "key=value" texts, typed by a user or made from keywords."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, get_args

import yaml

from surgery import operations
from surgery.config.heal import BUDGETS
from surgery.config.yaml import parse
from surgery.errors import RecipeError, SurgeryError, nearest, shown
from surgery.evaluation.probes.settings import assign
from surgery.io.files import MAX_DEPTH, too_deep
from surgery.operations.variants import keys_of


class _WrittenOut(yaml.SafeDumper):
    """Writes an object that occurs several times in full each time: anchors are not allowed in a recipe."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_WrittenOut.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def copy_of(data: dict, where: str) -> dict:
    """A copy of a recipe's data that overrides may change; `where` names the data in messages.

    Raises:
        SurgeryError: the data is not plain, or is nested too deep.
    """
    with _plain(data, where):
        return yaml.safe_load(yaml.dump(data, Dumper=_WrittenOut))


def as_text(key: str, value: object) -> str:
    """A keyword as the override that a user would type; raises as `copy_of` does."""
    with _plain(value, key):
        form = {"default_flow_style": True, "allow_unicode": True, "width": float("inf")}
        written = yaml.dump(value, Dumper=_WrittenOut, **form)
    return f"{key}={written.removesuffix(chr(10)).removesuffix('...').strip()}"


@contextmanager
def _plain(data: object, where: str) -> Iterator[None]:
    if too_deep(data):
        raise RecipeError(f"this is nested more than {MAX_DEPTH} levels deep", where=where)
    try:
        yield
    except (yaml.YAMLError, ValueError) as error:
        what = f"a recipe holds plain data only: {error.args[0]!s}"
        raise RecipeError(f"{what} ({type(error.args[-1]).__name__})", where=where) from None


def set_field(data: dict, text: str, sections: dict[str, Collection[str]]) -> tuple:
    """Set one field in place and return its path.

    Args:
        data: a recipe as plain data, not checked yet.
        text: "key=value" or "op.key=value".
        sections: the keys of `evaluate`, of the blocks in it, and of `heal`, by dotted name.

    Raises:
        SurgeryError: no such field, a key that could mean several fields, or a text that is not key=value.
    """
    key, equals, value = text.partition("=")
    key, where = key.strip(), f"override {shown(text)}"
    if not equals or not key:
        raise RecipeError("an override is written key=value", where=where)
    value, _ = parse(value, where, field=0)
    steps = data.get("operations")
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    paths = _paths(steps, key, sections)
    if len(paths) > 1:
        names = [".".join(map(str, path)) for path in paths]
        raise RecipeError(f"{key!r} could mean several fields", where=where, exists=", ".join(names), fix="write one")
    if not paths:
        known = _known_keys(steps, sections)
        close, heals = nearest(key, known), key.startswith("heal") or data.get("heal")
        raise RecipeError(
            f"no field {shown(key)} in this recipe",
            where=where,
            exists=", ".join(name for name in known if heals or not name.startswith("heal.")),
            fix=f"did you mean {close!r}?" if close else "",
        )
    *parents, last = paths[0]
    if parents and parents[0] == "evaluate" and isinstance(data.get("evaluate"), dict | None):
        data["evaluate"] = data.get("evaluate") or {}
        return ("evaluate", *assign(data["evaluate"], paths[0][1:], value))
    target: Any = data
    for step in parents:
        if isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
        target = target[step] if isinstance(target, dict | list) else None
    if isinstance(target, dict):  # otherwise the check of the recipe reports the value that is there
        target[last] = value
        if parents == ["heal"] and last in BUDGETS and value is not None:  # replaces the recipe's budget
            for other in set(BUDGETS) - {last}:
                target.pop(other, None)
    return paths[0]


def _paths(steps: list[dict], key: str, sections: dict[str, Collection[str]]) -> list[tuple]:
    """Paths in the recipe that an override's key can mean."""
    head, dot, tail = key.rpartition(".")
    if dot and not head:  # ".kv_heads"
        return []
    if head.startswith("operations.") and (number := head.split(".")[1]).isdecimal():
        numbers = {str(index): index for index in range(len(steps))}
        return [("operations", numbers[number], tail)] if number in numbers else []
    if key.startswith("evaluate.probes."):  # the check of the recipe refuses unknown keys
        return [tuple(key.split("."))]
    if tail in sections.get(head, ()):
        return [(head, tail)]
    if not head and key in ("name", "description", "evaluate", "heal"):
        return [(key,)]
    paths = [
        ("operations", i, tail)
        for i, step in enumerate(steps)
        if (not head or step.get("op") == head) and tail in _fields(step)
    ]
    if not paths and head:  # a key of a field that holds settings of its own
        op, _, field = head.rpartition(".")
        paths += [
            ("operations", i, field, tail)
            for i, step in enumerate(steps)
            if (not op or step.get("op") == op) and field in _fields(step) and _holds_settings(step, field)
        ]
    if not paths and tail in sections.get(f"evaluate.probes.{head}", ()):
        paths.append(("evaluate", "probes", head, tail))
    if not head and tail in sections["evaluate"]:  # keys of heal need their full name: operations share them
        paths.append(("evaluate", tail))
    return paths


def _holds_settings(step: dict, field: str) -> bool:
    """Whether a field of an operation is a mapping from settings to values."""
    try:
        info = operations.find(str(step.get("op"))).model_fields.get(field)
    except SurgeryError:
        return False
    return info is not None and dict[str, Any] in (info.annotation, *get_args(info.annotation))


def _fields(step: dict) -> list[str]:
    try:
        return [name for name in keys_of(operations.find(str(step.get("op")))) if name != "op"]
    except SurgeryError:
        return [name for name in step if name != "op"]


def _known_keys(steps: list[dict], sections: dict[str, Collection[str]]) -> list[str]:
    keys = [name for step in steps for name in _fields(step)]
    named = {section: names for section, names in sections.items() if not section.startswith("evaluate.probes")}
    return list(dict.fromkeys([*keys, *(f"{section}.{name}" for section in named for name in named[section])]))
