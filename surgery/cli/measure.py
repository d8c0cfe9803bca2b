"""Verbs that measure what was made: check, bench.

The verb that measures heads: score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import interrupt
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
    from surgery.cli.render import tables
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.check import FILES, FRESH

    if memory is not None and not 0 < memory < 2**40:  # NaN and infinity too
        raise SurgeryError("memory is a number of GiB above 0", where=f"--memory {memory}", fix="--memory 8")
    with interrupt.advised(interrupt.nothing_kept), progress_bar(quiet or as_json) as progress:
        progress.expect([FILES, FRESH])
        report = run(out, base, memory=None if memory is None else int(memory * 2**30), progress=progress)
    if as_json:
        emit(report.data["check"])
    else:
        tables.checks(report.data["check"]["items"])
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
    from surgery.cli.render import tables
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.benchmark import result as timings
    from surgery.evaluation.benchmark import run as speed
    from surgery.evaluation.lengths import parse_lengths
    from surgery.report import plots

    _refuse_unread_options(context, base, calibrate)
    parsed_lengths = None if lengths is None else parse_lengths(lengths)
    if calibrate:
        search_settings = {"candidates": parsed_lengths, "rounds": rounds, "text": text, "device": device}
        return _search_dense_below(out, search_settings, write, as_json, quiet)
    settings = {"rounds": rounds, "decode": decode, "synthetic": synthetic, "layers": layers, "ratio": ratio}
    if plot:
        plots.ready(plot)
    with interrupt.advised(interrupt.nothing_kept), progress_bar(quiet or as_json) as progress:
        lengths_of_run = parsed_lengths or (512, 2000)
        result = speed.bench(out, base, lengths=lengths_of_run, **settings, device=device, progress=progress)
    if as_json:
        emit(result.to_dict())
    else:
        tables.benchmark(result)
    if plot:
        timings.plot(result, plot)


def _search_dense_below(out: Path, settings: dict, write: bool, as_json: bool, quiet: bool) -> None:
    """Find `dense_below` with these settings, print it, and write it to the checkpoint if asked."""
    from surgery.cli.render import tables
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.benchmark import dense_below

    with interrupt.advised(interrupt.nothing_kept), progress_bar(quiet or as_json) as progress:
        search = dense_below.search_dense_below(out, **settings, progress=progress)
    if not as_json:
        tables.dense_below_table(search)
    try:
        report = dense_below.write_dense_below(out, search) if write else None
    except SurgeryError:
        if as_json:  # what took minutes is not lost
            emit(search.to_dict() | {"written": False})
        raise
    if as_json:
        return emit(search.to_dict() | {"written": write})
    tables.dense_below_outcome(search, out, report)


def _refuse_unread_options(context: typer.Context, base: str | None, calibrate: bool) -> None:
    """Raise where an option was given that this kind of run does not read."""
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
    from surgery.report import plots

    if output is None:
        raise SurgeryError("no score file was named", fix="add -o scores.json")
    if plot:
        plots.ready(plot)
    with interrupt.advised(interrupt.of_scores(output)), progress_bar(quiet or as_json) as progress:
        scores = score_to_file(
            model,
            output,
            method,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            **{"sinks": sinks, "window": window, "samples": samples, "length": length, "seed": seed},
            **{"text": text, "steps": steps},
        )
    head_map = heads.HeadMap.of_scores(scores)
    files = heads.draw(head_map, plot) if plot else []
    if as_json:
        return emit(scores.to_dict())
    heads.show(head_map)
    heads.written([output, *files])
