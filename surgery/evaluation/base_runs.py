"""What a base scored, kept so that several models are compared with one run of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.io.files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

SCORES = "base.json"  # in the folder of the base's windows: its own figures, written when all windows are


class BaseRuns:
    """The runs of one base.

    Args:
        folder: holds the base's log-probabilities of windows of text, which a later process finds again.
        identity: of the base; the log-probabilities of another are not found.

    The answers to questions are kept in memory alone.
    """

    def __init__(self, folder: Path, identity: str):
        self._folder, self._identity = folder, identity
        self._answers: dict[str, tuple[list, list]] = {}

    def windows(self, samples: Tensor, top_k: int) -> Path:
        """The folder for the log-probabilities of these windows [windows, length]."""
        about = f"{self._identity} {tuple(samples.shape)} {top_k} "
        digest = hashlib.sha256(about.encode() + samples.numpy().tobytes()).hexdigest()
        folder = self._folder / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def figures(folder: Path, windows: int) -> dict[str, Any] | None:
        """The base's figures on the windows of a folder; None if it has not scored all of them."""
        if not all((folder / f"{index}.safetensors").is_file() for index in range(windows)):
            return None
        try:
            return read_json(folder / SCORES)
        except (OSError, SurgeryError):
            return None

    @staticmethod
    def keep_figures(folder: Path, figures: Mapping[str, Any]) -> None:
        """Write the base's figures down; its windows are complete."""
        write_json(folder / SCORES, dict(figures))

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
