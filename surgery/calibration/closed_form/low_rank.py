"""The closed-form merge of key and value heads: the shared heads that lose least, and the maps for their readers.

Averaging heads treats a channel as if it meant the same in every head. It does not: a linear map that the queries or
the output projection can undo is free, and heads that differ only by such a map are equivalent. So merging is a
low-rank approximation of the heads' outputs on a text:

- values: any matrix can move between W_V and W_O. The best shared value is a reduced-rank regression of all values of
  the group, each weighted by the output projection that reads it.
- keys under RoPE: a channel pair is one complex number that RoPE multiplies by a phase. The linear maps that commute
  with RoPE are products with a complex number. For each frequency the best shared key is the leading eigenvector of
  the heads' joint Hermitian moments, weighted by the energy of the queries that read it.
- keys without RoPE (or the channels that a partial RoPE does not rotate): any matrix, as for values. The constant part
  is left out, because it adds the same number to every score of a row.

All three are one problem (`shared_channels`), solved in float64. These are pure functions of tensors;
a method's layer measures the moments. Related: Jin et al. 2024, arXiv 2412.20677 (phases alone); Meng et al. 2025,
"TransMLA", arXiv 2502.07864 (a real joint PCA of keys).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from surgery.architecture.layer import pair_channels
from surgery.machine.placement import exact

if TYPE_CHECKING:
    from torch import Tensor


FLOOR = 1e-12  # least weight as a share of the largest: it avoids a division by zero for a channel without a reader


class SharedHead(NamedTuple):
    """One head that replaces m heads.

    Attributes:
        head: [d, n], rows of the shared head.
        maps: A [m, d, d], such that A_h times the shared head is nearest to head h. A query that read key h becomes
            A_hᵀ q; output columns O that read value h become O A_h.
        lost: energy of the m heads that the shared head misses, weighted by their readers.
        energy: total energy of the m heads, weighted in the same way.
    """

    head: Tensor
    maps: Tensor
    lost: float
    energy: float


def shared_channels(
    moments: Tensor, weights: Tensor, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The c channels from which m heads of e channels each are predicted with the least weighted error.

        minimise  E Σ_h (y_h − A_h y*)ᴴ W_h (y_h − A_h y*)    over y* = Σ_h T_h y_h and A

    With W = F Fᴴ this is the PCA of Fᴴ y. It is the optimum over every y* that is a function of the input, not only
    over sums of heads: for given A, the best y* is a projection, which lies in the span of the heads.

    Args:
        moments: E[y_h conj(y_g)], [..., m, e, m, e], Hermitian; float64 or complex128.
        weights: W [..., m, e, e], Hermitian and positive semidefinite.
        count: c; None: e.

    Returns:
        T [..., c, m, e], A [..., m, e, c], the lost weighted energy [...], and the total weighted energy [...]. y* has
        the mean square of the heads. Signs and phases are fixed, so that the same moments give the same bits.
    """
    import torch

    *batch, m, e = moments.shape[:-2]
    kept = e if count is None else count
    flat = moments.reshape(*batch, m * e, m * e)
    root, inverse = weight_roots(weights)
    weighted = _sides(root, flat.reshape(moments.shape)).reshape(flat.shape)
    energies, eigenvectors = torch.linalg.eigh((weighted + weighted.mH) / 2)
    directions = strongest_first(eigenvectors, kept).reshape(*batch, m, e, kept)
    gather = (root @ directions).mH  # T_h = U_hᴴ F_hᴴ, [..., m, c, e]
    spread = inverse @ directions
    gather = gather.transpose(-3, -2)  # [..., c, m, e]
    row = gather.reshape(*batch, kept, m * e)
    own = (row @ flat * row.conj()).sum(dim=(-1, -2)).real
    energy = flat.diagonal(dim1=-2, dim2=-1).real.sum(-1) / m
    scale = torch.where((own > 0) & (energy > 0), (energy / own).clamp(min=0).sqrt(), 1.0)
    energies = energies.clamp(min=0)
    gather, spread = gather * scale[..., None, None, None], spread / scale[..., None, None, None]
    return gather, spread, energies[..., :-kept].sum(-1), energies.sum(-1)


