"""Checkpoints of a training: which are whole, which is the last, and what a kill inside a write leaves.

A checkpoint is a folder `checkpoint-STEP` that the Trainer fills. Its last file is COMPLETE, put there in one step: it
lists the others with their sizes. A folder without it, or with a file of another size, was cut off and counts as none.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import MachineError
from surgery.io.files import write_json
from surgery.io.output_folder import disk_full

COMPLETE = "complete.json"
WEIGHTS = "trainable.safetensors"


def complete(folder: Path, **facts) -> None:
    """Mark a checkpoint as whole."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / COMPLETE, facts | {"files": sizes})


def facts_of(folder: Path) -> dict | None:
    """What `complete` noted; None for a checkpoint that was cut off."""
    with suppress(OSError, ValueError, KeyError, AttributeError):
        facts = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == size for name, size in facts["files"].items()):
            return facts
    return None


def whole(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [path for path in _all(run) if facts_of(path) is not None]


def remove_cut_off(run: Path) -> None:
    """Remove what a kill inside a write left: the Trainer would write into it again."""
    for path in _all(run):
        if facts_of(path) is None:
            shutil.rmtree(path)


def keep_newest(run: Path, count: int) -> None:
    """Remove all but the newest whole checkpoints. The mark goes first: after a kill, what is left counts as none."""
    for path in whole(run)[:-count]:
        (path / COMPLETE).unlink()
        shutil.rmtree(path)


def _all(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"\d+", _step(path))]
    return sorted(found, key=lambda path: int(_step(path)))


def _step(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around the write of a checkpoint: where it fails, what was written goes, and the error says what is left.

    Raises:
        MachineError: the disk is full, or the system refuses to write.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        full = disk_full(error)
        if not full and not isinstance(error, OSError):
            raise
        kept = whole(folder.parent)
        raise MachineError(
            f"a checkpoint could not be written: {'the disk is full' if full else error}",
            where=str(folder),
            exists=f"the last whole checkpoint is {kept[-1].name}" if kept else "no checkpoint yet",
            fix="free some space, then run the same command with --resume",
        ) from error
