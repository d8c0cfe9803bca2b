"""Recipes: the schema, loading by name or path, overrides, and errors that name file, line and nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from surgery import operations
from surgery.config.evaluate import Evaluate, sections
from surgery.config.heal import Heal
from surgery.config.overrides import as_text, set_field
from surgery.config.yaml import MAX_BYTES, files_elsewhere, line_of, parse
from surgery.errors import SurgeryError, nearest, shown, wanted
from surgery.evaluation.probes import find as find_probe
from surgery.evaluation.probes import settings as probe_settings
from surgery.evaluation.probes.base import OWN_WORDS
from surgery.operations.base import Operation

SUFFIXES = (".yaml", ".yml")


SECTIONS = {"evaluate": Evaluate, "heal": Heal}  # keys of a recipe whose value is a mapping of fields
PROBES, BLOCK = ("evaluate", "probes"), 4  # path of the probes' blocks, and steps to a setting in one


def _whole(value: object) -> object:
    """To Python, and so to a Literal, true and 1.0 equal 1."""
    if type(value) is not int:
        raise PydanticCustomError("literal_error", "Input should be 1")
    return value


class Recipe(BaseModel):
    """An ordered list of operations, and how the result is healed and judged."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Annotated[Literal[1], BeforeValidator(_whole)] = Field(description="Version of this format.")
    name: str = Field(min_length=1, description="Name of the recipe.")
    description: str = Field("", description="One line on what it does.")
    operations: Annotated[list[Any], Field(min_length=1, description="What is done, in this order.")]
    heal: Heal | None = Field(None, description="Training after the surgery; null trains nothing.")
    evaluate: Evaluate | None = Field(Evaluate(), description="Text and gate; null evaluates nothing.")

    _source: str = PrivateAttr("data")
    _overrides: tuple[str, ...] = PrivateAttr(())

    @property
    def source(self) -> str:
        """The name of the shipped recipe that this began as; "file" (a user's own) or "data"."""
        return self._source

    @property
    def overrides(self) -> tuple[str, ...]:
        """What was changed in it, as texts "key=value"."""
        return self._overrides

    @field_validator("operations")
    @classmethod
    def _checked(cls, steps: list, info) -> list:
        # `load` checks operations itself, to show all faults of a recipe with their lines.
        if info.context is None and (wrong := [step for step in steps if not isinstance(step, Operation)]):
            raise SurgeryError(
                f"a Recipe holds operations, this is {shown(wrong[0])}",
                where="operations",
                fix="give plain data to surgery.plan or surgery.apply in place of a Recipe: {'version': 1, ...}",
            )
        return steps

    def to_dict(self) -> dict:
        """Plain data, every default written out."""
        return self.model_dump(mode="json") | {"operations": [op.model_dump(mode="json") for op in self.operations]}


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    from surgery import recipes

    files = [file for folder in recipes.__path__ for file in sorted(Path(folder).glob("*.yaml"))]
    return {file.stem: file for file in files}


def descriptions() -> dict[str, dict]:
    """Name -> description and operations (`ops`) of every shipped recipe."""
    found = {name: parse(_read(file), str(file))[0] for name, file in shipped().items()}
    return {
        name: {"description": data.get("description", ""), "ops": [step["op"] for step in data["operations"]]}
        for name, data in found.items()
    }


def copy(name: str | Path, target: Path | None = None) -> Path:
    """Write a recipe's file to `target` (default: here, under its own name); never over an existing file."""
    source = find(name)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise SurgeryError("the file exists", where=str(target), fix="name another file: surgery cp NAME FILE")
    from surgery.io.output_folder import machine_errors

    with machine_errors(target):
        target.write_text(_read(source), encoding="utf-8")
    return target


def find(name: str | Path) -> Path:
    """The file of a recipe given by name or path."""
    path = Path(name)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        if path.is_file():
            return path
        what = "is a folder, not a recipe" if path.is_dir() else "does not exist"
        raise SurgeryError(f"the recipe file {what}", where=str(path), fix="`surgery cp NAME` writes one here to edit")
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    close = nearest(str(name), known)
    raise SurgeryError(
        f"unknown recipe {str(name)!r}",
        exists=", ".join(known),
        fix=f"did you mean {close!r}?" if close else "a path to a file of yours ends in .yaml",
    )


def load(recipe: str | Path | dict | Recipe, overrides: list[str] | tuple[str, ...] = (), **fields) -> Recipe:
    """A checked recipe.

    Args:
        recipe: name, path, plain data or a `Recipe`.
        overrides: "key=value" or "op.key=value" texts, as on the command line.
        fields: the same as keywords, for Python.

    Raises:
        SurgeryError: with every fault of the recipe at once.
    """
    lines: dict = {}
    source, earlier = "data", ()
    if isinstance(recipe, Recipe):
        data, where, source, earlier = recipe.to_dict(), recipe.name, recipe.source, recipe.overrides
        if data["evaluate"] is not None:
            data["evaluate"] = probe_settings.without_defaults(data["evaluate"])
    elif isinstance(recipe, dict):
        data, where = recipe, "recipe"
    else:
        path = find(recipe)
        data, lines = parse(_read(path), str(path))
        where, source = str(path), path.stem if path in shipped().values() else "file"
    if not isinstance(data, dict):
        raise SurgeryError(
            "the recipe is empty" if data is None else "a recipe is a mapping of keys",
            where=where,
            exists=f"keys: {', '.join(Recipe.model_fields)}",
            fix="`surgery cp gqa` writes one to start from",
        )
    try:
        data = yaml.safe_load(yaml.safe_dump(data))  # a copy that overrides may change
        changes = [*overrides, *(as_text(key, value) for key, value in fields.items())]
    except (yaml.YAMLError, ValueError) as error:
        what = f"a recipe holds plain data only: {error.args[0]!s}"
        raise SurgeryError(f"{what} ({type(error.args[-1]).__name__})", where=where) from None
    for override in changes:
        place = set_field(data, override, sections() | {"heal": list(Heal.model_fields)})
        lines = {path: line for path, line in lines.items() if path[: len(place)] != place}
        lines[place] = f"override {override.strip()!r}"
        if place[: len(PROBES)] == PROBES:  # what is wrong with settings together is wrong with their block
            lines[place[: BLOCK - 1]] = lines[place]
    checked = _validate(data, lines, where)
    checked._source, checked._overrides = source, (*earlier, *map(str.strip, changes))
    return checked


