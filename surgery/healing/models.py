"""The models of a healing: the converted one, its base, and the record of the surgery."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import ModelMismatchError, ModelNotFoundError, RecordError, SurgeryError
from surgery.healing.parameters import touched
from surgery.io.safetensors import TORCH_NAMES
from surgery.report.report import Report

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.config.heal import Heal


def base_folder(data: dict, base, *, needed: bool, wanted: bool = True) -> Path | None:
    """The folder of the base; None if it is unknown or not needed.

    Args:
        data: the content of surgery.json.
        base: the base that the user named. None: the base that the record names, if it is the demo model or on the
            Hub.
        needed: whether the training reads the base.
        wanted: whether anything else reads the base. If not, it is not resolved, since that may be a download.

    Raises:
        SurgeryError: the base is needed and unknown, or the user named another model than the record.
    """
    from surgery.io.hub import DEMO, resolve
    from surgery.report.lineage import another_base, comparable

    recorded = data["base"]
    if base is None and not needed and not wanted:
        return None
    if base is None:
        name = (
            f"{recorded['hub_id']}@{recorded['revision']}"
            if recorded.get("hub_id") and recorded.get("revision")
            else None
        )
        name = DEMO if recorded.get("name") == DEMO else name
        if name is None and needed:
            raise ModelNotFoundError(
                f"the base is not known here (the record names {recorded.get('name')!r})",
                where="heal",
                fix="--base MODEL; or heal.loss=ce with heal.data=builtin or a file, which ask no base",
            )
        return resolve(name).path if name else None
    path = resolve(str(base)).path
    if comparable(recorded) and (reason := another_base(data, base)):
        raise ModelMismatchError(reason, where=f"--base {base}", fix="name the model that it was made from")
    return path


def converted_model(folder: Path, anatomy: Anatomy):
    """The model in float32, as it trains, and the dtype in which it is stored."""
    import torch

    from surgery.io.loading import load_model
    from surgery.machine.transformers_logging import quiet_transformers

    with quiet_transformers():
        model = load_model(folder, dtype=torch.float32)
    return model, getattr(torch, TORCH_NAMES[anatomy.dtype])


def rewritten_by(data: dict) -> frozenset[str]:
    """The projections that this surgery and earlier ones rewrote; `data`: the content of surgery.json."""
    recipes = [record.get("recipe") or {} for record in [*data["history"], data]]
    return touched(step for recipe in recipes for step in recipe.get("operations") or [])


def base_of_memory(model, heal: Heal) -> str | None:
    """The folder, or the name and revision, that a model to be edited in memory was loaded from: the base's weights.

    Raises:
        SurgeryError: the healing reads the base, and its folder is not known.
    """
    from surgery.io.model_in_memory import origin

    if name := origin(model):
        return name
    if heal.needs_base or heal.eval_every:
        raise ModelNotFoundError(
            "healing asks the base, and this model was not loaded from a folder or the Hub",
            where=type(model).__name__,
            fix="apply the recipe with heal=None, then surgery.heal(model, base, tokenizer=tokenizer)",
        )
    return None


def save_as_stored(model, folder: Path, dtype) -> None:
    """Write the weights, config and code of a trained model, in the dtype of the converted one."""
    from surgery.io.earlier_keys import add_earlier_keys
    from surgery.machine.transformers_logging import quiet_transformers

    model.to(dtype)
    with quiet_transformers():
        model.save_pretrained(folder)
    add_earlier_keys(folder)


def report_in_memory(model) -> Report:
    """The report of a model in memory, from `surgery.apply` or from the folder that the model was loaded from.

    Raises:
        SurgeryError: it is not a model, or no surgery on it is known.
    """
    from surgery.io.model_in_memory import DONE, is_model, origin_folder, refuse_wrapped
    from surgery.report.report import FILE

    if not is_model(model):
        fix = "give a folder, or a model that surgery.apply edited"
        raise SurgeryError(f"{type(model).__name__} is not a model", fix=fix)
    refuse_wrapped(model)
    if done := getattr(model, DONE, None):
        return Report(done[-1])
    if (folder := origin_folder(model)) is not None and (folder / FILE).is_file():
        return Report(Report.of(folder).data)
    raise RecordError(
        "nothing is known of a surgery on this model",
        where=type(model).__name__,
        fix="surgery.apply(recipe, model) first, or surgery.load(OUT)",
    )
