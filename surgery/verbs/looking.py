"""Verbs that look: recipes, operations, a model, this machine. Nothing is written but a copied recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SurgeryError
from .options import Json, ModelName, RecipeName, emit


def ls(as_json: Json = False) -> None:
    """List recipes and operations with their parameters."""
    from .. import operations, recipe

    classes, broken = operations.catalogue()
    recipes = recipe.descriptions()
    if as_json:
        fields = {op: cls.model_json_schema()["properties"] for op, cls in classes.items()}
        uses = {name: facts["ops"] for name, facts in recipes.items()}
        recipes = {name: facts["description"] for name, facts in recipes.items()}
        return emit({"recipes": recipes, "uses": uses, "operations": fields, "broken": broken})
    from ..display.catalogue import print_catalogue

    print_catalogue(recipes, classes, broken)


def cp(
    recipe: RecipeName,
    target: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to; default here.")] = None,
) -> None:
    """Copy a recipe here, to edit it."""
    from ..recipe import copy

    typer.echo(f"wrote {copy(recipe, target)}")


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from ..recipe import schema as recipe_schema

    emit(recipe_schema())


def inspect(
    model: ModelName,
    heads: Annotated[
        bool, typer.Option("--heads", help="The map of KV heads: which stream, what they scored.")
    ] = False,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="With --heads: a score file's map.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="With --heads: draw it.")] = None,
    as_json: Json = False,
) -> None:
    """Show a model's attention, and which recipes fit it."""
    from ..api import anatomy_of, fitting_recipes

    if heads:
        return _inspect_heads(model, scores, plot, as_json)
    if scores or plot:
        raise SurgeryError("--scores and --plot are of the map of KV heads", fix="add --heads")
    facts = anatomy_of(model)
    fits = fitting_recipes(facts)
    if as_json:
        return emit(facts.to_dict() | {"recipes": fits})
    from ..display import model as show

    show.anatomy(facts)
    show.applicable(fits)


def _inspect_heads(model: str, scores: Path | None, plot: Path | None, as_json: bool) -> None:
    from .. import pictures
    from ..display import heads

    if plot:
        pictures.ready(plot)
    shown = heads.HeadMap.of_model(model, scores)
    drawn = heads.draw(shown, plot) if plot else []
    if as_json:
        return emit(shown.to_dict())
    heads.show(shown)
    heads.written(drawn)


def doctor(as_json: Json = False) -> None:
    """Say what works here: versions, devices, disk, doors, kernels."""
    from ..display import results
    from ..doctor import examine

    facts = examine()
    if as_json:
        return emit(facts)
    results.doctor(facts)
