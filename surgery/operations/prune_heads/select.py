"""The choice of query heads to remove, and the anatomy and the tensors of a layer without them.

These are pure functions of tensors and numbers, called by `operation.py`. A KV head is removed exactly when the last
query head that reads it is removed. So the score of a KV group is the sum over its query heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.architecture.layer import groups_of
from surgery.machine.placement import exact

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer


def biased_output(anatomy: Anatomy) -> bool:
    """Whether all output projections have a bias, which a refit also changes."""
    return all("o" in layer.biases for layer in anatomy.layers)


def choose_removed(
    scores: list[list[float]],
    units: list[list[list[int]]],
    *,
    per_layer: int | None = None,
    ratio: float | None = None,
    protect: tuple[int, ...] | list[int] = (),
    removed: list[list[int]] | None = None,
    at_most: int | None = None,
) -> list[list[int]]:
    """The query heads to remove from each layer: those with the lowest scores.

    Args:
        scores: [layers][query heads], higher = keep.
        units: what can be removed from each layer, lists of query heads: single heads, or KV groups. A unit's score is
            the sum over its heads.
        per_layer: number of units to remove from every layer that is not protected; or
        ratio: share of the units of all layers, rounded to a whole number, in one ranking of all layers.
        protect: layers that keep all heads.
        removed: query heads that were chosen before, by other scores. They stay chosen, and they count.
        at_most: the most units that are chosen beside those; None: all that `per_layer` or `ratio` wants.

    Every layer keeps at least one unit. Ties are broken by layer and head, so that a plan is reproducible.
    """
    chosen: list[list[int]] = [[] for _ in units]
    for layer, heads in enumerate(removed or []):
        chosen[layer] = [index for index, unit in enumerate(units[layer]) if unit[0] in heads]
    order = sorted(
        (sum(scores[layer][head] for head in unit), layer, index)
        for layer, layer_units in enumerate(units)
        if layer not in protect
        for index, unit in enumerate(layer_units)
        if index not in chosen[layer]
    )
    wanted = sum(map(len, units)) if ratio is None else round(ratio * sum(map(len, units)))
    wanted -= sum(map(len, chosen))
    wanted = wanted if at_most is None else min(wanted, at_most)
    for _, layer, index in order:
        most = len(units[layer]) - 1 if per_layer is None else per_layer
        if wanted and len(chosen[layer]) < most:
            chosen[layer].append(index)
            wanted -= 1
    return [sorted(h for index in indices for h in units[layer][index]) for layer, indices in enumerate(chosen)]


def anatomy_without_heads(layer: LayerAnatomy, removed: list[int]) -> LayerAnatomy:
    """A layer's anatomy without these query heads; fields that list single heads are adapted."""
    from surgery.runtime.surgery_config import after_heads_change

    groups = [[head for head in group if head not in removed] for group in groups_of(layer)]
    kv_heads = [index for index, group in enumerate(groups) if group]
    sizes = [len(group) for group in groups if group]
    queries = [head for group in groups for head in group]
    return replace(
        layer,
        heads=len(queries),
        kv_heads=len(kv_heads),
        query_groups=() if len(set(sizes)) == 1 else tuple(sizes),
        entry=after_heads_change(layer.entry, queries, kv_heads) if layer.entry else layer.entry,
        query_numbers=tuple(layer.query_name(head) for head in queries) if removed else layer.query_numbers,
        kv_numbers=tuple(layer.kv_name(head) for head in kv_heads) if removed else layer.kv_numbers,
    )


def without_heads(
    layer: AttentionLayer, target: LayerAnatomy, removed: list[int], o: Tensor | None = None
) -> AttentionLayer:
    """The layer without these query heads, and without the KV heads that no query head reads any more.

    Args:
        target: the result of `anatomy_without_heads`.
        o: [D, kept heads, d], replaces the kept columns of the output projection.
    """
    groups = groups_of(layer.anatomy)
    queries = [head for group in groups for head in group if head not in removed]
    kv_heads = [index for index, group in enumerate(groups) if set(group) - set(removed)]
    tensors = {}
    for name, tensor in layer.tensors().items():
        if name == "o":
            tensors[name] = tensor[:, queries] if o is None else o.to(tensor.dtype)
        else:
            tensors[name] = tensor[kv_heads if name.startswith(("k", "v")) else queries]
    return layer.replace(anatomy=target, **tensors)


def magnitudes(layer: AttentionLayer) -> list[float]:
    """||W_O^h W_V^g(h)||_F of every query head: how much it can write for inputs of equal size, attention aside.

    This is the norm of the product and not the product of norms. So it does not change when a head's value channels
    are rotated or scaled and its output columns are rotated or scaled back. A value bias counts as one more input.
    """
    import torch

    values, norms = exact(layer.v), [0.0] * layer.anatomy.heads
    if layer.v_bias is not None:
        values = torch.cat([values, exact(layer.v_bias).unsqueeze(-1)], dim=-1)
    for kv_head, queries in enumerate(groups_of(layer.anatomy)):
        gram = values[kv_head] @ values[kv_head].T  # ||O V||² = tr(OᵀO V Vᵀ), [d, d] instead of [D, D]
        for head in queries:
            o = exact(layer.o[:, head])
            norms[head] = float(((o.T @ o) * gram).sum().clamp(min=0).sqrt())
    return norms


def lost_share(old: Tensor, new: Tensor, moments: Tensor, left: Tensor | None = None) -> float:
    """Σ ||(W − W') z||² as a share of Σ ||W z||².

    Args:
        old, new: W, W' [D, N].
        moments: Σ z zᵀ [N, N] of all heads.
        left: replaces `moments` in the numerator: Σ (z − z̄) (z − z̄)ᵀ if a bias makes up for the mean.
    """

    def energy(weight, moments):
        return float(((weight @ moments) * weight).sum())

    total = energy(old.double(), moments)
    lost = energy(old.double() - new.double(), moments if left is None else left)
    return max(lost, 0.0) / total if total else 0.0


def change_lines(anatomy: Anatomy, removed: list[list[int]], how: str, known: bool):
    """Yield the lines that say what a pruning changes.

    Args:
        removed: for each layer, the query heads to remove.
        how: how they are chosen, in words.
        known: whether the choice is known without measuring the model.
    """
    before = sum(layer.heads for layer in anatomy.layers)
    after = [anatomy_without_heads(layer, cut) for layer, cut in zip(anatomy.layers, removed, strict=True)]
    kinds = {
        (old.heads, old.kv_heads, new.heads, new.kv_heads) for old, new in zip(anatomy.layers, after, strict=True)
    }
    if len(kinds) == 1:
        heads, kv_heads, left, kv_left = kinds.pop()
        kv = f", KV heads {kv_heads} → {kv_left}" if kv_left != kv_heads else ""
        yield f"query heads {heads} → {left}{kv} in {len(after)} layers ({how})"
    else:
        where = f", in {sum(map(bool, removed))} of {len(after)} layers" if known else ""
        yield f"{sum(map(len, removed))} of {before} query heads go{where} ({how})"
