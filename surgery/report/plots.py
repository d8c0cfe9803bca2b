"""Pictures as PNG files: heat maps and curves. Needs the `plot` extra (matplotlib); nothing is shown on a screen."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import MachineError, SurgeryError

COLOURS = 10  # that matplotlib gives curves before it begins again


def heat_maps(
    path: str | Path,
    panels: dict[str, Sequence[Sequence[float]]],
    *,
    rows: Sequence,
    columns: Sequence,
    row_label: str,
    column_label: str,
    value_label: str,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Path:
    """Heat maps side by side on one colour scale.

    Args:
        path: the file to write, .png.
        panels: title of each map -> values [rows][columns]; NaN is drawn grey (nothing was measured there).
        rows, columns: labels of the axes' ticks, first row on top.
        limits: lowest and highest value of the colours; default: those of the values.

    Raises:
        SurgeryError: matplotlib is not installed, or the name does not end in .png.
        MachineError: the file cannot be written.
    """
    plt, values = _pyplot(path), [x for grid in panels.values() for row in grid for x in row if not math.isnan(x)]
    low, high = limits or (min(values, default=0.0), max(values, default=1.0))
    width, height = max(3.2, 0.32 * len(columns) + 1.6), max(2.4, 0.2 * len(rows) + 1.2)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width * len(panels) + 0.8, height), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("viridis").with_extremes(bad="0.8")
    for axis, (name, grid) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axis.set_title(name, fontsize=10)
        for set_ticks, labels in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
            step = math.ceil(len(labels) / 24)
            set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]], fontsize=7)
        axis.set_xlabel(column_label)
    axes[0][0].set_ylabel(row_label)
    figure.colorbar(image, ax=axes[0].tolist(), label=value_label)
    return _write(plt, figure, path, title)


def curves(
    path: str | Path,
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    reference: float | None = None,
    reference_label: str | None = None,
    styles: dict[str, dict] | None = None,
) -> Path:
    """Curves in one picture.

    Args:
        path: the file to write, .png.
        lines: label -> (x, y).
        reference: height of a dashed line (1.0 for ratios), and what the legend calls it.
        styles: label -> matplotlib's settings of that curve (color, linestyle, marker, ...).

    Raises:
        as `heat_maps`.
    """
    plt = _pyplot(path)
    many = len(lines) > COLOURS
    figure, axis = plt.subplots(figsize=(8.6 if many else 6.4, 4.0), layout="constrained")
    for index, (label, (x, y)) in enumerate(lines.items()):
        own = {"marker": "os^D"[index // COLOURS % 4] if len(x) < 40 else "", "label": label}
        own["linestyle"] = ("-", "--", ":", "-.")[index // COLOURS % 4]  # colours begin again
        axis.plot(x, y, **own | (styles or {}).get(label, {}))
    if reference is not None:
        axis.axhline(reference, color="0.5", linestyle="--", linewidth=1, label=reference_label)
    if log_x:
        ticks = sorted({value for x, _ in lines.values() for value in x})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        legend_position = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
        axis.legend(fontsize=8, handlelength=3, **legend_position)
    return _write(plt, figure, path, title)


def ready(path: str | Path) -> None:
    """Find out before a long measurement whether its picture can be drawn; raises as `heat_maps`."""
    _pyplot(path)
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise MachineError("cannot write the picture: no such folder", where=str(folder))
    if not os.access(folder, os.W_OK):
        raise MachineError("cannot write the picture: Permission denied", where=str(path))


def _pyplot(path: str | Path):
    if Path(path).suffix.lower() != ".png":
        raise SurgeryError("pictures are PNG files", where=str(path), fix="a name that ends in .png")
    try:
        import matplotlib
    except ImportError:
        raise SurgeryError(
            "drawing needs matplotlib", where=str(path), fix="pip install 'attention-surgery[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _write(plt, figure, path: str | Path, title: str) -> Path:
    if title:
        figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise MachineError(f"cannot write the picture: {error.strerror}", where=str(path)) from error
    finally:
        plt.close(figure)
    return Path(path)
