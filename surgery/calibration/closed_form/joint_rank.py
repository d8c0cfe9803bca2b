"""The vector of low rank from which several linear maps of one input are predicted best."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from surgery.calibration.closed_form.low_rank import strongest_first, weight_roots

if TYPE_CHECKING:
    from torch import Tensor


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

    roots, inverses = zip(*(weight_roots((each + each.T)[None] / 2) for each in weights), strict=True)
    rows = torch.cat([root[0] @ block for root, block in zip(roots, blocks, strict=True)])
    joint = rows @ moments @ rows.T
    energies, vectors = torch.linalg.eigh((joint + joint.T) / 2)
    energies, directions = energies.clamp(min=0), strongest_first(vectors, rank)
    size = energies[-rank:].mean().sqrt()
    size = size if size > 0 else torch.ones_like(size)
    pieces = (directions * size).split([len(block) for block in blocks])
    maps = [inverse[0] @ piece for inverse, piece in zip(inverses, pieces, strict=True)]
    return JointRank((directions / size).T @ rows, maps, float(energies[:-rank].sum()), float(energies.sum()))
