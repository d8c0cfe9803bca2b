"""Measures several models beside one base. What is finished is kept in a folder, so that the same command goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelMismatchError, SettingError, SurgeryError
from surgery.evaluation.base_runs import BaseRuns
from surgery.evaluation.benchmark.run import bench
from surgery.evaluation.comparison.measures import LONG, Measure, chosen
from surgery.evaluation.comparison.result import BASE, Comparison
from surgery.evaluation.footprint import footprint
from surgery.evaluation.paired import finite
from surgery.evaluation.probes import main
from surgery.evaluation.result import without_cases
from surgery.io.files import REPORT, write_json
from surgery.io.hub import resolve
from surgery.io.loading import read_config, read_tokenizer
from surgery.io.safetensors import Checkpoint
from surgery.machine.device import processor
from surgery.report.lineage import another_base, recipe_probe, same_settings
from surgery.report.report import Report

if TYPE_CHECKING:
    from surgery.machine.progress import Progress

FILE, PICTURE, BASE_RUNS = "compare.json", "compare.png", "base"  # in the folder of a comparison
PROMPT, ROUNDS = 2000, 3  # of the measurement of speed
MIB = 2**20


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        name: of its row.
        identity: changes when the model does.
        opened: gives its folder; it exists only inside the context.
        report: its record, if it has one.
    """

    name: str
    identity: str
    opened: Callable[[], AbstractContextManager[Path]]
    report: Report | None = None


def compare(
    models: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    folder: str | Path = "comparison",
    text: str = "builtin",
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Measure models beside the base that they were made from: the same prompts for all.

    Args:
        models: two folders or more. Each has a surgery.json that names this base, or at least its tokenizer.
        base: folder, name or Hub id; default: the base that the first model names.
        folder: holds the figures that are finished, the picture, and what the base scored. The same call goes on.
        text: "builtin" or a text file, for all measurements on text.
        only, leave_out: names of measurements (`surgery.evaluation.comparison.measures`).
        progress: called with done, total and a label.

    Raises:
        SurgeryError: fewer than two models, the same model twice, models of different bases or tokenizers, or no
            such measurement.
    """
    measures = chosen(only, leave_out)
    names = [str(model) for model in models]
    if len(names) < 2:
        what = f"{len(names)} model{'s' * (len(names) != 1)} to compare"
        raise SettingError(what, fix="name two or more; of one, `surgery eval MODEL --base BASE` says more")
    folders = {name: resolve(name).path for name in names}
    if len({path.resolve() for path in folders.values()}) < len(names):
        twice = next(name for name in names if names.count(name) > 1 or _same(folders, name))
        raise SettingError(f"{twice} is named twice", fix="name each model once")
    reports = {name: Report.of(path) if (path / REPORT).is_file() else None for name, path in folders.items()}
    named = next((report.data["base"].get("name") for report in reports.values() if report), None)
    if not (base or named):
        raise SettingError("no base is named, and no model has a surgery.json that names one", fix="--base MODEL")
    source = resolve(str(base or named))
    notes = refuse_strangers(reports, folders, source.path, str(base or named))
    candidates = [
        Candidate(name, Checkpoint(path).fingerprint(), lambda path=path: _as_it_is(path), reports[name])
        for name, path in folders.items()
    ]
    found = measure_all(candidates, source.path, source.name, Path(folder), measures, text, progress)
    found.notes += notes
    return found


def _same(folders: Mapping[str, Path], name: str) -> bool:
    return sum(path.resolve() == folders[name].resolve() for path in folders.values()) > 1


@contextmanager
def _as_it_is(path: Path) -> Iterator[Path]:
    yield path


def refuse_strangers(
    reports: Mapping[str, Report | None], folders: Mapping[str, Path], base: Path, name: str
) -> list[str]:
    """Raise for models that do not belong to a base, all of them in one error.

    Args:
        reports: model -> its record, or None.
        folders: model -> its folder.
        name: the base, as the user named it.

    Returns:
        A note for each model without a record.
    """
    faults, notes, words = [], [], _words_of(base)
    for model, path in folders.items():
        report = reports[model]
        if report is not None:
            records = [report.data["base"], *(each.get("base") or {} for each in report.data.get("history") or [])]
            reasons = [another_base(record, base) for record in records]
            if all(reasons):
                faults.append(ModelMismatchError(f"{model} is of another base: {reasons[0]}"))
                continue
        elif path.resolve() != base.resolve():
            notes.append(f"{model} has no surgery.json, so that only its tokenizer shows that it belongs to {name}")
        if _words_of(path) != words:
            faults.append(ModelMismatchError(f"{model} has another tokenizer than {name}: the prompts would differ"))
    if faults:
        first, *rest = faults
        raise ModelMismatchError(first.what, fix="compare models of one base", others=tuple(rest))
    return notes


def _words_of(folder: Path) -> str:
    """A hash of what a tokenizer does: its vocabulary and rules, and its chat template."""
    tokenizer = read_tokenizer(folder)
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = core.to_str() if core is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{rules} {tokenizer.chat_template}".encode()).hexdigest()


def measure_all(
    candidates: Sequence[Candidate],
    base: Path,
    base_name: str,
    folder: Path,
    measures: Sequence[Measure],
    text: str,
    progress: Progress | None = None,
) -> Comparison:
    """Measure every candidate beside the base; figures that are finished are read from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"base": Checkpoint(base).fingerprint(), "text": _identity(text)}
    kept = _kept(folder / FILE, identity)
    shared = BaseRuns(folder / BASE_RUNS)
    comparison = Comparison(base_name, tuple(measures), {}, settings={"text": text, "machine": processor()})
    for candidate in candidates:
        finished = kept.setdefault(candidate.name, {"identity": candidate.identity, "records": {}, "taken": []})
        if finished["identity"] != candidate.identity:
            finished |= {"identity": candidate.identity, "records": {}, "taken": []}
        records = finished["records"]
        for measure in measures:  # what stands in its record
            if measure.name not in records and (known := _recorded(candidate, measure, base, text)):
                records[measure.name] = known
                finished["taken"].append(measure.name)
        missing = [measure for measure in measures if measure.name not in records]
        if missing:
            with candidate.opened() as path:
                for measure in missing:
                    said = _named(progress, f"{measure.what} of {candidate.name}")
                    records[measure.name] = _measured(measure, path, base, text, shared, said)
                    write_json(folder / FILE, {"format": 1, **identity, "models": kept})
        comparison.records[candidate.name] = {m.name: records[m.name] for m in measures}
        comparison.taken[candidate.name] = [m.name for m in measures if m.name in finished["taken"]]
    write_json(folder / FILE, {"format": 1, **identity, "models": kept, "comparison": comparison.to_dict()})
    return comparison


