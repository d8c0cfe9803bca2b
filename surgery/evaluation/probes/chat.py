"""Does the model still hold a conversation? Asks ten greetings and short requests in the chat template.

Perplexity on prose says little about that: a model whose perplexity doubled may answer "Hello!" with one word that it
repeats without end. Answers are decoded greedily. An answer counts if it ends, does not repeat itself, and is one that
the base could have given: under the base, the mean negative log-likelihood of its tokens is at most `margin` above
that of the base's own answer to the same request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from surgery.calibration.scoring import last_logits, refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import chat_prompt
from surgery.data.text import BUILTIN, load_text
from surgery.errors import ModelMismatchError, UnsupportedModelError
from surgery.evaluation.paired import NAMES, CaseResult, kept_of, kept_words, percent
from surgery.evaluation.probes.base import UNASKED, CaseProbe, Effort, Limit, Metric, Row, Table
from surgery.evaluation.probes.fields import TextSource
from surgery.io.loading import loaded, read_tokenizer

if TYPE_CHECKING:
    import torch

    from surgery.io.loading import ModelSource

REQUESTS = (
    "Hello!",
    "Good morning! How are you?",
    "What is your name?",
    "What is the capital of France?",
    "Name three colours.",
    "What is two plus three?",
    "Write one sentence about the sea.",
    "Thank you very much for your help.",
    'Translate "thank you" into French.',
    "Can you help me with my homework?",
)
LINE_END = re.compile(r"\r\n|\r|\n")  # Unicode's other separators may be part of a request
LONGEST_BLOCK, LEAST_TIMES, LEAST_TOKENS = 32, 3, 12  # tokens of a repeated block, repetitions, tokens in all
SHOWN = 60  # letters of an answer that a table shows


@dataclass(frozen=True)
class Request:
    """A request: the user's words, and the tokens of the prompt up to where the model answers."""

    words: str
    prompt: tuple[int, ...]


