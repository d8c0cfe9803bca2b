"""The text that healing trains on, as documents of token ids.

    self             text that the base writes (data/generated.py)
    conversations    conversations that the base writes, in its chat template
    any other name   texts of that name (data/text_sources.py)

A list of names is read in equal shares of tokens. A source that has less gives all of its text, and the others give
more. Of a text file that has more, pieces are taken from its whole length; of rows and data sets, the first ones.

The tokenizer encodes each document as a separate text, and places BOS and EOS. Only as much text is read as the rows
need.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from surgery.data.generated import sample
from surgery.data.packing import Packed
from surgery.data.text import (
    BUILTIN,
    CONVERSATIONS,
    WRITTEN,
    begin_of_text,
    load_text,
    samples_to_begin,
    source_names,
)
from surgery.data.text_sources import TextSource, text_sources
from surgery.errors import ModelMismatchError, TextError
from surgery.io.loading import loaded, read_config
from surgery.machine.progress import begin as begin_stage
from surgery.machine.progress import renamed, within

__all__ = ["Documents", "Packed", "documents"]

BYTES = 4  # of a token, about
TEXTS_AT_ONCE = 64  # number of texts that are tokenised at a time
TRAINING_TEXT = "training text"  # the name of the stage
TURN = 0.6180339887498949  # its multiples are evenly spread in [0, 1), and have no period


@dataclass(frozen=True)
class Documents:
    """Token ids of each document.

    Attributes:
        title: the source's name.
        sha256: hash of the texts that were read, or of the tokens that the base wrote. Texts are hashed as a whole,
            also where `ids` are pieces of them.
        ids: token ids of each document.
        begin: the tokens with which the tokenizer begins a text: [BOS] or [].
        sources: the records of the sources, where there are several.
        conversations: token ids of each document that is used as it is: nothing is made of its sentences.
    """

    title: str
    sha256: str
    ids: list[Sequence[int]]
    begin: list[int]
    sources: tuple[dict, ...] = ()
    conversations: list[Sequence[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids) + len(self.conversations)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, chain(self.ids, self.conversations))

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(map(len, chain(self.ids, self.conversations)))

    @property
    def record(self) -> dict:
        """The record of the data in surgery.json: title, hash, the numbers of documents and tokens, and the sources
        where there are several.
        """
        record = {"data": self.title, "sha256": self.sha256, "documents": len(self), "tokens": self.tokens}
        return record | ({"sources": list(self.sources)} if self.sources else {})

    def stretches(self, length: int) -> list[list[int]]:
        """The documents without the conversations, cut so that each piece fits into a row of `length` tokens, with the
        tokens that begin a text before it.
        """
        return [list(self._piece(place, length)) for place in self._places(length)]

    def spread(self, tokens: int, length: int) -> Documents:
        """So many tokens of these documents, and less than `length` more: pieces of a row at most, from all places, in
        their order. All documents, if they have hardly more.
        """
        if self.tokens < tokens + length:
            return self
        places = self._places(length)
        chosen, taken = {}, 0
        for number in sorted(range(len(places)), key=lambda number: number * TURN % 1):
            if taken >= tokens:
                break
            chosen[number] = self._piece(places[number], length)
            taken += len(chosen[number])
        return Documents(self.title, self.sha256, [chosen[number] for number in sorted(chosen)], self.begin)

    def _places(self, length: int) -> list[tuple[int, int]]:
        """Where the pieces of `stretches` begin: document, and token in it."""
        begin, places = list(self.begin), []
        for index, document in enumerate(self.ids):
            first = len(begin) if begin and list(document[: len(begin)]) == begin else 0
            places += [(index, start) for start in range(first, len(document), length - len(begin))]
        return places

    def _piece(self, place: tuple[int, int], length: int) -> array:
        index, start = place
        return array("i", [*self.begin, *self.ids[index][start : start + length - len(self.begin)]])


def documents(
    heal, tokenizer, base: str | Path | Any, *, rows_needed: int, folder: Path | None = None, progress=None
) -> Documents:
    """The documents of `heal.data`, enough for `rows_needed` rows of `heal.length` tokens if the sources have so many.

    Args:
        heal: its data, self_tokens, column, chat, length and seed are read.
        tokenizer: the base's tokenizer.
        base: folder of the base, or the loaded model; it runs only where it writes text.
        folder: folder for the base's own text, so that a stopped run can be resumed; None saves nothing.
        progress: called as progress(done, total, label), in tokens.

    Raises:
        SurgeryError: the data are missing, empty, binary, too short for one row, or lack the column; or the tokenizer
            gives ids that the model lacks.
    """
    wanted, names = rows_needed * heal.length, source_names(heal.data)
    read = None if heal.base_writes else _counted(progress, wanted)  # writing takes long, reading does not
    readers = _readers(heal, tokenizer, read)
    written = [name for name in names if name in WRITTEN]
    writers = {
        name: BaseWriter(name, base, tokenizer, heal, folder, _part(progress, index, len(written)))
        for index, name in enumerate(written)
    }
    sources = [(readers | writers)[name] for name in names]
    shares = _read(sources, wanted)
    _refuse_unusable(readers.values(), base)
    parts = [source.documents() for source in sources]
    if len(parts) > 1:  # all that the base wrote is used, since it takes long to write
        each = zip(names, parts, shares, strict=True)
        parts = [part if name in WRITTEN else part.spread(share, heal.length) for name, part, share in each]
    return _whole(parts, names, heal.length)


def first_documents(heal, tokenizer, base: str | Path | Any, rows: int) -> Documents | None:
    """The beginning of the texts that `heal.data` names, all that is read for so many rows; None if it names none.

    The base writes nothing. Raises as `documents` does; where the base would write, the texts may be short.
    """
    readers = _readers(heal, tokenizer)
    _read(list(readers.values()), rows * heal.length)
    _refuse_unusable(readers.values(), base)
    parts = [reader.documents() for reader in readers.values()]
    names = source_names(heal.data)
    if heal.base_writes:
        return _joined(parts) if parts else None
    return _whole(parts, names, heal.length)


def share_of_base(heal, tokens: int) -> int:
    """About how many of so many tokens the base will write; the tokens of files are estimated by their sizes."""
    names = source_names(heal.data)
    available = [_size(name) / BYTES if name not in WRITTEN else heal.self_tokens or math.inf for name in names]
    shares = dict(zip(names, even_shares(available, tokens), strict=True))
    return sum(shares.get(name, 0) for name in WRITTEN)


def _size(name: str) -> float:
    """Bytes of a named text; infinite where they are not known without reading it."""
    if name == BUILTIN:
        return len(load_text(BUILTIN, "calibration").text)
    file = Path(name).expanduser()
    return file.stat().st_size if file.is_file() else math.inf


def _counted(progress, wanted: int) -> Callable[[int], None] | None:
    """A callback for the tokens that any source has read, which reports their sum; begins the stage."""
    if progress is None:
        return None
    begin_stage(progress, TRAINING_TEXT, wanted)
    done = 0

    def read(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(min(done, wanted), wanted, TRAINING_TEXT)

    return read


def _part(progress, index: int, count: int):
    """A callback for one of several texts that the base writes, which are one stage."""
    named = renamed(progress, TRAINING_TEXT)
    return named if count == 1 else within(named, index, count)


def _readers(heal, tokenizer, read: Callable[[int], None] | None = None) -> dict[str, TokenReader]:
    """A reader of each text that `heal.data` names."""
    return {name: TokenReader(source, tokenizer, heal, read) for name, source in text_sources(heal, tokenizer)}


def _refuse_unusable(readers: Iterable[TokenReader], base: str | Path | Any) -> None:
    vocabulary = read_config(base).get_text_config().vocab_size
    for reader in readers:
        reader.refuse_unusable(vocabulary)


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


def _whole(parts: Sequence[Documents], names: Sequence[str], length: int) -> Documents:
    """The documents of all sources; raises where they fill no row."""
    joined = _joined(parts)
    if joined.tokens < length:
        raise TextError(
            f"the text is too short: it has {joined.tokens} tokens, one row has {length}",
            where=", ".join(names),
            fix=f"name longer data, or heal.length={joined.tokens}" if joined.tokens >= 8 else "name longer data",
        )
    return joined


def _joined(parts: Sequence[Documents]) -> Documents:
    """The documents of several sources, in their order."""
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.sha256()
    _update(digest, [part.sha256 for part in parts])
    return Documents(
        " + ".join(part.title for part in parts),
        digest.hexdigest(),
        [ids for part in parts for ids in part.ids],
        parts[0].begin,
        tuple(part.record for part in parts),
        [ids for part in parts for ids in part.conversations],
    )


class TokenReader:
    """The texts of one source as token ids. Only as much is read as is asked for.

    Args:
        source: the texts.
        heal: its column, chat and length are read.
        read: called with the tokens of each batch.

    Attributes:
        ids: token ids of each document that was read.
        tokens: their number.
    """

    def __init__(self, source: TextSource, tokenizer, heal, read: Callable[[int], None] | None = None):
        self.source, self.tokenizer, self.heal, self._said = source, tokenizer, heal, read
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
            self.tokens += (tokens_read := sum(map(len, new)))
            if self._said:
                self._said(tokens_read)

    def documents(self) -> Documents:
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
    """The base as a source: it writes when its documents are asked for.

    Args:
        name: self or conversations.
    """

    def __init__(self, name: str, base: str | Path | Any, tokenizer, heal, folder: Path | None, progress):
        self.apart = name == CONVERSATIONS
        self.base, self.tokenizer, self.folder, self.progress = base, tokenizer, folder, progress
        self.heal = heal.model_copy(update={"chat": True}) if self.apart else heal
        self.tokens = 0  # that it is to write

    @property
    def available(self) -> float:
        """How many tokens it may write."""
        return self.heal.self_tokens or math.inf

    def read(self, tokens: int) -> None:
        """Ask for so many tokens."""
        self.tokens = tokens

    def documents(self) -> Documents:
        """Text of at least as many tokens as were asked for, which the base writes."""
        rows = math.ceil(self.tokens / self.heal.length) * (1 + self.heal.chat)  # conversations are shorter than a row
        given = {"folder": self.folder, "batch": samples_to_begin(rows), "progress": self.progress}
        with loaded(self.base) as model:
            written = sample(model, self.tokenizer, self.heal, self.tokens, **given)
        digest = hashlib.sha256(repr(written).encode()).hexdigest()
        begin = begin_of_text(self.tokenizer)
        if self.apart:
            return Documents("conversations that the base wrote itself", digest, [], begin, (), written)
        return Documents("text that the base wrote itself", digest, written, begin)


def _update(digest, texts: Iterable[str]) -> None:
    for text in texts:
        raw = text.encode("utf-8")
        digest.update(f"{len(raw)}\0".encode() + raw)
