"""Shared values fitted to what the base's attention wrote, by least squares as in `score_fit`; W_O is fixed.

    L = ½ Σ_t ω_t |Σ_h O_h Σ_s p_hts W_V x_s − r_t|²

p is the converted model's attention. The merge (`closed_form.merge_values`) minimises the loss of every head alone;
this one is of their sum, which is what the model sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from surgery.machine.parallel import parallel_map
from surgery.operations.gqa.fit_scores import Part, causal_parts, project

if TYPE_CHECKING:
    from torch import Tensor

    Found = TypeVar("Found")


@dataclass
class ValuePiece:
    """One text of the calibration, in one layer.

    Attributes:
        x: [T, n], as in `score_fit.Piece`.
        rows: long [r], rising.
        weights: [H, r, T], the converted model's attention of these rows; 0 for keys behind the query.
        wanted: [r, D], what the base's attention wrote there, without the bias.
        rms: ω [r].
    """

    x: Tensor
    rows: Tensor
    weights: Tensor
    wanted: Tensor
    rms: Tensor


class ValueProblem:
    """L as a quadratic function of W_V [groups, d, n], for `least_squares.solve`.

    Args:
        output: O [D, H, d]; query head h reads KV head h // (H / groups).
    """

    def __init__(self, pieces: list[ValuePiece], output: Tensor, groups: int):
        import torch

        self.pieces, self.output, self.groups = pieces, output, groups
        x = pieces[0].x
        self.columns = output.to(x).flatten(1)  # [D, H d]
        self.gram = self.columns.T @ self.columns
        self.rms = torch.cat([piece.rms for piece in pieces]).to(x).unsqueeze(-1)
        self.parts = causal_parts(pieces)
        self.weights = [  # of each part, heads that share a value head one after the other: [groups, n r, end]
            [piece.weights[:, part.own, : part.end].reshape(groups, -1, part.end) for part in parts]
            for piece, parts in zip(pieces, self.parts, strict=True)
        ]

    def product(self, weight: Tensor) -> Tensor:
        """H W."""
        heads, size = self.columns.shape[1] // weight.shape[1], weight.shape[1]
        given, mixed = weight.to(self.columns), self.columns.new_zeros(len(self.rms), heads, size)

        def mix(piece: ValuePiece, parts: list[Part], weights: list[Tensor]) -> None:
            values = project(given, piece.x)
            for part, p in zip(parts, weights, strict=True):
                mixed[part.rows] = (p @ values[:, : part.end]).view(heads, -1, size).transpose(0, 1)

        list(self._each(mix))
        return self._gradient(mixed.flatten(1) @ self.gram, weight)

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b, of W's shape, and Σ ω |r|²."""
        import torch

        wanted = torch.cat([piece.wanted for piece in self.pieces])
        constant = float((wanted.double().square().sum(-1) * self.rms[:, 0].double()).sum())
        return self._gradient(wanted @ self.columns, weight), constant

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        left = self.output.double().cpu().square().sum(0).reshape(self.groups, -1, self.output.shape[2]).mean(1)
        rows = sum(len(piece.rms[::4]) for piece in self.pieces)

        def read(piece: ValuePiece, *_) -> Tensor:  # every fourth row is enough to know what attention reads
            some = (piece.weights[:, ::4] @ piece.x).flatten(0, 1)
            rms = piece.rms[::4].to(some).repeat(len(piece.weights))
            return ((some.T * rms) @ some).double().cpu()

        return left, sum(self._each(read)) * (len(self.rms) / rows)

    def _gradient(self, back: Tensor, weight: Tensor) -> Tensor:
        """The adjoint, as W, of what heads are given back, [R, H d], once each row counts as it should."""
        import torch

        back = (back * self.rms).unflatten(1, (-1, weight.shape[1])).transpose(0, 1)  # [H, R, d]

        def of(piece: ValuePiece, parts: list[Part], weights: list[Tensor]) -> Tensor:
            values = back.new_zeros(self.groups, len(piece.x), weight.shape[1])
            for part, p in zip(parts, weights, strict=True):
                values[:, : part.end] += p.mT @ back[:, part.rows].reshape(self.groups, -1, weight.shape[1])
            return torch.einsum("gtd,tn->gdn", values, piece.x)

        return sum(self._each(of)).to(weight)

    def _each(self, work: Callable[..., Found]) -> Iterator[Found]:
        """What `work` gives of each piece, its parts and their weights."""
        return parallel_map(work, self.pieces, self.parts, self.weights, device=self.columns.device)
