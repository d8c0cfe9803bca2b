"""A model in memory: records its origin, and saves it as a folder that is as complete as a converted one."""

from __future__ import annotations

import shutil
from pathlib import Path

from surgery.io.earlier_keys import add_earlier_keys
from surgery.io.files import BASE_CARD
from surgery.io.model_folder import refuse_links_out
from surgery.io.model_in_memory import DONE, origin_folder, weights_version
from surgery.io.output_folder import OutputFolder, weight_files
from surgery.machine.transformers_logging import quiet_transformers
from surgery.report.lineage import heads_of, history_of, refuse_another
from surgery.report.report import NOTICES, Report


def note_origin(report: Report, model, was: str) -> None:
    """Record the origin of a model in memory, and the surgeries that it had before.

    Args:
        was: name of the model's class before the surgery; it serves as the base's name if the model has none.
    """
    data, config = report.data, model.config
    earlier = getattr(model, DONE, [])
    folder = origin_folder(model)
    if folder:  # absolute, so that the path holds after a change of the working folder
        config._name_or_path = str(folder)
    model.name_or_path = ""  # an adapter that peft trains here names its base by this: it is not the unconverted one
    known = {"class": type(model).__name__, "heads": heads_of(model)}
    history = history_of(folder) if folder else []
    data |= {"in_memory": known, "history": [*history, *(_plain(record) for record in earlier)]}
    if data["base"]["name"] == type(model).__name__:
        data["base"]["name"] = was
    if data["base"]["hub_id"]:
        data["base"]["revision"] = getattr(config, "_commit_hash", None)
    setattr(model, DONE, [*earlier, data])


def save_model(model, folder: str | Path, report: Report, *, tokenizer=None, overwrite: bool = False) -> Report:
    """Save a loaded model with its report; arguments and errors as for `surgery.save`."""
    refuse_another(model, report)
    base = origin_folder(model)
    if base:
        refuse_links_out(base)
    out = OutputFolder(folder, base, "in memory", overwrite=overwrite)
    needed, outdated = sum(p.numel() * p.element_size() for p in model.parameters()), _outdated(report, model)
    with out.opened(needed) as partial:
        with quiet_transformers():
            model.save_pretrained(partial)
        add_earlier_keys(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if base:
            _copy_documents(base, partial)
        saved = Report(_plain(report.data) | outdated | {"files": weight_files(partial)}, partial)
        saved.save(list_files=True)
    saved.folder = out.out
    model.name_or_path = str(out.out)
    return saved


def _outdated(report: Report, model) -> dict:
    """The entries that replace a score in the report if the model was trained after it; {} if it was not."""
    scored = (report.data.get("in_memory") or {}).get("scored")
    if report.data["evaluation"] is None or scored is None or scored == weights_version(model):
        return {}
    gate = {"status": "not run", "reasons": ["the weights were changed after the score"]}
    return {"evaluation": None, "gate": report.data["gate"] | gate}


def _plain(data: dict) -> dict:
    """A copy of a report's data for a file or a history, without the list of heads."""
    known = data.get("in_memory")
    rest = {key: value for key, value in data.items() if key != "in_memory"}
    return rest | ({"in_memory": {"class": known["class"]}} if known else {})


def _copy_documents(base: Path, partial: Path) -> None:
    """Copy licence, notices and card of the folder that the model was loaded from."""
    for path in sorted(p for p in base.iterdir() if p.is_file() and p.name.upper().startswith(NOTICES)):
        shutil.copyfile(path, partial / path.name)
    card = next((base / name for name in (BASE_CARD, "README.md") if (base / name).is_file()), None)
    if card:
        shutil.copyfile(card, partial / BASE_CARD)
