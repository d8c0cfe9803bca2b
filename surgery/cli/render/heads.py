"""The heads of a model as a map, layer by layer: the score of each, and which of them stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from surgery.architecture.layer import groups_of
from surgery.calibration.head_scores import KINDS
from surgery.cli.render.console import console
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from surgery.architecture.layer import LayerAnatomy
    from surgery.calibration.head_scores import HeadScores

FULL, STREAMING, NONE = "#", "·", " "
LAYERS = 60  # in one line, so that the map of a large model fits a terminal
SHADES = ("grey35", "grey42", "grey50", "grey58", "grey66", "dark_goldenrod", "gold3", "orange3", "dark_orange", "red")


@dataclass(frozen=True)
class HeadMap:
    """The KV heads or query heads of a model, with their split and their scores as far as they are known.

    Attributes:
        name: the name of the model, or "".
        numbers: the heads of each layer, in the order in which they are stored; each by its index in the base.
        streaming: the heads of each layer that see only sinks + window; None where no split was made.
        sees: what streaming heads see ("16 sinks + 240 tokens"), or "".
        scores: the scores of the heads, in the order of `numbers`, or None.
        per: which heads: "kv_heads" or "heads" (query heads). A query head streams if its KV head does.
    """

    name: str
    numbers: list[list[int]]
    streaming: list[list[int]] | None = None
    sees: str = ""
    scores: HeadScores | None = None
    per: str = "kv_heads"

    @property
    def kind(self) -> str:
        """The kind of the heads, in words."""
        return KINDS[self.per]

    @classmethod
    def of_scores(cls, scores: HeadScores) -> HeadMap:
        """The map of a score file."""
        name = (scores.origin.get("model") or {}).get("name") or ""
        return cls(name, [list(range(len(row))) for row in scores.scores], scores=scores, per=scores.per or "kv_heads")

    @classmethod
    def of_model(cls, model: str, file: Path | None = None) -> HeadMap:
        """The map of a model by name: its split, and the scores of its heads from a file or from its surgery.json.

        Raises:
            SurgeryError: there is neither a split nor a score.
        """
        from surgery.architecture.anatomy import Anatomy
        from surgery.calibration.head_scores import load_scores, recorded_scores
        from surgery.io.hub import resolve
        from surgery.io.safetensors import header_table

        source = resolve(model, weights=False)
        anatomy = Anatomy.of(source.path, header_table(source.headers))
        counts = [layer.kv_heads for layer in anatomy.layers]
        scores = load_scores(file, anatomy, KINDS) if file else recorded_scores(source.path, counts)
        if not anatomy.surgical and scores is None:
            raise SurgeryError(
                "this model's heads are not split, and no scores of them are known",
                where=source.name,
                fix=f"surgery score {model} -o scores.json, then --scores scores.json",
            )
        per = "kv_heads"
        if scores is not None and (scores.per == "heads" or [len(row) for row in scores.scores] != counts):
            per = "heads"
        numbers = [_numbers(layer, per, range(layer.kv_heads)) for layer in anatomy.layers]
        streaming = None
        if anatomy.surgical:
            streaming = [_numbers(layer, per, layer.streaming) for layer in anatomy.layers]
        sees = {(layer.sinks, layer.streaming_window) for layer in anatomy.layers if layer.streaming}
        reach = " or ".join(f"{sinks} sinks + {window} tokens" for sinks, window in sorted(sees))
        return cls(source.name, numbers, streaming, reach, scores, per)

    def to_dict(self) -> dict:
        """Plain data, for `--json`."""
        layers = []
        for layer, numbers in enumerate(self.numbers):
            entry = {"layer": layer, self.per: len(numbers), "numbers": numbers}
            if self.streaming is not None:
                entry["streaming"] = self.streaming[layer]
            if self.scores is not None:
                entry["scores"] = self.scores.scores[layer]
            layers.append(entry)
        origin = {"method": self.scores.method, "origin": self.scores.origin} if self.scores else {}
        return {"model": self.name, **({"sees": self.sees} if self.sees else {}), **origin, "layers": layers}


def _numbers(layer: LayerAnatomy, per: str, kv_heads: Iterable[int]) -> list[int]:
    """These KV heads of a layer, or the query heads that read them, by the base's numbers."""
    if per == "kv_heads":
        return [layer.kv_name(head) for head in kv_heads]
    groups = groups_of(layer)
    return [layer.query_name(head) for kv_head in kv_heads for head in groups[kv_head]]


