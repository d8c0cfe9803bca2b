"""Queries or shared keys fitted to the base's attention by least squares, without ever building the equations.

The KL divergence between the base's attention row and the new one is, to second order, half the variance under the
base's weights p of the error of the scores (softmax does not see a constant):

    L = ½ Σ_t Σ_h Var_{s ~ p_hts}[ c q̃_ht·k̃_s − score_hts ],      q̃ = RoPE(W_Q x_t),  k̃ = RoPE(W_K x_s)

It does not see a key that the base hardly looks at and the new model does: from the second fit on p is the mean of the
base's and the new weights (`calibration.layer_seen.Settings.reweight_keys`).

It is quadratic in W_Q with the keys fixed, and in W_K with the queries fixed. Its equations have (d D)² numbers for a
head, so they are solved by conjugate gradients: a product with the Hessian is what attention itself costs.

What is summed over the text is in the dtype of the activations; the solver works in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from surgery.machine.parallel import parallel_map
from surgery.operations.gqa.merge import pair_channels

if TYPE_CHECKING:
    from torch import Tensor

    Found = TypeVar("Found")


PARTS = 4  # of the rows of a piece


@dataclass
class Rotation:
    """What stands between a projection and the scores at each position: RoPE, and whatever scales with it.

    Attributes:
        cos, sin: [length, d]: z becomes cos * z + sin * z[swap].
        swap: [d], the other channel of each pair.
    """

    cos: Tensor
    sin: Tensor
    swap: Tensor

    @classmethod
    def of(cls, factors: Tensor, free: float, size: int, positions: str) -> Rotation:
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

    def to(self, dtype) -> Rotation:
        return Rotation(self.cos.to(dtype), self.sin.to(dtype), self.swap)

    def at(self, rows) -> Rotation:
        """What turns these positions alone."""
        return Rotation(self.cos[rows], self.sin[rows], self.swap)

    def __call__(self, z: Tensor) -> Tensor:
        """z [..., length, d], turned."""
        return (self.cos * z).addcmul_(self.sin, z[..., self.swap])

    def adjoint(self, z: Tensor) -> Tensor:
        return (self.cos * z).addcmul_(self.sin, z[..., self.swap], value=-1)


@dataclass
class Piece:
    """One text of the calibration, in one layer.

    Attributes:
        x: [T, n], the layer's input in the converted model; the last column 1 where the projections have a bias.
        rows: positions of the queries that count, long [r], rising.
        weights: p [H, r, T], the base's attention of these rows; 0 for keys behind the query.
        scores: [H, r, T], the base's scores before softmax; anything finite where p is 0. They are read once.
    """

    x: Tensor
    rows: Tensor
    weights: Tensor
    scores: Callable[[], Tensor]


class Part(NamedTuple):
    """Rows of a piece that lie together, and see no key from `end` on: products stop there."""

    own: slice  # among the rows of the piece
    rows: slice  # among the rows of all pieces
    end: int


def causal_parts(pieces: list) -> list[list[Part]]:
    """The rows of each piece, `Piece` or `ValuePiece`, in parts: a few, so that products stay large."""
    found, before = [], 0
    for piece in pieces:
        parts, begin = [], 0
        for rows in piece.rows.chunk(PARTS):
            end = begin + len(rows)
            parts.append(Part(slice(begin, end), slice(before + begin, before + end), int(rows[-1]) + 1))
            begin = end
        found.append(parts)
        before += begin
    return found


class ScoreObjective:
    """The loss L as a function of W_Q or of W_K; both are a sum over pieces.

    Args:
        pieces: of the text.
        scale: c, the factor on q·k.
        turn_q, turn_k: of queries and keys.
        groups: number of KV heads; query head h reads KV head h // (H / groups).
    """

    def __init__(self, pieces: list[Piece], scale: float, turn_q: Rotation, turn_k: Rotation, groups: int):
        import torch

        self.pieces, self.scale, self.turn_q, self.turn_k, self.groups = pieces, scale, turn_q, turn_k, groups
        self.parts = causal_parts(pieces)
        self.asking = torch.cat([piece.x[piece.rows] for piece in pieces])  # [R, n], inputs of all queries that count

    def each(self, work: Callable[[int, Piece], Found]) -> Iterator[Found]:
        """What `work` gives of each piece and its number."""
        return parallel_map(work, range(len(self.pieces)), self.pieces, device=self.asking.device)

    def keys(self, weight: Tensor, piece: Piece) -> Tensor:
        """[groups, T, d] of W [groups, d, n]."""
        return self.turn_k(project(weight, piece.x))

    def grouped(self, heads: Tensor) -> Tensor:
        """[groups, H / groups * r, ...] of [H, r, ...]: heads that share a key head lie one after the other."""
        return heads.reshape(self.groups, -1, heads.shape[-1])

    def query_problem(self, key_weight: Tensor) -> Problem:
        """The quadratic problem in W_Q [H, d, n] for these keys W_K [groups, d, n]."""
        return QueryProblem(self, key_weight)

    def key_problem(self, query_weight: Tensor) -> Problem:
        """The quadratic problem in W_K [groups, d, n] for these queries W_Q [H, d, n]."""
        return KeyProblem(self, query_weight)


def project(heads: Tensor, x: Tensor) -> Tensor:
    """[heads, T, d] of weights [heads, d, n] and inputs [T, n]."""
    return (x @ heads.to(x).flatten(0, 1).T).unflatten(1, heads.shape[:2]).transpose(0, 1)


class Problem:
    """L as a quadratic function of one weight: ½ <W, H W> − <b, W> + ½ c, never built; see `least_squares.Quadratic`.

    A kind says what the weight makes of the inputs (`moved`), the scores [groups, n r, end] of a part's rows with it,
    and the way back: what is given back to it (`nothing` at first, `add` a part's), and the gradient of that.
    """

    def __init__(self, fit: ScoreObjective):
        self.fit = fit

    def product(self, weight: Tensor) -> Tensor:
        """H W."""
        moved, back = self.moved(weight), self.nothing()

        def add(place: int, piece: Piece) -> None:
            for part in self.fit.parts[place]:
                errors = self.scores(moved, place, part)
                self.add(back, self._seen(errors, piece.weights, part), place, part)

        list(self.fit.each(add))
        return self.gradient(back).to(weight)

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b, of W's shape, and c = Σ Var[score]."""
        back = self.nothing()

        def add(place: int, piece: Piece) -> float:
            scores = piece.scores()
            weighted = scores * piece.weights
            means = weighted.sum(-1)
            for part in self.fit.parts[place]:
                there = self.fit.grouped(scores[:, part.own, : part.end].clone())
                self.add(back, self._seen(there, piece.weights, part), place, part)
            return float((weighted * scores).double().sum() - means.double().square().sum())

        constant = sum(self.fit.each(add))
        return self.gradient(back).to(weight), constant

    def _seen(self, errors: Tensor, weights: Tensor, part: Part) -> Tensor:
        """p * error, in place of the errors [groups, n r, end]."""
        heads = errors.view(len(weights), -1, part.end)
        return heads.mul_(weights[:, part.own, : part.end]).view_as(errors)

    def by_pairs(self, curvature: Tensor, turn: Rotation) -> Tensor:
        """Of the channels of a pair, which RoPE mixes, the mean."""
        return (curvature + curvature[:, turn.swap.cpu()]) / 2


class QueryProblem(Problem):
    """In W_Q, the keys fixed."""

    def __init__(self, fit: ScoreObjective, key_weight: Tensor):
        super().__init__(fit)
        # c k̃: the factor is in them from here on. And their mean under p, [H, r, d].
        self.keys = list(fit.each(lambda _, piece: fit.keys(key_weight, piece) * fit.scale))
        self.means = list(fit.each(lambda place, piece: self._mean(piece, self.keys[place])))

    def _mean(self, piece: Piece, keys: Tensor) -> Tensor:
        """[H, r, d], of something of keys [groups, T, d] under p."""
        return (self.fit.grouped(piece.weights) @ keys).view(*piece.weights.shape[:2], -1)

    def moved(self, weight: Tensor) -> Tensor:
        """Queries before RoPE, [R, H, d]."""
        return project(weight, self.fit.asking).transpose(0, 1)

    def nothing(self) -> Tensor:
        heads, _, size = self.means[0].shape
        return self.fit.asking.new_empty(len(self.fit.asking), heads, size)  # each row is given once

    def scores(self, queries: Tensor, place: int, part: Part) -> Tensor:
        queries = self._turn(place, part)(queries[part.rows].transpose(0, 1))
        return self.fit.grouped(queries) @ self.keys[place][:, : part.end].mT

    def add(self, back: Tensor, weighted: Tensor, place: int, part: Part) -> None:
        """Add the adjoint of p * (error − mean error)."""
        means = self.fit.grouped(self.means[place][:, part.own])
        found = weighted @ self.keys[place][:, : part.end] - weighted.sum(-1, keepdim=True) * means
        found = found.view(back.shape[1], -1, back.shape[2])
        back[part.rows] = self._turn(place, part).adjoint(found).transpose(0, 1)

    def gradient(self, back: Tensor) -> Tensor:
        return (back.flatten(1).T @ self.fit.asking).unflatten(0, back.shape[1:])

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        def spread(place: int, piece: Piece) -> Tensor:
            return (self._mean(piece, self.keys[place].square()) - self.means[place].square()).double().sum(1)

        wide = self.fit.asking.double()
        left = sum(self.fit.each(spread)).cpu() / len(wide)
        return self.by_pairs(left, self.fit.turn_q), wide.T @ wide

    def _turn(self, place: int, part: Part) -> Rotation:
        return self.fit.turn_q.at(self.fit.pieces[place].rows[part.own])


class KeyProblem(Problem):
    """In W_K, the queries fixed."""

    def __init__(self, fit: ScoreObjective, query_weight: Tensor):
        super().__init__(fit)
        raw = project(query_weight, fit.asking)
        self.queries = [  # of each piece, [H, r, d]
            fit.turn_q.at(piece.rows)(raw[:, parts[0].rows.start : parts[-1].rows.stop]) * fit.scale
            for piece, parts in zip(fit.pieces, fit.parts, strict=True)
        ]

    def moved(self, weight: Tensor) -> list[Tensor]:
        """Keys, [groups, T, d] of each piece."""
        return list(self.fit.each(lambda _, piece: self.fit.keys(weight, piece)))

    def nothing(self) -> list[Tensor]:
        size = self.queries[0].shape[-1]
        return [piece.x.new_zeros(self.fit.groups, len(piece.x), size) for piece in self.fit.pieces]

    def scores(self, keys: list[Tensor], place: int, part: Part) -> Tensor:
        return self.fit.grouped(self.queries[place][:, part.own]) @ keys[place][:, : part.end].mT

    def add(self, back: list[Tensor], weighted: Tensor, place: int, part: Part) -> None:
        """Add the adjoint of p * (error − mean error)."""
        p = self.fit.pieces[place].weights[:, part.own, : part.end]
        weighted = weighted.view(len(p), -1, part.end)
        weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        queries = self.fit.grouped(self.queries[place][:, part.own])
        back[place][:, : part.end] += self.fit.grouped(weighted).mT @ queries

    def gradient(self, back: list[Tensor]) -> Tensor:
        def of(place: int, piece: Piece) -> Tensor:
            keys = self.fit.turn_k.adjoint(back[place]).transpose(0, 1)
            return (keys.flatten(1).T @ piece.x).unflatten(0, keys.shape[1:])

        return sum(self.fit.each(of))

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        fit, left, right = self.fit, 0.0, 0.0
        for piece, queries in zip(fit.pieces, self.queries, strict=True):
            left = left + fit.grouped(queries).double().square().sum(1)
            right = right + ((piece.x.T * piece.weights.sum((0, 1))) @ piece.x).double()
        heads = len(self.queries[0])
        return self.by_pairs(left.cpu() / (len(fit.asking) * heads // fit.groups), fit.turn_k), right
