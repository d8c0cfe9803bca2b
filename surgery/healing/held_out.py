"""A little held-out text that is scored while the model trains: the curve that is not of the training text."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.data.text import load_text, windows
from surgery.errors import SurgeryError
from surgery.io.loading import read_config, score_model
from surgery.report.gate import gate

if TYPE_CHECKING:
    from surgery.config.recipe import Evaluate

WINDOWS, TOP_K = 2, 256
WATCHED = ("max_kl", "max_perplexity_ratio", "min_top1")


@dataclass(frozen=True)
class Scores:
    """What was measured, for a line of metrics, and whether it passes the gate."""

    figures: dict[str, float]
    passed: bool


class HeldOut:
    """The first windows of the text that the recipe judges by, with the base's probabilities.

    Args:
        base: folder of the base, or the loaded model.
        tokenizer: of the model.
        settings: of the recipe's evaluation: text, length, limits.
        stops: whether the training ends when the gate is passed.

    Raises:
        SurgeryError: it should end at a gate that has no limit which this text can show.
    """

    def __init__(self, base, tokenizer, settings: Evaluate, stops: bool = False):
        self.limits = {name: limit for name, limit in settings.limits.items() if name in WATCHED}
        if stops and not self.limits:
            raise SurgeryError(
                "stop_at_gate: the recipe has no limit that can be watched",
                where="heal",
                exists=", ".join(WATCHED),
                fix="evaluate.max_kl=..., or heal.stop_at_gate=false",
            )
        count = min(WINDOWS, settings.windows)
        self.pieces = windows(load_text(settings.text, part="held-out"), tokenizer, settings.length, count)
        self.top_k = min(TOP_K, read_config(base).get_text_config().vocab_size)
        self.folder = tempfile.TemporaryDirectory(prefix="surgery-")
        self.base_loss = self._score(base)["loss"].mean().item()

    def measure(self, model) -> Scores:
        scores = self._score(model)
        loss, kl, same = (scores[name].double().mean().item() for name in ("loss", "kl", "same"))
        figures = {"held_out_loss": loss, "held_out_kl": kl, "held_out_top1": same}
        evaluation = {
            "status": "done",
            "base": {"perplexity": math.exp(self.base_loss)},
            "out": {"perplexity": math.exp(loss) if loss < 700 else math.inf},
            "kl": {"mean": kl},
            "top1_agreement": same,
        }
        return Scores(figures, bool(self.limits) and gate(evaluation, self.limits)[0] == "passed")

    def _score(self, source) -> dict:
        return score_model(source, self.pieces, Path(self.folder.name), self.top_k, lambda done: None)
