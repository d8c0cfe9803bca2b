"""Does the model still hold a conversation? Asks ten greetings and short requests in the chat template.

`length=1024` asks them after a text of so many tokens (see `surgery.data.requests`). A model that answers the same
requests alone may have lost them there: the request lies beyond a window, or a cache drops it.

Perplexity on prose says little about that: a model whose perplexity doubled may answer "Hello!" with one word that it
repeats without end. Answers are decoded greedily. An answer counts if it ends, does not repeat itself, and is one that
the base could have given: under the base, the mean negative log-likelihood of its tokens is at most `margin` above
that of the base's own answer to the same request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field, model_validator

from surgery.architecture.anatomy import positions_of
from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data.requests import REQUESTS, make_requests
from surgery.data.text import BUILTIN, load_text
from surgery.errors import ModelMismatchError
from surgery.evaluation.answers import Answer, run_requests, score_answers
from surgery.evaluation.paired import NAMES, REPORTABLE, CaseResult, few_words, kept_of, kept_words, percent
from surgery.evaluation.probes.base import UNASKED, CaseProbe, Effort, Limit, Metric, Row, Table
from surgery.evaluation.probes.fields import TextLengths, TextSource, settings_error
from surgery.io.loading import read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery.architecture.anatomy import Anatomy
    from surgery.io.loading import ModelSource

LINE_END = re.compile(r"\r\n|\r|\n")  # Unicode's other separators may be part of a request
ROOM = 160  # tokens of the template and of a request, about, where a text before it is cut to what a model takes
SHOWN = 60  # letters of an answer that a table shows


@dataclass(repr=False)
class ChatResult(CaseResult):
    """The result of the chat probe. `cases` are requests; an outcome is an `Answer`.

    Attributes:
        tokenizer: decodes the answers.
    """

    tokenizer: Any = None

    PROBE: ClassVar[str] = "chat"
    COUNT: ClassVar[str] = "requests"
    COMPARISON: ClassVar[str] = "kept"

    def answered(self, label: str) -> list[bool]:
        """For each request, whether the model's answer counts."""
        answers = self.outcomes[label]
        if label == "base" or "base" not in self.outcomes:
            return [answer.sound for answer in answers]
        margin = self.settings["margin"]
        return [
            answer.sound and answer.nll <= own.nll + margin
            for answer, own in zip(answers, self.outcomes["base"], strict=True)
        ]

    def side(self, label: str) -> dict:
        """The figures of one model over all requests."""
        return self._figures(label, range(len(self.cases)))

    def _figures(self, label: str, indices: Sequence[int]) -> dict:
        """The figures of one model over some requests."""
        answers, whether = [self.outcomes[label][index] for index in indices], self.answered(label)
        answered = sum(whether[index] for index in indices)
        figures = {"answered": answered, "of": len(answers), "share": answered / len(answers)}
        figures |= {"ended": sum(a.ended for a in answers), "loops": sum(a.loops for a in answers)}
        figures |= {"empty": sum(a.empty for a in answers)}
        nlls = [answer.nll for answer in answers if answer.nll is not None]
        return figures | ({"nll": math.fsum(nlls) / len(nlls)} if nlls else {})

    def compare(self) -> dict | None:
        """Of the requests that the base answers: how many the model answers, and their share with a 95% interval."""
        return self._kept(range(len(self.cases)))

    def _kept(self, indices: Sequence[int]) -> dict | None:
        """See `compare`, over some requests."""
        if "base" not in self.outcomes:
            return None
        base, out = (self.answered(label) for label in ("base", "out"))
        return kept_of((base[index], out[index]) for index in indices)

    def by_length(self) -> list[dict]:
        """The figures of each length of the text before the request; [] where no request has one."""
        lengths = list(dict.fromkeys(case.length for case in self.cases))
        if lengths == [0]:
            return []
        rows = []
        for length in lengths:
            indices = [index for index, case in enumerate(self.cases) if case.length == length]
            sides = {label: self._figures(label, indices) for label in self.outcomes}
            rows.append({"length": length} | sides | {"kept": self._kept(indices)})
        return rows

    def about(self) -> dict:
        """The figures by length, and the first request that the base answers and the model does not, with its answer;
        {} if there is neither.
        """
        rows = self.by_length() if self.outcomes else []
        return ({"lengths": rows} if rows else {}) | self._example()

    def _example(self) -> dict:
        if "base" not in self.outcomes:
            return {}
        pairs = zip(self.answered("base"), self.answered("out"), strict=True)
        lost = next((index for index, (base, out) in enumerate(pairs) if base and not out), None)
        if lost is None:
            return {}
        answer = self.outcomes["out"][lost]
        return {"example": {"request": self.cases[lost].words, "answer": answer.text[:200]}}

    def case(self, index: int) -> dict:
        """One request with its answers."""
        case = self.cases[index]
        data: dict[str, Any] = {"request": case.words}
        data |= {"length": case.length, "text": case.text, "prompt": len(case.prompt)} if case.length else {}
        for label, answers in self.outcomes.items():
            answer = {key: value for key, value in vars(answers[index]).items() if key != "ids"}
            data[label] = answer | {"tokens": len(answers[index].ids), "answered": self.answered(label)[index]}
        return data


