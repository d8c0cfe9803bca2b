"""The verbs that put models side by side: try, reproduce, compare, sweep and fit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.cli import completion, interrupt
from surgery.cli.options import Base, Json, ModelName, Quiet, RecipeName, emit

if TYPE_CHECKING:
    from surgery.evaluation.comparison.result import Comparison

Folder = Annotated[
    Path, typer.Option("--out", "-o", metavar="FOLDER", help="Keep figures and picture here; a run goes on from it.")
]
Text = Annotated[str, typer.Option(metavar="FILE", help="The text to measure on: builtin, or a UTF-8 text file.")]
Only = Annotated[
    str, typer.Option(metavar="NAME,...", help="Measure only this: loss-512, loss-2048, choices, needles, ...")
]
Html = Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write the table and picture as a page.")]
Without = Annotated[str, typer.Option(metavar="NAME,...", help="Leave this out, such as speed.")]


def attempt(
    model: ModelName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What the model is asked.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Let this model answer first.", autocompletion=completion.models),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Write this many tokens at most.")] = 200,
    plain: Annotated[bool, typer.Option("--plain", help="Go on with the text; no chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Let a model answer a prompt, with its most probable tokens, and say its speed and the bytes of its KV cache."""
    from surgery.cli.render import tables
    from surgery.evaluation.conversation import reply
    from surgery.io.hub import resolve
    from surgery.report.lineage import doubt_of_base

    sources = {name: resolve(name).path for name in (base, model) if name is not None}
    if base is not None and (doubt := doubt_of_base(sources[model], sources[base])):
        typer.echo(f"note: {model} may not be made from {base}: {doubt}", err=True)
    answers = []
    for name, path in sources.items():
        if not as_json and base is not None:
            typer.echo(f"{name}:")
        say = (lambda text: None) if as_json else (lambda text: typer.echo(text, nl=False))
        found = reply(path, prompt, plain=plain, most=tokens, say=say)
        answers.append({"model": name} | vars(found))
        if not as_json:
            tables.reply(found)
    if as_json:
        emit({"prompt": prompt, "answers": answers})


def reproduce(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="A folder that surgery wrote, or a Hub id.", autocompletion=completion.outputs
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base; default: the recorded one.", autocompletion=completion.models),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the recipe of an output again on its base, and compare: hashes, else tensors and the loss."""
    from surgery.api import reproduce as run
    from surgery.cli.render.console import progress_bar
    from surgery.errors import CheckError

    with interrupt.advised(interrupt.nothing_kept), progress_bar(quiet or as_json) as progress:
        found = run(out, base, progress=progress)
    emit(found.to_dict()) if as_json else typer.echo(str(found))
    if not found.reproduced:
        error = CheckError(found.headline(), where=out, fix="see surgery.json: recipe, base and versions")
        error.reported = as_json
        raise error


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Two folders or more of one base.", autocompletion=completion.outputs),
    ],
    base: Base = None,
    out: Folder = Path("comparison"),
    text: Text = "builtin",
    only: Only = "",
    without: Without = "",
    html: Html = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure several models beside their base: loss, KL, choices, needles, chat, KV cache, speed. One table."""
    from surgery.cli.render.console import progress_bar
    from surgery.evaluation.comparison import measures
    from surgery.evaluation.comparison.run import compare as run
    from surgery.evaluation.comparison.run import stages

    _refuse_unwritable(html, out)
    chosen = {"only": _names(only), "leave_out": _names(without)}
    asked = measures.chosen(**chosen)
    with interrupt.advised(interrupt.figures_kept), progress_bar(quiet or as_json) as progress:
        progress.expect(stages(models, asked))
        found = run(models, base, folder=out, text=text, **chosen, progress=progress)
    _show(found, out, html, as_json, "The same command with one more model measures that one alone.")


def sweep(
    recipe: RecipeName,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The model to convert.", autocompletion=completion.models),
    ],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE...",
            help="Settings of the recipe; with several values, each is tried.",
            autocompletion=completion.recipe_settings,
        ),
    ],
    out: Folder = Path("sweep"),
    text: Text = "builtin",
    only: Only = "",
    without: Without = "",
    html: Html = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model with each value of a setting, measure it as `compare` does, and keep no weights."""
    from surgery.cli.render.console import progress_bar
    from surgery.search.sweep import sweep as run

    _refuse_unwritable(html, out)
    chosen = {"only": _names(only), "leave_out": _names(without)}
    with interrupt.advised(interrupt.figures_kept), progress_bar(quiet or as_json) as progress:
        found = run(recipe, model, settings, folder=out, text=text, **chosen, progress=progress)
    _show(found, out, html, as_json, "The same command with more values measures those alone.")


