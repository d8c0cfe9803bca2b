"""Pictures are files with something on them, equal for equal data; without matplotlib there is one clear error."""

import sys

import pytest

from surgery.calibration.head_scores import HeadScores
from surgery.errors import MachineError, SurgeryError
from surgery.report.head_map import draw_heads, draw_recorded
from surgery.report.plots import Cells, Line, Panel, curves, heat_maps, ready

NAN = float("nan")
GRID = Cells([[0.0, 1.0, NAN], [0.5, 0.25, 0.75]])
AXES = {"rows": [0, 1], "columns": ["a", "b", "c"], "row_label": "layer", "column_label": "head", "value_label": "x"}
STEPS = Panel({"a": Line([1, 2, 4], [1.0, 1.2, 1.4])}, "y")


def pixels(path):
    import matplotlib.image

    return matplotlib.image.imread(path)


def share(path, colour: str) -> float:
    """Of a picture's pixels, how many have this colour."""
    import matplotlib.colors

    wanted = matplotlib.colors.to_rgb(colour)
    return float((abs(pixels(path)[..., :3] - wanted).max(-1) < 0.02).mean())


def test_heat_maps_draw_every_panel_on_one_scale(tmp_path):
    one = heat_maps(tmp_path / "one.png", {"base": GRID}, **AXES)
    two = heat_maps(tmp_path / "two.png", {"base": GRID, "converted": GRID}, title="both", **AXES)
    assert one.read_bytes().startswith(b"\x89PNG")
    assert pixels(two).shape[1] > 1.4 * pixels(one).shape[1]
    assert share(one, "#440154") > 0.02, "the lowest value, in viridis"
    assert share(one, "#fde725") > 0.02, "the highest"


def test_wide_maps_stand_one_below_the_other(tmp_path):
    axes = AXES | {"columns": range(30)}
    wide = Cells([[0.5] * 30, [0.1] * 30])
    one, two = (heat_maps(tmp_path / f"{n}.png", dict.fromkeys("ab"[:n], wide), **axes) for n in (1, 2))
    assert pixels(two).shape[0] > 1.3 * pixels(one).shape[0]
    assert pixels(two).shape[1] == pixels(one).shape[1]


def test_a_grid_where_nothing_was_measured_is_drawn(tmp_path):
    path = heat_maps(tmp_path / "none.png", {"base": Cells([[NAN] * 3] * 2)}, **AXES)
    assert share(path, "0.85") > 0.1


