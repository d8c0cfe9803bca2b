"""Validate healing settings up front, before any expensive work starts.

The functions that find the converted model, its base and its record are also here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.generated import user_turn
from surgery.errors import ModelMismatchError, ModelNotFoundError, RecordError, SettingError, SurgeryError, nearest
from surgery.evaluation.probes import main
from surgery.healing.distributed import Ranks
from surgery.healing.parameters import touched
from surgery.healing.plan import rows_each
from surgery.io.safetensors import TORCH_NAMES
from surgery.machine.placement import refuse_for_training
from surgery.report.report import Report

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.config.evaluate import Evaluate
    from surgery.config.heal import Heal


def refuse_settings(heal: Heal, judged_by: Evaluate | None) -> None:
    """Raise where settings do not fit: processes, the tracker for metrics, the scores during training.

    Args:
        judged_by: the recipe's `evaluate`.

    Raises:
        SurgeryError: the tracker to report to is not installed, or the run's device is not the one on which the
            Trainer trains.
        TrainingError: the rows of a step cannot be shared evenly by the processes.
    """
    refuse_for_training()
    rows_each(heal, Ranks().count)
    _refuse_report_to(heal.report_to)
    _refuse_unwatchable(heal, judged_by)


def _refuse_unwatchable(heal: Heal, evaluate: Evaluate | None) -> None:
    """Raise where `heal` asks for scores during training, and the recipe has no text or no limits for them."""
    if heal.eval_every and evaluate is None:
        fix = "name a recipe that evaluates: evaluate.text=builtin"
        raise SettingError("eval_every compares the model with its base", where="heal", fix=fix)
    if heal.stop_at_gate and evaluate is not None and not watched_limits(evaluate):
        raise SettingError(
            "stop_at_gate: the recipe has no limit that can be watched",
            where="heal",
            exists=", ".join(main().limits),
            fix="evaluate.max_kl=..., or heal.stop_at_gate=false",
        )


def watched_limits(evaluate: Evaluate) -> dict[str, float]:
    """The recipe's limits that a short text can check during training: the main probe's."""
    return {name: limit for name, limit in evaluate.limits.items() if name in main().limits}


def refuse_early(heal: Heal, judged_by: Evaluate | None, base: str | Path | Any, tokenizer=None) -> None:
    """Raise the errors of a healing before the base is converted, not afterwards.

    Args:
        base: folder of the base, or the loaded model.
        tokenizer: the tokenizer of a loaded model.

    Raises:
        SurgeryError: as `refuse_settings` raises it, or for the data that `heal` names. Text that the base will
            generate is not checked.
    """
    from surgery.data.documents import first_documents
    from surgery.data.recall_rows import repeat_rows
    from surgery.data.repeats import KINDS
    from surgery.data.text import RECALL_ROWS, SELF
    from surgery.io.loading import read_tokenizer

    refuse_settings(heal, judged_by)
    tokenizer = tokenizer or read_tokenizer(base)
    texts = first_documents(heal, tokenizer, base, RECALL_ROWS if heal.recall else 1)
    if heal.base_converses:
        user_turn(tokenizer, heal.length)
    if heal.recall and texts is not None and SELF not in heal.sources:
        repeat_rows(texts, tokenizer, heal, most=len(KINDS))


def _refuse_report_to(name: str) -> None:
    if name in ("none", "all"):
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = list(INTEGRATION_TO_CALLBACK)
    if name not in known:
        close = nearest(name, known)
        raise SettingError(
            f"the Trainer cannot report to {name!r}",
            where="heal.report_to",
            exists=", ".join(["none", *known]),
            fix=f"did you mean {close!r}?" if close else "heal.report_to=none",
        )
    if name not in get_available_reporting_integrations() and name != "flyte":  # flyte is missing in that list
        raise SurgeryError(
            f"{name} is not installed", where="heal.report_to", fix=f"pip install {name}", code="missing-package"
        )


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
    if comparable(recorded) and (reason := another_base(recorded, base)):
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
