"""The vector of low rank from which several linear maps of one input are predicted best."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-12  # least weight as a share of the largest: it avoids a division by zero for a direction without a reader


class JointRank(NamedTuple):
    """A vector C x and the maps that predict several blocks Y_b x from it.

    Attributes:
        vector: C [r, n].
        maps: A_b [d_b, r], one for each block.
        lost: the weighted energy of the blocks that is missed.
        energy: their weighted energy.
    """

    vector: Tensor
    maps: list[Tensor]
    lost: float
    energy: float


def joint_rank(blocks: list[Tensor], weights: list[Tensor], moments: Tensor, rank: int) -> JointRank:
    """The r numbers C x that predict all blocks with the least weighted error, by reduced-rank regression.

        minimise  E Σ_b (Y_b x − A_b C x)ᵀ W_b (Y_b x − A_b C x)    over C and A

    With W_b = F_b² this is the PCA of the stacked F_b Y_b x. The entries of C x have a mean square of 1 on average.
    Signs are fixed, so that the same moments give the same bits.

    Args:
        blocks: Y_b [d_b, n], float64.
        weights: W_b [d_b, d_b], symmetric and positive semidefinite.
        moments: E[x xᵀ] [n, n].
        rank: r, at most the number of rows of all blocks.
    """
    import torch

    roots, inverses = zip(*map(_roots, weights), strict=True)
    rows = torch.cat([root @ block for root, block in zip(roots, blocks, strict=True)])
    joint = rows @ moments @ rows.T
    energies, vectors = torch.linalg.eigh((joint + joint.T) / 2)
    energies, directions = energies.clamp(min=0), vectors[:, -rank:].flip(-1)  # the strongest first
    strongest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * torch.where(strongest < 0, -1.0, 1.0)
    size = energies[-rank:].mean().sqrt()
    size = size if size > 0 else torch.ones_like(size)
    pieces = (directions * size).split([len(block) for block in blocks])
    maps = [inverse @ piece for inverse, piece in zip(inverses, pieces, strict=True)]
    return JointRank((directions / size).T @ rows, maps, float(energies[:-rank].sum()), float(energies.sum()))


def _roots(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a weight, and its inverse; equal weights if there is no reader."""
    import torch

    values, vectors = torch.linalg.eigh((weight + weight.T) / 2)
    largest = values.amax()
    values = torch.where(largest > 0, torch.maximum(values, FLOOR * largest), 1.0).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
