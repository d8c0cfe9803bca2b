"""Pictures as files (.png, .svg, .pdf): heat maps and curves. Needs the `plot` extra (matplotlib).

Nothing is shown on a screen, and the calling program's matplotlib settings do not change, because figures are made
without pyplot. Heat maps use viridis. Curves use the colours of Okabe and Ito, which most people with a colour vision
deficiency can tell apart, and different markers. The same record always gives the same bytes: no date is written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from surgery.errors import MachineError, SurgeryError
from surgery.io.files import refuse_unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito 2008, "Color Universal Design"; yellow is left out because it is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
MARKED = 40  # most points of a curve with markers; a longer curve has none
STYLE = {
    "font.size": 10.0, "axes.titlesize": 10.5, "axes.labelsize": 10.0, "xtick.labelsize": 9.0, "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0, "figure.titlesize": 12.0, "hatch.linewidth": 0.9, "svg.hashsalt": "surgery",
    "pdf.fonttype": 42, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
UNDATED: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None}
}  # fmt: skip
HATCH = "////"
WIDEST, TALLEST = 13.0, 9.0  # largest width and height of one heat map's cells, in inches
BESIDE = 5.5  # inches; wider heat maps are stacked, narrower ones are side by side
TICKS = 24  # most labels on an axis of a heat map
LETTER = 0.095  # inches that a letter of a title takes
APART = 1.03  # factor between the error bars of two curves at one x, on a logarithmic axis


@dataclass(frozen=True)
class Cells:
    """One heat map.

    Attributes:
        values: [rows][columns]; NaN is drawn grey (not measured, or no such cell).
        texts: [rows][columns], the text in each cell, or None.
        hatched: [rows][columns], whether each cell is hatched, or None.
    """

    values: Sequence[Sequence[float]]
    texts: Sequence[Sequence[str]] | None = None
    hatched: Sequence[Sequence[bool]] | None = None


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        x, y: the coordinates of its points.
        ends: the lowest and highest value for each y, drawn as an error bar; None: no bars.
        style: matplotlib settings for the curve (color, linestyle, marker, ...).
    """

    x: Sequence[float]
    y: Sequence[float]
    ends: Sequence[tuple[float, float]] | None = None
    style: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Curves that share one y axis.

    Attributes:
        lines: name in the legend -> curve.
        y_label: what the axis shows, with its unit.
        title: title of the panel.
        levels: name in the legend -> height of a dashed horizontal line (a gate's limit, 1 for ratios).
        log_y: use a logarithmic y axis; points that are not above 0 are left out.
    """

    lines: Mapping[str, Line]
    y_label: str
    title: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)
    log_y: bool = False


@dataclass(frozen=True)
class Point:
    """A labelled point; `filled`: whether its marker is."""

    x: float
    y: float
    filled: bool = True


def points(
    path: str | Path,
    marks: Mapping[str, Point],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    kinds: tuple[str, str] | None = None,
) -> Path:
    """Draw labelled points, both axes from 0.

    Args:
        path: the file to write, .png, .svg or .pdf.
        marks: label -> point.
        kinds: what a filled marker means and what a hollow one, for the legend; None: no legend.

    Raises:
        SurgeryError, MachineError: as for `heat_maps`.
    """
    _require(path)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _figure((7.4, 4.8))
        axis = figure.subplots()
        for number, (label, point) in enumerate(marks.items()):
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(
                point.x, point.y, MARKERS[number % len(MARKERS)], color=colour, markersize=8,
                markerfacecolor=colour if point.filled else "white", markeredgewidth=1.6, clip_on=False,
            )  # fmt: skip
            axis.annotate(label, (point.x, point.y), xytext=(8, 5), textcoords="offset points", fontsize=9)
        axis.set_xlim(0, 1.18 * max([1.0, *(point.x for point in marks.values())]))
        axis.set_ylim(0, 1.15 * max([point.y for point in marks.values()] or [1.0]) or 1.0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if kinds:
            for word, face in zip(kinds, ("black", "white"), strict=True):
                axis.plot([], [], "o", color="black", markerfacecolor=face, label=word)
            axis.legend(loc="best", framealpha=0.85)
        return _write(figure, path, title)


def heat_maps(
    path: str | Path,
    panels: Mapping[str, Cells],
    *,
    rows: Sequence,
    columns: Sequence,
    row_label: str,
    column_label: str,
    value_label: str,
    title: str = "",
    limits: tuple[float, float] | None = None,
    hatch_label: str = "",
) -> Path:
    """Draw heat maps of the same shape on one colour scale.

    Args:
        path: the file to write, .png, .svg or .pdf.
        panels: title of each map -> its cells.
        rows, columns: labels of the axes' ticks; the first row is on top.
        value_label: what a colour means; "": no colour scale is drawn.
        title: title of the picture.
        limits: values of the lowest and the highest colour; default: the range of the values.
        hatch_label: what a hatched cell means.

    Raises:
        SurgeryError: matplotlib is not installed, or the file name has another suffix.
        MachineError: the file cannot be written.
    """
    _require(path)
    import matplotlib

    values = [x for panel in panels.values() for row in panel.values for x in row if not math.isnan(x)]
    low, high = limits or (min(values, default=0.0), max(values, default=1.0))
    longest = max([len(text) for panel in panels.values() for row in panel.texts or () for text in row], default=0)
    width = min(WIDEST, max(2.2, max(0.3, 0.11 * longest + 0.12) * len(columns)))
    height = min(TALLEST, max(0.9, 0.3 * len(rows)))
    stacked = width > BESIDE
    grid = (len(panels), 1) if stacked else (1, len(panels))
    with matplotlib.rc_context(STYLE):
        figure = _figure((max(width * grid[1] + 1.9, LETTER * len(value_label)), (height + 0.85) * grid[0] + 1.1))
        axes = figure.subplots(*grid, squeeze=False)
        image = None
        for index, (axis, (name, cells)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
            image = _cells(axis, cells, (low, high), min(width / len(columns), height / len(rows)))
            axis.set_title(name)
            _ticks(axis.set_xticks, columns)
            _ticks(axis.set_yticks, rows)
            if not stacked or index == len(panels) - 1:
                axis.set_xlabel(column_label)
            if stacked or not index:
                axis.set_ylabel(row_label)
        flat = height * grid[0] < 2.5  # a vertical colour bar would be too short for its label
        shape = {"location": "bottom", "shrink": 0.5, "aspect": 40} if flat else {"location": "right"}
        if value_label:
            figure.colorbar(image, ax=axes.ravel().tolist(), label=value_label, **shape)
        _explain(figure, panels, hatch_label)
        return _write(figure, path, title)


def curves(
    path: str | Path, panels: Sequence[Panel] | Panel, *, x_label: str, title: str = "", log_x: bool = False
) -> Path:
    """Draw curves in one panel, or in several side by side whose x axes have the same meaning.

    Args:
        path: the file to write, .png, .svg or .pdf.
        title: title of the picture.
        log_x: use a logarithmic x axis with a tick at each value.

    Raises:
        SurgeryError, MachineError: as for `heat_maps`.
    """
    _require(path)
    import matplotlib

    panels = [panels] if isinstance(panels, Panel) else [*panels]
    many = max(len(panel.lines) + len(panel.levels) for panel in panels) > len(COLOURS)
    with matplotlib.rc_context(STYLE):
        figure = _figure(((8.6 if many else 6.2) * len(panels) ** 0.85, 4.4))
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _curves(axis, panel, APART if log_x else 1.0)
            axis.set_xlabel(x_label)
            if not log_x:
                axis.xaxis.set_major_formatter("{x:,g}")
            else:
                _log_ticks(axis, sorted({value for line in panel.lines.values() for value in line.x}))
            if len(panel.lines) + len(panel.levels) > 1:
                where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {"loc": "best"}
                axis.legend(handlelength=3, framealpha=0.85, **where)
        return _write(figure, path, title)


def ready(path: str | Path) -> None:
    """Verify before a long measurement that its picture can be drawn and written.

    Raises:
        SurgeryError: the name has another ending, is of a folder, or lies in none; or matplotlib is not installed.
        MachineError: the folder takes no files.
    """
    _require(path)
    refuse_unwritable(Path(path), "the picture")


def _require(path: str | Path) -> None:
    if Path(path).suffix.lower() not in SUFFIXES:
        what = f"a picture's name ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise SurgeryError(what, where=str(path), fix=f"{Path(path).stem or 'picture'}.png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SurgeryError(
            "drawing needs matplotlib", where=str(path), fix="pip install 'attention-surgery[plot]'"
        ) from None


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _cells(axis: Axes, cells: Cells, limits: tuple[float, float], size: float):
    """Draw one heat map; `size`: inches of a cell's shorter side."""
    import matplotlib
    from matplotlib.patches import Rectangle

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    image = axis.imshow(
        [*map(list, cells.values)],
        aspect="auto",
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",
    )
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    for row, values in enumerate(cells.values):
        for column, value in enumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value)) if not math.isnan(value) else (0.85, 0.85, 0.85, 1)
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
            if cells.hatched and cells.hatched[row][column]:
                corner = (column - 0.5, row - 0.5)
                axis.add_patch(
                    Rectangle(corner, 1, 1, fill=False, hatch=HATCH, edgecolor=ink, linewidth=0, alpha=0.75)
                )
            if cells.texts and cells.texts[row][column]:
                box = {"facecolor": image.cmap(image.norm(value)), "edgecolor": "none", "pad": 1.0}
                axis.text(column, row, cells.texts[row][column], ha="center", va="center", color=ink, bbox=box)
    if size > 0.09:  # white borders, unless the cells are too small for them
        axis.set_xticks([x - 0.5 for x in range(1, len(cells.values[0]))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(cells.values))], minor=True)
        axis.grid(which="minor", color="white", linewidth=min(1.5, 6 * size))
        axis.tick_params(which="minor", length=0)
    return image


