"""The verb that writes a file for another engine: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import completion, interrupt
from surgery.cli.options import Json, OutName, Quiet, emit
from surgery.errors import SurgeryError


def export(
    out: OutName,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="The engine that will run the result: llama.cpp or vllm.",
            autocompletion=completion.serving_engines,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write this: FILE.gguf for llama.cpp, a folder for vllm."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="For llama.cpp: write the weights as f32 (the default), f16, bf16 or q8_0.",
            autocompletion=completion.weight_types,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE, or the folder of an earlier export.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checked folder for another engine, run it there, and compare it with Transformers.

    A result whose log-probabilities differ by more than 0.001 is refused. f16, bf16 and q8_0 round the weights: then
    the difference is reported. The figures go into surgery.json.
    """
    from surgery.api import export as run
    from surgery.cli.render.console import progress_bar
    from surgery.engines import ENGINES, find

    if engine is None:
        known = ", ".join(ENGINES)
        raise SurgeryError("no engine was named", exists=known, fix=f"add --for {next(iter(ENGINES))}")
    if output is None:
        what, example = ("file", f"FILE{suffix}") if (suffix := find(engine).suffix) else ("folder", "DIR")
        raise SurgeryError(f"no {what} was named", fix=f"add -o {example}")
    quiet = quiet or as_json
    with interrupt.cleaned_up(), interrupt.advised(interrupt.nothing_kept), progress_bar(quiet) as progress:
        result = run(out, engine, output, kind=kind, overwrite=overwrite, progress=progress)
    if as_json:
        return emit(result.to_dict())
    typer.echo(str(result))
