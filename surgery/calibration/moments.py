"""Second moments of activations, summed as a text streams by: float64, one matrix of the width of what is measured."""

from __future__ import annotations

import torch

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