def _ticks(set_ticks, labels: Sequence) -> None:
    step = math.ceil(len(labels) / TICKS)
    if step > 2:  # 0, 5, 10, ... are read more easily than 0, 4, 8, ...
        step = 5 * math.ceil(step / 5)
    set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])


def _explain(figure: Figure, panels: Mapping[str, Cells], hatch_label: str) -> None:
    """Add a legend for hatched and grey cells, if there are any."""
    from matplotlib.patches import Patch

    signs = []
    if hatch_label and any(any(map(any, cells.hatched)) for cells in panels.values() if cells.hatched):
        signs.append(Patch(facecolor="white", edgecolor="0.3", hatch=HATCH, label=hatch_label))
    if any(math.isnan(value) for cells in panels.values() for row in cells.values for value in row):
        signs.append(Patch(facecolor="0.85", label="nothing was measured"))
    if signs:
        figure.legend(handles=signs, loc="outside lower center", ncols=len(signs), frameon=False)


def _curves(axis: Axes, panel: Panel, apart: float) -> None:
    """Draw a panel. `apart`: factor on x between the error bars of two curves, which would otherwise overlap."""
    for index, (label, line) in enumerate(panel.lines.items()):
        own: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            # When the colours repeat, the dashes change. Two points get no line: they show no course.
            "linestyle": DASHES[index // len(COLOURS) % len(DASHES)] if len(line.x) > 2 else "",
            "marker": MARKERS[index % len(MARKERS)] if len(line.x) <= MARKED else "",
            "markersize": 5.5,
        }
        own |= {"label": label} | dict(line.style)
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y > 0 or not panel.log_y]
        x, y = zip(*points, strict=True) if points else ((), ())
        if line.ends is None:
            axis.plot(x, y, **own)
        else:
            below, above = zip(
                *((at - low, high - at) for at, (low, high) in zip(y, line.ends, strict=True)), strict=True
            )
            shift = apart ** (index - (len(panel.lines) - 1) / 2)
            axis.errorbar([at * shift for at in x], y, yerr=(below, above), capsize=3.5, **own)
    for index, (label, height) in enumerate(panel.levels.items()):
        axis.axhline(height, color="0.35", linestyle=("--", "-.", ":")[index % 3], linewidth=1.2, label=label)
    if panel.log_y:
        axis.set_yscale("log")
    axis.set_ylabel(panel.y_label)
    axis.set_title(panel.title)
    axis.grid(alpha=0.3)


def _log_ticks(axis: Axes, values: Sequence[float]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:,g}" for value in values])
    axis.minorticks_off()
    if len(values) > 1:
        axis.set_xlim(values[0] / 1.15, values[-1] * 1.15)


def _write(figure: Figure, path: str | Path, title: str) -> Path:
    if title:
        letters = int(figure.get_figwidth() / LETTER)
        figure.suptitle("\n".join(part for line in title.split("\n") for part in wrap(line, letters)))
    suffix = Path(path).suffix.lower()
    try:
        with warnings.catch_warnings():  # a letter of a name that the font lacks is drawn as a box
            warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
            figure.savefig(path, dpi=150, format=suffix[1:], metadata=UNDATED[suffix])
    except OSError as error:
        raise MachineError(f"cannot write the picture: {error.strerror}", where=str(path)) from error
    return Path(path)
