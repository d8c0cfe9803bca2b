"""Verbs that carry a recipe out: plan, apply, push.

The verb that trains: heal.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.cli import interrupt
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
    from surgery.conversion.plan import Plan
    from surgery.healing.plan import HealPlan
    from surgery.report.report import Report


def plan(recipe: RecipeName, model: ModelName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a recipe would change; touches no weight."""
    from surgery.api import plan as make_plan

    made = make_plan(recipe, model, overrides=overrides or [])
    if as_json:
        return emit(made.to_dict())
    from surgery.cli.render import console
    from surgery.cli.render import model as render

    render.plan(made)
    if made.before.tensors:
        again = shlex.join(["surgery", "apply", recipe, model, *(overrides or [])])
        console.labelled("next", f"{again} -o OUT", copied=True)


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
    began = time.monotonic()

    def show_plan(plan: Plan) -> None:
        if not (as_json or quiet):
            render.plan(plan)
            progress.expect(plan.estimate.names(not no_check, not no_eval) if plan.before.tensors else ())

    with interrupt.advised(interrupt.of_output(output)), progress_bar(quiet or as_json) as progress:
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
            on_plan=show_plan,
        )
    if report is not None:  # else one of several processes, and not the one that speaks
        _show(report, ("apply", recipe, model, tuple(overrides or ())), began, as_json, quiet)


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
    began = time.monotonic()

    def show_plan(plan: HealPlan) -> None:
        if not (as_json or quiet):
            render.healing(plan)
            progress.expect(_stages_of_healing(plan, out, not no_check, not no_eval))

    with interrupt.advised(interrupt.of_output(output)), progress_bar(quiet or as_json) as progress:
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
            on_plan=show_plan,
        )
    if report is not None:  # else one of several processes, and not the one that speaks
        named = base or str(report.data["base"]["name"])
        _show(report, ("heal", str(out), named, tuple(overrides or ())), began, as_json, quiet)


def _stages_of_healing(plan: HealPlan, out: Path, check: bool, evaluate: bool) -> list[str]:
    """The stages of `heal`, in order."""
    from surgery.evaluation.check import FILES, FRESH
    from surgery.evaluation.probes.settings import requested_probes
    from surgery.report.report import Report

    stages = [*(each.stage for each in plan.measurements()), "writing", *([FILES, FRESH] if check else [])]
    settings = Report.of(out).data["recipe"].get("evaluate") if evaluate else None
    probes = sorted(requested_probes(settings), key=lambda probe: not probe.main) if settings else []
    return stages + [stage for probe in probes for stage in probe.stages()]


def _show(report: Report, typed: tuple[str, str, str, tuple[str, ...]], began: float, as_json: bool, quiet: bool):
    """What was done, to people or as JSON; raises what the report holds against the result.

    Args:
        typed: fields of the `verdict.Command`.
        began: when, by the monotonic clock.
    """
    from surgery.cli.render import summary, tables
    from surgery.cli.render.verdict import Command

    if as_json:
        emit(report.to_dict())
    else:
        if report.data["check"] and not quiet:
            tables.checks(report.data["check"]["items"])
        summary.summary(report, Command(*typed), time.monotonic() - began)
    report.raise_faults()
