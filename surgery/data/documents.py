"""The text that healing trains on, as documents of token ids: from the base, the built-in text, files or a data set.

    self       text that the base writes (data/generated.py)
    builtin    the calibration part of the built-in text, as one document; the held-out part is for scores
    FILE       a text file is one document (long ones are cut into rows anyway); each line of a .jsonl file is one
    FOLDER     its .txt, .md and .jsonl files, also in folders below it, in the order of their paths, without READMEs,
               licences, changelogs and names that begin with a dot
    OWNER/NAME a data set of the Hub, as a stream of its split "train"; OWNER/NAME:CONFIG names one of its
               configurations. A folder of other files (parquet, ...) is read in the same way.

The tokenizer encodes each document as a separate text, and places BOS and EOS. Only as much text is read as the rows
need.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.data.generated import sample
from surgery.data.packing import Packed
from surgery.data.text import BUILTIN, begin_of_text, load_text
from surgery.errors import ModelMismatchError, SurgeryError, TextError, nearest
from surgery.io.loading import loaded, read_config
from surgery.machine.progress import begin as begin_stage
from surgery.machine.progress import renamed

__all__ = ["Documents", "Packed", "documents"]

SELF, TEXT, MESSAGES = "self", "text", "messages"
LINES = (".jsonl", ".ndjson")
PLAIN = (".txt", ".md", ".text")
TEXTS_AT_ONCE = 64  # number of texts that are tokenised at a time
TRAINING_TEXT = "training text"  # the name of the stage
ABOUT = ("readme", "license", "licence", "changelog")  # files that describe a folder, and are not its text
TABLES = (".parquet", ".arrow", ".csv")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Documents:
    """Token ids of each document.

    Attributes:
        title: the source's name.
        sha256: hash of the texts that were read, or of the tokens that the base wrote.
        ids: token ids of each document.
        begin: the tokens with which the tokenizer begins a text: [BOS] or [].
    """

    title: str
    sha256: str
    ids: list[Sequence[int]]
    begin: list[int]

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
        """The record of the data in surgery.json: title, hash, and the numbers of documents and tokens."""
        return {"data": self.title, "sha256": self.sha256, "documents": len(self), "tokens": self.tokens}


@dataclass(frozen=True)
class TextSource:
    """Texts, with their name in messages (`where`) and in the record (`title`)."""

    title: str
    where: str
    texts: Iterator[str]


def documents(
    heal, tokenizer, base: str | Path | Any, *, rows_needed: int, folder: Path | None = None, progress=None
) -> Documents:
    """The documents of `heal.data`, enough for `rows_needed` rows of `heal.length` tokens if the source has so many.

    Args:
        heal: its data, column, chat, length and seed are read.
        tokenizer: the base's tokenizer.
        base: folder of the base, or the loaded model; only `data: self` runs it.
        folder: folder for the base's own text, so that a stopped run can be resumed; None saves nothing.
        progress: called as progress(done, total, label), in tokens.

    Raises:
        SurgeryError: the data are missing, empty, binary, too short for one row, or lack the column; or the tokenizer
            gives ids that the model lacks.
    """
    wanted, begin = rows_needed * heal.length, begin_of_text(tokenizer)
    if heal.data == SELF:
        with loaded(base) as model:
            written = sample(model, tokenizer, heal, wanted, folder=folder, progress=renamed(progress, TRAINING_TEXT))
        digest = hashlib.sha256(repr(written).encode())
        return Documents("text that the base wrote itself", digest.hexdigest(), written, begin)
    source = _source(heal, tokenizer)
    begin_stage(progress, TRAINING_TEXT, wanted)
    digest, ids, tokens = hashlib.sha256(), [], 0
    texts = (text for text in source.texts if text.strip())
    while tokens < wanted and (batch := list(islice(texts, TEXTS_AT_ONCE))):
        _update(digest, batch)
        # Chat templates add BOS themselves.
        new = tokenizer(batch, add_special_tokens=not heal.chat, verbose=False)["input_ids"]
        ids += [array("i", document) for document in new]  # a list would take eight times as much
        tokens += sum(map(len, new))
        if progress:
            progress(min(tokens, wanted), wanted, TRAINING_TEXT)
    _refuse_unusable(ids, source, heal, read_config(base).get_text_config().vocab_size)
    return Documents(source.title, digest.hexdigest(), ids, begin)


def _refuse_unusable(ids: list[Sequence[int]], source: TextSource, heal, vocabulary: int) -> None:
    tokens, largest = sum(map(len, ids)), max((max(document) for document in ids if document), default=0)
    if not tokens:
        raise TextError("there is no text in it", where=source.where, fix="heal.data: name data with text in it")
    if largest >= vocabulary:
        raise ModelMismatchError(
            f"the tokenizer gives token {largest}, the model knows {vocabulary}",
            where=source.where,
            fix="use the tokenizer of this model",
        )
    if tokens < heal.length:
        raise TextError(
            f"the text is too short: it has {tokens} tokens, one row has {heal.length}",
            where=source.where,
            fix=f"name longer data, or heal.length={tokens}" if tokens >= 8 else "name longer data",
        )


def _update(digest, texts: Iterable[str]) -> None:
    for text in texts:
        raw = text.encode("utf-8")
        digest.update(f"{len(raw)}\0".encode() + raw)


# --- sources of texts ---------------------------------------------------------------------------------------


def _source(heal, tokenizer) -> TextSource:
    name = heal.data
    if name == BUILTIN:
        _refuse_columns(heal, name)
        text = load_text(BUILTIN, "calibration")
        return TextSource(text.title, name, iter([text.text]))
    path = Path(name).expanduser()
    if path.is_file():
        return TextSource(path.name, name, _file(path, heal, tokenizer))
    if path.is_dir():
        files, tables = _files_in(path, LINES + PLAIN), _files_in(path, TABLES)
        if files and tables:
            raise TextError(
                "this folder holds both text and tables",
                where=f"heal.data: {name}",
                exists=f"{files[0].relative_to(path)}, {tables[0].relative_to(path)}",
                fix="name the file that is meant, or a folder with one kind alone",
            )
        if files:
            return TextSource(
                path.resolve().name, name, (text for file in files for text in _file(file, heal, tokenizer))
            )
        return TextSource(path.resolve().name, name, _data_set(str(path), None, heal, tokenizer))
    endings = (*LINES, *PLAIN, ".json", ".csv", ".parquet")
    looks_like_file = path.suffix.lower() in endings or name.startswith((".", "/", "~"))
    if looks_like_file or not HUB_NAME.fullmatch(name):
        close = nearest(path.name, [sibling.name for sibling in _siblings(path)])
        raise TextError(
            "no such text file, folder or data set",
            where=f"heal.data: {name}",
            exists=close,
            fix="check the path, or use self (text that the base writes) or builtin",
        )
    if close := nearest(name, [SELF, BUILTIN], cutoff=0.75):  # no OWNER/NAME is that near
        raise TextError(
            "there is no file or folder of this name",
            where=f"heal.data: {name}",
            fix=f"did you mean {close}? (a data set of that name: write OWNER/NAME)",
        )
    repository, _, config = name.partition(":")
    return TextSource(name, name, _data_set(repository, config or None, heal, tokenizer))


def _files_in(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The data files in a folder: files with these endings, without hidden files and those of `ABOUT`."""

    def is_data(file: Path) -> bool:
        is_hidden = any(component.startswith(".") for component in file.relative_to(folder).parts)
        is_about = file.suffix.lower() in PLAIN and file.stem.lower() in ABOUT
        return file.suffix.lower() in endings and not is_hidden and not is_about and file.is_file()

    return sorted(file for file in folder.rglob("*") if is_data(file))


