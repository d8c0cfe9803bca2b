"""The layer-by-layer refit of output projections on a calibration text, when heads are removed.

Each layer gets the output of the pruned layers before it. The second moments Σ z zᵀ of its heads' outputs, in float64
[H d, H d], determine the new projection in closed form. From the kept heads it comes nearest to the output of the old
projection from all heads, on the same input. If the projection has a bias, the bias takes over the mean contribution
of the removed heads, and the differences from the means are fitted. Memory: see `layerwise`, plus two such matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import unpack
from surgery.calibration.layerwise import Layerwise
from surgery.calibration.moments import Moments, refit_output
from surgery.machine.offload import bring
from surgery.machine.placement import exact
from surgery.machine.progress import begin
from surgery.operations.prune_heads.select import lost_share


@dataclass(frozen=True)
class Refitted:
    """The output projection of a layer's kept heads.

    Attributes:
        weight: [D, kept heads, d], float64.
        shift: [D], float64, to be added to the bias; None if the projection has no bias.
        lost: share of the attention output's energy that the pruned layer loses on this text, {"pruned": with the old
            weights, "refitted": with the new weights}.
    """

    weight: torch.Tensor
    shift: torch.Tensor | None
    lost: dict[str, float]


def refit(
    model, anatomy: Anatomy, removed: list[list[int]], sequences: torch.Tensor, ridge: float, progress=None
) -> list[Refitted | None]:
    """New output projections of the kept heads; the model is not changed.

    Args:
        anatomy: the model's anatomy.
        removed: for each layer, the query heads that will be removed.
        sequences: tokens, long [samples, length].
        ridge: see `moments.refit_output`.
        progress: called with done, total and a label.

    Returns:
        A `Refitted` for each layer; None where no head is removed.
    """
    training = [(module, module.training) for module in model.modules()]
    fits: list[Refitted | None] = []
    try:
        model.eval()
        with torch.no_grad():
            run = Layerwise(model, anatomy, sequences)
            last = max((index for index, removed_heads in enumerate(removed) if removed_heads), default=-1)
            begin(progress, "refitting output projections", len(removed))
            for layer, removed_heads in zip(anatomy.layers, removed, strict=True):
                fits.append(_refit_layer(model, layer, removed_heads, run, ridge) if removed_heads else None)
                if layer.index < last:
                    _advance(run, layer, removed_heads, fits[-1])
                if progress:
                    progress(layer.index + 1, len(removed), "refitting output projections")
    finally:
        for module, mode in training:
            module.training = mode
    return fits


def moments_of(rows) -> Moments:
    """Σ z zᵀ and Σ z in float64, over an iterable of samples [rows, n]."""
    moments = Moments()
    for sample in rows:
        moments.add(sample)
    return moments


def _refit_layer(model, layer, removed_heads: list[int], run: Layerwise, ridge: float) -> Refitted:
    bring(model, run.blocks[layer.index])
    module = model.get_submodule(layer.path)
    tensors = {name: module.get_parameter(name) for name in layer.tensor_names}
    full = exact(unpack(layer, tensors).o.detach()).flatten(1)  # [D, H d]
    kept_heads = [head for head in range(layer.heads) if head not in removed_heads]
    moments = moments_of(run.heads(layer.index))
    channels = torch.tensor([head * layer.head_dim + i for head in kept_heads for i in range(layer.head_dim)])
    channels, biased = channels.to(full.device), run.outputs[layer.index].bias is not None
    second = moments.centred if biased else moments.total
    new = refit_output(full[:, channels], full @ second[:, channels], second[channels][:, channels], ridge)
    lost = {}
    for name, columns, left in (("pruned", full[:, channels], moments.total), ("refitted", new, second)):
        padded = torch.zeros_like(full)
        padded[:, channels] = columns
        lost[name] = lost_share(full, padded, moments.total, left)
    shift = full @ moments.mean - new @ moments.mean[channels] if biased else None
    return Refitted(new.unflatten(1, (len(kept_heads), layer.head_dim)), shift, lost)


def _advance(run: Layerwise, layer, removed_heads: list[int], new: Refitted | None) -> None:
    """Run the pruned layer on the text. Removed heads are still computed, but their output weights are 0."""
    projection = run.outputs[layer.index]
    before = {name: parameter.detach().clone() for name, parameter in projection.named_parameters() if new}
    try:
        if new is not None:
            kept_heads = [head for head in range(layer.heads) if head not in removed_heads]
            padded = new.weight.new_zeros(len(new.weight), layer.heads, layer.head_dim)
            padded[:, kept_heads] = new.weight
            padded = padded.flatten(1)
            projection.weight.copy_(padded.T if layer.layout.conv1d else padded)
            if new.shift is not None:
                projection.bias.add_(new.shift.to(projection.bias))
        run.advance(layer.index)
    finally:
        for name, values in before.items():
            projection.get_parameter(name).copy_(values)
