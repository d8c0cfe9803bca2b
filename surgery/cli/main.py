"""The command line: the verbs of surgery/cli/ as one program, whose errors are messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

from surgery.cli import convert as convert_verbs
from surgery.cli import evaluate as evaluate_verb
from surgery.cli import inspect as inspect_verbs
from surgery.cli import measure as measure_verbs
from surgery.cli.options import emit
from surgery.errors import MachineError, SurgeryError

VERBS = {  # in the order in which `--help` lists them
    "ls": inspect_verbs.ls,
    "cp": inspect_verbs.cp,
    "schema": inspect_verbs.schema,
    "inspect": inspect_verbs.inspect,
    "score": measure_verbs.score,
    "plan": convert_verbs.plan,
    "apply": convert_verbs.apply,
    "heal": convert_verbs.heal,
    "check": measure_verbs.check,
    "eval": evaluate_verb.evaluate,
    "bench": measure_verbs.bench,
    "push": convert_verbs.push,
    "doctor": inspect_verbs.doctor,
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Rewrite the attention of a pretrained Hugging Face checkpoint from a recipe, check it, save it.",
)

MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOMEM)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from surgery.version import __version__

        typer.echo(__version__)
        raise typer.Exit


for verb, run in VERBS.items():
    app.command(verb)(run)


def main(args: list[str] | None = None) -> None:
    """The command `surgery`: a user's mistake is one message and an exit code, never a traceback."""
    args = sys.argv[1:] if args is None else args
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a pipe on Windows takes no arrows: print "?" rather than fail
            output.reconfigure(errors="replace")
    try:
        sys.exit(app(args, prog_name="surgery", standalone_mode="--json" not in args))
    except SurgeryError as error:
        _fail(error, args)
    except BrokenPipeError:
        from surgery.cli.render.console import reader_left

        reader_left()
    except Exception as error:
        if hasattr(error, "format_message"):  # of the parser, which prints its own unless asked for JSON
            _fail(SurgeryError(error.format_message(), fix="see `surgery --help`"), args)
        if getattr(error, "errno", None) in MACHINE:
            _fail(MachineError(f"the system refused: {error.strerror}", where=str(error.filename or "")), args)
        traceback.print_exc()
        bug = SurgeryError("this is a bug in surgery; please report the lines above")
        bug.exit_code = 1
        _fail(bug, args)


def _fail(error: SurgeryError, args: list[str]) -> None:
    """Print an error, on stdout as an object where JSON was asked for, and end with its exit code."""
    if "--json" in args and not error.reported:
        emit(error.to_dict())
    else:
        typer.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
