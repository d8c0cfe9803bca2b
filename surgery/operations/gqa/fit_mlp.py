"""The output projection of a layer's MLP, refitted so that the hidden states after the layer are the base's again.

What merged heads lose reaches every later layer. A layer's own weights are best fitted to the inputs that it has in
the base: inputs from the converted model carry errors, and least squares shrinks weights whose inputs are noisy. So
the errors are corrected where the layer adds to the residual stream for the last time. Let z be what the MLP of the
converted model gives its output projection W, and r the base's state less the rest of the converted state:

    minimise  Σ_t ω_t ||r_t − W z_t||² + λ ||W − W_0||²

This is solved in closed form (`low_rank.fit_output`). ω makes errors relative to the state. A sequence's first token
counts as `FIRST` rows: in most models it is a sink, which all later tokens read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.pytorch_utils import Conv1D

from surgery.calibration.moments import Regression
from surgery.operations.gqa.layer_inputs import is_validation, share
from surgery.operations.gqa.low_rank import fit_output

FIRST = 20.0
MISS = 1e-3  # relative: a layer whose state is not the rest plus a multiple of what its MLP writes keeps its MLP


def projection_of(block: torch.nn.Module, attention: torch.nn.Module, output: torch.nn.Module) -> str | None:
    """The name, in a decoder layer, of its MLP's output projection; None where the layer has not exactly one.

    It is known by its shape: outside of attention, the only linear map to as many channels as attention's output
    projection has. Experts have several.
    """
    inside, width = {id(module) for module in attention.modules()}, _matrix(output).shape[0]
    names = [
        name
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module) not in inside and len(_matrix(module)) == width
    ]
    return names[0] if len(names) == 1 else None


def _matrix(module) -> torch.Tensor:
    """[outputs, inputs]."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


class MLPOutput:
    """The MLP's output projection of one layer in the converted model.

    Args:
        module: the output projection, which is left as it was.
        base: the base's hidden states after the layer, one [1, T, D] a sequence.
        converted: the same of the converted model; this list is written.
        step: puts the converted state of the sequence with this index through the layer.
    """

    def __init__(self, module, base: list[torch.Tensor], converted: list[torch.Tensor], step: Callable[[int], None]):
        self.module, self.base, self.converted, self.step = module, base, converted, step
        self.weight = _matrix(module).detach()
        self.scale = 1.0

    def refit(self, ridges: list[float]) -> tuple[torch.Tensor, dict] | None:
        """Refit the projection and put all sequences through the layer with it.

        Args:
            ridges: what to choose from, relative to the energy of z.

        Returns:
            W [D, n] in the module's dtype, and a record. None where the layer's state is not a sum to which W adds (a
            norm follows the MLP): then the sequences went through the unchanged layer.
        """
        if not self._measure_scale():
            for index in range(len(self.base)):
                self.step(index)
            return None
        sums, rests_and_inputs = [Regression(exact=False), Regression(exact=False)], []
        for index in range(len(self.base)):
            rest, z = self._rest_and_input(index)
            state = self.base[index][0]
            row_weights = 1 / state.double().square().mean(-1).clamp(min=1e-30)
            row_weights[0] *= FIRST
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
        """Put all sequences through the layer with a weight [D, n] that `refit` gave; None: with its own."""
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
        """A sequence's state after the layer without what the weight adds [T, D], and the weight's input [T, n]."""
        with self._capture() as captured:
            self.step(index)
        return self.converted[index][0] - self.scale * captured["written"], captured["z"]

    def _measure_scale(self) -> bool:
        """Set `scale` to the multiple of what the MLP writes that the state holds; False: the state is no such sum."""
        before = self.converted[0]
        with self._capture(2.0) as captured:
            self.step(0)
        twice, self.converted[0] = self.converted[0][0], before
        with self._capture() as captured:
            self.step(0)
        once, self.converted[0] = self.converted[0][0], before
        change, written = (twice - once).double(), captured["written"].double()
        self.scale = float((change * written).sum() / written.square().sum().clamp(min=1e-30))
        return bool((change - self.scale * written).norm() <= MISS * change.norm()) and self.scale != 0

    @contextmanager
    def _capture(self, factor: float = 1.0) -> Iterator[dict[str, torch.Tensor]]:
        """Capture the projection's input `z` [T, n] and its output without bias, times a factor: `written` [T, D]."""
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
