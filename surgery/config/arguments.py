"""Check the arguments of the public functions; one that has a wrong type or is swapped is refused by its name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surgery.config.recipe import shipped
from surgery.errors import SurgeryError, shown

MODEL_FIX = "give a folder, a Hub id, smollm2-135m, or a model loaded with from_pretrained"


def described(value: object) -> str:
    """A value as messages show it; only the class for objects that are not plain data and may print many lines."""
    plain = value is None or isinstance(value, bool | int | float | str | bytes | Path | list | tuple | dict)
    return shown(value) if plain else f"a {type(value).__name__}"


def no_model(model: object, name: str = "model") -> SurgeryError:
    """The error for an argument that is not a model."""
    kind = "None" if model is None else type(model).__name__
    return SurgeryError(f"{kind} is not a model", where=name, fix=MODEL_FIX, code="invalid-argument")


def refuse_no_model(model: object, name: str = "model") -> None:
    """Raise unless this is a loaded model."""
    from surgery.io.model_in_memory import is_model

    if not is_model(model):
        raise no_model(model, name)


def refuse_no_base(base: object) -> None:
    """Raise unless the base is None, a name, a folder or a loaded model."""
    if base is not None and not isinstance(base, str | Path):
        refuse_no_model(base, "base")


def refuse_swapped(recipe: object, model: object) -> None:
    """Raise where the two are swapped: `model` names a shipped recipe and no folder, and `recipe` does not."""
    if isinstance(model, str) and model in shipped() and not Path(model).exists() and str(recipe) not in shipped():
        given = described(recipe)
        what = f"model is {model!r}, which is a recipe, and recipe is {given}: they are swapped"
        raise SurgeryError(what, where="model", fix="the recipe comes first, then the model", code="invalid-argument")


def refuse_no_path(name: str, value: object, needed: bool = False) -> None:
    """Raise unless `value` is a path; None is allowed unless a path is `needed`."""
    if not isinstance(value, str | Path) and (needed or value is not None):
        what = f"{described(value)} is not a path"
        raise SurgeryError(what, where=name, fix="give a text or a pathlib.Path", code="invalid-argument")


def refuse_no_text(name: str, value: object) -> None:
    """Raise unless `value` is a text."""
    if not isinstance(value, str):
        raise SurgeryError(f"{described(value)} is not a text", where=name, code="invalid-argument")


def refuse_no_tokenizer(tokenizer: object) -> None:
    """Raise unless this is a loaded tokenizer or None."""
    if tokenizer is not None and not callable(tokenizer):
        what = f"{described(tokenizer)} is not a tokenizer"
        fix = "give a loaded one: surgery.load_tokenizer(MODEL)"
        raise SurgeryError(what, where="tokenizer", fix=fix, code="invalid-argument")


def refuse_no_function(**callbacks: object) -> None:
    """Raise for a callback that cannot be called."""
    for name, value in callbacks.items():
        if value is not None and not callable(value):
            what = f"{described(value)} is not a function"
            raise SurgeryError(what, where=name, fix="give one that can be called", code="invalid-argument")


def refuse_folder_settings(done: str, **settings: object) -> None:
    """Raise where a loaded model is edited in place and settings are given that need an output folder."""
    if names := [name for name, value in settings.items() if value]:
        raise SurgeryError(
            f"{', '.join(names)}: for a name or folder, and this is a loaded model, which is {done} in place",
            fix="leave it out, and surgery.save(model, folder, report) afterwards; or give the model's folder",
            code="invalid-argument",
        )


def texts(overrides: Any) -> tuple[str, ...]:
    """The overrides as a tuple; an error unless each of them is a text."""
    where = {"where": "overrides", "code": "invalid-argument"}
    if isinstance(overrides, str):
        what = f"{shown(overrides)} is one text, and a list of them is wanted"
        raise SurgeryError(what, fix=f"write overrides=[{shown(overrides)}]", **where)
    listed = isinstance(overrides, Iterable) and not isinstance(overrides, bytes)
    values: tuple[Any, ...] = tuple(overrides) if listed else (overrides,)
    if wrong := [each for each in values if not isinstance(each, str)]:
        raise SurgeryError(f"{described(wrong[0])} is not a text", fix='write overrides=["key=value"]', **where)
    return values


def base_on_disk(base: Any) -> str | Path | None:
    """A base that is named; an error for a loaded one, which the healing of a folder cannot use."""
    if base is None or isinstance(base, str | Path):
        return base
    raise SurgeryError(
        f"base is a loaded {type(base).__name__}, and healing a folder needs its base on disk",
        fix="name its folder or Hub id; or load the model too: surgery.load(folder)",
    )
