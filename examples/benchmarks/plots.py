"""The plots of the pages, drawn from results/*.json into recipes/plots/NAME.svg by tables.py.

In a plot, each axis and each colour has one meaning. The same results and the same matplotlib give the same bytes: ids
come from a fixed salt, no date is written, and letters stay text. The description in a plot's file names the digest of
the figures that it was drawn from and the version of matplotlib.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results, read, referred

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "plots"
# Okabe and Ito's colours, which people with any colour vision tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
STYLE = {
    "svg.hashsalt": "surgery",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
NO_KL = 1e-4  # on a logarithmic axis, where a smaller divergence is drawn
HELD, NOVEL = "held-out reference", "*Pride and Prejudice*"
STEPS = (35, 70, 140, 280)  # of healing from the closed form, at which each route has a figure


@dataclass(frozen=True)
class Plot:
    """A plot of a page.

    Attributes:
        draw: draws results on axes; called with the axes and with the results in the order of `sources`.
        sources: names of the results.
        says: a sentence on what the plot shows, for readers who cannot see it.
        size: width and height in inches.
    """

    draw: Callable[..., None]
    sources: tuple[str, ...]
    says: str
    size: tuple[float, float] = (7.0, 3.4)

    @property
    def digest(self) -> str:
        """A hash of the figures that the plot is drawn from."""
        figures = [
            [[column.name for column in found.columns], [[referred(cell) for cell in row] for row in found.rows]]
            for found in map(read, self.sources)
        ]
        return hashlib.sha256(json.dumps(figures).encode()).hexdigest()[:16]

    @property
    def description(self) -> str:
        """The line on its origin in the plot's file."""
        return f"figures {self.digest}, matplotlib {matplotlib.__version__}"


def figure(plot: Plot) -> Figure:
    """The plot as a matplotlib figure without a window."""
    drawn = Figure(figsize=plot.size, facecolor="white")
    plot.draw(drawn.add_subplot(), *map(read, plot.sources))
    return drawn


def svg(plot: Plot) -> str:
    """The text of the plot's file."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        file = io.StringIO()
        metadata: dict[str, Any] = {"Date": None, "Creator": None, "Description": plot.description}
        figure(plot).savefig(file, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def png(plot: Plot, path: Path) -> None:
    """Write the plot as a PNG file, to look at."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure(plot).savefig(path, format="png", dpi=110)


def stale(name: str) -> str:
    """Why the file of a plot does not match its results; "" if it does."""
    path, plot = FOLDER / f"{name}.svg", PLOTS[name]
    if not path.is_file():
        return "it was not drawn"
    text = path.read_text(encoding="utf-8")
    if plot.digest not in text:
        return f"the figures of {', '.join(plot.sources)} are others"
    if plot.description in text and text != svg(plot):  # another matplotlib may place letters elsewhere
        return "it is drawn otherwise"
    return ""


