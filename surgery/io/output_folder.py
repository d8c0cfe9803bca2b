"""The output folder: complete or absent.

Everything is written to OUT.partial, which becomes OUT by one rename. A run that was killed leaves OUT.partial
with a list of its finished files; `--resume` continues it if it is the same conversion (by hash).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import MachineError, OutputExistsError, SurgeryError, system_code
from surgery.io.files import PROGRESS, REPORT, read_json, sha256, write_json
from surgery.io.manifest import strangers

SPARE_BYTES = 64 << 20
FULL = ("No space left", "failed writing file", "Disk quota")  # words of torch and safetensors for a full disk


def overlap(one: Path, other: Path) -> bool:
    """Whether two paths, links followed, are the same folder or one lies in the other."""
    one, other = (Path(os.path.realpath(path)) for path in (one, other))
    return one == other or other in one.parents or one in other.parents


class OutputFolder:
    """OUT while it is being made.

    Args:
        out: the final folder.
        base: the model folder that is read, if any. OUT may not be this folder, lie in it or contain it.
        plan_hash: identity of the conversion, for `resume`.
        preserve: pattern of files in OUT.partial that `overwrite` does not remove: they took long to make, and
            their names identify the settings that they were made with.

    Raises:
        SurgeryError: OUT or OUT.partial exists and neither `overwrite` nor `resume` says what to do with it.
        MachineError: not writable, disk too small, or another run is writing the same OUT.
    """

    def __init__(
        self,
        out: str | Path,
        base: Path | None,
        plan_hash: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        preserve: str = "",
    ):
        self.out = output_path(out)
        if not self.out.name:
            raise SurgeryError(
                "the root of a file system is no output folder", where=str(out), fix="name a folder (-o)"
            )
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.replaced = self.out.with_name(self.out.name + ".replaced")
        self.plan_hash, self.resume, self.overwrite, self.preserve = plan_hash, resume, overwrite, preserve
        self.done: dict[str, dict] = {}
        self.records: list[dict] | None = None
        self._started = False
        if base is not None:
            self.refuse_nesting(base)

    @contextmanager
    def opened(self, needed_bytes: int):
        """Yield the partial folder, locked. On success it becomes OUT. After a machine error it stays for --resume.

        Args:
            needed_bytes: disk space that the whole output needs.
        """
        taken = MachineError("another run is writing this folder", where=str(self.out))
        with parent_folder(self.out), _locked(self.out.with_name(f".{self.out.name}.lock"), self.out, taken):
            try:
                with machine_errors(self.out, self.partial):
                    self._prepare(needed_bytes)
                    yield self.partial
                    self._finish()
            except SurgeryError as error:
                if self._started and not error.resumable:  # --resume could not help
                    with suppress(OSError):
                        remove_own(self.partial)
                raise

    def finished(self, file: str, info: dict, records: list[dict]) -> None:
        """Note that a file is complete (its `sha256` and `bytes`), and what the operations have recorded so far."""
        self.done[file], self.records = info, records
        self._note_progress()

    def is_same_conversion(self) -> bool:
        """Whether OUT is complete and the result of this conversion."""
        with suppress(OSError, SurgeryError):
            return read_json(self.out / REPORT).get("plan_hash") == self.plan_hash
        return False

    def _note_progress(self) -> None:
        write_json(self.partial / PROGRESS, {"plan": self.plan_hash, "done": self.done, "records": self.records})

    def refuse_nesting(self, base: Path) -> None:
        """Raise a SurgeryError where OUT is the base's folder, lies in it or holds it."""
        for path in (self.out, self.partial, self.replaced):  # --overwrite removes all three
            if overlap(path, base):
                raise OutputExistsError(
                    "OUT (with its .partial and .replaced) may not be the model folder, lie in it or hold it",
                    where=str(self.out),
                    fix="choose another folder (-o)",
                )

    def _progress(self) -> dict:
        """The progress file of an earlier run; {} if it is missing or does not have the form that surgery writes."""
        with suppress(OSError, SurgeryError):
            progress = read_json(self.partial / PROGRESS)
            done, records = progress.get("done", {}), progress.get("records")
            known = isinstance(done, dict) and all(
                isinstance(info, dict) and type(info.get("sha256")) is str and type(info.get("bytes")) is int
                for info in done.values()
            )
            if known and isinstance(records, list | None) and all(isinstance(each, dict) for each in records or []):
                return progress
        return {}

    def _prepare(self, needed_bytes: int) -> None:
        if os.path.lexists(self.replaced):
            refuse_foreign(self.replaced)
            if not os.path.lexists(self.out) and is_complete(self.replaced):  # killed between the renames of _finish
                os.rename(self.replaced, self.out)
        if os.path.lexists(self.out) and not self.overwrite:
            resume = "--resume to go on with its check and scores, or " if self.is_same_conversion() else ""
            raise OutputExistsError(
                "OUT exists", where=str(self.out), fix=f"choose another name, or add {resume}--overwrite"
            )
        if os.path.lexists(self.out):
            refuse_to_replace(self.out)
        if os.path.lexists(self.partial):
            self._take_over()
        present = sum(info.get("bytes", 0) for info in self.done.values())
        refuse_small_disk(self.out.parent, needed_bytes, present)
        self.partial.mkdir(exist_ok=True)
        self._started = True
        self._note_progress()

    def _has_no_progress(self) -> bool:
        """Whether the run that left OUT.partial was killed before it wrote its progress file or after removing it."""
        names = {path.name for path in self.partial.iterdir()}
        return all(map(_begins_progress, names)) or (REPORT in names and PROGRESS not in names)

    def refuse_unfinished(self) -> None:
        """Raise where OUT.partial is not surgery's, or is of another conversion that `overwrite` does not remove."""
        if not os.path.lexists(self.partial):
            return
        refuse_foreign(self.partial)
        another = self._progress().get("plan") != self.plan_hash and not self._has_no_progress()
        if self.resume and another:
            raise SurgeryError(
                "OUT.partial is of another conversion (recipe, base or version differ)",
                where=str(self.partial),
                fix="finish that one with its own command, or start again with --overwrite",
                code="unfinished-run",
            )

    def empty(self) -> None:
        """Remove what an earlier run left in OUT.partial."""
        _empty(self.partial, [self.partial / PROGRESS])
        self.done, self.records = {}, None
        self._note_progress()

    def _take_over(self) -> None:
        """Continue from the OUT.partial of an earlier run, or remove it."""
        self.refuse_unfinished()
        progress = self._progress()
        if self.resume:
            for path in self.partial.glob("*.unfinished"):  # files that the killed run was writing
                path.unlink()
            self.records = progress.get("records")
            self.done = {
                file: info
                for file, info in progress.get("done", {}).items()
                if (self.partial / file).is_file() and sha256(self.partial / file) == info["sha256"]
            }
        elif self.overwrite:
            remove_own(self.partial, self.preserve)
        else:
            raise SurgeryError(
                "an unfinished run left OUT.partial",
                where=str(self.partial),
                fix="add --resume to go on from it, or --overwrite to start again",
                code="unfinished-run",
            )

    def _set_modes(self) -> None:
        """Give every file the mode of new files: safetensors writes some that only their owner may read."""
        mode = (self.partial / PROGRESS).stat().st_mode & 0o777
        for path in self.partial.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)

    def _finish(self) -> None:
        if os.path.lexists(self.out):  # it may have appeared or changed during this run
            if not self.overwrite:
                what = "somebody else made OUT during the run"
                raise MachineError(
                    what,
                    where=str(self.out),
                    fix="move it away, then run the command with --resume",
                    code="out-exists",
                )
            refuse_to_replace(self.out)
        self._set_modes()
        (self.partial / PROGRESS).unlink()
        if os.path.lexists(self.out):
            remove_own(self.replaced)
            os.rename(self.out, self.replaced)
        try:
            os.rename(self.partial, self.out)
        except OSError:
            if os.path.lexists(self.replaced):
                os.rename(self.replaced, self.out)
            self._note_progress()
            raise
        remove_own(self.replaced)


