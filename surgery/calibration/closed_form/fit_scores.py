"""Least-squares fits of queries, or of shared keys, to the base's attention. The equations are never built.

The KL divergence between the base's attention row and the new one is, to second order, half the variance of the error
of the scores under the base's weights p (a constant error does not change a softmax):

    L = ½ Σ_t Σ_h Var_{s ~ p_hts}[ c q̃_ht·k̃_s − score_hts ],      q̃ = RoPE(W_Q x_t),  k̃ = RoPE(W_K x_s)

L hardly counts a key that gets little weight in the base and much in the new model. So, from the second fit on, p is
the mean of the base's weights and the new weights (`layer_inputs.FitSettings.reweight_keys`).

L is quadratic in W_Q with the keys fixed, and in W_K with the queries fixed. Its equations have (d D)² numbers for
each head. So they are solved by conjugate gradients: a product with the Hessian costs as much as attention itself.

Sums over the text are in the dtype of the activations; the solver works in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from surgery.architecture.layer import pair_channels
from surgery.machine.parallel import parallel_map
from surgery.machine.placement import exact

if TYPE_CHECKING:
    from torch import Tensor

    Result = TypeVar("Result")


CHUNKS = 4  # number of parts into which the rows of a sample are cut


@dataclass
class Rotation:
    """RoPE at each position, with any scale: the linear map between a projection and the scores.

    Attributes:
        cos, sin: [length, d]: z becomes cos * z + sin * z[swap].
        swap: [d], the other channel of each pair.
    """

    cos: Tensor
    sin: Tensor
    swap: Tensor

    @classmethod
    def of(cls, factors: Tensor, free: float, size: int, positions: str) -> Rotation:
        """Make one from complex factors.

        Args:
            factors: one for each position and frequency, complex [length, rotary / 2].
            free: the factor on channels that RoPE does not rotate.
            size: channels of a head, d.
            positions: how RoPE pairs channels (`architecture.layer.pair_channels`).
        """
        import torch

        rotary = 2 * factors.shape[1]
        real, imag = pair_channels(rotary, positions)
        cos = factors.real.new_full((len(factors), size), free)
        sin, swap = torch.zeros_like(cos), torch.arange(size, device=cos.device)
        cos[:, real] = cos[:, imag] = factors.real
        sin[:, real], sin[:, imag] = -factors.imag, factors.imag
        swap[real + imag] = torch.tensor(imag + real, dtype=swap.dtype, device=cos.device)
        return cls(cos, sin, swap)

    def part(self, channels: list[int]) -> Rotation:
        """The rotation of some channels alone, in this order; both channels of a pair must be among them."""
        places = {channel: place for place, channel in enumerate(channels)}
        swap = [places[int(self.swap[channel])] for channel in channels]
        return Rotation(self.cos[:, channels], self.sin[:, channels], self.swap.new_tensor(swap))

    def behind(self, free: int) -> Rotation:
        """The same rotation behind `free` channels that are not rotated."""
        import torch

        length = len(self.cos)
        cos = torch.cat([self.cos.new_ones(length, free), self.cos], 1)
        sin = torch.cat([self.sin.new_zeros(length, free), self.sin], 1)
        return Rotation(cos, sin, torch.cat([torch.arange(free).to(self.swap), self.swap + free]))

    def to(self, like: Tensor) -> Rotation:
        """The same rotation in the dtype and on the device of a tensor."""
        return Rotation(self.cos.to(like), self.sin.to(like), self.swap.to(like.device))

    def at(self, rows) -> Rotation:
        """The rotation at only these positions."""
        return Rotation(self.cos[rows], self.sin[rows], self.swap)

    def __call__(self, z: Tensor) -> Tensor:
        """z [..., length, d], rotated."""
        return (self.cos * z).addcmul_(self.sin, z[..., self.swap])

    def adjoint(self, z: Tensor) -> Tensor:
        """The adjoint of the rotation on z [..., length, d]; for plain RoPE its inverse."""
        return (self.cos * z).addcmul_(self.sin, z[..., self.swap], value=-1)


@dataclass
class ScoreSample:
    """One calibration text in one layer.

    Attributes:
        x: [T, n], the layer's input in the converted model; the last column is 1 where the projections have a bias.
        rows: positions of the queries that count, long [r], rising.
        weights: p [H, r, T], the base's attention weights of these rows; 0 for keys after the query.
        scores: returns [H, r, T], the base's scores before softmax, with any finite value where p is 0. Each fit calls
            it once.
        query_inputs: [T, m], what the queries are made of, where that is not x.
    """

    x: Tensor
    rows: Tensor
    weights: Tensor
    scores: Callable[[], Tensor]
    query_inputs: Tensor | None = None


class RowChunk(NamedTuple):
    """Neighbouring rows of a sample. They see no key from position `end` on, so products stop there."""

    sample_rows: slice  # among the rows of the sample
    rows: slice  # among the rows of all samples
    end: int


def causal_chunks(samples: list) -> list[list[RowChunk]]:
    """The rows of each `ScoreSample` or `ValueSample`, cut into a few chunks, so that products stay large."""
    chunks_of_samples, before = [], 0
    for sample in samples:
        chunks, begin = [], 0
        for rows in sample.rows.chunk(CHUNKS):
            end = begin + len(rows)
            chunks.append(RowChunk(slice(begin, end), slice(before + begin, before + end), int(rows[-1]) + 1))
            begin = end
        chunks_of_samples.append(chunks)
        before += begin
    return chunks_of_samples


class ScoreObjective:
    """The loss L as a function of W_Q or of W_K, a sum over samples.

    Args:
        samples: samples of the calibration text.
        scale: c, the factor on q·k.
        query_rotation, key_rotation: RoPE of queries and of keys.
        groups: number of KV heads; query head h reads KV head h // (H / groups).
    """

    def __init__(
        self, samples: list[ScoreSample], scale: float, query_rotation: Rotation, key_rotation: Rotation, groups: int
    ):
        import torch

        self.samples, self.scale, self.groups = samples, scale, groups
        self.query_rotation, self.key_rotation = query_rotation, key_rotation
        self.chunks = causal_chunks(samples)
        inputs = [sample.x if sample.query_inputs is None else sample.query_inputs for sample in samples]
        rows = [each[sample.rows] for each, sample in zip(inputs, samples, strict=True)]
        self.query_inputs = torch.cat(rows)  # [R, n]: queries that count

    def map_samples(self, work: Callable[[int, ScoreSample], Result]) -> Iterator[Result]:
        """The results of `work(index, sample)` for all samples, in order."""
        return parallel_map(work, range(len(self.samples)), self.samples, device=self.query_inputs.device)

    def keys(self, weight: Tensor, sample: ScoreSample) -> Tensor:
        """Keys after RoPE [groups, T, d] of a weight [groups, d, n]."""
        return self.key_rotation(project(weight, sample.x))

    def grouped(self, heads: Tensor) -> Tensor:
        """[groups, H / groups * r, ...] from [H, r, ...]: query heads that share a key head are neighbours."""
        return heads.reshape(self.groups, -1, heads.shape[-1])

    def query_problem(self, key_weight: Tensor) -> Problem:
        """The quadratic problem in W_Q [H, d, n] for these keys W_K [groups, d, n]."""
        return QueryProblem(self, key_weight)

    def key_problem(self, query_weight: Tensor) -> Problem:
        """The quadratic problem in W_K [groups, d, n] for these queries W_Q [H, d, n]."""
        return KeyProblem(self, query_weight)


def project(heads: Tensor, x: Tensor) -> Tensor:
    """[heads, T, d] from weights [heads, d, n] and inputs [T, n]."""
    return (x @ heads.to(x).flatten(0, 1).T).unflatten(1, heads.shape[:2]).transpose(0, 1)


class Problem:
    """L as a quadratic function of one weight: ½ <W, H W> − <b, W> + ½ c; see `conjugate_gradient.Quadratic`.

    A subclass projects the inputs by the weight (`projected`) and computes the scores of a chunk's rows (`scores`),
    [groups, n r, end]. For the backward pass, `empty_grads` makes an accumulator of gradients by the projected inputs,
    `add` adds the gradients of a chunk, and `gradient` turns the sum into the gradient by the weight.
    """

    def __init__(self, objective: ScoreObjective):
        self.objective = objective

    def product(self, weight: Tensor) -> Tensor:
        """H W, of W's shape."""
        projected, grads = self.projected(weight), self.empty_grads()

        def add(index: int, sample: ScoreSample) -> None:
            for chunk in self.objective.chunks[index]:
                errors = self.scores(projected, index, chunk)
                self.add(grads, self._weight_errors(errors, sample.weights, chunk), index, chunk)

        list(self.objective.map_samples(add))
        return self.gradient(grads).to(weight)

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """b, of W's shape, and c = Σ Var[score]."""
        grads = self.empty_grads()

        def add(index: int, sample: ScoreSample) -> float:
            scores = sample.scores()
            weighted = scores * sample.weights
            means = weighted.sum(-1)
            for chunk in self.objective.chunks[index]:
                chunk_scores = self.objective.grouped(scores[:, chunk.sample_rows, : chunk.end].clone())
                self.add(grads, self._weight_errors(chunk_scores, sample.weights, chunk), index, chunk)
            return float(exact(weighted * scores).sum() - exact(means).square().sum())

        constant = sum(self.objective.map_samples(add))
        return self.gradient(grads).to(weight), constant

    def _weight_errors(self, errors: Tensor, weights: Tensor, chunk: RowChunk) -> Tensor:
        """p * error; it overwrites the errors [groups, n r, end]."""
        heads = errors.view(len(weights), -1, chunk.end)
        return heads.mul_(weights[:, chunk.sample_rows, : chunk.end]).view_as(errors)

    def mean_of_pairs(self, curvature: Tensor, rotation: Rotation) -> Tensor:
        """The curvature [heads, d], averaged over the two channels of each pair, since RoPE mixes them."""
        return (curvature + curvature[:, rotation.swap.to(curvature.device)]) / 2


