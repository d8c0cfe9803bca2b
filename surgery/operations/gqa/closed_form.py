"""KV heads of a loaded model shared in closed form: text, order of heads, which layers keep theirs, the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import refuse_non_finite, write_layers
from surgery.architecture.weights import pack
from surgery.data.passkeys import calibration_pieces, calibration_source
from surgery.errors import SurgeryError
from surgery.io.resume import LayerFiles
from surgery.operations.base import ApplyContext
from surgery.operations.gqa.choose_layers import LayerLosses, keep_layers
from surgery.operations.gqa.layer_inputs import FitSettings
from surgery.operations.gqa.merge import permute_kv_heads
from surgery.operations.gqa.streams import Sharing, layer_of

if TYPE_CHECKING:
    import torch

REVISION = 2  # of the fit: raised when the same settings give other weights, so that a resumed run mixes no two


def share_kv_heads(
    model,
    context: ApplyContext,
    text: tuple[str, int, int],
    settings: FitSettings,
    orders: list[Callable] | None = None,
    kept: int = 0,
) -> dict:
    """Convert a loaded model, in place, to the KV heads that `context.change` plans.

    Args:
        text: source, length and number of calibration pieces.
        orders: for each layer what gives the order of its KV heads, to be brought about first; None: they stay.
        kept: so many layers keep their KV heads: those that lose most by the conversion when it is theirs alone. Which
            they are is said in `context.after`.

    Returns:
        A record of each layer, by its path, and of the text.
    """
    _refuse_mps(model)
    what = "method: closed_form needs the tokenizer, for its calibration text"
    tokenizer = context.tokenizer_for(what, "gqa", "; or method: mean")
    before, after = context.before, context.change.after
    sequences = calibration_pieces(model, tokenizer, *text, context.folder, context.progress)
    heads = Heads(model, before, orders)

    def files(name: str) -> LayerFiles:
        counts = [layer.kv_heads for layer in after.layers]
        facts = [REVISION, settings, counts, heads.records, sequences.tolist()]
        return LayerFiles(context.folder, context.state_name(name), facts)

    alone: dict[int, tuple] = {}
    losses: list[dict] = [{} for _ in before.layers]
    try:
        heads.move()
        if kept:
            after = before.with_kv_heads(min(layer.kv_heads for layer in after.layers))
            known = files("gqa-alone")
            trial = LayerLosses(model, after.layers, sequences, settings, known.load, known.save)
            lost = trial.measure(context.progress)
            alone = {} if settings.sequential else trial.fits
            del trial  # with its streams and log-probabilities
            after = context.after = keep_layers(before, after, lost, kept)
            counts = [layer.kv_heads for layer in after.layers]
            losses = [{"lost_alone": round(x, 6), "kv_heads": n} for x, n in zip(lost, counts, strict=True)]
            heads.leave(after)
        known = files("gqa")
        run = Sharing(model, after.layers, sequences, settings, known.load, known.save, alone.get)
        results, found = run.layers(context.progress)
        for tensors, layer in zip(results, after.layers, strict=True):
            refuse_non_finite(tensors, layer.path)
        refuse_non_finite(run.mlps, "model")
    except BaseException:
        heads.leave()
        raise
    write_layers(model, before, after, results)
    _write_mlps(model, run.mlps)
    each = zip(before.layers, heads.records, losses, found, strict=True)
    told = {layer.path: order | loss | fitted for layer, order, loss, fitted in each if fitted or loss}
    return told | {"calibration": calibration_source(text[0]) | {"tokens": sequences.numel()}}


def _refuse_mps(model) -> None:
    if model.device.type == "mps":
        raise SurgeryError(
            "method: closed_form sums in float64, which MPS does not have",
            where=type(model).__name__,
            fix='model.to("cpu") for the conversion, or method: mean',
        )


def _write_mlps(model, weights: dict[str, torch.Tensor]) -> None:
    """Refitted output projections of MLPs, by parameter name; GPT-2 stores them transposed."""
    for name, weight in weights.items():
        old = model.get_parameter(name).data
        old.copy_(weight if weight.shape == old.shape else weight.T)


class Heads:
    """The KV heads of a model's layers, in the order in which they are to be shared.

    Args:
        orders: what gives the order of a layer's heads, for each; None: they are where they should be.

    Attributes:
        records: of each layer the new order.
    """

    def __init__(self, model, anatomy: Anatomy, orders: list[Callable] | None):
        self.model, self.anatomy = model, anatomy
        self.moved = orders is not None
        self.layers = [layer_of(model, facts) for facts in anatomy.layers] if orders else []  # copies
        self.records: list[dict] = [{} for _ in anatomy.layers]
        for record, order, layer in zip(self.records, orders or [], self.layers, strict=bool(orders)):
            record["kv_head_order"] = order(layer)

    def move(self) -> None:
        """Bring every layer's heads in its order; a layer without one gets the weights that it had."""
        if self.moved:
            both = zip(self.layers, self.records, strict=True)
            ordered = [permute_kv_heads(old, to["kv_head_order"]) if to else old for old, to in both]
            write_layers(self.model, self.anatomy, self.anatomy, [pack(layer) for layer in ordered])

    def leave(self, after: Anatomy | None = None) -> None:
        """Undo it in layers that keep their number of heads; without an argument in all."""
        layers = zip(self.anatomy.layers, (after or self.anatomy).layers, strict=True)
        for number, (old, new) in enumerate(layers):
            if old.kv_heads == new.kv_heads:
                self.records[number] = {}
        self.move()