@dataclass
class Answer:
    """A model's answer.

    Attributes:
        ids: its tokens, including the one that ends it.
        text: the decoded tokens.
        ended: whether the model ended it before the limit.
        loops: whether it repeats itself (see `goes_in_circles`).
        broken: whether the model gave NaN or infinity.
        nll: mean negative log-likelihood of the tokens under the base, in nats; None if there is no base.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    loops: bool
    broken: bool = False
    nll: float | None = None

    @property
    def sound(self) -> bool:
        """Whether it has text, ended, does not repeat itself and came from finite logits."""
        return bool(self.text) and self.ended and not self.loops and not self.broken


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
        answers, answered = self.outcomes[label], self.answered(label)
        figures = {"answered": sum(answered), "of": len(answers), "share": sum(answered) / len(answers)}
        figures |= {"ended": sum(a.ended for a in answers), "loops": sum(a.loops for a in answers)}
        nlls = [answer.nll for answer in answers if answer.nll is not None]
        return figures | ({"nll": math.fsum(nlls) / len(nlls)} if nlls else {})

    def compare(self) -> dict | None:
        """Of the requests that the base answers: how many the model answers, and their share with a 95% interval."""
        if "base" not in self.outcomes:
            return None
        return kept_of(zip(self.answered("base"), self.answered("out"), strict=True))

    def about(self) -> dict:
        """The first request that the base answers and the model does not, with its answer; {} if there is none."""
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
        data: dict[str, Any] = {"request": self.cases[index].words}
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

    limits: ClassVar[dict[str, Limit]] = {
        "min_chat": Limit(
            lambda record: record["kept"]["share"],
            at_least=True,
            description="Gate: share of the requests answered by the base that are answered, at least.",
            most=1,
            words="requests kept",
        )
    }

    @property
    def effort(self) -> Effort:
        tokens = len(REQUESTS) * self.tokens  # an answer takes about a third of them; the base reads it again
        return Effort(tokens, self.tokens, tokens // 3)

    def refuse(self, base: ModelSource) -> None:
        """Raise if the requests cannot be read."""
        load_text(self.requests)

    def unasked(self, base: ModelSource, tokenizer: Any = None) -> str:
        """Why the probe does not apply: without a chat template, the model was not trained on conversations."""
        return "" if (tokenizer or read_tokenizer(base)).chat_template else "the tokenizer has no chat template"

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> ChatResult:
        """The requests as tokens.

        Raises:
            SurgeryError: there is no chat template, or it raises; requests are longer than a model's positions; the
                tokenizer belongs to another model.
        """
        if not tokenizer.chat_template:
            raise ModelMismatchError(
                "this tokenizer has no chat template", fix="choose another probe, such as needles"
            )
        words, source = REQUESTS, "ten greetings and short requests"
        if self.requests != BUILTIN:
            text = load_text(self.requests)
            words, source = tuple(filter(None, map(str.strip, LINE_END.split(text.text)))), text.title
        cases = [Request(request, tuple(_prompt(tokenizer, request))) for request in words]
        if not all(case.prompt for case in cases):
            raise UnsupportedModelError("the chat template writes nothing of a message", fix="choose another probe")
        longest = max(len(case.prompt) for case in cases)
        refuse_too_long(configs, longest + self.tokens, "request and answer", "fewer tokens for an answer")
        refuse_other_tokenizer(configs, max(token for case in cases for token in case.prompt))
        settings = {"requests": source, "tokens": self.tokens, "margin": self.margin}
        return ChatResult("done", settings, cases, tokenizer=tokenizer)

    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list[Answer]:
        tokenizer = cast("ChatResult", result).tokenizer
        answers = _answers(model, result.cases, tokenizer, self.tokens, progress)
        if "out" in result.outcomes:  # this is the base
            for written in (answers, result.outcomes["out"]):
                _score(model, result.cases, written)
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
        return [Row("greetings and short requests answered, share", base.get("share"), out.get("share"), "{:.0%}")]

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        settings, base, out = (record.get(key) or {} for key in ("settings", "base", "out"))
        answered = Metric("accuracy", "short requests answered", out.get("share"), base.get("share"))
        return [({"name": settings.get("requests") or "short requests"}, [answered])]

    @classmethod
    def sentence(cls, record: dict) -> str:
        return kept_words("chat", record)

    @classmethod
    def paragraph(cls, record: dict) -> str:
        if record.get("status") == UNASKED:
            return ""
        if record.get("status") != "done":
            return f"Chat was **not run**: {record.get('reason') or 'no reason was recorded'}."
        settings, kept, *both = (record.get(key) or {} for key in ("settings", "kept", "base", "out"))
        base, out = (f"{side.get('answered')} of {side.get('of')}" for side in both)
        line = (
            f"Chat ({settings['requests']}, the most probable answer of at most {settings['tokens']} tokens): the "
            f"base answers {base}, the converted model {out}. An answer counts if it ends, does not go round in "
            f"circles, and is at most {settings['margin']:g} nats a token less likely to the base than the base's own."
        )
        if kept.get("of"):
            line += f" Of those that the base answers, it keeps {kept['kept']} of {kept['of']}."
        if example := record.get("example"):
            line += f' It answers "{_inline(example["request"])}" with `{_inline(example["answer"]) or " "}`.'
        return line

    @classmethod
    def lines(cls, result: ChatResult) -> list[Table | str]:
        """Every request with its answers, and the totals."""
        both, rows = len(result.outcomes) > 1, []
        answered = {label: result.answered(label) for label in result.outcomes}
        for index, case in enumerate(result.cases):
            cells = [
                f"{'+' if answered[label][index] else '-'} {_shown(answers[index].text)}"
                for label, answers in result.outcomes.items()
            ]
            rows.append([case.words, *cells])
        headers = ("request", *(NAMES[label] if both else "model" for label in result.outcomes))
        lines: list[Table | str] = [Table(headers, rows), ""]
        for label in result.outcomes:
            side = result.side(label)
            name = NAMES[label] if both else "model"
            likely = f", {side['nll']:.2f} nats a token under the base" if "nll" in side else ""
            lines.append(
                f"{name + ':':<11}{side['answered']} of {side['of']} answered; {side['ended']} end, {side['loops']} "
                f"go round in circles{likely}"
            )
        if (kept := result.compare()) and kept["of"]:
            lines.append(f"kept:      {kept['kept']} of {kept['of']} ({percent(kept)})")
        margin = f", within {result.settings['margin']:g} nats a token of the base's own" if both else ""
        lines.append(f"+: it ends within {result.settings['tokens']} tokens, does not go round in circles{margin}")
        return lines


def goes_in_circles(ids: Sequence[int]) -> bool:
    """Whether a block of up to 32 tokens is repeated: at least 3 times in a row, and over at least 12 tokens."""
    for size in range(1, min(LONGEST_BLOCK, len(ids) // LEAST_TIMES) + 1):
        needed, equal = max(LEAST_TIMES * size, LEAST_TOKENS) - size, 0
        for position in range(size, len(ids)):
            equal = equal + 1 if ids[position] == ids[position - size] else 0
            if equal >= needed:
                return True
    return False


def _prompt(tokenizer: Any, request: str) -> list[int]:
    """The tokens of a user's message in the chat template, up to where the model answers."""
    text = chat_prompt(tokenizer, request, fix="choose another probe")
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    named = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id)
    ends = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return {token for token in ends if isinstance(token, int)}


