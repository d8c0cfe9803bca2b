"""The line on stderr after Ctrl-C: what the verb has kept, and the command that resumes it or begins again."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from surgery.errors import SurgeryError
from surgery.io.files import PROGRESS, read_json

# Takes the arguments of the command. Returns a sentence on what is kept, and one with the command to type next.
Advice = Callable[[list[str]], str]
_advice: list[Advice] = []
ENDING = ("SIGTERM", "SIGHUP")  # told to end, and the terminal was closed; Windows has only the first


class Interrupted(Exception):
    """Ctrl-C during the work of a verb. Typer would answer a KeyboardInterrupt with an empty line."""


class _Ended(BaseException):
    """The process was told to end; `args` holds the signal's number."""


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Let this block remove what it has begun when a signal ends the process, which then ends by that signal.

    A signal that is ignored (nohup) or that has another handler stays so.
    """

    def note(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    before = {}
    with suppress(ValueError):  # not the main thread: only that may set handlers
        for number in (getattr(signal, name) for name in ENDING if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, note)
    ended = None
    try:
        yield
    except _Ended as told:
        ended = told.args[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended is not None:
        signal.raise_signal(ended)


@contextmanager
def advised(advice: Advice) -> Iterator[None]:
    """Answer Ctrl-C in this block with `advice`, which stays in force after an interrupt until the next command."""
    _advice.append(advice)
    try:
        yield
    except KeyboardInterrupt as pressed:
        raise Interrupted from pressed
    _advice.remove(advice)


def forget() -> None:
    """Drop all advice, because another command begins."""
    _advice.clear()


def message(args: list[str]) -> str:
    """The line that is printed after Ctrl-C.

    Args:
        args: the arguments of the command, without `surgery`.
    """
    words = _advice[-1](args) if _advice else ""
    return f"interrupted{f'; {words}' if words else ''}"


def of_output(out: Path) -> Advice:
    """Advice for verbs that write OUT.partial before OUT: `apply`, `heal`."""
    from surgery.conversion.preflight import is_unjudged, unhealed_folder
    from surgery.io.output_folder import output_path

    def advice(args: list[str]) -> str:
        folder = output_path(out)
        partial, unhealed = (folder.with_name(f"{folder.name}.partial"), unhealed_folder(folder))
        for unfinished in (partial, unhealed.with_name(f"{unhealed.name}.partial")):
            if unfinished.is_dir():
                kept, name = _kept(unfinished), _shown(out, unfinished)
                if unhealed.is_dir():
                    kept = f"the converted model is kept in {_shown(out, unhealed)}, and {kept}"
                where = "" if kept.startswith("nothing") else f" in {name}"
                return f"{kept}{where}. Go on: {_again(args, '--resume')}"
        if unhealed.is_dir():
            return f"the converted model is kept in {_shown(out, unhealed)}. Go on: {_again(args, '--resume')}"
        if is_unjudged(folder):
            done = "is complete, but for its check and scores"
            return f"{out} {done}. Go on: {_again(args, '--resume', drop='--overwrite')}"
        return f"nothing was written. Begin again: {_again(args)}"

    return advice


def of_scores(file: Path) -> Advice:
    """Advice for `score`: a method with steps leaves FILE.state."""

    def advice(args: list[str]) -> str:
        state = file.with_name(f"{file.name}.state")
        if state.exists():
            return f"the steps so far are kept in {state}. Go on: {_again(args, '--resume')}"
        return f"nothing was written. Begin again: {_again(args)}"

    return advice


def nothing_kept(args: list[str]) -> str:
    """Advice for verbs that record nothing before the end: `check`, `eval`, `bench`."""
    return f"nothing was recorded. Begin again: {_again(args)}"


def answers_kept(args: list[str]) -> str:
    """Advice for a probe that keeps the answers of a model (`Probe.resumes`)."""
    return f"the answers so far are kept. Go on: {_again(args)}"


def figures_kept(args: list[str]) -> str:
    """Advice for the verbs that measure several models: finished figures stay in their folder."""
    return f"the figures so far are kept. Go on: {_again(args)}"


def _kept(partial: Path) -> str:
    """A clause on the contents of an unfinished folder that a run with --resume reuses."""
    from surgery.data.text import SELF_TEXT
    from surgery.io.resume import SUFFIX

    states = [path.name for path in partial.rglob(f"*{SUFFIX}")]
    if (training := partial / "healing").is_dir():
        from surgery.healing.trainer import complete_checkpoints

        if complete_checkpoints(training):
            return "checkpoints of the training are kept"
        return "text and answers of the base are kept" if states else "nothing of the training is kept yet"
    if any("-gqa" in name for name in states):
        return "finished layers are kept"
    if any(not name.startswith(SELF_TEXT) for name in states):
        return "what was measured is kept"
    if states:
        return "the calibration text is kept"
    return "finished files are kept" if _record(partial / PROGRESS).get("done") else "nothing is finished yet"


def _record(file: Path) -> dict:
    """The content of a JSON file; {} where it is missing or not a JSON object."""
    try:
        return read_json(file)
    except (OSError, SurgeryError):
        return {}


def _shown(out: Path, folder: Path) -> str:
    """A folder next to OUT, spelled as OUT was typed."""
    return str(out.parent / folder.name) if os.path.dirname(out) else folder.name


def _again(args: list[str], add: str = "", drop: str = "") -> str:
    kept = [arg for arg in args if arg != drop]
    return shlex.join(["surgery", *kept, *([add] if add and add not in kept else [])])
