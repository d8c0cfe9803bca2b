"""Verbs that look: recipes, operations, a model, this machine. Nothing is written but a copied recipe."""

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
    from surgery.operations.variants import Variants, inline_schema, method_facts

    classes, broken = operations.catalogue()
    recipes = recipe.descriptions()
    if as_json:
        fields = {op: inline_schema(cls)["properties"] for op, cls in classes.items()}
        unions = {op: cls.METHODS for op, cls in classes.items() if issubclass(cls, Variants)} | {"heal": Heal.METHODS}
        methods = {op: {name: method_facts(each) for name, each in found.items()} for op, found in unions.items()}
        uses = {name: facts["ops"] for name, facts in recipes.items()}
        recipes = {name: facts["description"] for name, facts in recipes.items()}
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

    of_text = {"text": text, "samples": samples, "length": length}
    of_text = {name: value for name, value in of_text.items() if value is not None}
    if heads and sinks:
        raise SurgeryError("--heads and --sinks are two maps", fix="ask for one at a time")
    if of_text and not sinks:
        raise SurgeryError("--text, --samples and --length are of the attention sinks", fix="add --sinks")
    if scores and not heads:
        raise SurgeryError("--scores is of the map of KV heads", fix="add --heads")
    if plot and not (heads or sinks):
        raise SurgeryError("--plot draws the map of KV heads or of attention sinks", fix="add --heads or --sinks")
    if heads:
        return _inspect_heads(model, scores, plot, as_json)
    if sinks:
        return _inspect_sinks(model, of_text, plot, as_json, quiet)
    facts = anatomy_of(model)
    fits = fitting_recipes(facts)
    if as_json:
        held = {term: sorted(layers) for term, layers in facts.terms.items()}
        return emit(facts.to_dict() | {"terms": held, "recipes": fits})
    from surgery.cli.render import model as show

    show.anatomy(facts)
    show.applicable(fits)


def _inspect_heads(model: str, scores: Path | None, plot: Path | None, as_json: bool) -> None:
    from surgery.cli.render import heads
    from surgery.report import plots as pictures

    if plot:
        pictures.ready(plot)
    shown = heads.HeadMap.of_model(model, scores)
    drawn = heads.draw(shown, plot) if plot else []
    if as_json:
        return emit(shown.to_dict())
    heads.show(shown)
    heads.written(drawn)


def _inspect_sinks(model: str, of_text: dict, plot: Path | None, as_json: bool, quiet: bool) -> None:
    from surgery.cli.render import heads
    from surgery.cli.render import sinks as show
    from surgery.cli.render.console import progress_bar
    from surgery.report import plots as pictures

    if plot:
        pictures.ready(plot)
    from surgery.calibration.sinks import survey_sinks

    with progress_bar(quiet or as_json) as progress:
        found, facts = survey_sinks(model, progress=progress, **of_text)
    drawn = [show.draw(found, plot, facts["model"])] if plot else []
    if as_json:
        return emit(facts | found.to_dict())
    show.show(found, facts)
    heads.written(drawn)


def doctor(as_json: Json = False) -> None:
    """Say what works here: versions, devices, disk, doors, kernels."""
    from surgery.cli.doctor import examine
    from surgery.cli.render import tables as results

    facts = examine()
    if as_json:
        return emit(facts)
    results.doctor(facts)
