"""The settings of a healing, from a recipe's block, keywords and "key=value" texts."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from surgery.config.evaluate import Evaluate, sections
from surgery.config.heal import BUDGETS, Heal, unread
from surgery.config.overrides import as_text
from surgery.config.validation import checked
from surgery.config.yaml import parse
from surgery.errors import SettingError, SurgeryError, shown
from surgery.evaluation.probes.settings import assign, without_defaults

SECTIONS = {"heal": Heal, "evaluate": Evaluate}


def settings(
    recipe: dict, block: Heal | dict | None = None, overrides: tuple[str, ...] | list[str] = (), **fields
) -> tuple[Heal, Evaluate | None]:
    """The settings to heal with, and the evaluation that judges the result.

    Args:
        recipe: the recipe that the checkpoint was made with, as plain data.
        block: a `heal:` block that replaces the recipe's; None keeps the recipe's.
        overrides: "key=value" texts: fields of `heal`, with or without the prefix, or "evaluate.key=value".
        fields: the same settings as keywords.

    Raises:
        SurgeryError: it lists every fault of the settings.
    """
    block = block.model_dump() if isinstance(block, Heal) else block
    if not isinstance(block, dict | None):
        raise SettingError(f"settings is {shown(block)}", fix="a dict of heal's fields: settings={'method': 'parts'}")
    judged_by = recipe.get("evaluate")
    data: dict = {"heal": deepcopy(dict(block if block is not None else recipe.get("heal") or {}))}
    data["evaluate"] = None if judged_by is None else deepcopy(without_defaults(judged_by))
    faults: list[SurgeryError] = []
    lines: dict = {}
    for text in [*overrides, *(as_text(key, value) for key, value in fields.items())]:
        key, equals, value = text.partition("=")
        section, _, name = key.strip().rpartition(".")
        section = section or "heal"
        legal = section in {"heal", *sections()} or section.startswith("evaluate.probes.")
        if not equals or not legal or not name:
            raise SettingError(
                "a setting is written key=value", where=repr(text), exists="heal.KEY, evaluate.KEY, KEY"
            )
        path = (*section.split("."), name)
        parsed = parse(value, repr(text), field=0)[0]
        if path[0] == "evaluate":
            data["evaluate"] = data["evaluate"] or {}
            path = ("evaluate", *assign(data["evaluate"], path[1:], parsed))
        else:
            data["heal"][name] = parsed
        lines[path] = f"override {text.strip()!r}"
        if section == "heal" and name in BUDGETS and data[section][name] is not None:  # replaces the recipe's
            data[section] = {key: value for key, value in data[section].items() if key not in BUDGETS or key == name}
    typed = {path[1] for path in lines if path[0] == "heal"} | (set(block) if block is not None else set())
    for name in idle(data["heal"]) - typed:  # values of the recipe that the new method, loss or data do not read
        del data["heal"][name]
    models: dict = {"evaluate": None}
    for section, kind in SECTIONS.items():
        if data[section] is not None:
            models[section], wrong = checked(kind, data[section], lines, section, (section,))
            faults += wrong
    if faults:
        first, *rest = faults
        raise SurgeryError(
            first.what, where=first.where, exists=first.exists, fix=first.fix, others=tuple(rest), code=first.code
        )
    return models["heal"], models["evaluate"]


def idle(fields: object) -> set[str]:
    """Names of the values in a `heal:` block, unchecked, that its method, loss and data do not read."""
    if not isinstance(fields, dict):
        return set()
    return {*unread(fields), *Heal.variant(fields.get("method")).strangers(fields)} & set(fields)


def published(heal: Heal) -> dict:
    """The settings as they may be published: a path in `data` is cut to its last name; its folders are private."""
    from surgery.io.files import published_list

    files = [name for name in heal.sources if Path(name).exists()]  # a data set's name is no path
    short = dict(zip(files, published_list(files), strict=True))
    names = [short.get(name, name) for name in heal.sources]
    return heal.identity() | {"data": names[0] if isinstance(heal.data, str) else names}
