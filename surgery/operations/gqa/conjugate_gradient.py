"""Least squares whose equations are never built: conjugate gradients, ended by what is held back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery.machine.parallel import check_cancelled

if TYPE_CHECKING:
    from torch import Tensor


class Quadratic(Protocol):
    """½ <W, H W> − <b, W> + ½ c, a function of one weight W [heads, d, n]; in float64, whatever it computes in."""

    def product(self, weight: Tensor) -> Tensor:
        """H W."""

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b, of the shape of W, and c."""

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        """H is about C ⊗ M: C as a number for each head and channel [heads, d], and M [n, n]."""


LOOKED = 3  # every so many steps the loss on pieces held back is looked at, which takes a quarter of a step


@dataclass
class Solved:
    """What `solve` found: the weight, and twice L as a share of the scores' variance before and after (held back)."""

    weight: Tensor
    before: float
    after: float
    steps: int


def solve(problem: Quadratic, held: Quadratic, start: Tensor, *, steps: int, damping: float) -> Solved:
    """Conjugate gradients on L from `start`, the best iterate by L on pieces held back, of those looked at.

    Nothing but the early end keeps the weight near `start`. So the steps must first go where the text says most: the
    preconditioner, a Kronecker product of a number for each head and channel and (M + damping · mean eigenvalue · I)⁻¹
    with M the moments of x, weighted as x is read, leaves the weak directions of x for last. The inverse of M itself
    would mend all at once, and from a few thousand rows the weak ones are mostly noise.

    Args:
        problem: to fit; `held`: the same of pieces held back.
        start: W_0 [heads, d, n], float64.
        steps: at most so many.
        damping: above 0.
    """
    import torch

    left, right = problem.preconditioner()
    right = right.cpu()
    inverse = torch.linalg.inv(right + damping * right.diagonal().mean() * torch.eye(len(right), dtype=right.dtype))
    scale = (left + 1e-9 * left.mean()).clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)

    def precondition(gradient: Tensor) -> Tensor:
        return gradient / scale @ inverse

    goal, constant = held.target(start)

    def loss(weight: Tensor) -> float:
        return float(((held.product(weight) - 2 * goal) * weight).sum()) + constant

    before = loss(start)
    best, lowest, taken = start, before, 0
    weight, residual = start, problem.target(start)[0] - problem.product(start)
    direction, size, first, done, over = None, 1.0, 0.0, 0, False
    while done < steps and not over:
        check_cancelled()
        better = precondition(residual)
        now = float((residual * better).sum())
        first = first or now
        over = now <= 1e-28 * first  # solved, to the last bits
        if not over:
            direction = better if direction is None else better + now / size * direction
            size, curved = now, problem.product(direction)
            curvature = float((direction * curved).sum())
            over = curvature <= 0  # rounding: there is no direction left
        if not over:
            length = size / curvature
            weight, residual, done = weight + length * direction, residual - length * curved, done + 1
        if over or done == steps or done % LOOKED == 0:
            here = loss(weight)
            over = over or here > lowest * (1 + 1e-3)
            if here < lowest:
                best, lowest, taken = weight, here, done
    return Solved(best, before / constant if constant else 0.0, lowest / constant if constant else 0.0, taken)
