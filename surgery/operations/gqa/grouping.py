"""The choice of KV heads that share a group: a partition by similarity into groups of equal size."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from surgery.architecture.weights import with_bias

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.weights import AttentionLayer

ENUMERATE_UP_TO = 8


def head_distances(heads: Tensor, inner) -> Tensor:
    """Squared distances [G, G] between heads [G, d, n], as shares of their total energy.

    Args:
        inner: function that returns the inner product of two heads; with alignment, the largest inner product that
            the allowed transformations can reach.

    Returns:
        float64 [G, G], symmetric, with a zero diagonal.
    """
    import torch

    energy = heads.square().sum((1, 2))
    distances = torch.zeros(len(heads), len(heads), dtype=torch.float64)
    for a, b in combinations(range(len(heads)), 2):
        distances[a, b] = distances[b, a] = energy[a] + energy[b] - 2 * inner(heads[a], heads[b])
    total = float(energy.sum())
    return distances / total if total else distances


def plain_inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two heads [d, n]."""
    return (a * b).sum()


def aligned_inner(a: Tensor, b: Tensor) -> Tensor:
    """Largest inner product over orthogonal transformations of one head: the nuclear norm of a b^T."""
    import torch

    return torch.linalg.svdvals(a @ b.mT).sum()


def phased_inner(a: Tensor, b: Tensor, rotary: int, positions: str) -> Tensor:
    """Largest inner product over rotations of keys that commute with RoPE."""
    import torch

    from surgery.architecture.layer import pair_channels

    real, imag = pair_channels(rotary, positions)
    za, zb = torch.complex(a[real], a[imag]), torch.complex(b[real], b[imag])
    inner = (za * zb.conj()).sum(-1).abs().sum()
    return inner + aligned_inner(a[rotary:], b[rotary:]) if rotary < len(a) else inner


def partition(distances: Tensor, groups: int) -> list[list[int]]:
    """Split G heads into `groups` equal groups with the least summed distance within groups.

    The sum of pairwise squared distances in a group of m heads is m times their summed squared distance to the mean,
    which is the loss of merging them. Up to 8 heads, all partitions are tried. For more heads there are two starts,
    neighbours and a greedy agglomeration; both are improved by pairwise swaps until none helps, and the better one is
    taken. Groups are ordered by their first head.
    """
    table = distances.tolist()
    size = len(table) // groups

    def cost(group):
        return sum(table[a][b] for a, b in combinations(group, 2))

    if len(table) <= ENUMERATE_UP_TO:
        candidates = list(_partitions(tuple(range(len(table))), size))
        best = min(candidates, key=lambda groups_tried: sum(map(cost, groups_tried)))
        return [list(group) for group in best]
    neighbours = [list(range(i * size, (i + 1) * size)) for i in range(groups)]
    starts = [_swap(start, cost) for start in (neighbours, _greedy(table, size))]
    best = min(starts, key=lambda groups_tried: sum(map(cost, groups_tried)))
    return sorted(sorted(group) for group in best)


def _partitions(heads: tuple[int, ...], size: int):
    """All partitions into groups of `size`, neighbours first."""
    if not heads:
        yield ()
        return
    first, rest = heads[0], heads[1:]
    for members in combinations(rest, size - 1):
        remaining = tuple(h for h in rest if h not in members)
        for others in _partitions(remaining, size):
            yield ((first, *members), *others)


def _greedy(table: list[list[float]], size: int) -> list[list[int]]:
    remaining, groups = list(range(len(table))), []
    while remaining:
        group = [remaining.pop(0)]
        while len(group) < size:
            group.append(min(remaining, key=lambda h: sum(table[h][g] for g in group)))
            remaining.remove(group[-1])
        groups.append(group)
    return groups


def _swap(groups: list[list[int]], cost) -> list[list[int]]:
    groups, improved = [list(p) for p in groups], True
    while improved:
        improved = False
        for a, b in combinations(range(len(groups)), 2):
            for i in range(len(groups[a])):
                for j in range(len(groups[b])):
                    before = cost(groups[a]) + cost(groups[b])
                    groups[a][i], groups[b][j] = groups[b][j], groups[a][i]
                    if cost(groups[a]) + cost(groups[b]) < before - 1e-12:
                        improved = True
                    else:
                        groups[a][i], groups[b][j] = groups[b][j], groups[a][i]
    return groups


