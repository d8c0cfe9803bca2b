"""Verbatim recall: a paragraph is quoted, other prose follows, the paragraph begins again; how far is it continued?

The probe `repeats` asks the same of random words. Nothing but the copy helps there, and two words are right or wrong.
Here it is real prose, as in a document that is quoted or a file that is written again with a change. The model also
knows something of the prose without having read it. So every prompt is run twice, and another piece of the text
stands in the place of the paragraph the second time: the floor. Of each run there are two figures: the tokens that are
continued exactly before the first departure, and the nats a token of the true continuation. The difference of the
nats is the gain from having read the paragraph. It still shows a loss where no token changes.

Repeated text as a test of copying is that of Olsson et al. 2022 ("In-context Learning and Induction Heads", arXiv
2209.11895).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from surgery.data.quotations import LEAD, LONGEST, make_quotations
from surgery.data.text import BUILTIN, load_text
from surgery.evaluation.paired import NAMES, CaseResult, kept_of
from surgery.evaluation.probes.base import Effort, Limit, Row, Table
from surgery.evaluation.probes.distances import DistanceProbe, DistanceResult
from surgery.evaluation.probes.fields import TextSource, TokenLengths
from surgery.evaluation.probes.recall import RecallResult, fitting, hits_of, kept_limit
from surgery.evaluation.recall import Recitation, reach_of, run_quotations

BEGIN = 1  # token with which a tokenizer may begin a text


@dataclass(repr=False)
class VerbatimResult(DistanceResult):
    """The result of the probe. A case is a `Quotation`; an outcome is a `Recitation`."""

    PROBE: ClassVar[str] = "verbatim"

    def side(self, label: str) -> dict:
        """The figures of one model: hits as in `RecallResult.side`, tokens continued, floor and gain; by distance."""
        figures = super().side(label) | _figures(self.outcomes[label])
        return figures | {
            "distances": [
                {"distance": distance} | hits_of(rows) | _figures(rows) for distance, rows in self._by_distance(label)
            ]
        }

    def _by_distance(self, label: str) -> Iterable[tuple[int, list[Recitation]]]:
        for distance in self.settings["distances"]:
            pairs = zip(self.cases, self.outcomes[label], strict=True)
            yield distance, [outcome for case, outcome in pairs if case.length == distance]

    def is_known(self, index: int) -> bool:
        """Whether the base continues a paragraph to the end that it has not read: it knows it by heart."""
        return self.outcomes["base"][index].guessed == len(self.cases[index].answer)

    def compare(self) -> dict | None:
        """See `RecallResult.compare`; a paragraph that the base knows by heart does not count.

        `gain` is the converted model's mean gain over the base's, for the paragraphs that lie outside sinks and
        window; NaN where the base gains nothing.
        """
        if "base" not in self.outcomes:
            return None
        base, out = (self.outcomes[label] for label in ("base", "out"))
        counted = [index for index, case in enumerate(self.cases) if self.counts(case)]
        gains = [math.fsum(side[index].gain for index in counted) for side in (base, out)]
        fresh = [index for index in counted if not self.is_known(index)]
        kept = kept_of((base[index].hit, out[index].hit) for index in fresh)
        return kept | {"gain": gains[1] / gains[0] if gains[0] > 0 else math.nan}

    def about(self) -> dict:
        """See `RecallResult.about`; and the number of paragraphs that the base knows by heart."""
        known = sum(map(self.is_known, range(len(self.cases)))) if "base" in self.outcomes else 0
        return super().about() | ({"known_by_heart": known} if known else {})

    def case(self, index: int) -> dict:
        """See `DistanceResult.case`; and the gains."""
        data = super().case(index)
        for label, outcomes in self.outcomes.items():
            data[label] = data[label] | {"gain": outcomes[index].gain}
        return data


def _figures(outcomes: list[Recitation]) -> dict:
    """Means over quotations: tokens continued with and without having read, the floor's loss, and the gain."""
    return {
        name: math.fsum(getattr(outcome, name) for outcome in outcomes) / len(outcomes)
        for name in ("copied", "unread", "guessed", "gain")
    }


