"""The command line: the verbs of surgery/cli/ as one program, whose errors are messages and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from contextlib import suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer

from surgery.cli import compare as compare_verbs
from surgery.cli import convert as convert_verbs
from surgery.cli import evaluate as evaluate_verb
from surgery.cli import export as export_verb
from surgery.cli import inspect as inspect_verbs
from surgery.cli import interrupt
from surgery.cli import measure as measure_verbs
from surgery.cli import pages as page_verbs
from surgery.cli.help import Command, Group, context_settings
from surgery.cli.options import emit, placed
from surgery.errors import MachineError, SurgeryError, system_code
from surgery.machine import command
from surgery.machine.device import is_out_of_memory

VERBS = {  # in the order of `--help`: verb -> its function, and its line in the list (58 characters at most)
    "ls": (inspect_verbs.ls, "List recipes; with a name, its parameters."),
    "cp": (inspect_verbs.cp, "Copy a recipe here, to edit it."),
    "schema": (inspect_verbs.schema, "Print the JSON Schema of recipes, for editors."),
    "inspect": (inspect_verbs.inspect, "Show a model's attention, and what each recipe would do."),
    "score": (measure_verbs.score, "Rank KV heads by how far back they look."),
    "plan": (convert_verbs.plan, "Show what a recipe would change; writes nothing."),
    "apply": (convert_verbs.apply, "Convert a model, check it, score it, write its card."),
    "heal": (convert_verbs.heal, "Train a converted model towards its base."),
    "check": (measure_verbs.check, "Verify files, weights and loading of an output."),
    "eval": (evaluate_verb.evaluate, "Measure perplexity and recall, compared with the base."),
    "try": (compare_verbs.attempt, "Let a model answer a prompt, beside its base."),
    "reproduce": (compare_verbs.reproduce, "Run the recipe of an output again, and compare."),
    "compare": (compare_verbs.compare, "Measure several models beside their base, in one table."),
    "sweep": (compare_verbs.sweep, "Try values of a setting, and compare the results."),
    "fit": (compare_verbs.fit, "Find what loses least for a share of the KV cache."),
    "bench": (measure_verbs.bench, "Measure speed and memory, compared with the base."),
    "report": (page_verbs.report, "Write one HTML page about an output."),
    "export": (export_verb.export, "Write it for llama.cpp or vLLM, run it there, and compare."),
    "push": (convert_verbs.push, "Upload to the Hub (private by default)."),
    "doctor": (inspect_verbs.doctor, "Report what works on this machine."),
}

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=context_settings(),
    help="Rewrite the attention of a pretrained Hugging Face checkpoint from a recipe, check it, save it.",
    epilog="Start with: surgery apply duo-attention smollm2-135m -o out",
)

MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOMEM)
INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from surgery.version import __version__

        typer.echo(__version__)
        raise typer.Exit


# Verbs that take --device and --dtype. Engines prove on the CPU.
PLACED = (
    "inspect",
    "score",
    "plan",
    "apply",
    "check",
    "eval",
    "try",
    "reproduce",
    "compare",
    "sweep",
    "fit",
    "report",
)

for verb, (run, line) in VERBS.items():
    run = placed(run) if verb in PLACED else run
    app.command(verb, cls=Command, short_help=line, context_settings=context_settings())(run)


def main(args: list[str] | None = None) -> None:
    """The command `surgery`: a user's mistake is one message and an exit code, never a traceback."""
    args = sys.argv[1:] if args is None else args
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _open_streams()
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a pipe on Windows takes no arrows: print "?" rather than fail
            output.reconfigure(errors="replace")
    try:
        os.getcwd()
    except OSError:
        what, fix = "the folder that you are in no longer exists", "change to one that does (cd)"
        _fail(MachineError(what, fix=fix), args)
    interrupt.forget()
    typed = command.typed.set(tuple(args))
    with _Interrupts() as interrupts:
        try:
            sys.exit(app(args, prog_name="surgery", standalone_mode="--json" not in args))
        except (KeyboardInterrupt, interrupt.Interrupted):
            _interrupted(args)
        except SurgeryError as error:
            _fail(error, args)
        except BrokenPipeError:
            from surgery.cli.render.console import reader_left

            reader_left()
        except Exception as error:
            if interrupts.pressed:  # during an import, which raised another error for it
                _interrupted(args)
            _fail(_translate(error), args)
        finally:
            command.typed.reset(typed)


def _interrupted(args: list[str]) -> NoReturn:
    """Print on stderr what is kept and how to resume, and exit."""
    with suppress(OSError):
        typer.echo(interrupt.message(args), err=True)
    sys.exit(INTERRUPTED)


def _translate(error: Exception) -> SurgeryError:
    """Turn any other error into a `SurgeryError`; the traceback of a bug is printed."""
    if hasattr(error, "format_message"):  # of the parser, which prints it itself unless --json was given
        return SurgeryError(error.format_message(), fix="see `surgery --help`")
    if isinstance(error, OSError) and error.errno in MACHINE:
        where, code = str(error.filename or ""), system_code(error.errno)
        return MachineError(f"the system refused: {error.strerror}", where=where, code=code)
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return MachineError("no folder for temporary files can be written", fix="set TMPDIR to one that can")
    if is_out_of_memory(error):
        words = (str(error) or "no more to be had").splitlines()[0]
        fix = "close other programs, or measure less: fewer or shorter samples and windows; of a GPU, --device cpu"
        return MachineError("out of memory", exists=words, fix=fix, code="out-of-memory")
    traceback.print_exc()
    bug = SurgeryError("this is a bug in surgery; please report the lines above", code="internal-error")
    bug.exit_code = 1
    return bug


class _Interrupts:
    """Remembers whether Ctrl-C was pressed; a context manager for the run of a command."""

    def __init__(self):
        self.pressed, self._before = False, None

    def __enter__(self) -> _Interrupts:
        with suppress(ValueError):  # not the main thread: only that may set handlers
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.default_int_handler(number, frame)


def _open_streams() -> None:
    """Open the null device in place of a stdin, stdout or stderr that the process was started without.

    Otherwise the next file that is opened would have the number of a standard stream, and printed text would go there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115 (until the end)


def _fail(error: SurgeryError, args: list[str]) -> None:
    """Print an error on stderr, or with --json as an object on stdout, and exit with its code."""
    as_json = "--json" in args and not error.reported
    try:
        emit(error.to_dict()) if as_json else typer.echo(f"error: {error}", err=True)
    except OSError:  # stdout is full or closed: stderr may still work
        with suppress(OSError):
            typer.echo(f"error: {error}", err=True)
        from surgery.cli.render.console import discard_stdout

        with suppress(OSError):
            discard_stdout()
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
