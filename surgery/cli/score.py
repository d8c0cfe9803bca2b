"""The verb that measures heads: score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Json, ModelName, Quiet, emit
from surgery.errors import SurgeryError
from surgery.operations.duo_attention.scorers import METHODS


def score(
    model: ModelName,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "far-mass",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="The score file to write.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="Sinks of the streaming heads that are planned.")] = 16,
    window: Annotated[int, typer.Option(min=1, help="Their window.")] = 240,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences; default the method's own.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in each; default the method's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sequences.")] = 0,
    text: Annotated[str, typer.Option(help="builtin, or a UTF-8 text file.")] = "builtin",
    steps: Annotated[int | None, typer.Option(min=1, help="gates: steps of the optimiser.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the scores (gates: the loss).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="gates: go on from an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.json.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure which KV heads need the far past; the file serves `surgery apply duo-attention ... scores=FILE`."""
    from surgery.cli.render import heads, progress_bar
    from surgery.operations.duo_attention.scorers import score_to_file
    from surgery.report import plots as pictures

    if output is None:
        raise SurgeryError("no score file was named", fix="add -o scores.json")
    if plot:
        pictures.ready(plot)
    with progress_bar(quiet or as_json) as progress:
        found = score_to_file(
            model,
            output,
            method,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            **{"sinks": sinks, "window": window, "samples": samples, "length": length, "seed": seed},
            **{"text": text, "steps": steps},
        )
    shown = heads.HeadMap.of_scores(found)
    drawn = heads.draw(shown, plot) if plot else []
    if as_json:
        return emit(found.to_dict())
    heads.show(shown)
    heads.written([output, *drawn])