class QueryProblem(Problem):
    """L as a function of W_Q, with the keys fixed."""

    def __init__(self, objective: ScoreObjective, key_weight: Tensor):
        super().__init__(objective)
        # The keys include the factor c from here on. `means` are the means of these keys under p, [H, r, d].
        self.keys = list(objective.map_samples(lambda _, sample: objective.keys(key_weight, sample) * objective.scale))
        self.means = list(objective.map_samples(lambda index, sample: self._mean(sample, self.keys[index])))

    def _mean(self, sample: ScoreSample, keys: Tensor) -> Tensor:
        """Mean under p [H, r, d] of a quantity of the keys [groups, T, d]."""
        return (self.objective.grouped(sample.weights) @ keys).view(*sample.weights.shape[:2], -1)

    def projected(self, weight: Tensor) -> Tensor:
        """Queries before RoPE, [R, H, d]."""
        return project(weight, self.objective.query_inputs).transpose(0, 1)

    def empty_grads(self) -> Tensor:
        """An uninitialised tensor for gradients by queries before RoPE, [R, H, d]."""
        heads, _, size = self.means[0].shape
        rows = len(self.objective.query_inputs)
        return self.objective.query_inputs.new_empty(rows, heads, size)  # `add` writes each row once

    def scores(self, queries: Tensor, index: int, chunk: RowChunk) -> Tensor:
        """Scores of a chunk's rows [groups, n r, end]."""
        queries = self._rotation(index, chunk)(queries[chunk.rows].transpose(0, 1))
        return self.objective.grouped(queries) @ self.keys[index][:, : chunk.end].mT

    def add(self, grads: Tensor, weighted: Tensor, index: int, chunk: RowChunk) -> None:
        """Add the adjoint of p * (error − mean error)."""
        means = self.objective.grouped(self.means[index][:, chunk.sample_rows])
        heads = weighted @ self.keys[index][:, : chunk.end] - weighted.sum(-1, keepdim=True) * means
        heads = heads.view(grads.shape[1], -1, grads.shape[2])
        grads[chunk.rows] = self._rotation(index, chunk).adjoint(heads).transpose(0, 1)

    def gradient(self, grads: Tensor) -> Tensor:
        """The gradient by W_Q [H, d, n]."""
        return (grads.flatten(1).T @ self.objective.query_inputs).unflatten(0, grads.shape[1:])

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        """The variance of keys under p [H, d], and Σ x xᵀ over queries [n, n]."""

        def variance(index: int, sample: ScoreSample) -> Tensor:
            return exact(self._mean(sample, self.keys[index].square()) - self.means[index].square()).sum(1)

        inputs = exact(self.objective.query_inputs)
        curvature = sum(self.objective.map_samples(variance)) / len(inputs)
        return self.mean_of_pairs(curvature, self.objective.query_rotation), inputs.T @ inputs

    def _rotation(self, index: int, chunk: RowChunk) -> Rotation:
        return self.objective.query_rotation.at(self.objective.samples[index].rows[chunk.sample_rows])


