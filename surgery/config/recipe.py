"""Recipes: the schema, loading by name or path, overrides, and errors that name file, line and nearest key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from surgery import operations
from surgery.config.evaluate import Evaluate, sections
from surgery.config.heal import Heal
from surgery.config.heal_overrides import idle
from surgery.config.overrides import as_text, copy_of, set_field
from surgery.config.validation import BLOCK, PROBES, checked, faults_of
from surgery.config.yaml import MAX_BYTES, files_elsewhere, line_of, parse
from surgery.errors import OutputExistsError, RecipeError, SurgeryError, nearest, shown
from surgery.evaluation.lengths import too_short
from surgery.evaluation.probes import settings as probe_settings
from surgery.operations.base import Operation
from surgery.operations.variants import Variants, inline_schema, keys_of, method_schema

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUFFIXES = (".yaml", ".yml")


SECTIONS = {"evaluate": Evaluate, "heal": Heal}  # keys of a recipe whose value is a mapping of fields


def _version(value: object) -> object:
    """The version, if it is an int: Python, and so a Literal, would take true and 1.0 for 1."""
    if type(value) is not int:
        raise PydanticCustomError("literal_error", "Input should be 1")
    return value


class Recipe(BaseModel):
    """An ordered list of operations, and how the result is healed and judged."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Annotated[Literal[1], BeforeValidator(_version)] = Field(description="Version of this format.")
    name: str = Field(min_length=1, description="Name of the recipe.")
    description: str = Field("", description="One line on what it does.")
    operations: Annotated[list[Any], Field(min_length=1, description="What is done, in this order.")]
    heal: Heal | None = Field(None, description="Training after the surgery; null trains nothing.")
    evaluate: Evaluate | None = Field(Evaluate(), description="Text and gate; null evaluates nothing.")

    _source: str = PrivateAttr("data")
    _overrides: tuple[str, ...] = PrivateAttr(())

    @property
    def source(self) -> str:
        """The name of the shipped recipe that was loaded; "file" for a user's file, "data" for plain data."""
        return self._source

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides that were applied to it, as "key=value" texts."""
        return self._overrides

    @field_validator("operations")
    @classmethod
    def _checked(cls, steps: list, info) -> list:
        # `load` checks operations itself, to show all faults of a recipe with their lines.
        if info.context is None and (wrong := [step for step in steps if not isinstance(step, Operation)]):
            raise RecipeError(
                f"a Recipe holds operations, this is {shown(wrong[0])}",
                where="operations",
                fix="give plain data to surgery.plan or surgery.apply in place of a Recipe: {'version': 1, ...}",
            )
        return steps

    def cut_to(self, config: PretrainedConfig) -> tuple[Recipe, list[str]]:
        """The recipe with windows and prompts of its evaluation no longer than a model with this config takes.

        Returns:
            The recipe, and a sentence for each setting that was cut.
        """
        if self.evaluate is None:
            return self, []
        settings, notes = probe_settings.cut_to(self.evaluate.model_dump(), config)
        return (self.model_copy(update={"evaluate": Evaluate.model_validate(settings)}) if notes else self), notes

    def too_short(self, length: int, rows: str, key: str, positions: int | None = None) -> str:
        """Why rows of `length` tokens are too short to show what an operation changes; "" if they are not.

        Args:
            rows: the name of the rows in the plural ("windows").
            key: the setting of their length ("evaluate.length").
            positions: the most positions that the model takes; None: unknown.
        """
        most = max(self.operations, key=lambda operation: operation.unchanged_within)
        return too_short(length, most.unchanged_within, most.op, rows=rows, key=key, positions=positions)

    def to_dict(self) -> dict:
        """Plain data, every default written out."""
        return self.model_dump(mode="json") | {"operations": [op.model_dump(mode="json") for op in self.operations]}

    def identity(self) -> dict:
        """The data that surgery.json records and that resume hashes: `to_dict` and other methods' fields, unset."""
        steps = [op.identity() if isinstance(op, Variants) else op.model_dump(mode="json") for op in self.operations]
        heal = {"heal": self.heal.identity()} if self.heal else {}
        return self.to_dict() | {"operations": steps} | heal


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    from surgery import recipes

    files = [file for folder in recipes.__path__ for file in sorted(Path(folder).glob("*.yaml"))]
    return {file.stem: file for file in files}