class Verbatim(DistanceProbe):
    """Paragraphs of prose that begin again at a distance: how far they are continued, and what reading them gains."""

    name: ClassVar[str] = "verbatim"
    summary: ClassVar[str] = "verbatim recall: is a paragraph that begins again at a distance continued word for word"
    stage: ClassVar[str] = "verbatim recall"
    outcome: ClassVar[type | None] = Recitation
    title: ClassVar[str] = "Quoted paragraphs"
    prompts: ClassVar[str] = "quotations"
    draws: ClassVar[tuple[str, ...]] = ("samples", "cue", "tokens", "seed")

    text: TextSource = Field(BUILTIN, description="The prose: 'builtin' or a text file.")
    distances: TokenLengths = Field(
        (128, 512, 1024), description="Tokens of other prose before it begins again: 128,512,1024."
    )
    samples: int = Field(16, ge=1, description="Paragraphs, each at every distance.")
    cue: int = Field(16, ge=1, le=128, description="Tokens of the paragraph that are given again.")
    # Of 12 paragraphs SmolLM2-135M continues 4 by 32 tokens, 16 tokens on average.
    tokens: int = Field(16, ge=1, le=128, description="Tokens that the model continues.")
    seed: int = Field(0, description="Seed of what is drawn.")

    limits: ClassVar[dict[str, Limit]] = {"min_verbatim": kept_limit("paragraphs", "continued", "paragraphs kept")}

    @classmethod
    def what(cls, settings: dict) -> str:
        return "paragraphs continued verbatim"

    @classmethod
    def detail(cls, settings: dict) -> str:
        distances = cls.in_words(settings)
        return f"{settings['tokens']} tokens after a cue of {settings['cue']}, at a distance of {distances} tokens"

    @property
    def effort(self) -> Effort:
        prompts = [distance + self.around for distance in self.distances]
        return Effort(2 * self.samples * sum(prompts), max(prompts), 2 * self.samples * len(prompts) * self.tokens)

    @property
    def around(self) -> int:
        return BEGIN + LEAD + max(LONGEST, self.cue + self.tokens) + self.cue + self.tokens

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> VerbatimResult:
        """The prompts, from `make_quotations`.

        Raises:
            SurgeryError: as for `make_quotations`; prompts exceed a model's positions; the tokenizer is another's.
        """
        text = load_text(self.text, part="held-out")
        drawn = make_quotations(tokenizer, distances=self.distances, text=text, **self.drawn_from)
        cases, notes = fitting(drawn, configs, "shorter distances")
        settings = self.record_of(cases, text)
        return VerbatimResult("done", settings, cases, notes=notes, reach=reach_of(configs["out"]))

    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list[Recitation]:
        return run_quotations(model, result.cases, progress, late=self.late)

    def is_broken(self, outcome: Recitation) -> bool:
        return not math.isfinite(outcome.gain)

    @classmethod
    def missing(cls, record: dict) -> str:
        reason = super().missing(record)
        known, asked = record.get("known_by_heart"), record.get("base", {}).get("of")
        return (
            "the base knows all paragraphs by heart: name a text=FILE"
            if reason and known and known == asked
            else reason
        )

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        base, out = (record.get(label) or {} for label in ("base", "out"))
        tokens = record["settings"]["tokens"]
        named = (
            ("copied", f"tokens continued exactly, of {tokens}", "{:.1f}"),
            ("guessed", "the same, of a paragraph that was not read (floor)", "{:.1f}"),
            ("nll", "nats a token of a paragraph that was read", "{:.3f}"),
            ("unread", "the same, not read (floor)", "{:.3f}"),
            ("gain", "gain from having read it, nats a token", "{:.3f}"),
        )
        return [
            *super().rows(record),
            *(Row(words, base.get(key), out.get(key), form, ratio=key == "copied") for key, words, form in named),
        ]

    @classmethod
    def sentence(cls, record: dict) -> str:
        kept = super().sentence(record)
        gain = (record.get("kept") or {}).get("gain")
        return f"{kept}, gain from reading {gain:.0%} of the base's" if kept and gain is not None else kept

    @classmethod
    def paragraph(cls, record: dict) -> str:
        line = super().paragraph(record)
        if record.get("status") != "done":
            return line
        base, out = (record.get(label) or {} for label in ("base", "out"))
        if None in (base.get("gain"), out.get("gain")):
            return line
        read = f"{base['gain']:.2f} nats a token to the base and {out['gain']:.2f} to the converted model"
        line += f" To have read a paragraph is worth {read} (of {base['unread']:.2f} where it was not read)."
        if known := record.get("known_by_heart"):
            line += f" {known} of them the base knows by heart, and they do not count."
        return line

    @classmethod
    def cells(cls, result: RecallResult) -> list[int]:
        lengths = [case.length for case in result.cases]
        return [lengths.count(distance) for distance in result.settings["distances"]]

    @classmethod
    def lines(cls, result: RecallResult) -> list[Table | str]:
        """The figures in all, those of each distance, and how the prompts are made."""
        sides, both = {label: result.side(label) for label in result.outcomes}, len(result.outcomes) > 1
        rows = [
            [f"{cells[0]['distance']:,} tokens", *map(_cell, cells)]
            for cells in zip(*(side["distances"] for side in sides.values()), strict=True)
        ]
        headers = ("distance", *(NAMES[label] if both else "model" for label in sides))
        first, *others = super().lines(result)
        lines = [first, "", Table(headers, rows), "", *others]
        if known := result.about().get("known_by_heart"):
            lines.append(f"{known} of {len(result.cases)} paragraphs the base knows by heart; they do not count.")
        return lines


def _cell(figures: dict) -> str:
    """The figures of one distance."""
    gain = f"{figures['gain']:.2f} nats" if math.isfinite(figures["gain"]) else "no number"
    return f"{figures['hits']} of {figures['of']} to the end, {figures['copied']:.1f} tokens, gain {gain}"
