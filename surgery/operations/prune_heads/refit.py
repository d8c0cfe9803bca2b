"""Output projections refitted on a calibration text, layer by layer, when heads are taken away.

Layer by layer, each with what the pruned layers before it give: the second moments Σ z zᵀ of its heads' outputs in
float64 [H d, H d], and from them in closed form the projection of the kept heads that is nearest to what the old one
wrote from all heads on the same input. Where the projection has a bias, it takes over what the mean of a head that
goes has written: the fit is of what differs from the means. Memory: see `layerwise`, plus two such matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import unpack
from surgery.calibration.layerwise import Layerwise
from surgery.calibration.moments import Moments, refit_output
from surgery.operations.prune_heads.select import lost_share


@dataclass(frozen=True)
class Refitted:
    """The output projection of a layer's kept heads.

    Attributes:
        weight: [D, kept heads, d], float64.
        shift: [D], float64, to be added to its bias; None where it has none.
        lost: share of the attention output's energy that the pruned layer loses on this text, {"pruned": with the old
            weights, "refitted": with these}.
    """

    weight: torch.Tensor
    shift: torch.Tensor | None
    lost: dict[str, float]


def refit(
    model, anatomy: Anatomy, removed: list[list[int]], sequences: torch.Tensor, ridge: float, progress=None
) -> list[Refitted | None]:
    """New output projections of the kept heads, the model left as it was.

    Args:
        anatomy: the model's.
        removed: the query heads that will go, of each layer.
        sequences: tokens, long [samples, length].
        ridge: see `pruning.refit_output`.

    Returns:
        For each layer, None where nothing goes.
    """
    training = [(module, module.training) for module in model.modules()]
    found: list[Refitted | None] = []
    try:
        model.eval()
        with torch.no_grad():
            run = Layerwise(model, anatomy, sequences)
            last = max((number for number, gone in enumerate(removed) if gone), default=-1)
            for facts, gone in zip(anatomy.layers, removed, strict=True):
                found.append(_refit_layer(model, facts, gone, run, ridge) if gone else None)
                if facts.index < last:
                    _advance(run, facts, gone, found[-1])
                if progress:
                    progress(facts.index + 1, len(removed), "output projections")
    finally:
        for module, mode in training:
            module.training = mode
    return found


def moments_of(rows) -> Moments:
    """Σ z zᵀ and Σ z in float64 over pieces [rows, n]."""
    moments = Moments()
    for piece in rows:
        moments.add(piece)
    return moments


def _refit_layer(model, facts, gone: list[int], run: Layerwise, ridge: float) -> Refitted:
    module = model.get_submodule(facts.path)
    tensors = {name: module.get_parameter(name) for name in facts.tensor_names}
    whole = unpack(facts, tensors).o.detach().double().flatten(1)  # [D, H d]
    kept = [head for head in range(facts.heads) if head not in gone]
    seen = moments_of(run.heads(facts.index))
    pick = torch.tensor([head * facts.head_dim + i for head in kept for i in range(facts.head_dim)])
    pick, biased = pick.to(whole.device), run.outputs[facts.index].bias is not None
    moments = seen.centred if biased else seen.total
    new = refit_output(whole[:, pick], whole @ moments[:, pick], moments[pick][:, pick], ridge)
    lost = {}
    for name, columns, left in (("pruned", whole[:, pick], seen.total), ("refitted", new, moments)):
        padded = torch.zeros_like(whole)
        padded[:, pick] = columns
        lost[name] = lost_share(whole, padded, seen.total, left)
    shift = whole @ seen.mean - new @ seen.mean[pick] if biased else None
    return Refitted(new.unflatten(1, (len(kept), facts.head_dim)), shift, lost)


def _advance(run: Layerwise, facts, gone: list[int], new: Refitted | None) -> None:
    """Put the text through the layer as it will be: heads that go are in it still, and not heard."""
    projection = run.outputs[facts.index]
    before = {name: parameter.detach().clone() for name, parameter in projection.named_parameters() if new}
    try:
        if new is not None:
            kept = [head for head in range(facts.heads) if head not in gone]
            padded = new.weight.new_zeros(len(new.weight), facts.heads, facts.head_dim)
            padded[:, kept] = new.weight
            padded = padded.flatten(1)
            projection.weight.copy_(padded.T if facts.layout.conv1d else padded)
            if new.shift is not None:
                projection.bias.add_(new.shift.to(projection.bias))
        run.advance(facts.index)
    finally:
        for name, values in before.items():
            projection.get_parameter(name).copy_(values)
