"""The layout of `--help`: options in sections, readable metavars, colour only in a terminal."""

from __future__ import annotations

import os
import re
import shutil
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

WIDTH = 80
RANGE = re.compile(r"(?:; )?(?:[\d.]+<=)?x[<>]=[\d.]+")  # the range of a number as typer writes it: "x>=1"
METAVARS = {"int": "N", "float": "X", "str": "TEXT", "Path": "FILE"}


def context_settings() -> dict[str, Any]:
    """Settings of every command: `-h`, and lines as long as the terminal, 80 at most."""
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    return {"help_option_names": ["-h", "--help"], "terminal_width": max(20, min(columns, WIDTH))}


class _Sections:
    """Lists options under the names of their panels, and options without a panel under "Options"."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            if (record := _record(param, ctx)) is None:
                continue
            place = "Arguments" if isinstance(param, TyperArgument) else "Options"
            sections.setdefault(getattr(param, "rich_help_panel", None) or place, []).append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(_styled(name, bold=True)):
                    formatter.write_dl(records)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """ "[OPTIONS] RECIPE MODEL [KEY=VALUE]...": names of arguments as they are typed."""
        pieces = [self.options_metavar] if self.options_metavar else []  # type: ignore[attr-defined]
        arguments = (p for p in self.get_params(ctx) if isinstance(p, TyperArgument))  # type: ignore[attr-defined]
        return pieces + [argument.display_name_raw for argument in arguments]


class Command(_Sections, TyperCommand):
    """A verb."""


class Group(_Sections, TyperGroup):
    """`surgery` itself."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        super().format_options(ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["COMMAND", "[OPTIONS] ..."]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(_styled(name, fg="cyan"), command.short_help or "") for name, command in commands.items() if command]
        with formatter.section(_styled("Commands", bold=True)):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"{self.epilog}\n")  # a command to copy: not wrapped


def _record(param: Any, ctx: Any) -> tuple[str, str] | None:
    """Name and text of an argument or option; None where it is hidden."""
    if (record := param.get_help_record(ctx)) is None:
        return None
    text = RANGE.sub("", record[1]).replace("  [required]", "").replace("  []", "").replace("  [", " [")
    if isinstance(param, TyperArgument):
        return _styled(param.display_name_raw, fg="cyan"), text
    names = ", ".join(sorted(param.opts, key=len))
    return f"{_styled(names, fg='cyan')}{_metavar(param)}", text


def _metavar(param: TyperOption) -> str:
    if param.is_flag:
        return ""
    kind = param.type_descriptor.annotation
    return f" {param.metavar or METAVARS.get(getattr(kind, '__name__', ''), 'VALUE')}"


def _styled(text: str, **style: Any) -> str:
    """Text in colour, which typer.echo drops in a pipe."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)
