"""The registry of kinds of needles: what a prompt hides in its text, and how it asks for it.

A new kind is a file here, a line in `REGISTRY` and a test. The settings of the probe `needles`, its floor, its tables
and its sentences follow from the class (see `base.Kind`). A setting that no other kind has is also a parameter of
`surgery.evaluate_needles`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.errors import SettingError, nearest

if TYPE_CHECKING:
    from surgery.data.needle_kinds.base import Kind

REGISTRY = {  # name -> "module:class"; the first is the default
    "key": "key:Key",
    "multi": "multi:MultiKey",
    "value": "value:MultiValue",
    "chain": "chain:Chain",
    "index": "index:Index",
    "distractor": "distractor:Distractor",
    "association": "association:Association",
}
DEFAULT = next(iter(REGISTRY))


def find(name: str) -> type[Kind]:
    """The class of a kind.

    Raises:
        SurgeryError: there is no such kind.
    """
    if isinstance(name, str) and name in REGISTRY:
        module, cls = REGISTRY[name].split(":")
        return getattr(import_module(f"{__name__}.{module}"), cls)
    raise SettingError(
        f"no kind {name!r}",
        exists="; ".join(f"{cls.name}: {cls.summary}" for cls in every()),
        fix=f"use {nearest(str(name), REGISTRY) or DEFAULT}",
    )


def every() -> list[type[Kind]]:
    """All classes, in the order of the registry."""
    return [find(name) for name in REGISTRY]


def of(settings: Mapping[str, Any]) -> Kind:
    """The kind that settings of the probe choose, with its own settings.

    Raises:
        SurgeryError: there is no such kind.
        pydantic.ValidationError: a setting of the kind is at fault.
    """
    cls = find(settings.get("kind") or DEFAULT)
    return cls.model_validate({key: settings[key] for key in cls.model_fields if key in settings})


def recorded(settings: Mapping[str, Any]) -> Kind:
    """The kind of a record's settings, to show it; an earlier version wrote none.

    `base.UnknownKind` stands for the kind of a later version and for settings that were edited.
    """
    from pydantic import ValidationError

    from surgery.data.needle_kinds.base import UnknownKind

    try:
        return of(settings)
    except (SettingError, ValidationError):
        return UnknownKind()


def readers(setting: str) -> list[str]:
    """The kinds that read a setting."""
    return [cls.name for cls in every() if setting in cls.model_fields]
