"""Key and value heads merged in closed form: the shared heads that lose least, and what their readers must absorb.

Averaging heads treats a channel as if it meant the same in every head. It does not: what a query or the output
projection can undo is free, so heads that differ by it are the same head. Merging is a low-rank approximation of what
the heads give on a text:

- values: any matrix passes between W_V and W_O, so the best shared value is a reduced-rank regression of all values of
  the group, each weighted by what the output projection makes of it;
- keys under RoPE: a channel pair is one complex number that RoPE multiplies by a phase, and the linear maps that
  commute with it are the products with a complex number. For each frequency the best shared key is the leading
  eigenvector of the heads' joint Hermitian moments, weighted by the energy of the queries that read it;
- keys without RoPE (or the channels that a partial RoPE leaves alone): any matrix, as for values. What is constant
  there is left out: it adds the same number to every score of a row.

All three are one problem (`shared_channels`), solved in float64. These are pure functions of tensors;
`layer.py` measures the moments. Related: Jin et al. 2024, arXiv 2412.20677 (phases alone); Meng et al. 2025,
"TransMLA", arXiv 2502.07864 (a real joint PCA of keys).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from surgery.operations.gqa.merge import pair_channels

if TYPE_CHECKING:
    from torch import Tensor


FLOOR = 1e-12  # of the largest weight: a channel without a reader must not be divided by zero


class SharedHead(NamedTuple):
    """One head in place of m.

    Attributes:
        head: [d, n], the shared head's rows.
        maps: A [m, d, d], such that A_h times the shared head is nearest to head h. A query that read key h becomes
            A_hᵀ q; output columns O that read value h become O A_h.
        lost: energy of the heads that the shared one misses, weighted as their readers weight it.
        energy: all energy of the heads, weighted in the same way.
    """

    head: Tensor
    maps: Tensor
    lost: float
    energy: float


def shared_channels(moments: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The e channels from which m heads of e channels each are predicted with the least weighted error.

        minimise  E Σ_h (y_h − A_h y*)ᴴ W_h (y_h − A_h y*)    over y* = Σ_h T_h y_h and A

    With W = F Fᴴ this is the PCA of Fᴴ y. It is the optimum over every y* that is a function of the input, not over
    sums of heads alone: for given A the best y* is a projection, which lies in their span.

    Args:
        moments: E[y_h conj(y_g)], [..., m, e, m, e], Hermitian; float64 or complex128.
        weights: W [..., m, e, e], Hermitian and not negative.

    Returns:
        T [..., e, m, e], A [..., m, e, e], the weighted energy that is lost, and all of it [...]. The scale of y* is
        that of the heads (mean square); signs and phases are fixed, so that the same moments give the same bits.
    """
    import torch

    *batch, m, e = moments.shape[:-2]
    flat = moments.reshape(*batch, m * e, m * e)
    values, vectors = torch.linalg.eigh(weights)
    largest = values.amax(dim=(-1, -2), keepdim=True)
    values = torch.where(
        largest > 0, torch.maximum(values, FLOOR * largest), 1.0
    )  # without any reader weights are equal
    roots = values.sqrt().to(vectors.dtype).unsqueeze(-2)
    root, inverse = (vectors * roots) @ vectors.mH, (vectors / roots) @ vectors.mH
    weighted = _sides(root, flat.reshape(moments.shape)).reshape(flat.shape)
    energies, eigenvectors = torch.linalg.eigh((weighted + weighted.mH) / 2)
    directions = eigenvectors[..., -e:].flip(-1)  # [..., m e, e], the strongest first
    strongest = directions.gather(-2, directions.abs().argmax(-2, keepdim=True))
    directions = directions * torch.where(strongest.abs() > 0, torch.sgn(strongest), torch.ones_like(strongest)).conj()
    directions = directions.reshape(*batch, m, e, e)
    gather = (root @ directions).mH  # T_h = U_hᴴ F_hᴴ, [..., m, e(kept), e]
    spread = inverse @ directions
    gather = gather.transpose(-3, -2)  # [..., e(kept), m, e]
    row = gather.reshape(*batch, e, m * e)
    own = (row @ flat * row.conj()).sum(dim=(-1, -2)).real
    energy = flat.diagonal(dim1=-2, dim2=-1).real.sum(-1) / m
    scale = torch.where((own > 0) & (energy > 0), (energy / own).clamp(min=0).sqrt(), 1.0)
    energies = energies.clamp(min=0)
    gather, spread = gather * scale[..., None, None, None], spread / scale[..., None, None, None]
    return gather, spread, energies[..., :-e].sum(-1), energies.sum(-1)