def descriptions() -> dict[str, dict]:
    """Name -> description and operations (`ops`) of every shipped recipe."""
    recipes = {name: parse(_read(file), str(file))[0] for name, file in shipped().items()}
    return {
        name: {"description": data.get("description", ""), "ops": [step["op"] for step in data["operations"]]}
        for name, data in recipes.items()
    }


def read(name: str | Path) -> dict[str, Any]:
    """A recipe's file as plain data, unchecked, by name or path; {} where it holds no mapping."""
    path = find(name)
    data, _ = parse(_read(path), str(path))
    return data if isinstance(data, dict) else {}


def text_of(name: str | Path) -> str:
    """The text of a recipe's file, by name or path."""
    return _read(find(name))


def copy(name: str | Path, target: Path | None = None) -> Path:
    """Write a recipe's file to `target` (default: here, under its own name); an error if that file exists."""
    source = find(name)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise OutputExistsError("the file exists", where=str(target), fix="name another file: surgery cp NAME FILE")
    from surgery.io.files import write_text
    from surgery.io.output_folder import machine_errors

    with machine_errors(target):
        write_text(target, _read(source))
    return target


def find(name: str | Path) -> Path:
    """The file of a recipe given by name or path."""
    path = Path(name)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        if path.is_file():
            return path
        what, fix = "the recipe file does not exist", "`surgery cp NAME` writes one here to edit"
        if path.is_dir():
            what = "this is a folder, and a recipe is wanted"
            fix = "the recipe comes first, then the model" if (path / "config.json").is_file() else fix
        raise SurgeryError(what, where=str(path), fix=fix, code="unknown-recipe")
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    close = nearest(str(name), known)
    mine = next((file for suffix in SUFFIXES if (file := Path(f"{name}{suffix}")).is_file()), None)
    fix = f"did you mean {close!r}?" if close else "a path to a file of yours ends in .yaml"
    fix = "the recipe comes first, then the model" if (path / "config.json").is_file() else fix
    raise SurgeryError(
        f"unknown recipe {str(name)!r}",
        exists=", ".join(known),
        fix=f"did you mean {str(mine)!r}?" if mine else fix,
        code="unknown-recipe",
    )


def load(recipe: str | Path | dict | Recipe, overrides: Sequence[str] = (), **fields) -> Recipe:
    """Load a recipe and check it.

    Args:
        recipe: name, path, plain data or a `Recipe`.
        overrides: "key=value" or "op.key=value" texts, as on the command line.
        fields: the same overrides as keywords, for Python.

    Raises:
        SurgeryError: it lists every fault of the recipe.
    """
    lines: dict = {}
    source, earlier = "data", ()
    if isinstance(recipe, Recipe):
        data, where, source, earlier = recipe.to_dict(), recipe.name, recipe.source, recipe.overrides
        if data["evaluate"] is not None:
            data["evaluate"] = probe_settings.without_defaults(data["evaluate"])
    elif isinstance(recipe, dict):
        data, where = recipe, "recipe"
    elif not isinstance(recipe, str | Path):
        fix = "give the name of a recipe (surgery ls), the path of a .yaml file, or plain data: {'version': 1, ...}"
        raise SurgeryError(f"{shown(recipe)} is not a recipe", fix=fix)
    else:
        path = find(recipe)
        data, lines = parse(_read(path), str(path))
        where, source = str(path), path.stem if path in shipped().values() else "file"
    if not isinstance(data, dict):
        raise RecipeError(
            "the recipe is empty" if data is None else "a recipe is a mapping of keys",
            where=where,
            exists=f"keys: {', '.join(Recipe.model_fields)}",
            fix="`surgery cp gqa` writes one to start from",
        )
    data = copy_of(data, where)
    changes = [*overrides, *(as_text(key, value) for key, value in fields.items())]
    lines, faults = _override(data, changes, lines)
    try:
        loaded = _validate(data, lines, where)
    except SurgeryError as error:
        faults += [_together([error]), *error.others]
    if faults:
        raise _together(faults)
    loaded._source, loaded._overrides = source, (*earlier, *map(str.strip, changes))
    return loaded