def _siblings(path: Path) -> list[Path]:
    try:
        return list(path.parent.iterdir())
    except OSError:
        return []


def _file(path: Path, heal, tokenizer) -> Iterator[str]:
    text = load_text(path).text  # refuses a file that is missing, empty, binary or not UTF-8
    if path.suffix.lower() not in LINES:
        _refuse_columns(heal, str(path))
        yield text
        return
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{line_number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TextError(f"not a line of JSON: {error}", where=where, fix="one JSON object a line") from None
        if not isinstance(row, dict):
            raise TextError("this line holds no JSON object", where=where, fix='lines look like {"text": "..."}')
        document = _text_of(row, heal, tokenizer, where)
        try:
            document.encode("utf-8")
        except UnicodeEncodeError:  # JSON may contain half of a surrogate pair
            raise TextError("the text holds half a letter (a lone surrogate)", where=where, fix="correct it") from None
        yield document


def _refuse_columns(heal, where: str) -> None:
    if heal.chat or heal.column:
        setting = "heal.chat: true" if heal.chat else f"heal.column: {heal.column}"
        raise TextError(f"{setting} needs rows with columns, a text has none", where=where, fix="name a .jsonl file")


def _data_set(name: str, config: str | None, heal, tokenizer) -> Iterator[str]:
    """Yield the rows of the split "train". Each part is downloaded only when it is needed."""
    try:
        import datasets
    except ImportError:
        folder = Path(name).is_dir()
        problem = f"no {', '.join(PLAIN + LINES)} file in this folder" if folder else "no file or folder has this name"
        raise SurgeryError(
            f"{problem}, and other data sets are read with the package datasets, which is not installed",
            where=f"heal.data: {name}",
            fix='pip install "attention-surgery[data]"',
            code="missing-package",
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split="train", streaming=True)
        for index, row in enumerate(rows):
            yield _text_of(row, heal, tokenizer, f"{name}, row {index}")
    except SurgeryError:
        raise
    except Exception as error:  # many kinds, such as errors of the network and of formats
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(
            f"the data set cannot be read: {reason}",
            where=f"heal.data: {name}",
            fix="check its name on the Hub (OWNER/NAME, or OWNER/NAME:CONFIG), or name a local file or folder",
        ) from error


def _text_of(row: dict, heal, tokenizer, where: str) -> str:
    column = heal.column or (MESSAGES if heal.chat else TEXT)
    if column not in row:
        close = nearest(column, row)
        raise TextError(
            f"no column {column!r}",
            where=where,
            exists=", ".join(map(str, row)),
            fix=f"heal.column={close or next(iter(row), 'NAME')}",
        )
    value = row[column]
    if not heal.chat:
        if not isinstance(value, str):
            fix = "heal.chat=true" if isinstance(value, list) else "name a column that holds text: heal.column=NAME"
            raise TextError(f"column {column!r} holds no text", where=where, fix=fix)
        return value
    if not tokenizer.chat_template:
        raise ModelMismatchError("this tokenizer has no chat template", where=where, fix="heal.chat=false")
    try:
        return tokenizer.apply_chat_template(value, tokenize=False)
    except Exception as error:  # a template may raise any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(
            f"the chat template does not take column {column!r}: {reason}",
            where=where,
            fix='messages look like [{"role": "user", "content": "..."}, ...]',
        ) from None
