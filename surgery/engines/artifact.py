"""What an export leaves: one file or one folder, which gets its name when the engine agrees with Transformers."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import CheckError, OutputExistsError, SurgeryError
from surgery.io.files import sha256
from surgery.io.output_folder import machine_errors

RECORD = "export.json"  # in a folder: what was exported. Only a folder that has it is replaced


def output_path(typed: Path, source: Path, suffix: str, overwrite: bool, engine: str) -> Path:
    """The absolute path of what will be written.

    Args:
        typed: the path as the user gave it.
        source: the checkpoint's folder.
        suffix: how the name of a file ends; "" for a folder.
        overwrite: whether an earlier export may be replaced.
        engine: the engine's name.

    Raises:
        SurgeryError: nothing can be written there.
    """
    path = typed.absolute()
    if suffix and path.suffix != suffix:
        raise SurgeryError(f"a file of {engine} ends with {suffix}", where=str(typed), fix=f"-o {typed}{suffix}")
    if not path.parent.is_dir():
        raise SurgeryError("no such folder", where=str(path.parent), fix="make it first, or choose another name (-o)")
    kind, name = ("file", path.name) if suffix else ("folder", "NAME")
    if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
        what = f"the {kind} would lie in the checkpoint's folder, whose files `check` compares with its record"
        raise SurgeryError(what, where=str(typed), fix=f"-o {name}, next to the folder")
    if path.is_dir() and source.resolve().is_relative_to(path.resolve()):
        what = "the checkpoint lies in this folder, which would be replaced"
        raise SurgeryError(what, where=str(typed), fix=f"-o {name}, next to the folder")
    refuse_existing(typed, suffix, overwrite)
    return path


def refuse_existing(typed: Path, suffix: str, overwrite: bool) -> None:
    """Raise where something has this name that may not be replaced.

    `overwrite` replaces a file by a file, and a folder that an export wrote by a folder.
    """
    if not os.path.lexists(typed):
        return
    ours = _is_ours(typed, folder=not suffix)
    if not ours or not overwrite:
        fix = "choose another name (-o), or add --overwrite" if ours else "choose another name (-o)"
        raise OutputExistsError(f"{typed.absolute().name} exists", where=str(typed), fix=fix)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A new name beside `path` to write to. What is left there at the end is removed, after a CheckError kept."""
    partial = _beside(path, "unfinished")
    try:
        with machine_errors(path):
            yield partial
    except CheckError as error:
        failed = path.with_name(f"{path.name}.failed")
        if os.path.lexists(failed) and not _is_ours(failed, partial.is_dir()):
            failed = _beside(path, "failed")
        with machine_errors(failed):
            put(partial, failed)
        raise CheckError(error.what, where=str(failed), fix=error.fix) from None
    finally:
        remove(partial)


def put(partial: Path, path: Path) -> None:
    """Give what was written its name, in place of an earlier one."""
    if not path.is_dir() or path.is_symlink():
        os.replace(partial, path)
        return
    old = _beside(path, "replaced")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(old, path)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder but its `RECORD`."""
    return sum(file.stat().st_size for file in _files(path))


def digest(path: Path) -> str:
    """The sha256 of a file; of a folder, that of a list of its files but its `RECORD`, as `sha256sum` prints it."""
    if not path.is_dir():
        return sha256(path)
    lines = [f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in _files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.rglob("*") if each.is_file() and each != path / RECORD)


def _is_ours(path: Path, folder: bool) -> bool:
    """Whether an export may have written what is there: a folder with a `RECORD`; any file."""
    if folder:
        return (path / RECORD).is_file() and not path.is_symlink()
    return not path.is_dir()


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.{ending}")
