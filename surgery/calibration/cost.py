"""What it costs to measure a model, in floating-point operations: for the time that `plan` gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

GRADIENT = 3  # a forward with its backward, in forwards


def forward_flops(anatomy: Anatomy, tokens: float, length: int) -> float:
    """Floating-point operations of a model that reads so many tokens, in texts of one length.

    Two for each parameter and token, and the scores and sums of attention, which are computed for all pairs of tokens
    of a text. Of a mixture of experts it counts all experts: an upper bound.
    """
    attention = sum(4 * layer.heads * layer.head_dim * length for layer in anatomy.layers)
    return tokens * (2 * anatomy.parameters + attention)
