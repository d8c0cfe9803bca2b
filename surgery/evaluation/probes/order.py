"""Which of two passages of a text came first (`surgery.data.passage_order`): a question that no single place answers.

A pair is asked in both orders. Its margin is the NLL of the wrong answer minus that of the right one, in nats, as a
mean of both orders. A model that prefers a letter, whatever the text says, has the margin 0. A pair is right if its
margin is above 0; a guess is right for half of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import FORMS, form_for, refuse_form
from surgery.data.passage_order import Ordering, make_orderings
from surgery.data.text import BUILTIN, load_text
from surgery.evaluation.paired import HALF_95, NAMES, CaseResult
from surgery.evaluation.probes.base import Effort, Limit, Row, Table
from surgery.evaluation.probes.fields import TextSource, check_setting
from surgery.evaluation.probes.needles import longest_prompt
from surgery.evaluation.probes.recall import RecallProbe, RecallResult, kept_limit
from surgery.evaluation.recall import cached_logits, longest_sequence, reach_of
from surgery.io.loading import loaded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHORTEST = 128  # tokens of a prompt: the question itself has about 80


@dataclass(frozen=True)
class Preference:
    """The result of one model on one pair.

    Attributes:
        margins: NLL of the wrong answer minus that of the right one in nats, where A is right and where B is.
        nll: mean nats of the right answers.
    """

    margins: tuple[float, float]
    nll: float

    @property
    def margin(self) -> float:
        """The mean of both margins: the preference for a letter cancels."""
        return sum(self.margins) / 2

    @property
    def hit(self) -> bool:
        """Whether the right order is preferred."""
        return self.margin > 0


@dataclass(repr=False)
class OrderResult(RecallResult):
    """The result of the probe. `cases` are `Ordering`s; an outcome is a `Preference`."""

    PROBE: ClassVar[str] = "order"
    COUNT: ClassVar[str] = "pairs"

    def side(self, label: str) -> dict:
        """The figures of one model: right pairs, the mean margin with its 95% interval, and the bias to the letter A.

        The bias is half of what a margin gains where A is right over where B is, in nats.
        """
        outcomes = self.outcomes[label]
        bias = math.fsum(a - b for a, b in (o.margins for o in outcomes)) / (2 * len(outcomes))
        return super().side(label) | {"margin": _mean([o.margin for o in outcomes]), "bias": bias}

    def compare(self) -> dict | None:
        """See `RecallResult.compare`; and the mean change of the margin over the pairs that count."""
        kept = super().compare()
        if kept is None:
            return None
        rows = zip(self.cases, self.outcomes["base"], self.outcomes["out"], strict=True)
        return kept | {"margin": _mean([out.margin - base.margin for case, base, out in rows if self.counts(case)])}

    def case(self, index: int) -> dict:
        """One pair with its place, and the margin of each model."""
        pair: Ordering = self.cases[index]
        first, _ = pair.asked
        data: dict[str, Any] = {"length": pair.length, "sample": pair.sample, "seed": pair.seed}
        data |= {"tokens": len(first.prompt), "first": first.span[0], "distance": pair.distance}
        data["counts"] = self.counts(pair)
        for label, outcomes in self.outcomes.items():
            outcome: Preference = outcomes[index]
            data[label] = {
                "hit": outcome.hit,
                "margin": outcome.margin,
                "margins": outcome.margins,
                "nll": outcome.nll,
            }
        return data


def _mean(margins: Sequence[float]) -> dict[str, float]:
    """A mean with its 95% interval (normal); without an interval if there is only one number."""
    if not margins:
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    mean = math.fsum(margins) / len(margins)
    finite = len(margins) > 1 and all(map(math.isfinite, margins))
    half = HALF_95 * stdev(margins) / math.sqrt(len(margins)) if finite else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half}


class Order(RecallProbe):
    """Two passages of a text, and the question which of them came first."""

    name: ClassVar[str] = "order"
    summary: ClassVar[str] = "two passages of a text: which came first"
    cases_are: ClassVar[str] = "pairs"
    stage: ClassVar[str] = "order of passages"
    outcome: ClassVar[type | None] = Preference
    title: ClassVar[str] = "Pairs of passages"
    guess: ClassVar[str] = "a guess between A and B"
    task: ClassVar[dict[str, Any]] = {}  # two prompts of a pair are scored together

    text: TextSource = Field(BUILTIN, description="Where the passages are from: 'builtin' or a text file.")
    length: int = Field(1024, ge=SHORTEST, description="Tokens of the prompts.")
    cases: int = Field(48, ge=1, description="Pairs of passages; each is asked in both orders.")
    words: int = Field(12, ge=4, le=64, description="Words of a passage.")
    seed: int = Field(0, description="Seed of what is drawn.")
    form: str = Field(
        "auto", description="chat, plain, or auto (by the tokenizer).", json_schema_extra={"enum": list(FORMS)}
    )

    limits: ClassVar[dict[str, Limit]] = {"min_order": kept_limit("pairs", "ordered", "order kept")}

    @model_validator(mode="after")
    def _refuse_unfit_settings(self) -> Order:
        check_setting(refuse_form, self.form)
        return self

    @classmethod
    def what(cls, settings: dict) -> str:
        return "order of two passages recalled"

    @classmethod
    def detail(cls, settings: dict) -> str:
        return f"of {settings['words']} words in prompts of {settings['length']:,} tokens, each asked in both orders"

    @property
    def effort(self) -> Effort:
        return Effort(2 * self.cases * self.length, self.length)

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        longest = longest_prompt(config)
        return {"length": longest} if longest is not None and SHORTEST <= longest < self.length else {}

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> OrderResult:
        """The pairs, from `make_orderings`.

        Raises:
            SurgeryError: as for `make_orderings`; prompts exceed a model's positions; the tokenizer is another's.
        """
        refuse_too_long(configs, self.length, "prompt and answer", "a shorter length")
        text, form = load_text(self.text, part="held-out"), form_for(tokenizer, self.form)
        settings = {name: getattr(self, name) for name in ("length", "cases", "words", "seed")} | {"form": form}
        pairs = make_orderings(tokenizer, text=text, **settings)
        needles = [needle for pair in pairs for needle in pair.asked]
        refuse_too_long(configs, longest_sequence(needles), "prompt and answer", "a shorter length")
        refuse_other_tokenizer(configs, max(token for n in needles for token in (*n.prompt, *n.answer)))
        settings |= {"text": {"title": text.title, "sha256": text.sha256[:12]}, "chance": 0.5}
        return OrderResult("done", settings, pairs, reach=reach_of(configs["out"]))

    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list[Preference]:
        import torch

        outcomes = []
        with loaded(model), torch.no_grad():
            for pair in result.cases:
                outcomes.append(_preference(model, pair, self.late))
                progress(len(outcomes))
        return outcomes

    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        return super().extra_bytes([needle for pair in cases for needle in pair.asked], kv_bytes)

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        base, out = ((record.get(label) or {}).get("margin") or {} for label in ("base", "out"))
        name = "preference for the right order of two passages, nats"
        return [*super().rows(record), Row(name, base.get("mean"), out.get("mean"), "{:+.3f}", ratio=False)]

    @classmethod
    def lines(cls, result: OrderResult) -> list[Table | str]:
        lines, both = super().lines(result), len(result.outcomes) > 1
        for label in result.outcomes:
            side = result.side(label)
            name = NAMES[label] if both else "model"
            lines.append(f"{name + ':':<11}{_nats(side['margin'])} for the right order; bias to A {side['bias']:+.3f}")
        if kept := result.compare():
            lines.append(f"change:    {_nats(kept['margin'])}")
        return lines


def _nats(mean: dict) -> str:
    interval = f" (95% interval {mean['low']:+.3f} to {mean['high']:+.3f})" if math.isfinite(mean["low"]) else ""
    return f"{mean['mean']:+.3f} nats{interval}"


def _preference(model: Any, pair: Ordering, late: bool) -> Preference:
    margins, nlls = [], []
    for needle, wrong in zip(pair.asked, pair.wrong, strict=True):
        (logits,) = cached_logits(model, needle, late)
        logp = logits.float().log_softmax(-1)
        margins.append((logp[needle.answer[0]] - logp[wrong]).item())
        nlls.append(-logp[needle.answer[0]].item())
    return Preference((margins[0], margins[1]), math.fsum(nlls) / 2)
