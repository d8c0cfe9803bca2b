"""What a base scored, kept so that several models are compared with one run of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SCORES = "base.json"  # in the folder of the base's windows: its own figures, written when all windows are


class BaseRuns:
    """The runs of one base.

    Args:
        folder: holds the base's log-probabilities of windows of text, which a later process finds again.

    The answers to questions are kept in memory alone.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._answers: dict[str, tuple[list, list]] = {}

    def windows(self, samples: Tensor, top_k: int) -> Path:
        """The folder for the log-probabilities of these windows [windows, length]."""
        digest = hashlib.sha256(f"{tuple(samples.shape)} {top_k} ".encode() + samples.numpy().tobytes()).hexdigest()
        folder = self._folder / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def figures(folder: Path) -> dict[str, Any] | None:
        """The base's figures on the windows of a folder; None if it has not scored all of them."""
        file = folder / SCORES
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @staticmethod
    def keep_figures(folder: Path, figures: Mapping[str, Any]) -> None:
        """Write the base's figures down; its windows are complete."""
        (folder / SCORES).write_text(json.dumps(dict(figures)), encoding="utf-8")

    def answers(self, probe: str, cases: list) -> list | None:
        """The base's outcomes on these cases; None if it was not asked.

        Args:
            probe: the probe with its settings, as text.
        """
        asked, outcomes = self._answers.get(probe, ([], []))
        return outcomes if asked and asked == cases else None

    def keep_answers(self, probe: str, cases: list, outcomes: list) -> None:
        """Keep the base's outcomes on these cases."""
        self._answers[probe] = (cases, outcomes)
