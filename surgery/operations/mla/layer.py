"""The closed-form conversion of one layer to latent attention."""

from __future__ import annotations

from dataclasses import replace

import torch

from surgery.architecture.layer import LayerAnatomy, groups_of, pair_channels
from surgery.calibration.closed_form.conjugate_gradient import Solution, solve
from surgery.calibration.closed_form.fit_scores import Rotation, ScoreObjective, ScoreSample, project
from surgery.calibration.closed_form.joint_rank import joint_rank
from surgery.calibration.closed_form.layer_inputs import scale_of, share, train_and_validation
from surgery.calibration.closed_form.low_rank import merge_rotated_keys
from surgery.calibration.closed_form.vector_layer import ScoreFit, VectorConversion, VectorFit
from surgery.operations.mla.weights import LatentLayer


class LatentFit(VectorFit):
    """The conversion of one layer.

    The channels of a head are counted in the new order: p that RoPE does not rotate, then e that it rotates.

    Attributes:
        free: for each of the p channels, the channel of the base's heads that it was.
        folded: the channels that share the e channels: one list of e for each frequency that is folded into one.
    """

    WEIGHTS = LatentLayer
    # "shared" is the rotated key, "maps" makes keys of the latent vector. The last fit is the longest, since it sees
    # all others.
    SCORE_FITS = (
        ScoreFit("q", 0.25),
        ScoreFit("shared", 0.6),
        ScoreFit("maps", 0.6, reweights=False),
        ScoreFit("q", 1.25),
    )

    def prepare(self) -> None:
        super().prepare()
        self.free, self.folded = channels_of(self.layer.anatomy, self.target)
        self.query_rotation, self.key_rotation = (
            rotation.part(self.folded[0]).behind(len(self.free))
            for rotation in (self.query_rotation, self.key_rotation)
        )

    def packed(self, new: LatentLayer) -> dict[str, torch.Tensor]:
        vector = new.vector.to(self.inputs.x[0])
        largest = tuple(
            max(float(rows.square().mean(-1).max()) for rows in each)
            for each in ((x @ vector.T for x in self.inputs.x), self.inputs.x)
        )
        return new.stored(scale_of(self.inputs.base[0]), largest, self.layer.o.dtype)

    def start(self, record: dict) -> LatentLayer:
        """The layer of least loss before any refit: one rotated key, and a vector for the rest of keys and values."""
        layer, anatomy, latent = self.layer, self.layer.anatomy, self.target.latent
        moments = self._input_moments()
        second, mean = moments.second, moments.mean
        q, k, v, o = self.old_weights(second)
        readers, scale = groups_of(anatomy), scale_of(self.inputs.base[0])
        energy = torch.stack([head @ second @ head.T for head in q])  # E[q qᵀ]
        power = torch.stack([energy[heads].sum(0) for heads in readers])
        rotated = [channel for channels in self.folded for channel in channels]
        merged = merge_rotated_keys(
            k[:, rotated], second, power[:, rotated][..., rotated], positions="half", fold=len(self.folded)
        )
        rest = k.clone()
        rest[:, rotated] -= merged.maps @ merged.head
        key_rows, key_weights, value_weights = [], [], []
        costs = self.value_costs(v, o, second - torch.outer(mean, mean))
        for (group, heads), (of_value, spread) in zip(enumerate(readers), costs, strict=True):
            free = energy[heads][:, self.free][..., self.free]
            keys = rest[group, self.free]
            if layer.k_bias is not None:  # what all keys of a head have in common moves no weight where nothing turns
                keys[:, -1] -= keys @ mean
            key_rows.append(keys)
            key_weights.append(scale**2 * (spread[:, None, None] * free).sum(0))
            value_weights.append(of_value)
        joint = joint_rank([*key_rows, *v], [*key_weights, *value_weights], second, latent.rank)
        record["keys_lost"] = share(merged.lost, merged.energy)
        record["latent_lost"] = share(joint.lost, joint.energy)
        turned = torch.cat([own.T @ q[heads][:, rotated] for own, heads in zip(merged.maps, readers, strict=True)])
        queries = torch.cat([q[:, self.free], turned], 1)
        key_maps, value_maps = torch.stack(joint.maps[: len(k)]), torch.stack(joint.maps[len(k) :])
        return LatentLayer(self.target, queries, joint.vector, key_maps, value_maps, o, merged.head[None])

    def fit_keys(
        self, part: str, steps: int, new: LatentLayer, samples: list[ScoreSample]
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


def channels_of(old: LayerAnatomy, new: LayerAnatomy) -> tuple[list[int], list[list[int]]]:
    """The channels of the base's heads that RoPE does not rotate in the new layer, and those that it does.

    The first frequencies keep RoPE. What the shared key misses of the fastest ones cannot be said without RoPE, so
    their channels are not among those without.

    Of each `latent.fold` neighbouring frequencies, the first list of rotated channels has the fastest, the second the
    next, and so on.
    """
    latent = new.latent
    real, imag = pair_channels(old.rotary, old.positions)
    dropped, kept = (old.head_dim - latent.nope) // 2, latent.rope // 2 * latent.fold
    folded = (slice(start, kept, latent.fold) for start in range(latent.fold))
    return [*real[dropped:], *imag[dropped:]], [[*real[part], *imag[part]] for part in folded]


class LatentConversion(VectorConversion):
    """The conversion of a model's layers to latent attention."""

    LAYER = LatentFit
    REVISION = 4

    def changes(self, old: LayerAnatomy, new: LayerAnatomy) -> bool:
        return True