class Chat(CaseProbe):
    """Greetings and short requests with the chat template: which are still answered."""

    name: ClassVar[str] = "chat"
    summary: ClassVar[str] = "greetings and short requests with the chat template: which are answered"
    cases_are: ClassVar[str] = "requests"
    stage: ClassVar[str] = "short requests"
    model_first: ClassVar[bool] = True

    requests: TextSource = Field(BUILTIN, description="'builtin' (ten of them), or a text file with one in each line.")
    tokens: int = Field(128, ge=1, description="Tokens of an answer, at most; one that goes on does not count.")
    margin: float = Field(
        0.5, ge=0, description="Nats a token by which an answer may be less likely to the base than the base's own."
    )
    length: int | None = Field(None, ge=0, description="Tokens of a text before each request; 0 or null: none.")
    lengths: TextLengths | None = Field(None, description="Several of them, each with all requests: 0,512,1024.")
    text: TextSource = Field(BUILTIN, description="With a length, the text: 'builtin' or a text file.")

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("length", "lengths"),)

    limits: ClassVar[dict[str, Limit]] = {
        "min_chat": Limit(
            lambda record: record["kept"]["share"],
            at_least=True,
            description="Gate: share of the requests answered by the base that are answered, at least.",
            most=1,
            words="requests kept",
        )
    }

    @model_validator(mode="after")
    def _refuse_unfit_settings(self) -> Chat:
        if self.length is not None and self.lengths is not None:
            raise settings_error("and lengths are two ways to say the same", key="length", fix="one of them")
        return self

    @classmethod
    def shared(cls, settings: Mapping[str, Any]) -> list[str]:
        return super().shared(settings) if settings.get("length") or settings.get("lengths") else []

    @property
    def before(self) -> tuple[int, ...]:
        """Tokens of the text before the requests; 0: there is none."""
        return (self.length or 0,) if self.lengths is None else tuple(dict.fromkeys(self.lengths))

    @property
    def effort(self) -> Effort:
        tokens, texts = len(REQUESTS) * self.tokens * len(self.before), len(REQUESTS) * sum(self.before)
        # An answer takes about a third of its tokens; the base reads both models' answers again.
        return Effort(tokens + 2 * texts, max(self.before) + self.tokens, tokens // 3)

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        positions, longest = positions_of(config), max(self.before)
        room = (positions or 0) - self.tokens - ROOM
        if positions is None or room < 1 or longest <= room:
            return {}
        if self.lengths is None:
            return {"length": room}
        return {"lengths": list(dict.fromkeys(min(length, room) for length in self.lengths))}

    def refuse(self, base: ModelSource, out: Anatomy) -> None:
        """Raise if the requests, or the text before them, cannot be read."""
        load_text(self.requests)
        if any(self.before):
            load_text(self.text)

    def unasked(self, base: ModelSource, tokenizer: Any = None) -> str:
        """Why the probe does not apply: without a chat template, the model was not trained on conversations."""
        return "" if (tokenizer or read_tokenizer(base)).chat_template else "the tokenizer has no chat template"

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> ChatResult:
        """The requests as tokens.

        Raises:
            SurgeryError: there is no chat template; as for `make_requests`; requests are longer than a model's
                positions; the tokenizer belongs to another model.
        """
        if not tokenizer.chat_template:
            raise ModelMismatchError(
                "this tokenizer has no chat template", fix="choose another probe, such as needles"
            )
        words, source = REQUESTS, "ten greetings and short requests"
        if self.requests != BUILTIN:
            text = load_text(self.requests)
            words, source = tuple(filter(None, map(str.strip, LINE_END.split(text.text)))), text.title
        text = load_text(self.text, part="held-out") if any(self.before) else None
        cases = make_requests(tokenizer, words, self.before, text)
        longest = max(len(case.prompt) for case in cases)
        fix = "fewer tokens for an answer" + (", or of the text (length)" if text else "")
        refuse_too_long(configs, longest + self.tokens, "request and answer", fix)
        refuse_other_tokenizer(configs, max(token for case in cases for token in case.prompt))
        settings: dict[str, Any] = {"requests": source, "tokens": self.tokens, "margin": self.margin}
        if text:
            settings |= {"lengths": list(self.before), "text": {"title": text.title, "sha256": text.sha256[:12]}}
        return ChatResult("done", settings, cases, tokenizer=tokenizer)

    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list[Answer]:
        tokenizer = cast("ChatResult", result).tokenizer
        prompts = [case.prompt for case in result.cases]
        answers = run_requests(model, prompts, tokenizer, self.tokens, progress)
        if "out" in result.outcomes:  # this is the base
            for written in (answers, result.outcomes["out"]):
                score_answers(model, prompts, written)
        return answers

    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        return 2 * (max(len(case.prompt) for case in cases) + self.tokens) * kv_bytes

    def is_broken(self, outcome: Answer) -> bool:
        return outcome.broken

    @classmethod
    def missing(cls, record: dict) -> str:
        answered = (record.get("kept") or {}).get("of")
        reason = record.get("reason") or "the base answers no request"
        return "" if answered else reason if record else super().missing(record)

    @classmethod
    def damage(cls, record: dict) -> list[str]:
        kept = record.get("kept") or {}
        lost = kept.get("of", 0) > 2 * kept.get("kept", 0)
        return [f"it answers {kept['kept']} of the {kept['of']} short requests that the base answers"] if lost else []

    @classmethod
    def worst(cls, record: dict) -> tuple[float, str]:
        kept = record.get("kept") or {}
        if not cls.damage(record):
            return 0.0, ""
        found = f"{kept['kept']} of the {kept['of']} that the base answers"
        return 1 - kept["kept"] / kept["of"], f"This model no longer answers most short requests: {found}."

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        base, out = (record.get(label) or {} for label in ("base", "out"))
        name = "greetings and short requests answered, share"
        rows = [Row(name, base.get("share"), out.get("share"), "{:.0%}")]
        for figures in record.get("lengths") or []:
            shares = ((figures.get(label) or {}).get("share") for label in ("base", "out"))
            rows.append(Row(f"the same{_after([figures['length']])}", *shares, "{:.0%}"))
        return rows

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        settings, base, out = (record.get(key) or {} for key in ("settings", "base", "out"))
        answered = Metric("accuracy", "short requests answered", out.get("share"), base.get("share"))
        name = settings.get("requests") or "short requests"
        about = {"tokens": settings["lengths"]} if settings.get("lengths") else {}
        return [({"name": name + _after(settings.get("lengths"))} | about, [answered])]

    @classmethod
    def sentence(cls, record: dict) -> str:
        return kept_words(f"chat{_after((record.get('settings') or {}).get('lengths'))}", record)

    @classmethod
    def paragraph(cls, record: dict) -> str:
        if record.get("status") == UNASKED:
            return ""
        if record.get("status") != "done":
            return f"Chat was **not run**: {record.get('reason') or 'no reason was recorded'}."
        settings, kept, *both = (record.get(key) or {} for key in ("settings", "kept", "base", "out"))
        base, out = (f"{side['answered']} of {side['of']}" if side else "" for side in both)
        answers = f"the base answers {base}, the converted model {out}" if base else f"it answers {out}"
        counts = "it ends and does not go round in circles"
        if base:
            counts = (
                f"it ends, does not go round in circles, and is at most {settings['margin']:g} nats a token less "
                "likely to the base than the base's own"
            )
        line = (
            f"Chat ({settings['requests']}{_after(settings.get('lengths'))}, the most probable answer of at most "
            f"{settings['tokens']} tokens): {answers}. An answer counts if {counts}."
        )
        if kept.get("of"):
            line += f" Of those that the base answers, it keeps {kept['kept']} of {kept['of']}."
        for figures in record.get("lengths") or []:
            line += f" {_sentence(figures)}"
        if example := record.get("example"):
            line += f' It answers "{_inline(example["request"])}" with `{_inline(example["answer"]) or " "}`.'
        return line

    @classmethod
    def lines(cls, result: ChatResult) -> list[Table | str]:
        """Every request with its answers, and the totals."""
        both, rows, lengths = len(result.outcomes) > 1, [], result.by_length()
        answered = {label: result.answered(label) for label in result.outcomes}
        for index, case in enumerate(result.cases):
            cells = [
                f"{'+' if answered[label][index] else '-'} {_shown(answers[index].text)}"
                for label, answers in result.outcomes.items()
            ]
            rows.append([f"[{case.text:,}] {case.words}" if lengths else case.words, *cells])
        names = {label: NAMES[label] if both else "model" for label in result.outcomes}
        lines: list[Table | str] = [Table(("request", *names.values()), rows), ""]
        for label, name in names.items():
            side = result.side(label)
            likely = f", {side['nll']:.2f} nats a token under the base" if "nll" in side else ""
            lines.append(f"{name + ':':<11}{_counts(side)}{likely}")
        if (kept := result.compare()) and kept["of"]:
            lines.append(f"kept:      {kept['kept']} of {kept['of']} ({percent(kept)})")
        if lengths:
            cells = [
                [f"{each['length']:,} tokens", *(_counts(each[label]) for label in names), *_kept_cells(each)]
                for each in lengths
            ]
            table = Table(("text before", *names.values(), *(["kept"] if both else [])), cells)
            text = result.settings["text"]
            source = f"The text is {text['title']} (sha256 {text['sha256']})."
            lines += ["", table, "", f"[n]: the request follows a text of n tokens. {source}"]
        cells = [each["out"]["of"] for each in lengths] or [len(result.cases)]
        if few := few_words(cells, "request", f"requests=FILE with {REPORTABLE} lines"):
            lines.append(few)
        margin = f", within {result.settings['margin']:g} nats a token of the base's own" if both else ""
        lines.append(f"+: it ends within {result.settings['tokens']} tokens, does not go round in circles{margin}")
        return lines


def _after(lengths: Sequence[int] | None) -> str:
    """Where requests stand, after what is said of them; "" for requests without a text."""
    if not lengths:
        return ""
    *others, last = (f"{length:,}" for length in lengths)
    return f" after {', '.join(others)}{' or ' * bool(others)}{last} tokens of text"


def _counts(side: dict) -> str:
    """The figures of one model; a record of an earlier version does not say how many answers are empty."""
    empty = f", {side['empty']} are empty" if side.get("empty") else ""
    counts = f"{side['answered']} of {side['of']} answered; {side['ended']} end, {side['loops']} go round in circles"
    return counts + empty


def _kept_cells(figures: dict) -> list[str]:
    return [f"{figures['kept']['kept']} of {figures['kept']['of']}"] if figures["kept"] else []


def _sentence(figures: dict) -> str:
    """What the converted model does after a text of one length, for the card."""
    out, kept, base = figures["out"], figures.get("kept"), figures.get("base")
    answers = f"it answers {out['answered']} of {out['of']}"
    if base and kept:
        answers = f"the base answers {base['answered']} of {base['of']} and it keeps {kept['kept']}"
    return (
        f"After {figures['length']:,} tokens of text {answers}; {out['of'] - out['ended']} of its answers do not end, "
        f"{out['loops']} go round in circles, {out['empty']} are empty."
    )


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


def _inline(text: str) -> str:
    """A text for a sentence of the card: on one line, without backticks or quotes, at most 120 letters."""
    return " ".join(text.replace("`", "'").replace('"', "'").split())[:120]
