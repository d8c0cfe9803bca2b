"""JSON files, hashes, and the parts of paths that may be published."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from surgery.errors import MachineError, ModelError, RecordError, SettingError, shown

MAX_CONFIG_BYTES, MAX_DEPTH = 16 << 20, 100
# Files of an output folder: its record, its card, the base's card, and the progress file of an unfinished run.
REPORT, CARD, BASE_CARD, PROGRESS = "surgery.json", "README.md", "base-card.md", "surgery-progress.json"


def read_json(path: Path) -> dict:
    """A JSON object from a file of a model folder.

    Raises:
        SurgeryError: the file is missing, has more than 16 MiB, is not JSON, or is JSON but not an object.
    """
    if not path.is_file():
        raise ModelError(f"no {path.name}", where=str(path.parent), fix="name a Hugging Face model folder")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path.name} has {path.stat().st_size:,} bytes: not a config", where=str(path.parent))
    try:
        raw = parse_json(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path.name} holds no JSON object", where=str(path))
    return raw


def parse_json(content: str | bytes) -> Any:
    """Parse JSON, and refuse numbers and nesting that would make later code fail.

    Raises:
        ValueError: it is not JSON in UTF-8, has a number with thousands of digits, or is nested too deep.
    """
    try:
        data = json.loads(content if isinstance(content, str) else content.decode("utf-8"))
        deep = too_deep(data)
    except RecursionError:
        data, deep = None, True
    if deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return data


def too_deep(data: object) -> bool:
    """Whether data is nested more than `MAX_DEPTH` levels deep. An object that contains itself is."""
    level, inner = 0, [data]
    while inner and level <= MAX_DEPTH:
        level += 1
        found = [
            value
            for each in inner
            if isinstance(each, dict | list | tuple)
            for value in (each.values() if isinstance(each, dict) else each)
            if isinstance(value, dict | list | tuple)
        ]
        inner = list({id(value): value for value in found}.values())  # one object in many places is walked once
    return level > MAX_DEPTH


def json_fault(data: object) -> str:
    """A clause on the first value that keeps data from being written as JSON and read again; "" if there is none."""
    if too_deep(data):
        return f"it is nested more than {MAX_DEPTH} levels deep"
    try:
        json_text(data)
    except (TypeError, ValueError):
        return _faulty_value(data, "")
    return ""


def json_text(data: object) -> str:
    """Data as indented JSON; a ValueError for NaN, infinity, and text that UTF-8 cannot encode."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    text.encode("utf-8")
    return text


