"""Verbs that only read: recipes, operations, a model, this machine. Nothing is written but a copied recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Json, ModelName, Quiet, RecipeName, emit
from surgery.errors import SurgeryError


def ls(as_json: Json = False) -> None:
    """List recipes and operations with their parameters."""
    from surgery import operations
    from surgery.config import recipe
    from surgery.config.heal import Heal
    from surgery.operations.variants import Variants, describe_method, inline_schema

    classes, broken = operations.catalogue()
    recipes = recipe.descriptions()
    if as_json:
        fields = {op: inline_schema(cls)["properties"] for op, cls in classes.items()}
        unions = {op: cls.METHODS for op, cls in classes.items() if issubclass(cls, Variants)} | {"heal": Heal.METHODS}
        methods = {
            op: {name: describe_method(method) for name, method in known.items()} for op, known in unions.items()
        }
        uses = {name: info["ops"] for name, info in recipes.items()}
        recipes = {name: info["description"] for name, info in recipes.items()}
        return emit({"recipes": recipes, "uses": uses, "operations": fields, "methods": methods, "broken": broken})
    from surgery.cli.render.summary import print_catalogue

    print_catalogue(recipes, classes, broken)


def cp(
    recipe: RecipeName,
    target: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to; default here.")] = None,
) -> None:
    """Copy a recipe here, to edit it."""
    from surgery.config.recipe import copy

    typer.echo(f"wrote {copy(recipe, target)}")


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from surgery.config.recipe import schema as recipe_schema

    emit(recipe_schema())


def inspect(
    model: ModelName,
    heads: Annotated[
        bool, typer.Option("--heads", help="The map of KV heads: which stream, what they scored.")
    ] = False,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="With --heads: a score file's map.")] = None,
    sinks: Annotated[
        bool, typer.Option("--sinks", help="The attention sinks: the model is loaded and measured on text.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="With --sinks: builtin (default), or a UTF-8 text file.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="With --sinks: pieces of text; default 8.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="With --sinks: tokens in each; default 512.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="With --heads or --sinks: draw it.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's attention, and which recipes fit it."""
    from surgery.api import anatomy_of, fitting_recipes

    text_settings = {"text": text, "samples": samples, "length": length}
    text_settings = {name: value for name, value in text_settings.items() if value is not None}
    if heads and sinks:
        raise SurgeryError("--heads and --sinks are two maps", fix="ask for one at a time")
    if text_settings and not sinks:
        raise SurgeryError("--text, --samples and --length are of the attention sinks", fix="add --sinks")
    if scores and not heads:
        raise SurgeryError("--scores is of the map of KV heads", fix="add --heads")
    if plot and not (heads or sinks):
        raise SurgeryError("--plot draws the map of KV heads or of attention sinks", fix="add --heads or --sinks")
    if heads:
        return _inspect_heads(model, scores, plot, as_json)
    if sinks:
        return _inspect_sinks(model, text_settings, plot, as_json, quiet)
    model_anatomy = anatomy_of(model)
    fits = fitting_recipes(model_anatomy)
    if as_json:
        term_layers = {term: sorted(layers) for term, layers in model_anatomy.terms.items()}
        return emit(model_anatomy.to_dict() | {"terms": term_layers, "recipes": fits})
    from surgery.cli.render import model as render

    render.anatomy_table(model_anatomy)
    render.applicable(fits)


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
    from surgery.calibration.sinks import survey_sinks

    with progress_bar(quiet or as_json) as progress:
        sink_map, info = survey_sinks(model, progress=progress, **text_settings)
    files = [render.draw(sink_map, plot, info["model"])] if plot else []
    if as_json:
        return emit(info | sink_map.to_dict())
    render.show(sink_map, info)
    heads.written(files)


def doctor(as_json: Json = False) -> None:
    """Say what works here: versions, devices, disk, doors, kernels."""
    from surgery.cli.doctor import examine
    from surgery.cli.render import tables

    report = examine()
    if as_json:
        return emit(report)
    tables.doctor(report)
