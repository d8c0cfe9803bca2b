"""KV heads shared in closed form, layer after layer, on a calibration text: `closed_form` and `score_fit` put to work.

In a layer, with the base's attention as the goal: shared keys (complex PCA), queries and keys refitted in turn to the
base's scores, shared values (low rank), values and output projection refitted to what the base's attention wrote. Then
the converted model's own states go through the layer, and the MLP's output projection is refitted to bring them back
to the base's. Every sixth sequence is held back: it chooses ridges and stops the solvers; the last fits of both output
projections then count it, too.

Memory beyond the model: `closed_form_cost.Calibration`.

A calibration text put through a model twice, layer by layer: as the base is, and as the model will be.

Later layers of the converted model meet what the earlier ones really give, and are fitted to what the base did on the
base's own activations: errors are mended, not passed on. (GPTQ and SparseGPT quantise and prune in this order.)

The new layer is never built: its heads' outputs are given to the old module in place of its own, so that no shape in
the model changes while it is measured. Memory: `closed_form_cost.Calibration`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from surgery.architecture.edit import refuse_non_finite
from surgery.architecture.weights import AttentionLayer, pack, unpack
from surgery.calibration.attention_hook import AttentionHook, hook_attention
from surgery.calibration.layerwise import Layerwise, StopForward
from surgery.calibration.moments import with_ones
from surgery.machine.parallel import OrderedSection, check_cancelled, parallel_map
from surgery.operations.gqa.cost import layers_at_a_time
from surgery.operations.gqa.fit_mlp import MLPOutput, projection_of
from surgery.operations.gqa.fit_scores import Piece
from surgery.operations.gqa.layer import SharedLayer
from surgery.operations.gqa.layer_inputs import AttentionCall, FitSettings, LayerInputs, Scores
from surgery.runtime.surgery_attention import surgery_attention

MLP = "mlp"  # the MLP's output weight among the tensors of a layer that are kept


def layer_of(model, facts) -> AttentionLayer:
    """A copy of a layer's weights."""
    module = model.get_submodule(facts.path)
    tensors = {name: module.get_parameter(name).detach() for name in facts.tensor_names}
    refuse_non_finite(tensors, facts.path)
    return unpack(facts, tensors).copy()