def weight_roots(weights: Tensor) -> tuple[Tensor, Tensor]:
    """F and F⁻¹ of weights W = F Fᴴ [..., m, e, e]. The m weights of a set without a reader count equally."""
    import torch

    values, vectors = torch.linalg.eigh(weights)
    largest = values.amax(dim=(-1, -2), keepdim=True)
    values = torch.where(largest > 0, torch.maximum(values, FLOOR * largest), 1.0)
    roots = values.sqrt().to(vectors.dtype).unsqueeze(-2)
    return (vectors * roots) @ vectors.mH, (vectors / roots) @ vectors.mH


def strongest_first(eigenvectors: Tensor, count: int) -> Tensor:
    """The last eigenvectors [..., n, count], the strongest first. The largest entry of each is real and positive."""
    import torch

    directions = eigenvectors[..., -count:].flip(-1)
    largest = directions.gather(-2, directions.abs().argmax(-2, keepdim=True))
    return directions * torch.where(largest.abs() > 0, torch.sgn(largest), torch.ones_like(largest)).conj()


def _sides(root: Tensor, moments: Tensor) -> Tensor:
    """F_hᴴ M_hg F_g for all pairs of heads: [..., m, e, m, e]."""
    import torch

    left = torch.einsum("...hji,...hjgk->...higk", root.conj(), moments)
    return torch.einsum("...higk,...gkl->...higl", left, root)


def merge_keys(
    keys: Tensor, moments: Tensor, queries: Tensor, *, rotary: int, positions: str, mean: Tensor | None = None
) -> SharedHead:
    """One key head that replaces m key heads.

    Args:
        keys: [m, d, n], before RoPE; with a bias, the bias is the last column and the last input is 1.
        moments: E[x xᵀ] [n, n] of the layer's input.
        queries: Σ E[q qᵀ] [m, d, d] over the query heads that read each of these keys, before RoPE.
        rotary, positions: number of channels that RoPE rotates, and how they are paired (`pair_channels`).
        mean: E[x] [n], to leave out the constant part of channels without RoPE; None if it counts (learned sinks).
    """
    import torch

    m, d, _ = keys.shape
    head, maps = torch.empty_like(keys[0]), keys.new_zeros(m, d, d)
    lost = energy = 0.0
    if rotary:
        turned = merge_rotated_keys(keys[:, :rotary], moments, queries[:, :rotary, :rotary], positions=positions)
        head[:rotary], maps[:, :rotary, :rotary], lost, energy = turned
    if rotary < d:
        centred = moments if mean is None else moments - torch.outer(mean, mean)
        free = merge_values(keys[:, rotary:], centred, queries[:, rotary:, rotary:])
        head[rotary:], maps[:, rotary:, rotary:] = free.head, free.maps
        lost, energy = lost + free.lost, energy + free.energy
    return SharedHead(head, maps, lost, energy)


def merge_rotated_keys(keys: Tensor, moments: Tensor, queries: Tensor, *, positions: str, fold: int = 1) -> SharedHead:
    """One key head under RoPE of r channels that replaces m key heads of `fold` r channels.

    With a `fold`, RoPE turns that many channel pairs of a head by the same angle. One pair of the shared head stands
    for all of them, in every head.

    Args:
        keys: [m, fold r, n], before RoPE: for each member of a fold in turn, its r channels, paired by `positions`.
        moments, queries: as for `merge_keys`; queries [m, fold r, fold r].

    Returns:
        A head [r, n] with maps [m, fold r, r].
    """
    import torch

    m, d, _ = keys.shape
    size = d // fold
    real, imag = pair_channels(size, positions)
    members = keys.unflatten(1, (fold, size))
    rows = torch.complex(members[:, :, real], members[:, :, imag]).permute(2, 0, 1, 3)  # [F, m, fold, n]
    flat = rows.flatten(1, 2)
    pairs = (flat @ moments.to(rows.dtype) @ flat.mH).unflatten(2, (m, fold)).unflatten(1, (m, fold))
    energy = queries.unflatten(2, (fold, size)).unflatten(1, (fold, size))  # E[q qᵀ], [m, fold, r, fold, r]

    def moment(one: list[int], other: list[int]) -> Tensor:
        return energy[:, :, one, :, other]  # [F, m, fold, fold]

    weights = torch.complex(moment(real, real) + moment(imag, imag), moment(imag, real) - moment(real, imag))
    gather, spread, lost, total = shared_channels(pairs, weights, count=1)
    shared, factor = (gather.flatten(2) @ flat)[:, 0], spread[..., 0].permute(1, 2, 0)  # [F, n], [m, fold, F]
    head, maps = keys.new_empty(size, keys.shape[-1]), keys.new_zeros(m, fold, size, size)
    head[real], head[imag] = shared.real, shared.imag
    maps[:, :, real, real] = maps[:, :, imag, imag] = factor.real
    maps[:, :, real, imag], maps[:, :, imag, real] = -factor.imag, factor.imag
    return SharedHead(head, maps.flatten(1, 2), float(lost.sum()), float(total.sum()))


