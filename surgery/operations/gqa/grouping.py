"""Which KV heads share a group: partition by similarity, into groups of equal size."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from surgery.operations.gqa.merge import with_bias

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.weights import AttentionLayer

ENUMERATE_UP_TO = 8


def head_distances(heads: Tensor, inner) -> Tensor:
    """Squared distances [G, G] between heads [G, d, n], as shares of their total energy.

    Args:
        inner: function of two heads that gives their inner product; with alignment it is the largest one that
            the allowed turns can reach.
    """
    import torch

    energy = heads.square().sum((1, 2))
    distances = torch.zeros(len(heads), len(heads), dtype=torch.float64)
    for a, b in combinations(range(len(heads)), 2):
        distances[a, b] = distances[b, a] = energy[a] + energy[b] - 2 * inner(heads[a], heads[b])
    total = float(energy.sum())
    return distances / total if total else distances


def plain_inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def turned_inner(a: Tensor, b: Tensor) -> Tensor:
    """Largest inner product over orthogonal turns of one head: the nuclear norm of a b^T."""
    import torch

    return torch.linalg.svdvals(a @ b.mT).sum()


def phased_inner(a: Tensor, b: Tensor, rotary: int, positions: str) -> Tensor:
    """Largest inner product over turns of keys that commute with RoPE."""
    import torch

    from surgery.operations.gqa.merge import pair_channels

    real, imag = pair_channels(rotary, positions)
    za, zb = torch.complex(a[real], a[imag]), torch.complex(b[real], b[imag])
    turned = (za * zb.conj()).sum(-1).abs().sum()
    return turned + turned_inner(a[rotary:], b[rotary:]) if rotary < len(a) else turned


def partition(distances: Tensor, groups: int) -> list[list[int]]:
    """Split G heads into `groups` equal groups with the least summed distance within groups.

    The sum of pairwise squared distances is m times the squared distance to the group's mean, which is what
    merging loses. All partitions are tried for up to 8 heads; beyond that the best neighbour grouping found by
    greedy agglomeration is improved by pairwise swaps until none helps. Groups are ordered by their first head.
    """
    table = distances.tolist()
    size = len(table) // groups

    def cost(group):
        return sum(table[a][b] for a, b in combinations(group, 2))

    if len(table) <= ENUMERATE_UP_TO:
        candidates = list(_partitions(tuple(range(len(table))), size))
        best = min(candidates, key=lambda parts: sum(map(cost, parts)))
        return [list(group) for group in best]
    neighbours = [list(range(i * size, (i + 1) * size)) for i in range(groups)]
    starts = [_swap(start, cost) for start in (neighbours, _greedy(table, size))]
    best = min(starts, key=lambda parts: sum(map(cost, parts)))
    return sorted(sorted(group) for group in best)


def _partitions(heads: tuple[int, ...], size: int):
    """All partitions into groups of `size`, neighbours first."""
    if not heads:
        yield ()
        return
    first, rest = heads[0], heads[1:]
    for mates in combinations(rest, size - 1):
        left = tuple(h for h in rest if h not in mates)
        for others in _partitions(left, size):
            yield ((first, *mates), *others)


def _greedy(table: list[list[float]], size: int) -> list[list[int]]:
    left, groups = list(range(len(table))), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            group.append(min(left, key=lambda h: sum(table[h][g] for g in group)))
            left.remove(group[-1])
        groups.append(group)
    return groups


def _swap(parts: list[list[int]], cost) -> list[list[int]]:
    parts, improved = [list(p) for p in parts], True
    while improved:
        improved = False
        for a, b in combinations(range(len(parts)), 2):
            for i in range(len(parts[a])):
                for j in range(len(parts[b])):
                    before = cost(parts[a]) + cost(parts[b])
                    parts[a][i], parts[b][j] = parts[b][j], parts[a][i]
                    if cost(parts[a]) + cost(parts[b]) < before - 1e-12:
                        improved = True
                    else:
                        parts[a][i], parts[b][j] = parts[b][j], parts[a][i]
    return parts


def merge_losses(layer: AttentionLayer) -> Tensor:
    """What merging two KV heads in closed form would lose if the layer's inputs were white: [G, G].

    Of keys and of values, each a share of what all heads say to their readers. What the closed form undoes costs
    nothing: a complex factor for each frequency of keys, any invertible map of values.
    """
    import torch

    from surgery.operations.gqa.merge import pair_channels

    facts, (keys, values, queries) = layer.anatomy, (with_bias(layer, part) for part in "kvq")
    outputs = layer.o.double().transpose(0, 1)
    readers, power = (
        (x.mT @ x).unflatten(0, (len(values), -1)).sum(1) for x in (outputs, queries.mT)
    )  # Σ Oᵀ O and Σ q qᵀ of the query heads of each, [G, d, d]
    losses = _pair_losses(_products(values), readers)
    if facts.qk_norm:  # keys are not mixed
        return losses + head_distances(keys, plain_inner)
    lost, energy = torch.zeros_like(losses), 0.0
    if facts.rotary:
        real, imag = pair_channels(facts.rotary, facts.positions)
        rows = torch.complex(keys[:, real], keys[:, imag]).transpose(0, 1)  # [F, G, n]
        weights = (power[:, real, real] + power[:, imag, imag]).T[..., None, None].to(rows.dtype)
        lost, energy = _pair_losses((rows @ rows.mH)[:, :, None, :, None], weights, shares=False)
    if facts.rotary < facts.head_dim:
        free = slice(facts.rotary, None)
        more = _pair_losses(_products(keys[:, free]), power[:, free, free], shares=False)
        lost, energy = lost + more[0], energy + more[1]
    return losses + (lost / energy if energy else lost)


def _products(heads: Tensor) -> Tensor:
    """[G, d, G, d] of heads [G, d, n]."""
    flat = heads.flatten(0, 1)
    return (flat @ flat.T).reshape(*heads.shape[:2], *heads.shape[:2])


def _pair_losses(moments: Tensor, weights: Tensor, shares: bool = True):
    """Of every pair of heads what `closed_form.shared_channels` loses by one in place of both, [G, G].

    Args:
        moments: [..., G, e, G, e]; weights: [..., G, e, e]; losses are summed over what stands before.
        shares: of all heads' energy; else losses and that energy.
    """
    import torch

    from surgery.operations.gqa.low_rank import shared_channels

    count = weights.shape[-3]
    lost = torch.zeros(count, count, dtype=torch.float64)
    for pair in combinations(range(count), 2):
        pair = list(pair)
        found = shared_channels(moments[..., pair, :, :, :][..., pair, :], weights[..., pair, :, :])[2]
        lost[pair, pair[::-1]] = float(found.sum())
    own = moments.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..., G, e, e]
    energy = float((own * weights.mT).sum().real)
    return (lost / energy if energy else lost) if shares else (lost, energy)


def similar_order(layer: AttentionLayer, groups: int, aligned: bool, closed_form: bool = False) -> list[int]:
    """Order of a layer's KV heads that puts like ones next to each other, keys and values counting alike.

    Args:
        groups: of equal size, to be shared.
        aligned: heads that the merge may turn towards each other are as near as they can be turned.
        closed_form: heads are as near as little is lost by the merge in closed form.
    """
    if closed_form:
        return [head for group in partition(merge_losses(layer), groups) for head in group]
    facts, keys, values = layer.anatomy, with_bias(layer, "k"), with_bias(layer, "v")
    phased = partial(phased_inner, rotary=facts.rotary, positions=facts.positions)
    distances = head_distances(keys, phased if aligned and not facts.qk_norm else plain_inner)
    distances += head_distances(values, turned_inner if aligned else plain_inner)
    return [head for group in partition(distances, groups) for head in group]