@dataclass
class Attended:
    """A layer whose attention is converted, or is to be.

    Attributes:
        number: of the layer.
        behind: the base's hidden states behind it, one [1, T, D] a sequence.
        work: its conversion; None where it stays as it is.
        found: the layer with its new attention, and a record.
        known: whether an earlier run had finished it.
        mlp: what that run found for its MLP's output projection.
    """

    number: int
    behind: list[torch.Tensor]
    work: SharedLayer | None = None
    found: tuple[AttentionLayer, dict] | None = None
    known: bool = False
    mlp: torch.Tensor | None = None


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

    def __init__(self, model, targets, sequences, settings: FitSettings, known=None, found=None, fitted=None):
        self.model, self.targets, self.sequences, self.settings = model, targets, sequences, settings
        self.known: Callable = known or (lambda number: None)
        self.fitted: Callable = fitted or (lambda number: None)
        self.found: Callable = found or (lambda number, tensors, record: None)
        self.streams = TwoStreams(model, sequences)
        self.looks, self.ends = (
            OrderedSection(),
            OrderedSection(),
        )  # the base's text goes through the layers in order, and the converted
        self.alone: AbstractContextManager = nullcontext()  # held while a layer is prepared and looked at
        self.mlps: dict[str, torch.Tensor] = {}

    def layers(self, progress=None) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
        """Packed tensors and a record of each layer; what the MLPs become is in `mlps`, by parameter name."""
        with hook_attention(self.model, self.streams.attention) as watch, torch.no_grad():
            self._begin(watch)
            found = self._each_layer(self._layer, "layers converted", progress)
        return [tensors for tensors, _ in found], [record for _, record in found]

    def _begin(self, watch: AttentionHook) -> None:
        self.watch = watch
        self.streams.begin(watch)
        pairs = zip(watch.anatomy.layers, self.targets, strict=True)
        changed = [old.kv_heads != new.kv_heads for old, new in pairs]
        self.last = max((number for number, change in enumerate(changed) if change), default=-1)

    def _each_layer(self, work: Callable, label: str, progress) -> list:
        """What `work` gives of each layer, by what it is and is to be.

        Layers that are fitted to the base's inputs know them ahead: a CPU works on some side by side.
        """
        found, device = [], self.model.device
        at_once = 1 if self.settings.sequential else layers_at_a_time(self.watch.anatomy)
        for each in parallel_map(work, self.watch.anatomy.layers, self.targets, device=device, at_once=at_once):
            found.append(each)
            if progress:
                progress(len(found), len(self.targets), label)
        return found

    def _layer(self, facts, target) -> tuple[dict[str, torch.Tensor], dict]:
        layer = self._attended(facts, target)
        with self.ends.of(layer.number):
            return self._finish(layer)

    def _attended(self, facts, target) -> Attended:
        with self.looks.of(facts.index), self.alone:
            layer = self._look_at(facts, target)
        if layer.found is None:
            layer.found = layer.work.convert()
        return layer

    def _look_at(self, facts, target) -> Attended:
        """Put the base's sequences through a layer: all that its conversion needs, or what was found of it before."""
        layer, number = layer_of(self.model, facts), facts.index
        if target.kv_heads == facts.kv_heads:
            with self.streams.layer(number):
                for place in range(len(self.sequences)) if number < self.last else ():
                    self.streams.base_step(number, place)
            return Attended(number, list(self.streams.base), found=(layer, {}))
        known = self.known(number)
        mlp = known[0].pop(MLP, None) if known else None
        fitted = known or self.fitted(number)
        with self.streams.layer(number):
            seen = self._look(number, layer, enough=fitted is not None)
        work = SharedLayer(self.settings, layer, target, seen, self.watch)
        found = None
        if fitted is not None:
            work.key_heads = fitted[1].get("key_heads", [])
            found = layer.replace(anatomy=target, **fitted[0]), fitted[1]
        return Attended(number, list(self.streams.base), work, found, known is not None, mlp)

    def _finish(self, layer: Attended) -> tuple[dict[str, torch.Tensor], dict]:
        """The converted model's sequences through a layer, its MLP mended: packed tensors and a record."""
        number, (new, record) = layer.number, layer.found
        with self.streams.layer(number):
            if layer.work is None:
                for place in range(len(self.sequences)) if number < self.last else ():
                    self._pass(layer, place)
                return pack(new), {}
            weight, mended = self._follow(layer)
        if not layer.known:
            record = record | mended
            self.found(number, new.tensors() | ({MLP: weight} if weight is not None else {}), record)
        if weight is not None:
            self.mlps[self._mlp(number)[0]] = weight
        return pack(new), record

    @property
    def _two(self) -> bool:
        """Whether anything is fitted to the converted model's activations."""
        return self.settings.sequential or "mlp" in self.settings.refit

    def _pass(self, layer: Attended, place: int) -> None:
        """The converted stream through a layer that stays."""
        if self._two:
            self.streams.converted_step(layer.number, place, None)
        else:
            self.streams.converted[place] = layer.behind[place]

    def _mlp(self, number: int) -> tuple[str, torch.nn.Module] | None:
        """Name of the weight by which a layer's MLP writes, and the module; None where it is not refitted."""
        if "mlp" not in self.settings.refit:
            return None
        run, module = self.streams.run, self.watch.modules[number]
        block = run.blocks[number]
        name = projection_of(block, module, run.outputs[number])
        path = self.watch.anatomy.layers[number].path.rpartition(".")[0]
        return None if name is None else (f"{path}.{name}.weight", block.get_submodule(name))

    def _follow(self, layer: Attended) -> tuple[torch.Tensor | None, dict]:
        """The converted stream through a converted layer; its MLP's output projection is refitted on the way.

        Returns:
            That weight [D, n], or None, and a record.
        """
        number, work, (new, _), streams = layer.number, layer.work, layer.found, self.streams
        mlp = self._mlp(number)
        if not self._two:
            streams.converted = list(layer.behind)
            return None, {}
        if mlp is None and number >= self.last:
            return None, {}

        def step(place: int) -> None:
            def heads(call: AttentionCall) -> torch.Tensor:
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
            writer = MLPOutput(mlp[1], layer.behind, streams.converted, step)
            if layer.known:
                writer.follow(layer.mlp)
                return layer.mlp, {}
            return writer.mend(list(self.settings.mlp_ridges)) or (None, left)

    def _kept(self, number: int, call: AttentionCall) -> AttentionCall:
        """Of what a layer's attention is given in the converted model, what is used again."""
        if self.watch.anatomy.layers[number].qk_norm is None:
            call.query = call.key = None  # of the old weights: only what a norm keeps
        return call

    def _look(self, number: int, layer: AttentionLayer, enough: bool) -> LayerInputs:
        seen, module = LayerInputs(), self.watch.modules[number]
        for place in range(len(self.sequences)):
            state = self.streams.base[place][0]
            seen.rms.append(state.float().square().mean(-1).sqrt())
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


