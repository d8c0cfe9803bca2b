"""Queries or shared keys fitted to the base's attention by least squares, without ever building the equations.

The KL divergence between the base's attention row and the new one is, to second order, half the variance under the
base's weights p of the error of the scores (softmax does not see a constant):

    L = ½ Σ_t Σ_h Var_{s ~ p_hts}[ c q̃_ht·k̃_s − score_hts ],      q̃ = RoPE(W_Q x_t),  k̃ = RoPE(W_K x_s)

It does not see a key that the base hardly looks at and the new model does: from the second fit on p is the mean of the
base's and the new weights (`calibration.layer_seen.Settings.risen`).

It is quadratic in W_Q with the keys fixed, and in W_K with the queries fixed. Its equations have (d D)² numbers for a
head, so they are solved by conjugate gradients: a product with the Hessian is what attention itself costs.

What is summed over the text is in the dtype of the activations; the solver works in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .alignment import pair_channels

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Turn:
    """What stands between a projection and the scores at each position: RoPE, and whatever scales with it.

    Attributes:
        cos, sin: [length, d]: z becomes cos * z + sin * z[swap].
        swap: [d], the other channel of each pair.
    """

    cos: Tensor
    sin: Tensor
    swap: Tensor

    @classmethod
    def of(cls, factors: Tensor, free: float, size: int, positions: str) -> Turn:
        """From a complex factor for each position and frequency [length, rotary / 2], and one for other channels."""
        import torch

        rotary = 2 * factors.shape[1]
        real, imag = pair_channels(rotary, positions)
        cos = factors.real.new_full((len(factors), size), free)
        sin, swap = torch.zeros_like(cos), torch.arange(size, device=cos.device)
        cos[:, real] = cos[:, imag] = factors.real
        sin[:, real], sin[:, imag] = -factors.imag, factors.imag
        swap[real + imag] = torch.tensor(imag + real, dtype=swap.dtype, device=cos.device)
        return cls(cos, sin, swap)

    def to(self, dtype) -> Turn:
        return Turn(self.cos.to(dtype), self.sin.to(dtype), self.swap)

    def __call__(self, z: Tensor, rows=slice(None)) -> Tensor:
        """z [..., r, d] of the positions `rows`, turned."""
        return self.cos[rows] * z + self.sin[rows] * z[..., self.swap]

    def adjoint(self, z: Tensor, rows=slice(None)) -> Tensor:
        return self.cos[rows] * z - self.sin[rows] * z[..., self.swap]


@dataclass
class Piece:
    """One text of the calibration, in one layer.

    Attributes:
        x: [T, n], the layer's input in the converted model; the last column 1 where the projections have a bias.
        rows: positions of the queries that count, long [r].
        weights: p [H, r, T], the base's attention of these rows.
        scores: [H, r, T], the base's scores before softmax; anything finite where p is 0. They are read once.
    """

    x: Tensor
    rows: Tensor
    weights: Tensor
    scores: Callable[[], Tensor]

    @cached_property
    def asking(self) -> Tensor:
        """[r, n], inputs of the queries that count."""
        return self.x[self.rows]


class Fit:
    """The loss L as a function of W_Q or of W_K; both are a sum over pieces.

    Args:
        pieces: of the text.
        scale: c, the factor on q·k.
        turn_q, turn_k: of queries and keys.
        groups: number of KV heads; query head h reads KV head h // (H / groups).
    """

    def __init__(self, pieces: list[Piece], scale: float, turn_q: Turn, turn_k: Turn, groups: int):
        self.pieces, self.scale, self.turn_q, self.turn_k, self.groups = pieces, scale, turn_q, turn_k, groups

    def queries(self, weight: Tensor, piece: Piece) -> Tensor:
        """[groups, H / groups * r, d] of W [H, d, n]: heads that share a key head lie one after the other."""
        x = piece.asking
        z = self.turn_q((x @ weight.to(x).flatten(0, 1).T).unflatten(1, weight.shape[:2]).transpose(0, 1), piece.rows)
        return z.reshape(self.groups, -1, z.shape[-1])

    def keys(self, weight: Tensor, piece: Piece) -> Tensor:
        """[groups, T, d] of W [groups, d, n]."""
        z = (piece.x @ weight.to(piece.x).flatten(0, 1).T).unflatten(1, weight.shape[:2]).transpose(0, 1)
        return self.turn_k(z)

    def query_problem(self, key_weight: Tensor) -> Problem:
        """The quadratic problem in W_Q [H, d, n] for these keys W_K [groups, d, n]."""
        import torch

        fixed = []
        for piece in self.pieces:
            keys = self.keys(key_weight, piece) * self.scale  # c k̃: the factor is in them from here on
            fixed.append((keys, self._grouped(piece.weights) @ keys))  # k̃ and its mean under p

        def add(total: Tensor, weighted: Tensor, piece: Piece, place: int) -> None:
            """Add the adjoint of p * (error − mean error): `weighted` is p * error [groups, n r, T]."""
            keys, means = fixed[place]
            grad = weighted @ keys - weighted.sum(-1, keepdim=True) * means
            grad = self.turn_q.adjoint(grad.reshape(total.shape[0], -1, total.shape[1]), piece.rows)
            total += torch.einsum("hrd,rn->hdn", grad, piece.asking)

        def errors(weight: Tensor, piece: Piece, place: int) -> Tensor:
            return self.queries(weight, piece) @ fixed[place][0].mT

        def preconditioner(shape) -> tuple[Tensor, Tensor]:
            left, right = torch.zeros(shape[:2], dtype=torch.float64), 0.0
            for piece, (keys, means) in zip(self.pieces, fixed, strict=True):
                spread = self._grouped(piece.weights) @ keys.square() - means.square()
                left += spread.double().reshape(shape[0], -1, shape[1]).sum(1).cpu()
                x = piece.asking.double()
                right = right + x.T @ x
            count = sum(len(piece.rows) for piece in self.pieces)
            return self._by_pairs(left / count, self.turn_q), right

        return Problem(self, errors, add, preconditioner)

    def key_problem(self, query_weight: Tensor) -> Problem:
        """The quadratic problem in W_K [groups, d, n] for these queries W_Q [H, d, n]."""
        import torch

        fixed = [self.queries(query_weight, piece) * self.scale for piece in self.pieces]

        def add(total: Tensor, weighted: Tensor, piece: Piece, place: int) -> None:
            queries = fixed[place]
            grad = weighted.mT @ queries
            grad = grad - self._grouped(piece.weights).mT @ (weighted.sum(-1, keepdim=True) * queries)
            total += torch.einsum("gtd,tn->gdn", self.turn_k.adjoint(grad), piece.x)

        def errors(weight: Tensor, piece: Piece, place: int) -> Tensor:
            return fixed[place] @ self.keys(weight, piece).mT

        def preconditioner(shape) -> tuple[Tensor, Tensor]:
            left, right, count = torch.zeros(shape[:2], dtype=torch.float64), 0.0, 0
            for piece, queries in zip(self.pieces, fixed, strict=True):
                left += queries.double().square().sum(1).cpu()
                received = piece.weights.sum((0, 1)).double()
                x = piece.x.double()
                right = right + (x.T * received) @ x
                count += queries.shape[1]
            return self._by_pairs(left / count, self.turn_k), right

        return Problem(self, errors, add, preconditioner)

    def _by_pairs(self, curvature: Tensor, turn: Turn) -> Tensor:
        """Of the channels of a pair, which RoPE mixes, the mean."""
        return (curvature + curvature[:, turn.swap.cpu()]) / 2

    def _grouped(self, weights: Tensor) -> Tensor:
        return weights.reshape(self.groups, -1, weights.shape[-1])


@dataclass
class Problem:
    """L as a quadratic function of one weight: ½ <W, H W> − <b, W> + ½ c, never built."""

    fit: Fit
    errors: Callable
    add: Callable
    preconditioner: Callable

    def product(self, weight: Tensor) -> Tensor:
        """H W."""
        given = weight.to(self.fit.pieces[0].x)
        total = given.new_zeros(given.shape)
        for place, piece in enumerate(self.fit.pieces):
            found = self.errors(given, piece, place)
            self.add(total, found.mul_(self.fit._grouped(piece.weights)), piece, place)
        return total.to(weight)

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b, of W's shape, and c = Σ Var[score]."""
        total, constant = self.fit.pieces[0].x.new_zeros(weight.shape), 0.0
        for place, piece in enumerate(self.fit.pieces):
            scores = piece.scores()
            weighted = scores * piece.weights
            means = weighted.sum(-1)
            constant += float((weighted * scores).double().sum() - means.double().square().sum())
            self.add(total, self.fit._grouped(weighted), piece, place)
        return total.to(weight), constant


