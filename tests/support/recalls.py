"""Models that seem to repeat passkeys: their attention is their own, and what they write is planted."""

from __future__ import annotations

import torch

from surgery.calibration.attention_hook import answer_logits
from surgery.operations.head_scorers import retrieval


def plant_answers(monkeypatch, wrong=lambda sequence: ()) -> None:
    """Let the scorer `retrieval` see a model that writes the true tokens, but token 0 on the rows in `wrong`.

    Args:
        wrong: called with a sequence; returns indices of its rows.
    """

    def planted(model, sequence):
        logits = torch.zeros_like(answer_logits(model, sequence))
        written = sequence.ids[sequence.rows + 1].clone()
        written[list(wrong(sequence))] = 0
        return logits.scatter(-1, written[:, None].to(logits.device), 1.0)

    monkeypatch.setattr(retrieval, "answer_logits", planted)
