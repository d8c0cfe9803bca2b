"""A model's attention sinks, layer by layer, as a table and as heat maps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from surgery.cli.render import layout
from surgery.cli.render.console import console
from surgery.io.printing import count

if TYPE_CHECKING:
    from surgery.calibration.sinks import SinkMap

MOST = 6  # tokens, and channels, that are shown


def show(sink_map: SinkMap, info: dict) -> None:
    """Print the result of `survey_sinks`: the map, and the information on model and text."""
    out = console()
    out.print(
        f"{info['model']}: attention sinks on {sink_map.texts} texts of {sink_map.length} tokens ({info['text']}); "
        f"{bos(info['bos'])}"
    )
    out.print(
        "share of attention of all later queries on the first token, and on other sinks: keys whose mean weight is "
        f"above {sink_map.alpha:g} / {sink_map.length}"
    )
    layout.show(out, _table(sink_map))
    out.print(
        "|v|: norm of the first token's value over that of other tokens (median; mean of the KV heads). residual: "
        "largest value after the layer, over the median"
    )
    for line in (*_rates(sink_map), *_tokens(sink_map), *_massive(sink_map)):
        out.print(line)


def bos(info: dict) -> str:
    """A clause on whether the tokenizer begins a text with BOS."""
    if info["token"] is None:
        return "the tokenizer has no BOS, so the first token is the text's own"
    if info["added"]:
        return f"the first token is BOS, {info['token']!r}, as the tokenizer adds it"
    return f"the tokenizer has a BOS ({info['token']!r}) and does not add it, so the first token is the text's own"


def _table(sink_map: SinkMap) -> Table:
    learned = sink_map.learned is not None
    table = Table(box=None, pad_edge=False)
    columns = ["layer", "first\nmean", "\nmax", "\nhead", "others\nmean", "\nmax", "\nhead", "a text\nhas"]
    for title in [*columns, *(["learned\nmean", "\nmax"] if learned else []), "|v|\nfirst", "resi-\ndual"]:
        table.add_column(title, justify="right")
    for layer, (first, others) in enumerate(zip(sink_map.first, sink_map.others, strict=True)):
        cells = [str(layer), *_row(first), *_row(others), f"{_mean(sink_map.sinks[layer]):.1f}"]
        cells += _row(sink_map.learned[layer])[:2] if learned else []
        table.add_row(*cells, f"{_mean(sink_map.first_value[layer]):.2f}", f"{sink_map.residual[layer]['ratio']:,.0f}")
    return table


def _row(values: list[float]) -> list[str]:
    head = max(range(len(values)), key=values.__getitem__)
    return [f"{_mean(values):.2f}", f"{values[head]:.2f}", str(head)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _rates(sink_map: SinkMap) -> list[str]:
    from surgery.calibration.sinks import RATED

    count = len(sink_map.rates[0])
    layers = sink_map.rates
    means = [_mean([rates[place] for rates in layers]) for place in range(count)]
    best = sorted((place for place in range(count) if means[place]), key=lambda place: (-means[place], place))[:MOST]
    what = (
        f"sink rate: share of heads and texts where a key's mean weight is above {sink_map.epsilon:g}, "
        f"in the first {count} tokens, the last of which few queries see"
    )
    if count < RATED:
        what += f". The texts are too short for the paper's rate, which reads {RATED} tokens"
    if not best:
        return [what, "  no position of any layer"]
    lines = [what]
    for place in best:
        top = max(range(len(layers)), key=lambda layer: layers[layer][place])
        most = f"most in layer {top}: {layers[top][place]:.1%}"
        lines.append(f"  position {place}: {means[place]:.1%} over all layers, {most}")
    return lines


def _tokens(sink_map: SinkMap) -> list[str]:
    if not sink_map.tokens:
        return ["no token but the first is a sink of any head"]
    heads = sum(map(len, sink_map.first))
    lines = ["other sinks by token: heads that mark one, mean over texts and places; marked places of all"]
    for token in sink_map.tokens[:MOST]:
        share = f"{token['marks'] / max(token['places'], 1):.1f} of {heads} heads"
        places = (
            f"{token['places']} of {token['occurrences']} places, most at {', '.join(map(str, token['positions']))}"
        )
        lines.append(f"  {token['token']!r:<14} {share}; {places}")
    return lines


def _massive(sink_map: SinkMap) -> list[str]:
    if not sink_map.massive:
        best = max(sink_map.residual, key=lambda activation: activation["ratio"])
        layer = sink_map.residual.index(best)
        return [
            "no massive activations (above 100 and 1000 times the median); the largest is "
            f"{best['magnitude']:,.0f} in channel {best['channel']} after layer {layer}, {best['ratio']:,.0f} times"
        ]
    lines = ["massive activations of the residual stream (above 100 and 1000 times the median):"]
    for activation in sink_map.massive[:MOST]:
        layers = activation["layers"]
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        at = ", ".join(f"{token['token']!r} at {token['position']}" for token in activation["places"][:3])
        lines.append(
            f"  channel {activation['channel']}, {span}: up to {activation['magnitude']:,.0f}, "
            f"{activation['ratio']:,.0f} times; {at}"
        )
    return lines


def draw(sink_map: SinkMap, path: Path, info: dict) -> Path:
    """Draw query head x layer maps of the first token, the other sinks, and learned sinks where there are any.

    Args:
        info: the information on model and text that `survey_sinks` returns.
    """
    from surgery.report.plots import Cells, heat_maps

    widest = max(map(len, sink_map.first))
    panels = {"first token": sink_map.first, "other sinks": sink_map.others}
    panels |= {"learned sinks": sink_map.learned} if sink_map.learned is not None else {}
    heads = range(widest)

    def turned(table: list[list[float]]) -> Cells:
        return Cells([[row[head] if head < len(row) else math.nan for row in table] for head in heads])

    most = max(value for table in panels.values() for row in table for value in row)
    texts = f"{count(sink_map.texts, 'text')} of {sink_map.length} tokens"
    return heat_maps(
        path,
        {name: turned(table) for name, table in panels.items()},
        rows=heads,
        columns=range(len(sink_map.first)),
        row_label="query head",
        column_label="layer",
        value_label="share of the attention of all later queries",
        title=f"{info['model']}: attention on the first token and on other sinks\n{texts}: {info['text']}",
        limits=(0.0, most or 1.0),
    )
