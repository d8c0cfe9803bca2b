"""Sequences that make heads show whether they use the far past: text with passkeys in it that its end asks for.

They are made from any text and with any tokenizer. Pieces are tokenised one by one and joined as tokens, so that it is
known exactly where a passkey stands, and both its occurrences are the same tokens.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from surgery.data.generated import sample
from surgery.data.text import Text, begin_of_text, begun, fitting_length, load_text, windows, written_pieces
from surgery.errors import SurgeryError

NEEDLE = "\n\nRemember this sequence of words, the one that goes with {label}:"
QUESTION = "\n\nRepeat the sequence of words that goes with {label}:"
WORD = re.compile(r"[^\W\d_]{3,12}")


@dataclass(frozen=True)
class Recall:
    """A sequence whose end repeats what stands far before it.

    Attributes:
        ids: tokens, long [n].
        spans: (first, end) of each piece where it stands first.
        answers: (first, end) of the same pieces, in that order, where they come back.
    """

    ids: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> torch.Tensor:
        """Positions whose next token is one of an answer, long [r]."""
        return torch.cat([torch.arange(first - 1, end - 1) for first, end in self.answers])

    @property
    def row_spans(self) -> torch.Tensor:
        """(first, end) of the piece that each of `rows` repeats, long [r, 2]."""
        each = zip(self.spans, self.answers, strict=True)
        return torch.tensor([span for span, (first, end) in each for _ in range(end - first)])


def calibration_pieces(
    model, tokenizer, text: str, length: int, samples: int, folder: Path | None = None, progress=None
) -> torch.Tensor:
    """Pieces of a calibration text, long [samples, length]; the length is cut to the model's positions.

    Args:
        text: "builtin" (its calibration part) or a file; "self": what the model writes, in its own mixture of kinds of
            text; "mixed": half of them from each of the two.
        folder: keeps what the model wrote, so that a run that was stopped need not write it again.
        progress: called with done, total and a label.
    """
    length = fitting_length(model, length)
    own = written_pieces(text, samples)
    pieces = [_written(model, tokenizer, length, own, folder, progress)] if own else []
    if own < samples:
        source = load_text("builtin" if text == "mixed" else text, "calibration")
        pieces.insert(0, windows(source, tokenizer, length, samples - own))
    return torch.cat(pieces)


def calibration_source(text: str) -> dict:
    """What a record says of such a text: what it is and, unless the model wrote all of it, its sha256."""
    if text == "self":
        return {"text": "what the model writes"}
    source = load_text("builtin" if text == "mixed" else text, "calibration")
    half = ", and as much that the model writes" if text == "mixed" else ""
    return {"text": source.title + half, "sha256": source.sha256[:12]}


def _written(model, tokenizer, length: int, samples: int, folder, progress) -> torch.Tensor:
    """Pieces of text that the model wrote, [samples, length]; texts that end early stand one after the other.

    Each piece begins as `windows` begin, with BOS where the tokenizer begins texts with it: models of that kind make a
    sink of what stands first.
    """
    training = model.training
    try:
        asked = SimpleNamespace(length=length, chat=False, seed=0)
        batch = begun(samples)
        documents = sample(
            model.eval(), tokenizer, asked, samples * length, folder=folder, batch=batch, progress=progress
        )
    finally:
        model.train(training)
    start = begin_of_text(tokenizer)
    tokens = [token for document in documents for token in document[len(start) :]]
    bodies = torch.tensor(tokens[: samples * (length - len(start))]).view(samples, -1)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(samples, -1), bodies], dim=1)


def calibration(
    model, tokenizer, text, *, sinks: int, window: int, samples: int, length: int, keys: int, seed: int
) -> tuple[list[Recall], dict]:
    """The sequences that a scorer measures on, and what its scores' origin says of them.

    Args:
        text: see `load_text`; of the built-in text the calibration part.
        length: cut to the positions that the model has.
        Others: as for `passkeys`.
    """
    text, reach = load_text(text, part="calibration"), {"sinks": sinks, "window": window}
    drawn = {"samples": samples, "length": fitting_length(model, length), "keys": keys, "seed": seed}
    return passkeys(text, tokenizer, **reach, **drawn), {
        "text": text.title,
        "sha256": text.sha256[:12],
        **reach,
        **drawn,
    }


def passkeys(
    text: Text, tokenizer, *, samples: int, length: int, sinks: int, window: int, seed: int, keys: int, words: int = 8
) -> list[Recall]:
    """Text with passkeys hidden in it, each a sequence of random words under a random word, all asked for at its end.

    The words are the text's own, so that any language works. No passkey is among the sinks, nor in the window of a
    query at the end.

    Args:
        samples: sequences; pieces of a short text are used again.
        length: tokens of each.
        sinks, window: of the streaming heads that are planned.
        seed: of pieces, words, labels and depths.
        keys, words: passkeys in a sequence (fewer where there is no room for so many), and words in a passkey.

    Source:
        Xiao et al. 2024 (arXiv 2410.10819), section 2.3, with words of the text in place of the NATO alphabet.
    """
    vocabulary = sorted(set(WORD.findall(text.text)))
    if len(vocabulary) < max(keys, words):
        raise SurgeryError(f"the text has only {len(vocabulary)} different words", where=text.title)
    draw, made = random.Random(seed), []
    pieces = _pieces(text, tokenizer, length, samples, draw)
    close = _ids(tokenizer, ".\n\n")
    for number in range(samples):
        labels, texts = draw.sample(vocabulary, keys), [" ".join(draw.sample(vocabulary, words)) for _ in range(keys)]
        intros = [_ids(tokenizer, NEEDLE.format(label=label)) for label in labels]
        questions = [_ids(tokenizer, QUESTION.format(label=label)) for label in labels]
        answers = [_ids(tokenizer, f" {key}") for key in texts]
        count, room = keys, 0
        while count and room < count:  # room: tokens of plain text that a passkey may stand before
            parts = (part for kind in (intros, questions, answers, answers) for part in kind[:count])
            made_of = sum(map(len, parts)) + count * len(close)
            room = length - made_of - sinks - window
            count -= room < count
        if not count:
            raise SurgeryError(
                f"sinks + window = {sinks + window} leave no far past in {length} tokens, {made_of} of which are a "
                "passkey and its question",
                fix="choose a smaller window, or longer sequences if the model has positions for them",
            )
        depths = sorted(draw.sample(range(sinks, sinks + room), count))
        plain = pieces[number % len(pieces)][: length - made_of].tolist()
        made.append(_assemble(plain, depths, intros[:count], answers[:count], close, questions[:count]))
    return made


def plain_pieces(text: Text, tokenizer, length: int, samples: int, seed: int) -> torch.Tensor:
    """At most `samples` windows of a text [samples, length], drawn from all that it has; a shorter text is one."""
    length = min(length, len(_ids(tokenizer, text.text)) + len(begin_of_text(tokenizer)))
    return _pieces(text, tokenizer, length, samples, random.Random(seed))


def _assemble(plain, depths, intros, answers, close, questions) -> Recall:
    ids: list[int] = []
    spans, ends, begin = [], [], 0
    for depth, intro, answer in zip(depths, intros, answers, strict=True):
        ids += plain[begin:depth] + intro
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer + close
        begin = depth
    ids += plain[begin:]
    for question, answer in zip(questions, answers, strict=True):
        ids += question
        ends.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return Recall(torch.tensor(ids), tuple(spans), tuple(ends))


def _pieces(text: Text, tokenizer, length: int, samples: int, draw: random.Random) -> torch.Tensor:
    """At most `samples` windows of a text, drawn from all that it has of this length."""
    fitting = max(1, len(_ids(tokenizer, text.text)) // length)  # 0: `windows` says that the text is too short
    pieces = windows(text, tokenizer, length, fitting)
    return pieces[draw.sample(range(fitting), min(samples, fitting))]


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
