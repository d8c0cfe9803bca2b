"""What can be refused before a model is converted, a text written or anything trained, not hours later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.generated import user_turn
from surgery.errors import SurgeryError, nearest
from surgery.healing.plan import rows_each
from surgery.healing.processes import Ranks

if TYPE_CHECKING:
    from surgery.config.heal import Heal


def refuse_settings(heal: Heal, config) -> None:
    """Raise where settings cannot be: rows, processes, who is reported to.

    Args:
        config: of the model.

    Raises:
        SurgeryError: rows are longer than the model has positions, or it is reported to what is not there.
        TrainingError: the rows of a step cannot be shared evenly by the processes.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and heal.length > positions:
        raise SurgeryError(
            f"rows of {heal.length} tokens are longer than the model, which has {positions} positions",
            where="heal.length",
            fix=f"heal.length={positions}",
        )
    rows_each(heal, Ranks().count)
    _refuse_report_to(heal.report_to)


def refuse_early(heal: Heal, base: str | Path | Any, tokenizer=None) -> None:
    """Raise before the base is converted what its healing would raise afterwards.

    Args:
        base: its folder, or the loaded model.
        tokenizer: of a loaded model.

    Raises:
        SurgeryError: of `refuse_settings`, or of the data that heal names; all but text of the base is looked at.
    """
    from surgery.data.documents import SELF, documents
    from surgery.io.loading import read_config, read_tokenizer

    refuse_settings(heal, read_config(base))
    tokenizer = tokenizer or read_tokenizer(base)
    if heal.data != SELF:
        documents(heal, tokenizer, base, rows_needed=1)
    elif heal.chat:
        user_turn(tokenizer)


def _refuse_report_to(name: str) -> None:
    if name in ("none", "all"):
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = list(INTEGRATION_TO_CALLBACK)
    if name not in known:
        close = nearest(name, known)
        raise SurgeryError(
            f"the Trainer cannot report to {name!r}",
            where="heal.report_to",
            exists=", ".join(["none", *known]),
            fix=f"did you mean {close!r}?" if close else "heal.report_to=none",
        )
    if name not in get_available_reporting_integrations() and name != "flyte":  # which that list leaves out
        raise SurgeryError(f"{name} is not installed", where="heal.report_to", fix=f"pip install {name}")
