"""A model in memory: what is known of its origin, and how it becomes a folder as complete as a converted one."""

from __future__ import annotations

import shutil
from pathlib import Path

from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError, shown
from surgery.io.files import BASE_CARD
from surgery.io.loading import DONE, is_model
from surgery.io.model_folder import refuse_links_out
from surgery.io.output_folder import OutputFolder, weight_files
from surgery.machine.transformers_logging import quiet_transformers
from surgery.report.report import NOTICES, Report, history_of


def note_origin(report: Report, model, was: str) -> None:
    """Record where a model in memory comes from and what was done to it before.

    Args:
        was: the name of the model's class before the surgery, which stands for a name where it has none.
    """
    data, config = report.data, model.config
    earlier = getattr(model, DONE, [])
    folder = _folder(model)
    if folder:  # whoever changes the working folder must not make another one of it
        config._name_or_path = str(folder)
    known = {"class": type(model).__name__, "heads": _heads(model)}
    history = history_of(folder) if folder else []
    data |= {"in_memory": known, "history": [*history, *(_plain(record) for record in earlier)]}
    if data["base"]["name"] == type(model).__name__:
        data["base"]["name"] = was
    if data["base"]["hub_id"]:
        data["base"]["revision"] = getattr(config, "_commit_hash", None)
    setattr(model, DONE, [*earlier, data])


def save_model(model, folder: str | Path, report: Report, *, tokenizer=None, overwrite: bool = False) -> Report:
    """Save a loaded model with its report; arguments and errors as for `surgery.save`."""
    _refuse_another(model, report)
    base = _folder(model)
    if base:
        refuse_links_out(base)
    out = OutputFolder(folder, base, "in memory", overwrite=overwrite)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with out.opened(needed) as partial:
        with quiet_transformers():
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if base:
            _copy_documents(base, partial)
        saved = Report(_plain(report.data) | {"files": weight_files(partial)}, partial)
        saved.save(list_files=True)
    saved.folder = out.out
    return saved


def _plain(data: dict) -> dict:
    """The data of a report as it is kept: without the list of heads, and not shared with the model's own."""
    known = data.get("in_memory")
    rest = {key: value for key, value in data.items() if key != "in_memory"}
    return rest | ({"in_memory": {"class": known["class"]}} if known else {})


def _folder(model) -> Path | None:
    """The folder that a model was loaded from, if it was one."""
    name = getattr(model.config, "_name_or_path", "")
    return Path(name).absolute() if name and (Path(name) / "config.json").is_file() else None


def _heads(model) -> list[list[int]]:
    """Query heads, KV heads and streaming KV heads of every layer."""
    return [[layer.heads, layer.kv_heads, len(layer.streaming)] for layer in Anatomy.of(model).layers]


def _refuse_another(model, report: Report) -> None:
    """Raise where the report is plainly not of this model, or was edited into what cannot be written."""
    fix = "give the report that surgery.apply returned for this very model"
    if not isinstance(report, Report):
        raise SurgeryError(f"report is {type(report).__name__}, not a surgery.Report", fix=fix)
    if not is_model(model):
        raise SurgeryError(f"{type(model).__name__} is not a loaded model", fix="surgery.save(model, folder, report)")
    report.refuse_unreadable()  # before a weight is written
    known, kind = report.data.get("in_memory") or {}, report.data["base"].get("model_type")
    if not _is_origin(known):
        raise SurgeryError(f"this report cannot be written: in_memory is {shown(known)}", fix=fix)
    where, reported_class = type(model).__name__, known.get("class")
    if reported_class and reported_class != where:
        adapters = "; merge adapters first: model = model.merge_and_unload()" if hasattr(model, "peft_config") else ""
        raise SurgeryError(f"the report is of a {reported_class}", where=where, fix=fix + adapters)
    if kind and model.config.model_type != kind:
        raise SurgeryError(f"the report is of a {kind} model, this is {model.config.model_type}", where=where, fix=fix)
    if "heads" in known and known["heads"] != (heads := _heads(model)):
        what = f"the report is of {_shape(known['heads'])}, this model has {_shape(heads)}"
        raise SurgeryError(what, where=where, fix=fix)


def _is_origin(known: object) -> bool:
    """Whether this is of the form in which `note_origin` records a model; {}: it recorded none."""
    if not isinstance(known, dict) or (known and "class" not in known):
        return False
    heads = known.get("heads", [[0, 0, 0]])
    return isinstance(heads, list) and heads != [] and all(isinstance(row, list) and len(row) == 3 for row in heads)


def _shape(heads: list[list[int]]) -> str:
    first = heads[0]
    return (
        f"{len(heads)} layers with {first[0]} query heads, {first[1]} KV heads and {first[2]} streaming in the first"
    )


def _copy_documents(base: Path, partial: Path) -> None:
    """Licence, notices and card of the folder that the model was loaded from."""
    for path in sorted(p for p in base.iterdir() if p.is_file() and p.name.upper().startswith(NOTICES)):
        shutil.copyfile(path, partial / path.name)
    card = next((base / name for name in (BASE_CARD, "README.md") if (base / name).is_file()), None)
    if card:
        shutil.copyfile(card, partial / BASE_CARD)
