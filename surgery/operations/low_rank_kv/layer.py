"""The closed-form conversion of one layer to keys and values of low rank."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch

from surgery.architecture.layer import LayerAnatomy, groups_of
from surgery.architecture.weights import AttentionLayer, with_bias
from surgery.calibration.closed_form.conjugate_gradient import Solution, solve
from surgery.calibration.closed_form.fit_scores import ScoreObjective, ScoreSample, project
from surgery.calibration.closed_form.joint_rank import JointRank, joint_rank
from surgery.calibration.closed_form.layer import FittedLayer
from surgery.calibration.closed_form.layer_inputs import LayerInputs, scale_of, share, train_and_validation
from surgery.calibration.closed_form.layerwise_fit import LayerwiseFit
from surgery.machine.placement import exact
from surgery.operations.low_rank_kv.weights import LowRankLayer

# The fits of scores, each with its share of the solver's steps: queries, the maps from the vector to keys, queries.
SCORE_FITS = (("q", 0.25), ("k", 0.75), ("q", 1.25))


class VectorLayer(FittedLayer):
    """The conversion of one layer.

    Attributes:
        norm: the norm between keys and RoPE, in the dtype of the inputs, since it takes no other; or None.
    """

    norm: torch.nn.Module | None = None

    def prepare(self) -> None:
        self._rows: tuple[LowRankLayer | None, dict[str, torch.Tensor]] = None, {}
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

    def projection(self, new: LowRankLayer, letter: str) -> torch.Tensor:
        if self._rows[0] is not new:  # the products are needed for each text, and are larger than those with a text
            self._rows = new, {}
        rows = self._rows[1]
        if letter not in rows:
            rows[letter] = new.rows(letter, self.inputs.x[0])
        return rows[letter]

    def restored(self, tensors: dict[str, torch.Tensor], record: dict) -> LowRankLayer:
        return LowRankLayer(self.target, **tensors)

    def packed(self, new: LowRankLayer) -> dict[str, torch.Tensor]:
        return new.stored(self.layer.o.dtype)

    def _rotated(self, new: LowRankLayer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.norm is None:
            return super()._rotated(new, index)
        x = self.inputs.x[index]  # queries are as they were
        keys = self.normed("k", project(self.projection(new, "k"), x))
        return self.inputs.calls[index].query, self.key_rotation.to(x)(keys)

    def convert(self) -> tuple[LowRankLayer, dict]:
        layer, record = self.layer, {}
        new = self._start(record)
        if self.norm is None and {"q", "k"} & set(self.settings.refit):
            fits = (
                (partial(self._fit_part, part, round(effort * self.settings.steps)), True)
                for part, effort in SCORE_FITS
                if part in self.settings.refit
            )
            new = self.fit_in_turn(new, fits, record)
        new = new.to(torch.promote_types(layer.o.dtype, torch.float32))  # rounded once, where it is stored
        if "o" in self.settings.refit:
            new = self._fit_output(new, new.o.double(), record)
        return new, record

    def _start(self, record: dict) -> LowRankLayer:
        """The layer of least loss before any refit: the vector from which keys and values are predicted best.

        An error of a value costs what the output projection makes of it. An error of a score moves the head's output
        towards or away from the token's value, so it costs in proportion to the spread of the values; that makes one
        scale of both. Biases stay as they are.
        """
        layer, anatomy, rank = self.layer, self.layer.anatomy, self.target.vector
        moments = self._input_moments()
        second, mean = moments.second, moments.mean
        q, k, v, o = (tensor.to(second) for tensor in (*(with_bias(layer, letter) for letter in "qkv"), layer.o))
        covariance, scale = second - torch.outer(mean, mean), scale_of(self.inputs.base[0])
        key_weights, value_weights, energies, gains = [], [], self._query_energies(q, second), self._norm_gains(k)
        for group, heads in enumerate(groups_of(anatomy)):
            varied = v[group] @ covariance @ v[group].T
            spread = torch.einsum("dha,ab,dhb->h", o[:, heads], varied, o[:, heads])
            turned = torch.stack([self._turned(energies[head]) for head in heads])
            weight = scale**2 * (spread[:, None, None] * turned).sum(0)
            key_weights.append(gains[group, :, None] * weight * gains[group])
            value_weights.append(sum(o[:, head].T @ o[:, head] for head in heads))
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
        vector, key_maps, value_maps = (
            joint.vector,
            torch.stack(joint.maps[: len(k)]),
            torch.stack(joint.maps[len(k) :]),
        )
        if biased:
            one = torch.nn.functional.one_hot(torch.tensor(size - 1), size).to(second)
            vector = torch.cat([vector, one[None]])
            key_maps, value_maps = (
                torch.cat([maps, rows[..., -1:]], -1) for maps, rows in ((key_maps, k), (value_maps, v))
            )
        parts = q, vector, key_maps, value_maps, o
        return LowRankLayer(self.target, *(part.to(self.layer.q.device) for part in parts))

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

    def queries_and_keys(self, fitted: LowRankLayer) -> tuple[torch.Tensor, torch.Tensor]:
        return self.projection(fitted, "q"), self.projection(fitted, "k")

    def _fit_part(
        self, part: str, steps: int, new: LowRankLayer, samples: list[ScoreSample]
    ) -> tuple[LowRankLayer, Solution]:
        """Fit queries, or the maps from the vector to keys, to the base's scores."""
        x, scale, options = self.inputs.x[0], scale_of(self.inputs.base[0]), {"damping": self.settings.damping}
        rotations = self.query_rotation.to(x), self.key_rotation.to(x)
        if part == "k":
            vector = new.vector.to(x)
            samples = [replace(sample, x=sample.x @ vector.T, query_inputs=sample.x) for sample in samples]
        problems = (
            ScoreObjective(some, scale, *rotations, len(new.key_maps)) for some in train_and_validation(samples)
        )
        if part == "q":
            keys = self.projection(new, "k")
            solution = solve(*(each.query_problem(keys) for each in problems), new.q, steps=steps, **options)
            return new.replace(q=solution.weight), solution
        problems = [each.key_problem(new.q) for each in problems]
        solution = solve(*problems, new.key_maps, steps=steps, **options)
        return new.replace(key_maps=solution.weight), solution


class LowRankConversion(LayerwiseFit):
    """The conversion of a model's layers to keys and values of low rank."""

    label = "lowering the rank"

    def changes(self, old: LayerAnatomy, new: LayerAnatomy) -> bool:
        return bool(new.vector)

    def conversion(self, layer: AttentionLayer, target: LayerAnatomy, inputs: LayerInputs) -> VectorLayer:
        return VectorLayer(self.settings, layer, target, inputs, self.hook)
