"""KV heads shared in closed form, layer after layer, on a calibration text: `closed_form` and `score_fit` put to work.

In a layer, with the base's attention as the goal: shared keys (complex PCA), queries and keys refitted in turn to the
base's scores, shared values (low rank), values and output projection refitted to what the base's attention wrote. Then
the converted model's own states go through the layer, and the MLP's output projection is refitted to bring them back
to the base's. Every sixth sequence is held back: it chooses ridges and stops the solvers.

Memory beyond the model: `closed_form.cost`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..engines import refuse_non_finite, write_layers
from ..layers import AttentionLayer, pack, unpack
from ..merging import permute_kv_heads
from ..operation import Context
from ..score_fit import Piece
from .layer_files import LayerFiles
from .layer_seen import Scores, Seen, Settings
from .mlp_output import MLPOutput, projection_of
from .sequences import calibration_pieces
from .shared_layer import SharedLayer
from .statistics import with_ones
from .two_streams import Call, TwoStreams
from .watching import Watched, watched

MLP = "mlp"  # the MLP's output weight among the tensors of a layer that are kept


def share_kv_heads(
    model, context: Context, text: tuple[str, int, int], settings: Settings, orders: list[Callable] | None = None
) -> dict:
    """Convert a loaded model, in place, to the KV heads that `context.change` plans.

    Args:
        text: source, length and number of calibration pieces.
        orders: for each layer what gives the order of its KV heads, to be brought about first; None: they stay.

    Returns:
        A record of each layer, by its path.
    """
    what = "method: closed_form needs the tokenizer, for its calibration text"
    tokenizer = context.tokenizer_for(what, "gqa", "; or method: mean")
    before, after = context.before, context.change.after
    sequences = calibration_pieces(model, tokenizer, *text, context.folder, context.progress)
    layers = [_layer_of(model, facts) for facts in before.layers]
    records: list[dict] = [{} for _ in layers]
    if orders:
        records = [{"kv_head_order": order(layer)} for layer, order in zip(layers, orders, strict=True)]
        moved = [
            permute_kv_heads(layer, record["kv_head_order"]) for layer, record in zip(layers, records, strict=True)
        ]
        write_layers(model, before, before, [pack(layer) for layer in moved])
    counts = [layer.kv_heads for layer in after.layers]
    files = LayerFiles(context.folder, "gqa", [settings, counts, records, sequences.tolist()])
    try:
        run = Sharing(model, after.layers, sequences, settings, files.load, files.save)
        results, found = run.layers(context.progress)
        for tensors, layer in zip(results, after.layers, strict=True):
            refuse_non_finite(tensors, layer.path)
        refuse_non_finite(run.mlps, "model")
    except BaseException:
        if orders:
            write_layers(model, before, before, [pack(layer) for layer in layers])
        raise
    write_layers(model, before, after, results)
    for name, weight in run.mlps.items():
        old = model.get_parameter(name).data
        old.copy_(weight if weight.shape == old.shape else weight.T)
    both = zip(before.layers, records, found, strict=True)
    return {layer.path: record | fitted for layer, record, fitted in both if fitted}


def _layer_of(model, facts) -> AttentionLayer:
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
    """

    def __init__(self, model, targets, sequences, settings: Settings, known=None, found=None):
        self.model, self.targets, self.sequences, self.settings = model, targets, sequences, settings
        self.known: Callable = known or (lambda number: None)
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
        layer = _layer_of(self.model, facts)
        number, places = facts.index, range(len(self.sequences))
        if target.kv_heads == facts.kv_heads:
            with self.streams.layer(number):
                for place in places if number < self.last else ():
                    self.streams.base_step(number, place)
                    self._pass(number, place)
            return pack(layer), {}
        earlier = self.known(number)
        with self.streams.layer(number):
            seen = self._look(number, layer, enough=earlier is not None)
            work = SharedLayer(self.settings, layer, target, seen, self.watch)
            if earlier is None:
                new, record = work.convert()
                weight, mended = self._follow(number, work, new)
                record |= mended
                self.found(number, new.tensors() | ({MLP: weight} if weight is not None else {}), record)
            else:
                (tensors, record), weight = earlier, earlier[0].pop(MLP, None)
                new = layer.replace(facts=target, **tensors)
                work.key_heads = record.get("key_heads", [])
                self._follow(number, work, new, weight, known=True)
        if weight is not None:
            self.mlps[self._mlp(number)[0]] = weight
        return pack(new), record

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
        """Name of the weight by which a layer's MLP writes, and the module."""
        run, module = self.streams.run, self.watch.modules[number]
        block = run.blocks[number]
        name = projection_of(block, module, run.outputs[number])
        path = self.watch.anatomy.layers[number].path.rpartition(".")[0]
        return None if name is None else (f"{path}.{name}.weight", block.get_submodule(name))

    def _follow(self, number: int, work: SharedLayer, new: AttentionLayer, weight=None, known: bool = False):
        """The converted stream through a converted layer; the MLP's output projection is refitted on the way.

        Args:
            weight: of the MLP, where an earlier run found what it becomes (`known`).

        Returns:
            That weight [D, n], or None, and a record.
        """
        streams, places = self.streams, range(len(self.sequences))
        mlp = self._mlp(number) if "mlp" in self.settings.refit else None
        if not self._two:
            streams.converted = list(streams.base)
            return None, {}
        if mlp is None and number >= self.last:
            return None, {}

        def step(place: int) -> None:
            if not self.settings.sequential:
                work.meet(place, self._inputs(number, place))
            streams.converted_step(number, place, work.heads(new, place))

        with streams.output(number, new.o.flatten(1)):
            if mlp is None:
                for place in places:
                    step(place)
                return None, {}
            writer = MLPOutput(mlp[1], streams.base, streams.converted, step)
            if known:
                writer.follow(weight)
                return weight, {}
            return writer.mend(list(self.settings.ridges)) or (None, {})

    def _inputs(self, number: int, place: int) -> Call:
        """What a layer's attention is given in the converted model."""
        call = self.streams.inputs(number, place)
        if self.watch.anatomy.layers[number].qk_norm is None:
            call.query = call.key = None  # of the old weights: only what a norm keeps is used again
        return call

    def _look(self, number: int, layer: AttentionLayer, enough: bool) -> Seen:
        seen, module = Seen(), self.watch.modules[number]
        for place in range(len(self.sequences)):
            state = self.streams.base[place][0]
            seen.loud.append(state.float().square().mean(-1).sqrt())
            seen.base.append(call := self.streams.base_step(number, place))
            own = self._inputs(number, place) if self.settings.sequential else call
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
