"""KV heads shared in closed form, layer after layer, on a calibration text: `closed_form` and `score_fit` put to work.

In a layer, with the converted model's input x and the base's attention as the goal: shared keys (complex PCA), queries
and keys refitted in turn to the base's scores, shared values (low rank), output projection refitted to what the base's
attention wrote. Every sixth sequence is held back: it chooses ridges and stops the solvers.

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
from .sequences import calibration_pieces
from .shared_layer import SharedLayer
from .statistics import with_ones
from .two_streams import TwoStreams
from .watching import Watched, watched


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
    sequences = calibration_pieces(model, tokenizer, *text)
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
    except BaseException:
        if orders:
            write_layers(model, before, before, [pack(layer) for layer in layers])
        raise
    write_layers(model, before, after, results)
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

    def layers(self, progress=None) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
        """Packed tensors and a record of each layer."""
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
                    self._follow(number, place, None)
            return pack(layer), {}
        earlier = self.known(number)
        with self.streams.layer(number):
            seen = self._look(number, layer, enough=earlier is not None)
            work = SharedLayer(self.settings, layer, target, seen, self.watch)
            if earlier is None:
                new, record = work.convert()
                self.found(number, new.tensors(), record)
            else:
                new, record = layer.replace(facts=target, **earlier[0]), earlier[1]
                work.key_heads = record.get("key_heads", [])
            with self.streams.output(number, new.o.flatten(1)):
                for place in places if number < self.last else ():
                    self._follow(number, place, work.heads(new, place))
        return pack(new), record

    def _follow(self, number: int, place: int, heads: torch.Tensor | None) -> None:
        if self.settings.sequential:
            self.streams.converted_step(number, place, heads)
        else:
            self.streams.converted[place] = self.streams.base[place]

    def _look(self, number: int, layer: AttentionLayer, enough: bool) -> Seen:
        seen, module = Seen(), self.watch.modules[number]
        for place in range(len(self.sequences)):
            state = self.streams.base[place][0]
            seen.loud.append(state.float().square().mean(-1).sqrt())
            seen.base.append(call := self.streams.base_step(number, place))
            own = self.streams.inputs(number, place) if self.settings.sequential else call
            seen.x.append(with_ones(own.x, layer.q_bias is not None))
            if own is not call and self.watch.anatomy.layers[number].qk_norm is None:
                own.query = own.key = None  # of the old weights: only what a norm keeps is used again
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