def cost(axes: Axes, found: Results) -> None:
    """A table of `surgery compare`: KL against the cache at 8,192 tokens; colours say how many needles are kept."""
    looks = ((0.9, BLUE, "o", "9 in 10 or more"), (0.5, ORANGE, "s", "half or more"), (0.0, VERMILION, "v", "fewer"))
    unasked = (0.0, GREY, "D", "none was far enough back")
    for _, color, marker, label in (*looks, unasked):
        axes.scatter([], [], color=color, marker=marker, s=60, label=label)
    rows = found.rows[1:]
    places = _places(found, rows)
    for row, place in zip(rows, places, strict=True):
        kept, of = (found.number(row, "needles", key) or 0 for key in ("count", "of"))
        _, color, marker, _ = next(look for look in looks if kept >= look[0] * of) if of else unasked
        axes.scatter(*place, color=color, marker=marker, s=60, zorder=2)
        axes.annotate(row[0].strip("`"), place, (9, 0), textcoords="offset points", va="center")
    _cost_axes(axes, places)
    axes.legend(title="needles kept", loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left")


def _places(found: Results, rows: Sequence[tuple[Any, ...]]) -> list[tuple[float, float]]:
    """Where rows of a comparison stand: the cache in percent of the base's, and the KL from the base."""
    base = found.number(found.row("the base"), "KV at 8k") or 1
    return [
        (100 * (found.number(row, "KV at 8k") or 0) / base, max(found.number(row, "KL 2,048") or 0, NO_KL))
        for row in rows
    ]


def _cost_axes(axes: Axes, places: list[tuple[float, float]]) -> None:
    """What `cost` and `merges` have on their axes; the ticks span the divergences of these places."""
    divergences = [divergence for _, divergence in places]
    axes.set_xlim(0, 105)
    axes.set_xticks(range(0, 101, 25), [f"{x}%" for x in range(0, 101, 25)])
    axes.set_yscale("log")
    steps = [digit * 10.0**power for power in range(-5, 2) for digit in (1, 2, 5)]
    low = max(step for step in steps if step <= 0.9 * min(divergences))
    high = min(step for step in steps if step >= 1.1 * max(divergences))
    ticks = [step for step in steps if low <= step <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.grid(axis="y", color="#DDDDDD")
    axes.set_xlabel("KV cache at 8,192 tokens, share of the base's (left is better)")
    axes.set_ylabel("KL from the base, nats a token\n(log scale; down is better)")


def merges(axes: Axes, found: Results) -> None:
    """The conversions of the model with a KV head for each query head: a line for each method, by what is left."""
    methods = (
        ("mean", "the mean of the heads", GREY, "v"),
        ("gqa", "gqa, rows of 512 bytes", BLUE, "o"),
        ("long", "gqa, rows of 2,048 bytes", SKY, "s"),
        ("mla", "mla", VERMILION, "D"),
        ("duo-attention", "duo-attention", GREEN, "^"),
    )
    drawn = []
    for prefix, label, color, marker in methods:
        places = _places(found, [row for row in found.rows if row[0].strip("`").startswith(prefix)])
        axes.plot(*zip(*places, strict=True), color=color, marker=marker, markersize=8, linewidth=1.2, label=label)
        drawn += places
    _cost_axes(axes, drawn)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left")


def gqa(axes: Axes, closed: Results, means: Results) -> None:
    base, mean = means.row("the base"), means.row("`mean`")
    nats = "cross-entropy, nats"
    lost = (means.number(mean, nats) or 0) - (means.number(base, nats) or 0)
    rows = [("mean of the heads\n(for training)", lost, None)]
    for row in closed.rows[1:]:
        label = row[0].replace("`", "").replace(" ", "\n", 1) if "=" in row[0] else row[0]
        values = [closed.number(row, f"perplexity (nats above the base), {text}", "nats") for text in (HELD, NOVEL)]
        rows.append((label, *values))
    places = range(len(rows))
    axes.scatter([row[1] for row in rows], places, color=BLUE, s=45, label="held-out reference")
    known = [(row[2], place) for place, row in enumerate(rows) if row[2] is not None]
    axes.scatter(*zip(*known, strict=True), color=ORANGE, marker="s", s=40, label="Pride and Prejudice")
    axes.set_yticks(places, [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.set_xlim(0.03, 10)
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_xlabel("nats a token above the base (log scale; left is better)")
    axes.set_ylabel("closed form, except the first row")
    axes.legend(loc="lower right")


def duo_attention(axes: Axes, scores: Results) -> None:
    looks = {
        "`far-mass`": (BLUE, "o"),
        "`gates`": (ORANGE, "s"),
        "`ablation`": (GREEN, "^"),
        "`retrieval`": (PURPLE, "D"),
        "`far-mass` reversed: the highest stream": (BLACK, "v"),
    }
    for shift, (name, (color, marker)) in enumerate(looks.items()):
        row, places, shares, errors = scores.row(name), [], [], []
        for place, ratio in enumerate(("25%", "50%", "75%")):
            share, low, high = (scores.number(row, f"{ratio} stream", key) or 0.0 for key in ("share", "low", "high"))
            places.append(place + (shift - 2) * 0.09)
            shares.append(share)
            errors.append((share - low, high - share))
        bars = list(zip(*errors, strict=True))
        label = name.replace("`", "")
        axes.errorbar(places, shares, yerr=bars, color=color, marker=marker, ls="none", capsize=2.5, label=label)
    axes.set_xticks(range(3), ["25%", "50%", "75%"])
    axes.set_xlabel("KV heads that stream")
    axes.set_ylim(-3, 106)
    axes.set_ylabel("recall kept, % of the base's 107")
    axes.grid(axis="y", color="#DDDDDD")
    axes.legend(title="heads chosen by", loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left")


def prune_heads(axes: Axes, pruned: Results) -> None:
    labels = []
    for place, row in enumerate(pruned.rows):
        cut, refitted = (pruned.number(row, column) or 0 for column in ("nats above the base, cut", "refitted"))
        axes.plot([refitted, cut], [place, place], color=GREY, lw=2, zorder=1)
        axes.scatter(cut, place, color=VERMILION, marker="s", s=40, label="" if place else "cut", zorder=2)
        axes.scatter(refitted, place, color=BLUE, s=45, label="" if place else "output projections refitted", zorder=2)
        labels.append(f"{'KV group' if 'group' in row[0] else 'query head'}, {row[1].replace('`', '')}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_xlabel("loss above the base, nats a token (log scale; left is better)")
    axes.set_ylabel("removed from every layer, chosen by")
    axes.legend(loc="lower right")


def moh(axes: Axes, gates: Results) -> None:
    looks = {
        "router, by energy (default)": (BLUE, "o", "-"),
        "router, by damage": (GREEN, "^", "-"),
        "same heads for every token, by damage": (ORANGE, "s", "--"),
        "same heads for every token, by energy": (VERMILION, "D", "--"),
        "random router": (BLACK, "v", ":"),
    }
    for column, (color, marker, line) in looks.items():
        known = [(100 * row[0], y) for row in gates.rows if (y := gates.number(row, column)) is not None]
        axes.plot(*zip(*known, strict=True), color=color, marker=marker, ls=line, label=column)
    axes.set_xticks([50, 67, 78, 89])
    axes.invert_xaxis()
    axes.set_xlabel("query heads that are on for a token, %")
    axes.set_ylabel("loss above the base, nats a token")
    axes.grid(axis="y", color="#DDDDDD")
    axes.legend(loc="upper left")


def sparse_prefill(axes: Axes, methods: Results) -> None:
    looks = {
        "`sampled`": (BLUE, "o"),
        "`max_threshold`": (GREEN, "^"),
        "`block_topk`": (SKY, "P"),
        "`vertical_slash`": (ORANGE, "s"),
        "`flexprefill`": (PURPLE, "D"),
        "`tri_shape`": (VERMILION, "v"),
    }
    shares = [column.name for column in methods.columns[1:]]
    for row in methods.rows:
        color, marker = looks.get(row[0], ("#CCCCCC", "."))
        points = [[methods.number(row, share, key) for share in shares] for key in ("speed", "found")]
        label = row[0].replace("`", "") if row[0] in looks else None
        axes.plot(*points, color=color, marker=marker, lw=1.2, label=label, zorder=2 if label else 1)
    axes.plot([], [], color="#CCCCCC", marker=".", lw=1.2, label="the others")
    axes.set_xlabel("attention of a layer, times as fast as dense (each line: 40%, 20%, 10% of the blocks)")
    axes.set_ylabel("answers found in the\nrecall test, of 12")
    axes.set_ylim(0, 12.7)
    axes.grid(axis="y", color="#DDDDDD")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def sinks(axes: Axes, streamed: Results) -> None:
    names = ["window, no sinks", "window and 4 real sinks", "window and `kv_bias`", "window and `learned`"]
    full = streamed.row("full attention")
    for shift, (length, color) in enumerate((("1,024", BLUE), ("8,192", ORANGE))):
        column = f"nats, {length} tokens"
        base = streamed.number(full, column) or 0
        lost = [(streamed.number(streamed.row(name), column) or 0) - base for name in names]
        places = [place + (shift - 0.5) * 0.34 for place in range(len(names))]
        axes.barh(places, lost, height=0.32, color=color, label=f"texts of {length} tokens")
    axes.set_yticks(range(len(names)), [name.replace("`", "") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("loss above full attention, nats a token (left is better)")
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")


def healing(axes: Axes, routes: Results) -> None:
    base, start, *trained = routes.rows
    labels = [row[0].replace("`", "") for row in trained]
    for text, color, marker in ((HELD, BLUE, "o"), (NOVEL, ORANGE, "s")):
        name = text.replace("*", "")
        values = [routes.number(row, text) for row in trained]
        axes.scatter(values, range(len(trained)), color=color, marker=marker, s=42, label=name, zorder=2)
        axes.axvline(routes.number(base, text) or 0, color=color, ls=":", label=f"{name}: the base")
        axes.axvline(routes.number(start, text) or 0, color=color, ls="--", label=f"{name}: before training")
    axes.set_yticks(range(len(trained)), labels)
    axes.set_ylim(len(trained) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("loss after 10 minutes of training, nats a token (left is better)")
    axes.grid(axis="x", color="#DDDDDD")
    axes.legend(loc="upper center", bbox_to_anchor=(0.35, -0.18), ncols=2)


def healing_from_closed(axes: Axes, curves: Results) -> None:
    looks = {
        "`full`": (BLUE, "o"),
        "`lora`": (ORANGE, "s"),
        "`parts`": (GREEN, "^"),
        "`both`": (PURPLE, "D"),
        "`ce`": (GREY, "v"),
        "`layers first`, then `lora`": (VERMILION, "P"),
    }
    for row in curves.rows:
        color, marker = looks[row[0]]
        losses = [curves.number(row, f"{steps} steps") for steps in STEPS]
        axes.plot(STEPS, losses, color=color, marker=marker, label=row[0].replace("`", ""))
    axes.set_xscale("log")
    axes.set_xticks(STEPS, list(map(str, STEPS)))
    axes.minorticks_off()
    axes.set_xlabel("steps of 2,048 tokens")
    axes.set_ylabel("loss on a little held-out text,\nnats a token")
    axes.grid(axis="y", color="#DDDDDD")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


PLOTS = {
    "cost": Plot(
        cost,
        ("compare-smollm2",),
        "KL from the base against the KV cache at 8,192 tokens for eight recipes, and how many needles each keeps.",
        size=(8.0, 3.8),
    ),
    "cost-gemma": Plot(
        cost,
        ("compare-gemma",),
        "KL from the base against the KV cache at 8,192 tokens for the recipes that fit Gemma 3 270M.",
        size=(8.0, 3.4),
    ),
    "cost-mha": Plot(
        merges,
        ("compare-mha",),
        "KL from the base against the KV cache for merges to 4, 2 and 1 of 8 KV heads, mla and duo-attention.",
        size=(8.0, 3.6),
    ),
    "gqa": Plot(
        gqa,
        ("gqa-closed-form", "gqa-means"),
        "Loss above the base of several ways to merge three KV heads into one, on two texts.",
        size=(7.5, 5.0),
    ),
    "duo-attention": Plot(
        duo_attention,
        ("head-scores",),
        "Recall that is kept when 25%, 50% or 75% of the KV heads stream, by the score that chooses them.",
    ),
    "prune-heads": Plot(
        prune_heads, ("prune-heads",), "Loss above the base of removed heads, before and after the refit."
    ),
    "moh": Plot(moh, ("moh",), "Loss above the base against the share of the query heads that is on, by router."),
    "sparse-prefill": Plot(
        sparse_prefill, ("sparse-methods",), "Recall against speed of sparse prefill at three shares of the blocks."
    ),
    "sinks": Plot(sinks, ("sinks",), "Loss above full attention of windows without sinks and with four stand-ins."),
    "healing": Plot(
        healing, ("heal-routes",), "Loss after ten minutes of training by seven routes, on two texts.", (7.4, 4.4)
    ),
    "healing-from-closed": Plot(
        healing_from_closed,
        ("heal-closed-routes",),
        "Loss after 35, 70, 140 and 280 steps of training from the closed form, by six routes.",
        size=(7.4, 3.6),
    ),
}
