"""The refit of an MLP's output projection, which brings the hidden states after the layer back to the base's.

What a conversion loses in attention reaches every later layer. A layer's attention is best fitted to the inputs that
it has in the base: inputs from the converted model carry errors, and least squares shrinks weights whose inputs are
noisy. So the errors are corrected where the layer adds to the residual stream for the last time. Let z be the input of
the MLP's output projection W in the converted model, and r the base's state minus the rest of the converted state:

    minimise  Σ_t ω_t ||r_t − W z_t||² + λ ||W − W_0||²

This is solved in closed form (`low_rank.fit_output`). ω makes errors relative to the size of the state
(`count_rows`). A sequence's first token counts as `FIRST` rows: in most models it is a sink, which all later tokens
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.pytorch_utils import Conv1D

from surgery.calibration.closed_form.layer_inputs import share
from surgery.calibration.closed_form.low_rank import fit_output
from surgery.calibration.moments import Regression
from surgery.data.text import is_validation
from surgery.machine.placement import exact

FIRST = 20.0
MISS = 1e-3  # largest relative error of "state = rest + scale * MLP output"; above it the MLP is not refitted


def projection_of(block: torch.nn.Module, attention: torch.nn.Module, output: torch.nn.Module) -> str | None:
    """The name, inside a decoder layer, of the MLP's output projection; None unless the layer has exactly one.

    It is found by its shape: outside of attention, it is the only linear map that gives as many channels as
    attention's output projection. A mixture of experts has several.
    """
    inside, width = {id(module) for module in attention.modules()}, _matrix(output).shape[0]
    names = [
        name
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module) not in inside and len(_matrix(module)) == width
    ]
    return names[0] if len(names) == 1 else None


def _matrix(module) -> torch.Tensor:
    """The weight as [outputs, inputs]."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def count_rows(base: torch.Tensor, converted: torch.Tensor) -> torch.Tensor:
    """ω [T]: how much the error of each token of one sequence counts.

    An error counts relative to the larger of the two states. Some models give a few tokens massive activations, by
    which these become sinks (Sun et al. 2024). After a conversion, other tokens may get them: then the error is many
    thousand times the base's state, and relative to that state alone one such token outweighs all others.

    Args:
        base, converted: hidden states after the layer, with the old projection [T, D].
    """
    squares = (exact(state).square().mean(-1) for state in (base, converted))
    weights = 1 / torch.maximum(*squares).clamp(min=1e-30)
    weights[0] *= FIRST
    return weights


class MLPOutput:
    """The MLP's output projection of one layer in the converted model.

    Args:
        module: the output projection; its weight is not changed.
        base: the base's hidden states after the layer, one [1, T, D] for each sequence.
        converted: the converted model's hidden states, before the layer; they are replaced by those after it.
        step: runs the layer on the converted state of the sequence with this index, and stores the result.
    """

    def __init__(self, module, base: list[torch.Tensor], converted: list[torch.Tensor], step: Callable[[int], None]):
        self.module, self.base, self.converted, self.step = module, base, converted, step
        self.weight = _matrix(module).detach()
        self.scale = 1.0

    def refit(self, ridges: list[float]) -> tuple[torch.Tensor, dict] | None:
        """Refit the projection, and run the layer with it on all sequences.

        Args:
            ridges: values to choose from, relative to the energy of z.

        Returns:
            W [D, n] in the module's dtype, and a record. None if the layer does not simply add the MLP's output to the
            state (a norm follows the MLP): then the layer has run with its old projection.
        """
        if not self._measure_scale():
            for index in range(len(self.base)):
                self.step(index)
            return None
        sums, rests_and_inputs = [Regression(exact=False), Regression(exact=False)], []
        for index in range(len(self.base)):
            rest, z = self._rest_and_input(index)
            state = self.base[index][0]
            row_weights = count_rows(state, self.converted[index][0])
            sums[is_validation(index, len(self.base))].add(z, (state - rest) / self.scale, row_weights)
            rests_and_inputs.append((rest, z))
        train, validation = sums[0].pair, sums[1].pair
        result = fit_output(self.weight.to(train[0]), train, validation, ridges)
        energy = sums[1].energy
        record = {"mlp_fit": [share(energy + error, energy) for error in (result.before, result.after)]}
        weight = result.weight.to(self.weight.dtype)
        for index, (rest, z) in enumerate(rests_and_inputs):
            self._write_state(index, rest, z, weight)
        return weight, record | {"mlp_ridge": result.ridge}

    def run_with(self, weight: torch.Tensor | None) -> None:
        """Run the layer on all sequences with a weight [D, n] from `refit`; None: with the old projection."""
        if weight is not None:
            self._measure_scale()
        for index in range(len(self.base)):
            if weight is None:
                self.step(index)
            else:
                self._write_state(index, *self._rest_and_input(index), weight)

    def _write_state(self, index: int, rest: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> None:
        self.converted[index] = (rest + self.scale * (z @ weight.to(z).T))[None]

    def _rest_and_input(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence's state after the layer without the projection's output [T, D], and z [T, n]."""
        with self._capture() as captured:
            self.step(index)
        return self.converted[index][0] - self.scale * captured["written"], captured["z"]

    def _measure_scale(self) -> bool:
        """Set `scale` in "state = rest + scale * MLP output", from a run with the MLP output doubled.

        Returns:
            False if the state is not such a sum.
        """
        before = self.converted[0]
        with self._capture(2.0) as captured:
            self.step(0)
        twice, self.converted[0] = self.converted[0][0], before
        with self._capture() as captured:
            self.step(0)
        once, self.converted[0] = self.converted[0][0], before
        change, written = exact(twice - once), exact(captured["written"])
        self.scale = float((change * written).sum() / written.square().sum().clamp(min=1e-30))
        return bool((change - self.scale * written).norm() <= MISS * change.norm()) and self.scale != 0

    @contextmanager
    def _capture(self, factor: float = 1.0) -> Iterator[dict[str, torch.Tensor]]:
        """Scale the projection's output without bias; capture the scaled output `written` [T, D] and the input `z`."""
        captured, bias = {}, getattr(self.module, "bias", None)

        def after(_, args, out):
            written = out if bias is None else out - bias
            captured["z"], captured["written"] = args[0].flatten(0, -2), factor * written.flatten(0, -2)
            return out + (factor - 1) * written

        handle = self.module.register_forward_hook(after)
        try:
            yield captured
        finally:
            handle.remove()
