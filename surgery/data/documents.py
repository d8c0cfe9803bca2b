"""The text that healing trains on, as documents of token ids.

    self       text that the base writes (data/generated.py)
    other      texts by name (data/text_sources.py)

A list of names is read in equal shares of tokens. A source that has less gives all of its text, and the others give
more. Of a source that has more, pieces are taken from its whole length.

The tokenizer encodes each document as a separate text, and places BOS and EOS. Only as much text is read as the rows
need.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.data.generated import sample
from surgery.data.packing import Packed
from surgery.data.text import SELF, begin_of_text, samples_to_begin, source_names
from surgery.data.text_sources import TextSource, text_sources
from surgery.errors import ModelMismatchError, TextError
from surgery.io.loading import loaded, read_config
from surgery.machine.progress import begin as begin_stage
from surgery.machine.progress import renamed

__all__ = ["Documents", "Packed", "documents"]

TEXTS_AT_ONCE = 64  # number of texts that are tokenised at a time
TRAINING_TEXT = "training text"  # the name of the stage


@dataclass(frozen=True)
class Documents:
    """Token ids of each document.

    Attributes:
        title: the source's name.
        sha256: hash of the texts that were read, or of the tokens that the base wrote.
        ids: token ids of each document.
        begin: the tokens with which the tokenizer begins a text: [BOS] or [].
        sources: the records of the sources, where there are several.
    """

    title: str
    sha256: str
    ids: list[Sequence[int]]
    begin: list[int]
    sources: tuple[dict, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.ids)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(map(len, self.ids))

    @property
    def record(self) -> dict:
        """The record of the data in surgery.json: title, hash, the numbers of documents and tokens, and the sources
        where there are several.
        """
        record = {"data": self.title, "sha256": self.sha256, "documents": len(self), "tokens": self.tokens}
        return record | ({"sources": list(self.sources)} if self.sources else {})

    def stretches(self, length: int) -> list[list[int]]:
        """The documents, cut so that each piece fits into a row of `length` tokens, with the tokens that begin a text
        before it.
        """
        begin, pieces = list(self.begin), []
        for document in self:
            body = document[len(begin) :] if begin and document[: len(begin)] == begin else document
            step = length - len(begin)
            pieces += [[*begin, *body[first : first + step]] for first in range(0, len(body), step)]
        return pieces

    def spread(self, tokens: int, length: int) -> Documents:
        """About so many tokens of these documents: pieces of at most `length` at equal distances. All, if they have
        hardly more.
        """
        if self.tokens < tokens + length:
            return self
        pieces = self.stretches(length)
        count = math.ceil(len(pieces) * tokens / self.tokens)
        chosen = [pieces[(2 * number + 1) * len(pieces) // (2 * count)] for number in range(count)]
        return Documents(self.title, self.sha256, chosen, self.begin)


def documents(
    heal, tokenizer, base: str | Path | Any, *, rows_needed: int, folder: Path | None = None, progress=None
) -> Documents:
    """The documents of `heal.data`, enough for `rows_needed` rows of `heal.length` tokens if the sources have so many.

    Args:
        heal: its data, self_tokens, column, chat, length and seed are read.
        tokenizer: the base's tokenizer.
        base: folder of the base, or the loaded model; only `data: self` runs it.
        folder: folder for the base's own text, so that a stopped run can be resumed; None saves nothing.
        progress: called as progress(done, total, label), in tokens.

    Raises:
        SurgeryError: the data are missing, empty, binary, too short for one row, or lack the column; or the tokenizer
            gives ids that the model lacks.
    """
    wanted, names = rows_needed * heal.length, source_names(heal.data)
    begin_stage(progress, TRAINING_TEXT, wanted)
    said = None if SELF in names else progress  # writing takes long, reading does not
    texts = {
        name: TokenReader(source, tokenizer, heal, wanted, said) for name, source in text_sources(heal, tokenizer)
    }
    sources = [texts[name] if name in texts else BaseWriter(base, tokenizer, heal, folder, progress) for name in names]
    shares = _read(sources, wanted)
    vocabulary = read_config(base).get_text_config().vocab_size
    for text in texts.values():
        text.refuse_unusable(vocabulary)
    parts = [source.documents(share) for source, share in zip(sources, shares, strict=True)]
    if SELF not in names and (tokens := sum(part.tokens for part in parts)) < heal.length:
        raise TextError(
            f"the text is too short: it has {tokens} tokens, one row has {heal.length}",
            where=", ".join(names),
            fix=f"name longer data, or heal.length={tokens}" if tokens >= 8 else "name longer data",
        )
    return parts[0] if len(parts) == 1 else _joined(parts, shares, heal.length)


def refuse_unusable(heal, tokenizer, base: str | Path | Any) -> None:
    """Read the beginning of each text that `heal.data` names; raises as `documents` does. Nothing is written."""
    vocabulary = read_config(base).get_text_config().vocab_size
    for _, source in text_sources(heal, tokenizer):
        text = TokenReader(source, tokenizer, heal, heal.length)
        text.read(heal.length)
        text.refuse_unusable(vocabulary)


def even_shares(available: Sequence[float], wanted: int) -> list[int]:
    """How many tokens each source gives: as many as the others, or all that it has where that is less.

    Args:
        available: tokens of each source; infinite for one whose end is not known.
        wanted: tokens in all.
    """
    shares, left = [0] * len(available), wanted
    ascending = sorted(range(len(available)), key=available.__getitem__)
    for rank, index in enumerate(ascending):
        shares[index] = int(min(available[index], left // (len(available) - rank)))
        left -= shares[index]
    return shares


def _read(sources: Sequence[TokenReader | BaseWriter], wanted: int) -> list[int]:
    """Read each source up to its share, and return the shares. Where one ends, the others are read further."""
    while True:
        available = [source.available for source in sources]
        shares = even_shares(available, wanted)
        for source, share in zip(sources, shares, strict=True):
            source.read(share)
        if available == [source.available for source in sources]:
            return shares


def _joined(parts: Sequence[Documents], shares: Sequence[int], length: int) -> Documents:
    """The documents of several sources, in their order, each cut to its share."""
    cut = [part.spread(share, length) for part, share in zip(parts, shares, strict=True)]
    digest = hashlib.sha256()
    _update(digest, [part.sha256 for part in cut])
    return Documents(
        " + ".join(part.title for part in cut),
        digest.hexdigest(),
        [ids for part in cut for ids in part.ids],
        cut[0].begin,
        tuple(part.record for part in cut),
    )


class TokenReader:
    """The texts of one source as token ids. Only as much is read as is asked for.

    Args:
        source: the texts.
        heal: its column, chat and length are read.
        wanted: tokens that the training needs in all, for `progress`.

    Attributes:
        ids: token ids of each document that was read.
        tokens: their number.
    """

    def __init__(self, source: TextSource, tokenizer, heal, wanted: int, progress=None):
        self.source, self.tokenizer, self.heal, self.wanted, self.progress = source, tokenizer, heal, wanted, progress
        self._texts = (text for text in source.texts if text.strip())
        self._digest, self._ended = hashlib.sha256(), False
        self.ids: list[Sequence[int]] = []
        self.tokens = 0

    @property
    def available(self) -> float:
        """Tokens of the whole source; infinite before its end was reached."""
        return self.tokens if self._ended else math.inf

    def read(self, tokens: int) -> None:
        """Read on until so many tokens are read in all, or the texts end."""
        while self.tokens < tokens and not self._ended:
            batch = list(islice(self._texts, TEXTS_AT_ONCE))
            self._ended = not batch
            if not batch:
                return
            _update(self._digest, batch)
            # Chat templates add BOS themselves.
            new = self.tokenizer(batch, add_special_tokens=not self.heal.chat, verbose=False)["input_ids"]
            self.ids += [array("i", document) for document in new]  # a list would take eight times as much
            self.tokens += sum(map(len, new))
            if self.progress:
                self.progress(min(self.tokens, self.wanted), self.wanted, TRAINING_TEXT)

    def documents(self, _: int) -> Documents:
        """What was read."""
        return Documents(self.source.title, self._digest.hexdigest(), self.ids, begin_of_text(self.tokenizer))

    def refuse_unusable(self, vocabulary: int) -> None:
        """Raise where no text was read, or the model has no such tokens."""
        where = self.source.where
        if not self.tokens:
            raise TextError("there is no text in it", where=where, fix="heal.data: name data with text in it")
        if (largest := max(max(document) for document in self.ids if document)) >= vocabulary:
            raise ModelMismatchError(
                f"the tokenizer gives token {largest}, the model knows {vocabulary}",
                where=where,
                fix="use the tokenizer of this model",
            )


class BaseWriter:
    """The base as a source: it writes when its documents are asked for."""

    def __init__(self, base: str | Path | Any, tokenizer, heal, folder: Path | None, progress):
        self.base, self.tokenizer, self.heal = base, tokenizer, heal
        self.folder, self.progress = folder, renamed(progress, TRAINING_TEXT)

    @property
    def available(self) -> float:
        """How many tokens it may write."""
        return self.heal.self_tokens or math.inf

    def read(self, tokens: int) -> None:
        """Nothing is there to be read."""

    def documents(self, tokens: int) -> Documents:
        """Text of at least so many tokens, which the base writes."""
        rows = math.ceil(tokens / self.heal.length) * (1 + self.heal.chat)  # conversations are shorter than a row
        given = {"folder": self.folder, "batch": samples_to_begin(rows), "progress": self.progress}
        with loaded(self.base) as model:
            written = sample(model, self.tokenizer, self.heal, tokens, **given)
        digest = hashlib.sha256(repr(written).encode()).hexdigest()
        return Documents("text that the base wrote itself", digest, written, begin_of_text(self.tokenizer))


def _update(digest, texts: Iterable[str]) -> None:
    for text in texts:
        raw = text.encode("utf-8")
        digest.update(f"{len(raw)}\0".encode() + raw)
