"""Entries of a layer that name a rule and perhaps the KV heads under it: `policy` and `read`.

    {"name": "norm", "keys": 1024, "heads": [0, 2]}

The other keys are the rule's settings, the fields of its class.
"""

from __future__ import annotations

from dataclasses import MISSING, fields

from .surgery_config import FILES, all_whole, load_file

KINDS = {"policy": "policy", "read": "reader"}  # key of the entry -> what it names


def rule_of(key: str, entry: dict, own: dict[str, type] | None = None):
    """The policy or the reader that an entry describes.

    Args:
        key: one of `KINDS`.
        own: classes that are no files of the runtime, by name.

    Raises:
        ValueError: there is none of this name, it has no such setting, or a setting is wrong.
    """
    kind, own = KINDS[key], own or {}
    name = entry.get("name") if isinstance(entry, dict) else None
    names = sorted({*own, *(each.partition(".")[2] for each in FILES if each.startswith(f"{key}."))})
    if name not in names:
        raise ValueError(f"{entry!r} names no {kind}; there is: {', '.join(names)}")
    cls = own[name] if name in own else getattr(load_file(f"{key}.{name}"), kind.upper())
    settings = {setting: value for setting, value in entry.items() if setting not in ("name", "heads")}
    known = {each.name for each in fields(cls) if each.init}
    if other := sorted(set(settings) - known):
        raise ValueError(f"{kind} {name!r} has no {other[0]!r}; it has: {', '.join(sorted(known)) or 'no settings'}")
    needed = {each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING}
    if missing := sorted(needed & known - {*settings}):
        raise ValueError(f"{kind} {name!r} needs a value for {', '.join(missing)}")
    rule = cls(**settings)
    if problem := rule.problem():
        raise ValueError(f"{kind} {name!r}: {problem}")
    return rule


def heads_under(layer: dict, key: str, kv_heads: int) -> set[int]:
    """The KV heads that a layer's entry `policy` or `read` (`key`) is for: its `heads`, or all; none without it."""
    return {*layer[key].get("heads", range(kv_heads))} if key in layer else set()


def fault_of_heads(layer: dict, key: str, kv_heads: int) -> str:
    """The error in the `heads` of such an entry, "" if there is none."""
    heads = layer[key].get("heads", [])
    if not all_whole(heads, 0) or len({*heads}) < len(heads) or max(heads, default=0) >= kv_heads:
        return f"must list KV heads from 0 to {kv_heads - 1} under its {KINDS[key]}, each once, not {heads}"
    return ""


def remaining_heads(entry: dict, kv_heads: list[int]) -> dict:
    """Such an entry when only these KV heads remain, indices among the old ones."""
    if "heads" not in entry:
        return entry
    return entry | {"heads": [new for new, old in enumerate(kv_heads) if old in entry["heads"]]}
