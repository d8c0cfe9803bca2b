"""Reads a probe's settings from key=value texts, keywords or a recipe's `evaluate:`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from surgery.architecture.anatomy import positions_of
from surgery.errors import SettingError, SurgeryError, nearest, number_meant, shown, wanted
from surgery.evaluation.probes import every, find, limits
from surgery.evaluation.probes.base import Limit, Probe
from surgery.evaluation.probes.fields import SETTINGS_ERROR, settings_error
from surgery.io.key_values import read_key_values

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHOWN = 20  # names of items that an error lists


def make(name: str, settings: Mapping[str, Any], spelled: Callable[[str], str] = str, where: str = "") -> Probe:
    """A probe with these settings.

    Args:
        name: the probe's name in the registry.
        settings: setting -> value; a setting that is left out keeps its default.
        spelled: maps a setting to the user's spelling of it, for messages.
        where: where the user wrote the settings, for messages.

    Raises:
        SurgeryError: there is no such probe, or settings are at fault; the error lists every fault.
    """
    cls = find(name)
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as error:
        by_key: dict[str, list] = {}
        for item in error.errors(include_url=False):
            by_key.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(item)
        first, *rest = [fault(cls, key, items, where, spelled) for key, items in by_key.items()]
        raise SurgeryError(
            first.what,
            where=first.where,
            exists=first.exists,
            fix=first.fix,
            others=tuple(rest),
            code=first.code,
        ) from None


def read(name: str, texts: Iterable[str]) -> Probe:
    """A probe with settings typed as "key=value", values in YAML.

    Raises:
        SurgeryError: as for `make`; or a text is not of the form key=value; or a setting is given twice.
    """
    where, fields = f"--probe {name}", find(name).model_fields.items()
    known = "; ".join(f"{key} ({info.description})" for key, info in fields)
    return make(name, read_key_values(texts, where, known), where=where)


def fault(
    cls: type[Probe],
    key: str,
    items: list[dict],
    where: str,
    spelled: Callable[[str], str] = str,
    in_recipe: bool = False,
) -> SurgeryError:
    """Pydantic's errors about one setting, as one sentence.

    Args:
        key: the setting; "" if the errors are about several.
        items: the errors (`ValidationError.errors()`).
        where, spelled: as for `make`.
        in_recipe: whether the probe's limits are valid keys too.
    """
    kind, context = items[0]["type"], items[0].get("ctx", {})
    if kind == "extra_forbidden":
        names = keys(cls) if in_recipe else list(cls.model_fields)
        owners = [other.name for other in every() if other is not cls and key in keys(other)]
        close = nearest(key, names)
        fix = f"did you mean {close!r}?" if close else ""
        if owners:
            fix = f"it is a key of the probe {' and '.join(owners)}"
        elif key in cls.limits:
            fix = "a limit belongs in a recipe"
        what = f"unknown key {key!r} of the probe {cls.name}"
        return SettingError(what, where=where, exists=", ".join(names), fix=fix)
    if kind == SETTINGS_ERROR:
        what = f"{spelled(context['key'])} {context['what']}" if context["key"] else context["what"]
        return SettingError(what, where=where, exists=context["exists"], fix=context["fix"])
    what = f"{spelled(key)} should be {wanted(items)}; it is {shown(items[0]['input'])}"
    return SettingError(what, where=where, fix=number_meant(items))


def keys(cls: type[Probe]) -> list[str]:
    """The keys of the probe's block in a recipe: its settings and its limits."""
    return [*cls.model_fields, *cls.limits]


# --- a recipe's `evaluate:` -----------------------------------------------------------------------------------------


def limit_field(limit: Limit) -> tuple[Any, Any]:
    """A limit as a field of a pydantic model."""
    bounds = {"ge": 0} | ({} if limit.most is None else {"le": limit.most})
    if limit.by_item:
        return dict[str, Annotated[float, Field(**bounds)]] | None, Field(None, description=limit.description)
    return float | None, Field(None, description=limit.description, **bounds)