@contextmanager
def used_alone(folder: Path, fix: str):
    """Inside, no other run of surgery that asks for it uses this folder, which is made where it is missing.

    Args:
        fix: what to do where another run uses it.
    """
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock", folder, MachineError("another run uses this folder", where=str(folder), fix=fix)):
        yield


@contextmanager
def _locked(file: Path, folder: Path, taken: MachineError):
    """Inside, no other run holds the lock of a folder.

    Args:
        file: of the lock; it is there as long as the lock is held.
        taken: the error where another run holds it.
    """
    import filelock

    lock = filelock.FileLock(str(file))
    with machine_errors(folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise taken from None
    try:
        yield
    finally:  # in this order: a run that gets a file that is gone makes another
        with suppress(OSError):
            file.unlink()
        lock.release()


def output_path(out: str | Path) -> Path:
    """The absolute path of an output. Links among its parent folders are followed; a link at the path itself is not.

    Raises:
        SurgeryError: the path holds a zero byte.
    """
    if "\0" in str(out):
        raise SurgeryError("a path holds no zero byte", where=repr(str(out)), fix="name another folder (-o)")
    path = Path(out).absolute()
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name if os.path.isdir(path.parent) else path


def _begins_progress(name: str) -> bool:
    """Whether this is the first progress file of a run, still unfinished because the run was killed."""
    return name.startswith(f"{PROGRESS}.") and name.endswith(".unfinished")


def refuse_small_disk(folder: Path, needed_bytes: int, present: int = 0) -> None:
    """Raise where the disk of a folder, which need not exist yet, has no room for `needed_bytes`.

    Args:
        present: the part of `needed_bytes` that is already written.

    Raises:
        MachineError: it states the bytes that are needed and that are free.
    """
    existing = next((path for path in (folder, *folder.parents) if os.path.isdir(path)), folder)
    free = shutil.disk_usage(existing).free
    if needed_bytes - present + SPARE_BYTES > free:
        raise MachineError(
            f"the disk is too small: {needed_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            where=str(folder),
            fix="free some space or write elsewhere (-o)",
            code="disk-full",
        )


def is_complete(folder: Path) -> bool:
    """Whether surgery finished writing this folder, and did not begin to remove it."""
    return (folder / REPORT).is_file() and not (folder / PROGRESS).exists()


def refuse_to_replace(out: Path) -> None:
    """Raise where --overwrite would remove files that surgery did not write. An empty folder may be replaced.

    Raises:
        SurgeryError: a file, a link or a device, a folder without surgery.json, or one with files not listed there.
    """
    fix = "choose another name (-o), or move it away yourself"
    if out.is_symlink() or not out.is_dir():
        kind = "a link" if out.is_symlink() else "a file" if out.is_file() else "no folder"
        what = f"--overwrite replaces a folder that surgery wrote, and this is {kind}"
        raise OutputExistsError(what, where=str(out), fix=fix)
    if not any(out.iterdir()):
        return
    if not (out / REPORT).is_file():
        what = "--overwrite replaces what surgery wrote, and this folder has no surgery.json"
        raise OutputExistsError(what, where=str(out), fix=fix)
    if mine := strangers(out):
        more = f" and {len(mine) - 3} more" if len(mine) > 3 else ""
        what = f"--overwrite would remove what surgery did not write: {', '.join(mine[:3])}{more}"
        raise OutputExistsError(what, where=str(out), fix="move these files away, or choose another name (-o)")


def refuse_foreign(folder: Path) -> None:
    """Raise where surgery did not write OUT.partial or OUT.replaced: a user's own folder may have that name."""
    if folder.is_dir() and not folder.is_symlink():
        names = {path.name for path in folder.iterdir()}
        if names & {PROGRESS, REPORT} or all(map(_begins_progress, names)):
            return
    raise OutputExistsError(
        "surgery needs this name while it writes OUT, and did not write what is there",
        where=str(folder),
        fix="move it away, or choose another OUT (-o)",
    )


def remove_own(path: Path, preserve: str = "") -> None:
    """Remove a folder that surgery wrote, a file or a link. If this is killed, surgery still recognises the rest.

    Args:
        preserve: pattern of files in it that are not removed; the folders that hold them stay, too.
    """
    if path.is_dir() and not path.is_symlink():
        (path / PROGRESS).touch()
        preserved = [*path.glob(preserve)] if preserve else []
        _empty(path, [path / PROGRESS, *preserved])
        if not preserved:
            shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _empty(folder: Path, preserved: list[Path]) -> None:
    """Remove everything in a folder except these files and the folders that they are in."""
    for path in [path for path in folder.iterdir() if path not in preserved]:
        if any(path in file.parents for file in preserved):
            _empty(path, preserved)
        else:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def weight_files(folder: Path, below: str = "") -> dict[str, dict]:
    """Path in a folder -> sha256 and bytes, for its safetensors files or for the files of its subfolder `below`."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted((folder / below).glob("*.safetensors"))
    }


@contextmanager
def parent_folder(path: Path):
    """Yield the parent folder of `path`, created if missing. Created folders that are empty at the end are removed."""
    created = [parent for parent in path.parents if not os.path.exists(parent)]
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield path.parent
    finally:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()


def disk_full(error: Exception) -> bool:
    """Whether an error of the system, or of a library that writes weights, says that the disk is full."""
    return system_error(error) in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in FULL)


def system_error(error: Exception) -> int | None:
    """The errno of a system error, also where safetensors reports it as text; None for any other error."""
    if isinstance(error, OSError):
        return error.errno
    reported = re.search(r"\(os error (\d+)\)", str(error))
    return int(reported[1]) if reported else None


@contextmanager
def machine_errors(where: Path, partial: Path | None = None):
    """Turn an error of the operating system into a `MachineError` that says what to do.

    Args:
        where: the path in the message if the error names none.
        partial: OUT.partial; where it exists, the message recommends --resume.
    """
    try:
        yield
    except Exception as error:
        number = system_error(error)
        no_thread = isinstance(error, RuntimeError) and "start new thread" in str(error)
        if isinstance(error, SurgeryError) or not (
            isinstance(error, OSError) or number or no_thread or disk_full(error)
        ):
            raise
        if no_thread:
            what, fix = "the system starts no more threads", "end other programs, or raise the limit (ulimit -u)"
        elif disk_full(error):
            what, fix = "the disk is full", "free some space"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            what, fix = "no permission here", "choose another folder (-o), or make this readable and writable"
        elif number in (errno.ENOTDIR, errno.EEXIST):
            what, fix = "a part of this path is a file, not a folder", "choose another folder (-o)"
        elif number == errno.EFBIG:
            what = "a file would be larger than this disk or your limit (ulimit -f) allows"
            fix = "choose another folder (-o), or raise the limit"
        else:
            what, fix = f"the system refused: {os.strerror(number) if number else error}", ""
        if partial is not None and partial.exists():
            fix += f"{', then ' if fix else ''}run the same command with --resume"
        code = "disk-full" if disk_full(error) else system_code(number)
        raise MachineError(what, where=str(getattr(error, "filename", None) or where), fix=fix, code=code) from error
