"""Settings that are typed as key=value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from surgery.errors import SettingError, shown


def read_key_values(texts: Iterable[str], where: str, known: str) -> dict[str, Any]:
    """Settings by key; values are YAML.

    Args:
        texts: what was typed, each "key=value".
        where: the option to which the texts belong, for messages.
        known: the settings that exist, for messages.

    Raises:
        SurgeryError: a text is not of the form key=value; a value is not YAML; a setting is given twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (word.strip() for word in text.partition("="))
        if not equals or not key:
            raise SettingError("a setting is written key=value", where=f"{where} {text}", exists=known)
        if key in settings:
            raise SettingError(f"{key!r} is given twice", where=where, fix="give it once")
        try:
            settings[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            what = f"the value of {key} is not YAML: {shown(value)}"
            raise SettingError(what, where=where, fix="put it in quotes") from error
    return settings
