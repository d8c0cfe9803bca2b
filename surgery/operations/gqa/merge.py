"""Merges of KV heads from the weights alone, and the groups of heads that every merge uses.

Generalised Procrustes can rotate the heads of a group towards each other before they are merged. Only rotations that
do not change the model are allowed (Jin et al. 2024, arXiv 2412.20677):

- keys under RoPE: RoPE multiplies the complex number z_f of a channel pair by a phase. Among the linear maps on one
  pair, only multiplication by a complex number commutes with that. Those that keep lengths are the rotations
  e^{i phi_f}, one for each frequency. The score is Re(q conj(k)), so the queries that read the head are rotated by the
  *same* angle.
- keys without RoPE (or the channels that a partial RoPE does not rotate): any orthogonal matrix, which is applied to
  the queries, too.
- values: any orthogonal matrix, undone in W_O.

All computations are in float64. A rotation is a matrix [d, d]. The first head of a group is the reference: its
rotation is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING

from surgery.architecture.layer import pair_channels
from surgery.architecture.weights import stacked, with_bias

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer


def group_members(anatomy: LayerAnatomy, groups: int) -> list[dict[int, list[int]]]:
    """For each new KV head: the old KV heads that it replaces, each with its query heads in this group.

    If `groups` does not divide the number of KV heads, an old head can be in two groups, each with other query heads.
    """
    size = anatomy.heads // groups
    members: list[dict[int, list[int]]] = [{} for _ in range(groups)]
    for query in range(anatomy.heads):
        members[query // size].setdefault(query // anatomy.group, []).append(query)
    return members


def mean_head(heads: Tensor, counts: list[int]) -> Tensor:
    """Mean [d, n] of heads [m, d, n], weighted by numbers of readers. The mean of equal heads is exact to the bit."""
    shared = gcd(*counts)
    weights = [count // shared for count in counts]
    first = heads[0]  # differences from it are 0 for equal heads; a sum of m copies divided by m can be rounded
    offset = sum(weight * (head - first) for weight, head in zip(weights, heads, strict=True))
    return first + offset / sum(weights)


def first_head(heads: Tensor, counts: list[int]) -> Tensor:
    """The first head [d, n] of [m, d, n]; the numbers of readers are not used."""
    return heads[0]


def permute_kv_heads(layer: AttentionLayer, order: list[int]) -> AttentionLayer:
    """The same layer with its KV heads in another order; query heads, output columns and sinks move along."""
    anatomy = layer.anatomy
    queries = [query for head in order for query in range(head * anatomy.group, (head + 1) * anatomy.group)]
    moved = {}
    for name, tensor in layer.tensors().items():
        if name == "o":
            moved[name] = tensor[:, queries]
        else:
            moved[name] = tensor[order if name.startswith(("k", "v")) else queries]
    return layer.replace(**moved)


def mean_square_ratio(new: list[Tensor], old: Tensor) -> float:
    """The ratio of the root mean squares of merged and old keys, for white inputs.

    A norm over the whole projection divides by the root mean square, so its weight is multiplied by this ratio.
    """
    import torch

    energy = old.square().mean()
    return float((torch.stack(new).square().mean() / energy).sqrt()) if energy else 1.0


def random_heads(layer: AttentionLayer, target: LayerAnatomy, seed: int) -> dict[str, Tensor]:
    """Keys and values of random heads: normal weights with the root mean square of the old ones, zero biases."""
    import torch

    tensors = {}
    for index, (name, old) in enumerate(layer.tensors().items()):
        if not name.startswith(("k", "v")):
            continue
        shape = (target.kv_heads, *old.shape[1:])
        if name == "k_norm":  # a scale and not a direction: the mean is the neutral choice
            new = old.double().mean(0).expand(shape)
        elif name.endswith("_bias"):
            new = torch.zeros(shape)
        else:
            generator = torch.Generator().manual_seed((seed * 100_003 + layer.anatomy.index) * 101 + index)
            new = torch.randn(shape, generator=generator, dtype=torch.float64) * old.double().square().mean().sqrt()
        tensors[name] = new.to(old.dtype)
    return tensors


def merged(layer: AttentionLayer, target: LayerAnatomy, merge: Callable, aligned: bool) -> AttentionLayer:
    """A layer whose KV heads are merged group by group, from the weights alone.

    Args:
        merge: makes one head of several, given their numbers of readers: `mean_head` or `first_head`.
        aligned: first rotate the heads of a group towards each other (Procrustes). Queries and outputs absorb this.
    """
    anatomy = layer.anatomy
    k, v, new = with_bias(layer, "k"), with_bias(layer, "v"), {"k": [], "v": [], "k_norm": []}
    if aligned:  # otherwise queries and outputs do not change; in float64 they need most memory
        q, o = with_bias(layer, "q"), layer.o.double()
    for group in group_members(anatomy, target.kv_heads):
        sources, counts = list(group), [len(queries) for queries in group.values()]
        keys, values = k[sources], v[sources]
        if aligned:
            rotations = orthogonal_matrices(values)
            values = rotations @ values
            for rotation, queries in zip(rotations, group.values(), strict=True):
                o[:, queries] = o[:, queries] @ rotation.T
        if aligned and not anatomy.qk_norm:
            rotations = key_rotations(keys, anatomy.rotary, anatomy.positions)
            keys = rotations @ keys
            for rotation, queries in zip(rotations, group.values(), strict=True):
                q[queries] = rotation @ q[queries]
        new["k"].append(merge(keys, counts))
        new["v"].append(merge(values, counts))
        if layer.k_norm is not None:
            new["k_norm"].append(merge(layer.k_norm[sources].double(), counts))
    tensors = stacked(layer, "k", new["k"]) | stacked(layer, "v", new["v"])
    if layer.k_norm is not None:
        scale = mean_square_ratio(new["k"], k) if anatomy.qk_norm == "whole" else 1.0
        tensors |= stacked(layer, "k_norm", [norm * scale for norm in new["k_norm"]])
    if aligned:
        tensors |= stacked(layer, "q", list(q)) | {"o": o.to(layer.o.dtype)}
    return layer.replace(anatomy=target, **tensors)


ROUNDS, TOLERANCE = 100, 1e-8


def key_rotations(keys: Tensor, rotary: int, positions: str) -> Tensor:
    """Rotations [m, d, d] that bring m key heads [m, d, n] closest to their mean; they commute with RoPE."""
    import torch

    heads, size, _ = keys.shape
    rotations = torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1)
    if rotary:
        real, imag = pair_channels(rotary, positions)
        phases = _phases(torch.complex(keys[:, real], keys[:, imag]))
        rotations[:, real, real] = phases.real
        rotations[:, imag, imag] = phases.real
        rotations[:, real, imag] = -phases.imag
        rotations[:, imag, real] = phases.imag
    if rotary < size:
        rotations[:, rotary:, rotary:] = orthogonal_matrices(keys[:, rotary:])
    return rotations


def orthogonal_matrices(heads: Tensor) -> Tensor:
    """Orthogonal matrices R [m, d, d] that minimise sum_h |R_h X_h - mean|^2 for X [m, d, n]; R_0 is the identity."""
    import torch

    count, size, _ = heads.shape
    matrices = torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    target, last_energy = heads[0], -1.0
    for _ in range(ROUNDS):
        u, _, vh = torch.linalg.svd(target @ heads.mT)
        matrices = u @ vh
        target = (matrices @ heads).mean(dim=0)
        energy = float(target.square().sum())
        if energy - last_energy <= TOLERANCE * energy:
            break
        last_energy = energy
    matrices = matrices[0].mT @ matrices
    matrices[0] = torch.eye(size, dtype=torch.float64)  # exactly, so that the first head's weights keep their bits
    return matrices


def _phases(heads: Tensor) -> Tensor:
    """Unit complex numbers [m, f] that bring the rows of z [m, f, n] closest to their mean; the first is 1."""
    import torch

    phases = torch.ones(heads.shape[:2], dtype=torch.complex128)
    target, last_energy = heads[0], -1.0
    for _ in range(ROUNDS):
        inner = (target * heads.conj()).sum(-1)
        phases = torch.where(inner.abs() > 0, torch.sgn(inner), torch.ones_like(inner))
        target = (phases.unsqueeze(-1) * heads).mean(dim=0)
        energy = float(target.abs().square().sum())
        if energy - last_energy <= TOLERANCE * energy:
            break
        last_energy = energy
    phases = phases * phases[0].conj()
    phases[0] = 1.0
    return phases
