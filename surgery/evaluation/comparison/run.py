"""Measures several models beside one base. What is finished is kept in a folder, so that the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architecture.anatomy import Anatomy
from surgery.config.arguments import refuse_no_function, refuse_no_path
from surgery.config.recipe import recorded
from surgery.data.text import load_text
from surgery.errors import MachineError, ModelMismatchError, SettingError, SurgeryError, shown
from surgery.evaluation.base_runs import BaseRuns
from surgery.evaluation.benchmark.run import bench
from surgery.evaluation.comparison.measures import LONG, Measure, chosen
from surgery.evaluation.comparison.result import BASE, ROW, Comparison
from surgery.evaluation.paired import finite
from surgery.evaluation.probes import REGISTRY, main
from surgery.evaluation.result import without_cases
from surgery.io.files import REPORT, sha256, write_json
from surgery.io.hub import resolve
from surgery.io.identity import model_identity, tokenizer_identity
from surgery.io.loading import read_config, read_tokenizer
from surgery.io.manifest import model_differences
from surgery.io.output_folder import used_alone
from surgery.machine.placement import AUTO, conditions, current, device_for, placed
from surgery.report.lineage import another_base, another_origin, recipe_probe, recorded_base, same_settings
from surgery.report.report import SCORED_IN, Report, versions
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.config.recipe import Recipe
    from surgery.machine.progress import Progress

OTHER_FOLDER = "name another folder for the figures"
FILE, PICTURE, BASE_RUNS = "compare.json", "compare.png", "base-runs"  # in the folder of a comparison
PROMPT, ROUNDS = 2000, 3  # of the measurement of speed
CACHE_FORMULA = 2  # raise it when the cache is counted otherwise: kept figures are then counted anew
MIB = 2**20


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        name: by which its figures are kept; no two have the same.
        shown: its name in table, notes and picture.
        identity: changes when the model does.
        opened: gives its folder; it exists only inside the context.
        report: its record, if it has one.
        recipe: by which it was made or will be, if that is known.
        doubt: why nothing is taken from its record; "": there is no reason.
    """

    name: str
    shown: str
    identity: str
    opened: Callable[[], AbstractContextManager[Path]]
    report: Report | None = None
    recipe: Recipe | None = None
    doubt: str = ""


