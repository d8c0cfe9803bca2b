"""Verifies that a score was measured against the base of its checkpoint, and that a report belongs to its model."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.stock_class import base_type_of
from surgery.data.text import BUILTIN
from surgery.errors import MachineError, ModelMismatchError, RecordError, SurgeryError, shown
from surgery.evaluation.probes import main
from surgery.evaluation.probes.base import Probe
from surgery.evaluation.probes.settings import requested_probes
from surgery.io.files import json_fault, published, read_json
from surgery.io.identity import CONFIGS, as_written, greedy_settings, stable_config, tokenizer_identity
from surgery.io.manifest import model_differences
from surgery.io.model_in_memory import is_model
from surgery.io.safetensors import BY_CONTENT, Checkpoint
from surgery.machine.placement import conditions
from surgery.report.report import FILE, NO_FILE, SCORED_IN, Report
from surgery.report.reproduction import differing_config

SAYS_NOTHING = ("architectures", "use_cache")  # keys of a config that change no score
KEPT = "which keeps the scores that it has"  # a clause after "not added to the card"


def record_score(report: Report, base: object, probe: Probe, result: dict, tokenizer: Any = None) -> str:
    """Add a score to a checkpoint's surgery.json and card, and compare it with the gate.

    Args:
        base: the base of the score: a folder, a name, or a loaded model.
        probe: the probe that gave the score, with its settings.
        result: `to_dict()` of its result.
        tokenizer: with which it was measured; None: the base's.

    Returns:
        "" if the score was added, otherwise the reason why not.
    """
    if reason := unrecordable(report.data, base, probe, result):
        return reason
    if report.folder and (report.folder / FILE).is_symlink():
        return "its folder is a copy of what is on the Hub, and stays as it is"
    if report.folder and (changed := model_differences(report.folder, report.data)):
        return f"the folder is not as {FILE} describes it: {changed[0]}"
    if report.folder and (reason := _another_tokenizer(report.folder, base, tokenizer)):
        return reason
    if probe.main:
        report.record_evaluation(result)
    else:
        recorded = report.data["evaluation"].get(probe.name) or {}
        joined = probe.joined(recorded, result) if recorded.get("status") == "done" else None
        report.record_probe(probe.name, joined or result)
        if joined and recorded.get(SCORED_IN) != conditions():  # the tasks were measured in two ways
            report.data["evaluation"][probe.name][SCORED_IN] = None
    try:
        report.save()
    except (OSError, MachineError) as error:  # the score itself is not lost
        return f"its folder cannot be written ({getattr(error, 'what', None) or getattr(error, 'strerror', error)})"
    return ""


def _another_tokenizer(folder: Path, base: object, tokenizer: Any) -> str:
    """Why scores with a tokenizer (None: the base's) are not those of a checkpoint; "" if its own is this, or none."""
    from surgery.io.hub import folder_of
    from surgery.io.loading import read_tokenizer

    if tokenizer is None and not isinstance(base, str | Path):
        return ""
    try:
        used = read_tokenizer(folder_of(str(base))) if tokenizer is None else tokenizer
        same = tokenizer_identity(read_tokenizer(folder)) == tokenizer_identity(used)
    except SurgeryError:
        return ""
    return "" if same else "its own tokenizer or chat template is another one than the score was measured with"


def unrecordable(data: dict, base: object, probe: Probe, result: dict | None = None) -> str:
    """Why a score does not belong in a checkpoint's record, or "".

    Args:
        data: the record.
        base: the base of the score: a folder, a name, or a loaded model.
        probe: the probe that gave the score, with its settings.
        result: `to_dict()` of its result, where it is known already.
    """
    if reason := another_base(data, base):
        return reason
    recorded, wanted = data["evaluation"], recipe_probe(data, type(probe))
    if not probe.main:
        if (recorded or {}).get("status") != "done":
            return "the card has no score of perplexity yet, which comes first (`surgery eval OUT --base MODEL`)"
        recorded = recorded.get(probe.name) or None
        recorded = recorded if recorded and recorded.get("status") == "done" else None
    if recorded is not None and not (result and not probe.main and probe.joined(recorded, result)):
        return KEPT
    if wanted is None and probe.main and not data["recipe"].get("evaluate"):  # any score is better than none
        wanted = probe
    if (wanted is None and probe.main) or (wanted and not same_settings(wanted, probe)):
        *names, last = probe.aliases.flags or type(probe).model_fields
        asked = wanted.model_dump(exclude_unset=True) if wanted else {}
        own = ", ".join(f"{key}={value}" for key, value in asked.items())
        return f"{', '.join(names)} or {last} are not those of its recipe{f' ({own})' if own else ''}"
    return ""


def as_its_recipe(probe: Probe, out: str | Path) -> Probe:
    """The probe by which the recipe of a checkpoint judges it, where nothing else was asked and it has no score yet.

    Otherwise `probe`.
    """
    if not probe.main or probe.model_fields_set:
        return probe
    from surgery.io.hub import folder_of

    folder = folder_of(out)
    if not (folder / FILE).is_file():
        return probe
    data = Report.of(folder).data
    judged = recipe_probe(data, main()) if (data["evaluation"] or {}).get("status") != "done" else None
    text = getattr(judged, "text", BUILTIN)  # of a file, a record has the last name alone
    return judged if judged is not None and (text == BUILTIN or Path(text).is_file()) else probe


def recipe_probe(data: dict, kind: type[Probe]) -> Probe | None:
    """The probe of class `kind` with the settings of a record's recipe; None if the recipe does not ask for it."""
    judged_by = data["recipe"].get("evaluate")
    try:
        return next((each for each in requested_probes(judged_by) if type(each) is kind), None) if judged_by else None
    except (ValueError, TypeError, AttributeError):  # the record was edited, or a later version wrote it
        return None


def same_settings(one: Probe, other: Probe) -> bool:
    """Whether two probes have the same settings. Text files are compared by name, because a record keeps only that."""
    return _published(one) == _published(other)


def _published(probe: Probe) -> dict:
    return {key: published(value) if isinstance(value, str) else value for key, value in probe.model_dump().items()}


def comparable(recorded: dict) -> bool:
    """Whether the fingerprint in a record of a base can be compared with another folder's."""
    return (recorded.get("fingerprint") or "").startswith(BY_CONTENT)


def another_base(record: dict, base: object) -> str:
    """Why a base is not the one that a checkpoint was made from, or cannot be identified; "" if it is that base.

    Args:
        record: the checkpoint's surgery.json, of which `base` and `history` are read.
        base: a folder, a name, or what `resolve` found; a loaded model cannot be identified.
    """
    from surgery.io.hub import ResolvedModel, resolve

    if not isinstance(base, str | Path | ResolvedModel):
        return "a base in memory cannot be identified"
    recorded, source = record["base"], base if isinstance(base, ResolvedModel) else resolve(str(base))
    if recorded.get("hub_id") and recorded.get("revision") and source.hub_id:
        same = (source.hub_id, source.revision) == (recorded["hub_id"], recorded["revision"])
        return "" if same else f"it was made from {recorded['hub_id']}@{recorded['revision']}, not from this base"
    if not recorded.get("fingerprint"):
        return "it was made from a model in memory, so no base on disk is known to be its own"
    if not comparable(recorded):
        return "it was made by an earlier version, which knew a base by the times of its files"
    try:
        same = Checkpoint(source.path).fingerprint() == recorded["fingerprint"]
        if same and _is_converted(source.path, record.get("history") or []):
            return f"the base that was named is itself a converted model; its base is {recorded.get('name')}"
        keys = _differing_configs(recorded, source.path) if same else []
    except SurgeryError as error:
        return f"the base cannot be compared with the one it was made from ({error.what})"
    if keys:
        return f"the config of this base differs from that of the one it was made from ({', '.join(keys)})"
    return "" if same else f"this is not the base it was made from ({recorded.get('name')}), or its files were changed"


def _differing_configs(recorded: dict, folder: Path) -> list[str]:
    """Keys in which the configs of a base differ from those in its record; those that were not recorded do not."""
    config, generation, found = recorded.get("config"), recorded.get("generation_config"), []
    present = stable_config(folder)
    if isinstance(config, dict) and config != present:
        with TemporaryDirectory(prefix="surgery-") as temporary:  # so that a key left out has this version's default
            (Path(temporary) / CONFIGS[0]).write_text(json.dumps(as_written(config)), encoding="utf-8")
            found = [key for key in differing_config(Path(temporary), folder) if key not in SAYS_NOTHING]
    if isinstance(generation, dict) or generation == NO_FILE:
        now = greedy_settings(stable_config(folder, CONFIGS[1]) if (folder / CONFIGS[1]).is_file() else None, present)
        # {} is an empty file, or with earlier versions none.
        files = [None] if generation == NO_FILE else [generation] if generation else [{}, None]
        thens = [greedy_settings(each, present) for each in files]
        if now not in thens:
            found += [
                f"{key} of {CONFIGS[1]}" for key in sorted({*thens[0], *now}) if thens[0].get(key) != now.get(key)
            ]
    return found


def another_origin(record: dict, base: object) -> str:
    """Why a checkpoint was not made from a base, nor any that it was made from; "" if one of them was."""
    history = record.get("history") or []
    records = [record, *({"base": each.get("base") or {}, "history": history} for each in history)]
    reasons = [another_base(each, base) for each in records]
    return reasons[0] if all(reasons) else ""


def doubt_of_base(folder: Path, base: Path) -> str:
    """Why a model may not be made from a base; "" if it was, or if it has no record."""
    try:
        return another_origin(Report.of(folder).data, base) if (folder / FILE).is_file() else ""
    except SurgeryError as error:
        return error.what


def _is_converted(folder: Path, history: list[dict]) -> bool:
    """Whether a folder is the result of a surgery that is not in this history. Some surgeries leave all weights."""
    try:
        own = read_json(folder / FILE)
    except (OSError, SurgeryError):
        return False
    return all(own.get("plan_hash") != each.get("plan_hash") for each in history)


def history_of(base: Path) -> list[dict]:
    """Earlier surgeries of this base, oldest first."""
    if not (base / FILE).is_file():
        return []
    try:
        record = read_json(base / FILE)
    except SurgeryError:
        return []
    earlier = record.pop("history", [])
    if not isinstance(earlier, list) or not all(isinstance(each, dict) for each in earlier):
        return []
    if json_fault([*earlier, record]):  # an earlier version wrote NaN into it
        return []
    for name in (
        "other_files",
        "record_sha256",
        "timing",
        "repository",
        "owner_notes",
        "exports",
    ):  # these describe another folder or run
        record.pop(name, None)
    return [*earlier, record]


def recorded_base(data: dict) -> str | None:
    """The base of a record as a name that can be resolved: of the Hub, with its revision; None: it has none."""
    known = data["base"]
    if known.get("hub_id") and known.get("revision"):
        return f"{known['hub_id']}@{known['revision']}"
    return known.get("name")


def heads_of(model) -> list[list[int]]:
    """Numbers of query heads, KV heads and streaming KV heads of every layer of a model or a folder."""
    return [[layer.heads, layer.kv_heads, len(layer.streaming)] for layer in Anatomy.of(model).layers]


def refuse_another(model, report: Report) -> None:
    """Raise if the report belongs to another model, or was edited into data that cannot be written."""
    fix = "give the report that surgery.apply returned for this very model"
    if not isinstance(report, Report):
        raise SurgeryError(f"report is {type(report).__name__}, not a surgery.Report", fix=fix)
    if not is_model(model):
        raise SurgeryError(f"{type(model).__name__} is not a loaded model", fix="surgery.save(model, folder, report)")
    report.refuse_unreadable()  # before a weight is written
    known, kind = report.data.get("in_memory") or {}, report.data["base"].get("model_type")
    if not _is_origin(known):
        raise RecordError(f"this report cannot be written: in_memory is {shown(known)}", fix=fix)
    where, reported_class = type(model).__name__, known.get("class")
    if reported_class and reported_class != where:
        adapters = "; merge adapters first: model = model.merge_and_unload()" if hasattr(model, "peft_config") else ""
        raise ModelMismatchError(f"the report is of a {reported_class}", where=where, fix=fix + adapters)
    if kind and base_type_of(model.config.model_type, kind) != kind:
        raise ModelMismatchError(
            f"the report is of a {kind} model, this is {model.config.model_type}", where=where, fix=fix
        )
    reported = known.get("heads") or _heads_of_folder(report.folder)
    if reported and reported != (heads := heads_of(model)):
        what = f"the report is of {_shape(reported)}, this model has {_shape(heads)}"
        raise ModelMismatchError(what, where=where, fix=fix)


def _heads_of_folder(folder: Path | None) -> list[list[int]]:
    """The heads of the folder that a report was read from; [] if the folder no longer exists."""
    return heads_of(folder) if folder and (folder / "config.json").is_file() else []


def _is_origin(known: object) -> bool:
    """Whether this has the form in which `note_origin` records a model; {} means that none was recorded."""
    if not isinstance(known, dict) or (known and "class" not in known):
        return False
    heads = known.get("heads", [[0, 0, 0]])
    return isinstance(heads, list) and heads != [] and all(isinstance(row, list) and len(row) == 3 for row in heads)


def _shape(heads: list[list[int]]) -> str:
    first = heads[0]
    return (
        f"{len(heads)} layers with {first[0]} query heads, {first[1]} KV heads and {first[2]} streaming in the first"
    )
