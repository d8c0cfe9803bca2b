"""Distance of the student's hidden states s to the base's t: the mean over layers and tokens of |s − t|² / |t|².

Each token's distance is relative, since hidden states grow from layer to layer, and the first token's are hundreds of
times as large as others'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.healing.losses.base import BASE_STATES, LossInputs, StateLoss

if TYPE_CHECKING:
    from torch import Tensor


class HiddenStates(StateLoss):
    summary = "Distance of each layer's hidden states to the base's, as a share of their energy."
    goal = "the base's hidden states"
    method = "relative squared distance"
    needs = frozenset({BASE_STATES})
    not_stored = BASE_STATES

    def mean(self, inputs: LossInputs, count: Tensor | int) -> Tensor:
        import torch

        kept = inputs.kept
        total = torch.zeros((), device=kept.device)
        for ours, theirs in zip(inputs.states, inputs.base_states, strict=True):
            wide = torch.promote_types(ours.dtype, torch.float32)
            theirs = theirs.detach().to(ours.device, wide)
            distance = (ours.to(wide) - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-30)
            total = total.to(distance) + distance.masked_fill(~kept.to(distance.device), 0.0).sum()
        return total / (len(inputs.states) * count)


def hidden_mse(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], kept: Tensor, count: int | None = None
) -> Tensor:
    """Mean over layers and kept tokens of |s − t|² / |t|².

    Args:
        student, teacher: hidden states [batch, length, D] of each layer; no gradient goes to the teacher.
        kept: bool [batch, length], the tokens that count.
        count: number of tokens to average over; default those kept.
    """
    from surgery.healing.losses.objective import rows_counted

    inputs = LossInputs(kept, states=student, base_states=teacher)
    return HiddenStates().mean(inputs, rows_counted(kept, count))
