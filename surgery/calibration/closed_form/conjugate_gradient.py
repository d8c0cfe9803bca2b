"""Least squares by conjugate gradients, stopped early by the validation loss. The equations are never built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery.machine.parallel import check_cancelled

if TYPE_CHECKING:
    from torch import Tensor


class Quadratic(Protocol):
    """½ <W, H W> − <b, W> + ½ c, a function of one weight W [heads, d, n].

    Arguments and results are float64; the sums may be computed in another dtype.
    """

    def product(self, weight: Tensor) -> Tensor:
        """H W [heads, d, n]."""

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b [heads, d, n], and c."""

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        """C and M with H close to C ⊗ M: C holds a number for each head and channel [heads, d], and M is [n, n].

        Both are on the device that solves.
        """


CHECK_EVERY = 3  # steps between two validation losses; computing one takes a quarter of a step


@dataclass
class Solution:
    """The result of `solve`.

    Attributes:
        weight: [heads, d, n], float64.
        before, after: validation loss of the start and of `weight`: 2 L as a share of c.
        steps: the number of steps that led to `weight`.
    """

    weight: Tensor
    before: float
    after: float
    steps: int


def solve(problem: Quadratic, validation: Quadratic, start: Tensor, *, steps: int, damping: float) -> Solution:
    """Minimise L by conjugate gradients from `start`; the iterate with the least validation loss is the result.

    Only the early stop keeps the weight near `start`. So the first steps must go where the text carries most evidence,
    and the preconditioner does that. It is the Kronecker product of a number for each head and channel with
    (M + damping · mean eigenvalue · I)⁻¹, where M holds the second moments of the input x, weighted by how much x is
    read. It leaves the weak directions of x for last. The inverse of M itself would correct all directions at once;
    estimated from a few thousand rows, the weak directions are mostly noise.

    Args:
        problem: L on the training samples.
        validation: L on the validation samples.
        start: W_0 [heads, d, n], float64. It may be on another device than the problem's, and so is the solution.
        steps: the largest number of steps.
        damping: strength of the identity in the preconditioner, above 0.
    """
    import torch

    head_scale, moments = problem.preconditioner()
    home, start = start.device, start.to(moments.device)
    system = moments + damping * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
    inverse, failed = torch.linalg.inv_ex(system)
    if failed:  # x is 0 on this text: there is nothing to correct
        inverse = torch.linalg.pinv(system, hermitian=True)
    scale = (head_scale + 1e-9 * head_scale.mean()).clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)

    def precondition(gradient: Tensor) -> Tensor:
        return (gradient / scale) @ inverse

    goal, constant = validation.target(start)

    def loss(weight: Tensor) -> float:
        return float(((validation.product(weight) - 2 * goal) * weight).sum()) + constant

    before = loss(start)
    best, lowest, best_step = start, before, 0
    weight, residual = start, problem.target(start)[0] - problem.product(start)
    direction, last_slope, first_slope, step, finished = None, 1.0, 0.0, 0, False
    while step < steps and not finished:
        check_cancelled()
        preconditioned = precondition(residual)
        slope = float((residual * preconditioned).sum())
        first_slope = first_slope or slope
        finished = slope <= 1e-28 * first_slope or slope == 0  # solved to rounding error
        if not finished:
            direction = preconditioned if direction is None else preconditioned + slope / last_slope * direction
            last_slope, curved = slope, problem.product(direction)
            curvature = float((direction * curved).sum())
            finished = curvature <= 0  # only rounding does this: no direction is left
        if not finished:
            length = last_slope / curvature
            weight, residual, step = weight + length * direction, residual - length * curved, step + 1
        if finished or step == steps or step % CHECK_EVERY == 0:
            current = loss(weight)
            finished = finished or current > lowest * (1 + 1e-3)
            if current < lowest:
                best, lowest, best_step = weight, current, step
    return Solution(
        best.to(home), before / constant if constant else 0.0, lowest / constant if constant else 0.0, best_step
    )
