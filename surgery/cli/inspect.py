"""Verbs that only read: recipes, operations, a model, this machine. Nothing is written but a copied recipe."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.cli import completion
from surgery.cli.options import Json, ModelName, Quiet, RecipeName, emit
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.config.catalogue import Entry
    from surgery.operations.base import Operation


HEADS, SINKS = "Map of KV heads (with --heads)", "Attention sinks (with --sinks)"


def ls(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A recipe, an operation or a .yaml file: show it in full, with its settings and an example.",
            autocompletion=completion.recipes_and_operations,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all settings of all operations.")] = False,
    as_json: Json = False,
) -> None:
    """List the recipes by what one wants them for; with a name, show one in full."""
    from surgery import operations
    from surgery.cli.render import catalogue as render
    from surgery.config import catalogue

    if name is not None:
        return _ls_one(name, as_json)
    classes, broken = operations.catalogue()
    entries = catalogue.entries()
    if as_json:
        return emit(_catalogue_as_data(entries, classes, broken))
    if everything:
        return render.parameters(entries, classes, broken)
    used = {op for entry in entries for op in entry.ops}
    render.recipes(entries, (op for op in classes if op not in used), broken)


def _ls_one(name: str, as_json: bool) -> None:
    """Show a recipe, or else an operation, in full."""
    from surgery import operations
    from surgery.cli.render import catalogue as render
    from surgery.config import catalogue, recipe

    path = Path(name)
    if name in recipe.shipped() or path.suffix in recipe.SUFFIXES or len(path.parts) > 1:
        loaded = recipe.load(name)
        entry = catalogue.Entry.of(loaded, name)
        if as_json:
            facts = {"name": name, "tier": entry.tier, "training": entry.training, "purpose": entry.purpose}
            return emit(facts | {"recipe": loaded.to_dict(), "operations": _fields_of(entry.ops)})
        return render.recipe(loaded, entry)
    if not catalogue.find_operation(name):
        raise catalogue.unknown(name)
    cls = operations.find(name)
    if as_json:
        return emit({"name": name, "summary": cls.summary, "operations": _fields_of((name,))})
    render.operation(cls)


def _fields_of(ops: Iterable[str]) -> dict[str, dict]:
    """Operation -> field -> JSON Schema."""
    from surgery import operations
    from surgery.operations.variants import inline_schema

    return {op: inline_schema(operations.find(op))["properties"] for op in ops}


def _catalogue_as_data(entries: list[Entry], classes: dict[str, type[Operation]], broken: dict[str, str]) -> dict:
    """The object that `surgery ls --json` prints."""
    from surgery.config.heal import Heal
    from surgery.operations.variants import Variants, describe_method, inline_schema

    fields = {op: inline_schema(cls)["properties"] for op, cls in classes.items()}
    unions = {op: cls.METHODS for op, cls in classes.items() if issubclass(cls, Variants)} | {"heal": Heal.METHODS}
    methods = {op: {name: describe_method(method) for name, method in known.items()} for op, known in unions.items()}
    return {
        "recipes": {entry.name: entry.description for entry in entries},
        "uses": {entry.name: list(entry.ops) for entry in entries},
        "about": {
            entry.name: {"purpose": entry.purpose, "tier": entry.tier, "training": entry.training} for entry in entries
        },
        "operations": fields,
        "methods": methods,
        "broken": broken,
    }


def cp(
    recipe: RecipeName,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Write to this file (default: here, by its own name); - prints it."),
    ] = None,
) -> None:
    """Copy a recipe here, to edit it."""
    from surgery.config.recipe import copy, text_of

    if str(target) == "-":
        return typer.echo(text_of(recipe), nl=False)
    typer.echo(f"wrote {copy(recipe, target)}")


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from surgery.config.recipe import schema as recipe_schema

    emit(recipe_schema())


def inspect(
    model: ModelName,
    heads: Annotated[
        bool,
        typer.Option(
            "--heads", help="Show the map of KV heads: which stream, and what they scored.", rich_help_panel=HEADS
        ),
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show the scores of this file.", rich_help_panel=HEADS)
    ] = None,
    sinks: Annotated[
        bool,
        typer.Option(
            "--sinks", help="Load the model and measure its attention sinks on a text.", rich_help_panel=SINKS
        ),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Measure on this text: builtin (the default), or a UTF-8 text file.",
            rich_help_panel=SINKS,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Measure on this many pieces of the text (default 8).", rich_help_panel=SINKS),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each piece (default 512).", rich_help_panel=SINKS)
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Threshold of the sink rate (default 0.3).", rich_help_panel=SINKS),
    ] = None,
    rated: Annotated[
        int | None,
        typer.Option(min=1, help="First tokens that the sink rate reads (default 64).", rich_help_panel=SINKS),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="With --heads or --sinks, draw the map into this file.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's attention, and what each recipe would do to it."""
    text_settings = {"text": text, "samples": samples, "length": length, "epsilon": epsilon, "rated": rated}
    text_settings = {name: value for name, value in text_settings.items() if value is not None}
    if heads and sinks:
        raise SurgeryError("use either --heads or --sinks, not both", fix="run the command once for each")
    if text_settings and not sinks:
        named = ", ".join(f"--{name}" for name in text_settings)
        raise SurgeryError(f"{named} {'needs' if len(text_settings) == 1 else 'need'} --sinks", fix="add --sinks")
    if scores and not heads:
        raise SurgeryError("--scores needs --heads", fix="add --heads")
    if plot and not (heads or sinks):
        raise SurgeryError("--plot needs --heads or --sinks, whose map it draws", fix="add one of them")
    if heads:
        return _inspect_heads(model, scores, plot, as_json)
    if sinks:
        return _inspect_sinks(model, text_settings, plot, as_json, quiet)
    _inspect_model(model, as_json)


