"""The output projection of a layer's MLP, refitted so that the hidden states behind the layer are the base's again.

What merged heads lose reaches every later layer. A layer's own weights are fitted best to what the base's layers give
them: inputs of the converted model carry errors, and least squares answers noise in its inputs with smaller weights.
So the errors are mended where they meet the residual stream for the last time: with z what the MLP of the converted
model gives its output projection W, and r what the base's state is beyond the rest of the converted one,

    minimise  Σ_t ω_t ||r_t − W z_t||² + λ ||W − W_0||²

in closed form (`closed_form.fit_output`). ω makes errors relative to the state. A sequence's first token counts as
`FIRST` rows: in most models it is a sink, which all later tokens read.
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
MISS = 1e-3  # relative: a layer whose state is not the rest plus a multiple of what its MLP writes is left alone


def projection_of(block: torch.nn.Module, attention: torch.nn.Module, output: torch.nn.Module) -> str | None:
    """The projection by which a decoder layer's MLP writes: its name in the layer; None where it is not plain.

    Found by shape: outside of attention, the only linear map to as many channels as attention's output projection has.
    Experts have several.
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
    """One layer's MLP, as the converted stream meets it.

    Args:
        module: its output projection, which is left as it is.
        states: hidden states behind the layer, one [1, T, D] a sequence: of the base, and of the converted model
            (written).
        step: puts the converted state of a sequence through the layer.
    """

    def __init__(self, module, base: list[torch.Tensor], converted: list[torch.Tensor], step: Callable[[int], None]):
        self.module, self.base, self.converted, self.step = module, base, converted, step
        self.weight = _matrix(module).detach()
        self.scale = 1.0

    def mend(self, ridges: list[float]) -> tuple[torch.Tensor, dict] | None:
        """Refit the projection and put all sequences through the layer with it.

        Returns:
            W [D, n] in the module's dtype, and a record; None where the layer's state is not a sum that W has a part
            in (a norm stands behind the MLP): the sequences went through the layer as it is.
        """
        if not self._adds():
            for place in range(len(self.base)):
                self.step(place)
            return None
        sums, kept = [Regression(exact=False), Regression(exact=False)], []
        for place in range(len(self.base)):
            rest, z = self._apart(place)
            state = self.base[place][0]
            rms = 1 / state.double().square().mean(-1).clamp(min=1e-30)
            rms[0] *= FIRST
            sums[is_validation(place, len(self.base))].add(z, (state - rest) / self.scale, rms)
            kept.append((rest, z))
        fit, held = sums[0].pair, sums[1].pair
        found = fit_output(self.weight.to(fit[0]), fit, held, ridges)
        whole = sums[1].energy
        record = {"mlp_fit": [share(whole + lost, whole) for lost in (found.before, found.after)]}
        weight = found.weight.to(self.weight.dtype)
        for place, (rest, z) in enumerate(kept):
            self._put(place, rest, z, weight)
        return weight, record | {"mlp_ridge": found.ridge}

    def follow(self, weight: torch.Tensor | None) -> None:
        """Put all sequences through the layer with a weight that `mend` gave; None: as it is."""
        if weight is not None:
            self._adds()
        for place in range(len(self.base)):
            if weight is None:
                self.step(place)
            else:
                self._put(place, *self._apart(place), weight)

    def _put(self, place: int, rest: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> None:
        self.converted[place] = (rest + self.scale * (z @ weight.to(z).T))[None]

    def _apart(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a sequence: its state behind the layer without what the weight adds [T, D], and the weight's input."""
        with self._seen() as seen:
            self.step(place)
        return self.converted[place][0] - self.scale * seen["written"], seen["z"]

    def _adds(self) -> bool:
        """Whether the state is a sum with a multiple of what the MLP writes in it; notes that multiple."""
        before = self.converted[0]
        with self._seen(2.0) as seen:
            self.step(0)
        twice, self.converted[0] = self.converted[0][0], before
        with self._seen() as seen:
            self.step(0)
        once, self.converted[0] = self.converted[0][0], before
        found, written = (twice - once).double(), seen["written"].double()
        self.scale = float((found * written).sum() / written.square().sum().clamp(min=1e-30))
        return bool((found - self.scale * written).norm() <= MISS * found.norm()) and self.scale != 0

    @contextmanager
    def _seen(self, factor: float = 1.0) -> Iterator[dict[str, torch.Tensor]]:
        """What the projection is given, `z` [T, n], and writes without its bias, `written`, times a factor."""
        seen, bias = {}, getattr(self.module, "bias", None)

        def after(_, args, out):
            written = out if bias is None else out - bias
            seen["z"], seen["written"] = args[0].flatten(0, -2), factor * written.flatten(0, -2)
            return out + (factor - 1) * written

        handle = self.module.register_forward_hook(after)
        try:
            yield seen
        finally:
            handle.remove()
