"""Whether a score is of the base that a checkpoint was made from: only then does it belong in the record."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError
from surgery.io.safetensors import BY_CONTENT, Checkpoint


def unrecordable(data: dict, base, settings: dict) -> str:
    """Why a score does not belong in a checkpoint's record, or ""."""
    asked = data["recipe"].get("evaluate") or {}
    if data["evaluation"] is not None:
        return "there is a score already, of when it was made"
    if any(asked.get(key) != value for key, value in settings.items()):
        return "text, windows or length are not those of its recipe"
    return another_base(data["base"], base)


def comparable(known: dict) -> bool:
    """Whether a record of a base has a fingerprint that another folder's can be held against."""
    return (known.get("fingerprint") or "").startswith(BY_CONTENT)


def another_base(known: dict, base) -> str:
    """Why a base is not, or cannot be shown to be, the one that a checkpoint was made from; or ""."""
    if not isinstance(base, str | Path):
        return "a base in memory cannot be told from another one"
    from surgery.io.hub import resolve

    source = resolve(str(base))
    if known.get("hub_id") and known.get("revision") and source.hub_id:
        same = (source.hub_id, source.revision) == (known["hub_id"], known["revision"])
        return "" if same else f"it was made from {known['hub_id']}@{known['revision']}, not from this base"
    if not known.get("fingerprint"):
        return "it was made from a model in memory, so no base on disk is known to be its own"
    if not comparable(known):
        return "it was made by an earlier version, which knew a base by the times of its files"
    try:
        same = Checkpoint(source.path).fingerprint() == known["fingerprint"]
    except SurgeryError as error:
        return f"the base cannot be compared with the one it was made from ({error.what})"
    return "" if same else f"this is not the base it was made from ({known.get('name')}), or its files were changed"
