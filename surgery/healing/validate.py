"""Validate healing settings up front, before any expensive work starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.generated import user_turn
from surgery.errors import SettingError, SurgeryError, nearest
from surgery.evaluation.probes import main
from surgery.healing.distributed import Ranks
from surgery.healing.plan import rows_each
from surgery.machine.placement import refuse_for_training

if TYPE_CHECKING:
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