def _answers(model: Any, cases: list[Request], tokenizer: Any, most: int, tick: Callable[[int], None]) -> list[Answer]:
    """Greedy answers, decoded with the model's own cache; `generate` would apply sampling from a generation config."""
    ends, answers = end_tokens(model, tokenizer), []
    with loaded(model):
        for case in cases:
            ids, broken = _greedy(model, case.prompt, ends, most)
            ended = bool(ids) and ids[-1] in ends
            text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
            answers.append(Answer(tuple(ids), text, ended, goes_in_circles(ids), broken))
            tick(len(answers))
    return answers


def _greedy(model: Any, prompt: Sequence[int], ends: set[int], most: int) -> tuple[list[int], bool]:
    """The greedily decoded tokens after a prompt, up to the first of `ends`, and whether a logit was not finite."""
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    inputs, cache, ids = list(prompt), {}, []
    with torch.no_grad():
        while len(ids) < most and not (ids and ids[-1] in ends):
            batch = torch.tensor([inputs], device=model.device)
            step = model(input_ids=batch, use_cache=True, **cache, **last_logits(model, 1))
            logits = step.logits[0, -1]
            if not bool(logits.max().isfinite()):  # NaN if any logit is; a single -inf is allowed, it bans a token
                return ids, True
            ids.append(int(logits.argmax()))
            inputs, cache = ids[-1:], {CACHE: step[CACHE]}
    return ids, False


def _score(base: Any, cases: list[Request], answers: list[Answer]) -> None:
    """Set `nll` of every answer, under the base."""
    import torch

    with loaded(base), torch.no_grad():
        for case, answer in zip(cases, answers, strict=True):
            answer.nll = _nll(base, case.prompt, answer.ids) if answer.ids else math.inf


def _nll(base: Any, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of tokens after a prompt, in nats."""
    import torch

    batch = torch.tensor([[*prompt, *ids]], device=base.device)
    logits: torch.Tensor = base(input_ids=batch, use_cache=False).logits[0, len(prompt) - 1 : -1]
    targets = batch[0, len(prompt) :, None]
    return -logits.double().log_softmax(-1).gather(1, targets).mean().item()


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


def _inline(text: str) -> str:
    """A text for a sentence of the card: on one line, without backticks or quotes, at most 120 letters."""
    return " ".join(text.replace("`", "'").replace('"', "'").split())[:120]
