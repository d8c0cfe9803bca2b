"""Texts by name: the built-in text, files, folders and data sets.

    builtin    the calibration part of the built-in text, as one text; the held-out part is for scores
    FILE       a text file is one text (long ones are cut into rows anyway); each line of a .jsonl file is one
    FOLDER     its .txt, .md and .jsonl files, also in folders below it, in the order of their paths, without READMEs,
               licences, changelogs and names that begin with a dot
    OWNER/NAME a data set of the Hub, as a stream of its split "train"; OWNER/NAME:CONFIG names one of its
               configurations. A folder of other files (parquet, ...) is read in the same way.

Texts are read when they are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgery.data.text import BUILTIN, WRITTEN, load_text, source_names
from surgery.errors import ModelMismatchError, SurgeryError, TextError, nearest

TEXT, MESSAGES = "text", "messages"
LINES = (".jsonl", ".ndjson")
PLAIN = (".txt", ".md", ".text")
ABOUT = ("readme", "license", "licence", "changelog")  # files that describe a folder, and are not its text
TABLES = (".parquet", ".arrow", ".csv")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class TextSource:
    """Texts, with their name in messages (`where`) and in the record (`title`), and whether they stand in columns."""

    title: str
    where: str
    texts: Iterator[str]
    columns: bool = False


def text_sources(heal, tokenizer) -> list[tuple[str, TextSource]]:
    """The texts that `heal.data` names, with their names there.

    Raises:
        SurgeryError: there is no such text, conversations are asked of a plain text, or a column where none has any.
    """
    found = [(name, _source(name, heal, tokenizer)) for name in source_names(heal.data) if name not in WRITTEN]
    plain = [source.where for _, source in found if not source.columns]
    if plain and (heal.chat or (heal.column and len(plain) == len(found))):
        raise _without_columns(heal, plain[0])
    return found


def _source(name: str, heal, tokenizer) -> TextSource:
    if name == BUILTIN:
        text = load_text(BUILTIN, "calibration")
        return TextSource(text.title, name, iter([text.text]))
    path = Path(name).expanduser()
    if path.is_file():
        return TextSource(path.name, name, _file(path, heal, tokenizer), path.suffix.lower() in LINES)
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
            texts = (text for file in files for text in _file(file, heal, tokenizer))
            return TextSource(path.resolve().name, name, texts, any(file.suffix.lower() in LINES for file in files))
        return TextSource(path.resolve().name, name, _data_set(str(path), None, heal, tokenizer), True)
    endings = (*LINES, *PLAIN, ".json", ".csv", ".parquet")
    looks_like_file = path.suffix.lower() in endings or name.startswith((".", "/", "~"))
    if looks_like_file or not HUB_NAME.fullmatch(name):
        close = nearest(path.name, [sibling.name for sibling in _siblings(path)])
        parts = [part.strip() for part in name.split(",")]
        meant = any(part in (*WRITTEN, BUILTIN) or Path(part).expanduser().exists() for part in parts)
        several = f"a list is written heal.data='[{', '.join(parts)}]'"
        raise TextError(
            "no such text file, folder or data set",
            where=f"heal.data: {name}",
            exists=close,
            fix=several
            if meant and len(parts) > 1
            else "check the path, or use self or conversations (what the base writes) or builtin",
        )
    if close := nearest(name, [*WRITTEN, BUILTIN], cutoff=0.75):  # no OWNER/NAME is that near
        raise TextError(
            "there is no file or folder of this name",
            where=f"heal.data: {name}",
            fix=f"did you mean {close}? (a data set of that name: write OWNER/NAME)",
        )
    repository, _, config = name.partition(":")
    return TextSource(name, name, _data_set(repository, config or None, heal, tokenizer), True)


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
        if heal.chat:
            raise _without_columns(heal, str(path))
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


def _without_columns(heal, where: str) -> TextError:
    setting = "heal.chat: true" if heal.chat else f"heal.column: {heal.column}"
    return TextError(
        f"{setting} needs rows with columns, a text has none",
        where=where,
        fix="name a .jsonl file" + ", or heal.chat=false" * heal.chat,
    )


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
