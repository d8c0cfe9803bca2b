"""Sequences that show whether heads use the far past: their end asks for passkeys that the text before contains.

They are made from any text and with any tokenizer. Texts are tokenised separately and joined as tokens. So the
positions of a passkey are known exactly, and both its occurrences are the same tokens.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch

from surgery.data.text import Text, begin_of_text, fitting_length, load_text, windows
from surgery.errors import SettingError, TextError

NEEDLE = "\n\nRemember this sequence of words, the one that goes with {label}:"
QUESTION = "\n\nRepeat the sequence of words that goes with {label}:"
WORD = re.compile(r"[^\W\d_]{3,12}")
NATO = [
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliett",
    "kilo",
    "lima",
    "mike",
    "november",
    "oscar",
    "papa",
    "quebec",
    "romeo",
    "sierra",
    "tango",
    "uniform",
    "victor",
    "whiskey",
    "xray",
    "yankee",
    "zulu",
]
ALPHABETS = ("text", "nato")


@dataclass(frozen=True)
class Recall:
    """A sequence whose end repeats passkeys from far before the end.

    Attributes:
        ids: tokens, long [n].
        spans: (first, end) of each passkey where it occurs first.
        answers: (first, end) of each passkey where it is repeated, in the same order.
        questions: (first, end) of the question before each answer, in the same order.
    """

    ids: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]
    questions: tuple[tuple[int, int], ...] = ()

    @property
    def rows(self) -> torch.Tensor:
        """Positions whose next token belongs to an answer, long [r]."""
        return torch.cat([torch.arange(first - 1, end - 1) for first, end in self.answers])

    @property
    def row_spans(self) -> torch.Tensor:
        """(first, end) of the passkey that each of `rows` repeats, long [r, 2]."""
        pairs = zip(self.spans, self.answers, strict=True)
        return torch.tensor([span for span, (first, end) in pairs for _ in range(end - first)])


def calibration(
    model, tokenizer, text, *, sinks: int, window: int, samples: int, length: int, keys: int, seed: int
) -> tuple[list[Recall], dict]:
    """The sequences on which a scorer measures, and their entry in the record of the scores.

    Args:
        text: see `load_text`; the calibration part of the built-in text.
        length: tokens of a sequence, cut to the model's positions.
        Others: as for `passkeys`.
    """
    text, reach = load_text(text, part="calibration"), {"sinks": sinks, "window": window}
    settings = {"samples": samples, "length": fitting_length(model.config, length), "keys": keys, "seed": seed}
    return passkeys(text, tokenizer, **reach, **settings), {
        "text": text.title,
        "sha256": text.sha256[:12],
        **reach,
        **settings,
    }


def passkeys(
    text: Text,
    tokenizer,
    *,
    samples: int,
    length: int,
    sinks: int,
    window: int,
    seed: int,
    keys: int,
    words: int = 8,
    alphabet: str = "text",
    forms: tuple[str, str] = (NEEDLE, QUESTION),
) -> list[Recall]:
    """Sequences of text with hidden passkeys, all of which the end asks for.

    A passkey is a sequence of random words with a label. No passkey is among the sinks or in the window of a query at
    the end.

    Args:
        samples: number of sequences; windows of a short text are used again.
        length: tokens of a sequence.
        sinks, window: sinks and window of the planned streaming heads.
        seed: seed of windows, words, labels and depths.
        keys, words: number of passkeys in a sequence (fewer if there is no room), and number of words in a passkey.
        alphabet: "text": words and labels are from the text, so that any language works, and a passkey has no word
            twice. "nato": the 26 code words of the NATO alphabet, drawn with replacement, and the labels are
            "number 1" and so on.
        forms: what introduces a passkey by its {label}, and what asks for it.

    Source:
        Xiao et al. 2024 (arXiv 2410.10819), section 2.3, whose passkeys are 32 words of the NATO alphabet.
    """
    vocabulary = sorted(set(WORD.findall(text.text)))
    if alphabet == "text" and len(vocabulary) < max(keys, words):
        raise TextError(f"the text has only {len(vocabulary)} different words", where=text.title)
    draw, sequences = random.Random(seed), []
    haystacks = _sampled_windows(text, tokenizer, length, samples, draw)
    closing = _ids(tokenizer, ".\n\n")
    for index in range(samples):
        labels, texts = _labels_and_keys(draw, keys, words, None if alphabet == "nato" else vocabulary)
        intros = [_ids(tokenizer, forms[0].format(label=label)) for label in labels]
        questions = [_ids(tokenizer, forms[1].format(label=label)) for label in labels]
        answers = [_ids(tokenizer, f" {key}") for key in texts]
        count, room = keys, 0
        while count and room < count:  # room: number of positions in the plain text where a passkey may be
            needed = (tokens for kind in (intros, questions, answers, answers) for tokens in kind[:count])
            overhead = sum(map(len, needed)) + count * len(closing)
            room = length - overhead - sinks - window
            count -= room < count
        if not count:
            raise SettingError(
                f"sinks + window = {sinks + window} leave no far past in {length} tokens, {overhead} of which are a "
                "passkey and its question",
                fix="choose a smaller window, or longer sequences if the model has positions for them",
            )
        depths = sorted(draw.sample(range(sinks, sinks + room), count))
        plain = haystacks[index % len(haystacks)][: length - overhead].tolist()
        sequences.append(_assemble(plain, depths, intros[:count], answers[:count], closing, questions[:count]))
    return sequences


def plain_windows(text: Text, tokenizer, length: int, samples: int, seed: int) -> torch.Tensor:
    """At most `samples` windows of a text [samples, length], drawn at random; a shorter text is a single window."""
    length = min(length, len(_ids(tokenizer, text.text)) + len(begin_of_text(tokenizer)))
    return _sampled_windows(text, tokenizer, length, samples, random.Random(seed))


def _assemble(plain, depths, intros, answers, closing, questions) -> Recall:
    ids: list[int] = []
    spans, answer_spans, begin = [], [], 0
    for depth, intro, answer in zip(depths, intros, answers, strict=True):
        ids += plain[begin:depth] + intro
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer + closing
        begin = depth
    ids += plain[begin:]
    question_spans = []
    for question, answer in zip(questions, answers, strict=True):
        question_spans.append((len(ids), len(ids) + len(question)))
        ids += question
        answer_spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return Recall(torch.tensor(ids), tuple(spans), tuple(answer_spans), tuple(question_spans))


def _labels_and_keys(
    draw: random.Random, keys: int, words: int, vocabulary: list[str] | None
) -> tuple[list[str], list[str]]:
    """Labels and passkeys, drawn from this vocabulary; None: the NATO alphabet, and numbers as labels."""
    if vocabulary is None:
        labels = [f"number {index + 1}" for index in range(keys)]
        return labels, [" ".join(draw.choices(NATO, k=words)) for _ in range(keys)]
    labels = draw.sample(vocabulary, keys)
    return labels, [" ".join(draw.sample(vocabulary, words)) for _ in range(keys)]


def _sampled_windows(text: Text, tokenizer, length: int, samples: int, draw: random.Random) -> torch.Tensor:
    """At most `samples` windows of a text, drawn at random from all its windows of this length."""
    fitting = max(1, len(_ids(tokenizer, text.text)) // length)  # not 0: `windows` reports a text that is too short
    all_windows = windows(text, tokenizer, length, fitting)
    return all_windows[draw.sample(range(fitting), min(samples, fitting))]


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
