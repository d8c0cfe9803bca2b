"""The verb that writes a page: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import interrupt
from surgery.cli.options import Base, Json, OutName, Quiet, emit


def report(
    out: OutName,
    base: Base = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="With --base, ask both this; may be given several times."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.html", help="Default: report.html in the folder.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page about an output: cost, plan, pictures, checks; with --base also answers."""
    from surgery.cli.render.console import progress_bar
    from surgery.errors import SettingError
    from surgery.pipeline import PROMPTS, write_page

    if prompt and base is None:
        raise SettingError("--prompt asks both models, and no base is named", fix="--base MODEL")
    with interrupt.advised(interrupt.nothing_kept), progress_bar(quiet or as_json) as progress:
        page = write_page(out, base, prompts=prompt or PROMPTS, file=file, progress=progress)
    emit({"page": str(page), "bytes": page.stat().st_size}) if as_json else typer.echo(f"wrote {page}")
