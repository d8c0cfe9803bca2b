"""Verbs that measure: check and bench for an output of surgery, score for the heads of a model."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import completion, interrupt
from surgery.cli.options import Base, Device, Json, ModelName, OutName, Quiet, emit
from surgery.errors import CheckError, SurgeryError
from surgery.machine.placement import AUTO
from surgery.operations.head_scorers.scorers import METHODS

SYNTHETIC, CALIBRATE = "Random weights (with --synthetic)", "Sparse prefill (with --calibrate)"
GATES = "Learned gates (with --method gates)"


def check(
    out: OutName,
    base: Base = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Use at most this much memory; the default is what is free.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Verify a folder that surgery wrote: hashes, values, shapes, loading in a fresh process, generating."""
    from surgery.api import check as run
    from surgery.cli.render import tables
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.check import FILES, FRESH

    if memory is not None and not 0 < memory < 2**40:  # false for NaN and infinity, too
        raise SurgeryError("memory is a number of GiB above 0", where=f"--memory {memory}", fix="--memory 8")
    with interrupt.advised(interrupt.nothing_kept), progress_bar(quiet or as_json) as progress:
        progress.expect([FILES, FRESH])
        report = run(out, base, memory=None if memory is None else int(memory * 2**30), progress=progress)
    if as_json:
        emit(report.data["check"])
    else:
        tables.checks(report.data["check"]["items"])
        tables.check_verdict(report.data, str(out))
    report.raise_faults(CheckError)


def bench(
    context: typer.Context,
    out: OutName,
    base: Base = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Time prompts of these many tokens (2k is 2000). The default is 512,2k.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repeat this many times; the models take turns.")] = 3,
    decode: Annotated[int, typer.Option(min=1, help="Time this many tokens after each prompt.")] = 16,
    device: Device = AUTO,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the ratios against length into this file.")
    ] = None,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic",
            help="Use random weights of the same shape, so that prompts of any length can be timed.",
            rich_help_panel=SYNTHETIC,
        ),
    ] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Use this many of the layers.", rich_help_panel=SYNTHETIC)
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Let this share of the KV heads stream (from 0 to 1).", rich_help_panel=SYNTHETIC
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Find the prompt length from which sparse prefill pays on this machine (dense_below). "
            "--lengths are then the candidates.",
            rich_help_panel=CALIBRATE,
        ),
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write the length that was found to OUT.", rich_help_panel=CALIBRATE)
    ] = False,
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Measure on this text: builtin, or a UTF-8 text file.", rich_help_panel=CALIBRATE
        ),
    ] = "builtin",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time prompt and decoding of a converted model and of its base, in turn; count cache bytes and peak memory."""
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
        if as_json:  # the search took minutes: its result is printed
            emit(search.to_dict() | {"written": False})
        raise
    if as_json:
        return emit(search.to_dict() | {"written": write})
    tables.dense_below_outcome(search, out, report)


def _refuse_unread_options(context: typer.Context, base: str | None, calibrate: bool) -> None:
    """Raise where an option was given that this kind of run does not read."""
    if base is None and not calibrate:
        raise SurgeryError("bench compares with a base", fix="add --base MODEL, the model that it was made from")
    others = ("decode", "synthetic", "layers", "ratio", "plot") if calibrate else ("write", "text")
    for name in others:
        if context.get_parameter_source(name).name == "COMMANDLINE":
            what = f"--{name} is {'not' if calibrate else 'only'} for --calibrate"
            raise SurgeryError(what, fix="leave it out" if calibrate else "add --calibrate, or leave it out")


def score(
    context: typer.Context,
    model: ModelName,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Other settings of the method, such as preset=paper for gates."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the scores to this file.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help=f"Score the heads by this method: {', '.join(METHODS)}.",
            autocompletion=completion.score_methods,
        ),
    ] = "far-mass",
    sinks: Annotated[int, typer.Option(min=0, help="Number of sink tokens that the streaming heads will keep.")] = 16,
    window: Annotated[int, typer.Option(min=1, help="Window of the streaming heads, in tokens.")] = 240,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Measure on this many sequences; the default is the method's own.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each sequence; the default is the method's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the calibration sequences.")] = 0,
    text: Annotated[
        str, typer.Option(metavar="FILE", help="Measure on this text: builtin, or a UTF-8 text file.")
    ] = "builtin",
    per: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Score kv-heads, or heads (query heads; not with every method).",
            autocompletion=completion.head_kinds,
        ),
    ] = "kv-heads",
    threshold: Annotated[
        float | None,
        typer.Option(metavar="X", help="Count and list the heads above this score; with retrieval 0.1, if not given."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the scores into this file (and the loss, with gates)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.json if it exists.")] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train the gates for this many steps.", rich_help_panel=GATES)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run.", rich_help_panel=GATES)
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank heads by how much they need the far past.

    `surgery apply duo-attention MODEL scores=FILE.json -o OUT` reads the file of KV heads, and
    `surgery eval MODEL --probe needles without=FILE.json` that of query heads. `--method gates preset=paper` trains
    the gates with the values of DuoAttention's paper.
    """
    from surgery.cli.render import heads
    from surgery.cli.render.console import progress_bar
    from surgery.operations.head_scorers.scorers import method_named, read_settings, score_to_file
    from surgery.report import plots

    if output is None:
        raise SurgeryError("no score file was named", fix="add -o scores.json")
    if threshold is not None and not isfinite(threshold):
        raise SurgeryError("a threshold is a number", where=f"--threshold {threshold}", fix="--threshold 0.1")
    if threshold is None:
        threshold = method_named(method).threshold
    typed = read_settings(method, settings or [])
    options = {"sinks": sinks, "window": window, "samples": samples, "length": length, "seed": seed}
    options |= {"text": text, "steps": steps, "per": per.replace("-", "_")}
    _refuse_given_twice(context, typed)
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
            **options | typed,
        )
    head_map = heads.HeadMap.of_scores(scores)
    files = heads.draw(head_map, plot) if plot else []
    above = {} if threshold is None else scores.above(threshold)
    if as_json:
        return emit(scores.to_dict() | ({"heads_above": above} if above else {}))
    heads.show(head_map)
    if above:
        heads.show_above(above, head_map.kind)
    heads.written([output, *files])


def _refuse_given_twice(context: typer.Context, typed: dict) -> None:
    """Raise where a setting of a scorer was typed both as KEY=VALUE and as an option."""
    for key in typed:
        source = context.get_parameter_source(key)
        if source is not None and source.name == "COMMANDLINE":
            raise SurgeryError(f"{key}= and --{key} are two ways to say the same", fix="give one of them")