class _Now(threading.local):
    """What a thread is at: layers may be worked on side by side.

    Attributes:
        heads: gives what stands in place of the module's own heads, by the call.
        stop: the call is cut short once its queries and keys are known.
    """

    def __init__(self):
        self.heads: Callable[[AttentionCall], torch.Tensor] | None = None
        self.stop = False
        self.call = AttentionCall(torch.empty(0))


class TwoStreams:
    """Hidden states of the base and of the converted model before the next layer, one [1, T, D] a sequence.

    Args:
        model: in memory; its attention calls must go to `attention` (`watching.watched`).
        sequences: tokens, long [samples, T].
    """

    def __init__(self, model, sequences: torch.Tensor):
        self.model, self.sequences = model, sequences
        self._now = _Now()

    def begin(self, watch: AttentionHook) -> None:
        """Record the first layer's inputs, and what each layer is given beside them."""
        self.watch = watch
        self.run = Layerwise(self.model, watch.anatomy, sequences=self.sequences)
        self.run.widen()
        self.base, self.converted = self.run.states, list(self.run.states)

    def attention(self, module, query, key, value, mask, **settings):
        """In place of the model's attention function."""
        self._now.call.query, self._now.call.key, self._now.call.settings = query[0], key[0], settings
        if self._now.heads is not None:
            return self._now.heads(self._now.call)[None].to(query), None
        if self._now.stop:
            raise StopForward
        return surgery_attention(module, query, key, value, mask, **settings)

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """The layer's weights in float32 for as long as it is measured: half precision would blur what is fitted."""
        block = self.run.blocks[number]
        before = [(parameter, parameter.dtype) for parameter in [*block.parameters(), *block.buffers()]]
        try:
            for parameter, dtype in before:
                if dtype.is_floating_point:
                    parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
            yield
        finally:
            for parameter, dtype in before:
                parameter.data = parameter.data.to(dtype)

    def base_step(self, number: int, place: int) -> AttentionCall:
        """Put a sequence through the base's layer; what its attention saw and gave."""
        projection = self.run.outputs[number]

        def after(_, __, out):
            bias = getattr(projection, "bias", None)
            self._now.call.output = (out if bias is None else out - bias)[0]

        hook = projection.register_forward_hook(after)
        try:
            with self._watched(number):
                self.base[place] = self.run.call(number, self.base[place])
        finally:
            hook.remove()
        return self._now.call

    def inputs(self, number: int, place: int) -> AttentionCall:
        """What the layer's attention is given in the converted model (its keys and queries: of the old weights)."""
        self._now.stop = True
        try:
            with self._watched(number):
                self.run.call(number, self.converted[place])
        except StopForward:
            pass
        finally:
            self._now.stop = False
        return self._now.call

    def converted_step(self, number: int, place: int, heads: Callable[[AttentionCall], torch.Tensor] | None) -> None:
        """Put a sequence through the converted layer.

        Args:
            heads: what its heads give, [T, H, d], by what its attention is given; None: the layer is the base's.
        """
        self._now.heads = heads
        try:
            with self._watched(number):
                self.converted[place] = self.run.call(number, self.converted[place])
        finally:
            self._now.heads = None

    @contextmanager
    def output(self, number: int, weight: torch.Tensor) -> Iterator[None]:
        """The layer with another output projection [D, H d]."""
        own = self.run.outputs[number].weight
        before = own.detach().clone()
        try:
            own.copy_(weight.T if self.watch.anatomy.layers[number].layout.conv1d else weight)
            yield
        finally:
            own.copy_(before)

    @contextmanager
    def _watched(self, number: int) -> Iterator[None]:
        check_cancelled()
        self._now.call = AttentionCall(torch.empty(0))

        def before(_, args, kwargs):
            self._now.call.x = (args[0] if args else kwargs["hidden_states"])[0]

        hook = self.watch.modules[number].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
