"""What every conversion of one layer needs, from the layer's inputs on a calibration text (`layer_inputs.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from surgery.architecture.layer import LayerAnatomy, pair_channels
from surgery.architecture.weights import AttentionLayer, pack, with_bias
from surgery.calibration.attention_hook import AttentionHook, attention_weights
from surgery.calibration.closed_form.fit_scores import Rotation, ScoreSample, project
from surgery.calibration.closed_form.layer_inputs import (
    ROPE_SAMPLES,
    AttentionCall,
    FitSettings,
    LayerInputs,
    scale_of,
    share,
)
from surgery.calibration.closed_form.low_rank import fit_output
from surgery.calibration.moments import Moments, Regression, with_ones
from surgery.data.text import is_validation
from surgery.errors import UnsupportedModelError
from surgery.machine.parallel import parallel_map
from surgery.machine.placement import exact

# A fit of scores is dropped if it moves attention's output so much further from the base's than the nearest fit before
# it: a share of the output's energy. With 0 in its place, `mla` of SmolLM2-135M loses a little more on both texts.
FURTHER = 0.05


class FittedLayer:
    """The conversion of one layer. A method is a subclass that defines `convert`.

    The new layer is an `AttentionLayer`, or an object with the same members: its output projection `o` [D, H, d],
    `tensors()` and `replace()`. A subclass for such an object defines `projection`, `packed` and `restored`, too.

    Args:
        settings: what to fit, and how.
        layer: the old weights.
        target: the anatomy of the converted layer.
        inputs: the layer's inputs and the base's attention on the calibration text.
        hook: the model's hook, which knows the windows of its layers.

    Attributes:
        query_rotation, key_rotation: RoPE of queries and of keys, where no norm stands before it.
    """

    query_rotation: Rotation
    key_rotation: Rotation
    otherwise = "choose another operation"  # what works where this conversion cannot

    def __init__(
        self,
        settings: FitSettings,
        layer: AttentionLayer,
        target: LayerAnatomy,
        inputs: LayerInputs,
        hook: AttentionHook,
    ):
        self.settings, self.layer, self.target, self.inputs, self.hook = settings, layer, target, inputs, hook
        self._heads: dict[int, torch.Tensor] = {}
        if not layer.anatomy.qk_norm:
            self.query_rotation, self.key_rotation = (self._rotation(projection) for projection in ("q", "k"))
        self.prepare()

    def prepare(self) -> None:
        """Set what a method needs beside the arguments."""

    def convert(self) -> tuple[Any, dict]:
        """The new layer, and a record of the loss of each step."""
        raise NotImplementedError

    def projection(self, new: Any, letter: str) -> torch.Tensor:
        """The new layer's queries, keys or values as rows [heads, d, n], in float64 or in the inputs' dtype.

        Args:
            letter: "q", "k" or "v".
        """
        return with_bias(new, letter)

    def queries_and_keys(self, fitted: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a fit of scores has made, as queries [H, d, n] and keys [G', d, n]. Here it is the pair of them."""
        return fitted

    def normed(self, projection: str, heads: torch.Tensor) -> torch.Tensor:
        """Projections [heads, T, d] after the norm that stands between them and RoPE; here there is none.

        Args:
            projection: "q" or "k".
        """
        return heads

    def packed(self, new: Any) -> dict[str, torch.Tensor]:
        """The tensors of the new layer as they are stored, by name in its attention module."""
        return pack(new)

    def restored(self, tensors: dict[str, torch.Tensor], record: dict) -> Any:
        """The new layer from `tensors()` and the record of an earlier run."""
        return self.layer.replace(anatomy=self.target, **tensors)

    def _map_samples(self, work: Callable) -> Iterator:
        """The results of `work` for the index of each sample, in order."""
        return parallel_map(work, range(len(self.inputs.samples)), device=self.inputs.x[0].device)

    def set_input(self, index: int, call: AttentionCall) -> None:
        """Set the layer's input on a sequence to that of this attention call of the converted model."""
        self.inputs.x[index], self.inputs.calls[index] = with_ones(call.x, self.layer.q_bias is not None), call
        self._heads.pop(index, None)

    def head_outputs(self, new: Any, index: int) -> torch.Tensor:
        """Outputs of the new layer's heads on a sequence [T, H, d], cached: W_Q, W_K and W_V must be final."""
        if index not in self._heads:
            rows = torch.arange(len(self.inputs.x[index]))
            self._heads[index] = self._mix_values(new, index, self._attention_weights(new, index, rows))
        return self._heads[index]

    def _mix_values(self, new: Any, index: int, weights: torch.Tensor) -> torch.Tensor:
        """Outputs of the heads [r, H, d]: a sequence's values, averaged by attention weights [H, r, T]."""
        return mix(weights, project(self.projection(new, "v"), self.inputs.x[index]))

    def _attention_weights(self, new: Any, index: int, rows: torch.Tensor) -> torch.Tensor:
        """The new layer's attention weights [H, r, T] of some rows of a sequence."""
        query, key = self._rotated(new, index)
        return self._weights_of(query, key, index, rows)

    def _weights_of(self, query: torch.Tensor, key: torch.Tensor, index: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention weights [H, r, T] of queries [H, T, d] and keys [G', T, d], both after norms and RoPE."""
        call, limit = self.inputs.base[index], self.hook.windows[self.layer.anatomy.index]
        options = {name: call.settings.get(name) for name in ("softcap", "s_aux")}
        rows = rows.to(query.device)
        return attention_weights(query[None], key[None], rows, scale=scale_of(call), limit=limit, **options)[0]

    def _rotated(self, new: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [H, T, d] and keys [G', T, d], both after norms and RoPE."""
        x = self.inputs.x[index]
        return (
            self.query_rotation.to(x)(project(self.projection(new, "q"), x)),
            self.key_rotation.to(x)(project(self.projection(new, "k"), x)),
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
            rows = project(heads, exact(with_ones(call.x, self.layer.q_bias is not None)))
            before = self.normed(projection, rows)
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
                fix=self.otherwise,
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
            moments.add(read, row_weights(rms[rows]).repeat(len(sample.weights)))
        return moments

    def _weights_with(self, q: torch.Tensor, k: torch.Tensor, index: int) -> torch.Tensor:
        """Attention weights [H, r, T] of a sample's rows, with these queries [H, d, n] and keys [G', d, n]."""
        sample, x = self.inputs.samples[index], self.inputs.x[index]
        key, query = self.key_rotation.to(x)(project(k, x)), x.new_zeros(len(q), len(x), q.shape[1])
        queries = project(q, x[sample.rows])  # other rows are not read
        query[:, sample.rows] = self.query_rotation.to(x).at(sample.rows)(queries)
        return self._weights_of(query, key, index, sample.rows)

    def _reweighted(self, q: torch.Tensor, k: torch.Tensor, index: int) -> ScoreSample:
        """A sample whose attention weights are the mean of the base's and those of these queries and keys."""
        sample = self.inputs.samples[index]
        mean = ((sample.weights + self._weights_with(q, k, index)) / 2).masked_fill(sample.weights == 0, 0.0)
        return replace(sample, weights=mean)

    def fit_in_turn(self, start: Any, fits: Iterable[tuple[Callable, bool]], record: dict) -> Any:
        """Fit queries and keys to the base's scores, one after the other.

        In a fit of scores all heads count alike, also those whose values hardly differ. So it can bring the scores
        nearer to the base's and move attention's output away. A fit that moves it clearly further than the fits before
        (`FURTHER`) is dropped. The first stays in any case, since the next one often wins back what it loses.

        Args:
            start: what is fitted, for `queries_and_keys`.
            fits: functions, each with a flag. A function takes what is fitted so far and the samples, and returns the
                next state of it and a `Solution`. With the flag, and from the second fit on, the samples weigh keys
                by the attention so far, too (`FitSettings.reweight_keys`); else they are those of the fit before.
            record: gets "scores_lost", the loss before and after each fit, "output_moved", how far the output is moved
                at the start and after each fit, and "fits_kept", whether the fit was kept.
        """
        kept, least, samples = start, math.inf, self.inputs.samples
        record["scores_lost"], record["fits_kept"] = [], []
        record["output_moved"] = [self.output_moved(*self.queries_and_keys(start))]
        for step, (fit, reweights) in enumerate(fits):
            if step and reweights and self.settings.reweight_keys:
                samples = list(self._map_samples(partial(self._reweighted, *self.queries_and_keys(kept))))
            fitted, solution = fit(kept, samples)
            moved = self.output_moved(*self.queries_and_keys(fitted))
            record["scores_lost"].append([round(solution.before, 6), round(solution.after, 6)])
            record["output_moved"].append(moved)
            record["fits_kept"].append(moved <= least + FURTHER)
            if record["fits_kept"][-1]:
                kept, least = fitted, min(moved, least)
        return kept

    def output_moved(self, q: torch.Tensor, k: torch.Tensor) -> float:
        """How far these queries [H, d, n] and keys [G', d, n] move attention's output on the text held back.

        It is a share of the output's energy. Values and output projection are the base's, so that only the attention
        weights differ.
        """
        moved = self._output_energy(lambda index: self._weights_with(q, k, index) - self.inputs.samples[index].weights)
        return share(moved, self._base_energy)

    @cached_property
    def _base_energy(self) -> float:
        return self._output_energy(lambda index: self.inputs.samples[index].weights)

    def _output_energy(self, weights: Callable[[int], torch.Tensor]) -> float:
        """The energy of attention's output on the text held back, with the base's values and output projection.

        Args:
            weights: returns the attention weights [H, r, T] of a sample's rows, or a difference of such.
        """
        energy, output = 0.0, self.layer.o.flatten(1)
        for index, sample in enumerate(self.inputs.samples):
            if is_validation(index, len(self.inputs.samples)):
                values = project(with_bias(self.layer, "v"), self.inputs.x[index])
                rows = mix(weights(index), values).flatten(1) @ output.to(values).T
                sizes = row_weights(self.inputs.rms[index][sample.rows])
                energy += float((sizes * exact(rows).square().sum(-1)).sum())
        return energy

    def _fit_output(self, new: Any, o, record: dict, weights: list | None = None) -> Any:
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
                z.flatten(1), call.output[rows], row_weights(self.inputs.rms[index][rows])
            )
        pairs, ridges = (sums[0].pair, sums[1].pair), list(self.settings.ridges)
        result = fit_output(o.flatten(1).to(pairs[0][0]), *pairs, ridges, with_validation=weights is None)
        record["ridge"], energy = result.ridge, sums[1].energy
        lost = [share(energy + error, energy) for error in (result.before, result.after)]
        record["output_lost"] = record.get("output_lost", []) + lost
        return new.replace(o=result.weight.unflatten(1, o.shape[1:]).cpu().to(new.o.dtype))


def mix(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values [G, T, d], averaged by attention weights [H, r, T]: outputs of the heads [r, H, d]."""
    mixed = weights.reshape(len(values), -1, values.shape[1]) @ values
    return mixed.view(*weights.shape[:2], -1).transpose(0, 1)


def row_weights(rms: torch.Tensor) -> torch.Tensor:
    """ω of rows: it makes errors relative to the hidden states to which they are added."""
    return 1 / exact(rms).square().clamp(min=1e-30)
