"""The closed-form merge of the KV heads of one layer.

Keys are shared (complex PCA), and queries and keys are refitted in turn to the base's scores. Values are shared (low
rank), and they and the output projection are refitted to the output of the base's attention.
"""

from __future__ import annotations

from functools import partial

import torch

from surgery.architecture.layer import LayerAnatomy
from surgery.architecture.weights import AttentionLayer, stacked, with_bias
from surgery.calibration.closed_form.conjugate_gradient import Solution, solve
from surgery.calibration.closed_form.cost import efforts
from surgery.calibration.closed_form.fit_scores import ScoreObjective, ScoreSample
from surgery.calibration.closed_form.fit_values import ValueProblem, ValueSample
from surgery.calibration.closed_form.layer import FittedLayer, row_weights
from surgery.calibration.closed_form.layer_inputs import (
    LayerInputs,
    scale_of,
    share,
    train_and_validation,
)
from surgery.calibration.closed_form.layerwise_fit import LayerwiseFit
from surgery.calibration.closed_form.low_rank import merge_keys, merge_values
from surgery.calibration.moments import Moments
from surgery.machine.placement import exact
from surgery.operations.gqa.merge import group_members


class SharedLayer(FittedLayer):
    """The conversion of one layer to fewer KV heads.

    Attributes:
        key_heads: the KV heads whose keys stay, in a layer with a norm after its keys; otherwise empty.
    """

    otherwise = "use method: mean"

    def prepare(self) -> None:
        self.groups = group_members(self.layer.anatomy, self.target.kv_heads)
        self.key_heads: list[int] = []

    def restored(self, tensors: dict[str, torch.Tensor], record: dict) -> AttentionLayer:
        self.key_heads = record.get("key_heads", [])
        return super().restored(tensors, record)

    def _rotated(self, new: AttentionLayer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if new.anatomy.qk_norm:  # queries are as they were, and keys are some of those that were
            call = self.inputs.calls[index]
            return call.query, call.key[self.key_heads]
        return super()._rotated(new, index)

    def convert(self) -> tuple[AttentionLayer, dict]:
        """The layer with shared KV heads, and a record of the loss of each step."""
        layer, settings = self.layer, self.settings
        record: dict = {}
        moments = self._input_moments()
        q, k, v, o = with_bias(layer, "q"), with_bias(layer, "k"), with_bias(layer, "v"), layer.o.double()
        if layer.anatomy.qk_norm:
            tensors = self._choose_key_heads(record)
        else:
            q, k = self._merge_keys(q, k, moments, record)
            if refit := [projection for projection in ("q", "k") if projection in settings.refit]:
                q, k = self._fit_scores(q, k, refit, record)
            tensors = stacked(layer, "q", list(q)) | stacked(layer, "k", list(k))
        v, o = self._merge_values(v, o, self._read_moments(), record)
        new = layer.replace(anatomy=self.target, **tensors, **stacked(layer, "v", list(v)), o=o.to(layer.o.dtype))
        if "v" in settings.refit:  # between two refits of the output projection, on the samples' rows and on all rows
            weights = list(
                self._map_samples(lambda index: self._attention_weights(new, index, self.inputs.samples[index].rows))
            )
            if "o" in settings.refit:
                new = self._fit_output(new, o, record, weights)
            new, o = self._fit_values(new, v, weights, record), new.o.double()
        if "o" in settings.refit:
            new = self._fit_output(new, o, record)
        return new, record

    def _merge_keys(self, q, k, moments: Moments, record: dict):
        """Queries [H, d, n] that read the merged keys, and these keys [groups, d, n].

        They are computed where the moments lie.
        """
        anatomy, new, lost, energy, home = self.layer.anatomy, [], 0.0, 0.0, k.device
        second = moments.second
        mean = None if anatomy.layout.sinks else moments.mean.to(second)
        q, k = q.to(second.device, copy=True), k.to(second.device)
        for group in self.groups:
            sources = list(group)
            power = torch.stack([sum(q[j] @ second @ q[j].T for j in readers) for readers in group.values()])
            if not self.settings.weighted:
                power = torch.eye(anatomy.head_dim).to(power).expand_as(power)
            merged = merge_keys(
                k[sources], second, power, rotary=anatomy.rotary, positions=anatomy.positions, mean=mean
            )
            for key_map, readers in zip(merged.maps, group.values(), strict=True):
                q[readers] = key_map.T @ q[readers]
            new.append(merged.head)
            lost, energy = lost + merged.lost, energy + merged.energy
        record["keys_lost"] = share(lost, energy)
        return q.to(home), torch.stack(new).to(home)

    def _fit_scores(self, q, k, refit: list[str], record: dict):
        """Fit queries and keys in turn to the base's scores. Later fits take more steps, as they undo earlier ones."""
        all_efforts = efforts(self.settings.rounds * len(refit) + (len(refit) - 1))
        fits = (
            (partial(self._fit_one, refit[step % len(refit)], round(effort * self.settings.steps)), True)
            for step, effort in enumerate(all_efforts)
        )
        return self.fit_in_turn((q, k), fits, record)

    def _fit_one(self, projection: str, steps: int, pair: tuple, samples: list[ScoreSample]) -> tuple[tuple, Solution]:
        """Queries and keys of which one is fitted, "q" or "k"."""
        (q, k), x = pair, self.inputs.x[0]
        rope = self.query_rotation.to(x), self.key_rotation.to(x)
        train, validation = (
            ScoreObjective(subset, scale_of(self.inputs.base[0]), *rope, len(k))
            for subset in train_and_validation(samples)
        )
        options = {"steps": steps, "damping": self.settings.damping}
        if projection == "q":
            solution = solve(train.query_problem(k), validation.query_problem(k), q, **options)
            return (solution.weight, k), solution
        solution = solve(train.key_problem(q), validation.key_problem(q), k, **options)
        return (q, solution.weight), solution

    def _merge_values(self, v, o, moments: Moments, record: dict):
        """The merged values [groups, d, n], and the output columns [D, H, d] that read them."""
        new, lost, energy, second, home = [], 0.0, 0.0, moments.second, v.device
        v, o = v.to(second.device), o.to(second.device, copy=True)
        for group in self.groups:
            readers = torch.stack([sum(o[:, j].T @ o[:, j] for j in queries) for queries in group.values()])
            merged = merge_values(v[list(group)], second, readers)
            for value_map, queries in zip(merged.maps, group.values(), strict=True):
                o[:, queries] = o[:, queries] @ value_map
            new.append(merged.head)
            lost, energy = lost + merged.lost, energy + merged.energy
        record["values_lost"] = share(lost, energy)
        return torch.stack(new).to(home), o.to(home)

    def _fit_values(self, new: AttentionLayer, v, weights: list[torch.Tensor], record: dict) -> AttentionLayer:
        """The layer with its values refitted to the output of the base's attention.

        Args:
            v: the merged values [G', d, n], float64.
            weights: the new layer's attention weights of the samples' rows.
        """
        samples = []
        for index, (sample, sample_weights) in enumerate(zip(self.inputs.samples, weights, strict=True)):
            wanted, rms = self.inputs.base[index].output[sample.rows], self.inputs.rms[index][sample.rows]
            samples.append(ValueSample(sample.x, sample.rows, sample_weights, wanted, row_weights(rms)))
        train, validation = (
            ValueProblem(subset, new.o, self.target.kv_heads) for subset in train_and_validation(samples)
        )
        solution = solve(train, validation, v, steps=self.settings.steps, damping=self.settings.damping)
        record["values_fit"] = [round(solution.before, 6), round(solution.after, 6)]
        return new.replace(**stacked(new, "v", list(solution.weight)))

    def _choose_key_heads(self, record: dict) -> dict[str, torch.Tensor]:
        """In each group, choose the key head that brings the scores of all the group's queries nearest to the base's.

        Key heads before a norm can be kept but not mixed: the norm has a scale for each channel, and none for a head.
        """
        layer, total = self.layer, {}
        for sample, call in zip(self.inputs.samples, self.inputs.calls, strict=True):
            wanted, scale = sample.scores(), scale_of(call)
            for group in self.groups:
                readers = [query for queries in group.values() for query in queries]
                weights = sample.weights[readers]
                for head in group:
                    errors = call.query[readers][:, sample.rows] @ call.key[head].T * scale - wanted[readers]
                    weighted = weights * errors
                    lost = exact(weighted * errors).sum() - exact(weighted.sum(-1)).square().sum()
                    total[readers[0], head] = total.get((readers[0], head), 0.0) + float(lost)
        self.key_heads = []
        for group in self.groups:
            first = next(iter(group.values()))[0]
            self.key_heads.append(min(group, key=lambda head: total[first, head]))
        record["key_heads"] = self.key_heads
        names = ("k", "k_bias", "k_norm")
        return {n: tensor[self.key_heads] for n, tensor in layer.tensors().items() if n in names}


class Sharing(LayerwiseFit):
    """The conversion of a model's layers to fewer KV heads."""

    label = "merging layers"

    def changes(self, old: LayerAnatomy, new: LayerAnatomy) -> bool:
        return old.kv_heads != new.kv_heads

    def conversion(self, layer: AttentionLayer, target: LayerAnatomy, inputs: LayerInputs) -> SharedLayer:
        return SharedLayer(self.settings, layer, target, inputs, self.hook)