def _refuse_unknown_items(block: Any) -> Any:
    """Raise where a block bounds an item that it does not measure, as far as its settings alone say so."""
    limits = {name: getattr(block, name) for name in type(block).limits}
    for fault in unknown_items(block, limits, look_up=False):
        raise settings_error(fault.what, key=fault.where, exists=fault.exists, fix=fault.fix)
    return block


def unknown_items(probe: Probe, limits: Mapping[str, Any], look_up: bool) -> list[SettingError]:
    """An error for each limit that bounds items which the probe does not measure; `where` is the limit's name.

    Args:
        limits: name of a limit -> its value.
        look_up: whether it may take seconds to find out what the probe measures.
    """
    faults = []
    for name, limit in type(probe).limits.items():
        if limit.by_item is None or not limits.get(name):
            continue
        known, complete = limit.by_item(probe, look_up)
        wrong = [item for item in limits[name] if complete and item not in known]
        if not wrong:
            continue
        what = f"bounds {', '.join(map(repr, wrong))}, which {'is' if len(wrong) == 1 else 'are'} not measured"
        exists = ", ".join([*sorted(known)[:SHOWN], *(["..."] if len(known) > SHOWN else [])])
        close = next(filter(None, (nearest(item, known) for item in wrong)), "")
        fix = f"did you mean {close!r}?" if close else "drop it, or measure it too"
        faults.append(SettingError(what, where=name, exists=exists, fix=fix))
    return faults


def alias_fields() -> dict[str, tuple[Any, Any]]:
    """The keys of `evaluate:` that are earlier spellings of a probe's settings and limits: name -> type, field."""
    fields: dict[str, tuple[Any, Any]] = {}
    for cls in every():
        fields |= {flat: (alias.annotation, alias.field) for flat, alias in cls.aliases.recipe.items()}
        fields |= {name: limit_field(cls.limits[name]) for name in cls.aliases.limits}
    last = [name for cls in every() for name in cls.aliases.last]
    return {name: fields[name] for name in [*(name for name in fields if name not in last), *last]}


def blocks() -> type[BaseModel]:
    """The pydantic model of `evaluate: {probes: {NAME: {...}}}`."""
    fields: dict[str, Any] = {}
    for cls in every():
        bounds = {name: limit_field(limit) for name, limit in cls.limits.items()}
        checks = {"known_items": model_validator(mode="after")(_refuse_unknown_items)}
        block = create_model(cls.__name__, __base__=cls, __doc__=cls.__doc__, __validators__=checks, **bounds)
        fields[cls.name] = (block | None, Field(None, description=f"{cls.summary[:1].upper()}{cls.summary[1:]}."))
    return create_model(
        "Probes",
        __config__=ConfigDict(extra="forbid", frozen=True, strict=True),
        __doc__="Probes by name, with their settings and limits; null leaves one out.",
        **fields,
    )


def duplicate_keys(given_keys: Iterable[str], probe_blocks: Iterable[str]) -> dict[str, str]:
    """Key of `evaluate:` -> the same key in the block of its probe, for the probes that have a block as well.

    Args:
        given_keys: keys of `evaluate:` that were given.
        probe_blocks: names of the probes that have a block.
    """
    block_keys = {}
    for cls in (cls for cls in every() if cls.name in set(probe_blocks)):
        names = _earlier_keys(cls).items()
        block_keys |= {flat: f"probes.{cls.name}.{key}" for flat, key in names if flat in set(given_keys)}
    return block_keys


