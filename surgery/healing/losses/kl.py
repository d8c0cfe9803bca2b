"""Distillation: T² KL(p ‖ q), where p and q are the softmax of the base's and the student's logits divided by T.

The factor T² keeps the size of the gradient when T grows. Source: Hinton et al. 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.healing.losses.base import BASE_LOGITS, BaseLogits, BaseTopK, Chunk, LogitLoss, LossInputs

if TYPE_CHECKING:
    from torch import Tensor


class Distillation(LogitLoss):
    summary = "Distillation: KL(base || model), the model's divergence from the base's probabilities."
    goal = "the base's probabilities"
    method = "distillation"
    needs = frozenset({BASE_LOGITS})
    reads_temperature = True

    def rows_and_slopes(self, chunk: Chunk, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        import torch

        if isinstance(inputs.base, BaseTopK):
            return _of_top_k(chunk, inputs.base, inputs.temperature)
        temperature = inputs.temperature
        log_q, q = chunk.log_probabilities(temperature)
        log_p, p = inputs.base.log_probabilities(chunk, temperature)
        return temperature**2 * torch.linalg.vecdot(p, log_p - log_q), (q - p).mul_(temperature)


def _of_top_k(chunk: Chunk, base: BaseTopK, temperature: float) -> tuple[Tensor, Tensor]:
    """The KL of two distributions over k + 1 outcomes, the last of which is "another token".

    It is never above the KL over the vocabulary, and is equal to it if k is the size of the vocabulary.
    """
    import torch

    log_q, q = chunk.log_probabilities(temperature)
    log_p, tokens, log_p_rest = base.of(chunk)
    p, p_rest = log_p.exp(), log_p_rest.exp()
    slopes = q.scatter(1, tokens, 0.0)  # q of the others: their sum is exact, but 1 − Σ q of the k could be noise
    q_rest = slopes.sum(-1).clamp(min=torch.finfo(q.dtype).tiny)
    of_rest = torch.where(p_rest > 0, p_rest * (log_p_rest - q_rest.log()), 0.0)
    of_k = torch.where(p > 0, p * (log_p - log_q.gather(1, tokens)), 0.0).sum(-1)
    slopes.mul_((1 - p_rest / q_rest)[:, None]).scatter_(1, tokens, q.gather(1, tokens) - p)
    return temperature**2 * (of_k + of_rest), slopes.mul_(temperature)


def distillation(
    student: Tensor, teacher: Tensor, kept: Tensor, temperature: float = 1.0, count: int | None = None
) -> Tensor:
    """Mean of T² KL(p ‖ q) over the rows that count.

    Args:
        student, teacher: logits [batch, length, V]; no gradient goes to the teacher.
        kept: bool [batch, length], the rows that count.
        count: number of rows to average over; default those kept.
    """
    return _mean(student, BaseLogits(teacher), kept, temperature, count)


def distillation_top_k(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor,
    kept: Tensor,
    temperature: float = 1.0,
    count: int | None = None,
) -> Tensor:
    """`distillation` for a teacher that gives k tokens and the mass of all others (see `BaseTopK`)."""
    return _mean(student, BaseTopK(values, indices, rest), kept, temperature, count)


def _mean(student: Tensor, base: BaseLogits | BaseTopK, kept: Tensor, temperature: float, count) -> Tensor:
    from surgery.healing.losses.objective import measure

    inputs = LossInputs(kept, base=base, temperature=temperature)
    return measure(student, {"kl": (1.0, Distillation())}, inputs, count)[0]
