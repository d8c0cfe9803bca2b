"""Second moments of activations, summed over a text in float64, and least squares from these sums.

A sum is one matrix as wide as the number of channels, whatever the length of the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgery.machine.placement import exact

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 8  # number of products summed in their own dtype before the sum is added in float64


class Products:
    """Σ a b over chunks of rows, in float64.

    Eight products are summed in their own dtype before they are added to the float64 total, because widening a large
    matrix is as expensive as the product of a few rows.
    """

    def __init__(self):
        self._total, self._pending, self._pending_count = None, None, 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._pending = a @ b if self._pending is None else self._pending.addmm_(a, b)
        self._pending_count += 1
        if self._pending_count == AT_ONCE:
            self._widen()

    def _widen(self) -> None:
        if self._total is None:
            self._total = exact(self._pending)
        else:
            self._total.add_(self._pending.to(self._total.device))
        self._pending, self._pending_count = None, 0

    @property
    def total(self) -> torch.Tensor:
        """The sum so far, float64; None before the first product."""
        if self._pending is not None:
            self._widen()
        return self._total


class Moments:
    """Σ ω x xᵀ and Σ ω x over rows, in float64.

    Memory: one matrix [n, n], whatever the length of the text (4096 channels: 134 MB).

    Args:
        exact: as for `Regression`.
    """

    def __init__(self, exact: bool = True):
        self.products, self.sum, self.weight, self.exact = Products(), None, 0.0, exact

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows [r, n], each with its weight ω [r], default 1."""
        wide = exact(rows) if self.exact else rows
        scaled = wide if weights is None else wide * weights.to(wide).unsqueeze(-1)
        self.products.add(scaled.T, wide)
        column = exact(scaled).sum(0)
        self.sum = column if self.sum is None else self.sum + column
        self.weight += len(rows) if weights is None else float(exact(weights).sum())

    @property
    def total(self) -> torch.Tensor:
        """Σ ω x xᵀ [n, n]."""
        return self.products.total

    @property
    def mean(self) -> torch.Tensor:
        """E[x] [n]."""
        return self.sum / self.weight

    @property
    def second(self) -> torch.Tensor:
        """E[x xᵀ] [n, n]; not centred."""
        return self.total / self.weight

    @property
    def centred(self) -> torch.Tensor:
        """Σ ω (x − E[x]) (x − E[x])ᵀ [n, n]."""
        return self.total - torch.outer(self.sum, self.mean)


class Regression:
    """Σ ω z zᵀ, Σ ω r zᵀ and Σ ω |r|² in float64, which are all that least squares of r on z needs.

    Args:
        exact: compute the products in float64, too. False: in z's dtype, which takes half the time. The error of 1e-6
            is small compared with any ridge.
    """

    def __init__(self, exact: bool = True):
        self.moments, self.cross, self.energy, self.exact = Products(), Products(), 0.0, exact

    def add(self, z: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows z [t, n] and their targets r [t, D], each with its weight ω [t], default 1."""
        wide = exact(z) if self.exact else z
        scaled = (wide if weights is None else wide * weights.to(wide).unsqueeze(-1)).T
        self.moments.add(scaled, wide)
        self.cross.add(scaled, r.to(wide))
        squares = exact(r).square().sum(-1)
        self.energy += float((squares if weights is None else squares * exact(weights)).sum())

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ ω r zᵀ [D, n], Σ ω z zᵀ [n, n])."""
        return self.cross.total.T, self.moments.total


def with_ones(x: torch.Tensor, bias: bool) -> torch.Tensor:
    """x [.., n], with a last column of ones if `bias`: a bias is then fitted like a weight."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if bias else x


def refit_output(old: Tensor, cross: Tensor, moments: Tensor, ridge: float) -> Tensor:
    """The output projection of the kept heads whose output comes nearest to the target, the output of all heads.

        minimise  Σ_t ||r_t − W z_t||² + λ ||W − W_0||²,     λ = ridge · mean diag(Σ z zᵀ)
        W = (Σ r zᵀ + λ W_0) (Σ z zᵀ + λ I)⁻¹

    If the means are subtracted from z and r, this W is the best one together with a free bias r̄ − W z̄.

    The ridge pulls W to the old columns: the larger it is, the nearer the result is to pruning without a refit.

    Args:
        old: W_0 [D, n], the columns of the kept heads.
        cross: Σ r zᵀ [D, n], where r is the target.
        moments: Σ z zᵀ [n, n], where z are the outputs of the kept heads.
        ridge: > 0, relative to the mean square of z.

    Returns:
        W [D, n], float64.
    """
    moments, old = exact(moments), exact(old)
    weight = ridge * moments.diagonal().mean()
    if not weight:  # the heads' outputs are 0 on this text: nothing can be fitted
        return old
    system = moments.clone()
    system.diagonal().add_(weight)
    target = (exact(cross) + weight * old).T
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:  # the ridge is so small that rounding makes the system indefinite
        return torch.linalg.solve(system, target).T
    return torch.cholesky_solve(target, factor).T
