"""Repeats of random words at a distance: does the model continue them (`surgery.data.word_list`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from surgery.architecture.anatomy import positions_of
from surgery.calibration.scoring import refuse_too_long
from surgery.data.text import BUILTIN, load_text
from surgery.data.word_list import LEAD, make_repeats, refuse_distances
from surgery.evaluation.probes.base import Effort, Limit
from surgery.evaluation.probes.fields import TextSource, TokenLengths, check_setting
from surgery.evaluation.probes.recall import ANSWER, RecallProbe, RecallResult, fitting, kept_limit
from surgery.evaluation.recall import reach_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORD_TOKENS = 4  # most tokens of a word, about


@dataclass(repr=False)
class RepeatsResult(RecallResult):
    """The result of the probe. A needle's length is the distance in tokens."""

    PROBE: ClassVar[str] = "repeats"

    def case(self, index: int) -> dict:
        """See `RecallResult.case`; the length is named for what it is."""
        data = super().case(index)
        return {"distance": data.pop("length")} | {key: value for key, value in data.items() if key != "depth"}


class Repeats(RecallProbe):
    """Random words, some of which come again at a distance, and the words that should follow."""

    name: ClassVar[str] = "repeats"
    summary: ClassVar[str] = "random words that come again at a distance: does the model continue them"
    stage: ClassVar[str] = "repeated words"
    title: ClassVar[str] = "Repeated random words"

    text: TextSource = Field(BUILTIN, description="Where the words are from: 'builtin' or a text file.")
    distances: TokenLengths = Field(
        (200, 400, 800, 1500), description="Tokens from the words to their return: 200,400,800,1500."
    )
    samples: int = Field(6, ge=1, description="Prompts for each distance.")
    cue: int = Field(16, ge=1, le=64, description="Words that come again before the answer.")
    words: int = Field(2, ge=1, le=64, description="Words of the answer.")
    seed: int = Field(0, description="Seed of what is drawn.")

    limits: ClassVar[dict[str, Limit]] = {"min_repeats": kept_limit("repeats", "continued", "repeats kept")}

    @field_validator("distances")
    @classmethod
    def _refuse_no_distance(cls, distances: tuple[int, ...]) -> tuple[int, ...]:
        check_setting(refuse_distances, distances)
        return tuple(dict.fromkeys(distances))  # the same distance twice would ask the same prompts twice

    @classmethod
    def what(cls, settings: dict) -> str:
        return "repeated words continued"

    @classmethod
    def detail(cls, settings: dict) -> str:
        distances = ", ".join(f"{distance:,}" for distance in settings["distances"])
        return f"{settings['words']} words after {settings['cue']} that come again {distances} tokens later"

    @property
    def effort(self) -> Effort:
        more = WORD_TOKENS * (LEAD + self.cue)
        return Effort(self.samples * sum(distance + more for distance in self.distances), max(self.distances) + more)

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        positions = positions_of(config)
        longest = (positions or 0) - ANSWER - WORD_TOKENS * (LEAD + self.cue + self.words)
        if positions is None or longest < 1 or longest >= max(self.distances):
            return {}
        return {"distances": list(dict.fromkeys(min(distance, longest) for distance in self.distances))}

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> RepeatsResult:
        """The prompts, from `make_repeats`.

        Raises:
            SurgeryError: as for `make_repeats`; prompts exceed a model's positions; the tokenizer is another's.
        """
        text = load_text(self.text, part="held-out")
        settings = {name: getattr(self, name) for name in ("samples", "cue", "words", "seed")}
        refuse_too_long(configs, max(self.distances), "prompt and answer", "shorter distances")
        drawn = make_repeats(tokenizer, distances=self.distances, text=text, **settings)
        cases, notes = fitting(drawn, configs, "shorter distances")
        settings |= {"distances": list(dict.fromkeys(case.length for case in cases)), "form": "plain"}
        settings |= {"text": {"title": text.title, "sha256": text.sha256[:12]}}
        settings |= {"chance": 0.0}
        return RepeatsResult("done", settings, cases, notes=notes, reach=reach_of(configs["out"]))
