"""Second moments of activations, summed as a text streams by: float64, one matrix of the width of what is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 8  # products of pieces are summed in their own precision, before the sum is widened


class Products:
    """Σ a b over pieces, in float64.

    A few rows' product in float32 takes no longer than to widen and to add a large matrix: this is done for some
    pieces together.
    """

    def __init__(self):
        self._total, self._part, self._parts = None, None, 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._part = a @ b if self._part is None else self._part.addmm_(a, b)
        self._parts += 1
        if self._parts == AT_ONCE:
            self._widen()

    def _widen(self) -> None:
        self._total = self._part.double() if self._total is None else self._total.add_(self._part)
        self._part, self._parts = None, 0

    @property
    def total(self) -> torch.Tensor:
        if self._part is not None:
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
        """Rows [r, n], each with its weight ω [r], default 1."""
        wide = rows.double() if self.exact else rows
        scaled = wide if weights is None else wide * weights.to(wide).unsqueeze(-1)
        self.products.add(scaled.T, wide)
        column = scaled.double().sum(0)
        self.sum = column if self.sum is None else self.sum + column
        self.weight += len(rows) if weights is None else float(weights.double().sum())

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
    """Σ ω z zᵀ, Σ ω r zᵀ and Σ ω |r|²: all that the least squares of r on z need, in float64.

    Args:
        exact: products, too, are float64; else those of some calls are of z's dtype: half the time, 1e-6 off, which
            is small beside any ridge.
    """

    def __init__(self, exact: bool = True):
        self.moments, self.cross, self.energy, self.exact = Products(), Products(), 0.0, exact

    def add(self, z: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Rows z [t, n] and what is wanted of them r [t, D], each with its weight ω [t], default 1."""
        wide = z.double() if self.exact else z
        scaled = (wide if weights is None else wide * weights.to(wide).unsqueeze(-1)).T
        self.moments.add(scaled, wide)
        self.cross.add(scaled, r.to(wide))
        squares = r.double().square().sum(-1)
        self.energy += float((squares if weights is None else squares * weights.double()).sum())

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ ω r zᵀ [D, n], Σ ω z zᵀ [n, n])."""
        return self.cross.total.T, self.moments.total


def with_ones(x: torch.Tensor, bias: bool) -> torch.Tensor:
    """x [.., n], with a last column of ones where a bias is fitted like a weight."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if bias else x


def refit_output(old: Tensor, cross: Tensor, moments: Tensor, ridge: float) -> Tensor:
    """The output projection that, from the kept heads, comes nearest to what all heads wrote.

        minimise  Σ_t ||r_t − W z_t||² + λ ||W − W_0||²,     λ = ridge · mean diag(Σ z zᵀ)
        W = (Σ r zᵀ + λ W_0) (Σ z zᵀ + λ I)⁻¹

    With the means taken off z and r it is the best W beside a free bias r̄ − W z̄.

    The ridge pulls to the old columns: the larger it is, the more this is plain pruning.

    Args:
        old: W_0 [D, n], the columns of the kept heads.
        cross: Σ r zᵀ [D, n], with r the output that is wanted.
        moments: Σ z zᵀ [n, n], of the kept heads' outputs.
        ridge: > 0, relative to the mean square of z.

    Returns:
        W [D, n], float64.
    """
    import torch

    moments, old = moments.double(), old.double()
    weight = ridge * moments.diagonal().mean()
    if not weight:  # the heads say nothing on this text: nothing can be fitted
        return old
    system = moments.clone()
    system.diagonal().add_(weight)
    wanted = (cross.double() + weight * old).T
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:  # a pull so weak that rounding leaves the system indefinite
        return torch.linalg.solve(system, wanted).T
    return torch.cholesky_solve(wanted, factor).T