def fit(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The model to convert.", autocompletion=completion.models),
    ],
    kv: Annotated[
        float | None, typer.Option("--kv", metavar="SHARE", help="Leave this share of the base's KV cache.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the best result here.")
    ] = None,
    context: Annotated[int, typer.Option(metavar="N", help="Count the cache of a text of N tokens.")] = 8192,
    native_only: Annotated[bool, typer.Option("--native-only", help="Only what stock Transformers loads.")] = False,
    engine: Annotated[
        str, typer.Option("--for", metavar="ENGINE", help="Only what this engine can run: llama.cpp or vllm.")
    ] = "",
    goal: Annotated[
        str, typer.Option(metavar="GOAL", help="quality; or decode or prefill: the fastest that passes its gate.")
    ] = "quality",
    thorough: Annotated[bool, typer.Option("--thorough", help="Try every option as its recipe says.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, metavar="N", help="Begin no further trial after N minutes.")
    ] = None,
    text: Text = "builtin",
    keep: Annotated[
        Path, typer.Option("--keep", metavar="FOLDER", help="Keep figures and picture here; a run goes on from it.")
    ] = Path("fit"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try every recipe that leaves this share of the KV cache, and apply the one that loses least."""
    from surgery.cli.render import tables
    from surgery.cli.render.console import progress_bar
    from surgery.errors import SurgeryError
    from surgery.search.fit import PICTURE
    from surgery.search.fit import fit as run

    asked = {"context": context, "native_only": native_only, "engine": engine, "minutes": minutes, "text": text}
    asked |= {"thorough": thorough, "goal": goal}
    with interrupt.advised(interrupt.figures_kept), progress_bar(quiet or as_json) as progress:
        told = None if quiet or as_json else lambda name, trial: typer.echo(f"{name}: {trial}", err=True)
        found = run(model, kv, output=out, folder=keep, overwrite=overwrite, progress=progress, on_trial=told, **asked)
    with suppress(SurgeryError):  # without matplotlib the table is all
        found.plot(keep / PICTURE)
    if as_json:
        emit(found.to_dict())
    else:
        tables.fitted(found)
        if found.report is not None:
            typer.echo(f"\n{found.report}")
        else:
            typer.echo(f"next: the same command with -o OUT (what was measured is kept in {keep})")
    if found.report is not None:
        found.report.raise_faults()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _refuse_unwritable(html: Path | None, out: Path) -> None:
    """Raise for a page that cannot be written; `out` is the folder that the command makes."""
    from surgery.io.files import refuse_unwritable
    from surgery.report.page import SUFFIXES

    if html is not None:
        refuse_unwritable(html, "the page", SUFFIXES, out)


def _show(found: Comparison, out: Path, html: Path | None, as_json: bool, more: str) -> None:
    """Print the table, draw the picture next to the figures, and write the page; `more`: how the table grows."""
    from surgery.cli.render import tables
    from surgery.errors import SurgeryError
    from surgery.evaluation.comparison.run import FILE, PICTURE

    picture = out / PICTURE
    try:
        drawn = found.plot(picture) is not None
    except SurgeryError:  # without matplotlib the table is all
        drawn = False
    if html is not None:
        from surgery.io.files import write_text
        from surgery.report.page import compared_page

        content = picture.read_bytes() if drawn else None
        write_text(html, compared_page(f"Models beside {found.base}", found.tables, found.all_notes, content))
    if as_json:
        return emit(found.to_dict())
    tables.comparison(found)
    files = f"{out / FILE} and {picture}" if drawn else str(out / FILE)
    typer.echo(f"kept in {files}. {more}")
