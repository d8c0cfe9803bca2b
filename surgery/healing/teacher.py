"""The base as the teacher of a converted model: run beside it, or asked once before and kept on disk.

Both give the loss that `heal.loss` names. What it does not need is not computed: with `loss: ce` no teacher runs.
"""

from __future__ import annotations

from pathlib import Path

import torch

from surgery.data.packing import arguments
from surgery.errors import SurgeryError
from surgery.healing import losses
from surgery.healing.contexts import products
from surgery.healing.teacher_cache import TopK


class Teacher:
    """Cross-entropy alone; the others add what they know of the base."""

    def loss(self, outputs, batch: dict, heal, count: int | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of one forward of the student.

        Args:
            outputs: of the student, called with `arguments(student, batch, heal.hidden > 0)`.
            batch: of `Packed` rows, [batch, length] each.
            heal: loss, mix, temperature and hidden are read.
            count: tokens to average over, where a step is made of several batches; default those of this one.

        Returns:
            The loss, and its parts before they are weighted: "ce" and "kl" (nats a token; KL times T²), "hidden"
            (share of the hidden states' energy). "kl" and "hidden" only where they are part of the loss.
        """
        labels = batch["labels"].to(outputs.logits.device)
        kept = losses.predicts(labels)
        terms, states = {}, None
        if heal.loss != "distill":
            terms["ce"] = (1.0 if heal.loss == "ce" else heal.mix, losses.next_token(labels))
        if heal.loss != "ce" or heal.hidden:
            term, states = self.ask(outputs.logits, batch, heal)
        if heal.loss != "ce":
            terms["kl"] = (1.0 if heal.loss == "distill" else 1 - heal.mix, term)
        loss, parts = losses.weighted(outputs.logits, kept, terms, count)
        if heal.hidden:
            parts["hidden"] = losses.hidden_mse(outputs.hidden_states[1:], states, kept, count)
            loss = loss + heal.hidden * parts["hidden"].to(loss)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def ask(self, logits: torch.Tensor, batch: dict, heal) -> tuple[losses.Term, tuple | None]:
        """The term of the base's probabilities, and its hidden states after each layer if `heal.hidden`."""
        raise SurgeryError(
            "a teacher is needed, and there is none",
            where=f"heal.loss: {heal.loss}" if heal.loss != "ce" else f"heal.hidden: {heal.hidden:g}",
            fix="name the base: --base MODEL",
        )


class LiveTeacher(Teacher):
    """The base in memory. It is put in eval mode and its weights are frozen, for good."""

    def __init__(self, model):
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def ask(self, logits, batch, heal):
        device = self.model.device
        given = {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
        with products(heal, device):
            outputs = self.model(**arguments(self.model, given, heal.hidden > 0))
        refuse_vocabulary(logits.shape[-1], outputs.logits.shape[-1])
        states = outputs.hidden_states[1:] if heal.hidden else None
        return losses.to_teacher(outputs.logits, heal.temperature), states


class StoredTeacher(Teacher):
    """What `stored.store` kept of the base: the most probable tokens of every row, and the mass of all others."""

    def __init__(self, folder: str | Path):
        self.kept = TopK(Path(folder))

    def ask(self, logits, batch, heal):
        facts = self.kept.facts
        if heal.hidden:
            raise SurgeryError(
                "a stored teacher has no hidden states", where="heal.hidden", fix="heal.teacher=live, or heal.hidden=0"
            )
        if heal.temperature != facts["temperature"]:
            raise SurgeryError(
                f"the teacher was stored for temperature {facts['temperature']:g}, not {heal.temperature:g}",
                where=str(self.kept.folder),
                fix=f"heal.temperature={facts['temperature']:g}, or remove the folder to store it anew",
            )
        refuse_vocabulary(logits.shape[-1], facts["vocabulary"])
        found = self.kept.rows(batch["input_ids"], batch["position_ids"])
        return losses.to_top_k(found["values"], found["indices"], found["rest"], heal.temperature), None


def refuse_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise SurgeryError(
            f"model and teacher have different vocabularies: {student} and {teacher} tokens",
            fix="the teacher is the base that the model was made from",
        )
