"""The record of a surgery, surgery.json, as an object: what was done to a checkpoint, and what it cost."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from surgery.errors import CheckError, GateError, RecordError, SurgeryError, nearest, shown
from surgery.evaluation.probes import REGISTRY, done
from surgery.evaluation.result import without_cases
from surgery.io.card_text import notes_of
from surgery.io.files import (
    BASE_CARD,
    CARD,
    json_fault,
    published_override,
    published_recipe,
    read_json,
    sha256,
    write_json,
    write_text,
)
from surgery.io.hub_errors import folders
from surgery.io.identity import CONFIGS, stable_config
from surgery.io.manifest import entry, is_intact, other_files, record_hash
from surgery.io.printing import Block, Printed
from surgery.machine.placement import conditions
from surgery.operations import third_party
from surgery.operations.base import NATIVE, SURGICAL

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.evaluation.figures import Evaluation

GateStatus = Literal["passed", "failed", "skipped", "not run"]

FORMAT, FILE = 1, "surgery.json"
NO_FILE = "none"  # in a record, in place of a generation config that the base does not have
SCORED_IN = "scored_in"  # key of the conditions under which a score was measured
MEASURED_IN = "measured_in"  # key of device and dtype in which the model was measured, if not the CPU and its own
NOTICES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
# Keys that every surgery.json must have, with the type of each value.
REQUIRED = {
    "base": dict, "recipe": dict, "plan": dict, "gate": dict, "files": dict, "check": dict | None,
    "evaluation": dict | None, "history": list, "overrides": list, "operations": list, "versions": dict,
}  # fmt: skip


@dataclass(repr=False)
class Report(Printed):
    """The record of one surgery. `print(report)` shows it in a few lines.

    A figure that was not measured is None.

    Attributes:
        data: the exact content of surgery.json.
        folder: the checkpoint's folder; None if it was not saved.
        intact: whether the record is unchanged since surgery wrote it. An edited record stays marked as edited,
            however often it is saved.
    """

    data: dict[str, Any]
    folder: Path | None = None
    intact: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The content of surgery.json."""
        return self.data

    @property
    def edited(self) -> str:
        """What a reader should know of a record that is not as surgery wrote it; "" if it is."""
        return "" if self.intact else f"{FILE} was edited after surgery wrote it: settings and figures may be wrong"

    @property
    def gate(self) -> GateStatus:
        """The result of comparing the cost with the recipe's limits: "passed", "failed", "skipped" or "not run"."""
        return cast("GateStatus", self.data["gate"]["status"])

    @property
    def passed(self) -> bool | None:
        """Whether the check of the folder found no fault; None: not checked. The cost is judged by `gate` instead."""
        return self.data["check"]["passed"] if self.data["check"] else None

    @property
    def checks(self) -> dict[str, str]:
        """Name of each check -> "passed", "failed", "measured" or "not run"; {}: not checked."""
        return {item["name"]: item["status"] for item in (self.data["check"] or {}).get("items", [])}

    @property
    def changes(self) -> list[str]:
        """A line for each change ("KV heads 3 → 1 in 30 layers")."""
        return list(self.data["plan"].get("changes") or [])

    @property
    def evaluation(self) -> Evaluation | None:
        """The result of `surgery.evaluate`; its `probes` holds the other probes that the recipe asked for."""
        from surgery.evaluation.figures import Evaluation

        return Evaluation.of(self.data["evaluation"]) if self.data["evaluation"] else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the converted model."""
        return self._figure("out", "perplexity")

    @property
    def base_perplexity(self) -> float | None:
        """Perplexity of the base, on the same text."""
        return self._figure("base", "perplexity")

    @property
    def kl(self) -> float | None:
        """KL(base || converted model), mean, in nats per token."""
        return self._figure("kl", "mean")

    @property
    def recall(self) -> float | None:
        """Of the hidden secrets that the base finds, the share that the converted model finds too: 0 to 1.

        Those that streaming heads see anyway do not count (see the probe `needles`). None: the recall test was not
        run, or hid needles of another kind than single secrets, or the base finds no more than a guess would.
        """
        shares = (cls.recall(record) for cls, record in done(self.data["evaluation"] or {}))
        return next((share for share in shares if share is not None), None)

    @property
    def kv_bytes(self) -> int | None:
        """Bytes that each token adds to the converted model's KV cache, all layers."""
        return (self.data["plan"].get("kv_bytes_per_token") or {}).get("after")

    @property
    def base_kv_bytes(self) -> int | None:
        """Bytes that each token adds to the base's KV cache, all layers."""
        return (self.data["plan"].get("kv_bytes_per_token") or {}).get("before")

    @property
    def path(self) -> Path | None:
        """The folder of the converted model; None: it is in memory."""
        return self.folder

    def _figure(self, *keys: str) -> Any:
        """A figure of the evaluation; None if there is none."""
        value: Any = self.data["evaluation"]
        for key in keys:
            value = (value or {}).get(key)
        return value

    def headline(self) -> str:
        from surgery.report.summary import headline

        return headline(self.data, self.folder)

    def blocks(self) -> list[Block]:
        from surgery.report.summary import blocks

        return blocks(self.data, self.folder)

    def save(self, *, list_files: bool = False) -> None:
        """Write surgery.json and the card that is rendered from it, with its owner's notes.

        A card that was edited outside of these notes is not overwritten.

        Args:
            list_files: record size and hash of every file in the folder. This is done when a checkpoint is written;
                `check` later compares the folder with it.

        Raises:
            SurgeryError: the model is in memory, or the data were edited and cannot be written.
        """
        if self.folder is None:
            raise SurgeryError("this report is of a model in memory", fix="surgery.save(model, folder, report) first")
        self.refuse_unreadable()
        from surgery.report.card import render_card
        from surgery.report.head_map import draw_recorded

        # The card names the notices that are in the folder. Code is hashed once, after it was written.
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        self.data["notices"] = [name for name in names if name.upper().startswith(NOTICES)]
        if self.data.get("tier") == SURGICAL and not self.data.get("code"):
            self.data["code"] = {name: sha256(self.folder / name) for name in names if name.endswith(".py")}
        card = self.folder / CARD
        if card.is_file():
            self.data["owner_notes"] = notes_of(card.read_text(encoding="utf-8", errors="replace"))
        if not self.data.get("owner_notes"):
            self.data.pop("owner_notes", None)
        self.data["chat_template"] = _has_chat_template(self.folder)
        if list_files:
            draw_recorded(self.data, self.folder)
            self.data["other_files"] = other_files(self.folder, {*self.data["files"], CARD})
        text = render_card(self.data, base_card(self.folder))
        known = (self.data.get("other_files") or {}).get(CARD)
        if known is None or not card.exists() or entry(card)["sha256"] == known["sha256"]:
            write_text(card, text)
            if "other_files" in self.data:
                self.data["other_files"][CARD] = entry(card)
        if self.intact:
            self.data["record_sha256"] = record_hash(self.data)
        write_json(self.folder / FILE, self.data)

    def refuse_unreadable(self) -> None:
        """Raise if the data were edited so that surgery.json cannot hold them or could not be read again."""
        if not isinstance(self.data, dict):
            fault = f"its data are {shown(self.data)}"
        elif self.data.get("format") != FORMAT:
            fault = f"format is {shown(self.data.get('format'))}; known: {FORMAT}"
        else:
            fault = json_fault(self.data) or _damage_of_file(self.data)
        if fault:
            fix = "give it as surgery made it; notes of yours are plain data: text, finite numbers, lists, dicts"
            raise RecordError(f"this report cannot be written: {fault}", fix=fix)

    def record_evaluation(self, result: dict, scored_in: dict[str, str] | None = None) -> None:
        """Record a score and compare it with the recipe's gate.

        Args:
            result: `to_dict()` of the main probe's result.
            scored_in: how it was measured (default: `conditions()` of this run).
        """
        self._record_scores({SCORED_IN: scored_in or conditions()} | result)

    def _record_scores(self, result: dict) -> None:
        from surgery.report.gate import gate

        self.data["evaluation"] = result
        if limits := self.data["gate"]["limits"]:
            status, reasons = gate(result, limits)
            self.data["gate"] |= {"status": status, "reasons": reasons}

    def record_probe(self, name: str, result: dict, scored_in: dict[str, str] | None = None) -> None:
        """Record a further probe (`to_dict()` of its result) next to the main probe, and compare with the gate."""
        scored = without_cases(result) | {SCORED_IN: scored_in or conditions()}
        self._record_scores((self.data["evaluation"] or {}) | {name: scored})

    def raise_faults(self, kind: type[SurgeryError] = SurgeryError) -> None:
        """Raise the fault that the report records: a failed check, otherwise a failed gate.

        Args:
            kind: raise only errors of this class.
        """
        folder, checked = str(self.folder), self.data["check"]
        if checked and not checked["passed"] and issubclass(CheckError, kind):
            faults = [item for item in checked["items"] if item["status"] == "failed"]
            what = "; ".join(f"{item['name']}: {item['detail']}" for item in faults)
            error = CheckError(f"the check found a fault: {what}", where=folder)
            error.reported = True
            raise error
        if self.gate == "failed" and issubclass(GateError, kind):
            error = GateError(
                f"the quality gate failed: {'; '.join(self.data['gate'].get('reasons', []))}",
                where=folder,
                fix="the folder is kept and marked `gate: failed`; train it, choose a milder setting, raise the limit "
                "(evaluate.max_kl=...), or accept the damage with --no-gate",
            )
            error.reported = True
            raise error

    @classmethod
    def of(cls, folder: str | Path) -> Report:
        """The report of a saved checkpoint.

        Raises:
            SurgeryError: the folder has no surgery.json, or it has another format or is damaged.
        """
        if not isinstance(folder, str | Path):
            raise SurgeryError(f"{shown(folder)} is not a path", where="folder", fix="give a text or a pathlib.Path")
        folder = Path(folder)
        if not folder.is_dir():
            close = nearest(folder.name, folders(folder.parent))
            fix = (
                f"did you mean {folder.with_name(close).as_posix()!r}?"
                if close
                else "name a folder that surgery wrote"
            )
            raise SurgeryError("no such folder", where=str(folder), fix=fix)
        if not (folder / FILE).is_file():
            raise RecordError(
                "no surgery.json: not a checkpoint that surgery wrote",
                where=str(folder),
                fix="`surgery apply RECIPE MODEL -o OUT` writes one",
            )
        data = read_json(folder / FILE)
        if data.get("format") != FORMAT:
            raise RecordError(
                f"surgery.json has format {data.get('format')!r}; known: {FORMAT}",
                where=str(folder),
            )
        if fault := _damage_of_file(data):
            fix = "take surgery.json from the folder as it was written, or convert again (surgery apply)"
            raise RecordError(f"surgery.json is damaged: {fault}", where=str(folder), fix=fix)
        return cls(data, folder, is_intact(data))


