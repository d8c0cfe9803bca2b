"""Verbs that measure what was made: check, eval, bench.

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


def evaluate(
    context: typer.Context,
    out: ModelName,
    base: Base = None,
    text: Annotated[str, typer.Option(help="builtin, or a UTF-8 text file.")] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text that are scored.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    needles: Annotated[bool, typer.Option("--needles", help="Hidden secrets instead: which does it find?")] = False,
    lengths: Annotated[str, typer.Option(help="Needles: prompt lengths in tokens.")] = "512,1024,2048",
    depths: Annotated[int, typer.Option(min=1, help="Needles: places, evenly spaced.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Needles: prompts for each length and place.")] = 4,
    seed: Annotated[int, typer.Option(help="Needles, choices: what is drawn.")] = 0,
    secret: Annotated[str, typer.Option(help="Needles: digits or words.")] = "digits",
    form: Annotated[str, typer.Option(help="Needles: chat, plain, or auto (by the tokenizer).")] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Needles: draw the grid.")] = None,
    choices: Annotated[bool, typer.Option("--choices", help="Multiple choice instead: how many are right?")] = False,
    labelled: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Choices: questions with prompt, choices, answer.")
    ] = None,
    choice_items: Annotated[int, typer.Option(min=1, help="Choices: questions made from the text.")] = 320,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model, alone or against its base: perplexity, KL, top-1 agreement, KV bytes; or needles, or choices."""
    from surgery.api import evaluate as run
    from surgery.cli.render import tables as results
    from surgery.cli.render.console import progress_bar

    _refuse_options(context, needles, choices, labelled is not None)
    if choices:
        asked = {"text": text, "items": choice_items, "seed": seed, "labelled": labelled}
        return _choices(out, base, as_json, quiet, asked)
    if needles:
        drawn = {"depths": depths, "samples": samples, "seed": seed, "secret": secret, "form": form, "text": text}
        return _needles(out, base, lengths, plot, as_json, quiet, drawn)
    with progress_bar(quiet or as_json) as progress:
        result = run(out, base, text=text, windows=windows, length=length, progress=progress).to_dict()
    if as_json:
        return emit(result)
    results.evaluation(result)


def _needles(out: str, base: str | None, lengths: str, plot: Path | None, as_json: bool, quiet: bool, drawn: dict):
    from surgery.api import evaluate_needles
    from surgery.cli.render import tables as needles
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.benchmark.run import parse_lengths
    from surgery.report import plots as pictures

    if plot:
        pictures.ready(plot)
    with progress_bar(quiet or as_json) as progress:
        result = evaluate_needles(out, base, lengths=parse_lengths(lengths), progress=progress, **drawn)
    if plot and result.status == "done":
        needles.picture(result, plot)
    if as_json:
        return emit(result.to_dict())
    needles.table(result)


def _choices(out: str, base: str | None, as_json: bool, quiet: bool, asked: dict) -> None:
    from surgery.api import evaluate_choices
    from surgery.cli.render import tables as choices
    from surgery.cli.render.console import progress_bar

    with progress_bar(quiet or as_json) as progress:
        result = evaluate_choices(out, base, progress=progress, **asked)
    if as_json:
        return emit(result.to_dict())
    choices.lines(result)


def _refuse_options(context: typer.Context, needles: bool, choices: bool, labelled: bool) -> None:
    """An option that would not be looked at is a misunderstanding."""
    if needles and choices:
        raise SurgeryError("--needles and --choices are two measures", fix="one at a time")
    kinds = {"needles": needles, "choices": choices}
    users = dict.fromkeys(("windows", "length"), ()) | {"seed": ("needles", "choices")}
    users |= dict.fromkeys(("lengths", "depths", "samples", "secret", "form", "plot"), ("needles",))
    users |= dict.fromkeys(("labelled", "choice_items"), ("choices",))
    asked = next((kind for kind, on in kinds.items() if on), "")
    for name, used in users.items():
        if context.get_parameter_source(name).name == "COMMANDLINE" and asked not in (used or ("",)):
            fix = f"leave it out, or leave out --{asked}" if not used else f"add --{used[0]}, or leave it out"
            which = f"for {' and '.join(used)} alone" if used else f"not for {asked}"
            raise SurgeryError(f"--{name.replace('_', '-')} is {which}", fix=fix)
    for name in ("text", "choice_items", "seed") if labelled else ():
        if context.get_parameter_source(name).name == "COMMANDLINE":
            raise SurgeryError(f"--{name.replace('_', '-')} is not for questions of a file", fix="leave it out")


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
    from surgery.report import plots as pictures

    _refuse_of_bench(context, base, calibrate)
    asked = None if lengths is None else speed.parse_lengths(lengths)
    if calibrate:
        return _calibrate(out, asked, rounds, text, device, write, as_json, quiet)
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


def _calibrate(out: Path, candidates, rounds: int, text: str, device: str, write: bool, as_json: bool, quiet: bool):
    from surgery.cli.render import tables as calibration
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.benchmark import dense_below as calibrate

    with progress_bar(quiet or as_json) as progress:
        asked = {"candidates": candidates, "rounds": rounds, "text": text, "device": device}
        found = calibrate.calibrate(out, **asked, progress=progress)
    if not as_json:
        calibration.table(found)
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
