"""The data for the closed-form fit of a layer: its inputs, the base's attention, and the settings of the fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from surgery.calibration.closed_form.cost import STEPS, STRIDE
from surgery.calibration.closed_form.fit_scores import ScoreSample
from surgery.data.text import is_validation

ROPE_SAMPLES = 2  # number of sequences on which RoPE is measured


@dataclass(frozen=True)
class FitSettings:
    """What to fit, and how.

    Attributes:
        refit: the weights that are refitted. "q", "k", "v" and "o" are fitted to the base's attention;
            "mlp", the MLP's output projection, is fitted to the base's hidden states after the layer.
        rounds: how often queries and keys are refitted in turn.
        sequential: fit attention to the inputs from converted layers instead of the base's inputs.
        ridges, mlp_ridges: values to choose from, for attention's output projection and for the MLP's.
        steps, damping: see `conjugate_gradient.solve`. Values take `steps` steps. Queries and keys are fitted in turn:
            the first fit takes a quarter of `steps`, the last five quarters.
        stride: every `stride`-th query counts; the first that counts differs between sequences.
        received: how much the attention that a token receives counts in the moments. The token's weight is
            1 − received + received · a, where a is this attention relative to the mean over tokens. 0: equal weights.
        weighted: weight keys by the energy of their queries.
        reweight_keys: from the second fit of scores on, weight a key by the mean of the base's attention and the new
            attention, so that the fit sees a key whose weight wrongly rose. False: by the base's attention alone.
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
    """A layer's inputs on the calibration text; each list has one entry per sequence.

    Attributes:
        base: attention calls of the base.
        x: the layer's input in the converted model [T, n], with a column of ones where projections have biases.
        calls: attention calls of the old weights on that input.
        rms: root mean square of the base's hidden states [T]; errors are relative to it.
        samples: the rows that count, with the base's attention weights and scores.
    """

    base: list[AttentionCall] = field(default_factory=list)
    x: list[torch.Tensor] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)
    rms: list[torch.Tensor] = field(default_factory=list)
    samples: list[ScoreSample] = field(default_factory=list)


@dataclass
class BaseScores:
    """The base's scores of some rows [H, r, T], computed at each call; 0 where the attention weight is 0."""

    call: AttentionCall
    rows: torch.Tensor
    weights: torch.Tensor

    def __call__(self) -> torch.Tensor:
        query, key = self.call.query, self.call.key
        keys = key.repeat_interleave(len(query) // len(key), dim=0)
        return (query[:, self.rows] @ keys.mT * scale_of(self.call)).masked_fill_(self.weights == 0, 0.0)


def scale_of(call: AttentionCall) -> float:
    """The factor on q·k of an attention call."""
    scale = call.settings.get("scaling")
    return call.query.shape[-1] ** -0.5 if scale is None else scale


def train_and_validation(samples: list) -> tuple[list, list]:
    """The training samples and the validation samples."""
    train, validation = [], []
    for index, sample in enumerate(samples):
        (validation if is_validation(index, len(samples)) else train).append(sample)
    return train, validation


def share(lost: float, energy: float) -> float:
    """`lost` as a share of `energy`, rounded for a record; 0 where there is no energy."""
    return round(lost / energy, 6) if energy else 0.0


@dataclass
class AttentionCall:
    """The arguments and the output of one attention call on one sequence.

    Attributes:
        x: [T, D], the attention module's input.
        query, key: [H, T, d] and [G, T, d], after norms and RoPE.
        settings: the other arguments of the call (scaling, softcap, s_aux ...).
        output: [T, D], output of the output projection without its bias; None if the call was stopped before.
    """

    x: torch.Tensor
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    settings: dict | None = None
    output: torch.Tensor | None = None
