"""Types of a probe's settings, and the errors of their validators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.evaluation.lengths import parse_lengths

SETTINGS_ERROR = "settings_error"  # kind of the pydantic errors that `settings_error` makes


def settings_error(what: str, *, key: str = "", exists: str = "", fix: str = "") -> PydanticCustomError:
    """An error for a validator of settings. The user sees it in these words.

    Args:
        what: the fault. With `key`, the words that follow the setting's name.
        key: the setting at fault. The message names it as the user wrote it (`items`, or `--choice-items`).
        exists, fix: as for a `SurgeryError`.
    """
    return PydanticCustomError(SETTINGS_ERROR, "{what}", {"what": what, "key": key, "exists": exists, "fix": fix})


def check_setting(check: Callable[..., object], *args: object) -> None:
    """Call a check inside a validator of settings: its SurgeryError becomes an error that pydantic collects."""
    try:
        check(*args)
    except SurgeryError as error:
        raise settings_error(error.what, exists=error.exists, fix=error.fix) from None


class NamesFile:
    """Marks a setting that may name a file. A recipe file may only name files inside the working folder."""


def _text(value: object) -> object:
    if isinstance(value, str | Path | Text):
        return value
    raise PydanticCustomError("string_type", "Input should be a valid string")


def _file_name(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _plain_text(value: str | Path | Text) -> str:
    return value.title if isinstance(value, Text) else str(value)


def _list(value: Any) -> object:
    """A list, range or array as a tuple of Python numbers; other values are unchanged."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple | range):
        return value
    return tuple(item.item() if hasattr(item, "item") else item for item in value)


def _lengths(value: object, least: int = 1) -> object:
    value = _list(value)
    if isinstance(value, str):
        try:
            return parse_lengths(value, least)
        except SurgeryError as error:
            raise settings_error(error.what, fix="write 512,2k") from None
    return (value,) if type(value) is int else value


def _names(value: object) -> object:
    value = _list(value)
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


# Types of settings. A text source is "builtin", a file, or (from Python) a loaded `Text`.
TextSource = Annotated[
    Any, BeforeValidator(_text), PlainSerializer(_plain_text), WithJsonSchema({"type": "string"}), NamesFile()
]
FileName = Annotated[str, BeforeValidator(_file_name), NamesFile()]
TokenLengths = Annotated[tuple[int, ...], BeforeValidator(_lengths)]  # "512,2k", 512, [512, 2000]
TextLengths = Annotated[  # the same with 0: no text
    tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(partial(_lengths, least=0)), Field(min_length=1)
]
TaskNames = Annotated[tuple[str, ...], BeforeValidator(_names), NamesFile()]  # "piqa,my.yaml", ["piqa", "my.yaml"]
Shares = Annotated[tuple[float, ...], BeforeValidator(_list)]


def names_file(annotation: Any, metadata: Iterable[object]) -> bool:
    """Whether a type, or one inside it, is marked as naming a file."""
    if any(isinstance(mark, NamesFile) for mark in metadata):
        return True
    return any(names_file(inner, getattr(inner, "__metadata__", ())) for inner in get_args(annotation))
