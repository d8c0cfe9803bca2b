"""The closed-form conversion of one layer to keys and values of low rank."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch

from surgery.architecture.layer import LayerAnatomy, groups_of
from surgery.calibration.closed_form.conjugate_gradient import Solution, solve
from surgery.calibration.closed_form.fit_scores import ScoreObjective, ScoreSample, project
from surgery.calibration.closed_form.joint_rank import JointRank, joint_rank
from surgery.calibration.closed_form.layer_inputs import scale_of, share, train_and_validation
from surgery.calibration.closed_form.vector_layer import ScoreFit, VectorConversion, VectorFit
from surgery.machine.placement import exact
from surgery.operations.low_rank_kv.weights import LowRankLayer


class LowRankFit(VectorFit):
    """The conversion of one layer.

    Attributes:
        norm: the norm between keys and RoPE, in the dtype of the inputs, since it takes no other; or None.
    """

    WEIGHTS = LowRankLayer
    SCORE_FITS = (ScoreFit("q", 0.25), ScoreFit("maps", 0.75), ScoreFit("q", 1.25))
    norm: torch.nn.Module | None = None

    def prepare(self) -> None:
        super().prepare()
        anatomy, module = self.layer.anatomy, self.hook.modules[self.layer.anatomy.index]
        if anatomy.qk_norm:
            self.norm = deepcopy(getattr(module, anatomy.layout.k_norm)).to(self.inputs.x[0])
            self.key_rotation = self._rotation("k")

    def normed(self, projection: str, heads: torch.Tensor) -> torch.Tensor:
        kind = self.layer.anatomy.qk_norm
        if projection != "k" or self.norm is None:
            return heads
        if kind == "modules":
            return self.norm.to(heads)(heads[None])[0]
        by_token = heads.transpose(0, 1)  # [T, G, d]
        flat = by_token.flatten(1) if kind == "whole" else by_token
        return self.norm.to(heads)(flat[None])[0].reshape(by_token.shape).transpose(0, 1)

    def packed(self, new: LowRankLayer) -> dict[str, torch.Tensor]:
        return new.stored(self.layer.o.dtype)

    def _rotated(self, new: LowRankLayer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.norm is None:
            return super()._rotated(new, index)
        x = self.inputs.x[index]  # queries are as they were
        keys = self.normed("k", project(self.projection(new, "k"), x))
        return self.inputs.calls[index].query, self.key_rotation.to(x)(keys)

    @property
    def fits_scores(self) -> bool:
        return self.norm is None and super().fits_scores

    def start(self, record: dict) -> LowRankLayer:
        """The layer of least loss before any refit: the vector from which keys and values are predicted best.

        Biases stay as they are.
        """
        layer, anatomy, rank = self.layer, self.layer.anatomy, self.target.vector
        moments = self._input_moments()
        second, mean = moments.second, moments.mean
        q, k, v, o = self.old_weights(second)
        scale, energies, gains = scale_of(self.inputs.base[0]), self._query_energies(q, second), self._norm_gains(k)
        key_weights, value_weights = [], []
        costs = self.value_costs(v, o, second - torch.outer(mean, mean))
        for (group, heads), (of_value, spread) in zip(enumerate(groups_of(anatomy)), costs, strict=True):
            turned = torch.stack([self._turned(energies[head]) for head in heads])
            weight = scale**2 * (spread[:, None, None] * turned).sum(0)
            key_weights.append(gains[group, :, None] * weight * gains[group])
            value_weights.append(of_value)
        biased, size = layer.k_bias is not None, len(second)
        keys, values = k.clone(), v.clone()
        if biased:
            keys[..., -1], values[..., -1] = 0, 0
        if rank == size - biased:  # the input itself: nothing is lost, also of what the text has not shown
            whole = torch.eye(rank, size).to(second)
            joint = JointRank(whole, [rows @ whole.T for rows in (*keys, *values)], 0.0, 1.0)
        else:
            joint = joint_rank([*keys, *values], [*key_weights, *value_weights], second, rank)
        record["vector_lost"] = share(joint.lost, joint.energy)
        vector, made = joint.vector, (joint.maps[: len(k)], joint.maps[len(k) :])
        key_maps, value_maps = (torch.stack(maps) for maps in made)
        if biased:
            one = torch.nn.functional.one_hot(torch.tensor(size - 1), size).to(second)
            vector = torch.cat([vector, one[None]])
            key_maps, value_maps = (
                torch.cat([maps, rows[..., -1:]], -1) for maps, rows in ((key_maps, k), (value_maps, v))
            )
        return LowRankLayer(self.target, q, vector, key_maps, value_maps, o)

    def _query_energies(self, q: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """E[q qᵀ] of the queries before RoPE, [H, d, d]."""
        if self.norm is None:
            return q @ second @ q.mT
        rotation = self.key_rotation
        power = rotation.cos.square() + rotation.sin.square()  # not 1 where RoPE scales, as YaRN's does
        queries = [rotation.adjoint(exact(call.query)) / power for call in self.inputs.base]
        return sum(each.mT @ each for each in queries).to(second) / sum(each.shape[1] for each in queries)

    def _norm_gains(self, k: torch.Tensor) -> torch.Tensor:
        """By how much the norm scales each channel of the keys in root mean square, [G, d]; 1 without a norm."""
        if self.norm is None:
            return k.new_ones(k.shape[:2])
        keys = torch.cat([exact(project(k.to(x), x)) for x in self.inputs.x], 1)
        before, after = (each.square().mean(1) for each in (keys, self.normed("k", keys)))
        return (after / before.clamp(min=1e-30)).sqrt().to(k)

    def _turned(self, energy: torch.Tensor) -> torch.Tensor:
        """The mean of E[q qᵀ] [d, d] over the angles between a query and the keys before it, as RoPE turns them.

        A query and a key that are t tokens apart meet as q turned by t and the key before RoPE. Where RoPE scales, it
        scales both.
        """
        values, vectors = torch.linalg.eigh((energy + energy.T) / 2)
        factors = (vectors * values.clamp(min=0).sqrt()).T  # [d, d], rows f with energy = Σ f fᵀ
        rotation = self.key_rotation.to(energy)
        scale = (rotation.cos.square() + rotation.sin.square()).sqrt()
        turned = (rotation(factors[:, None].expand(-1, len(rotation.cos), -1)) * scale).flatten(0, 1)
        return turned.T @ turned / len(rotation.cos)

    def fit_keys(
        self, part: str, steps: int, new: LowRankLayer, samples: list[ScoreSample]
    ) -> tuple[LowRankLayer, Solution]:
        """Fit the maps from the vector to keys to the base's scores."""
        x, scale = self.inputs.x[0], scale_of(self.inputs.base[0])
        rotations, vector = (self.query_rotation.to(x), self.key_rotation.to(x)), new.vector.to(x)
        of_vectors = [replace(sample, x=sample.x @ vector.T, query_inputs=sample.x) for sample in samples]
        train, validation = (
            ScoreObjective(some, scale, *rotations, len(new.key_maps)).key_problem(new.q)
            for some in train_and_validation(of_vectors)
        )
        solution = solve(train, validation, new.key_maps, steps=steps, damping=self.settings.damping)
        return new.replace(key_maps=solution.weight), solution


class LowRankConversion(VectorConversion):
    """The conversion of a model's layers to keys and values of low rank."""

    LAYER = LowRankFit
    REVISION = 1

    def changes(self, old: LayerAnatomy, new: LayerAnatomy) -> bool:
        return bool(new.vector)
