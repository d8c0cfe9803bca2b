"""KV heads shared in closed form, layer after layer, on a calibration text: `closed_form` and `score_fit` put to work.

In a layer, with the base's attention as the goal: shared keys (complex PCA), queries and keys refitted in turn to the
base's scores, shared values (low rank), values and output projection refitted to what the base's attention wrote. Then
the converted model's own states go through the layer, and the MLP's output projection is refitted to bring them back
to the base's. Every sixth sequence is held back: it chooses ridges and stops the solvers; the last fits of both output
projections then count it, too.

Memory beyond the model: `closed_form_cost.Calibration`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..engines import refuse_non_finite
from ..layers import AttentionLayer, pack, unpack
from ..score_fit import Piece
from .layer_seen import Scores, Seen, Settings
from .mlp_output import MLPOutput, projection_of
from .shared_layer import SharedLayer
from .statistics import with_ones
from .two_streams import Call, TwoStreams
from .watching import Watched, watched

MLP = "mlp"  # the MLP's output weight among the tensors of a layer that are kept


def layer_of(model, facts) -> AttentionLayer:
    """A copy of a layer's weights."""
    module = model.get_submodule(facts.path)
    tensors = {name: module.get_parameter(name).detach() for name in facts.tensor_names}
    refuse_non_finite(tensors, facts.path)
    return unpack(facts, tensors).copy()


