"""Shared values fitted to what the base's attention wrote, by least squares as in `score_fit`; W_O is fixed.

    L = ½ Σ_t ω_t |Σ_h O_h Σ_s p_hts W_V x_s − r_t|²

p is the converted model's attention. The merge (`closed_form.merge_values`) minimises the loss of every head alone;
this one is of their sum, which is what the model sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ValuePiece:
    """One text of the calibration, in one layer.

    Attributes:
        x: [T, n], as in `score_fit.Piece`.
        weights: [H, r, T], the converted model's attention of some rows.
        wanted: [r, D], what the base's attention wrote there, without the bias.
        loud: ω [r].
    """

    x: Tensor
    weights: Tensor
    wanted: Tensor
    loud: Tensor


class ValueProblem:
    """L as a quadratic function of W_V [groups, d, n], for `score_fit.solve`.

    Args:
        output: O [D, H, d]; query head h reads KV head h // (H / groups).
    """

    def __init__(self, pieces: list[ValuePiece], output: Tensor, groups: int):
        self.pieces, self.output, self.groups = pieces, output, groups

    def product(self, weight: Tensor) -> Tensor:
        """H W."""
        given = weight.to(self.pieces[0].x)
        total = given.new_zeros(given.shape)
        for piece in self.pieces:
            values = (piece.x @ given.flatten(0, 1).T).unflatten(1, given.shape[:2]).transpose(0, 1)
            heads = (self._grouped(piece.weights) @ values).view(len(piece.weights), -1, given.shape[1])
            written = heads.transpose(0, 1).flatten(1) @ self.output.to(given).flatten(1).T
            self._add(total, written, piece)
        return total.to(weight)

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b, of W's shape, and Σ ω |r|²."""
        total, constant = self.pieces[0].x.new_zeros(weight.shape), 0.0
        for piece in self.pieces:
            self._add(total, piece.wanted, piece)
            constant += float((piece.wanted.double().square().sum(-1) * piece.loud.double()).sum())
        return total.to(weight), constant

    def preconditioner(self, shape) -> tuple[Tensor, Tensor]:
        import torch

        left = self.output.double().cpu().square().sum(0).reshape(self.groups, -1, shape[1]).mean(1)
        right, rows = 0.0, 0
        for piece in self.pieces:  # every fourth row is enough to know what attention reads
            read = (piece.weights[:, ::4] @ piece.x).flatten(0, 1)
            loud = piece.loud[::4].to(read).repeat(len(piece.weights))
            right = right + ((read.T * loud) @ read).double().cpu()
            rows += len(piece.loud[::4])
        whole = sum(len(piece.loud) for piece in self.pieces)
        return left, torch.as_tensor(right) * (whole / rows)

    def _add(self, total: Tensor, written: Tensor, piece: ValuePiece) -> None:
        """Add the adjoint of what is written [r, D]."""
        import torch

        back = (written * piece.loud.to(written).unsqueeze(-1)) @ self.output.to(written).flatten(1)
        back = back.unflatten(1, self.output.shape[1:]).transpose(0, 1).reshape(self.groups, -1, total.shape[1])
        total += torch.einsum("gtd,tn->gdn", self._grouped(piece.weights).mT @ back, piece.x)

    def _grouped(self, weights: Tensor) -> Tensor:
        return weights.reshape(self.groups, -1, weights.shape[-1])
