"""What was done to a checkpoint and what it cost: surgery.json, as an object."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import CheckError, GateError, SurgeryError
from .output import BASE_CARD, write_json, write_text

FORMAT, FILE = 1, "surgery.json"


@dataclass
class Report:
    """The record of one surgery.

    Attributes:
        data: exactly what surgery.json holds.
        folder: the checkpoint, if it was saved.
    """

    data: dict[str, Any]
    folder: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.data

    @property
    def gate(self) -> str:
        """ "passed", "failed", "skipped" or "not run"."""
        return self.data["gate"]["status"]

    def save(self) -> None:
        """Write surgery.json and the card that follows from it."""
        if self.folder is None:
            raise SurgeryError("this report is of a model in memory", fix="surgery.save(model, folder, report) first")
        from .card import render_card

        write_json(self.folder / FILE, self.data)
        write_text(self.folder / "README.md", render_card(self.data, base_card(self.folder)))

    def record_evaluation(self, result: dict) -> None:
        """Keep a score, and hold it against the recipe's gate."""
        from .evaluation import gate

        self.data["evaluation"] = result
        if limits := self.data["gate"]["limits"]:
            status, reasons = gate(result, limits)
            self.data["gate"] |= {"status": status, "reasons": reasons}

    def raise_faults(self, kind: type[SurgeryError] = SurgeryError) -> None:
        """Raise what the report holds against the checkpoint: a failed check, else a failed gate.

        Args:
            kind: only faults of this class.
        """
        folder, checked = str(self.folder), self.data["check"]
        if checked and not checked["passed"] and issubclass(CheckError, kind):
            faults = [item for item in checked["items"] if item["status"] == "failed"]
            what = "; ".join(f"{item['name']}: {item['detail']}" for item in faults)
            raise CheckError(f"the check found a fault: {what}", where=folder)
        if self.gate == "failed" and issubclass(GateError, kind):
            raise GateError(
                f"the quality gate failed: {'; '.join(self.data['gate'].get('reasons', []))}",
                where=folder,
                fix="the folder is kept and marked `gate: failed`; train it, choose a milder setting, raise the limit "
                "(evaluate.max_kl=...), or accept the damage with --no-gate",
            )

    @classmethod
    def of(cls, folder: str | Path) -> Report:
        """The report of a saved checkpoint."""
        from .folder import read_json

        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise SurgeryError(
                "no surgery.json: not a checkpoint that surgery wrote",
                where=str(folder),
                fix="`surgery apply RECIPE MODEL -o OUT` writes one",
            )
        data = read_json(folder / FILE)
        if data.get("format") != FORMAT:
            raise SurgeryError(f"surgery.json has format {data.get('format')!r}; known: {FORMAT}", where=str(folder))
        return cls(data, folder)


def base_card(folder: Path) -> str | None:
    """The base model's card, kept beside ours."""
    path = folder / BASE_CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def new_report(plan, source, *, overrides=(), engine: str, fingerprint: str, records: list[dict]) -> dict[str, Any]:
    """The data of a report, before anything was checked or scored.

    Args:
        plan: the `Plan` that was carried out.
        source: the `hub.Source` of the base.
        overrides: what the user changed in the recipe, as typed.
        engine: "streaming" or "loaded".
        fingerprint: of the base's weight files.
        records: what each operation noted, in order.
    """
    import torch

    recipe = plan.recipe.to_dict()
    if recipe["evaluate"]:
        recipe["evaluate"]["text"] = published(recipe["evaluate"]["text"])
    return {
        "format": FORMAT,
        "surgery_version": versions()["surgery"],
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tier": plan.tier,
        "engine": engine,
        "base": {
            "name": source.name,
            "hub_id": source.hub_id,
            "base_model": source.base_model,
            "revision": source.revision,
            "model_type": plan.before.composite or plan.before.model_type,
            "fingerprint": fingerprint,
            "note": source.note,
        },
        "recipe": recipe,
        "overrides": [f"{key}={published(value)}" for key, _, value in (text.partition("=") for text in overrides)],
        "plan": plan.summary(),
        "operations": [
            {"op": step.operation.op, "record": record} for step, record in zip(plan.steps, records, strict=True)
        ],
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seeds": {step.operation.op: step.operation.seed for step in plan.steps if hasattr(step.operation, "seed")},
        "files": {},
        "left_behind": [],
        "check": None,
        "evaluation": None,
        "gate": {"status": "not run", "limits": plan.recipe.evaluate.limits if plan.recipe.evaluate else {}},
        "history": [],
    }


def published(value: str) -> str:
    """A setting as it may be published: of a path from the root its last part, since the rest says who made it."""
    path = value.strip(" \"'")
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else value


def history_of(base: Path) -> list[dict]:
    """Earlier surgeries of this base, oldest first."""
    if not (base / FILE).is_file():
        return []
    try:
        earlier = json.loads((base / FILE).read_text(encoding="utf-8"))
    except ValueError:
        return []
    if not isinstance(earlier, dict):
        return []
    return [*earlier.pop("history", []), earlier]


def versions() -> dict[str, str]:
    from . import __version__

    found = {"surgery": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors"):
        found[name] = metadata.version(name)
    return found
