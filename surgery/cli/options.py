"""Arguments and options that several verbs share, and the function with which all of them print JSON."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from surgery.cli import completion

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="The name of a recipe (`surgery ls` lists them), or a .yaml file.",
        autocompletion=completion.recipes,
    ),
]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, smollm2-135m, or a Hub id (OWNER/NAME or OWNER/NAME@REVISION).",
        autocompletion=completion.models,
    ),
]
OutName = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="A folder that surgery wrote.", autocompletion=completion.outputs),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings of the recipe to change (`surgery ls RECIPE` lists them).",
        autocompletion=completion.recipe_settings,
    ),
]
HealSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings of the training, as in a recipe's heal: block (`surgery ls gqa-distill`).",
        autocompletion=completion.heal_settings,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not check the result.")]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Do not score the result against the base.")]
NoGate = Annotated[bool, typer.Option("--no-gate", help="Score the result, and exit with 0 even if the gate fails.")]


def _base(words: str) -> Any:
    return typer.Option("--base", metavar="MODEL", help=words, autocompletion=completion.models)


Base = Annotated[str | None, _base("Compare with this model, the base it was made from.")]
Teacher = Annotated[
    str | None, _base("Train towards this model, the base it was made from; default: the recorded one.")
]


Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="Run models there: cpu, cuda, cuda:1, mps, or auto (a GPU where the model fits).",
        autocompletion=completion.devices,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="Run models in this dtype: float32, bfloat16, float16, float64, or auto (that of the weights).",
        autocompletion=completion.dtypes,
    ),
]
PLACEMENT = {"device": Device, "dtype": Dtype}


def placed(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the options --device and --dtype, which hold for all models that it loads."""
    from surgery.machine.placement import AUTO, placed_on

    @functools.wraps(verb)
    def run(*args: Any, device: str, dtype: str, **kwargs: Any) -> None:
        with placed_on(device, dtype):
            verb(*args, **kwargs)

    own, hints = list(inspect.signature(verb).parameters.values()), get_type_hints(verb, include_extras=True)
    typed = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=AUTO, annotation=kind)
        for name, kind in PLACEMENT.items()
    ]
    first = next(index for index, parameter in enumerate(typed) if parameter.name == "as_json")
    typed = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in typed]
    parameters = [*typed[:first], *more, *typed[first:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def emit(data: dict) -> None:
    """Print one JSON object on stdout, with non-ASCII letters escaped where stdout is not in Unicode."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    try:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=not unicode))
    except BrokenPipeError:
        from surgery.cli.render.console import reader_left

        reader_left()
