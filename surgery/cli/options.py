"""Arguments and options that several verbs share, and the one way in which they print JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

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
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not check the result.")]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Do not score the result against the base.")]
NoGate = Annotated[bool, typer.Option("--no-gate", help="Score it, but let a failing gate pass.")]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="The model it was made from.")]


def emit(data: dict) -> None:
    """One JSON object on stdout, escaped where a pipe does not take Unicode."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    try:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=not unicode))
    except BrokenPipeError:
        from surgery.cli.render.console import reader_left

        reader_left()
