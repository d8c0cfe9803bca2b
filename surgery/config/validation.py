"""Check a mapping of fields against its class, or the class of its method; faults name the recipe's keys."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from surgery.config.yaml import line_of
from surgery.errors import RecipeError, SurgeryError, any_of, nearest, number_meant, shown, wanted
from surgery.evaluation.probes import find as find_probe
from surgery.evaluation.probes import settings as probe_settings
from surgery.evaluation.probes.fields import SETTINGS_ERROR
from surgery.operations.variants import OTHER_METHOD, Variants, keys_of

LIMITS = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}
PROBES, BLOCK = ("evaluate", "probes"), 4  # path of the probes' blocks, and the length of a setting's path


def checked(
    kind: type[BaseModel], fields: object, lines: dict, where: str, path: tuple
) -> tuple[Any, list[SurgeryError]]:
    """An object of a class, or of one of its methods, and every fault of its fields.

    Args:
        kind: the class. If it stands for several methods, the field `method` chooses one of them.
        fields: the mapping in the recipe.
        lines, where: as for `line_of`.
        path: the path of the mapping in the recipe.

    Returns:
        The object (None where there are faults), and the faults.
    """
    if isinstance(fields, kind):
        return fields, []
    if not isinstance(fields, dict):
        what = f"{path[-1]} should be a mapping of keys; it is {shown(fields)}"
        return None, [RecipeError(what, where=line_of(lines, path, where))]
    if not issubclass(kind, Variants) or not kind.is_union():
        return _validated(kind, fields, lines, where, path)
    method = fields.get("method", kind.default_method())
    if isinstance(method, str) and method in kind.METHODS:
        return _validated(kind.variant(method), fields, lines, where, path)
    # The rest is checked with the method that was probably meant. A field that only other methods read may be right.
    meant = kind.variant(nearest(method, kind.METHODS) if isinstance(method, str) else None)
    rest = {key: value for key, value in fields.items() if key in meant.model_fields or not kind.readers(key)}
    _, faults = _validated(meant, rest | {"method": meant.own_method()}, lines, where, path)
    own = {f"the key {key!r} is missing" for key in meant.model_fields.keys() - kind.model_fields.keys()}
    return None, [_unknown_method(kind, fields, lines, where, path), *(x for x in faults if x.what not in own)]


def _validated(
    kind: type[BaseModel], fields: dict, lines: dict, where: str, path: tuple
) -> tuple[Any, list[SurgeryError]]:
    try:
        return kind.model_validate(fields), []
    except ValidationError as error:
        return None, faults_of(error, lines, where, path, kind)


def _unknown_method(kind: type[Variants], fields: dict, lines: dict, where: str, path: tuple) -> SurgeryError:
    """The fault for a method that is missing or unknown."""
    at, names = line_of(lines, (*path, "method"), where), any_of([repr(name) for name in kind.METHODS])
    if "method" not in fields:
        return RecipeError("the key 'method' is missing", where=at, exists=", ".join(kind.METHODS))
    method = fields["method"]
    close = nearest(method, kind.METHODS) if isinstance(method, str) else ""
    fix = f"did you mean {close!r}?" if close else ""
    return RecipeError(f"method should be {names}; it is {shown(method)}", where=at, fix=fix)


def faults_of(
    error: ValidationError, lines: dict, where: str, prefix: tuple, kind: type[BaseModel]
) -> list[SurgeryError]:
    """One fault for each of pydantic's errors; errors on the alternatives of one field are joined.

    Args:
        lines, where: as for `line_of`.
        prefix: the path of the mapping that was validated.
        kind: the class that it was validated with.
    """
    known = list(kind.model_fields)
    by_path: dict[tuple, list[Any]] = {}
    for item in error.errors(include_url=False):
        path = (*prefix, *item["loc"])[:BLOCK]
        if path[:2] != PROBES:
            depth = next((n for n, step in enumerate(item["loc"]) if step in known), 0) + 1
            path = (*prefix, *item["loc"][:depth])
        by_path.setdefault(path, []).append(item)
    return [_fault(items, kind, line_of(lines, path, where), path) for path, items in by_path.items()]


def _fault(items: list[Any], kind: type[BaseModel], at: str, path: tuple) -> SurgeryError:
    if path[:2] == PROBES and len(path) > 2:
        return _fault_of_probe(path, items, at)
    key, what = path[-1], items[0]["type"]
    if what == "extra_forbidden":
        return _unknown_key(key, kind, at)
    if what == "missing":
        return RecipeError(f"the key {key!r} is missing", where=at)
    if what == "heal":  # with its own message, often about several fields
        context = items[0]["ctx"]
        return RecipeError(context["text"], where=at, exists=context["exists"], fix=context["fix"])
    if what == SETTINGS_ERROR:
        return RecipeError(items[0]["msg"], where=at, fix=items[0]["ctx"]["fix"])
    if what == OTHER_METHOD:
        own = ", ".join(name for name in kind.model_fields if name not in ("op", "method"))
        return RecipeError(items[0]["msg"], where=at, exists=own)
    what = f"{key} should be {wanted(items)}; it is {shown(items[0]['input'])}"
    return RecipeError(what, where=at, fix=number_meant(items) or _range_of(kind, key))


def _range_of(kind: type[BaseModel], key: Any) -> str:
    """How to give a number that has two limits; "" for another field."""
    limits = kind.model_fields[key].metadata if key in kind.model_fields else []
    found = {name: getattr(each, name) for each in limits for name in LIMITS if hasattr(each, name)}
    words = [
        f"{LIMITS[name]} {found[name]:{',' if isinstance(found[name], int) else 'g'}}"
        for name in LIMITS
        if name in found
    ]
    annotation = kind.model_fields[key].annotation if found else None
    whole = "whole " * (int in (annotation, *get_args(annotation)))
    return f"a {whole}number {', '.join(words)}" if len(words) > 1 else ""


def _fault_of_probe(path: tuple, items: list[Any], where: str) -> SurgeryError:
    """The fault at `evaluate.probes.NAME` or below."""
    _, _, name, *key = path
    if key or items[0]["type"] == SETTINGS_ERROR:
        return probe_settings.fault(find_probe(name), str(key[0]) if key else "", items, where, in_recipe=True)
    try:
        find_probe(name)
    except SurgeryError as error:
        return SurgeryError(error.what, where=where, exists=error.exists, fix=error.fix, code=error.code)
    return RecipeError(f"{name} should be {wanted(items)}; it is {shown(items[0]['input'])}", where=where)


def _unknown_key(key: Any, kind: type[BaseModel], at: str) -> SurgeryError:
    known = list(kind.model_fields)
    fix = f"did you mean {close!r}?" if (close := nearest(key, known)) else ""
    others = [name for name in keys_of(kind) if name not in known]
    if issubclass(kind, Variants) and (other := nearest(key, others, cutoff=0.6)) and _closer(key, other, close):
        fix = f"did you mean {other!r}, of method: {any_of(kind.readers(other))}?"
    return RecipeError(f"unknown key {key!r}", where=at, exists=", ".join(known), fix=fix)


def _closer(word: Any, one: str, other: str) -> bool:
    """Whether `one` is closer to `word` than `other` is."""
    return not other or nearest(word, [other, one]) == one
