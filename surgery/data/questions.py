"""Multiple-choice questions, made from any text or read from a file.

A question that is made from a text asks which of several endings continues a passage. The passage ends where a
sentence ends. The right ending is the text that follows, and the wrong ones begin at other sentences of the same text.
All endings of a question have the same number of tokens and follow the same space or empty line. So neither shows
which ending is right.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.data.haystack import SENTENCE_START, WORD_START, common
from surgery.data.text import BUILTIN, Text, begin_of_text, load_text
from surgery.errors import SettingError, SurgeryError, TextError, shown

FORMAT = '{"prompt": "Water is", "choices": ["wet", "dry"], "answer": 0}'
SHOWN = 20  # this many wrong lines of a file are reported one by one


@dataclass(frozen=True)
class Question:
    """A question as text; `answer` is the index of the right choice."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Choice:
    """A question as tokens.

    Attributes:
        prompt: token ids, at least one, including BOS if the tokenizer begins a text with it.
        choices: token ids of each choice, at least one, as they follow the prompt.
        answer: index of the right choice.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt with its longest choice."""
        return len(self.prompt) + max(map(len, self.choices))


def make_choices(
    tokenizer,
    *,
    items: int = 320,
    context: int = 96,
    ending: int = 16,
    wrong: int = 3,
    seed: int = 0,
    text: str | Path | Text = BUILTIN,
) -> list[Choice]:
    """Questions that ask which ending continues a passage. The same arguments give the same questions.

    Args:
        items: number of questions, each at another position of the text.
        context: tokens of a passage, without BOS.
        ending: tokens of each ending, right or wrong.
        wrong: number of wrong endings. They begin at sentences outside of passage and right ending, drawn from the
            whole text.
        seed: seed of positions, wrong endings and their order.
        text: see `surgery.data.text.load_text`; the held-out part of the built-in text. A text with too few sentences
            is cut at words.

    Raises:
        SurgeryError: an argument makes no sense, or the text is too short for so many questions.
    """
    if min(items, context, ending, wrong) < 1:
        raise SettingError("items, context, ending and wrong endings are at least 1", fix="for example 320 items")
    words = load_text(text, part="held-out")
    choices: list[Choice] = []
    for pattern in (SENTENCE_START, WORD_START):
        choices = _QuestionMaker(tokenizer, words, pattern, context, ending, wrong, seed).make(items)
        if len(choices) == items:
            return choices
    raise TextError(
        f"the text has room for {len(choices)} questions of {context} + {ending} tokens, not for {items}",
        where=words.title,
        fix="a longer text, or fewer questions",
    )


class _QuestionMaker:
    """Makes questions from one text with one tokenizer, cut at sentences or at words."""

    def __init__(self, tokenizer, text: Text, pattern, context: int, ending: int, wrong: int, seed: int):
        self.ids, self.context, self.ending, self.wrong = _encoder(tokenizer), context, ending, wrong
        self.bos, self.text = begin_of_text(tokenizer), text.text.strip()
        self.draw = random.Random(f"{seed} {context} {ending} {wrong}")  # a text seeds the same in every Python
        # A boundary is the start of a sentence, and the space between it and the previous sentence.
        self.boundaries = [(m.end(), m[0]) for m in pattern.finditer(self.text)]
        per_token = len(self.text) / max(1, len(self.ids(self.text)))
        self.before, self.after = (int(3 * n * per_token) + 40 for n in (context, ending))  # letters, generously

    def make(self, items: int) -> list[Choice]:
        """As many questions as the text allows, at most `items`."""
        choices: list[Choice] = []
        for boundary in self.draw.sample(self.boundaries, len(self.boundaries)):
            if len(choices) == items:
                break
            if choice := self._question_at(*boundary):
                choices.append(choice)
        return choices

    def _question_at(self, position: int, gap: str) -> Choice | None:
        passage = self.text[max(0, position - self.before) : position].rstrip()
        right = self.text[position : position + self.after]
        others = [
            self.text[other : other + self.after]
            for other, between in self.draw.sample(self.boundaries, min(len(self.boundaries), 8 * self.wrong))
            if between == gap and not position - self.before <= other < position + self.after
        ]
        plain = self.ids(passage)
        encoded = [self.ids(passage + gap + ending) for ending in (right, *others)]
        cut = min(common(plain, tokens) for tokens in encoded)
        endings = [tuple(tokens[cut : cut + self.ending]) for tokens in encoded]
        distinct = list(dict.fromkeys(ending for ending in endings if len(ending) == self.ending))[: 1 + self.wrong]
        if cut < self.context or len(distinct) <= self.wrong or distinct[0] != endings[0]:
            return None
        order = self.draw.sample(distinct, len(distinct))
        return Choice((*self.bos, *plain[cut - self.context : cut]), tuple(order), order.index(distinct[0]))


