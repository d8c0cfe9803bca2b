"""Taking query heads away: which go, what is left of a layer, and the output projection that makes up for them.

Pure functions of tensors and numbers; `operations/prune_heads.py` drives them. A KV head goes exactly when the last
query head that reads it goes, so a KV group is worth the sum of its query heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.architecture.layer import groups_of

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer


def biased_output(anatomy: Anatomy) -> bool:
    """Whether output projections have a bias, which a refit changes along."""
    return all("o" in layer.biases for layer in anatomy.layers)


def choose_removed(
    scores: list[list[float]],
    groups: list[list[list[int]]],
    *,
    whole_groups: bool,
    per_layer: int | None = None,
    ratio: float | None = None,
    protect: tuple[int, ...] | list[int] = (),
) -> list[list[int]]:
    """The query heads that go, of each layer: those with the lowest scores.

    Args:
        scores: [layers][query heads], higher = keep.
        groups: of `groups_of`, for each layer.
        whole_groups: heads go by KV group, which is worth the sum of its heads; else one by one.
        per_layer: so many heads (or groups) of every layer that is not protected; or
        ratio: share of the heads (or groups) of all layers, rounded to a whole number, by one ranking of all.
        protect: layers that keep all.

    Every layer keeps one head (or group). Ties go by layer and head, so that a plan is reproducible.
    """
    units = [per if whole_groups else [[head] for group in per for head in group] for per in groups]
    order = sorted(
        (sum(scores[layer][head] for head in unit), layer, number)
        for layer, per in enumerate(units)
        if layer not in protect
        for number, unit in enumerate(per)
    )
    wanted = sum(map(len, units)) if ratio is None else round(ratio * sum(map(len, units)))
    gone: list[list[int]] = [[] for _ in units]
    for _, layer, number in order:
        most = len(units[layer]) - 1 if per_layer is None else per_layer
        if wanted and len(gone[layer]) < most:
            gone[layer].append(number)
            wanted -= 1
    return [sorted(h for number in numbers for h in units[layer][number]) for layer, numbers in enumerate(gone)]


def facts_without(facts: LayerAnatomy, removed: list[int]) -> LayerAnatomy:
    """A layer's anatomy when these query heads are gone; what is said of single heads follows."""
    from surgery.runtime.surgery_config import after_heads_change

    kept = [[head for head in group if head not in removed] for group in groups_of(facts)]
    kv_heads = [number for number, group in enumerate(kept) if group]
    sizes = [len(group) for group in kept if group]
    queries = [head for group in kept for head in group]
    return replace(
        facts,
        heads=len(queries),
        kv_heads=len(kv_heads),
        query_groups=() if len(set(sizes)) == 1 else tuple(sizes),
        entry=after_heads_change(facts.entry, queries, kv_heads) if facts.entry else facts.entry,
        query_numbers=tuple(facts.query_name(head) for head in queries) if removed else facts.query_numbers,
        kv_numbers=tuple(facts.kv_name(head) for head in kv_heads) if removed else facts.kv_numbers,
    )


def without_heads(
    layer: AttentionLayer, target: LayerAnatomy, removed: list[int], o: Tensor | None = None
) -> AttentionLayer:
    """The layer without these query heads and without the KV heads that nobody reads any more.

    Args:
        target: of `facts_without`.
        o: [D, kept heads, d], in place of the kept columns of the output projection.
    """
    groups = groups_of(layer.anatomy)
    queries = [head for group in groups for head in group if head not in removed]
    kv_heads = [number for number, group in enumerate(groups) if set(group) - set(removed)]
    parts = {}
    for name, tensor in layer.tensors().items():
        if name == "o":
            parts[name] = tensor[:, queries] if o is None else o.to(tensor.dtype)
        else:
            parts[name] = tensor[kv_heads if name.startswith(("k", "v")) else queries]
    return layer.replace(anatomy=target, **parts)


def magnitudes(layer: AttentionLayer) -> list[float]:
    """||W_O^h W_V^g(h)||_F of every query head: how much it can write for inputs of one size, attention aside.

    The norm of the product, not the product of norms: it does not change when a head's value channels are turned or
    scaled and its output columns turned or scaled back. A value bias counts as one more input.
    """
    import torch

    values, found = layer.v.double(), [0.0] * layer.anatomy.heads
    if layer.v_bias is not None:
        values = torch.cat([values, layer.v_bias.double().unsqueeze(-1)], dim=-1)
    for kv_head, queries in enumerate(groups_of(layer.anatomy)):
        gram = values[kv_head] @ values[kv_head].T  # ||O V||² = tr(OᵀO V Vᵀ), [d, d] instead of [D, D]
        for head in queries:
            o = layer.o[:, head].double()
            found[head] = float(((o.T @ o) * gram).sum().clamp(min=0).sqrt())
    return found


def lost_share(old: Tensor, new: Tensor, moments: Tensor, left: Tensor | None = None) -> float:
    """Σ ||(W − W') z||² as a share of Σ ||W z||².

    Args:
        old, new: W, W' [D, N].
        moments: Σ z zᵀ [N, N] of all heads.
        left: in its place for what is lost: Σ (z − z̄) (z − z̄)ᵀ where a bias makes up for the mean.
    """

    def energy(weight, moments):
        return float(((weight @ moments) * weight).sum())

    whole = energy(old.double(), moments)
    lost = energy(old.double() - new.double(), moments if left is None else left)
    return max(lost, 0.0) / whole if whole else 0.0


def change_lines(anatomy: Anatomy, removed: list[list[int]], how: str, known: bool):
    """What a pruning changes, for people: `removed` of each layer, `how` they are chosen, `known`: already."""
    before = sum(layer.heads for layer in anatomy.layers)
    after = [facts_without(layer, gone) for layer, gone in zip(anatomy.layers, removed, strict=True)]
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
