"""The least-squares fit of shared values to the output r of the base's attention, with W_O fixed.

    L = ½ Σ_t ω_t |Σ_h O_h Σ_s p_hts W_V x_s − r_t|²

p is the converted model's attention. The merge (`low_rank.merge_values`) minimises the loss of each head separately.
L is the loss of the sum over heads, which the model reads. The solver is that of `fit_scores.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from surgery.calibration.closed_form.fit_scores import RowChunk, causal_chunks, project
from surgery.machine.parallel import parallel_map
from surgery.machine.placement import exact

if TYPE_CHECKING:
    from torch import Tensor

    Result = TypeVar("Result")


@dataclass
class ValueSample:
    """One calibration text in one layer.

    Attributes:
        x: [T, n], as in `fit_scores.ScoreSample`.
        rows: positions of the queries that count, long [r], rising.
        weights: [H, r, T], the converted model's attention weights of these rows; 0 for keys after the query.
        wanted: [r, D], output of the base's attention at these rows, without the bias.
        row_weights: ω [r].
    """

    x: Tensor
    rows: Tensor
    weights: Tensor
    wanted: Tensor
    row_weights: Tensor


class ValueProblem:
    """L as a quadratic function of W_V [groups, d, n], for `conjugate_gradient.solve`.

    Args:
        samples: samples of the calibration text.
        output: O [D, H, d]; query head h reads KV head h // (H / groups).
    """

    def __init__(self, samples: list[ValueSample], output: Tensor, groups: int):
        import torch

        self.samples, self.output, self.groups = samples, output, groups
        x = samples[0].x
        self.columns = output.to(x).flatten(1)  # [D, H d]
        self.gram = self.columns.T @ self.columns
        self.row_weights = torch.cat([sample.row_weights for sample in samples]).to(x).unsqueeze(-1)
        self.chunks = causal_chunks(samples)
        self.weights = [  # [groups, n r, end] for each chunk; query heads that share a value head are neighbours
            [sample.weights[:, chunk.sample_rows, : chunk.end].reshape(groups, -1, chunk.end) for chunk in chunks]
            for sample, chunks in zip(samples, self.chunks, strict=True)
        ]

    def product(self, weight: Tensor) -> Tensor:
        """H W [groups, d, n]."""
        heads, size = self.columns.shape[1] // weight.shape[1], weight.shape[1]
        value_weight, mixed = weight.to(self.columns), self.columns.new_zeros(len(self.row_weights), heads, size)

        def mix(sample: ValueSample, chunks: list[RowChunk], weights: list[Tensor]) -> None:
            values = project(value_weight, sample.x)
            for chunk, p in zip(chunks, weights, strict=True):
                mixed[chunk.rows] = (p @ values[:, : chunk.end]).view(heads, -1, size).transpose(0, 1)

        list(self._map_samples(mix))
        return self._gradient(mixed.flatten(1) @ self.gram, weight)

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b [groups, d, n], and c = Σ ω |r|²."""
        import torch

        wanted = torch.cat([sample.wanted for sample in self.samples])
        constant = float((exact(wanted).square().sum(-1) * exact(self.row_weights[:, 0])).sum())
        return self._gradient(wanted @ self.columns, weight), constant

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        """C [groups, d] and M [n, n] with H close to C ⊗ M."""
        curvature = (
            exact(self.columns.unflatten(1, (-1, self.output.shape[2])))
            .square()
            .sum(0)
            .reshape(self.groups, -1, self.output.shape[2])
            .mean(1)
        )
        rows = sum(len(sample.row_weights[::4]) for sample in self.samples)

        def read_moments(sample: ValueSample, *_) -> Tensor:  # every fourth row is enough for these moments
            read_inputs = (sample.weights[:, ::4] @ sample.x).flatten(0, 1)
            row_weights = sample.row_weights[::4].to(read_inputs).repeat(len(sample.weights))
            return exact((read_inputs.T * row_weights) @ read_inputs)

        return curvature, sum(self._map_samples(read_moments)) * (len(self.row_weights) / rows)

    def _gradient(self, grads: Tensor, weight: Tensor) -> Tensor:
        """The gradient by W [groups, d, n] from gradients by the heads' outputs [R, H d], before the weights ω."""
        import torch

        grads = (grads * self.row_weights).unflatten(1, (-1, weight.shape[1])).transpose(0, 1)  # [H, R, d]

        def gradient_of(sample: ValueSample, chunks: list[RowChunk], weights: list[Tensor]) -> Tensor:
            values = grads.new_zeros(self.groups, len(sample.x), weight.shape[1])
            for chunk, p in zip(chunks, weights, strict=True):
                values[:, : chunk.end] += p.mT @ grads[:, chunk.rows].reshape(self.groups, -1, weight.shape[1])
            return torch.einsum("gtd,tn->gdn", values, sample.x)

        return sum(self._map_samples(gradient_of)).to(weight)

    def _map_samples(self, work: Callable[..., Result]) -> Iterator[Result]:
        """The results of `work(sample, chunks, weights of the chunks)` for all samples, in order."""
        return parallel_map(work, self.samples, self.chunks, self.weights, device=self.columns.device)
