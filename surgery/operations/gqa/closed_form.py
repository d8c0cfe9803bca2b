"""Share the KV heads of a loaded model in closed form: order the heads, choose the layers that keep them, convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import refuse_non_finite, write_layers
from surgery.architecture.weights import pack
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.calibration.closed_form.layerwise_fit import layer_of, write_mlps
from surgery.io.resume import LayerFiles
from surgery.operations.base import ApplyContext
from surgery.operations.gqa.choose_layers import LayerLosses, keep_layers
from surgery.operations.gqa.layer import Sharing
from surgery.operations.gqa.merge import permute_kv_heads

NEEDS = "method: closed_form needs the tokenizer, for its calibration text"
REVISION = 3  # raise it when a change of the fit gives other weights: a resumed run then mixes no two versions


def share_kv_heads(
    model,
    context: ApplyContext,
    text: tuple[str, int, int],
    settings: FitSettings,
    orders: list[Callable] | None = None,
    kept_layers: int = 0,
) -> dict:
    """Convert a loaded model, in place, to the KV heads that `context.change` plans.

    Args:
        text: source of the calibration text, tokens of a sample, and number of samples.
        orders: for each layer a function that gives the new order of its KV heads; None: the order stays. The heads
            are reordered before they are shared.
        kept_layers: how many layers keep their heads. They are the layers that lose most when converted alone;
            `context.after` is set to the resulting anatomy.

    Returns:
        A record of each layer, by its path, and of the text.

    Raises:
        SurgeryError: there is no tokenizer, the text is too short, or weights are not finite.
    """
    before, after = context.before, context.change.after
    sequences, source = context.calibration(model, text, "gqa", NEEDS, "; or method: mean")
    heads = Heads(model, before, orders)

    def files(name: str) -> LayerFiles:
        counts = [layer.kv_heads for layer in after.layers]
        identity = [REVISION, settings, counts, heads.records, sequences.tolist()]
        return LayerFiles(context.folder, context.state_name(name), identity)

    trial_fits, losses = dict[int, tuple](), [dict[str, Any]() for _ in before.layers]
    try:
        heads.reorder()
        if kept_layers:
            after = before.with_kv_heads(min(layer.kv_heads for layer in after.layers))
            layer_files = files("gqa-alone")
            trial = LayerLosses(model, after.layers, sequences, settings, layer_files.load, layer_files.save)
            layer_losses = trial.measure(context.progress)
            trial_fits = {} if settings.sequential else trial.fits
            del trial  # it holds hidden states and log-probabilities
            after = context.after = keep_layers(before, after, layer_losses, kept_layers)
            pairs = zip(layer_losses, after.layers, strict=True)
            losses = [{"lost_alone": round(loss, 6), "kv_heads": layer.kv_heads} for loss, layer in pairs]
            heads.restore(after)
        layer_files = files("gqa")
        run = Sharing(model, after.layers, sequences, settings, layer_files.load, layer_files.save, trial_fits.get)
        tensors_of_layers, records = run.layers(context.progress)
        for tensors, layer in zip(tensors_of_layers, after.layers, strict=True):
            refuse_non_finite(tensors, layer.path)
        refuse_non_finite(run.mlps, "model")
    except BaseException:
        heads.restore()
        raise
    write_layers(model, before, after, tensors_of_layers)
    write_mlps(model, run.mlps)
    each = zip(before.layers, heads.records, losses, records, strict=True)
    record = {layer.path: order | loss | fitted for layer, order, loss, fitted in each if fitted or loss}
    return record | {"calibration": source | {"tokens": sequences.numel()}}


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
