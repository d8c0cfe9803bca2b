"""Verbs that measure what was made: check, eval, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import CheckError
from .options import Base, Json, ModelName, OutName, Quiet, emit


def check(
    out: OutName,
    base: Base = None,
    memory: Annotated[float | None, typer.Option(help="GiB that may be used; default what is free.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a saved checkpoint: hashes, values, shapes, loading in a fresh process, generating."""
    from ..api import check as run
    from ..display import progress_bar, results

    with progress_bar(quiet or as_json) as progress:
        report = run(out, base, memory=None if memory is None else int(memory * 2**30), progress=progress)
    if as_json:
        emit(report.data["check"])
    else:
        results.checks(report.data["check"]["items"])
    report.raise_faults(CheckError)


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
    from ..api import evaluate as run
    from ..display import progress_bar, results

    with progress_bar(quiet or as_json) as progress:
        result = run(out, base, text=text, windows=windows, length=length, progress=progress).to_dict()
    if as_json:
        return emit(result)
    results.evaluation(result)


def bench(
    out: OutName,
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model it was made from.")],
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512,2048",
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; the models take turns.")] = 3,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time prefill and decoding of a head split beside its base, interleaved, and count cache bytes."""
    from ..display import progress_bar, results
    from ..evaluation import speed

    with progress_bar(quiet or as_json) as progress:
        result = speed.bench(out, base, lengths=speed.parse_lengths(lengths), rounds=rounds, progress=progress)
    if as_json:
        return emit(result.to_dict())
    results.benchmark(result)