def assign(evaluate: dict[str, Any], path: tuple[str, ...], value: object) -> tuple[str, ...]:
    """Set one key of a recipe's `evaluate:` in place, in either spelling. The later value of a setting wins.

    The earlier spelling and the block of a probe must not both be used. So setting a block moves the probe's earlier
    keys into it, and setting an earlier key of a probe with a block sets the key in the block. A whole block replaces
    the settings, but keeps limits that it does not name: a limit changes only if it is named.

    Args:
        evaluate: the recipe's `evaluate` as plain data, not validated yet.
        path: the path of the key in `evaluate`.

    Returns:
        The path that was set.
    """
    if path == ("probes",) and isinstance(value, dict):
        for name, block in value.items():
            assign(evaluate, ("probes", name), block)
        return path
    asks = False
    if owner := _block_key(evaluate, path):
        cls, key = owner
        asks = path[0] in cls.aliases.recipe and cls.aliases.recipe[path[0]].asks
        path = ("probes", cls.name, key)
    elif path[0] == "probes" and len(path) > 1:
        for cls in (cls for cls in every() if cls.name == path[1]):
            _into_block(evaluate, cls)
    if asks and not value:  # needles: 0
        path, value = path[:-1], None
        block = evaluate["probes"][path[1]]
        evaluate |= {name: block[name] for name in cls.aliases.limits if name in block}
    *outer, last = path
    target: Any = evaluate
    for step in outer:
        if isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
        target = target[step] if isinstance(target, dict) else None
    if isinstance(target, dict):  # otherwise that value is at fault, and the validation of the recipe names it
        if path[0] == "probes" and len(path) == 2 and isinstance(value, dict):
            value = _limits_in(target.get(last), last) | value
        target[last] = value
        if path[0] == "probes" and len(path) == 3:
            for other in _alternatives(path[1], last):
                target.pop(other, None)
    return path


def _into_block(evaluate: dict[str, Any], cls: type[Probe]) -> None:
    """Move the earlier keys of a probe into its block."""
    probes = evaluate.get("probes") or {}
    values = {key: evaluate.pop(name) for name, key in _earlier_keys(cls).items() if name in evaluate}
    asking = [alias.key for alias in cls.aliases.recipe.values() if alias.asks]
    if any(map(values.get, asking)):  # the earlier spelling has its own defaults
        values = {alias.key: alias.field.default for alias in cls.aliases.recipe.values()} | values
    values = {key: value for key, value in values.items() if value or key not in asking}
    if isinstance(probes, dict) and isinstance(block := probes.get(cls.name), dict | None):
        evaluate["probes"] = probes | {cls.name: values | (block or {})}


def _limits_in(block: object, name: str) -> dict[str, Any]:
    """The limits that a probe's block sets."""
    names = [limit for cls in every() if cls.name == name for limit in cls.limits]
    return {key: value for key, value in block.items() if key in names} if isinstance(block, dict) else {}


def _alternatives(name: str, key: str) -> list[str]:
    """The settings of a probe that are alternatives to this one."""
    pairs = [pair for cls in every() if cls.name == name for pair in cls.alternatives]
    return [other for pair in pairs for one, other in (pair, pair[::-1]) if one == key]


def _block_key(evaluate: dict[str, Any], path: tuple[str, ...]) -> tuple[type[Probe], str] | None:
    """The probe that this earlier key belongs to, and the key in the probe's block; None if the probe has no block."""
    blocks = evaluate.get("probes")
    if len(path) > 1 or not isinstance(blocks, dict):
        return None
    owners = [(cls, _earlier_keys(cls)) for cls in every() if isinstance(blocks.get(cls.name), dict)]
    return next(((cls, names[path[0]]) for cls, names in owners if path[0] in names), None)


def _earlier_keys(cls: type[Probe]) -> dict[str, str]:
    """Earlier spelling of a probe's key, in `evaluate:` -> the key in the probe's block."""
    keys = {flat: alias.key for flat, alias in cls.aliases.recipe.items()}
    return keys | {name: name for name in cls.aliases.limits}