def _faulty_value(data: object, name: str) -> str:
    """A clause that names the first value, depth first, that JSON cannot hold."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in items:
        inner = f"{name}[{key}]" if not isinstance(data, dict) else f"{name}.{key}" if name else f"{key}"
        try:
            json_text({key: None})
        except (TypeError, ValueError):
            return f"{name or 'it'} has the key {shown(key)}"
        try:
            json_text(value)
        except (TypeError, ValueError):
            return _faulty_value(value, inner)
    return f"{shown(name)[1:-1] or 'it'} is {shown(data)}"


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: dict) -> None:
    """Write `data` as indented JSON in UTF-8. A file of this name is replaced in one step.

    Raises:
        SurgeryError: JSON cannot hold the data; the file is left unchanged.
    """
    if fault := json_fault(data):
        raise RecordError(
            f"this is no JSON: {fault}",
            where=str(path),
            fix="plain data: text, finite numbers, lists",
        )
    write_text(path, json_text(data) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8; as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file. One of this name is replaced in one step; files of other names are not touched."""
    name = os.fsdecode(os.fsencode(path.name)[:200])  # with what follows, no longer than a file system takes
    unfinished = path.with_name(f"{name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def refuse_unwritable(file: Path, what: str, suffixes: tuple[str, ...] = (), made: Path | None = None) -> None:
    """Verify before a long run that its result can be written to a file.

    Args:
        what: the result, such as "the page".
        suffixes: how the name may end; (): anyhow. A result then replaces no file of another kind.
        made: a folder that the run makes.

    Raises:
        SettingError: the name ends otherwise, or it is of a folder or a device, or lies in no folder.
        MachineError: the folder takes no files.
    """
    folder, where = file.absolute().parent, str(file)
    if suffixes and file.suffix.lower() not in suffixes:
        ending = " or ".join(suffixes)
        raise SettingError(f"the name of {what} ends in {ending}", where=where, fix=f"{where}{suffixes[0]}")
    try:
        made_later = made is not None and folder == made.absolute() and not folder.exists()
        known, exists = made_later or folder.is_dir(), os.path.lexists(file)
        regular = file.is_file()
    except OSError as error:  # the name is too long, for example
        raise SettingError(f"cannot write {what}: {error.strerror}", where=where, fix="choose another name") from None
    if not known:
        fix = "make it first, or choose another name"
        raise SettingError(f"cannot write {what}: no such folder", where=str(file.parent), fix=fix)
    if (exists and not regular) or (made is not None and file.absolute() == made.absolute()):
        kind = "this is a folder" if file.is_dir() or not exists else "this is no file"
        raise SettingError(f"cannot write {what}: {kind}", where=where, fix="choose another name")
    if not made_later and not os.access(file if exists else folder, os.W_OK):
        raise MachineError(f"cannot write {what}: Permission denied", where=where)


def utf8(name: str) -> str:
    """The name of a file or folder as valid UTF-8: "?" replaces each byte that is not."""
    return name.encode("utf-8", "replace").decode()


def published(value: str) -> str:
    """A setting as it may be published: a path is cut to its last name, since folders tell who ran this, and where."""
    path = value.strip(" \"'")
    return PureWindowsPath(path).name or value if "/" in path or "\\" in path else value


def published_list(values: list[str]) -> list[str]:
    """Settings of a list as they may be published. Paths with the same last name keep as much more as differs."""
    paths = [PureWindowsPath(value).parts for value in values]
    names = [published(value) for value in values]
    for tail in range(2, max(map(len, paths), default=0)):
        shown = [name for name, _ in dict.fromkeys(zip(names, values, strict=True))]  # a value that comes twice is one
        same = {name for name in shown if shown.count(name) > 1}
        pairs = zip(names, paths, strict=True)
        names = ["/".join(path[-tail:]) if name in same else name for name, path in pairs]
    return names


def published_recipe(recipe: dict) -> dict:
    """A recipe with every path in its settings cut to its last name; its name and description are prose and stay."""

    prose = {key: recipe[key] for key in ("name", "description")}
    return _without_folders(recipe) | prose


def _without_folders(value: Any) -> Any:
    """Plain data as it may be published."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return (
            published_list(value)
            if all(isinstance(item, str) for item in value)
            else list(map(_without_folders, value))
        )
    return published(value) if isinstance(value, str) else value


def published_override(text: str) -> str:
    """An override `key=value` as it may be published; a name and a description are prose and stay unchanged."""
    key, _, value = text.partition("=")
    if key in ("name", "description"):
        return text
    if value.lstrip().startswith(("[", "{")) and {"/", "\\"} & set(value):
        with suppress(yaml.YAMLError, RecursionError):
            form = {"default_flow_style": True, "allow_unicode": True, "width": float("inf"), "sort_keys": False}
            return f"{key}={yaml.safe_dump(_without_folders(yaml.safe_load(value)), **form).strip()}"
    return f"{key}={published(value)}"


def split_card(card: str) -> tuple[dict, str]:
    """Metadata and body of a card. Unreadable metadata comes back as {}: a base's card is not ours to fix."""
    from huggingface_hub import ModelCard

    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    if not (block := re.match(r"---[ \t]*\n(.*?\n)?---[ \t]*(\n|$)", card, re.DOTALL)):
        return {}, card
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict(), card[block.end() :]
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}, card[block.end() :]
