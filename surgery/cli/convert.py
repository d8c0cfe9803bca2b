"""Verbs that carry a recipe out: plan, apply, push.

The verb that trains: heal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.cli.options import (
    Base,
    Json,
    ModelName,
    NoCheck,
    NoEval,
    NoGate,
    OutName,
    Overrides,
    Quiet,
    RecipeName,
    emit,
)
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.report.report import Report


def plan(recipe: RecipeName, model: ModelName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a recipe would change; touches no weight."""
    from surgery.api import plan as make_plan

    made = make_plan(recipe, model, overrides=overrides or [])
    if as_json:
        return emit(made.to_dict())
    from surgery.cli.render import model as render

    render.plan(made)


def apply(
    recipe: RecipeName,
    model: ModelName,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="The folder to make.")] = None,
    no_check: NoCheck = False,
    no_eval: NoEval = False,
    no_gate: NoGate = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an unfinished OUT.partial.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT (when the new one is complete).")
    ] = False,
    engine: Annotated[str, typer.Option(help="streaming, loaded or auto.")] = "auto",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights (weights_only).")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model: plan, rewrite, heal if the recipe says so, check, score against the base, write the card."""
    from surgery.api import apply as run
    from surgery.cli.render import model as render
    from surgery.cli.render.console import progress_bar

    if output is None:
        raise SurgeryError("no output folder was named", fix="add -o OUT")
    with progress_bar(quiet or as_json) as progress:
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
            on_plan=None if as_json or quiet else render.plan,
        )
    if report is not None:  # else one of several processes, and not the one that speaks
        _show(report, model, as_json, quiet)


def push(
    out: OutName,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up.")] = False,
    as_json: Json = False,
) -> None:
    """Put a checked checkpoint on the Hub: private by default, one commit, repeat to resume."""
    from surgery.api import push as send
    from surgery.cli.render import tables

    result = send(out, repo, public=public, dry_run=dry_run)
    if as_json:
        return emit(result)
    tables.pushed(result)


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
    from surgery.api import heal as run
    from surgery.cli.render import model as render
    from surgery.cli.render.console import progress_bar

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
            on_plan=None if as_json or quiet else render.healing,
        )
    if report is not None:  # else one of several processes, and not the one that speaks
        _show(report, base or str(report.data["base"]["name"]), as_json, quiet)


def _show(report: Report, base: str, as_json: bool, quiet: bool) -> None:
    """What was done, to people or as JSON; raises what the report holds against the result."""
    from surgery.cli.render import summary, tables

    if as_json:
        emit(report.to_dict())
    else:
        if report.data["check"] and not quiet:
            tables.checks(report.data["check"]["items"])
        summary.summary(report, base)
    report.raise_faults()