def show(head_map: HeadMap) -> None:
    """Print the map: a column for each layer, a row for each head."""
    out, total = console(), sum(map(len, head_map.numbers))
    if head_map.streaming is not None:
        count, sees = sum(map(len, head_map.streaming)), head_map.sees or "none do"
        out.print(f"{count} of {total} {head_map.kind} stream ({STREAMING}: {sees}), {FULL} see all")
        cells = {
            (layer, head): (STREAMING, "cyan") if head in head_map.streaming[layer] else (FULL, "bold")
            for layer, heads in enumerate(head_map.numbers)
            for head in heads
        }
        _grid(out, len(head_map.numbers), cells)
    if head_map.scores is not None:
        first = " (the first to stream)" if head_map.per == "kv_heads" else ""
        which = f"tenth in which each of {total} {head_map.kind} lies"
        out.print(f"{head_map.scores.method}: {which}, 0 lowest{first}, 9 highest")
        tenths = tenth_of(head_map.scores.scores)
        cells = {(layer, head_map.numbers[layer][index]): (str(n), SHADES[n]) for (layer, index), n in tenths.items()}
        _grid(out, len(head_map.numbers), cells)
        _show_origin(out, head_map.scores)


def tenth_of(scores: list[list[float]]) -> dict[tuple[int, int], int]:
    """(layer, head) -> 0 to 9: which tenth of all heads it is in, ordered as `choose_streaming` orders them."""
    order = sorted((x, layer, head) for layer, row in enumerate(scores) for head, x in enumerate(row))
    return {(layer, head): 10 * rank // len(order) for rank, (_, layer, head) in enumerate(order)}


def _show_origin(out, scores: HeadScores) -> None:
    flat = sorted(x for row in scores.scores for x in row)
    out.print(f"scores from {flat[0]:.4g} to {flat[-1]:.4g}, median {flat[len(flat) // 2]:.4g}")
    origin = scores.origin
    if "undecided" in origin:
        out.print(f"gates between 0.1 and 0.9 at the end: {origin['undecided']:.0%} (their rounding is arbitrary)")
    if "answered" in origin:
        out.print(f"the model's own answers: {origin['answered']:.0%} of the tokens right")
    if origin.get("left_out"):
        out.print(f"left out, since the model fails them: {origin['left_out']} of {origin['passkeys']} passkeys")


def show_above(above: dict, kind: str) -> None:
    """Print how many heads score above a threshold, and the highest of them (`HeadScores.above`)."""
    out = console()
    out.print(f"above {above['threshold']:g}: {above['above']} of {above['of']} {kind} ({above['share']:.1%})")
    shown = [f"layer {head['layer']} head {head['head']} ({head['score']:.2f})" for head in above["top"]]
    if shown:
        rest = above["above"] - len(shown)
        out.print(f"the highest: {', '.join(shown)}{f' and {rest} more' if rest else ''}", soft_wrap=True)


def _grid(out, count: int, cells: dict[tuple[int, int], tuple[str, str]]) -> None:
    """Print `cells`, (layer, head) -> (sign, style), for `count` layers; removed heads are left blank."""
    for first in range(0, count, LAYERS):
        layers = range(first, min(first + LAYERS, count))
        ticks = "".join(f"{layer:<10}" for layer in layers if layer % 10 == 0)
        out.print(f"{'layer':<9}{ticks[: len(layers)]}".rstrip())
        for head in range(1 + max(head for layer, head in cells if layer in layers)):
            line = Text(f"head {head:<4}")
            for layer in layers:
                line.append(*cells.get((layer, head), (NONE, "")))
            out.print(line)


def draw(head_map: HeadMap, path: Path) -> list[Path]:
    """Draw the map as a heat map, and the losses of the method `gates` as NAME-loss in the same folder.

    Returns:
        The files written.
    """
    from surgery.report.head_map import draw_heads
    from surgery.report.plots import Line, Panel, curves

    scores = head_map.scores
    files = [
        draw_heads(
            path,
            head_map.numbers,
            name=head_map.name,
            streaming=head_map.streaming,
            sees=head_map.sees,
            scores=replace(scores, per=head_map.per) if scores else None,
        )
    ]
    if scores and (losses := scores.origin.get("losses")):
        steps = range(1, len(losses) + 1)
        distance, gates = ([loss[column] for loss in losses] for column in (0, 1))
        panels = [
            Panel({"distance": Line(steps, distance)}, "distance of the answers' hidden states", "loss", log_y=True),
            Panel({"gate": Line(steps, gates)}, "mean gate, 0 to 1", "gates: how many heads would see all"),
        ]
        title = f"{head_map.name}: learning which KV heads need the past"
        files.append(curves(path.with_name(f"{path.stem}-loss{path.suffix}"), panels, x_label="step", title=title))
    return files


def written(files: list[Path]) -> None:
    """Print the name of each file that was written."""
    for file in files:
        console().print(f"wrote {file}")
