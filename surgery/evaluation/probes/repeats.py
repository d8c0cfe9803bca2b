"""Repeats of random words at a distance: does the model continue them (`surgery.data.word_list`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from surgery.calibration.scoring import refuse_too_long
from surgery.data.text import BUILTIN, load_text
from surgery.data.word_list import LEAD, make_repeats
from surgery.evaluation.probes.base import Effort, Limit
from surgery.evaluation.probes.distances import DistanceProbe, DistanceResult
from surgery.evaluation.probes.fields import TextSource, TokenLengths
from surgery.evaluation.probes.recall import ANSWER, fitting, kept_limit
from surgery.evaluation.recall import reach_of

WORD_TOKENS = 4  # most tokens of a word, about


@dataclass(repr=False)
class RepeatsResult(DistanceResult):
    """The result of the probe."""

    PROBE: ClassVar[str] = "repeats"


class Repeats(DistanceProbe):
    """Random words, some of which come again at a distance, and the words that should follow."""

    name: ClassVar[str] = "repeats"
    summary: ClassVar[str] = "random words that come again at a distance: does the model continue them"
    stage: ClassVar[str] = "repeated words"
    title: ClassVar[str] = "Repeated random words"
    prompts: ClassVar[str] = "repeats"
    draws: ClassVar[tuple[str, ...]] = ("samples", "cue", "words", "seed")

    text: TextSource = Field(BUILTIN, description="Where the words are from: 'builtin' or a text file.")
    distances: TokenLengths = Field(
        (200, 400, 800, 1500), description="Tokens from the words to their return: 200,400,800,1500."
    )
    samples: int = Field(6, ge=1, description="Prompts for each distance.")
    cue: int = Field(16, ge=1, le=64, description="Words that come again before the answer.")
    words: int = Field(2, ge=1, le=64, description="Words of the answer.")
    seed: int = Field(0, description="Seed of what is drawn.")

    limits: ClassVar[dict[str, Limit]] = {"min_repeats": kept_limit("repeats", "continued", "repeats kept")}

    @classmethod
    def what(cls, settings: dict) -> str:
        return "repeated words continued"

    @classmethod
    def detail(cls, settings: dict) -> str:
        distances = cls.in_words(settings)
        return f"{settings['words']} words after {settings['cue']} that come again {distances} tokens later"

    @property
    def effort(self) -> Effort:
        more = WORD_TOKENS * (LEAD + self.cue)
        return Effort(self.samples * sum(distance + more for distance in self.distances), max(self.distances) + more)

    @property
    def around(self) -> int:
        return ANSWER + WORD_TOKENS * (LEAD + self.cue + self.words)

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> RepeatsResult:
        """The prompts, from `make_repeats`.

        Raises:
            SurgeryError: as for `make_repeats`; prompts exceed a model's positions; the tokenizer is another's.
        """
        text = load_text(self.text, part="held-out")
        refuse_too_long(configs, max(self.distances), "prompt and answer", "shorter distances")
        drawn = make_repeats(tokenizer, distances=self.distances, text=text, **self.drawn_from)
        cases, notes = fitting(drawn, configs, "shorter distances")
        settings = self.record_of(cases, text)
        return RepeatsResult("done", settings, cases, notes=notes, reach=reach_of(configs["out"]))