def _sides(root: Tensor, moments: Tensor) -> Tensor:
    """F_hᴴ M_hg F_g for all pairs of heads: [..., m, e, m, e]."""
    import torch

    left = torch.einsum("...hji,...hjgk->...higk", root.conj(), moments)
    return torch.einsum("...higk,...gkl->...higl", left, root)


def merge_keys(
    keys: Tensor, moments: Tensor, queries: Tensor, *, rotary: int, positions: str, mean: Tensor | None = None
) -> SharedHead:
    """One key head in place of m.

    Args:
        keys: [m, d, n], before RoPE; a bias is the last column, and the last input is then 1.
        moments: E[x xᵀ] [n, n] of the layer's input.
        queries: Σ E[q qᵀ] [m, d, d] over the query heads that read each of these keys, before RoPE.
        rotary, positions: channels that RoPE rotates, and how they are paired (`merge.pair_channels`).
        mean: E[x] [n], to leave out the constant part of channels without RoPE; None where it counts (learned sinks).
    """
    import torch

    m, d, _ = keys.shape
    head, maps = torch.empty_like(keys[0]), keys.new_zeros(m, d, d)
    lost = energy = 0.0
    if rotary:
        real, imag = pair_channels(rotary, positions)
        rows = torch.complex(keys[:, real], keys[:, imag]).transpose(0, 1)  # [F, m, n]
        pairs = rows @ moments.to(rows.dtype) @ rows.mH
        power = (queries[:, real, real] + queries[:, imag, imag]).T  # [F, m]
        gather, spread, missing, total = shared_channels(
            pairs[:, :, None, :, None], power[..., None, None].to(rows.dtype)
        )
        shared = (gather[:, :, :, 0] @ rows)[:, 0]
        head[real], head[imag] = shared.real, shared.imag
        factor = spread[..., 0, 0].T  # [m, F]
        maps[:, real, real] = maps[:, imag, imag] = factor.real
        maps[:, real, imag], maps[:, imag, real] = -factor.imag, factor.imag
        lost, energy = float(missing.sum()), float(total.sum())
    if rotary < d:
        centred = moments if mean is None else moments - torch.outer(mean, mean)
        free = merge_values(keys[:, rotary:], centred, queries[:, rotary:, rotary:])
        head[rotary:], maps[:, rotary:, rotary:] = free.head, free.maps
        lost, energy = lost + free.lost, energy + free.energy
    return SharedHead(head, maps, lost, energy)


def merge_values(values: Tensor, moments: Tensor, readers: Tensor) -> SharedHead:
    """One value head (or key head without RoPE) in place of m: reduced-rank regression.

    Args:
        values: [m, d, n], a bias as for keys.
        moments: E[x xᵀ] [n, n].
        readers: Σ Oᵀ O [m, d, d] over the output columns O [D, d] that read each of these values.
    """
    m, d, n = values.shape
    flat = values.reshape(m * d, n)
    joint = (flat @ moments @ flat.T).reshape(m, d, m, d)
    gather, spread, lost, energy = shared_channels(joint, readers)
    return SharedHead(gather.reshape(d, m * d) @ flat, spread, float(lost), float(energy))


class Ridge(NamedTuple):
    """A weight fitted by least squares, and the ridge that was chosen for it (None: the old weight stayed).

    `before` and `after` are losses on the validation rows, see `fit_output`.
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
    """The output projection nearest to the wanted outputs, its ridge chosen on the validation rows.

        minimise  Σ_t ||r_t − W z_t||² + λ ||W − W_0||²,     λ = ridge · mean diag(Σ z zᵀ)

    The spectrum of heads' outputs is steep: without a good ridge the small directions are fitted to noise, and the
    model gets far worse than without any refit.

    Args:
        old: W_0 [D, n], what the merge gives.
        train, validation: Σ r zᵀ [D, n] and Σ z zᵀ [n, n] of the rows to fit, and of those that are held back.
        ridges: values to try, from the middle one towards lower loss; in practice the loss has one valley. If none
            beats W_0 on the validation rows, W_0 stays.
        with_validation: once the ridge is chosen, the validation rows are fitted as well. False where they are to
            judge another fit on top of this one.

    Returns:
        W float64; `before` and `after` are Σ ||W z||² − 2 r·W z on the validation rows, of W_0 and of the result.
    """
    from surgery.calibration.moments import refit_output

    old, (cross, moments), (cross_validation, moments_validation) = old.double(), _wide(train), _wide(validation)

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
    return pair[0].double(), pair[1].double()
