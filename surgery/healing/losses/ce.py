"""Cross-entropy: −log q(next token) of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.healing.losses.base import Chunk, LogitLoss, LossInputs, predicts

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(LogitLoss):
    summary = "Cross-entropy of the text's next token."
    goal = "the next token of the text"
    method = "cross-entropy"

    def rows_and_slopes(self, chunk: Chunk, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        log_q, q = chunk.log_probabilities(1.0)
        target = inputs.next_tokens[chunk.rows].to(q.device)[:, None]
        slopes = q.scatter_add(1, target, q.new_tensor(-1.0).expand(target.shape))
        return -log_q.gather(1, target)[:, 0], slopes


def cross_entropy(logits: Tensor, labels: Tensor, count: int | None = None) -> Tensor:
    """Mean of −log q(next token).

    Args:
        logits: [batch, length, V].
        labels: long [batch, length], the tokens themselves; −100 for tokens that are not predicted.
        count: number of tokens to average over; default those that this batch predicts.
    """
    from surgery.healing.losses.objective import measure

    return measure(logits, {"ce": (1.0, CrossEntropy())}, LossInputs(predicts(labels), labels), count)[0]
