"""The contract of a loss: its description, its value for each row, and its gradient with respect to the logits.

Logits are [batch, length, V], often the largest tensor of a training step. Their gradient is the only other tensor of
their size, and there is no float32 copy of them. So a loss on logits gets some rows at a time (`Chunk`), in float32 or
wider, and gives for these rows

- values [r]: the loss of each row, in nats;
- slopes [r, V]: the gradient of each row's value with respect to that row's logits. It must be a new tensor, since the
  caller changes it in place.

A loss with an analytic gradient overrides `rows_and_slopes`. Any other loss overrides `rows` alone, with operations
that autograd can follow. Autograd then computes the slopes on the same chunk, which costs a few more tensors of the
chunk's size. A row's value may depend only on this row. Rows that do not count are masked afterwards. So a loss needs
no mask, but it must be finite on these rows.

A loss on hidden states gives its mean with its own autograd graph: hidden states are small compared with logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BASE_LOGITS, BASE_STATES = "logits", "hidden states"  # the values of the base that a loss may need


class Loss:
    """A quantity that healing lowers, with its description. `goal` and `method` are words for plan and card.

    Attributes:
        summary: one line for the schema.
        goal: words for what the model is trained towards ("the base's probabilities").
        method: the name of this kind of training ("distillation").
        needs: the values of the base that it needs, of BASE_LOGITS and BASE_STATES; empty if it needs none.
        not_stored: words for a needed value that a stored teacher (the likeliest tokens and the mass of the rest) does
            not keep; "" if it keeps all.
        reads_temperature: whether `heal.temperature` changes it.
    """

    summary: ClassVar[str]
    goal: ClassVar[str]
    method: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    not_stored: ClassVar[str] = ""
    reads_temperature: ClassVar[bool] = False


class LogitLoss(Loss):
    """A loss on each row's logits (the contract is in the module's docstring). A subclass overrides one method."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.rows is LogitLoss.rows and cls.rows_and_slopes is LogitLoss.rows_and_slopes:
            raise TypeError(f"{cls.__name__} defines neither rows nor rows_and_slopes")

    def rows(self, chunk: Chunk, inputs: LossInputs) -> Tensor:
        """Each row's value [r]."""
        return self.rows_and_slopes(chunk, inputs)[0]

    def rows_and_slopes(self, chunk: Chunk, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Each row's value [r] and its gradient with respect to the logits [r, V]. This default uses autograd."""
        import torch

        with torch.enable_grad():
            logits = chunk.logits.detach().requires_grad_()
            values = self.rows(Chunk(chunk.rows, logits), inputs)
            (slopes,) = torch.autograd.grad(values.sum(), logits)
        return values.detach(), slopes


class StateLoss(Loss):
    """A loss on the hidden states."""

    def mean(self, inputs: LossInputs, count: Tensor | int) -> Tensor:
        """The sum over the rows that count, divided by `count`: a scalar with an autograd graph."""
        raise TypeError(f"{type(self).__name__} defines no mean")


@dataclass(frozen=True)
class LossInputs:
    """The inputs of the losses of one forward, without the student's logits.

    Attributes:
        kept: bool [batch, length], the rows that count.
        labels: long [batch, length], the tokens themselves; -100 for tokens that are not predicted.
        base: the base's probabilities for the same rows.
        states, base_states: hidden states [batch, length, D] of each layer of the student and of the base.
        temperature: the temperature of a distillation.
        sure: s in the weight 1 − s + s p of a row, where p is the base's largest probability at the temperature. Only
            losses on logits are weighted.
    """

    kept: Tensor
    labels: Tensor | None = None
    base: BaseLogits | BaseTopK | None = None
    states: tuple[Tensor, ...] | None = None
    base_states: tuple[Tensor, ...] | None = None
    temperature: float = 1.0
    sure: float = 0.0

    def row_weights(self, chunk: Chunk) -> Tensor | None:
        """The weight of each of the chunk's rows [r], in the dtype of its logits; None if all are 1."""
        if not self.sure:
            return None
        if self.base is None:
            raise ValueError("sure weights rows by the base's probabilities, and there are none")
        return (1 - self.sure) + self.sure * self.base.largest(chunk, self.temperature)

    @cached_property
    def next_tokens(self) -> Tensor:
        """The token that each row predicts, long [batch * length]; 0 where a row predicts none."""
        return self.labels.roll(-1, dims=1).flatten().clamp(min=0)


@dataclass
class Chunk:
    """Some rows of the student's logits.

    Attributes:
        rows: their indices among all rows of the batch, flattened.
        logits: [r, V], float32 or wider.
    """

    rows: slice
    logits: Tensor
    _known: dict = field(default_factory=dict)

    def once(self, key: tuple, make: Callable):
        """The result of `make`, computed once for this chunk. It must not be changed."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def log_probabilities(self, temperature: float) -> tuple[Tensor, Tensor]:
        """log q and q of the student's softmax at a temperature, both [r, V]. They must not be changed."""
        return self.once(("student", temperature), lambda: _with_exp(log_softmax(self.logits, temperature)))


class BaseLogits:
    """The base's logits for the rows of a batch; no gradient goes to them.

    Args:
        logits: [batch, length, V].
    """

    def __init__(self, logits: Tensor):
        self.flat = logits.detach().flatten(0, -2)

    def log_probabilities(self, chunk: Chunk, temperature: float) -> tuple[Tensor, Tensor]:
        """log p and p of the base's softmax at a temperature, both [r, V]. They must not be changed."""
        student = chunk.logits

        def make():
            return _with_exp(log_softmax(self.flat[chunk.rows].to(student.device, student.dtype), temperature))

        return chunk.once(("base", temperature), make)

    def largest(self, chunk: Chunk, temperature: float) -> Tensor:
        """The base's largest probability for a chunk's rows [r]."""
        return self.log_probabilities(chunk, temperature)[1].amax(-1)


class BaseTopK:
    """The base's k likeliest tokens and the mass of all others: a distribution over k + 1 outcomes.

    Args:
        values: log p [batch, length, k] at the temperature of the distillation.
        indices: the k tokens, integers [batch, length, k].
        rest: log of the mass of all other tokens [batch, length]; -inf if they have none.
    """

    def __init__(self, values: Tensor, indices: Tensor, rest: Tensor):
        self.values, self.indices = values.detach().flatten(0, -2), indices.flatten(0, -2)
        self.rest = rest.detach().flatten()

    def largest(self, chunk: Chunk, temperature: float) -> Tensor:
        """The base's largest probability for a chunk's rows [r], at the temperature for which it was stored."""
        return self.of(chunk)[0].amax(-1).exp()

    def of(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """log p [r, k], the tokens as long [r, k], and the log of the rest [r], for a chunk's rows on its device."""
        student = chunk.logits
        tokens = self.indices[chunk.rows].to(student.device).long()
        values, rest = (tensor[chunk.rows].to(student.device, student.dtype) for tensor in (self.values, self.rest))
        return values, tokens, rest


def predicts(labels: Tensor) -> Tensor:
    """Rows that predict their next token: bool, shaped as `labels`; the last row of a sequence never does."""
    kept = labels.roll(-1, dims=1) >= 0
    kept[:, -1] = False
    return kept


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """The log of the softmax over the last dimension at a temperature; same shape as `logits`."""
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _with_exp(logs: Tensor) -> tuple[Tensor, Tensor]:
    return logs, logs.exp()