def _damage_of_file(data: dict) -> str:
    """Why a surgery.json cannot be read, or ""."""
    for name, kind in REQUIRED.items():
        if name not in data:
            return f"it has no {name}"
        if not isinstance(data[name], kind):
            return f"{name} is {shown(data[name])}"
    for name in ("other_files", "timing"):
        if not isinstance(data.get(name), dict | None):
            return f"{name} is {shown(data[name])}"
    for name, info in (data["files"] | (data.get("other_files") or {})).items():
        if not isinstance(info, dict) or type(info.get("bytes")) is not int or type(info.get("sha256")) is not str:
            return f"the entry of {name} has no bytes and sha256"
    healing = data.get("heal")
    if not isinstance(healing, dict | None) or (healing and not isinstance(healing.get("settings"), dict)):
        return f"heal is {shown(healing)}"
    gate, check, evaluation = data["gate"], data["check"], data["evaluation"]
    if not isinstance(gate.get("status"), str) or not isinstance(gate.get("limits"), dict):
        return "gate has no status and limits"
    if check is not None:
        items = check.get("items")
        keys = {"name", "status", "detail"}
        sound = isinstance(items, list) and all(isinstance(item, dict) and keys <= set(item) for item in items)
        if not sound or not isinstance(check.get("passed"), bool):
            return "check has no passed and items"
    steps = data["recipe"].get("operations")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return "recipe has no operations"
    blocks = {"evaluation": evaluation or {}, "plan": data["plan"], "recipe": data["recipe"]}
    inner = {
        "evaluation": ("text", "base", "out", "kl", *REGISTRY),
        "plan": ("parameters", "kv_bytes_per_token", "kv_bytes_fixed"),
        "recipe": ("evaluate",),
    }
    for block, names in inner.items():
        for name in names:
            if not isinstance(blocks[block].get(name), dict | None):
                return f"{block}.{name} is {shown(blocks[block][name])}"
    for block, name, kind in ((data["plan"], "changes", list), (data["plan"], "notes", list),
                              (data, "left_behind", list), (data, "seeds", dict)):  # fmt: skip
        if not isinstance(block.get(name), kind | None):
            return f"{name} is {shown(block[name])}"
    if not all(isinstance(each, dict) and isinstance(each.get("record"), dict | None) for each in data["operations"]):
        return "operations holds something else"
    for name in ("history", "exports"):
        entries = data.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            return f"{name} holds something else"
    return ""