def _inspect_model(model: str, as_json: bool) -> None:
    """Show a model's attention, and what each recipe would do to it."""
    from surgery.architecture.anatomy import Anatomy
    from surgery.conversion.fit import fits
    from surgery.io.hub import resolve
    from surgery.io.safetensors import header_table

    source = resolve(model, weights=False)
    anatomy = Anatomy.of(source.path, header_table(source.headers))
    fitting, made_by = fits(anatomy), _made_by(source.path)
    if as_json:
        hidden = getattr(anatomy.config.get_text_config(), "hidden_size", None)
        known = {"name": source.name, "context": anatomy.positions, "hidden_size": hidden, "made_by": made_by or None}
        terms = {term: sorted(layers) for term, layers in anatomy.terms.items()}
        problems = {fit.entry.name: list(fit.problems) for fit in fitting}
        effects = {fit.entry.name: fit.to_dict() for fit in fitting}
        return emit(known | anatomy.to_dict() | {"terms": terms, "recipes": problems, "effects": effects})
    from surgery.cli.render import anatomy as render
    from surgery.operations.absorb import Absorb

    render.model(source.name, anatomy)
    if anatomy.surgical or (made_by and all(fit.problems for fit in fitting)):
        absorbs = not anatomy.surgical and not Absorb().problems(anatomy)
        render.followers(fitting, made_by, model, absorbs)
    else:
        render.effects(fitting, model)


def _made_by(folder: Path) -> str:
    """The recipe that made a folder; "" where surgery did not make it or its record cannot be read."""
    from surgery.report.report import Report

    try:
        return str(Report.of(folder).data["recipe"].get("name") or "")
    except SurgeryError:
        return ""


def _inspect_heads(model: str, scores: Path | None, plot: Path | None, as_json: bool) -> None:
    from surgery.cli.render import heads
    from surgery.report import plots

    if plot:
        plots.ready(plot)
    head_map = heads.HeadMap.of_model(model, scores)
    files = heads.draw(head_map, plot) if plot else []
    if as_json:
        return emit(head_map.to_dict())
    heads.show(head_map)
    heads.written(files)


def _inspect_sinks(model: str, text_settings: dict, plot: Path | None, as_json: bool, quiet: bool) -> None:
    from surgery.cli.render import heads
    from surgery.cli.render import sinks as render
    from surgery.cli.render.console import progress_bar
    from surgery.report import plots

    if plot:
        plots.ready(plot)
    from surgery.calibration.sinks import SinkRules, survey_sinks

    rules = SinkRules(**{name: text_settings.pop(name) for name in ("epsilon", "rated") if name in text_settings})
    with progress_bar(quiet or as_json) as progress:
        sink_map, info = survey_sinks(model, rules=rules, progress=progress, **text_settings)
    files = [render.draw(sink_map, plot, info)] if plot else []
    if as_json:
        return emit(info | sink_map.to_dict())
    render.show(sink_map, info)
    heads.written(files)


def doctor(as_json: Json = False) -> None:
    """Report what works on this machine: versions, devices, disk, both ways to load, kernels."""
    from surgery.cli.doctor import examine
    from surgery.cli.render import tables
    from surgery.cli.render.console import console

    errors = console(stderr=True)
    waiting = errors.is_terminal and not as_json
    with errors.status("loading two tiny checkpoints in a fresh process") if waiting else nullcontext():
        report = examine()
    if as_json:
        return emit(report)
    tables.doctor(report)
