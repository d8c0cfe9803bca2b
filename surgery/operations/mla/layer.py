"""The closed-form conversion of one layer to latent attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from surgery.architecture.layer import LayerAnatomy, groups_of, pair_channels
from surgery.architecture.weights import AttentionLayer, with_bias
from surgery.calibration.closed_form.conjugate_gradient import Solution, solve
from surgery.calibration.closed_form.fit_scores import Rotation, ScoreObjective, ScoreSample, project
from surgery.calibration.closed_form.joint_rank import joint_rank
from surgery.calibration.closed_form.layer import FittedLayer
from surgery.calibration.closed_form.layer_inputs import (
    LayerInputs,
    scale_of,
    share,
    train_and_validation,
)
from surgery.calibration.closed_form.layerwise_fit import LayerwiseFit
from surgery.calibration.closed_form.low_rank import merge_keys
from surgery.operations.mla.weights import LatentLayer

# The fits of scores, each with its share of the solver's steps. The last one is the longest, since it sees all others.
# "shared" is the rotated key, "maps" makes keys of the latent vector.
SCORE_FITS = (("q", 0.25), ("shared", 0.6), ("maps", 0.6), ("q", 1.25))


class CompressedLayer(FittedLayer):
    """The conversion of one layer.

    The channels of a head are counted in the new order: p that RoPE does not rotate, then e that it rotates.

    Attributes:
        free, turned: for each of the p and of the e channels, the channel of the base's heads that it was.
    """

    def prepare(self) -> None:
        self._rows: tuple[LatentLayer | None, dict[str, torch.Tensor]] = None, {}
        self.free, self.turned = channels_of(self.layer.anatomy, self.target)
        self.query_rotation, self.key_rotation = (
            rotation.part(self.turned).behind(len(self.free)) for rotation in (self.query_rotation, self.key_rotation)
        )

    def projection(self, new: LatentLayer, letter: str) -> torch.Tensor:
        if self._rows[0] is not new:  # the products are needed for each text, and are larger than those with a text
            self._rows = new, {}
        rows = self._rows[1]
        if letter not in rows:
            rows[letter] = new.rows(letter, self.inputs.x[0])
        return rows[letter]

    def restored(self, tensors: dict[str, torch.Tensor], record: dict) -> LatentLayer:
        return LatentLayer(self.target, **tensors)

    def packed(self, new: LatentLayer) -> dict[str, torch.Tensor]:
        vector = new.vector.to(self.inputs.x[0])
        largest = tuple(
            max(float(rows.square().mean(-1).max()) for rows in each)
            for each in ((x @ vector.T for x in self.inputs.x), self.inputs.x)
        )
        return new.stored(scale_of(self.inputs.base[0]), largest, self.layer.o.dtype)

    def convert(self) -> tuple[LatentLayer, dict]:
        layer, record = self.layer, {}
        new = self._start(record)
        if {"q", "k"} & set(self.settings.refit):
            new = self._fit_scores(new, record)
        new = new.to(torch.promote_types(layer.o.dtype, torch.float32))  # rounded once, where it is stored
        if "o" in self.settings.refit:
            new = self._fit_output(new, new.o.double(), record)
        return new, record

    def _start(self, record: dict) -> LatentLayer:
        """The layer of least loss before any refit: one rotated key, and a vector for the rest of keys and values.

        An error of a value costs what the output projection makes of it. An error of a score moves the head's output
        towards or away from the token's value, so it costs in proportion to the spread of the values; that makes one
        scale of both.
        """
        layer, anatomy, latent = self.layer, self.layer.anatomy, self.target.latent
        moments = self._input_moments()
        second, mean = moments.second, moments.mean
        q, k, v, o = (tensor.to(second) for tensor in (*(with_bias(layer, letter) for letter in "qkv"), layer.o))
        readers, scale = groups_of(anatomy), scale_of(self.inputs.base[0])
        energy = torch.stack([head @ second @ head.T for head in q])  # E[q qᵀ]
        power = torch.stack([energy[heads].sum(0) for heads in readers])
        merged = merge_keys(k, second, power, rotary=anatomy.rotary, positions=anatomy.positions)
        rest = k.clone()
        rest[:, self.turned] -= (merged.maps @ merged.head)[:, self.turned]
        covariance = second - torch.outer(mean, mean)
        blocks, weights = [], []
        for group, heads in enumerate(readers):
            varied = v[group] @ covariance @ v[group].T
            spread = torch.einsum("dha,ab,dhb->h", o[:, heads], varied, o[:, heads])
            free = energy[heads][:, self.free][..., self.free]
            keys = rest[group, self.free]
            if layer.k_bias is not None:  # what all keys of a head have in common moves no weight where nothing turns
                keys[:, -1] -= keys @ mean
            blocks.append(keys)
            weights.append(scale**2 * (spread[:, None, None] * free).sum(0))
        for group, heads in enumerate(readers):
            blocks.append(v[group])
            weights.append(sum(o[:, head].T @ o[:, head] for head in heads))
        joint = joint_rank(blocks, weights, second, latent.rank)
        record["keys_lost"] = share(merged.lost, merged.energy)
        record["latent_lost"] = share(joint.lost, joint.energy)
        turned = torch.stack([merged.maps[group].T @ q[head] for group, heads in enumerate(readers) for head in heads])
        queries = torch.cat([q[:, self.free], turned[:, self.turned]], 1)
        key_maps, value_maps = torch.stack(joint.maps[: len(k)]), torch.stack(joint.maps[len(k) :])
        parts = queries, merged.head[None, self.turned], joint.vector, key_maps, value_maps, o
        return LatentLayer(self.target, *(part.to(self.layer.q.device) for part in parts))

    def queries_and_keys(self, fitted: LatentLayer) -> tuple[torch.Tensor, torch.Tensor]:
        return self.projection(fitted, "q"), self.projection(fitted, "k")

    def _fit_scores(self, new: LatentLayer, record: dict) -> LatentLayer:
        """Fit queries, the shared key and the maps to keys in turn to the base's scores."""
        fits = (
            (partial(self._fit_part, part, round(effort * self.settings.steps)), part != "maps")
            for part, effort in SCORE_FITS
            if ("q" if part == "q" else "k") in self.settings.refit
        )
        return self.fit_in_turn(new, fits, record)

    def _fit_part(
        self, part: str, steps: int, new: LatentLayer, samples: list[ScoreSample]
    ) -> tuple[LatentLayer, Solution]:
        if part == "q":
            return self._fit_queries(new, samples, steps)
        return self._fit_keys(part, new, samples, steps)

    def _fit_queries(self, new: LatentLayer, samples: list[ScoreSample], steps: int) -> tuple[LatentLayer, Solution]:
        x, keys = self.inputs.x[0], self.projection(new, "k")
        rotations = self.query_rotation.to(x), self.key_rotation.to(x)
        train, validation = (
            ScoreObjective(some, scale_of(self.inputs.base[0]), *rotations, len(keys)).query_problem(keys)
            for some in train_and_validation(samples)
        )
        solution = solve(train, validation, new.q, steps=steps, damping=self.settings.damping)
        return new.replace(q=solution.weight), solution

    def _fit_keys(
        self, part: str, new: LatentLayer, samples: list[ScoreSample], steps: int
    ) -> tuple[LatentLayer, Solution]:
        """Fit the shared key, or the maps to keys, to what the other one leaves of the base's scores."""
        x, free, count = self.inputs.x[0], len(self.free), new.q.shape[1]
        own, other = list(range(free, count)), list(range(free))
        if part == "maps":
            own, other = other, own
        rotations = [rotation.to(x) for rotation in (self.query_rotation, self.key_rotation)]
        queries, start = new.q[:, own], new.shared if part == "shared" else new.key_maps
        left = [self._beside(new, sample, rotations, part, other) for sample in samples]
        views = [rotation.part(own) for rotation in rotations]
        train, validation = (
            ScoreObjective(some, scale_of(self.inputs.base[0]), *views, len(start)).key_problem(queries)
            for some in train_and_validation(left)
        )
        solution = solve(train, validation, start, steps=steps, damping=self.settings.damping)
        return new.replace(**{"shared" if part == "shared" else "key_maps": solution.weight}), solution

    def _beside(
        self, new: LatentLayer, sample: ScoreSample, rotations: list[Rotation], part: str, other: list[int]
    ) -> ScoreSample:
        """A sample for one part of the keys: its inputs, and the scores without those of the `other` channels."""
        views, x = [rotation.part(other) for rotation in rotations], sample.x
        query, key = new.q[:, other], self.projection(new, "k")[:, other]

        def scores() -> torch.Tensor:
            queries = views[0].at(sample.rows)(project(query, x[sample.rows]))
            keys = views[1](project(key, x)).repeat_interleave(len(query) // len(key), 0)
            return (sample.scores() - queries @ keys.mT * scale).masked_fill_(sample.weights == 0, 0.0)

        scale = scale_of(self.inputs.base[0])
        inputs = x if part == "shared" else x @ new.vector.to(x).T
        return replace(sample, x=inputs, scores=scores, query_inputs=x)


def channels_of(old: LayerAnatomy, new: LayerAnatomy) -> tuple[list[int], list[int]]:
    """The channels of the base's heads that RoPE does not rotate in the new layer, and those that it does.

    The first frequencies keep RoPE. What the shared key misses of the fastest ones cannot be said without RoPE, so
    their channels are not among those without.
    """
    latent = new.latent
    real, imag = pair_channels(old.rotary, old.positions)
    kept, dropped = latent.rope // 2, (old.head_dim - latent.nope) // 2
    return [*real[dropped:], *imag[dropped:]], [*real[:kept], *imag[:kept]]


class Compression(LayerwiseFit):
    """The conversion of a model's layers to latent attention."""

    label = "compressing layers"

    def changes(self, old: LayerAnatomy, new: LayerAnatomy) -> bool:
        return True

    def conversion(self, layer: AttentionLayer, target: LayerAnatomy, inputs: LayerInputs) -> CompressedLayer:
        return CompressedLayer(self.settings, layer, target, inputs, self.hook)