class Sharing:
    """The conversion of one model; `layers` yields the new layers in order.

    Args:
        model: in memory; it is left as it was.
        targets: KV heads of each layer after.
        sequences: tokens, long [samples, T], of one length, without padding.
        known: of a layer's number what an earlier run found (`AttentionLayer` parts and record), or None.
        found: called with what this run finds.
        fitted: as `known`, of its attention alone: the MLP is still to be fitted.
    """

    def __init__(self, model, targets, sequences, settings: Settings, known=None, found=None, fitted=None):
        self.model, self.targets, self.sequences, self.settings = model, targets, sequences, settings
        self.known: Callable = known or (lambda number: None)
        self.fitted: Callable = fitted or (lambda number: None)
        self.found: Callable = found or (lambda number, tensors, record: None)
        self.streams = TwoStreams(model, sequences)
        self.mlps: dict[str, torch.Tensor] = {}

    def layers(self, progress=None) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
        """Packed tensors and a record of each layer; what the MLPs become is in `mlps`, by parameter name."""
        results, records = [], []
        with watched(self.model, self.streams.attention) as watch, torch.no_grad():
            self.watch: Watched = watch
            self.streams.begin(watch)
            changed = [
                old.kv_heads != new.kv_heads for old, new in zip(watch.anatomy.layers, self.targets, strict=True)
            ]
            self.last = max((number for number, change in enumerate(changed) if change), default=-1)
            for facts, target in zip(watch.anatomy.layers, self.targets, strict=True):
                tensors, record = self._layer(facts, target)
                results.append(tensors)
                records.append(record)
                if progress:
                    progress(facts.index + 1, len(self.targets), "layers converted")
        return results, records

    def _layer(self, facts, target):
        layer, number = layer_of(self.model, facts), facts.index
        if target.kv_heads == facts.kv_heads:
            with self.streams.layer(number):
                for place in range(len(self.sequences)) if number < self.last else ():
                    self.streams.base_step(number, place)
                    self._pass(number, place)
            return pack(layer), {}
        earlier = self.known(number)
        weight, known = earlier[0].pop(MLP, None) if earlier else None, earlier is not None
        with self.streams.layer(number):
            work, new, record = self._attention(number, layer, target, earlier or self.fitted(number))
            weight, mended = self._follow(number, work, new, weight, known)
        if not known:
            record = record | mended
            self.found(number, new.tensors() | ({MLP: weight} if weight is not None else {}), record)
        if weight is not None:
            self.mlps[self._mlp(number)[0]] = weight
        return pack(new), record

    def _attention(self, number: int, layer: AttentionLayer, target, known: tuple[dict, dict] | None):
        """The base's sequences through a layer, and its attention with shared heads.

        Args:
            known: tensors and record of an earlier fit.

        Returns:
            The conversion, the new layer, its record.
        """
        seen = self._look(number, layer, enough=known is not None)
        work = SharedLayer(self.settings, layer, target, seen, self.watch)
        if known is None:
            return work, *work.convert()
        tensors, record = known
        work.key_heads = record.get("key_heads", [])
        return work, layer.replace(facts=target, **tensors), record

    @property
    def _two(self) -> bool:
        """Whether anything is fitted to the converted model's activations."""
        return self.settings.sequential or "mlp" in self.settings.refit

    def _pass(self, number: int, place: int) -> None:
        """The converted stream through a layer that stays."""
        if self._two:
            self.streams.converted_step(number, place, None)
        else:
            self.streams.converted[place] = self.streams.base[place]

    def _mlp(self, number: int) -> tuple[str, torch.nn.Module] | None:
        """Name of the weight by which a layer's MLP writes, and the module; None where it is not refitted."""
        if "mlp" not in self.settings.refit:
            return None
        run, module = self.streams.run, self.watch.modules[number]
        block = run.blocks[number]
        name = projection_of(block, module, run.outputs[number])
        path = self.watch.anatomy.layers[number].path.rpartition(".")[0]
        return None if name is None else (f"{path}.{name}.weight", block.get_submodule(name))

    def _follow(self, number: int, work: SharedLayer, new: AttentionLayer, weight=None, known: bool = False):
        """The converted stream through a converted layer; its MLP's output projection is refitted on the way.

        Args:
            weight: of the MLP, where an earlier run found what it becomes (`known`).

        Returns:
            That weight [D, n], or None, and a record.
        """
        streams, mlp = self.streams, self._mlp(number)
        if not self._two:
            streams.converted = list(streams.base)
            return None, {}
        if mlp is None and number >= self.last:
            return None, {}

        def step(place: int) -> None:
            def heads(call: Call) -> torch.Tensor:
                if not self.settings.sequential:  # else it has met it
                    work.meet(place, self._kept(number, call))
                return work.heads(new, place)

            streams.converted_step(number, place, heads)

        left = {"mlp": "left as it is"} if "mlp" in self.settings.refit else {}
        with streams.output(number, new.o.flatten(1)):
            if mlp is None:
                for place in range(len(self.sequences)):
                    step(place)
                return None, left
            writer = MLPOutput(mlp[1], streams.base, streams.converted, step)
            if known:
                writer.follow(weight)
                return weight, {}
            return writer.mend(list(self.settings.ridges)) or (None, left)

    def _kept(self, number: int, call: Call) -> Call:
        """Of what a layer's attention is given in the converted model, what is used again."""
        if self.watch.anatomy.layers[number].qk_norm is None:
            call.query = call.key = None  # of the old weights: only what a norm keeps
        return call

    def _look(self, number: int, layer: AttentionLayer, enough: bool) -> Seen:
        seen, module = Seen(), self.watch.modules[number]
        for place in range(len(self.sequences)):
            state = self.streams.base[place][0]
            seen.loud.append(state.float().square().mean(-1).sqrt())
            seen.base.append(call := self.streams.base_step(number, place))
            own = self._kept(number, self.streams.inputs(number, place)) if self.settings.sequential else call
            seen.x.append(with_ones(own.x, layer.q_bias is not None))
            seen.calls.append(own)
            if enough:
                continue
            length = len(own.x)
            first, stride = 1 + place % self.settings.stride, self.settings.stride
            rows = torch.arange(min(first, length - 1), length, stride, device=own.x.device)
            weights = self.watch.weights(module, call.query[None], call.key[None], rows, **call.settings)[0]
            scores = Scores(call, rows, weights)
            seen.pieces.append(Piece(seen.x[-1], rows, weights, scores))
        return seen
