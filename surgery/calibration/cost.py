"""The cost of measuring a model, for the estimates of `plan`: floating-point operations and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy


@dataclass(frozen=True)
class Measurement:
    """A stage in which an operation measures or fits. `plan` estimates time and memory from it.

    Attributes:
        stage: its name, as progress reports it.
        flops: floating-point operations, in float32 (one in float64 counts as two).
        memory: bytes in addition to the model.
        seconds: used instead of `flops` where the stage has a time limit, or where only its time is known.
        memory_on_gpu: bytes on a GPU in addition to the model; None: as many as `memory`.
        writes: whether the model writes text; one that is streamed does that on the CPU.
        passes: how often a text goes through the whole model, which moves all layers of one that is streamed.
    """

    stage: str
    flops: float
    memory: float = 0.0
    seconds: float = 0.0
    memory_on_gpu: float | None = None
    writes: bool = False
    passes: float = 0.0


GRADIENT = 3  # cost of a forward and a backward pass, relative to a forward pass


def forward_flops(anatomy: Anatomy, tokens: float, length: int) -> float:
    """Floating-point operations of a model that reads `tokens` tokens in all, in texts of `length` tokens.

    The count is two for each parameter and token, plus the scores and sums of attention, computed for all pairs of
    tokens of a text. For a mixture of experts all experts are counted, so the result is an upper bound.
    """
    attention = sum(4 * layer.heads * layer.head_dim * length for layer in anatomy.layers)
    return tokens * (2 * anatomy.parameters + attention)


def layer_parameters(anatomy: Anatomy) -> int:
    """Stored values of all layers together, without embeddings and output layer; 0 if only the config is known."""
    path = anatomy.layers[0].path.rpartition(".")[0].rpartition(".")[0] + "."
    return sum(prod(shape) for name, (_, shape) in anatomy.tensors.items() if name.startswith(path))


def widths(anatomy: Anatomy) -> tuple[int, int]:
    """Number of channels of the hidden states, and of an MLP's hidden layer."""
    config = anatomy.config.get_text_config()
    hidden = getattr(config, "hidden_size", None) or 1
    return hidden, getattr(config, "intermediate_size", None) or 4 * hidden


def activation_bytes(anatomy: Anatomy, length: int) -> int:
    """Bytes of one layer's activations in float32 for one text, with the attention of all pairs of its tokens."""
    layer, (hidden, inner) = anatomy.layers[0], widths(anatomy)
    return 4 * length * (8 * hidden + 3 * inner + 3 * layer.heads * length)


def logit_bytes(anatomy: Anatomy, length: int) -> int:
    """Bytes of a text's logits in float32: themselves, their logarithm, and what is computed from it."""
    return 4 * 3 * length * (getattr(anatomy.config.get_text_config(), "vocab_size", None) or 0)


def gradient_bytes(anatomy: Anatomy, length: int) -> int:
    """Bytes that gradients through all layers keep of one text, in float32, with its logits."""
    return len(anatomy.layers) * activation_bytes(anatomy, length) + 2 * logit_bytes(anatomy, length)
