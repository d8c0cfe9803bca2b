"""Output projections refitted on a calibration text, layer by layer, when heads are taken away.

Layer by layer, each with what the pruned layers before it give: the second moments Σ z zᵀ of its heads' outputs in
float64 [H d, H d], and from them in closed form the projection of the kept heads that is nearest to what the old one
wrote from all heads on the same input. Memory: see `layerwise`, plus two such matrices.
"""

from __future__ import annotations

import torch

from ..anatomy import Anatomy
from ..layers import unpack
from ..pruning import lost_share, refit_output
from .layerwise import Layerwise
from .statistics import Moments


def refit(
    model, anatomy: Anatomy, removed: list[list[int]], sequences: torch.Tensor, ridge: float, progress=None
) -> tuple[list[torch.Tensor | None], list[dict]]:
    """New output projections of the kept heads, the model left as it was.

    Args:
        anatomy: the model's.
        removed: the query heads that will go, of each layer.
        sequences: tokens, long [samples, length].
        ridge: see `pruning.refit_output`.

    Returns:
        For each layer [D, kept heads, d] in float64, None where nothing goes; and for each layer the share of the
        attention output's energy that the pruned layer loses, on this text: {"pruned": ..., "refitted": ...}.
    """
    training = [(module, module.training) for module in model.modules()]
    found: list[torch.Tensor | None] = []
    errors = []
    try:
        model.eval()
        with torch.no_grad():
            run = Layerwise(model, anatomy, sequences)
            last = max((number for number, gone in enumerate(removed) if gone), default=-1)
            for facts, gone in zip(anatomy.layers, removed, strict=True):
                new, error = _refit_layer(model, facts, gone, run, ridge) if gone else (None, {})
                found.append(new)
                errors.append(error)
                if facts.index < last:
                    _advance(run, facts, gone, new)
                if progress:
                    progress(facts.index + 1, len(removed), "output projections")
    finally:
        for module, mode in training:
            module.training = mode
    return found, errors


def second_moments(rows) -> torch.Tensor:
    """Σ z zᵀ in float64 over pieces [rows, n]."""
    moments = Moments()
    for piece in rows:
        moments.add(piece)
    return moments.total


def _refit_layer(model, facts, gone: list[int], run: Layerwise, ridge: float):
    module = model.get_submodule(facts.path)
    tensors = {name: module.get_parameter(name) for name in facts.tensor_names}
    old = unpack(facts, tensors).o.detach().double()  # [D, H, d]
    kept = [head for head in range(facts.heads) if head not in gone]
    moments = second_moments(run.heads(facts.index))
    pick = torch.tensor([head * facts.head_dim + i for head in kept for i in range(facts.head_dim)])
    pick = pick.to(moments.device)
    whole = old.flatten(1)
    new = refit_output(whole[:, pick], whole @ moments[:, pick], moments[pick][:, pick], ridge)
    errors = {}
    for name, columns in (("pruned", whole[:, pick]), ("refitted", new)):
        padded = torch.zeros_like(whole)
        padded[:, pick] = columns
        errors[name] = lost_share(whole, padded, moments)
    return new.unflatten(1, (len(kept), facts.head_dim)), errors


def _advance(run: Layerwise, facts, gone: list[int], new: torch.Tensor | None) -> None:
    """Put the text through the layer as it will be: heads that go are in it still, and not heard."""
    weight = run.outputs[facts.index].weight
    before = weight.detach().clone() if gone else None
    try:
        if gone and new is not None:
            kept = [head for head in range(facts.heads) if head not in gone]
            padded = new.new_zeros(new.shape[0], facts.heads, facts.head_dim)
            padded[:, kept] = new
            padded = padded.flatten(1)
            weight.copy_(padded.T if facts.layout.conv1d else padded)
        run.advance(facts.index)
    finally:
        if before is not None:
            weight.copy_(before)
