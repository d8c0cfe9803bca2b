"""What the recall tests share: the base, then the converted model, answer prompts that have one right answer.

A prompt is a `Needle`: what is asked for stands in it once, before the question. An answer is right if decoding with
the model's own cache gives exactly its tokens. A surgery is judged by the share "kept": the prompts that the converted
model answers, of those that the base answers. Where streaming heads see the place anyway, through sinks or window, an
answer proves nothing and does not count.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from surgery.architecture.anatomy import positions_of
from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import Needle
from surgery.evaluation.paired import REPORTABLE, CaseResult, few_words, kept_of, kept_words, percent, share_of
from surgery.evaluation.probes.base import CaseProbe, Limit, Metric, Row, Table
from surgery.evaluation.recall import Outcome, longest_sequence, run_needles

if TYPE_CHECKING:
    from surgery.io.loading import ModelSource
    from surgery.machine.progress import Progress

LATE = ", the question in a later call"  # in tables and sentences
ANSWER = 32  # positions that a prompt leaves for the answer, where its length is cut to what the model takes


@dataclass(repr=False)
class RecallResult(CaseResult):
    """The result of a recall test. `cases` are needles; an outcome is an `Outcome`.

    Attributes:
        reach: most sinks and widest window of the streaming heads of `out`; None if it has no such heads.
    """

    reach: tuple[int, int] | None = None

    COUNT: ClassVar[str] = "prompts"
    COMPARISON: ClassVar[str] = "kept"

    def counts(self, needle: Needle) -> bool:
        """Whether a needle counts: no streaming head sees it from the question or the answer."""
        return self.reach is None or needle.outside(*self.reach)

    def compare(self) -> dict | None:
        """Of the needles that count and the base finds: how many `out` finds, and their share with a 95% interval."""
        if "base" not in self.outcomes:
            return None
        rows = zip(self.cases, self.outcomes["base"], self.outcomes["out"], strict=True)
        return kept_of((base.hit, out.hit) for needle, base, out in rows if self.counts(needle))

    def side(self, label: str) -> dict:
        """The figures of one model: hits, accuracy with its 95% interval, mean NLL."""
        return hits_of(self.outcomes[label])

    def about(self) -> dict:
        """Reach of the streaming heads in tokens, and the number of needles within it; {} without such heads."""
        if not self.reach:
            return {}
        sinks, window = self.reach
        inside = sum(not self.counts(needle) for needle in self.cases)
        return {"streaming": {"sinks": sinks, "window": window, "needles_inside": inside}}

    def case(self, index: int) -> dict:
        """One needle with its length, depth, secret and position, and its outcomes."""
        needle = self.cases[index]
        data = {name: getattr(needle, name) for name in ("length", "depth", "sample", "seed", "secret")}
        data |= {"tokens": len(needle.prompt), "first": needle.span[0], "counts": self.counts(needle)}
        return data | super().case(index)


def hits_of(outcomes: Sequence[Outcome]) -> dict:
    """Hits, number of prompts, accuracy with its 95% interval, mean NLL."""
    return share_of("hits", (o.hit for o in outcomes), (o.nll for o in outcomes))


def fitting(drawn: Sequence[Needle], configs: dict[str, Any], fix: str) -> tuple[list[Needle], list[str]]:
    """The prompts that fit with their answers into the positions of all models, and a note on those left out.

    Args:
        configs: label -> config of a model.
        fix: the remedy where none fits.

    Raises:
        SurgeryError: none fits, or the tokenizer is another model's.
    """
    longest = min((p for p in map(positions_of, configs.values()) if p), default=longest_sequence(drawn))
    cases = [case for case in drawn if longest_sequence([case]) <= longest]
    if not cases:
        refuse_too_long(configs, min(longest_sequence([case]) for case in drawn), "prompt and answer", fix)
    refuse_other_tokenizer(configs, max(token for case in cases for token in (*case.prompt, *case.answer)))
    left_out = len(drawn) - len(cases)
    words = f"prompts are longer than the {longest:,} tokens that the model takes, and were left out"
    return cases, [f"{left_out} of {len(drawn)} {words}"] if left_out else []


def kept_limit(cases: str, done: str, words: str) -> Limit:
    """The limit on the share that is kept.

    Args:
        cases: what the cases are ("needles"). done: what happens to them ("found"). words: the figure's name.
    """
    return Limit(
        lambda record: record["kept"]["share"],
        at_least=True,
        description=f"Gate: share of the {cases} {done} by the base that are {done}, at least.",
        most=1,
        words=words,
    )


def both_words(record: dict, does: str) -> str:
    """How many prompts each model answers, for the card's sentence; of a record without a base, the model alone.

    Args:
        does: what the models do ("answers").
    """
    base, out = ((side := record.get(label) or {}) and f"{side['hits']} of {side['of']}" for label in ("base", "out"))
    return f"the base {does} {base}, the converted model {out}" if base else f"the model {does} {out}"


def kept_sentence(record: dict, does: str) -> str:
    """The sentence of a card on what the converted model keeps, after a space; "" where there is nothing to keep.

    Of a base that a guess equals, it says that instead.

    Args:
        does: what the base does ("answers").
    """
    kept = record.get("kept") or {}
    if not kept.get("of"):
        return ""
    if low := floor_words(record, "the base"):
        return f" {low[0].upper()}{low[1:]}: its answers say nothing about the surgery."
    condition = " and that lie outside sinks and window" if record.get("streaming") else ""
    interval = f"95 % interval {kept['low']:.1%} to {kept['high']:.1%}"
    return f" Of those that the base {does}{condition}, it keeps {kept['kept']} of {kept['of']} ({interval})."


def floor_of(record: dict) -> float | None:
    """The probability that a guess is right; None where the record has none."""
    return (record.get("settings") or {}).get("chance", record.get("chance"))


def floor_words(record: dict, who: str) -> str:
    """Why the base's answers, or those of a model without a base, prove nothing; "" if they exceed a guess.

    They do where the whole interval of the share of right answers lies above what a guess reaches.

    Args:
        who: whose answers they are ("the base").
    """
    chance, side = floor_of(record), record.get("base") or record.get("out") or {}
    if not chance or side.get("low") is None or side["low"] > chance:
        return ""
    reached = f"{side.get('hits', side.get('right'))} of {side['of']}, 95% interval from {side['low']:.1%}"
    return f"{who} answers no more than a guess does ({reached}; a guess {share_words(chance)})"


def floor_line(record: dict) -> str:
    """`floor_words` as a line of the output of `surgery eval`."""
    low = floor_words(record, "the base" if record.get("base") else "the model")
    return f"{low[0].upper()}{low[1:]}: its answers prove nothing." if low else ""


def share_words(chance: float) -> str:
    """The probability of a guess, as a table shows it."""
    return f"{chance:.0%}" if chance >= 0.01 else f"{chance:.0e}"


class RecallProbe(CaseProbe):
    """A probe whose cases are prompts with one right answer.

    Attributes:
        title: what is asked, as the subject of a card's sentence ("Names in a list").
        guess: what is right with the probability `chance` of the settings.
    """

    late: bool = Field(False, description="The question comes in a call of its own, after the text is read.")

    cases_are: ClassVar[str] = "prompts"
    title: ClassVar[str] = ""
    guess: ClassVar[str] = "a random guess"
    outcome: ClassVar[type | None] = Outcome

    # An answer is right if each of its tokens is the most probable one: lm-eval's `acc` of a log-likelihood.
    task: ClassVar[dict[str, Any]] = {
        "output_type": "loglikelihood",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }

    @classmethod
    @abstractmethod
    def what(cls, settings: dict) -> str:
        """What a right answer finds, for tables and closing lines ("right one of 4 hidden secrets")."""

    @classmethod
    def detail(cls, settings: dict) -> str:
        """How the prompts are made, in a few words, for the card's sentence."""
        return ""

    def question(self, case: Needle) -> tuple[Sequence[int], list[Sequence[int]], int]:
        return case.prompt, [case.answer], 0

    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list[Outcome]:
        return run_needles(model, result.cases, progress, late=self.late)

    def prepare(self, result: Any, sources: dict[str, ModelSource], progress: Progress | None) -> None:
        result.settings |= {"late": True} if self.late else {}

    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        return 2 * longest_sequence(cases) * kv_bytes  # twice the cache, because growing it copies it

    def is_broken(self, outcome: Outcome) -> bool:
        return not math.isfinite(outcome.nll)

    @classmethod
    def missing(cls, record: dict) -> str:
        answered = (record.get("kept") or {}).get("of")
        reason = record.get("reason") or f"the base answers none of the {cls.cases_are} that count"
        if (within := record.get("streaming")) and within["needles_inside"] == record.get("out", {}).get("of"):
            reason = f"all {cls.cases_are} lie within sinks and window, which streaming heads see: ask longer ones"
        if not answered:
            return reason if record else super().missing(record)
        return floor_words(record, "the base")

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        base, out = (record.get(label) or {} for label in ("base", "out"))
        name = f"{cls.what(record['settings'])}, share of prompts"
        return [Row(name, base.get("accuracy"), out.get("accuracy"), "{:.1%}")]

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        """The share that is answered. The settings say which prompts these are."""
        settings, base, out = (record.get(key) or {} for key in ("settings", "base", "out"))
        text = settings.get("text") or {}
        about = {"name": cls.title + (f": {text['title']}" if text.get("title") else ""), "sha256": text.get("sha256")}
        about |= {key: value for key, value in settings.items() if key not in ("text", "chance")}
        recall = Metric("recall", cls.what(settings), out.get("accuracy"), base.get("accuracy"))
        return [(about, [recall])]

    @classmethod
    def sentence(cls, record: dict) -> str:
        return "" if cls.missing(record) else kept_words(cls.what(record["settings"]), record)

    @classmethod
    def paragraph(cls, record: dict) -> str:
        if record.get("status") != "done":
            return f"{cls.title} were **not run**: {record.get('reason') or 'no reason was recorded'}."
        settings = record.get("settings") or {}
        late = LATE if settings.get("late") else ""
        line = f"{cls.title} ({cls.detail(settings)}{late}): {both_words(record, 'answers')}."
        if inside := (record.get("streaming") or {}).get("needles_inside"):
            line += f" {inside} of them lie within sinks and window and prove nothing."
        return line + kept_sentence(record, "answers")

    @classmethod
    def cells(cls, result: RecallResult) -> list[int]:
        """How many cases each share has that the output shows by itself."""
        return [len(result.cases)]

    @classmethod
    def few(cls, result: RecallResult) -> str:
        """A note where these are few (see `few_words`), with the setting that gives enough."""
        cells = cls.cells(result)
        key, number = "cases", REPORTABLE
        if key not in cls.model_fields:
            key, number = "samples", -(-REPORTABLE * result.settings["samples"] // min(cells))
        return few_words(cells, result.COUNT.removesuffix("s"), f"{key}={number}")

    @classmethod
    def lines(cls, result: RecallResult) -> list[Table | str]:
        settings, kept, low = result.settings, result.compare(), floor_line(result.to_dict())
        lines = [*super().lines(result), *([f"kept: {percent(kept)}"] if kept and kept["of"] and not low else [])]
        if inside := sum(not result.counts(case) for case in result.cases):
            sinks, window = result.reach or (0, 0)
            seen = f"they lie within the {sinks} sinks and {window} tokens that streaming heads see"
            lines.append(f"{inside} of {len(result.cases)} prompts prove nothing and do not count: {seen}.")
        chance = settings["chance"]
        guess = f"; {cls.guess} is right with probability {share_words(chance)}" if chance else ""
        late = LATE if settings.get("late") else ""
        made = f"({cls.detail(settings)}), seed {settings['seed']}{late}{guess}"
        lines.append(f"{len(result.cases)} {settings['form']} prompts {made}.")
        if few := cls.few(result):
            lines.append(few)
        if low:
            lines.append(low)
        text = settings.get("text")
        source = f"The text is {text['title']} (sha256 {text['sha256']})." if text else ""
        return [*lines, *([source] if source else [])]
