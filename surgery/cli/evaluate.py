"""The verb that measures quality: eval. Its options are the aliases of the registered probes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import completion, interrupt
from surgery.cli.options import Base, Json, ModelName, Quiet, emit
from surgery.errors import SurgeryError
from surgery.evaluation import probes
from surgery.evaluation.probes.base import Flag, Probe
from surgery.evaluation.probes.settings import make, read
from surgery.io.files import REPORT

PLOT = "plot"
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="With --probe, settings of the probe.",
        autocompletion=completion.probe_settings,
    ),
]
WriteTask = Annotated[
    Path | None,
    typer.Option("--write-task", metavar="FOLDER", help="Write the questions as a task of lm-eval; run nothing."),
]
ProbeName = Annotated[
    str | None,
    typer.Option(
        "--probe",
        metavar="NAME",
        help=f"Measure with this probe: {', '.join(probes.REGISTRY)}.",
        autocompletion=completion.probe_names,
    ),
]


def evaluate(
    context: typer.Context,
    out: str,
    settings: list[str] | None,
    base: str | None,
    probe: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    from surgery.api import evaluate as run
    from surgery.cli.render import tables
    from surgery.cli.render.console import progress_bar
    from surgery.report.lineage import as_its_recipe

    write_task = options.pop("write_task")
    typed = {name for name in options if context.get_parameter_source(name).name == "COMMANDLINE"}
    chosen = _by_name(probe, settings or [], typed) if probe is not None else _by_flags(options, settings or [], typed)
    if write_task is not None:
        if base is not None:
            raise SurgeryError("--write-task runs nothing, so that it takes no --base", fix="leave one of them out")
        return _write_task(chosen, out, write_task, as_json)
    plot = options[PLOT]
    if plot:
        from surgery.report import plots

        plots.ready(plot)
    if base is not None:
        chosen = as_its_recipe(chosen, out)
    advice = interrupt.answers_kept if chosen.resumes else interrupt.nothing_kept
    with interrupt.advised(advice), progress_bar(quiet or as_json) as progress:
        progress.expect(chosen.stages(base is not None))
        result = run(out, base, probe=chosen, progress=progress)
    if plot and result.status == "done":
        picture = chosen.picture(result)
        picture["panels"] = {name: plots.Cells(**cells) for name, cells in picture["panels"].items()}
        plots.heat_maps(plot, **picture)
    if as_json:
        return emit(result.to_dict())
    tables.measured(type(chosen), result, _following(type(chosen), result.to_dict(), out, base))


def _write_task(probe: Probe, model: str, folder: Path, as_json: bool) -> None:
    from surgery.evaluation.harness.task_files import write_task
    from surgery.evaluation.probes.settings import fitted
    from surgery.io.hub import resolve
    from surgery.io.loading import read_config

    path = resolve(model).path
    probe, cuts = fitted(probe, {"the model": read_config(path)})
    written = write_task(probe, path, folder)
    if as_json:
        written_facts = {"file": str(written.file), "items": written.items, "left_out": written.left_out}
        return emit(written_facts | ({"notes": cuts} if cuts else {}))
    left_out = (
        f"; {written.left_out} left out, which lm-eval would read or score otherwise" if written.left_out else ""
    )
    typer.echo(f"{written.file}: {written.items} items{left_out}")
    for note in cuts:
        typer.echo(f"note: {note}")
    typer.echo(f"next: surgery eval {shlex.quote(model)} --tasks {shlex.quote(str(written.file))}")
    typer.echo(f"or:   lm_eval run --model hf --model_args pretrained=MODEL --tasks {shlex.quote(str(written.file))}")


def _following(probe: type[Probe], record: dict, out: str, base: str | None) -> str:
    """The command to type next, which measures something more or repairs the damage; "" for none."""
    model, compared = shlex.quote(out), f"--base {shlex.quote(base or 'MODEL')}"
    made = (Path(out) / REPORT).is_file()
    if base is None:
        return f"surgery eval {model} {compared}" if made else ""
    if made and probe.damage(record):
        return f"surgery heal {model} tokens=1e6 -o HEALED {compared}"
    switches = [cls.name for cls in probes.every() if cls.aliases.switch and cls is not probe]
    if probe.main and switches:
        return f"surgery eval {model} {compared} --probe {switches[0]}"
    return f"surgery bench {model} {compared}" if made else ""


def _by_name(name: str, settings: list[str], typed: set[str]) -> Probe:
    """The probe that --probe names, with settings as key=value."""
    cls = probes.find(name)
    if PLOT in typed and not cls.drawing:
        _refuse_option(PLOT, cls)
    if aliases := sorted(typed - {PLOT}):
        flag = cls.aliases.flags.get(aliases[0])
        fix = f"write {flag.key}=..." if flag else "leave one of them out"
        raise SurgeryError(f"use either {_option(aliases[0])} or --probe, not both", fix=fix)
    return read(name, settings)


def _by_flags(options: dict[str, Any], texts: list[str], typed: set[str]) -> Probe:
    """The probe whose flag was given, or the main probe, with settings from options."""
    chosen = [cls for cls in probes.every() if _is_asked(cls, options, typed)]
    if texts:
        fix = f"--probe {' or --probe '.join(cls.name for cls in chosen or probes.every())}"
        raise SurgeryError(f"{texts[0]!r} is a setting of a probe", fix=f"name the probe: {fix}")
    if len(chosen) > 1:
        names = [_option(_asking(cls)[0]) for cls in chosen[:2]]
        raise SurgeryError(f"use either {' or '.join(names)}, not both", fix="run the command once for each")
    probe = chosen[0] if chosen else probes.main()
    flags = probe.aliases.flags
    for name in options:
        switch = any(name == cls.name for cls in probes.every())
        if name in typed and not switch and name not in flags and not (name == PLOT and probe.drawing):
            _refuse_option(name, probe)
    settings_by_key = {flag.key: options[name] for name, flag in flags.items() if name in typed}
    spellings = {flag.key: _option(name) for name, flag in flags.items()}
    return make(probe.name, settings_by_key, lambda key: spellings.get(key, key))


def _asking(cls: type[Probe]) -> list[str]:
    """The options that ask for a probe: its switch, or those of its settings that do."""
    return [cls.name] * bool(cls.aliases.switch) + [name for name, flag in cls.aliases.flags.items() if flag.asks]


def _is_asked(cls: type[Probe], options: dict[str, Any], typed: set[str]) -> bool:
    return any(options[name] if name == cls.name and cls.aliases.switch else name in typed for name in _asking(cls))


def _refuse_option(name: str, probe: type[Probe]) -> None:
    """Raise for an option that the probe does not read."""
    users = [cls for cls in probes.every() if name in _options_of(cls)]
    if any(cls.main for cls in users):
        switch = f", or leave out {_option(probe.name)}" if probe.aliases.switch else ""
        raise SurgeryError(f"{_option(name)} is not for {probe.name}", fix=f"leave it out{switch}")
    names = [cls.name for cls in users]
    what = f"{_option(name)} is only for {' and '.join(names)}"
    raise SurgeryError(what, fix=f"add {_option(_asking(users[0])[0])}, or leave it out")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _options_of(cls: type[Probe]) -> dict[str, Flag]:
    """The options that a probe reads."""
    drawing = {PLOT: Flag("", cls.drawing, Path, metavar="FILE.png")} if cls.drawing else {}
    return cls.aliases.flags | drawing


def _parameters() -> list[Parameter]:
    """The parameters of the verb: those that all probes share, then an option for each alias of a probe."""

    def parameter(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
        return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)

    parameters = {
        "context": parameter("context", typer.Context),
        "out": parameter("out", ModelName),
        "settings": parameter("settings", Settings, None),
        "base": parameter("base", Base, None),
        "probe": parameter("probe", ProbeName, None),
        "write_task": parameter("write_task", WriteTask, None),
    }
    for cls in probes.every():
        if cls.aliases.switch:
            info = typer.Option(_option(cls.name), help=cls.aliases.switch, rich_help_panel=_panel([cls]))
            switch = Annotated[bool, info]
            parameters[cls.name] = parameter(cls.name, switch, False)
        for name, flag in _options_of(cls).items():
            if name not in parameters:
                parameters[name] = parameter(name, *_typed(name, flag, cls))
    common = {"as_json": parameter("as_json", Json, False), "quiet": parameter("quiet", Quiet, False)}
    return list((parameters | common).values())


def _typed(name: str, flag: Flag, cls: type[Probe]) -> tuple[Any, Any]:
    """Annotation and default of an option."""
    users = [other for other in probes.every() if name in _options_of(other)]
    default = cls.model_fields[flag.key].default if flag.key else None
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    kind = flag.kind if default is not None else flag.kind | None
    info = typer.Option(min=flag.least, metavar=flag.metavar, help=flag.help, rich_help_panel=_panel(users))
    return Annotated[kind, info], default


def _panel(users: list[type[Probe]]) -> str | None:
    """The section of the help for an option that these probes read; None: the common section."""
    if len(users) > 1:
        return None
    (probe,) = users
    asking = " or ".join(map(_option, _asking(probe)))
    return f"{probe.name.capitalize()} ({'the usual measure' if probe.main else f'with {asking}'})"


def _described(function: Callable[..., None]) -> Callable[..., None]:
    """Give the function the parameters and the help that follow from the registry of probes."""
    parameters = _parameters()
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    *others, last = [_option(name) for cls in probes.every() for name in _asking(cls)]
    function.__doc__ = (
        f"Measure a model, alone or compared with its base: {probes.main().summary}. With {', '.join(others)} or "
        f"{last}, that instead; --probe NAME measures with any probe."
    )
    return function


_described(evaluate)
