"""The command line: parse, call the API, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from .errors import CheckError, GateError, MachineError, SurgeryError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Rewrite the attention of a pretrained Hugging Face checkpoint from a recipe, check it, save it.",
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (`surgery ls`) or a .yaml file.")]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, smollm2-135m, or a Hub id (name@revision).")
]
OutName = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that surgery wrote.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the recipe to change.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="The model it was made from.")]


MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOMEM)


def emit(data: dict) -> None:
    """One JSON object on stdout, escaped where a pipe does not take Unicode."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    try:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=not unicode))
    except BrokenPipeError:
        from .display import reader_left

        reader_left()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def ls(as_json: Json = False) -> None:
    """List recipes and operations with their parameters."""
    from . import operations, recipe

    classes, broken = operations.catalogue()
    recipes = recipe.descriptions()
    if as_json:
        fields = {op: cls.model_json_schema()["properties"] for op, cls in classes.items()}
        uses = {name: facts["ops"] for name, facts in recipes.items()}
        recipes = {name: facts["description"] for name, facts in recipes.items()}
        return emit({"recipes": recipes, "uses": uses, "operations": fields, "broken": broken})
    from .listing import print_catalogue

    print_catalogue(recipes, classes, broken)


@app.command()
def cp(
    recipe: RecipeName,
    target: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to; default here.")] = None,
) -> None:
    """Copy a recipe here, to edit it."""
    from .recipe import copy

    typer.echo(f"wrote {copy(recipe, target)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from .recipe import schema as recipe_schema

    emit(recipe_schema())


@app.command()
def inspect(model: ModelName, as_json: Json = False) -> None:
    """Show a model's attention, and which recipes fit it."""
    from .api import anatomy_of, fitting_recipes

    facts = anatomy_of(model)
    fits = fitting_recipes(facts)
    if as_json:
        return emit(facts.to_dict() | {"recipes": fits})
    from . import display

    display.anatomy(facts)
    display.applicable(fits)


@app.command()
def plan(recipe: RecipeName, model: ModelName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a recipe would change; touches no weight."""
    from .api import plan as make

    work = make(recipe, model, overrides=overrides or [])
    if as_json:
        return emit(work.to_dict())
    from . import display

    display.plan(work)


@app.command()
def apply(
    recipe: RecipeName,
    model: ModelName,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="The folder to make.")] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not check the result.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not score the result against the base.")] = False,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Score it, but let a failing gate pass.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an unfinished OUT.partial.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT (when the new one is complete).")
    ] = False,
    engine: Annotated[str, typer.Option(help="streaming, loaded or auto.")] = "auto",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights (weights_only).")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model: plan, rewrite, check, score against the base, write the card."""
    from . import closing, display
    from .api import apply as run

    if output is None:
        raise SurgeryError("no output folder was named", fix="add -o OUT")
    with display.progress_bar(quiet or as_json) as progress:
        report = run(
            recipe,
            model,
            output=output,
            overrides=overrides or [],
            engine=engine,
            check=not no_check,
            evaluate=not no_eval,
            gate=not no_gate,
            resume=resume,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            progress=progress,
            on_plan=None if as_json or quiet else display.plan,
        )
    if as_json:
        emit(report.to_dict())
    else:
        if report.data["check"] and not quiet:
            display.checks(report.data["check"]["items"])
        closing.summary(report, model)
    report.raise_faults()


@app.command()
def check(
    out: OutName,
    base: Base = None,
    memory: Annotated[float | None, typer.Option(help="GiB that may be used; default what is free.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a saved checkpoint: hashes, values, shapes, loading in a fresh process, generating."""
    from . import display
    from .api import check as run

    with display.progress_bar(quiet or as_json) as progress:
        report = run(out, base, memory=None if memory is None else int(memory * 2**30), progress=progress)
    if as_json:
        emit(report.data["check"])
    else:
        display.checks(report.data["check"]["items"])
    report.raise_faults(CheckError)


@app.command("eval")
def evaluate(
    out: ModelName,
    base: Base = None,
    text: Annotated[str, typer.Option(help="builtin, or a UTF-8 text file.")] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text that are scored.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model, alone or against its base: perplexity, KL, top-1 agreement, KV bytes."""
    from . import display
    from .api import evaluate as run

    with display.progress_bar(quiet or as_json) as progress:
        result = run(out, base, text=text, windows=windows, length=length, progress=progress).to_dict()
    if as_json:
        return emit(result)
    display.evaluation(result)


@app.command()
def bench(
    out: OutName,
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model it was made from.")],
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512,2048",
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; the models take turns.")] = 3,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time prefill and decoding of a head split beside its base, interleaved, and count cache bytes."""
    from . import benchmark, display

    with display.progress_bar(quiet or as_json) as progress:
        result = benchmark.bench(out, base, lengths=benchmark.parse_lengths(lengths), rounds=rounds, progress=progress)
    if as_json:
        return emit(result.to_dict())
    display.benchmark(result)


@app.command()
def push(
    out: OutName,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up.")] = False,
    as_json: Json = False,
) -> None:
    """Put a checked checkpoint on the Hub: private by default, one commit, repeat to resume."""
    from . import display
    from .api import push as send

    facts = send(out, repo, public=public, dry_run=dry_run)
    if as_json:
        return emit(facts)
    display.pushed(facts)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works here: versions, devices, disk, doors, kernels."""
    from . import display
    from .doctor import examine

    facts = examine()
    if as_json:
        return emit(facts)
    display.doctor(facts)


def main(args: list[str] | None = None) -> None:
    """The command `surgery`: a user's mistake is one message and an exit code, never a traceback."""
    args = sys.argv[1:] if args is None else args
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows takes no arrows: print "?" rather than fail
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(args, prog_name="surgery", standalone_mode="--json" not in args))
    except SurgeryError as error:
        _fail(error, args)
    except BrokenPipeError:
        from .display import reader_left

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
    if "--json" in args and not isinstance(error, (GateError, CheckError)):  # those follow a printed report
        emit(error.to_dict())
    else:
        typer.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
