"""Verbs that measure what was made: check, bench.

The verb that measures heads: score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Base, Json, ModelName, OutName, Quiet, emit
from surgery.errors import CheckError, SurgeryError
from surgery.operations.duo_attention.scorers import METHODS


def check(
    out: OutName,
    base: Base = None,
    memory: Annotated[float | None, typer.Option(help="GiB that may be used; default what is free.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a saved checkpoint: hashes, values, shapes, loading in a fresh process, generating."""
    from surgery.api import check as run
    from surgery.cli.render import tables as results
    from surgery.cli.render.console import progress_bar

    with progress_bar(quiet or as_json) as progress:
        report = run(out, base, memory=None if memory is None else int(memory * 2**30), progress=progress)
    if as_json:
        emit(report.data["check"])
    else:
        results.checks(report.data["check"]["items"])
    report.raise_faults(CheckError)


def bench(
    context: typer.Context,
    out: OutName,
    base: Base = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens; 2k is 2000. Default 512,2k. Calibrate: candidates.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; the models take turns.")] = 3,
    decode: Annotated[int, typer.Option(min=1, help="Tokens timed after each prompt.")] = 16,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Random weights: any length.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Synthetic: so many of the layers.")] = None,
    ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Synthetic: share of streaming KV heads.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the ratios against length.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Find the dense_below from which on sparse prefill pays here.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Calibrate: and give it to OUT.")] = False,
    text: Annotated[str, typer.Option(help="Calibrate: builtin, or a UTF-8 text file.")] = "builtin",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time prefill and decoding beside the base, interleaved; count the cache's bytes and the peak of memory."""
    from surgery.cli.render import tables as results
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.benchmark import result as timings
    from surgery.evaluation.benchmark import run as speed
    from surgery.evaluation.lengths import parse_lengths
    from surgery.report import plots as pictures

    _refuse_of_bench(context, base, calibrate)
    asked = None if lengths is None else parse_lengths(lengths)
    if calibrate:
        settings = {"candidates": asked, "rounds": rounds, "text": text, "device": device}
        return _calibrate(out, settings, write, as_json, quiet)
    chosen = {"rounds": rounds, "decode": decode, "synthetic": synthetic, "layers": layers, "ratio": ratio}
    if plot:
        pictures.ready(plot)
    with progress_bar(quiet or as_json) as progress:
        result = speed.bench(out, base, lengths=asked or (512, 2000), **chosen, device=device, progress=progress)
    if as_json:
        emit(result.to_dict())
    else:
        results.benchmark(result)
    if plot:
        timings.plot(result, plot)


def _calibrate(out: Path, asked: dict, write: bool, as_json: bool, quiet: bool) -> None:
    """Find `dense_below` with these settings, print it, and write it to the checkpoint if asked."""
    from surgery.cli.render import tables as calibration
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.benchmark import dense_below as calibrate

    with progress_bar(quiet or as_json) as progress:
        found = calibrate.calibrate(out, **asked, progress=progress)
    if not as_json:
        calibration.calibration_table(found)
    try:
        scored = calibrate.write(out, found) if write else None
    except SurgeryError:
        if as_json:  # what took minutes is not lost
            emit(found.to_dict() | {"written": False})
        raise
    if as_json:
        return emit(found.to_dict() | {"written": write})
    calibration.closing(found, out, scored)


def _refuse_of_bench(context: typer.Context, base: str | None, calibrate: bool) -> None:
    """Options that the one kind of run would not look at."""
    if base is None and not calibrate:
        raise SurgeryError("bench compares with a base", fix="--base the model that it was made from")
    others = ("decode", "synthetic", "layers", "ratio", "plot") if calibrate else ("write", "text")
    for name in others:
        if context.get_parameter_source(name).name == "COMMANDLINE":
            what = f"--{name} is {'not for' if calibrate else 'for'} --calibrate{'' if calibrate else ' alone'}"
            raise SurgeryError(what, fix="leave it out" if calibrate else "add --calibrate, or leave it out")


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
    from surgery.cli.render import heads
    from surgery.cli.render.console import progress_bar
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
