"""Reverse KL: T² KL(q ‖ p), where p and q are the softmax of the base's and the student's logits divided by T.

It weights each token by the student's probability. Tokens that the base excludes cost most, and a mode of the base
that the student lacks costs hardly anything. Source: Gu et al. 2024 (MiniLLM), arXiv 2306.08543, eq. 1. There the
student samples the text; here the loss is token by token on given text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgery.healing.losses.base import BASE_LOGITS, BaseTopK, Chunk, LogitLoss, LossInputs

if TYPE_CHECKING:
    from torch import Tensor


class ReverseKL(LogitLoss):
    summary = "Reverse KL: KL(model || base), the base's divergence from the model's probabilities."
    goal = "the base's likely tokens"
    method = "reverse KL"
    needs = frozenset({BASE_LOGITS})
    reads_temperature = True

    def rows_and_slopes(self, chunk: Chunk, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """With f = log q − log p: the value is Σ q f, and its slope q (f − Σ q f)."""
        import torch

        temperature = inputs.temperature
        if isinstance(inputs.base, BaseTopK):
            return _of_top_k(chunk, inputs.base, temperature)
        log_q, q = chunk.log_probabilities(temperature)
        slopes = log_q - inputs.base.log_probabilities(chunk, temperature)[0]
        values = torch.linalg.vecdot(q, slopes)
        slopes.sub_(values[:, None]).mul_(q)
        return temperature**2 * values, slopes.mul_(temperature)


def _of_top_k(chunk: Chunk, base: BaseTopK, temperature: float) -> tuple[Tensor, Tensor]:
    """The reverse KL of two distributions over k + 1 outcomes, the last of which is "another token".

    It is never above the reverse KL over the vocabulary, and is equal to it if k is the size of the vocabulary.
    """
    import torch

    log_q, q = chunk.log_probabilities(temperature)
    log_p, tokens, log_p_rest = base.of(chunk)
    tiny = torch.finfo(q.dtype).tiny
    slopes = q.scatter(1, tokens, 0.0)
    q_k, q_rest = q.gather(1, tokens), slopes.sum(-1)
    of_k = log_q.gather(1, tokens) - log_p
    of_rest = q_rest.clamp(min=tiny).log() - log_p_rest.clamp(
        min=math.log(tiny)
    )  # a rest without mass must not give inf
    values = (q_k * of_k).sum(-1) + q_rest * of_rest
    slopes.mul_((of_rest - values)[:, None]).scatter_(1, tokens, q_k * (of_k - values[:, None]))
    return temperature**2 * values, slopes.mul_(temperature)