class KeyProblem(Problem):
    """L as a function of W_K, with the queries fixed."""

    def __init__(self, objective: ScoreObjective, query_weight: Tensor):
        super().__init__(objective)
        raw = project(query_weight, objective.query_inputs)
        self.queries = [  # one [H, r, d] for each sample
            objective.query_rotation.at(sample.rows)(raw[:, chunks[0].rows.start : chunks[-1].rows.stop])
            * objective.scale
            for sample, chunks in zip(objective.samples, objective.chunks, strict=True)
        ]

    def projected(self, weight: Tensor) -> list[Tensor]:
        """Keys after RoPE, one [groups, T, d] for each sample."""
        return list(self.objective.map_samples(lambda _, sample: self.objective.keys(weight, sample)))

    def empty_grads(self) -> list[Tensor]:
        """Zeros for gradients by keys after RoPE, one [groups, T, d] for each sample."""
        size = self.queries[0].shape[-1]
        return [sample.x.new_zeros(self.objective.groups, len(sample.x), size) for sample in self.objective.samples]

    def scores(self, keys: list[Tensor], index: int, chunk: RowChunk) -> Tensor:
        """Scores of a chunk's rows [groups, n r, end]."""
        return self.objective.grouped(self.queries[index][:, chunk.sample_rows]) @ keys[index][:, : chunk.end].mT

    def add(self, grads: list[Tensor], weighted: Tensor, index: int, chunk: RowChunk) -> None:
        """Add the adjoint of p * (error − mean error)."""
        p = self.objective.samples[index].weights[:, chunk.sample_rows, : chunk.end]
        weighted = weighted.view(len(p), -1, chunk.end)
        weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        queries = self.objective.grouped(self.queries[index][:, chunk.sample_rows])
        grads[index][:, : chunk.end] += self.objective.grouped(weighted).mT @ queries

    def gradient(self, grads: list[Tensor]) -> Tensor:
        """The gradient by W_K [groups, d, n]."""

        def gradient_of(index: int, sample: ScoreSample) -> Tensor:
            keys = self.objective.key_rotation.adjoint(grads[index]).transpose(0, 1)
            return (keys.flatten(1).T @ sample.x).unflatten(0, keys.shape[1:])

        return sum(self.objective.map_samples(gradient_of))

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        """The mean square of queries [groups, d], and Σ x xᵀ weighted by received attention [n, n]."""
        objective, curvature, moments = self.objective, 0.0, 0.0
        for sample, queries in zip(objective.samples, self.queries, strict=True):
            curvature = curvature + exact(objective.grouped(queries)).square().sum(1)
            moments = moments + exact((sample.x.T * sample.weights.sum((0, 1))) @ sample.x)
        heads = len(self.queries[0])
        curvature = curvature / (len(objective.query_inputs) * heads // objective.groups)
        return self.mean_of_pairs(curvature, objective.key_rotation), moments
