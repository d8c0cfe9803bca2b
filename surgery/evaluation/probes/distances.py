"""Recall tests in which something comes again at a distance: the settings, bounds and records that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from surgery.architecture.anatomy import positions_of
from surgery.data.haystack import Needle
from surgery.data.text import Text
from surgery.data.word_list import refuse_distances
from surgery.evaluation.probes.fields import check_setting
from surgery.evaluation.probes.recall import RecallProbe, RecallResult

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(repr=False)
class DistanceResult(RecallResult):
    """The result of such a probe. A needle's length is the distance in tokens."""

    def case(self, index: int) -> dict:
        """See `RecallResult.case`; the length is named for what it is."""
        data = super().case(index)
        return {"distance": data.pop("length")} | {key: value for key, value in data.items() if key != "depth"}


class DistanceProbe(RecallProbe):
    """A recall test with a setting `distances`, in tokens.

    Attributes:
        prompts: name of the prompts in an error ("repeats").
        draws: settings from which the prompts are drawn.
    """

    prompts: ClassVar[str]
    draws: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:
        distances: tuple[int, ...]

    @field_validator("distances", check_fields=False)
    @classmethod
    def _refuse_no_distance(cls, distances: tuple[int, ...]) -> tuple[int, ...]:
        check_setting(refuse_distances, distances, cls.prompts)
        return tuple(dict.fromkeys(distances))  # the same distance twice would ask the same prompts twice

    @property
    @abstractmethod
    def around(self) -> int:
        """Tokens of a prompt and its answer besides those of the distance, at most."""

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        positions = positions_of(config)
        longest = (positions or 0) - self.around
        if positions is None or longest < 1 or longest >= max(self.distances):
            return {}
        return {"distances": list(dict.fromkeys(min(distance, longest) for distance in self.distances))}

    @property
    def drawn_from(self) -> dict[str, Any]:
        """The settings from which the prompts are drawn."""
        return {name: getattr(self, name) for name in self.draws}

    def record_of(self, cases: Sequence[Needle], text: Text) -> dict[str, Any]:
        """The settings of a result with these prompts."""
        settings = self.drawn_from | {"distances": list(dict.fromkeys(case.length for case in cases)), "form": "plain"}
        return settings | {"text": {"title": text.title, "sha256": text.sha256[:12]}, "chance": 0.0}

    @classmethod
    def in_words(cls, settings: dict) -> str:
        """The distances of a record ("200, 1,500")."""
        return ", ".join(f"{distance:,}" for distance in settings["distances"])