def requested_probes(evaluate: Mapping[str, Any]) -> list[Probe]:
    """The probes that a recipe asks for, in the order in which they are run.

    Args:
        evaluate: the recipe's `evaluate`, as plain data; unknown keys (of another version) are ignored.
    """
    blocks, requested = evaluate.get("probes") or {}, []
    for cls in every():
        block, aliases = blocks.get(cls.name), cls.aliases.recipe
        if block is not None:
            values = {key: block[key] for key in cls.model_fields if key in block}
        elif cls.main or any(evaluate.get(flat) for flat, alias in aliases.items() if alias.asks):
            values = {alias.key: evaluate[flat] for flat, alias in aliases.items() if flat in evaluate}
        else:
            continue
        shared = {key: evaluate[key] for key in cls.shared(values) if key in evaluate}
        requested.append(cls.model_validate(values | shared))
    return requested


def cut_to(evaluate: Mapping[str, Any], config: PretrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """A recipe's `evaluate`, as plain data, with windows and prompts no longer than a model with this config takes.

    Returns:
        The data, and a sentence for each setting that was cut.
    """
    data, notes = copy.deepcopy(dict(evaluate)), []
    for probe in requested_probes(evaluate):
        earlier = {key: flat for flat, key in _earlier_keys(type(probe)).items()}
        for key, value in probe.cuts(config).items():
            path = assign(data, (earlier[key],) if key in earlier else ("probes", probe.name, key), value)
            notes.append(_cut(".".join(("evaluate", *path)), getattr(probe, key), value, config))
    return data, notes


def fitted(probe: Probe, configs: Mapping[str, PretrainedConfig]) -> tuple[Probe, list[str]]:
    """A probe whose defaults are cut (`Probe.cuts`) to what the shortest model takes; what was set stays as it is.

    Args:
        configs: "the model", "the base" -> config.

    Returns:
        The probe, and a sentence for each setting that was cut.
    """
    shortest = min(configs, key=lambda label: positions_of(configs[label]) or math.inf)
    config = configs[shortest]
    given = {key: getattr(probe, key) for key in probe.model_fields_set if getattr(probe, key) is not None}
    cuts = {key: value for key, value in probe.cuts(config).items() if key not in given}
    notes = [_cut(key, getattr(probe, key), value, config, shortest) for key, value in cuts.items()]
    return type(probe).model_validate(given | cuts) if cuts else probe, notes


def _cut(
    name: str, old: int | Iterable[int], new: int | Iterable[int], config: PretrainedConfig, model: str = "the model"
) -> str:
    return f"{name} is cut from {_lengths(old)} to {_lengths(new)}: {model} takes {positions_of(config):,} tokens"


def _lengths(value: int | Iterable[int]) -> str:
    return ", ".join(f"{length:,}" for length in ([value] if isinstance(value, int) else value))


def bounds(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """The limits that a recipe's `evaluate` sets: numbers, or dicts of numbers by item."""
    blocks, values = evaluate.get("probes") or {}, {}
    for name, (cls, _) in limits().items():
        block = blocks.get(cls.name)
        value = evaluate.get(name) if block is None else block.get(name)
        values |= {} if value is None else {name: value}
    return values


def as_data(evaluate: dict[str, Any], blocks: BaseModel | None) -> dict[str, Any]:
    """A recipe's `evaluate` as plain data from which the same `evaluate` can be read again.

    Args:
        evaluate: all its fields with their values.
        blocks: the blocks of its probes.
    """
    probes = {cls.name: block for cls in every() if (block := getattr(blocks, cls.name, None)) is not None}
    data = {key: value for key, value in evaluate.items() if key not in duplicate_keys(evaluate, probes)}
    data.pop("probes", None)
    if not probes:
        return data
    plain = {}
    for name, block in probes.items():
        unset = set(find(name).model_fields) - block.model_fields_set
        # A setting that is not set may depend on others: the depths on the number of cases, the text on
        # `evaluate.text`.
        plain[name] = block.model_dump(mode="json", exclude=unset, exclude_none=True)
    return data | {"probes": plain}


def without_defaults(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """The same `evaluate` without the defaults that `as_data` wrote, so that a block may replace these keys."""
    usual = {name: info.default for name, (_, info) in alias_fields().items()}
    return {key: value for key, value in evaluate.items() if key not in usual or value != usual[key]}
