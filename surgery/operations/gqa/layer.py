"""The closed-form conversion of one layer, from its inputs on a calibration text (`layer_inputs.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from surgery.architecture.weights import AttentionLayer
from surgery.calibration.attention_hook import AttentionHook, attention_weights
from surgery.calibration.moments import Moments, Regression, with_ones
from surgery.errors import UnsupportedModelError
from surgery.machine.parallel import parallel_map
from surgery.machine.placement import exact
from surgery.operations.gqa.conjugate_gradient import solve
from surgery.operations.gqa.cost import efforts
from surgery.operations.gqa.fit_scores import Rotation, ScoreObjective, ScoreSample, project
from surgery.operations.gqa.fit_values import ValueProblem, ValueSample
from surgery.operations.gqa.layer_inputs import (
    ROPE_SAMPLES,
    AttentionCall,
    FitSettings,
    LayerInputs,
    is_validation,
    scale_of,
    share,
    train_and_validation,
)
from surgery.operations.gqa.low_rank import fit_output, merge_keys, merge_values
from surgery.operations.gqa.merge import group_members, pair_channels, stacked, with_bias


class SharedLayer:
    """The conversion of one layer.

    Args:
        settings: what to fit, and how.
        layer: the old weights.
        target: the anatomy of the converted layer.
        inputs: the layer's inputs and the base's attention on the calibration text.
        hook: the model's hook, which knows the windows of its layers.

    Attributes:
        key_heads: the KV heads whose keys stay, in a layer with a norm after its keys; otherwise empty.
    """

    def __init__(self, settings: FitSettings, layer: AttentionLayer, target, inputs: LayerInputs, hook: AttentionHook):
        self.settings, self.layer, self.target, self.inputs, self.hook = settings, layer, target, inputs, hook
        anatomy = layer.anatomy
        self.groups = group_members(anatomy, target.kv_heads)
        self._heads: dict[int, torch.Tensor] = {}
        self.key_heads: list[int] = []
        if not anatomy.qk_norm:
            self.query_rotation, self.key_rotation = (self._rotation(projection) for projection in ("q", "k"))

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

    def _map_samples(self, work: Callable) -> Iterator:
        """The results of `work` for the index of each sample, in order."""
        return parallel_map(work, range(len(self.inputs.samples)), device=self.inputs.x[0].device)

    def set_input(self, index: int, call: AttentionCall) -> None:
        """Set the layer's input on a sequence to that of this attention call of the converted model."""
        self.inputs.x[index], self.inputs.calls[index] = with_ones(call.x, self.layer.q_bias is not None), call
        self._heads.pop(index, None)

    def head_outputs(self, layer: AttentionLayer, index: int) -> torch.Tensor:
        """Outputs of the new layer's heads on a sequence [T, H, d], cached: W_Q, W_K and W_V must be final."""
        if index not in self._heads:
            rows = torch.arange(len(self.inputs.x[index]))
            self._heads[index] = self._mix_values(layer, index, self._attention_weights(layer, index, rows))
        return self._heads[index]

    def _mix_values(self, layer: AttentionLayer, index: int, weights: torch.Tensor) -> torch.Tensor:
        """Outputs of the heads [r, H, d]: a sequence's values, averaged by attention weights [H, r, T]."""
        x = self.inputs.x[index]
        values = project(with_bias(layer, "v"), x)
        mixed = weights.reshape(len(values), -1, len(x)) @ values
        return mixed.view(*weights.shape[:2], -1).transpose(0, 1)

    def _attention_weights(self, layer: AttentionLayer, index: int, rows: torch.Tensor) -> torch.Tensor:
        """The new layer's attention weights [H, r, T] of some rows of a sequence."""
        query, key = self._rotated(layer, index)
        return self._weights_of(query, key, index, rows)

    def _weights_of(self, query: torch.Tensor, key: torch.Tensor, index: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention weights [H, r, T] of queries [H, T, d] and keys [G', T, d], both after norms and RoPE."""
        call, limit = self.inputs.base[index], self.hook.windows[self.layer.anatomy.index]
        options = {name: call.settings.get(name) for name in ("softcap", "s_aux")}
        rows = rows.to(query.device)
        return attention_weights(query[None], key[None], rows, scale=scale_of(call), limit=limit, **options)[0]

    def _rotated(self, layer: AttentionLayer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [H, T, d] and keys [G', T, d], both after norms and RoPE."""
        if layer.anatomy.qk_norm:
            call = self.inputs.calls[index]
            return call.query, call.key[self.key_heads]
        x = self.inputs.x[index]
        return (
            self.query_rotation.to(x)(project(with_bias(layer, "q"), x)),
            self.key_rotation.to(x)(project(with_bias(layer, "k"), x)),
        )

    def _rotation(self, projection: str) -> Rotation:
        """This layer's RoPE, measured by comparing the model's queries or keys with their projections.

        Args:
            projection: "q" or "k".

        Raises:
            SurgeryError: the queries or keys are not their rotated projections.
        """
        anatomy, heads = self.layer.anatomy, with_bias(self.layer, projection)
        real, imag = pair_channels(anatomy.rotary, anatomy.positions)
        cross = power = free_cross = free_power = 0.0
        pairs = []
        for call in self.inputs.base[:ROPE_SAMPLES]:
            before = project(heads, exact(with_ones(call.x, self.layer.q_bias is not None)))
            after = exact(call.query if projection == "q" else call.key)
            z, rotated = (torch.complex(t[..., real], t[..., imag]) for t in (before, after))
            cross, power = cross + (rotated * z.conj()).sum(0), power + z.abs().square().sum(0)
            rest = before[..., anatomy.rotary :], after[..., anatomy.rotary :]
            free_cross, free_power = free_cross + (rest[0] * rest[1]).sum(), free_power + rest[0].square().sum()
            pairs.append((before, after))
        free = float(free_cross / free_power.clamp(min=1e-30)) if anatomy.rotary < anatomy.head_dim else 1.0
        rotation = Rotation.of(cross / power.clamp(min=1e-30), free, anatomy.head_dim, anatomy.positions)
        miss = sum(float((rotation(before) - after).square().sum()) for before, after in pairs)
        energy = sum(float(after.square().sum()) for _, after in pairs)
        if miss > 1e-4 * energy:
            name = {"q": "queries", "k": "keys"}[projection]
            raise UnsupportedModelError(
                f"layer {anatomy.index}: the {name} of this model are not its projections turned by RoPE "
                f"({(miss / energy) ** 0.5:.1%} apart)",
                fix="use method: mean",
            )
        return rotation

    def _input_moments(self) -> Moments:
        """Second moments of the layer's inputs, weighted by the attention that each token receives."""
        moments, share = Moments(exact=False), self.settings.received
        for x, sample in zip(self.inputs.x, self.inputs.samples, strict=True):
            received = sample.weights.sum((0, 1))
            received = received * (len(x) / received.sum())
            moments.add(x, 1 - share + share * received)
        return moments

    def _read_moments(self) -> Moments:
        """Second moments of inputs averaged by the base's attention: the heads average values in the same way.

        Every fourth row is enough.
        """
        moments = Moments(exact=False)
        for x, sample, rms in zip(self.inputs.x, self.inputs.samples, self.inputs.rms, strict=True):
            rows = sample.rows[::4]
            read = (sample.weights[:, ::4] @ x).flatten(0, 1)
            moments.add(read, _row_weights(rms[rows]).repeat(len(sample.weights)))
        return moments

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
        settings, call = self.settings, self.inputs.base[0]
        x = self.inputs.x[0]
        record["scores_lost"] = []
        samples = self.inputs.samples
        fits = settings.rounds * len(refit) + (len(refit) - 1)
        for step, effort in enumerate(efforts(fits)):
            if step and settings.reweight_keys:
                samples = list(self._map_samples(partial(self._reweighted, q, k)))
            rope = self.query_rotation.to(x), self.key_rotation.to(x)
            train, validation = (
                ScoreObjective(subset, scale_of(call), *rope, len(k)) for subset in train_and_validation(samples)
            )
            projection = refit[step % len(refit)]
            options = {"steps": round(effort * settings.steps), "damping": settings.damping}
            if projection == "q":
                solution = solve(train.query_problem(k), validation.query_problem(k), q, **options)
                q = solution.weight
            else:
                solution = solve(train.key_problem(q), validation.key_problem(q), k, **options)
                k = solution.weight
            record["scores_lost"].append([round(solution.before, 6), round(solution.after, 6)])
        return q, k

    def _reweighted(self, q, k, index: int) -> ScoreSample:
        """A sample whose attention weights are the mean of the base's and those of these queries and keys."""
        sample, x = self.inputs.samples[index], self.inputs.x[index]
        key, query = self.key_rotation.to(x)(project(k, x)), x.new_zeros(len(q), len(x), q.shape[1])
        queries = project(q, x[sample.rows])  # other rows are not read
        query[:, sample.rows] = self.query_rotation.to(x).at(sample.rows)(queries)
        new = self._weights_of(query, key, index, sample.rows)
        mean = ((sample.weights + new) / 2).masked_fill(sample.weights == 0, 0.0)
        return replace(sample, weights=mean)

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
            samples.append(ValueSample(sample.x, sample.rows, sample_weights, wanted, _row_weights(rms)))
        train, validation = (
            ValueProblem(subset, new.o, self.target.kv_heads) for subset in train_and_validation(samples)
        )
        solution = solve(train, validation, v, steps=self.settings.steps, damping=self.settings.damping)
        record["values_fit"] = [round(solution.before, 6), round(solution.after, 6)]
        return new.replace(**stacked(new, "v", list(solution.weight)))

    def _fit_output(self, new: AttentionLayer, o, record: dict, weights: list | None = None) -> AttentionLayer:
        """The layer with its output projection refitted to the output of the base's attention.

        Args:
            o: the old projection [D, H, d], float64.
            weights: the new layer's attention weights of the samples' rows. Only these rows are fitted, and not those
                of the validation samples, which later judge the values. None: all rows of all samples are fitted,
                except first tokens.
        """
        sums = [Regression(exact=False), Regression(exact=False)]
        if weights is None:
            list(self._map_samples(partial(self.head_outputs, new)))  # they are kept
        for index, call in enumerate(self.inputs.base):
            if weights is None:
                rows, z = slice(1, None), self.head_outputs(new, index)[1:]
            else:
                rows, z = self.inputs.samples[index].rows, self._mix_values(new, index, weights[index])
            sums[is_validation(index, len(self.inputs.base))].add(
                z.flatten(1), call.output[rows], _row_weights(self.inputs.rms[index][rows])
            )
        pairs, ridges = (sums[0].pair, sums[1].pair), list(self.settings.ridges)
        result = fit_output(o.flatten(1).to(pairs[0][0]), *pairs, ridges, with_validation=weights is None)
        record["ridge"], energy = result.ridge, sums[1].energy
        lost = [share(energy + error, energy) for error in (result.before, result.after)]
        record["output_lost"] = record.get("output_lost", []) + lost
        return new.replace(o=result.weight.unflatten(1, o.shape[1:]).cpu().to(new.o.dtype))

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


def _row_weights(rms: torch.Tensor) -> torch.Tensor:
    """ω of rows: it makes errors relative to the hidden states to which they are added."""
    return 1 / exact(rms).square().clamp(min=1e-30)
