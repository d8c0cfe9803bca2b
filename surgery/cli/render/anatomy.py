"""A model's attention as a table, and what each recipe would do to it."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.layer import LayerAnatomy
from surgery.cli.render.catalogue import LEGEND
from surgery.cli.render.console import console
from surgery.cli.render.layout import columns, hanging, show
from surgery.config.catalogue import Entry
from surgery.conversion.fit import Fit
from surgery.conversion.plan import Plan
from surgery.conversion.plan_tree import comparison_key
from surgery.errors import any_of
from surgery.io.printing import byte_size, count

POSITIONS = {"half": "RoPE", "interleaved": "RoPE (interleaved)", "alibi": "ALiBi", "unknown": "unknown (a guess)"}
EXTRAS: dict[str, Callable[[LayerAnatomy], object]] = {  # columns of the table, shown if any layer has a value
    "QK-norm": lambda layer: layer.qk_norm,
    "window": lambda layer: layer.window,
    "biases": lambda layer: layer.biases,
}
BILLION = 1e9


def model(name: str, anatomy: Anatomy) -> None:
    """Print what a model is and where its attention is; equal layers are shown once."""
    out, first = console(), anatomy.layers[0]
    hanging(out, Text(f"{name}:", style="bold"), ", ".join(_facts(anatomy)), 4)
    show(out, _layers(anatomy))
    kind = f"fused {first.layout.qkv} ({first.layout.layout})" if first.layout.qkv else "separate q, k, v"
    if first.latent:
        kind = f"a latent vector of {first.latent.rank} numbers, a key of {first.latent.rope} rotated channels"
        kind += f", queries made of a vector of {first.latent.queries}" if first.latent.queries else ""
    absent = [title for title, of_layer in EXTRAS.items() if not any(map(of_layer, anatomy.layers))]
    without = f"; no {any_of(absent)}" if absent else ""
    hanging(out, "projections:", f"{kind} in {first.path.replace('.0.', '.N.')}{without}", 4)
    extra = [f"soft-cap {first.soft_cap}"] if first.soft_cap else []
    extra += ["learned sinks"] if first.layout.sinks else []
    extra += [] if first.layout.interface else ["attention outside Transformers' attention interface"]
    if extra:
        hanging(out, "also:", ", ".join(extra), 4)
    hanging(out, "KV cache:", _cache(anatomy), 4)
    for layer in (each for each in anatomy.layers if each.streaming):
        out.print(f"a streaming head sees: {layer.sinks} sinks + {layer.streaming_window} tokens")
        break
    depth = len(anatomy.layers)
    if terms := anatomy.terms:
        what = ", ".join(f"{term} in {len(layers)} of {depth} layers" for term, layers in terms.items())
        hanging(out, "changed by a surgery:", what, 4)
    for title, words in anatomy.descriptions.items():
        hanging(out, f"{title}:", f"{', '.join(dict.fromkeys(words))}, in {len(words)} of {depth} layers", 4)


def _facts(anatomy: Anatomy) -> list[str]:
    """Family, size, context, dtype of a model."""
    family = f"{anatomy.composite} ({anatomy.model_type})" if anatomy.composite else anatomy.model_type
    hidden = getattr(anatomy.config.get_text_config(), "hidden_size", None)
    parameters = anatomy.parameters
    amount = f"{parameters / 1e9:.2f}B" if parameters >= BILLION else f"{parameters / 1e6:.1f}M"
    return [
        f"{family}{', a guess' if anatomy.guess else ''}",
        *([f"{amount} parameters"] if parameters else []),
        *([f"context {anatomy.positions:,}"] if anatomy.positions else []),
        *([f"hidden size {hidden:,}"] if hidden else []),
        anatomy.dtype or "dtype unknown",
    ]


def _cache(anatomy: Anatomy) -> str:
    """Bytes of the KV cache: per token, and for the full context."""
    token, fixed = anatomy.kv_bytes_per_token, anatomy.kv_bytes_fixed
    words = f"{token:,} bytes per token" + (f", and {fixed:,} bytes that do not grow" if fixed else "")
    full = anatomy.positions and f" ({byte_size(token * anatomy.positions + fixed)} at {anatomy.positions:,} tokens)"
    return words + (full or "")


def _layers(anatomy: Anatomy) -> Table:
    table = Table(box=None, pad_edge=False)
    split = any(layer.streaming for layer in anatomy.layers)
    titles = ("layers", "query heads", "KV heads", *["streaming"] * split, "head size", "position")
    extras = {title: of_layer for title, of_layer in EXTRAS.items() if any(map(of_layer, anatomy.layers))}
    for title in (*titles, *extras):
        table.add_column(title)
    for run in _runs(anatomy.layers):
        layer = run[0]
        label = f"{layer.index}-{run[-1].index}" if len(run) > 1 else str(layer.index)
        rotated = f", {layer.rotary} of {layer.head_dim}" if 0 < layer.rotary < layer.head_dim else ""
        position = POSITIONS.get(layer.positions, layer.positions) + rotated
        counts = (layer.heads, layer.kv_heads, *[len(layer.streaming)] * split, layer.head_dim)
        table.add_row(label, *map(str, counts), position, *(str(get(layer) or "none") for get in extras.values()))
    return table


def _runs(layers: tuple[LayerAnatomy, ...]) -> list[list[LayerAnatomy]]:
    """Runs of successive layers that differ only in their index."""
    runs: list[list[LayerAnatomy]] = []
    for layer in layers:
        if runs and comparison_key(runs[-1][0]) == comparison_key(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def effects(fits: list[Fit], typed: str) -> None:
    """Print what each recipe would do to a plain model, why others cannot be applied, and what to type next.

    Args:
        typed: the model as the user named it.
    """
    out = console()
    able = [fit for fit in fits if not fit.problems]
    if able:
        out.print()
        head = [Text(word, style="dim") for word in ("recipe", "tier", "what it would do", "training")]
        columns(out, [head, *(_effect(fit.entry, fit.plan) for fit in able if fit.plan)], cut=True)
        if any(fit.plan and fit.plan.after.kv_bytes_fixed for fit in able):
            out.print(Text("+ MB: a fixed part for each sequence, its sinks, windows and kept keys.", style="dim"))
        hanging(out, "", LEGEND, 0, "dim")
    _reasons(out, [fit for fit in fits if fit.problems])
    if able:
        names = [fit.entry.name for fit in able]
        chosen = "duo-attention" if "duo-attention" in names else names[0]
        out.print(f"\nnext: surgery plan {chosen} {shlex.quote(typed)}", soft_wrap=True)


def followers(fits: list[Fit], made_by: str, typed: str, absorbs: bool) -> None:
    """Print which recipes can be applied to a checkpoint that surgery has already changed.

    Args:
        made_by: the recipe that made it; "" where that is not recorded.
        absorbs: whether the operation `absorb`, which no recipe has alone, can be applied to it.
    """
    out = console()
    able = [fit.entry.name for fit in fits if not fit.problems]
    base = [fit.entry.name for fit in fits if fit.needs_base]
    sentences = [
        f"Made by surgery{f': {made_by}' if made_by else ''}.",
        f"{count(len(able), 'recipe')} can be applied to this result: {', '.join(able)}."
        if able
        else "None of the recipes that come with surgery can be applied to this result.",
        "The operation absorb can, and makes it decode faster: write a recipe with `operations: [{op: absorb}]`."
        if absorbs
        else "",
        f"{len(base)} can only be applied to its base: {', '.join(base)}. To have one of these together with "
        f"{made_by or 'what was done'}, write one recipe with both operations and apply it to the base. `surgery cp "
        "duo-after-gqa` copies an example."
        if base
        else "",
    ]
    out.print()
    hanging(out, "", " ".join(filter(None, sentences)), 0)
    _reasons(out, [fit for fit in fits if fit.problems and not fit.needs_base])
    out.print(f"\nnext: surgery check {shlex.quote(typed)}", soft_wrap=True)


def _effect(entry: Entry, plan: Plan) -> list[Text | str]:
    before, after, fixed = plan.before, plan.after, plan.after.kv_bytes_fixed
    words = entry.line
    if (after.kv_bytes_per_token, fixed) != (before.kv_bytes_per_token, before.kv_bytes_fixed):
        words = f"KV {before.kv_bytes_per_token:,} → {after.kv_bytes_per_token:,} B/token"
        words += f" + {byte_size(fixed)}" if fixed else ""
    tier = Text(plan.tier, style="green" if plan.tier == "native" else "cyan")
    return [Text(entry.name, style="bold"), tier, words, entry.training]


def _reasons(out: Console, fits: list[Fit]) -> None:
    """Print why recipes cannot be applied; recipes with the same reasons share a line."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for fit in fits:
        groups.setdefault(fit.problems, []).append(fit.entry.name)
    if not groups:
        return
    out.print(Text("\nThese cannot be applied as they are:", style="yellow"))
    for problems, names in groups.items():
        hanging(out, "  ", f"{', '.join(names)}: {'; '.join(problems)}", 4)
