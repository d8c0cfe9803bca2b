"""Needles as a table and as a picture: depth x length, base beside patched."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from surgery.cli.render import console

NAMES = {"base": "base", "out": "patched"}


def table(result) -> None:
    """Hits of every cell and what they sum up to, of a `NeedleResult`."""
    out = console()
    if result.status != "done":
        out.print(f"not run: {result.reason}")
        return
    labels, settings = list(result.outcomes), result.settings
    grid = Table(box=None, pad_edge=False)
    grid.add_column("depth", justify="right")
    for length in result.lengths:
        grid.add_column(f"{length:,} tokens", justify="right")
    starred = {(n.length, n.depth) for n in result.needles if not result.counts(n)}
    for depth in result.depths:
        cells = []
        for length in result.lengths:
            hits = [result.cell(label, length, depth) for label in labels]
            star = "* " if (length, depth) in starred else ""
            cells.append(f"{star}{' -> '.join(str(hit) for hit, _ in hits)} of {hits[0][1]}")
        grid.add_row(f"{depth:.2f}", *cells)
    out.print(grid)
    out.print(f"answered exactly{', base -> patched' if len(labels) > 1 else ''}")
    if starred:
        sinks, window = result.reach
        inside = sum(not result.counts(n) for n in result.needles)
        verdict = "do not count for what is kept" if len(labels) > 1 else "prove nothing"
        seen = f"streaming heads see them, or a part, within {sinks} sinks and {window} tokens before the question"
        out.print(f"*: {inside} of {len(result.needles)} needles {verdict}: {seen}")
    out.print()
    for label in labels:
        side = result.side(label)
        name = NAMES[label] if len(labels) > 1 else "model"
        out.print(
            f"{name + ':':<9}{side['hits']} of {side['of']} needles ({percent(side)}), "
            f"{side['nll']:.3f} nats per token of the answer"
        )
    if kept := result.kept():
        what = "the base finds" + (" outside sinks and window" if result.reach else "")
        share = f"{kept['kept']} of {kept['of']} ({percent(kept)})" if kept["of"] else "there are none"
        out.print(f"kept:    of those that {what}, the patched model finds {share}")
    size = f"{settings['samples']} samples in a cell, {settings['form']} prompts, seed {settings['seed']}"
    out.print(f"{size}; a guess is right with probability {settings['chance']:.0e}")
    out.print(f"haystack: {settings['text']['title']}, sha256 {settings['text']['sha256']}")
    for note in result.notes:
        out.print(f"note: {note}")


def picture(result, path: str | Path) -> Path:
    """A heat map of the share of hits for each model; raises as `pictures.heat_maps`."""
    from surgery.report.plots import heat_maps

    panels = {}
    for label in result.outcomes:
        side = result.side(label)
        name = NAMES[label] if len(result.outcomes) > 1 else "model"
        panels[f"{name}: {side['hits']} of {side['of']}"] = result.grid(label)
    kept = result.kept()
    title = "needles answered exactly"
    if kept and kept["of"]:
        title += f"; kept {kept['kept']} of {kept['of']} ({percent(kept)})"
    return heat_maps(
        path,
        panels,
        rows=[f"{depth:.2f}" for depth in result.depths],
        columns=[f"{length:,}" for length in result.lengths],
        row_label="depth of the needle",
        column_label="tokens of the prompt",
        value_label="share answered",
        title=title,
        limits=(0.0, 1.0),
    )


def percent(facts: dict) -> str:
    share = facts.get("share", facts.get("accuracy"))
    return f"{share:.1%}, 95% interval {facts['low']:.1%} to {facts['high']:.1%}"
