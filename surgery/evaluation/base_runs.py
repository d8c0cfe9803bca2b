"""What a base scored, kept so that several models are compared with one run of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json

from surgery.errors import SurgeryError
from surgery.io.files import read_json, write_bytes, write_json
from surgery.io.safetensors import read_header
from surgery.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

SCORES = "base.json"  # in the folder of the base's windows: its own figures, written when all windows are


class BaseRuns:
    """The runs of one base, which a later process finds again.

    Args:
        folder: holds the base's log-probabilities of windows of text, and what it answered to questions.
        identity: of the base; what another scored is not found.
    """

    def __init__(self, folder: Path, identity: str):
        self._folder, self._identity = folder, identity

    def windows(self, samples: Tensor, top_k: int) -> Path:
        """The folder for the log-probabilities of these windows [windows, length]."""
        about = f"{self._identity} {__version__} {tuple(samples.shape)} {top_k} "
        digest = hashlib.sha256(about.encode() + samples.numpy().tobytes()).hexdigest()
        folder = self._folder / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def figures(folder: Path, windows: int) -> dict[str, Any] | None:
        """The base's figures on the windows of a folder; None if it has not scored all of them, or one is damaged."""
        if not all(_is_whole(folder / f"{index}.safetensors") for index in range(windows)):
            return None
        try:
            return read_json(folder / SCORES)
        except (OSError, SurgeryError):
            return None

    @staticmethod
    def keep_figures(folder: Path, figures: Mapping[str, Any]) -> None:
        """Write the base's figures down; its windows are complete."""
        write_json(folder / SCORES, dict(figures))

    def answers(self, probe: str, cases: list, kind: type | None) -> list | None:
        """The base's outcomes on these cases; None if it was not asked, or if the file cannot be read.

        Args:
            probe: the probe with its settings, as text.
            kind: the dataclass of an outcome; None: the base's outcomes are not kept.
        """
        if kind is None:
            return None
        try:
            outcomes = _of(kind).validate_json(self._file(probe, cases).read_bytes())
        except (OSError, ValidationError):
            return None
        return outcomes if len(outcomes) == len(cases) else None

    def keep_answers(self, probe: str, cases: list, kind: type | None, outcomes: list) -> None:
        """Keep the base's outcomes on these cases; the arguments are those of `answers`."""
        if kind is None:
            return
        file = self._file(probe, cases)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, _of(kind).dump_json(outcomes))

    def _file(self, probe: str, cases: list) -> Path:
        """The file of the answers to these cases; another version of the package asks anew."""
        digest = hashlib.sha256(f"{self._identity} {__version__} {probe} ".encode() + to_json(cases)).hexdigest()
        return self._folder / f"{digest[:16]}.json"


def _is_whole(file: Path) -> bool:
    """Whether a file of tensors is there, and has the length that its header says."""
    try:
        read_header(file, file.name)
    except (OSError, SurgeryError):
        return False
    return True


def _of(kind: type) -> TypeAdapter:
    """Reads and writes a list of these outcomes as JSON, NaN and infinity included."""
    return TypeAdapter(list[kind], config=ConfigDict(ser_json_inf_nan="constants"))