def merge_values(values: Tensor, moments: Tensor, readers: Tensor) -> SharedHead:
    """One value head (or key head without RoPE) that replaces m heads, by reduced-rank regression.

    Args:
        values: [m, d, n]; a bias is the last column, as for keys.
        moments: E[x xᵀ] [n, n].
        readers: Σ Oᵀ O [m, d, d] over the output columns O [D, d] that read each of these values.
    """
    m, d, n = values.shape
    flat = values.reshape(m * d, n)
    joint = (flat @ moments @ flat.T).reshape(m, d, m, d)
    gather, spread, lost, energy = shared_channels(joint, readers)
    return SharedHead(gather.reshape(d, m * d) @ flat, spread, float(lost), float(energy))


class Ridge(NamedTuple):
    """A weight fitted by least squares, and the chosen ridge (None: the old weight is kept).

    `before` and `after` are losses on the validation rows: see `fit_output`.
    """

    weight: Tensor
    ridge: float | None
    before: float
    after: float


def fit_output(
    old: Tensor,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    ridges: list[float],
    with_validation: bool = True,
) -> Ridge:
    """The output projection that comes nearest to the wanted outputs, with a ridge chosen on the validation rows.

        minimise  Σ_t ||r_t − W z_t||² + λ ||W − W_0||²,     λ = ridge · mean diag(Σ z zᵀ)

    The spectrum of the heads' outputs is steep. Without a good ridge the small directions are fitted to noise, and the
    model gets far worse than without any refit.

    Args:
        old: W_0 [D, n], the projection before the fit.
        train, validation: Σ r zᵀ [D, n] and Σ z zᵀ [n, n], each of the training rows and of the validation rows.
        ridges: values to try, from the middle one towards lower loss; in practice the loss has one minimum. If none
            beats W_0 on the validation rows, W_0 is kept.
        with_validation: also fit the validation rows, once the ridge is chosen. False if they judge a later fit that
            starts from this one.

    Returns:
        W in float64. `before` and `after` are Σ ||W z||² − 2 r·W z on the validation rows, for W_0 and for the fit to
        the training rows with the chosen ridge.
    """
    from surgery.calibration.moments import refit_output

    old, (cross, moments), (cross_validation, moments_validation) = exact(old), _wide(train), _wide(validation)

    def loss(weight: Tensor) -> float:
        return float((weight @ moments_validation * weight).sum() - 2 * (weight * cross_validation).sum())

    @cache
    def loss_of(index: int) -> float:
        if not 0 <= index < len(ridges):
            return math.inf
        return loss(refit_output(old, cross, moments, ridges[index]))

    before, ridges = loss(old), sorted(ridges)
    chosen = len(ridges) // 2
    while (nearest := min((chosen, chosen + 1, chosen - 1), key=loss_of)) != chosen:
        chosen = nearest
    if not loss_of(chosen) < before:
        return Ridge(old, None, before, before)
    if with_validation:
        cross, moments = cross + cross_validation, moments + moments_validation
    weight = refit_output(old, cross, moments, ridges[chosen])
    return Ridge(weight, ridges[chosen], before, loss_of(chosen))


def _wide(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return exact(pair[0]), exact(pair[1])