def merge_losses(layer: AttentionLayer) -> Tensor:
    """The loss of merging each pair of KV heads in closed form, if the layer's inputs were white: [G, G].

    The losses of keys and values are added, each as a share of the energy that all heads give to their readers. A
    difference that the closed form can undo costs nothing: a complex factor for each frequency of keys, and any
    invertible map of values.
    """
    import torch

    from surgery.architecture.layer import pair_channels

    anatomy, (keys, values, queries) = layer.anatomy, (with_bias(layer, projection) for projection in "kvq")
    outputs = layer.o.double().transpose(0, 1)
    readers, power = (
        (x.mT @ x).unflatten(0, (len(values), -1)).sum(1) for x in (outputs, queries.mT)
    )  # Σ Oᵀ O and Σ q qᵀ over the query heads of each KV head, [G, d, d]
    losses = _pair_losses(_products(values), readers)
    if anatomy.qk_norm:  # keys are not mixed
        return losses + head_distances(keys, plain_inner)
    lost, energy = torch.zeros_like(losses), 0.0
    if anatomy.rotary:
        real, imag = pair_channels(anatomy.rotary, anatomy.positions)
        rows = torch.complex(keys[:, real], keys[:, imag]).transpose(0, 1)  # [F, G, n]
        weights = (power[:, real, real] + power[:, imag, imag]).T[..., None, None].to(rows.dtype)
        lost, energy = _pair_losses((rows @ rows.mH)[:, :, None, :, None], weights, shares=False)
    if anatomy.rotary < anatomy.head_dim:
        free = slice(anatomy.rotary, None)
        more = _pair_losses(_products(keys[:, free]), power[:, free, free], shares=False)
        lost, energy = lost + more[0], energy + more[1]
    return losses + (lost / energy if energy else lost)


def _products(heads: Tensor) -> Tensor:
    """Products of all pairs of rows [G, d, G, d] of heads [G, d, n]."""
    flat = heads.flatten(0, 1)
    return (flat @ flat.T).reshape(*heads.shape[:2], *heads.shape[:2])


def _pair_losses(moments: Tensor, weights: Tensor, shares: bool = True):
    """The loss of `low_rank.shared_channels` when one head replaces two, for every pair of heads: [G, G].

    Args:
        moments: [..., G, e, G, e]; weights: [..., G, e, e]. Losses are summed over the leading dimensions.
        shares: give losses as shares of all heads' energy; else give the losses and that energy.
    """
    import torch

    from surgery.calibration.closed_form.low_rank import shared_channels

    count = weights.shape[-3]
    lost = torch.zeros(count, count, dtype=torch.float64)
    for pair in combinations(range(count), 2):
        pair = list(pair)
        lost_energy = shared_channels(moments[..., pair, :, :, :][..., pair, :], weights[..., pair, :, :])[2]
        lost[pair, pair[::-1]] = float(lost_energy.sum())
    own = moments.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..., G, e, e]
    energy = float((own * weights.mT).sum().real)
    return (lost / energy if energy else lost) if shares else (lost, energy)


def similar_order(layer: AttentionLayer, groups: int, aligned: bool, closed_form: bool = False) -> list[int]:
    """The order of a layer's KV heads that puts similar heads next to each other; keys and values count alike.

    Args:
        groups: number of groups of equal size; each will share one head.
        aligned: the merge may rotate heads towards each other, so distances are those after the best rotation.
        closed_form: the distance of two heads is the loss of their merge in closed form (`merge_losses`).
    """
    if closed_form:
        return [head for group in partition(merge_losses(layer), groups) for head in group]
    anatomy, keys, values = layer.anatomy, with_bias(layer, "k"), with_bias(layer, "v")
    phased = partial(phased_inner, rotary=anatomy.rotary, positions=anatomy.positions)
    distances = head_distances(keys, phased if aligned and not anatomy.qk_norm else plain_inner)
    distances += head_distances(values, aligned_inner if aligned else plain_inner)
    return [head for group in partition(distances, groups) for head in group]