def read_questions(file: str | Path) -> list[Question]:
    """Questions of a JSONL file: one object a line, with `prompt`, `choices` and `answer`; other keys are ignored.

    The answer is the index of the right choice, from 0, or its text. Empty lines are skipped.

    Raises:
        SurgeryError: there is no such file, it has no questions, or some lines are no questions. The error lists all
            faulty lines, the first 20 with the reason.
    """
    if not Path(file).exists():
        raise TextError("no such file of questions", where=str(file), fix=f"a JSONL file, whose lines are {FORMAT}")
    questions, faults = [], []
    for line_number, line in enumerate(load_text(Path(file)).text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            questions.append(_question(line))
        except ValueError as error:
            faults.append(TextError(str(error), where=f"{file}:{line_number}"))
    if faults:
        first, *rest = faults[:SHOWN]
        more = len(faults) - SHOWN
        rest += [TextError(f"and {more:,} more lines that are no questions", where=str(file))] * (more > 0)
        raise SurgeryError(
            first.what, where=first.where, fix=f"a line is {FORMAT}", others=tuple(rest), code=first.code
        )
    return questions


def faults_of(file: str | Path, fewest: int = 8) -> list[str]:
    """The reasons why a search cannot use a file of questions, a sentence each: faults, or too few questions."""
    try:
        count = len({*read_questions(file)})
    except SurgeryError as error:
        faults = [f"labelled: {fault.where}: {fault.what}" for fault in (error, *error.others)]
        return ["; ".join(filter(None, (faults[0], error.fix))), *faults[1:]]
    few = f"labelled: {file} has {count} different questions; at least {fewest} are needed"
    return [few] if count < fewest else []


def _question(line: str) -> Question:
    """The question of a line; raises a ValueError that says what the line lacks."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {getattr(error, 'msg', 'too deep')}") from None
    if not isinstance(data, dict):
        raise ValueError(f"a question is an object, this is {shown(data)}")
    if missing := [key for key in ("prompt", "choices", "answer") if key not in data]:
        raise ValueError(f"the key {missing[0]!r} is missing; available: {', '.join(data) or 'none'}")
    prompt, choices, answer = data["prompt"], data["choices"], data["answer"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt should be text, it is {shown(prompt)}")
    if not isinstance(choices, list) or not all(isinstance(each, str) and each.strip() for each in choices):
        raise ValueError(f"choices should be a list of texts, it is {shown(choices)}")
    if len({each.strip() for each in choices}) != len(choices) or len(choices) < 2:
        raise ValueError(f"choices should be two or more that differ, it is {shown(choices)}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer should be 0 to {len(choices) - 1} or one of the choices, it is {shown(answer)}")
    return Question(prompt, tuple(choices), answer)


def encode(tokenizer, questions: Sequence[Question]) -> list[Choice]:
    """Questions as tokens.

    A space is put between prompt and choice where neither has one, unless they meet in a script that is written
    without spaces. A token that spans prompt and choice becomes part of the choices, for all choices of the question.

    Raises:
        SurgeryError: a prompt or a choice has no token of its own.
    """
    ids, bos = _encoder(tokenizer), begin_of_text(tokenizer)
    encoded = []
    for question_number, question in enumerate(questions, 1):
        plain = bos + ids(question.prompt)
        full = [bos + ids(_joined(question.prompt, choice)) for choice in question.choices]
        cut = min(common(plain, tokens) for tokens in full)
        choices = tuple(tuple(tokens[cut:]) for tokens in full)
        if not cut or not all(choices):
            what = "prompt" if not cut else "choice"
            raise TextError(
                f"the tokenizer leaves nothing of a {what} of question {question_number}: {shown(question.prompt)}",
                fix=f"a longer {what}",
            )
        encoded.append(Choice(tuple(plain[:cut]), choices, question.answer))
    return encoded


def _joined(prompt: str, choice: str) -> str:
    end, begin = prompt[-1], choice[0]
    spaced = end.isspace() or begin.isspace() or {"W", "F"} & set(map(unicodedata.east_asian_width, (end, begin)))
    return prompt + choice if spaced else f"{prompt} {choice}"


def _encoder(tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
