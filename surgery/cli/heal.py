"""The verb that trains: heal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Base, Json, NoCheck, NoEval, NoGate, OutName, Quiet, emit
from surgery.errors import SurgeryError


def heal(
    out: OutName,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as in a recipe's heal: block.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="HEALED", help="The folder to make.")
    ] = None,
    base: Base = None,
    no_check: NoCheck = False,
    no_eval: NoEval = False,
    no_gate: NoGate = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace HEALED (when the new one is complete).")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted model to win back what the surgery took: tokens=1e6 method=lora loss=distill data=self."""
    from surgery.cli.render import model as show
    from surgery.cli.render import progress_bar
    from surgery.cli.render import summary as closing
    from surgery.cli.render import tables as results
    from surgery.healing.heal import heal as run

    if output is None:
        raise SurgeryError("no output folder was named", fix="add -o HEALED")
    with progress_bar(quiet or as_json) as progress:
        report = run(
            out,
            base,
            output=output,
            overrides=overrides or [],
            check=not no_check,
            evaluate=not no_eval,
            gate=not no_gate,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            on_plan=None if as_json or quiet else show.healing,
        )
    if report is None:  # one of several processes, and not the one that speaks
        return
    if as_json:
        emit(report.to_dict())
    else:
        if report.data["check"] and not quiet:
            results.checks(report.data["check"]["items"])
        closing.summary(report, base or str(report.data["base"]["name"]))
    report.raise_faults()
