"""A model's attention sinks, layer by layer, as a table and as heat maps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from surgery.cli.render.console import console

if TYPE_CHECKING:
    from surgery.calibration.sinks import SinkMap

MOST = 6  # tokens and channels that are shown


def show(found: SinkMap, facts: dict) -> None:
    """Print what `sink_map` found; `facts` are its second result."""
    out = console()
    out.print(
        f"{facts['model']}: attention sinks on {found.texts} texts of {found.length} tokens ({facts['text']}); "
        f"{bos(facts['bos'])}"
    )
    out.print(
        "share of attention of all later queries on the first token, and on other sinks: keys whose mean weight is "
        f"above {found.alpha:g} / {found.length}"
    )
    out.print(_table(found))
    out.print(
        "|v|: norm of the first token's value over that of other tokens (median; mean of the KV heads). residual: "
        "largest value after the layer, over the median"
    )
    for line in (*_tokens(found), *_massive(found)):
        out.print(line)


def bos(facts: dict) -> str:
    """What the tokenizer does about a token that begins a text."""
    if facts["token"] is None:
        return "the tokenizer has no BOS, so the first token is the text's own"
    if facts["added"]:
        return f"the first token is BOS, {facts['token']!r}, as the tokenizer adds it"
    return f"the tokenizer has a BOS ({facts['token']!r}) and does not add it, so the first token is the text's own"


def _table(found: SinkMap) -> Table:
    learned = found.learned is not None
    table = Table(box=None, pad_edge=False)
    columns = ["layer", "first\nmean", "\nmax", "\nhead", "others\nmean", "\nmax", "\nhead", "a text\nhas"]
    for title in [*columns, *(["learned\nmean", "\nmax"] if learned else []), "|v|\nfirst", "resi-\ndual"]:
        table.add_column(title, justify="right")
    for layer, (first, others) in enumerate(zip(found.first, found.others, strict=True)):
        cells = [str(layer), *_row(first), *_row(others), f"{_mean(found.sinks[layer]):.1f}"]
        cells += _row(found.learned[layer])[:2] if learned else []
        table.add_row(*cells, f"{_mean(found.first_value[layer]):.2f}", f"{found.residual[layer]['ratio']:,.0f}")
    return table


def _row(values: list[float]) -> list[str]:
    head = max(range(len(values)), key=values.__getitem__)
    return [f"{_mean(values):.2f}", f"{values[head]:.2f}", str(head)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _tokens(found: SinkMap) -> list[str]:
    if not found.tokens:
        return ["no token but the first is a sink of any head"]
    heads = sum(map(len, found.first))
    lines = ["other sinks by token: heads that mark one, mean over texts and places; marked places of all"]
    for facts in found.tokens[:MOST]:
        share = f"{facts['marks'] / max(facts['places'], 1):.1f} of {heads} heads"
        places = (
            f"{facts['places']} of {facts['occurrences']} places, most at {', '.join(map(str, facts['positions']))}"
        )
        lines.append(f"  {facts['token']!r:<14} {share}; {places}")
    return lines


def _massive(found: SinkMap) -> list[str]:
    if not found.massive:
        best = max(found.residual, key=lambda facts: facts["ratio"])
        layer = found.residual.index(best)
        return [
            "no massive activations (above 100 and 1000 times the median); the largest is "
            f"{best['magnitude']:,.0f} in channel {best['channel']} after layer {layer}, {best['ratio']:,.0f} times"
        ]
    lines = ["massive activations of the residual stream (above 100 and 1000 times the median):"]
    for facts in found.massive[:MOST]:
        layers = facts["layers"]
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        at = ", ".join(f"{place['token']!r} at {place['position']}" for place in facts["places"][:3])
        lines.append(
            f"  channel {facts['channel']}, {span}: up to {facts['magnitude']:,.0f}, {facts['ratio']:,.0f} times; {at}"
        )
    return lines


def draw(found: SinkMap, path: Path, title: str) -> Path:
    """Draw layer x head maps of the first token, the other sinks, and learned sinks where there are any."""
    from surgery.report.plots import heat_maps

    widest = max(map(len, found.first))
    panels = {"first token": found.first, "other sinks": found.others}
    panels |= {"learned sinks": found.learned} if found.learned is not None else {}
    return heat_maps(
        path,
        {name: [[*row, *[math.nan] * (widest - len(row))] for row in table] for name, table in panels.items()},
        rows=range(len(found.first)),
        columns=range(widest),
        row_label="layer",
        column_label="query head",
        value_label="share of attention",
        title=title,
        limits=(0.0, 1.0),
    )