def schema() -> dict:
    """JSON Schema of a recipe, with the fields of every operation that loads."""
    full = Recipe.model_json_schema()
    classes, _ = operations.catalogue()
    full["properties"]["operations"]["items"] = {
        "oneOf": [_required_op(cls.model_json_schema(), op) for op, cls in classes.items()]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **full}


def _required_op(part: dict, op: str) -> dict:
    part["properties"]["op"] = {"const": op, "type": "string"}
    part["required"] = ["op", *(name for name in part.get("required", []) if name != "op")]
    return part


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        what = f"the file has {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}"
        raise SurgeryError(what, where=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SurgeryError("the file is not UTF-8 text", where=str(path)) from None


def _validate(data: dict, lines: dict, where: str) -> Recipe:
    faults: list[SurgeryError] = []
    steps: list[Operation] = []
    raw = data.get("operations")
    for i, step in enumerate(raw if isinstance(raw, list) else []):
        path = ("operations", i)
        if not isinstance(step, dict) or not isinstance(step.get("op"), str):
            faults.append(SurgeryError("an operation is a mapping with the key op", where=line_of(lines, path, where)))
            continue
        try:
            cls = operations.find(step["op"])
            steps.append(cls.model_validate(step))
        except SurgeryError as error:
            faults.append(
                SurgeryError(
                    error.what, where=line_of(lines, (*path, "op"), where), exists=error.exists, fix=error.fix
                )
            )
        except ValidationError as error:
            faults += faults_of(error, lines, where, path, list(cls.model_fields))
    faults += files_elsewhere(data, lines, where)
    try:
        given = {"operations": steps or raw} if isinstance(raw, list) else {}
        recipe = Recipe.model_validate(data | given, context="load")
    except ValidationError as error:
        faults = faults_of(error, lines, where, (), list(Recipe.model_fields)) + faults
    if faults:
        first, *rest = sorted(faults, key=_line_number)
        raise SurgeryError(first.what, where=first.where, exists=first.exists, fix=first.fix, others=tuple(rest))
    return recipe


def faults_of(error: ValidationError, lines: dict, where: str, prefix: tuple, known: list[str]) -> list[SurgeryError]:
    """One sentence for each of pydantic's complaints; alternatives of one field are joined.

    Args:
        lines, where: as for `line_of`.
        prefix: path of what was validated.
        known: its keys.
    """
    by_path: dict[tuple, list[dict]] = {}
    for item in error.errors(include_url=False):
        depth = next((n for n, step in enumerate(item["loc"]) if step in known), 0) + 1
        loc = item["loc"] if item["loc"] and item["loc"][0] in SECTIONS else item["loc"][:depth]
        path = (*prefix, *item["loc"])[:BLOCK]
        by_path.setdefault(path if path[:2] == PROBES else (*prefix, *loc), []).append(item)
    faults = []
    for path, items in by_path.items():
        if path[:2] == PROBES and len(path) > 2:
            faults.append(_fault_of_probe(path, items, line_of(lines, path, where)))
            continue
        key, names = path[-1], list(SECTIONS[path[0]].model_fields) if len(path) > 1 and path[0] in SECTIONS else known
        at, kind = line_of(lines, path, where), items[0]["type"]
        if kind == "extra_forbidden":
            close = nearest(key, names)
            fix = f"did you mean {close!r}?" if close else ""
            faults.append(SurgeryError(f"unknown key {key!r}", where=at, exists=", ".join(names), fix=fix))
        elif kind == "missing":
            faults.append(SurgeryError(f"the key {key!r} is missing", where=at))
        elif kind == "heal":  # in words of its own, often of its fields together
            said = items[0]["ctx"]
            faults.append(SurgeryError(said["text"], where=at, exists=said["exists"], fix=said["fix"]))
        elif kind == OWN_WORDS:
            faults.append(SurgeryError(items[0]["msg"], where=at, fix=items[0]["ctx"]["fix"]))
        else:
            faults.append(SurgeryError(f"{key} should be {wanted(items)}; it is {shown(items[0]['input'])}", where=at))
    return faults


def _fault_of_probe(path: tuple, items: list[dict], where: str) -> SurgeryError:
    """What is wrong at `evaluate.probes.NAME` or below."""
    _, _, name, *key = path
    if key or items[0]["type"] == OWN_WORDS:
        return probe_settings.fault(find_probe(name), str(key[0]) if key else "", items, where, in_recipe=True)
    try:
        find_probe(name)
    except SurgeryError as error:
        return SurgeryError(error.what, where=where, exists=error.exists, fix=error.fix)
    return SurgeryError(f"{name} should be {wanted(items)}; it is {shown(items[0]['input'])}", where=where)


def _line_number(fault: SurgeryError) -> int:
    line = fault.where.rpartition(":")[2]
    return int(line) if line.isdigit() else 0
