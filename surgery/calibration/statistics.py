"""Second moments of activations, summed as a text streams by: float64, one matrix of the width of what is measured."""

from __future__ import annotations

import torch


class Moments:
    """Σ ω x xᵀ and Σ ω x over rows, in float64.

    Memory: one matrix [n, n], whatever the length of the text (4096 channels: 134 MB).

    Args:
        exact: as for `Regression`.
    """

    def __init__(self, exact: bool = True):
        self.total, self.sum, self.weight, self.exact = None, None, 0.0, exact

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Rows [r, n], each with its weight ω [r], default 1."""
        wide = rows.double() if self.exact else rows
        scaled = wide if weights is None else wide * weights.to(wide).unsqueeze(-1)
        product, column = (scaled.T @ wide).double(), scaled.double().sum(0)
        self.total = product if self.total is None else self.total + product
        self.sum = column if self.sum is None else self.sum + column
        self.weight += len(rows) if weights is None else float(weights.double().sum())

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
        exact: products, too, are float64; else those of one call are of z's dtype: half the time, and 1e-6 off, which
            is small beside any ridge.
    """

    def __init__(self, exact: bool = True):
        self.moments, self.cross, self.energy, self.exact = None, None, 0.0, exact

    def add(self, z: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Rows z [t, n] and what is wanted of them r [t, D], each with its weight ω [t], default 1."""
        wide = z.double() if self.exact else z
        scaled = (wide if weights is None else wide * weights.to(wide).unsqueeze(-1)).T
        moments, cross = (scaled @ wide).double(), (scaled @ r.to(wide)).T.double()
        squares = r.double().square().sum(-1)
        self.energy += float((squares if weights is None else squares * weights.double()).sum())
        self.moments = moments if self.moments is None else self.moments + moments
        self.cross = cross if self.cross is None else self.cross + cross

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ ω r zᵀ [D, n], Σ ω z zᵀ [n, n])."""
        return self.cross, self.moments


def with_ones(x: torch.Tensor, bias: bool) -> torch.Tensor:
    """x [.., n], with a last column of ones where a bias is fitted like a weight."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if bias else x