def _override(data: dict, changes: Sequence[str], lines: dict) -> tuple[dict, list[SurgeryError]]:
    """Set the fields that overrides name in a recipe's data, in place.

    Values of its `heal:` block that an override leaves without use are removed, unless they were typed.

    Returns:
        The lines of the fields, for messages, and the faults of the overrides.
    """
    faults: list[SurgeryError] = []
    idle_before, typed = idle(data.get("heal")), set()
    for override in changes:
        try:
            field_path = set_field(data, override, sections() | {"heal": keys_of(Heal)})
        except SurgeryError as error:
            if faults and faults[-1].exists == error.exists:  # the same keys are listed once
                last = faults[-1]
                faults[-1] = SurgeryError(last.what, where=last.where, fix=last.fix, code=last.code)
            faults.append(error)
            continue
        lines = {path: line for path, line in lines.items() if path[: len(field_path)] != field_path}
        lines[field_path] = f"override {override.strip()!r}"
        typed |= {field_path[-1]} if field_path[0] == "heal" else set()
        if field_path[: len(PROBES)] == PROBES:  # settings that disagree are reported at their block
            lines[field_path[: BLOCK - 1]] = lines[field_path]
    for name in idle(data.get("heal")) - idle_before - typed if typed else ():
        del data["heal"][name]
    return lines, faults


def recorded(data: dict) -> Recipe | None:
    """The recipe that a surgery.json records; None where this version or this machine lacks its operations."""
    try:
        return load(data["recipe"])
    except SurgeryError:
        return None


def schema() -> dict:
    """JSON Schema of a recipe, with the fields of every operation that loads."""
    full = Recipe.model_json_schema()
    full["$defs"] |= {cls.__name__: method_schema(cls) for cls in Heal.METHODS.values()}
    classes, _ = operations.catalogue()
    full["properties"]["operations"]["items"] = {
        "oneOf": [_required_op(inline_schema(cls), op) for op, cls in classes.items()]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **full}


def _required_op(schema: dict, op: str) -> dict:
    schema["properties"]["op"] = {"const": op, "type": "string"}
    schema["required"] = ["op", *(name for name in schema.get("required", []) if name != "op")]
    for method in schema.get("oneOf", []):
        _required_op(method, op)
    return schema


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        what = f"the file has {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}"
        raise RecipeError(what, where=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError("the file is not UTF-8 text", where=str(path)) from None


def _validate(data: dict, lines: dict, where: str) -> Recipe:
    faults: list[SurgeryError] = []
    steps: list[Operation] = []
    raw = data.get("operations")
    for index, step in enumerate(raw if isinstance(raw, list) else []):
        path = ("operations", index)
        if not isinstance(step, dict) or not isinstance(step.get("op"), str):
            faults.append(RecipeError("an operation is a mapping with the key op", where=line_of(lines, path, where)))
            continue
        try:
            operation, wrong = checked(operations.find(step["op"]), step, lines, where, path)
        except SurgeryError as error:
            at = line_of(lines, (*path, "op"), where)
            operation, wrong = (
                None,
                [SurgeryError(error.what, where=at, exists=error.exists, fix=error.fix, code=error.code)],
            )
        steps += [operation] if operation else []
        faults += wrong
    sections: dict = {}
    for name, kind in SECTIONS.items():
        if data.get(name) is not None:
            sections[name], wrong = checked(kind, data[name], lines, where, (name,))
            faults += wrong
    faults += files_elsewhere(data, lines, where)
    try:
        checked_steps = {"operations": steps or raw} if isinstance(raw, list) else {}
        recipe = Recipe.model_validate(data | sections | checked_steps, context="load")
    except ValidationError as error:
        faults = faults_of(error, lines, where, (), Recipe) + faults
    if faults:
        raise _together(sorted(faults, key=_line_number))
    return recipe


def _together(faults: list[SurgeryError]) -> SurgeryError:
    """One error that lists all of the faults."""
    first, *rest = faults
    where, exists, fix = first.where, first.exists, first.fix
    return SurgeryError(first.what, where=where, exists=exists, fix=fix, others=tuple(rest), code=first.code)


def _line_number(fault: SurgeryError) -> int:
    line = fault.where.rpartition(":")[2]
    return int(line) if line.isdigit() else 0
