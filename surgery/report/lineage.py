"""Checks that a score is of the base that a checkpoint was made from: only then does it belong in the record."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError
from surgery.evaluation.probes.base import Probe
from surgery.evaluation.probes.settings import requested_probes
from surgery.io.files import published
from surgery.io.safetensors import BY_CONTENT, Checkpoint

KEPT = "which keeps the score of the conversion"  # a clause after "not added to the card"


def unrecordable(data: dict, base: object, probe: Probe) -> str:
    """Why a score does not belong in a checkpoint's record, or "".

    Args:
        data: the record.
        base: what it was compared with: a folder, a name, or a loaded model.
        probe: the probe that gave the score, with its settings.
    """
    if data["evaluation"] is not None:
        return KEPT
    judged_by = data["recipe"].get("evaluate")
    try:
        recipe_probe = next((each for each in requested_probes(judged_by) if each.main), None) if judged_by else None
    except (ValueError, TypeError, AttributeError):  # a record that was edited, or is a later version's
        recipe_probe = None
    if recipe_probe is None or _published(recipe_probe) != _published(probe):
        *names, last = probe.aliases.flags
        return f"{', '.join(names)} or {last} are not those of its recipe"
    return another_base(data["base"], base)


def _published(probe: Probe) -> dict:
    return {key: published(value) if isinstance(value, str) else value for key, value in probe.model_dump().items()}


def comparable(recorded: dict) -> bool:
    """Whether a record of a base has a fingerprint that can be compared with another folder's."""
    return (recorded.get("fingerprint") or "").startswith(BY_CONTENT)


def another_base(recorded: dict, base) -> str:
    """Why a base is not, or cannot be shown to be, the one that a checkpoint was made from; or "".

    Args:
        recorded: `base` of the checkpoint's surgery.json.
        base: a folder or a name; a loaded model cannot be compared.
    """
    if not isinstance(base, str | Path):
        return "a base in memory cannot be told from another one"
    from surgery.io.hub import resolve

    source = resolve(str(base))
    if recorded.get("hub_id") and recorded.get("revision") and source.hub_id:
        same = (source.hub_id, source.revision) == (recorded["hub_id"], recorded["revision"])
        return "" if same else f"it was made from {recorded['hub_id']}@{recorded['revision']}, not from this base"
    if not recorded.get("fingerprint"):
        return "it was made from a model in memory, so no base on disk is known to be its own"
    if not comparable(recorded):
        return "it was made by an earlier version, which knew a base by the times of its files"
    try:
        same = Checkpoint(source.path).fingerprint() == recorded["fingerprint"]
    except SurgeryError as error:
        return f"the base cannot be compared with the one it was made from ({error.what})"
    return "" if same else f"this is not the base it was made from ({recorded.get('name')}), or its files were changed"