def test_texts_and_hatches_are_in_their_cells(tmp_path):
    flat = [[1.0] * 3] * 2
    texts, hatched = [["4/4"] * 3] * 2, [[True] * 3] * 2
    plain, written, crossed = (
        heat_maps(tmp_path / f"{name}.png", {"m": cells}, **AXES, limits=(0, 1), hatch_label="h")
        for name, cells in (("p", Cells(flat)), ("t", Cells(flat, texts)), ("h", Cells(flat, hatched=hatched)))
    )
    yellow = [share(path, "#fde725") for path in (plain, written, crossed)]
    assert yellow[0] > yellow[1] > yellow[2]
    svg = heat_maps(tmp_path / "t.svg", {"m": Cells(flat, texts, hatched)}, **AXES, hatch_label="in the window")
    assert "in the window" in svg.read_text(), "the legend, as a comment beside its outlines"


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_says_the_format_and_no_date_is_written(tmp_path, suffix, head):
    one, two = (curves(tmp_path / f"{name}{suffix}", STEPS, x_label="n", title="t") for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes().startswith(head)
    ready(one)


def test_curves(tmp_path):
    levels = Panel(STEPS.lines, "y", levels={"the gate": 1.3})
    path = curves(tmp_path / "c.png", [STEPS, levels], x_label="n", log_x=True)
    assert share(path, "#0072B2") > 0.001, "the first colour of Okabe and Ito"
    one = curves(tmp_path / "one.png", STEPS, x_label="n")
    assert pixels(path).shape[1] > 1.5 * pixels(one).shape[1], "a panel each"


def test_curves_in_colours_of_ones_own(tmp_path):
    lines = {"a": Line([1, 2, 3], [1, 2, 2]), "b": Line([1, 2, 3], [2, 1, 1], style={"color": "#ff0000"})}
    path = curves(tmp_path / "c.png", Panel(lines, ""), x_label="")
    shown = pixels(path)
    red = (shown[..., 0] > 0.9) & (shown[..., 1:3] < 0.1).all(-1)
    assert red.sum() > 300, "b's line"


def test_error_bars_reach_as_far_as_they_should(tmp_path):
    def height(ends) -> int:
        line = Line([1, 2], [1.0, 1.0], ends, {"color": "#ff0000", "marker": ""})
        frame = Panel({"_a": line, "frame": Line([1, 2], [0.0, 2.0], style={"color": "white"})}, "")
        shown = pixels(curves(tmp_path / "e.png", frame, x_label=""))
        red = (shown[..., 0] > 0.9) & (shown[..., 1:3] < 0.1).all(-1)
        rows = red.any(1).nonzero()[0]
        return rows.max() - rows.min()

    narrow, wide = height([(0.9, 1.1)] * 2), height([(0.6, 1.4)] * 2)
    assert wide == pytest.approx(4 * narrow, rel=0.15)


def test_what_is_not_above_zero_has_no_place_on_a_logarithmic_axis(tmp_path):
    panel = Panel({"a": Line([1, 2, 3], [0.0, 1e-3, 1e-1])}, "", log_y=True)
    assert share(curves(tmp_path / "l.png", panel, x_label=""), "#0072B2") > 0.0005


def test_settings_of_the_calling_program_stay(tmp_path):
    import matplotlib

    matplotlib.use("svg")
    before = dict(matplotlib.rcParams)
    curves(tmp_path / "c.png", STEPS, x_label="")
    assert dict(matplotlib.rcParams) == before


def test_names_in_letters_that_the_font_lacks(tmp_path, recwarn):
    curves(tmp_path / "x.png", Panel({"模型": Line([1, 2, 4], [1.0, 1.2, 1.4])}, "y"), x_label="x", title="出力")
    assert (tmp_path / "x.png").is_file()
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_another_suffix_and_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SurgeryError, match=r"\.png, \.svg or \.pdf") as caught:
        heat_maps(tmp_path / "x.jpeg", {"base": GRID}, **AXES)
    assert caught.value.fix == "x.png"
    with pytest.raises(MachineError, match="cannot write"):
        heat_maps(tmp_path / "no" / "x.png", {"base": GRID}, **AXES)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SurgeryError, match="matplotlib") as caught:
        curves(tmp_path / "x.png", STEPS, x_label="")
    assert "plot" in caught.value.fix


def test_a_head_map_has_layers_from_left_to_right(tmp_path):
    numbers = [range(2)] * 12
    scores = HeadScores("far-mass", [[0.0, 1.0]] * 12)
    path = draw_heads(tmp_path / "h.png", numbers, streaming=[[0]] * 12, scores=scores)
    shown = pixels(path)
    assert shown.shape[1] > 1.2 * shown.shape[0]
    purple, yellow = (
        (abs(shown[..., :3] - [*c]).max(-1) < 0.03) for c in ((0.267, 0.005, 0.329), (0.993, 0.906, 0.144))
    )
    top = shown.shape[0] // 3
    assert purple[:top].sum() > 1000, "head 0, which scored 0, is on top"
    assert yellow[:top].sum() < yellow[top:].sum()
    svg = draw_heads(
        tmp_path / "h.svg", numbers, name="m", streaming=[[0]] * 12, sees="4 sinks + 9 tokens"
    ).read_text()
    assert "m: 12 of 24 KV heads stream" in svg
    assert "streams: sees 4 sinks + 9 tokens" in svg
    of_queries = HeadScores("retrieval", [[0.0, 1.0]] * 12, per="heads")
    svg = draw_heads(tmp_path / "q.svg", numbers, scores=of_queries).read_text()
    assert "24 query heads by their retrieval score" in svg
    assert "KV head" not in svg


def test_a_recorded_split_is_drawn_where_its_heads_are_as_they_were(tmp_path):
    split = {"op": "duo_attention", "record": {"streaming": [[0], []], "scores": {"scores": [[0.1, 0.9]] * 2}}}
    record = {"operations": [split], "recipe": {"operations": [{"sinks": 4, "window": 9}]}, "base": {"name": "b"}}
    assert draw_recorded(record, tmp_path)
    assert (tmp_path / "heads.png").stat().st_size > 5000
    (tmp_path / "heads.png").unlink()
    for other in ([], [split, {"op": "prune_heads"}], [{"op": "gqa", "record": {}}]):
        assert not draw_recorded(record | {"operations": other}, tmp_path)
    assert not draw_recorded({}, tmp_path)
    assert not (tmp_path / "heads.png").exists()
