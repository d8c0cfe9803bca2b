"""What is known of a layer before its heads are shared: its inputs, the base's attention, and what is fitted to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from surgery.operations.gqa.cost import STEPS, STRIDE
from surgery.operations.gqa.fit_scores import Piece

VALIDATION_EVERY = 6  # every so many sequences one is held back


TURNS = 2  # sequences on which RoPE is measured


@dataclass(frozen=True)
class FitSettings:
    """What is fitted, and how.

    Attributes:
        refit: which weights are refitted after the merge: "q", "k", "v", "o" to the base's attention, and "mlp", the
            MLP's output projection, to the base's hidden states behind the layer.
        rounds: how often queries and keys are refitted in turn.
        sequential: attention is fitted to the inputs that converted layers give it, not the base's.
        ridges, mlp_ridges: of attention's output projection and of the MLP's, to choose from.
        steps, damping: see `conjugate_gradient.solve`. Values take so many steps; queries and keys, fitted in
            turn, from a quarter of them at first to five quarters at last.
        stride: of the queries every so many rows count, in each sequence from another one on.
        received: by how much a token counts in the moments for the attention that it gets: with weight
            1 − received + received · a, a that attention as a share of the mean token's. 0: all alike.
        weighted: keys are weighted by the energy of their queries.
        reweight_keys: from the second fit of scores on, a key counts by the mean of what the base's attention and
            the new one give it, so that one which wrongly rose is seen; else by the base's alone.
    """

    refit: tuple[str, ...] = ("q", "k", "v", "o", "mlp")
    rounds: int = 1
    sequential: bool = False
    ridges: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    mlp_ridges: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    steps: int = STEPS
    damping: float = 1.0
    stride: int = STRIDE
    received: float = 0.5
    weighted: bool = True
    reweight_keys: bool = True


@dataclass
class LayerInputs:
    """What is known of a layer before it is converted: lists have an entry for each sequence.

    Attributes:
        base: calls of the base's attention, x and output in the base.
        x: the layer's input in the converted model [T, n], with ones where projections have biases.
        calls: attention calls of the old weights on that input.
        rms: root mean square of the base's hidden states [T]: errors count relative to it.
        pieces: rows, base's attention of these rows, and its scores.
    """

    base: list[AttentionCall] = field(default_factory=list)
    x: list[torch.Tensor] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)
    rms: list[torch.Tensor] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Scores:
    """The base's scores of some rows, computed when they are asked for; 0 where it does not look."""

    call: AttentionCall
    rows: torch.Tensor
    weights: torch.Tensor

    def __call__(self) -> torch.Tensor:
        query, key = self.call.query, self.call.key
        keys = key.repeat_interleave(len(query) // len(key), dim=0)
        return (query[:, self.rows] @ keys.mT * scale_of(self.call)).masked_fill_(self.weights == 0, 0.0)


def scale_of(call: AttentionCall) -> float:
    scale = call.settings.get("scaling")
    return call.query.shape[-1] ** -0.5 if scale is None else scale


def is_validation(place: int, count: int) -> bool:
    """Whether a sequence is held back: every sixth, of few the last."""
    return place % VALIDATION_EVERY == VALIDATION_EVERY - 1 or (count < VALIDATION_EVERY and place == count - 1)


def train_and_validation(pieces: list) -> tuple[list, list]:
    marks = [is_validation(place, len(pieces)) for place in range(len(pieces))]
    return [p for p, held in zip(pieces, marks, strict=True) if not held], [
        p for p, held in zip(pieces, marks, strict=True) if held
    ]


def share(lost: float, energy: float) -> float:
    return round(lost / energy, 6) if energy else 0.0


@dataclass
class AttentionCall:
    """What one attention call of one sequence was given and gave.

    Attributes:
        x: [T, D], the attention module's input.
        query [H, T, d], key [G, T, d]: after norms and RoPE.
        settings: the other arguments of the call (scaling, softcap, s_aux ...).
        output: [T, D], what the output projection gave, without its bias; None if the call was cut short.
    """

    x: torch.Tensor
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    settings: dict | None = None
    output: torch.Tensor | None = None