@placed
def compare(
    models: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    folder: str | Path = "comparison",
    text: str | Path = "builtin",
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Measure models beside the base that they were made from: the same prompts for all.

    Args:
        models: two folders or more. Each has a surgery.json that names this base, or at least its tokenizer.
        base: folder, name or Hub id; default: the base that the first model names, at its revision.
        folder: holds the figures that are finished, and what the base scored. The same call goes on from them.
        text: "builtin" or a text file, for all measurements on text.
        only, leave_out: names of measurements (`surgery.evaluation.comparison.measures`).
        device, dtype: as for `surgery.evaluate`.
        progress: called with done, total and a label.

    Returns:
        The comparison, which can be printed; `result.plot(path)` draws it.

    Raises:
        SurgeryError: fewer than two models, the same model twice, models of different bases or tokenizers, or no
            such measurement.
    """
    names = listed("models", models)
    refuse_no_path("folder", folder)
    refuse_no_function(progress=progress)
    measures = chosen(listed("only", only), listed("leave_out", leave_out))
    if len(names) < 2:
        what = f"{len(names)} model{'s' * (len(names) != 1)} to compare"
        raise SettingError(what, fix="name two or more; of one, `surgery eval MODEL --base BASE` says more")
    if ROW in names:
        raise SettingError(f"a model may not be called {ROW!r}", fix=f"write it as a path: ./{ROW}")
    folders, digest = {name: resolve(name).path for name in names}, cache(sha256)  # weights are read once
    for name, path in folders.items():
        if [each.resolve() for each in map(folders.get, names)].count(path.resolve()) > 1:
            raise SettingError(f"{name} is named twice", fix="name each model once")
    reports = {name: Report.of(path) if (path / REPORT).is_file() else None for name, path in folders.items()}
    named = next((name for report in reports.values() if report and (name := recorded_base(report.data))), None)
    if base is None and named is None:
        raise SettingError("no base is named, and no model has a surgery.json that names one", fix="--base MODEL")
    source = resolve(str(base if base is not None else named))
    refuse_strangers(reports, folders, source.path, str(base or named))
    candidates = _candidates(folders, reports, digest)
    found = measure_all(candidates, source.path, source.name, Path(folder), measures, str(text), progress)
    found.notes += [
        f"{each.shown} has no surgery.json, so that only its tokenizer shows that it belongs to {source.name}"
        for each in candidates
        if each.report is None and folders[each.name].resolve() != source.path.resolve()
    ]
    found.notes += [f"{each.shown}: {each.doubt}" for each in candidates if each.doubt]
    return found


def _candidates(
    folders: Mapping[str, Path], reports: Mapping[str, Report | None], digest: Callable[[Path], str]
) -> list[Candidate]:
    """The models of some folders; `folders` and `reports` are those of `refuse_strangers`."""
    shown, candidates = short_names([*folders]), []
    for name, path in folders.items():
        recipe = recorded(report.data) if (report := reports[name]) else None
        opened = partial(nullcontext, path)
        doubt = _doubt_of(report, path, digest) if report else ""
        candidates.append(Candidate(name, shown[name], _identity_of(path, digest), opened, report, recipe, doubt))
    return candidates


def _doubt_of(report: Report, folder: Path, digest: Callable[[Path], str]) -> str:
    """Why the scores in a record may not be those of the model beside it, or ""."""
    if report.edited or not (changed := model_differences(folder, report.data, digest=digest)):
        return report.edited
    return f"nothing is taken from its {REPORT}, since its folder is not as that describes it: {changed[0]}"


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Model -> its name without the folders that all of them lie in."""
    paths = {model: Path(model).parts for model in models}
    levels = zip(*(parts[:-1] for parts in paths.values()), strict=False)
    together = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    short = {model: str(Path(*parts[together:])) for model, parts in paths.items()}
    return {model: model for model in models} if ROW in short.values() else short


def listed(name: str, values: object) -> list[str]:
    """A list of names; raises for one name, for None, and for what is no name."""
    if isinstance(values, str | Path) or not isinstance(values, Iterable):
        raise SettingError(f"{name} is {shown(values)}", fix=f"a list of names: {name}=['a', 'b']")
    found = list(values)
    if wrong := [value for value in found if not isinstance(value, str | Path)]:
        kind = type(wrong[0]).__name__
        raise SettingError(f"{name} holds a {kind}, which is no name", fix="save a loaded model, and name its folder")
    return [str(value) for value in found]


def refuse_strangers(reports: Mapping[str, Report | None], folders: Mapping[str, Path], base: Path, name: str) -> None:
    """Raise for models that do not belong to a base, all of them in one error.

    Args:
        reports: model -> its record, or None.
        folders: model -> its folder.
        name: the base, as the user named it.
    """
    faults, words = [], tokenizer_identity(read_tokenizer(base))
    for model, path in folders.items():
        report = reports[model]
        if report is not None and (reason := another_origin(report.data, base)):
            faults.append(ModelMismatchError(f"{model} is of another base: {reason}"))
            continue
        if tokenizer_identity(read_tokenizer(path)) != words:
            faults.append(ModelMismatchError(f"{model} has another tokenizer than {name}: the prompts would differ"))
    if faults:
        first, *rest = faults
        raise ModelMismatchError(first.what, fix="compare models of one base", others=tuple(rest))


def _identity_of(folder: Path, digest: Callable[[Path], str] = sha256) -> str:
    """Changes with the weights, the configs, the code and the tokenizer of a model."""
    return f"{model_identity(folder, digest)} {tokenizer_identity(read_tokenizer(folder))}"


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
    digest = load_text(text, part="held-out").sha256
    dtype, device = current().dtype, device_for(0).type
    way = f" {dtype}" * (dtype != AUTO) + f" {device}" * (device != "cpu")  # they decide the last digits
    identity = {"base": _identity_of(base) + way, "text": digest}
    file = _file(folder)
    with used_alone(folder, OTHER_FOLDER):
        kept = _kept(file, identity)
        write_json(file, {"format": 1, **identity, "models": kept})  # what is kept from here on belongs to this base
        shared, config = BaseRuns(folder / BASE_RUNS, identity["base"]), read_config(base)
        names, about = {each.name: each.shown for each in candidates}, {"text": text, "machine": _machine()}
        comparison = Comparison(base_name, tuple(measures), {}, names=names, settings=about)
        for candidate in candidates:
            finished = kept.setdefault(candidate.name, {"identity": candidate.identity, "records": {}, "taken": []})
            if finished["identity"] != candidate.identity:
                finished |= {"identity": candidate.identity, "records": {}, "taken": []}
            records = {m.name: r for m in measures if (r := _usable(finished["records"].get(m.name), m, config, text))}
            if left := [measure for measure in measures if measure.name not in records]:
                scores = _scores_of(candidate, base)  # in its surgery.json
            for measure in left:
                finished["taken"] = [name for name in finished["taken"] if name != measure.name]
                if known := _recorded(scores, candidate, measure, base, text, digest):
                    records[measure.name] = known | {"asked": _asked(measure, config, text)}
                    finished["taken"].append(measure.name)
            if missing := [measure for measure in measures if measure.name not in records]:
                with candidate.opened() as path:
                    for measure in missing:
                        said = _named(progress, f"{measure.what} of {candidate.name}")
                        record = _measured(measure, path, base, text, shared, said)
                        on = {"on": record["machine"]} if "machine" in record else {}  # where it could be timed
                        records[measure.name] = record | {"asked": _asked(measure, config, text) | on}
                        if record["status"] == "done":  # a reason why not may be gone the next time
                            finished["records"][measure.name] = records[measure.name]
                            write_json(file, {"format": 1, **identity, "models": kept})
            finished["records"] |= {name: record for name, record in records.items() if record["status"] == "done"}
            comparison.records[candidate.name] = {measure.name: records[measure.name] for measure in measures}
            comparison.taken[candidate.name] = [m.name for m in measures if m.name in finished["taken"]]
        cuts = {measure.what: measure.cuts(config, text) for measure in measures}
        comparison.notes += [
            f"{what}: {key} {value:,} instead, since the base takes no more"
            for what, cut in cuts.items()
            for key, value in cut.items()
        ]
        comparison.notes += _too_short(candidates, measures, config, text)
        write_json(file, {"format": 1, **identity, "models": kept, "comparison": comparison.to_dict()})
    return comparison


def _too_short(candidates: Sequence[Candidate], measures: Sequence[Measure], config: Any, text: str) -> list[str]:
    """Where windows are too short to show what an operation of a recipe changes."""
    found: dict[str, list[str]] = {}
    probes = [measure.for_model(config, text) for measure in measures if measure.probe]
    lengths = [probe.length for probe in probes if isinstance(probe, main())]
    for candidate in candidates:
        for length in lengths if candidate.recipe else ():
            if said := candidate.recipe.too_short(length, "windows", ""):
                found.setdefault(said, []).append(candidate.shown)
    return [f"{said} ({', '.join(names)})" for said, names in found.items()]


def stages(models: Sequence[str], measures: Sequence[Measure]) -> list[str]:
    """Names of the stages that a comparison reports."""
    return [f"{measure.what} of {model}" for model in models for measure in measures]


def _named(progress: Progress | None, stage: str) -> Progress | None:
    """A callback that reports everything as one stage; the inner stage becomes the detail."""
    if progress is None:
        return None
    return lambda done, total, label: progress(done, total, f"{stage}: {label.replace(':', ',')}")


def _file(folder: Path) -> Path:
    """The file of a comparison, in a folder that exists from now on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SettingError("this is a file, and a folder is needed", where=str(folder), fix=OTHER_FOLDER) from None
    if (folder / REPORT).is_file() or (folder / "config.json").is_file():
        raise SettingError("this folder holds a model", where=str(folder), fix=OTHER_FOLDER)
    file, runs = folder / FILE, folder / BASE_RUNS
    if file.exists() and not file.is_file():
        raise SettingError("this is no file, and the figures are kept in one", where=str(file), fix=OTHER_FOLDER)
    if runs.exists() and not runs.is_dir():
        raise SettingError("this is no folder, and a folder is needed", where=str(runs), fix=OTHER_FOLDER)
    return file


def _kept(file: Path, identity: Mapping[str, str]) -> dict[str, dict]:
    """The finished figures of an earlier run with this base and text; {} if there are none."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        models = data["models"]
        sound = all(
            {"identity", "records", "taken"} <= set(each) and isinstance(each["records"], dict)
            for each in models.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        fix = "remove the file, or write to another folder"
        raise SurgeryError("these figures cannot be read", where=str(file), fix=fix, code="invalid-file")
    if any(data.get(key) != value for key, value in identity.items()):
        what = "this folder holds a comparison with another base, on another text, in another dtype or on another kind"
        what += " of device"
        raise SettingError(what, where=str(file.parent), fix=OTHER_FOLDER)
    return models


def _asked(measure: Measure, config: Any, text: str) -> dict[str, Any]:
    """What a measurement depends on besides models and text: its settings, this version; of times, the machine."""
    if measure.probe:
        asked = measure.for_model(config, text).model_dump(mode="json", exclude={"text"})
        return {"settings": asked, "version": __version__}
    if measure.name == "cache":
        return {"tokens": LONG, "counted": CACHE_FORMULA}
    return {"tokens": PROMPT, "rounds": ROUNDS, "on": _machine(), "versions": versions()}


def _machine() -> str:
    """What runs the models: the CPU, or the GPU of this run."""
    from surgery.evaluation.benchmark.run import machine_name

    return machine_name(device_for(0))


def _usable(record: object, measure: Measure, config: Any, text: str) -> dict | None:
    """A kept record, if it was measured in the way that is asked for now."""
    if not isinstance(record, dict) or record.get("status") != "done":
        return None
    return record if record.get("asked") == _asked(measure, config, text) else None


def _scores_of(candidate: Candidate, base: Path) -> dict:
    """The evaluation in the surgery.json of a model, if it is of this model and this base; else {}."""
    if candidate.report is None or candidate.doubt:
        return {}
    evaluation = candidate.report.data.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("status") != "done":
        return {}
    # Of a second surgery, the scores are beside the model that it began from.
    return {} if another_base(candidate.report.data, base) else evaluation


def _recorded(scores: dict, candidate: Candidate, measure: Measure, base: Path, text: str, digest: str) -> dict | None:
    """The recorded result of a measurement with the same settings, text, version and way to measure, or None."""
    if not scores or not measure.probe or candidate.report is None:
        return None
    probe = measure.for_model(read_config(base), text)
    asked = recipe_probe(candidate.report.data, type(probe))
    if asked is None or not same_settings(asked, probe):
        return None
    record = scores if type(probe) is main() else scores.get(probe.name)
    if not record or record.get("status") != "done" or not record.get(BASE):
        return None
    if record.get(SCORED_IN, scores.get(SCORED_IN)) != conditions():  # they decide prompts, or the last digits
        return None
    read = record.get("text") or (record.get("settings") or {}).get("text")
    if read and read.get("sha256") != digest[: len(str(read.get("sha256")))]:
        return None
    return {key: value for key, value in record.items() if key not in (*_other_probes(probe), SCORED_IN)}


def _other_probes(probe: Any) -> set[str]:
    """Keys of the main probe's record that hold the records of others."""
    return set(REGISTRY) if probe.main else set()


def _measured(
    measure: Measure, path: Path, base: Path, text: str, shared: BaseRuns, progress: Progress | None
) -> dict:
    """The record of a measurement. What a model cannot answer is recorded as not run, with the reason.

    Raises:
        MachineError: disk, memory or network: another try may go well.
    """
    try:
        if not measure.probe:
            return _cache(path, base) if measure.name == "cache" else _speed(path, base, progress)
        probe = measure.for_model(read_config(base), text)
        if reason := probe.unasked(base):
            return {"status": "not run", "reason": reason}
        return without_cases(probe.measure(path, base, progress=progress, shared=shared).to_dict())
    except MachineError:
        raise
    except SurgeryError as error:
        return {"status": "not run", "reason": error.what}


def _cache(path: Path, base: Path) -> dict:
    """Bytes of KV cache for each further token, and MiB at `LONG` tokens."""
    record: dict[str, Any] = {"status": "done", "tokens": LONG}
    for side, folder in ((BASE, base), ("out", path)):
        anatomy = Anatomy.of(folder)
        per_token, fixed = int(anatomy.kv_bytes_per_token), anatomy.kv_bytes_fixed
        record[side] = {"per_token": per_token, "fixed": fixed, "long_mib": anatomy.kv_bytes_at(LONG) / MIB}
    return record


def _speed(path: Path, base: Path, progress: Progress | None) -> dict:
    """Speed-ups of prompt and decoding over the base on its own cache, with their ranges."""
    result = bench(path, base, lengths=(PROMPT,), rounds=ROUNDS, progress=progress)
    (row,) = result.ratios()
    names = {"prefill": "prefill_vs_stock", "decode": "decode_vs_stock", "own": "decode_vs_block_cache"}
    ratio = {name: row.get(key) for name, key in names.items()}
    ranges = {name: row["ranges"].get(key) for name, key in names.items()}
    record = {"status": "done", "tokens": PROMPT, "rounds": ROUNDS, "machine": result.machine}
    return finite(record | {"ratio": ratio, "ranges": ranges})
