"""Multiple-choice questions, for a model alone or compared with its base.

A model chooses the choice with the highest mean log-probability per token. The sum would prefer short choices. Mean
and sum agree where all choices of a question have equally many tokens, as they do in questions made from a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from surgery.calibration.scoring import BATCH, Chosen, ask, refuse_unfit
from surgery.data.questions import Choice, encode, make_choices, read_questions
from surgery.data.text import BUILTIN, load_text
from surgery.evaluation.paired import NAMES, CaseResult, percent, share_of
from surgery.evaluation.probes.base import Aliases, CaseProbe, Effort, Flag, Limit, Metric, RecipeField, Table
from surgery.evaluation.probes.fields import TextSource, settings_error
from surgery.evaluation.probes.recall import floor_line, floor_words


@dataclass(repr=False)
class ChoiceResult(CaseResult):
    """The result of the probe. `cases` are encoded questions (`Choice`); an outcome is a `Chosen`."""

    PROBE: ClassVar[str] = "choices"
    COUNT: ClassVar[str] = "items"
    COMPARISON: ClassVar[str] = "paired"

    @property
    def chance(self) -> float:
        """Expected share of right answers by guessing."""
        return math.fsum(1 / len(item.choices) for item in self.cases) / len(self.cases)

    def side(self, label: str) -> dict:
        """The figures of one model: right answers, accuracy with its 95% interval, mean NLL."""
        outcomes = self.outcomes[label]
        return share_of("right", (o.right for o in outcomes), (o.nll for o in outcomes))

    def compare(self) -> dict | None:
        """How many questions both, only the base, only `out` or neither get right, and McNemar's exact test.

        `p`: of the questions that only one model gets right, the probability of a split at least this uneven if
        neither model is better.
        """
        if "base" not in self.outcomes:
            return None
        pairs = [(a.right, b.right) for a, b in zip(self.outcomes["base"], self.outcomes["out"], strict=True)]
        names = {"both": (True, True), "only_base": (True, False), "only_out": (False, True)}
        counts = {name: pairs.count(pair) for name, pair in names.items()} | {"neither": pairs.count((False, False))}
        one, other = counts["only_base"], counts["only_out"]
        tail = sum(math.comb(one + other, k) for k in range(min(one, other) + 1))
        return counts | {"p": min(1.0, 2 * tail / 2 ** (one + other))}

    def about(self) -> dict:
        """The expected share of right answers by guessing."""
        return {"chance": self.chance}

    def case(self, index: int) -> dict:
        """One question: the index of its right choice, and its outcomes."""
        return {"answer": self.cases[index].answer} | super().case(index)


class Choices(CaseProbe):
    """Multiple-choice questions: made of a text (which ending continues a passage), or of a file."""

    name: ClassVar[str] = "choices"
    summary: ClassVar[str] = "multiple choice: which ending continues a passage, or the questions of a file"
    cases_are: ClassVar[str] = "questions"
    stage: ClassVar[str] = "multiple choice"
    outcome: ClassVar[type | None] = Chosen

    task: ClassVar[dict[str, Any]] = {
        "output_type": "multiple_choice",
        "doc_to_choice": "answers",
        "doc_to_target": "right",
        # The sum of the log-probabilities decides. The choices of a question have equally many tokens.
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }

    text: TextSource = Field(BUILTIN, description="Where the passages are from: 'builtin' or a text file.")
    labelled: TextSource | None = Field(
        None, description="A JSONL file of questions (prompt, choices, answer) in place of a text."
    )
    items: int = Field(320, ge=1, description="Questions made from the text.")
    context: int = Field(96, ge=1, description="Tokens of a passage.")
    seed: int = Field(0, description="Seed of what is drawn.")

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("labelled", "items"),)
    limits: ClassVar[dict[str, Limit]] = {
        "min_choices": Limit(
            lambda record: record["out"]["right"] / record["base"]["right"],
            at_least=True,
            description="Gate: right answers over the base's, at least.",
            words="right answers, × the base's",
        )
    }
    aliases: ClassVar[Aliases] = Aliases(
        switch="Ask multiple-choice questions and count the right answers.",
        flags={
            "text": Flag("text", "The text to measure on: builtin, or a UTF-8 text file.", metavar="FILE"),
            "seed": Flag("seed", "Random seed for what is hidden and asked.", int),
            "labelled": Flag(
                "labelled", "Ask the questions of this file: prompt, choices, answer.", Path, metavar="FILE.jsonl"
            ),
            "choice_items": Flag("items", "Make this many questions from the text.", int, 1),
        },
        recipe={
            "choices": RecipeField(
                "items",
                int,
                Field(0, ge=0, description="Multiple-choice questions made of the text that both get; 0: none."),
                asks=True,
            )
        },
        limits=("min_choices",),
    )

    @model_validator(mode="after")
    def _refuse_text_settings(self) -> Choices:
        drawn, fields = ("text", "items", "seed", "context"), type(self).model_fields
        made = [key for key in drawn if getattr(self, key) != fields[key].default]
        if self.labelled is not None and made:
            raise settings_error("is not for questions of a file", key=made[0], fix="leave it out")
        return self

    @classmethod
    def shared(cls, settings: Mapping[str, Any]) -> list[str]:
        return [] if settings.get("labelled") else super().shared(settings)

    @property
    def effort(self) -> Effort:
        return Effort(2 * self.items * self.context, 2 * self.context)  # a passage and its endings

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> ChoiceResult:
        """The questions, from `make_choices` or `read_questions`.

        Raises:
            SurgeryError: as for `make_choices`, `read_questions` and `encode`; or questions are longer than a model's
                positions; or the tokenizer belongs to another model.
        """
        if self.labelled is None:
            text = load_text(self.text, part="held-out")
            draw_settings = {"items": self.items, "context": self.context, "seed": self.seed}
            questions = make_choices(tokenizer, text=text, **draw_settings)
        else:
            draw_settings, text = {}, load_text(Path(self.labelled))
            questions = encode(tokenizer, read_questions(self.labelled))
        refuse_unfit(configs, questions)
        settings = {"text": {"title": text.title, "sha256": text.sha256[:12]}} | draw_settings
        return ChoiceResult("done", settings, questions)

    def question(self, case: Choice) -> tuple[Sequence[int], list[Sequence[int]], int]:
        return case.prompt, list(case.choices), case.answer

    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list[Chosen]:
        return ask(model, result.cases, progress)

    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        tokens = max(item.longest * len(item.choices) for item in cases)
        return 2 * BATCH * tokens * kv_bytes  # twice the cache, because growing it copies it

    def is_broken(self, outcome: Chosen) -> bool:
        return not all(map(math.isfinite, outcome.logps))

    @classmethod
    def missing(cls, record: dict) -> str:
        right = (record.get("base") or {}).get("right")
        return floor_words(record, "the base") if right else record.get("reason") or "the base has no question right"

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        settings, base, out = (record.get(key) or {} for key in ("settings", "base", "out"))
        text = settings.get("text") or {}
        about = {"name": f"Multiple choice: {text.get('title') or 'a text'}", "sha256": text.get("sha256")}
        about |= {key: value for key, value in settings.items() if key != "text"}
        return [(about, [Metric("accuracy", "questions right", out.get("accuracy"), base.get("accuracy"))])]

    @classmethod
    def sentence(cls, record: dict) -> str:
        both = [record.get(label) or {} for label in ("base", "out")]
        return "choices right {right} → {} of {of}".format(both[1]["right"], **both[0]) if all(both) else ""

    @classmethod
    def paragraph(cls, record: dict) -> str:
        """How many questions the base and the converted model answer right."""
        if record.get("status") != "done":
            return f"Multiple choice was **not run**: {record.get('reason') or 'no reason was recorded'}."
        base, out, paired = (record.get(key) or {} for key in ("base", "out", "paired"))
        right = [f"{side['right']} of {side['of']} ({side['low']:.1%} to {side['high']:.1%})" for side in (base, out)]
        return (
            "Multiple choice (which ending continues a passage of that text; guessing gets "
            f"{record['chance']:.0%}): the base has {right[0]} right, the converted model {right[1]}, with 95 % "
            f"intervals. {paired['only_base']} questions the base alone has right, {paired['only_out']} the converted "
            "model alone."
        )

    @classmethod
    def lines(cls, result: ChoiceResult) -> list[Table | str]:
        settings, both = result.settings, len(result.outcomes) > 1
        lines: list[Table | str] = []
        for label in result.outcomes:
            side = result.side(label)
            name = NAMES[label] if both else "model"
            lines.append(
                f"{name + ':':<11}{side['right']} of {side['of']} questions right ({percent(side)}), "
                f"{side['nll']:.3f} nats for the right choice"
            )
        if paired := result.compare():
            lines.append(
                f"paired:    both right {paired['both']}, only the base {paired['only_base']}, only the converted "
                f"model {paired['only_out']}, neither {paired['neither']} "
                f"(McNemar's exact test: p = {paired['p']:.2g})"
            )
        sizes = sorted({len(item.choices) for item in result.cases})
        counts = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        passages = ""
        if "context" in settings:
            passages = f", passages of {settings['context']} tokens, seed {settings['seed']}"
        lines.append(f"{counts} choices each{passages}; a random guess is right with probability {result.chance:.1%}.")
        lines += filter(None, [floor_line(result.to_dict())])
        return [*lines, f"The questions: {settings['text']['title']} (sha256 {settings['text']['sha256']})."]
