"""The text on which an operation measures and fits: a part of the built-in text, a file, or what the model writes.

What the model writes is running text, which may begin with openings of many kinds (`openings.py`), and conversations
in the chat template (`generated.py`). Some samples may be made into texts in which something said earlier comes back
(`recall_rows.py`).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from surgery.data.documents import Documents
from surgery.data.generated import sample, user_turn
from surgery.data.openings import OPENINGS
from surgery.data.recall_rows import Names, repeat_rows
from surgery.data.text import (
    BUILTIN,
    CALIBRATION_TEXTS,
    CalibrationText,
    Text,
    begin_of_text,
    fitting_length,
    is_validation,
    load_text,
    samples_to_begin,
    windows,
    written_samples,
)
from surgery.errors import SurgeryError
from surgery.io.loading import eval_mode

STAGE = "calibration text"
NAMES_OF_RECALL = Names("calibration_recall", "calibration_length", "calibration_text", "more calibration_samples")


def calibration_sequences(
    model, tokenizer, text: str, length: int, samples: int, folder: Path | None = None, progress=None
) -> torch.Tensor:
    """Samples of a calibration text, long [samples, length]; the length is cut to the model's positions.

    Args:
        text: "builtin" (its calibration part), a file, "self" (what the model writes), "mixed" (half of the samples
            from "builtin" and half from "self"), "varied" ("mixed", but what the model writes begins with English
            openings of many kinds), or "conversations" ("mixed", but half of what the model writes is conversations).
        folder: folder for the model's text, so that a resumed run need not generate it again.
        progress: called as progress(done, total, label), in tokens that the model writes.

    Raises:
        SurgeryError: a text that cannot be read or is too short; "conversations" and a chat template that does not
            serve; or "varied" and a tokenizer without English words.
    """
    length, (plain, conversations) = fitting_length(model.config, length), written_samples(text, samples)
    written, sequences = plain + conversations, []
    if conversations:
        _refuse_template(tokenizer, length)
    if written < samples:
        sequences.append(windows(_read(text), tokenizer, length, samples - written))
    for count, chat, first in ((plain, False, 0), (conversations, True, plain)):
        if count:

            def report(done: int, _: int, __: str, first=first) -> None:
                progress(first * length + done, written * length, STAGE)

            openings = OPENINGS if CALIBRATION_TEXTS[text].varied else ()
            settings = SimpleNamespace(length=length, chat=chat, seed=0, openings=openings)
            sequences.append(_written(model, tokenizer, settings, count, folder, progress and report))
    return torch.cat(sequences)


def with_repeats(sequences: torch.Tensor, tokenizer, text: CalibrationText) -> torch.Tensor:
    """Samples of which a share is made into texts in which something said earlier comes back, long [samples, length].

    They are made from samples of plain text, which are then no samples of their own. Sentences with words of the
    recall tests are left out, so that there may be some samples fewer than before. The order of the others stays. Of
    the samples that a fit holds back, the same share is made of repeats.

    Args:
        sequences: the samples of that text, as `calibration_sequences` returns them.
        text: its `recall` is the share, of which there is at least one sample.

    Raises:
        SurgeryError: the samples are too few, or the tokenizer cannot write such texts.
    """
    samples, length = sequences.shape
    plain = samples - written_samples(text.source, text.samples)[1]  # conversations stay whole
    settings = SimpleNamespace(recall=1.0, length=length, seed=0, data=text.source)  # as many as are asked for
    texts = Documents("calibration text", "", sequences[:plain].tolist(), begin_of_text(tokenizer))
    rows, left = repeat_rows(texts, tokenizer, settings, max(1, round(text.recall * samples)), NAMES_OF_RECALL)
    whole = [stretch for stretch in left if len(stretch) == length][: plain - len(rows)]
    return torch.tensor(_mixed(whole + sequences[plain:].tolist(), [[*texts.begin, *row.ids] for row in rows]))


def _mixed(plain: list, made: list) -> list:
    """Both lists as one, each in its order, with the same share of `made` among the samples that a fit holds back."""
    count = len(plain) + len(made)
    sides: tuple[list[int], list[int]] = [], []
    for index in range(count):
        sides[is_validation(index, count)].append(index)
    held_back = min(len(sides[1]), len(made), max(len(made) > 1, round(len(made) * len(sides[1]) / count)))
    places: set[int] = set()
    for side, share in zip(sides, (len(made) - held_back, held_back), strict=True):
        places |= {side[(2 * number + 1) * len(side) // (2 * share)] for number in range(share)}
    rest, rows = iter(plain), iter(made)
    return [next(rows if index in places else rest) for index in range(count)]


def calibration_source(text: str, samples: int) -> dict:
    """The record of a calibration text of so many samples in surgery.json: its title, and its sha256 unless the model
    wrote all of it.
    """
    plain, conversations = written_samples(text, samples)
    if plain + conversations == samples:
        return {"text": "what the model writes"}
    source, half = _read(text), ", and as much that the model writes" if plain + conversations else ""
    if conversations:
        half += f" ({plain} samples of text, {conversations} of conversations)"
    if plain and CALIBRATION_TEXTS[text].varied:
        half += " from English openings of many kinds"
    return {"text": source.title + half, "sha256": source.sha256[:12]}


def _read(text: str) -> Text:
    """The text of the samples that the model does not write."""
    return load_text(BUILTIN if text in CALIBRATION_TEXTS else text, "calibration")


def _refuse_template(tokenizer, length: int) -> None:
    try:
        user_turn(tokenizer, length)
    except SurgeryError as error:
        fix = "calibration_text: mixed needs no chat template"
        raise type(error)(error.what, where="calibration_text: conversations", fix=fix) from error


def _written(model, tokenizer, settings, samples: int, folder, progress) -> torch.Tensor:
    """Samples of text that the model writes, [samples, length]. A sample may hold several short texts.

    A sample begins as a window of `windows` does, with BOS if the tokenizer begins texts with it: such models use the
    first token as a sink. A conversation may begin anywhere in a sample.

    Args:
        settings: length, chat, seed and openings, as `heal` of `generated.sample`.
    """
    rows = 2 * samples if settings.chat else samples  # conversations are shorter than a sample
    wanted, batch = samples * settings.length, samples_to_begin(rows)
    with eval_mode(model):
        documents = sample(model, tokenizer, settings, wanted, folder=folder, batch=batch, progress=progress)
    start = begin_of_text(tokenizer)
    body = settings.length - len(start)
    tokens = [token for document in documents for token in document[len(start) :]]
    bodies = torch.tensor(tokens[: samples * body]).view(samples, -1)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(samples, -1), bodies], dim=1)