def stages(models: Sequence[str], measures: Sequence[Measure]) -> list[str]:
    """Names of the stages that a comparison reports."""
    return [f"{measure.what} of {model}" for model in models for measure in measures]


def _named(progress: Progress | None, stage: str) -> Progress | None:
    """A callback that reports everything as one stage; the inner stage becomes the detail."""
    if progress is None:
        return None
    return lambda done, total, label: progress(done, total, f"{stage}: {label.replace(':', ',')}")


def _identity(text: str) -> str:
    from surgery.data.text import load_text

    return load_text(text, part="held-out").sha256


def _kept(file: Path, identity: Mapping[str, str]) -> dict[str, dict]:
    """The finished figures of an earlier run with this base and text; {} if there are none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        fix = "remove the file, or write to another folder"
        raise SurgeryError(f"these figures cannot be read: {error}", where=str(file), fix=fix) from None
    if any(data.get(key) != value for key, value in identity.items()):
        what = "this folder holds a comparison with another base or on another text"
        raise SettingError(what, where=str(file.parent), fix="name another folder: --out FOLDER")
    return data["models"]


def _recorded(candidate: Candidate, measure: Measure, base: Path, text: str) -> dict | None:
    """The record in surgery.json of a measurement with the same settings; None if there is none."""
    evaluation = candidate.report.data["evaluation"] if candidate.report else None
    if not measure.probe or not evaluation or evaluation.get("status") != "done":
        return None
    probe = measure.for_model(read_config(base), text)
    asked = recipe_probe(candidate.report.data, type(probe))
    if asked is None or not same_settings(asked, probe):
        return None
    record = evaluation if type(probe) is main() else evaluation.get(probe.name)
    if not record or record.get("status") != "done" or not record.get(BASE):
        return None
    return {key: value for key, value in record.items() if key not in _other_probes(probe)}


def _other_probes(probe: Any) -> set[str]:
    """Keys of the main probe's record that hold the records of others."""
    from surgery.evaluation.probes import REGISTRY

    return set(REGISTRY) if probe.main else set()


def _measured(
    measure: Measure, path: Path, base: Path, text: str, shared: BaseRuns, progress: Progress | None
) -> dict:
    """The record of a measurement. What a model cannot answer is recorded as not run, with the reason."""
    if not measure.probe:
        return _cache(path, base) if measure.name == "cache" else _speed(path, base, progress)
    try:
        probe = measure.for_model(read_config(base), text)
        if reason := probe.unasked(base):
            return {"status": "not run", "reason": reason}
        return without_cases(probe.measure(path, base, progress=progress, shared=shared).to_dict())
    except SurgeryError as error:
        return {"status": "not run", "reason": error.what}


def _cache(path: Path, base: Path) -> dict:
    """Bytes of KV cache for each further token, and MiB at `LONG` tokens."""
    from surgery.architecture.anatomy import Anatomy

    record: dict[str, Any] = {"status": "done", "tokens": LONG}
    for side, folder in ((BASE, base), ("out", path)):
        per_token, anatomy = footprint(folder, side, []).kv_bytes_per_token, Anatomy.of(folder)
        fixed = anatomy.kv_bytes_fixed
        whole = None if per_token is None else (per_token * LONG + fixed) / MIB
        record[side] = {"per_token": per_token, "fixed": fixed, "long_mib": whole}
    return record


def _speed(path: Path, base: Path, progress: Progress | None) -> dict:
    """Speed-ups of prompt and decoding over the base on its own cache, with their ranges."""
    try:
        result = bench(path, base, lengths=(PROMPT,), rounds=ROUNDS, progress=progress)
    except SurgeryError as error:
        return {"status": "not run", "reason": error.what}
    (row,) = result.ratios()
    names = {"prefill": "prefill_vs_stock", "decode": "decode_vs_stock"}
    ratio = {name: row[key] for name, key in names.items()}
    ranges = {name: row["ranges"].get(key) for name, key in names.items()}
    return finite({"status": "done", "tokens": PROMPT, "rounds": ROUNDS, "ratio": ratio, "ranges": ranges})
