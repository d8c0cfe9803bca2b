"""Share the KV heads of a loaded model in closed form: order the heads, choose how many a layer keeps, convert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import write_layers
from surgery.architecture.weights import pack
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.calibration.closed_form.layerwise_fit import layer_of, write_mlps
from surgery.data.text import CalibrationText
from surgery.errors import ModelMismatchError
from surgery.io.printing import count as counted
from surgery.io.resume import LayerFiles
from surgery.operations.base import ApplyContext
from surgery.operations.gqa.heads_by_layer import choose_heads, kept_first, possible_numbers
from surgery.operations.gqa.layer import Sharing
from surgery.operations.gqa.lost_alone import LayerLosses
from surgery.operations.gqa.merge import permute_kv_heads

NEEDS = "method: closed_form needs the tokenizer, for its calibration text"
REVISION = 4  # raise it when a change of the fit gives other weights: a resumed run then mixes no two versions


def share_kv_heads(
    model,
    context: ApplyContext,
    text: CalibrationText,
    settings: FitSettings,
    orders: list[Callable] | None = None,
    candidates: Sequence[int] = (),
    copying: Callable[[], tuple[str, list[float]]] | None = None,
) -> dict:
    """Convert a loaded model, in place, to the KV heads that `context.change` plans.

    Args:
        text: the calibration text.
        orders: for each layer a function that gives the new order of its KV heads; None: the order stays. The heads
            are reordered before they are shared.
        candidates: numbers of KV heads among which each layer's is chosen, beside its own. Each layer whose number is
            open is converted alone with each of them. The sum over layers stays as planned, and `context.after` is set
            to the resulting anatomy. Empty: the plan's number holds for each layer.
        copying: returns the name of a score and each layer's strength in copying from far back. With it, the strongest
            layers keep all their heads, as far as the sum allows, and only the others are chosen by loss.

    Returns:
        A record of each layer, by its path, and of the text.

    Raises:
        SurgeryError: there is no tokenizer, the text is too short, or weights or losses are not finite.
    """
    before, after = context.before, context.change.after
    sequences, source = context.calibration(model, text, "gqa", NEEDS, "; or method: mean")
    heads = Heads(model, before, orders)

    def files(name: str, anatomy: Anatomy) -> LayerFiles:
        counts = [layer.kv_heads for layer in anatomy.layers]
        identity = [REVISION, settings, counts, heads.records, sequences.tolist()]
        return LayerFiles(context.folder, context.state_name(name), identity)

    fits, losses = dict[int, tuple](), [dict[str, Any]() for _ in before.layers]
    try:
        heads.reorder()
        if candidates:
            after, losses, fits = _choose(model, context, sequences, settings, files, candidates, copying)
            context.after = after
            heads.restore(after)
        layer_files = files("gqa", after)
        run = Sharing(model, after.layers, sequences, settings, layer_files.load, layer_files.save, fits.get)
        tensors_of_layers, records = run.layers(context.progress)
    except BaseException:
        heads.restore()
        raise
    write_layers(model, before, after, tensors_of_layers)
    write_mlps(model, run.mlps)
    each = zip(before.layers, heads.records, losses, records, strict=True)
    record = {layer.path: order | loss | fitted for layer, order, loss, fitted in each if fitted or loss}
    return record | {"calibration": source}


def _choose(
    model, context: ApplyContext, sequences, settings: FitSettings, files: Callable, candidates, copying
) -> tuple[Anatomy, list[dict], dict[int, tuple]]:
    """The anatomy after the choice, a record of each layer, and the fits of layers that were tried with their number.

    Args: as for `share_kv_heads`, and
        files: returns the files of a stage's state, by its name and the anatomy that it makes.
    """
    before = context.before
    first = _copying_first(before, context.change.after, candidates, copying)
    alone = _convert_alone(model, context, sequences, settings, first.trials(before), files)
    after, records = _chosen(before, first, {count: loss for count, (loss, _) in alone.items()})
    if settings.sequential:  # layers are then fitted to other inputs
        return after, records, {}
    counts = [layer.kv_heads for layer in after.layers]
    return after, records, {index: alone[n][1][index] for index, n in enumerate(counts) if n in alone}


def _convert_alone(
    model, context: ApplyContext, sequences, settings: FitSettings, trials: dict[int, Anatomy], files: Callable
) -> dict[int, tuple[list[float | None], dict[int, tuple]]]:
    """Convert each layer alone. Number of KV heads -> the loss of each layer with so many, or None where it was not
    tried, and the fits by layer.
    """
    alone, layers = {}, len(context.before.layers)
    for index, (count, anatomy) in enumerate(trials.items()):

        def report(done: int, _: int, label: str, first: int = index * layers) -> None:
            context.progress(first + done, len(trials) * layers, label)

        layer_files = files("gqa-alone" if len(trials) == 1 else f"gqa-alone-{count}", anatomy)
        trial = LayerLosses(model, anatomy.layers, sequences, settings, layer_files.load, layer_files.save)
        losses = trial.measure(context.progress and report)
        tried = (each for each in zip(losses, anatomy.layers, strict=True) if each[0] is not None)
        if broken := next((layer for loss, layer in tried if not isfinite(loss)), None):
            raise ModelMismatchError(
                f"with {counted(count, 'KV head')} in this layer alone, the model's outputs are not finite numbers",
                where=broken.path,
                fix="look for infinite weights with `surgery inspect`, or use method: mean",
            )
        alone[count] = losses, trial.fits
        del trial  # it holds hidden states and log-probabilities
    return alone


@dataclass(frozen=True)
class _First:
    """The choice before any loss is known.

    Attributes:
        numbers: layer -> the numbers of KV heads that it may have.
        total: KV heads of all layers.
        method: the score by which layers copy; "": none was measured.
        strengths: of each layer in copying; 0 without a score.
    """

    numbers: list[list[int]]
    total: int
    method: str
    strengths: list[float]

    def trials(self, before: Anatomy) -> dict[int, Anatomy]:
        """Each number of KV heads that is to be tried -> the anatomy where layers have it whose number is open."""
        own = before.layers[0].kv_heads
        tried = sorted({number for numbers in self.numbers if len(numbers) > 1 for number in numbers if number != own})
        return {
            number: before.with_kv_heads_by_layer(
                [number if number in numbers and len(numbers) > 1 else own for numbers in self.numbers]
            )
            for number in tried
        }


def _copying_first(before: Anatomy, planned: Anatomy, candidates: Sequence[int], copying: Callable | None) -> _First:
    """Which layers keep all their heads since they copy, and what the others may have."""
    total, own, layers = sum(layer.kv_heads for layer in planned.layers), before.layers[0].kv_heads, before.layers
    numbers = [*candidates, own]
    method, strengths = copying() if copying else ("", [0.0] * len(layers))
    kept = kept_first(strengths, own, numbers, total)
    others = possible_numbers(numbers, len(layers) - len(kept), total - own * len(kept))
    return _First([[own] if index in kept else others for index in range(len(layers))], total, method, strengths)


def _chosen(before: Anatomy, first: _First, losses: dict[int, list[float | None]]) -> tuple[Anatomy, list[dict]]:
    """The anatomy with as many KV heads as planned that loses least, and for each layer a record of the choice.

    Args:
        losses: number of KV heads -> the loss of each layer that alone has so many, None where it was not tried; empty
            where no loss decides.
    """
    lost = [
        {count: loss for count, of_count in losses.items() if (loss := of_count[index]) is not None}
        for index in range(len(before.layers))
    ]
    own, pairs = before.layers[0].kv_heads, zip(first.numbers, lost, strict=True)
    by_layer = [
        {count: 0.0 if count == own or len(numbers) == 1 else of_layer[count] for count in numbers}
        for numbers, of_layer in pairs
    ]
    chosen, records = choose_heads(by_layer, first.total), []
    for index, (count, of_layer) in enumerate(zip(chosen, lost, strict=True)):
        record: dict[str, Any] = {"kv_heads": count}
        if of_layer:
            record["lost_alone"] = round(of_layer[min(of_layer)], 6)
        if len(losses) > 1 and of_layer:
            record["lost_by_heads"] = {str(heads): round(loss, 6) for heads, loss in of_layer.items()}
        if first.method:
            record |= {"copying": round(first.strengths[index], 4), "copying_by": first.method}
        records.append(record)
    return before.with_kv_heads_by_layer(chosen), records


class Heads:
    """The KV heads of a model's layers, in the order in which they are to be shared.

    Args:
        orders: for each layer a function that gives the new order of its heads; None: the order stays.

    Attributes:
        records: for each layer its new order; {} where the order stays.
    """

    def __init__(self, model, anatomy: Anatomy, orders: list[Callable] | None):
        self.model, self.anatomy = model, anatomy
        self.reordered = orders is not None
        self.layers = [layer_of(model, layer) for layer in anatomy.layers] if orders else []  # copies
        self.records: list[dict] = [{} for _ in anatomy.layers]
        for record, order, layer in zip(self.records, orders or [], self.layers, strict=bool(orders)):
            record["kv_head_order"] = order(layer)

    def reorder(self) -> None:
        """Put the heads of every layer into the new order; a layer without one gets back its old weights."""
        if self.reordered:
            pairs = zip(self.layers, self.records, strict=True)
            ordered = [permute_kv_heads(old, record["kv_head_order"]) if record else old for old, record in pairs]
            write_layers(self.model, self.anatomy, self.anatomy, [pack(layer) for layer in ordered])

    def restore(self, after: Anatomy | None = None) -> None:
        """Restore the old order in layers that keep their number of heads, or in all layers if `after` is None."""
        layers = zip(self.anatomy.layers, (after or self.anatomy).layers, strict=True)
        for index, (old, new) in enumerate(layers):
            if old.kv_heads == new.kv_heads:
                self.records[index] = {}
        self.reorder()
