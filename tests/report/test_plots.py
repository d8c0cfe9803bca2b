"""Pictures are PNG files with something on them; without matplotlib there is one clear error."""

import sys

import pytest

from surgery.errors import MachineError, SurgeryError
from surgery.report.plots import curves, heat_maps

GRID = [[0.0, 1.0, float("nan")], [0.5, 0.25, 0.75]]
AXES = {"rows": [0, 1], "columns": ["a", "b", "c"], "row_label": "layer", "column_label": "head", "value_label": "x"}


def pixels(path):
    import matplotlib.image

    return matplotlib.image.imread(path)


def test_heat_maps_draw_every_panel_on_one_scale(tmp_path):
    one = heat_maps(tmp_path / "one.png", {"base": GRID}, **AXES)
    two = heat_maps(tmp_path / "two.png", {"base": GRID, "patched": GRID}, title="both", **AXES)
    assert one.read_bytes().startswith(b"\x89PNG")
    assert pixels(two).shape[1] > 1.5 * pixels(one).shape[1]
    assert pixels(one).std() > 0.05


def test_a_grid_where_nothing_was_measured_is_drawn(tmp_path):
    nothing = [[float("nan")] * 3] * 2
    assert heat_maps(tmp_path / "none.png", {"base": nothing}, **AXES).is_file()


def test_curves(tmp_path):
    path = curves(
        tmp_path / "c.png", {"a": ([1, 2, 4], [1.0, 1.2, 1.4])}, x_label="n", y_label="y", log_x=True, reference=1
    )
    assert pixels(path).std() > 0.02


def test_curves_in_colours_of_ones_own(tmp_path):
    lines, axes = {"a": ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])}, {"x_label": "", "y_label": ""}
    path = curves(tmp_path / "c.png", lines, styles={"b": {"color": "#ff0000", "marker": ""}}, **axes)
    shown = pixels(path)
    red = (shown[..., 0] > 0.9) & (shown[..., 1:3] < 0.1).all(-1)
    assert red.sum() > 300, "b's line"


def test_a_name_that_is_not_png_and_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SurgeryError, match="PNG"):
        heat_maps(tmp_path / "x.pdf", {"base": GRID}, **AXES)
    with pytest.raises(MachineError, match="cannot write"):
        heat_maps(tmp_path / "no" / "x.png", {"base": GRID}, **AXES)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SurgeryError, match="matplotlib") as caught:
        curves(tmp_path / "x.png", {"a": ([1], [1])}, x_label="", y_label="")
    assert "plot" in caught.value.fix
