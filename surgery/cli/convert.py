"""Verbs that carry a recipe out (plan, apply), train its result (heal) and upload it (push)."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.cli import completion, interrupt
from surgery.cli.options import (
    Device,
    HealSettings,
    Json,
    ModelName,
    NoCheck,
    NoEval,
    NoGate,
    OutName,
    Overrides,
    Quiet,
    RecipeName,
    Teacher,
    emit,
)
from surgery.errors import SurgeryError
from surgery.machine.placement import AUTO

if TYPE_CHECKING:
    from surgery.conversion.plan import Plan
    from surgery.healing.plan import HealPlan
    from surgery.report.report import Report


def plan(recipe: RecipeName, model: ModelName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a recipe would change in a model. No weight is read and nothing is written."""
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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the result to this folder.")
    ] = None,
    no_check: NoCheck = False,
    no_eval: NoEval = False,
    no_gate: NoGate = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run (OUT.partial).")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT as soon as the new one is complete.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="How weights are read: streaming (layer by layer), loaded (the whole model), or auto.",
            autocompletion=completion.engines,
        ),
    ] = "auto",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights, which are pickles; only tensors are loaded.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model: plan it, rewrite it, train it if the recipe says so, check it, score it, write its card."""
    from surgery.api import apply as run
    from surgery.cli.render import model as render
    from surgery.cli.render.console import progress_bar
    from surgery.conversion.estimate import estimate

    if output is None:
        raise SurgeryError("no output folder was named", fix="add -o OUT")
    began = time.monotonic()

    def show_plan(plan: Plan) -> None:
        if not (as_json or quiet):
            work = estimate(plan, not no_check, not no_eval) if plan.before.tensors else None
            render.plan(plan, work)
            progress.expect(work.names() if work else ())

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
    if report is not None:  # None: one of several processes, and another one reports
        _show(report, ("apply", recipe, model, tuple(overrides or ())), began, as_json, quiet)


def push(
    out: OutName,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public (default: private).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a checked folder to the Hub as one commit, private by default. Run it again to resume."""
    from surgery.api import push as send
    from surgery.cli.render import tables

    result = send(out, repo, public=public, dry_run=dry_run)
    if as_json:
        return emit(result)
    tables.pushed(result)


def heal(
    out: OutName,
    overrides: HealSettings = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="HEALED", help="Write the result to this folder.")
    ] = None,
    base: Teacher = None,
    device: Device = AUTO,
    no_check: NoCheck = False,
    no_eval: NoEval = False,
    no_gate: NoGate = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace HEALED as soon as the new one is complete.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted model towards its base, such as with tokens=1e6 method=lora loss=distill data=self."""
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
            device=device,
            progress=progress,
            on_plan=show_plan,
        )
    if report is not None:  # None: one of several processes, and another one reports
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
    """Print a report as text or JSON, then raise the faults that it records.

    Args:
        typed: the fields of a `Typed`.
        began: when the command began, by the monotonic clock.
    """
    from surgery.cli.render import summary, tables
    from surgery.cli.render.next_command import Typed

    if as_json:
        emit(report.to_dict())
    else:
        if report.data["check"] and not quiet:
            tables.checks(report.data["check"]["items"])
        summary.summary(report, Typed(*typed), time.monotonic() - began)
    report.raise_faults()