@dataclass
class Solved:
    """What `solve` found: the weight, and twice L as a share of the scores' variance before and after (held back)."""

    weight: Tensor
    before: float
    after: float
    steps: int


def solve(problem: Problem, held: Problem, start: Tensor, *, steps: int, damping: float) -> Solved:
    """Conjugate gradients on L from `start`, the best iterate by L on pieces held back.

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

    left, right = problem.preconditioner(start.shape)
    values, vectors = torch.linalg.eigh(right.cpu())
    inverse = (vectors / (values.clamp(min=0) + damping * float(values.mean()))) @ vectors.T
    scale = (left + 1e-9 * left.mean()).clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)

    def precondition(gradient: Tensor) -> Tensor:
        return gradient / scale @ inverse

    goal, constant = held.target(start)

    def loss(weight: Tensor) -> float:
        return float(((held.product(weight) - 2 * goal) * weight).sum()) + constant

    before = loss(start)
    best, lowest, taken = start, before, 0
    weight, residual = start, problem.target(start)[0] - problem.product(start)
    direction, size, first = None, 1.0, 0.0
    for step in range(steps):
        better = precondition(residual)
        now = float((residual * better).sum())
        first = first or now
        if now <= 1e-28 * first:  # solved, to the last bits
            break
        direction = better if direction is None else better + now / size * direction
        size, curved = now, problem.product(direction)
        curvature = float((direction * curved).sum())
        if curvature <= 0:  # rounding: there is no direction left
            break
        length = size / curvature
        weight, residual = weight + length * direction, residual - length * curved
        here = loss(weight)
        if here < lowest:
            best, lowest, taken = weight, here, step + 1
        elif here > lowest * (1 + 1e-3):
            break
    return Solved(best, before / constant if constant else 0.0, lowest / constant if constant else 0.0, taken)