def _has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a folder has a chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except SurgeryError:
        return False


def base_card(folder: Path) -> str | None:
    """The text of the base model's card, which a folder keeps in a separate file; None if it has none."""
    path = folder / BASE_CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def new_report(
    plan, source, made: Anatomy, *, overrides=(), engine: str, fingerprint: str, records: list[dict]
) -> dict[str, Any]:
    """The data of a report before any check or score.

    Args:
        plan: the `Plan` that was carried out.
        source: the `hub.ResolvedModel` of the base.
        made: the anatomy of the result. Where a measurement chose the heads, the plan knows the cache only roughly.
        overrides: the user's changes to the recipe, as typed.
        engine: "streaming" or "loaded".
        fingerprint: fingerprint of the base's weight files.
        records: the record of each operation, in order.
    """
    import torch

    return {
        "format": FORMAT,
        "surgery_version": versions()["surgery"],
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tier": NATIVE if plan.measured and not made.surgical else plan.tier,
        "engine": engine,
        "base": {
            "name": source.name,
            "hub_id": source.hub_id,
            "base_model": source.base_model,
            "revision": source.revision,
            "model_type": plan.before.composite or plan.before.model_type,
            "composite": plan.before.composite is not None,
            "fingerprint": fingerprint,
            "config": stable_config(source.path) if fingerprint else None,
            "generation_config": _generation_config(source.path) if fingerprint else None,
            "note": source.note,
        },
        "recipe": published_recipe(plan.recipe.identity()),
        "recipe_source": plan.recipe.source,
        "overrides": [published_override(text) for text in overrides],
        "plan": plan.summary(made),
        "operations": [step.record(record) for step, record in zip(plan.steps, records, strict=True)],
        "versions": versions(step.operation.op for step in plan.steps),
        "threads": torch.get_num_threads(),
        "seeds": {step.operation.op: step.operation.seed for step in plan.steps if hasattr(step.operation, "seed")},
        "files": {},
        "left_behind": [],
        "check": None,
        "evaluation": None,
        "gate": {"status": "not run", "limits": plan.recipe.evaluate.limits if plan.recipe.evaluate else {}},
        "history": [],
    }


def _generation_config(base: Path) -> dict | str | None:
    """The generation config of a base; None where it cannot be read, of which Transformers makes nothing."""
    if not (base / CONFIGS[1]).is_file():
        return NO_FILE
    with suppress(SurgeryError):
        return stable_config(base, CONFIGS[1])
    return None


def versions(ops: Iterable[str] = ()) -> dict[str, str]:
    """Versions of surgery, Python, the libraries that a result depends on, and the packages that provide operations.

    Args:
        ops: names of the recipe's operations.
    """
    from surgery.version import __version__

    known = {"surgery": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors"):
        known[name] = metadata.version(name)
    points = third_party()
    packages = (points[op].dist for op in ops if op in points)
    return known | {package.name: package.version for package in packages if package is not None}
