"""Tables for the pages, made from the code: families, settings of healing, losses, verbs, parts of the runtime."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

from results import markdown

ROOT = Path(__file__).resolve().parents[2]
NO_NUMBER = "no: its config has no number of KV heads"


def families() -> str:
    """One row for each family: how it lays out attention, and which surgeries it therefore allows."""
    from surgery.architecture.families import FAMILIES
    from surgery.architecture.latent import STOCK
    from surgery.architecture.sliding import HOSTS
    from surgery.architecture.stock_class import BASES

    rows = []
    for name, family in FAMILIES.items():
        if family.latent_norm:  # what `mla` writes: nothing changes it again
            continue
        fused = {"separate": "separate", "rows": "fused, by rows", "grouped": "fused, by groups"}
        merge = {None: NO_NUMBER, "falcon": "new decoder: any number; old: 1 or all"}.get(family.kv_field, "yes")
        split = f"from Transformers {family.since}" if family.since else "yes" if family.interface else "no"
        fit = "yes; with the norm keys and queries are not refitted" if family.qk_norm else "yes"
        if family.qk_norm == "whole":
            fit = "no: the norm spans all heads"
        elif merge == NO_NUMBER or split == "no":
            fit = "no"
        elif family.since:
            fit = split
        positions = {"half": "RoPE", "interleaved": "RoPE, interleaved", "alibi": "ALiBi"}
        rows.append(
            [
                f"`{name}`",
                fused.get(family.layout, "fused, by its config"),
                positions.get(family.positions, family.positions),
                family.qk_norm or "",
                merge,
                fit,
                "yes" if name in BASES[STOCK] else "no",
                "no" if family.vectors_problem else "yes",
                _windows(name, HOSTS),
                split,
            ]
        )
    head = [
        "family",
        "q, k, v",
        "positions",
        "QK-norm",
        "merge, expand",
        "`gqa` in closed form",
        "`mla`",
        "`low_rank_kv`",
        "sliding layers",
        "head split",
    ]
    return markdown([head, ["---"] * len(head), *rows])


def _windows(name: str, hosts: dict[str, str]) -> str:
    """Whether a family can have a window in some layers, and as what."""
    if name == "gemma3_text":
        return "where both kinds have one RoPE"
    return "yes" if hosts.get(name) == name else f"as `{hosts[name]}`" if name in hosts else "no"


def healing() -> str:
    """One row for each setting of the `heal:` block, in the schema's words."""
    from surgery.config.heal import METHODS, Heal

    rows = []
    for name, field in Heal.model_fields.items():
        own = {method: cls.model_fields[name].default for method, cls in METHODS.items() if name != "method"}
        others = [f"{method}: {shown(value)}" for method, value in own.items() if value != field.default]
        default = shown(Heal.default_method() if name == "method" else field.default)
        rows.append([f"`{name}`", default + (f" ({', '.join(others)})" if others else ""), field.description or ""])
    for method, cls in METHODS.items():
        for name, field in cls.model_fields.items():
            if name not in Heal.model_fields:
                rows.append([f"`{name}`", shown(field.default), f"With {method}. {field.description}"])
    return markdown([["setting", "default", "what it does"], ["---"] * 3, *rows])


def losses() -> str:
    """One row for each loss that `heal.loss` may name."""
    from surgery.healing.losses import LOSSES, find

    return markdown([["loss", "what it is"], ["---"] * 2, *([f"`{name}`", find(name).summary] for name in LOSSES)])


def verbs() -> str:
    """One row for each verb, in the words of its help."""
    from typer.main import get_group

    from surgery.cli.main import app

    commands = {name: command for name, command in get_group(app).commands.items() if not command.hidden}
    rows = [
        [f"`surgery {name}`", " ".join((command.help or "").split("\n\n")[0].split())]
        for name, command in commands.items()
    ]
    return markdown([["verb", "what it does"], ["---"] * 2, *rows])


def runtime() -> str:
    """One row for each file of a part: the first paragraph of its docstring, and the files exported with it."""
    from surgery.runtime.surgery_config import FILES, exported_files

    parts: dict[str, list[str]] = {}
    for part, file in FILES.items():
        parts.setdefault(file, []).append(part)
    always, folders = exported_files(()).keys(), (ROOT / "surgery" / "runtime", ROOT / "kernels")
    rows = []
    for file, names in parts.items():
        path = next(folder / f"{file}.py" for folder in folders if (folder / f"{file}.py").is_file())
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        carried = exported_files({names[0], names[0].partition(".")[0]} & FILES.keys())
        along = [f"`{name}`" for name in sorted(carried.keys() - always - {f"{file}.py"})]
        rows.append(
            [f"`{file}.py`", " ".join(summary.split()), "none" if f"{file}.py" in always else ", ".join(along)]
        )
    return markdown([["file", "what it holds", "files that it needs besides"], ["---"] * 3, *rows])


def shown(value: object) -> str:
    """A default in the spelling of YAML."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


REFERENCES: dict[str, Callable[[], str]] = {
    "families": families,
    "healing": healing,
    "losses": losses,
    "verbs": verbs,
    "runtime": runtime,
}
