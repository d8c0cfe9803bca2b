"""The layer-by-layer conversion: a calibration text goes through the base and through the converted model.

In each layer the base's attention is the target. A method (`layer.FittedLayer`) makes the new attention of the old
weights, and fits it to the base's scores and outputs. Then the converted model's own states go through the layer.
`fit_mlp.py` refits the MLP's output projection, which brings these states back to the base's. Every sixth sequence is
for validation: it chooses ridges and stops the solvers. The last fits of both output projections include it.

A later layer of the converted model gets the real outputs of the earlier converted layers, and its MLP is fitted to
the base's states. So errors are corrected and not passed on. (GPTQ and SparseGPT quantise and prune in this order.)

The new layer is never built. Instead, the outputs of the new heads replace those of the old module's heads, so that no
shape in the model changes during the measurement. Memory in addition to the model: `cost.Calibration.memory`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from surgery.architecture.edit import refuse_non_finite
from surgery.architecture.layer import LayerAnatomy
from surgery.architecture.weights import AttentionLayer, pack, unpack
from surgery.calibration.attention_hook import AttentionHook, hook_attention
from surgery.calibration.closed_form.cost import layers_at_a_time
from surgery.calibration.closed_form.fit_mlp import MLPOutput, projection_of
from surgery.calibration.closed_form.fit_scores import ScoreSample
from surgery.calibration.closed_form.layer import FittedLayer
from surgery.calibration.closed_form.layer_inputs import AttentionCall, BaseScores, FitSettings, LayerInputs
from surgery.calibration.layerwise import Layerwise, StopForward
from surgery.calibration.moments import with_ones
from surgery.machine.offload import bring
from surgery.machine.parallel import OrderedSection, check_cancelled, parallel_map
from surgery.machine.progress import begin
from surgery.runtime.surgery_attention import surgery_attention

MLP = "mlp"  # name of the MLP's output weight among the saved tensors of a layer


def layer_of(model, anatomy) -> AttentionLayer:
    """A copy of a layer's weights.

    Args:
        anatomy: the layer's anatomy.

    Raises:
        SurgeryError: a weight is not finite.
    """
    module = model.get_submodule(anatomy.path)
    tensors = {name: module.get_parameter(name).detach() for name in anatomy.tensor_names}
    refuse_non_finite(tensors, anatomy.path)
    return unpack(anatomy, tensors).copy()


def write_mlps(model, weights: dict[str, torch.Tensor]) -> None:
    """Write refitted output projections of MLPs, by parameter name; GPT-2 stores them transposed."""
    for name, weight in weights.items():
        old = model.get_parameter(name).data
        old.copy_(weight if weight.shape == old.shape else weight.T)


@dataclass
class LayerProgress:
    """The state of a layer during the conversion.

    Attributes:
        index: index of the layer.
        base_states: the base's hidden states after the layer, one [1, T, D] for each sequence.
        conversion: None if the layer stays unchanged.
        result: the layer with its new attention, and a record; None until it is converted.
        finished: whether an earlier run had finished the layer.
        mlp_weight: the weight of the MLP's output projection [D, n] from that run; None if it was not refitted.
    """

    index: int
    base_states: list[torch.Tensor]
    conversion: FittedLayer | None = None
    result: tuple[Any, dict] | None = None
    finished: bool = False
    mlp_weight: torch.Tensor | None = None


class LayerwiseFit:
    """The conversion of one model; `layers` returns the new layers in order.

    A method is a subclass that says which layers it changes (`changes`) and how one is converted (`conversion`).

    Args:
        model: in memory; it is not changed.
        targets: anatomy of each layer after the conversion.
        sequences: tokens, long [samples, T], of one length, without padding.
        load_layer: returns, for a layer's index, what an earlier run saved (tensors by name, and a record), or None.
        save_layer: called with the index, the tensors and the record of each layer that this run converts.
        load_attention: as `load_layer`, for attention alone; the MLP must still be fitted.

    Attributes:
        mlps: refitted weights of MLPs, by parameter name, on the CPU and in the dtype of the model.
    """

    def __init__(
        self, model, targets, sequences, settings: FitSettings, load_layer=None, save_layer=None, load_attention=None
    ):
        self.model, self.targets, self.sequences, self.settings = model, targets, sequences, settings
        self.load_layer: Callable = load_layer or (lambda index: None)
        self.load_attention: Callable = load_attention or (lambda index: None)
        self.save_layer: Callable = save_layer or (lambda index, tensors, record: None)
        self.states = PairedStates(model, sequences)
        # The states of each model go through the layers in order, even if layers are fitted in parallel.
        self.base_order, self.converted_order = OrderedSection(), OrderedSection()
        self.exclusive: AbstractContextManager = nullcontext()  # entered while the base runs through a layer
        self.mlps: dict[str, torch.Tensor] = {}

    label = "fitting layers"  # for progress

    def changes(self, old: LayerAnatomy, new: LayerAnatomy) -> bool:
        """Whether the layer `old` is converted, to `new`."""
        raise NotImplementedError

    def conversion(self, layer: AttentionLayer, target: LayerAnatomy, inputs: LayerInputs) -> FittedLayer:
        """The conversion of a layer, from its old weights, its new anatomy, and its inputs."""
        raise NotImplementedError

    def layers(self, progress=None) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
        """Packed tensors and a record of each layer, in order. Afterwards `mlps` holds the new weights of MLPs.

        Raises:
            SurgeryError: an old or a new weight is not finite.
        """
        with hook_attention(self.model, self.states.attention) as hook, torch.no_grad():
            self._begin(hook)
            results = self._map_layers(self._layer, self.label, progress)
        for (tensors, _), target in zip(results, self.targets, strict=True):
            refuse_non_finite(tensors, target.path)
        refuse_non_finite(self.mlps, "model")
        return [tensors for tensors, _ in results], [record for _, record in results]

    def _begin(self, hook: AttentionHook) -> None:
        self.hook = hook
        self.states.begin(hook)
        pairs = zip(hook.anatomy.layers, self.targets, strict=True)
        changed = [self.changes(old, new) for old, new in pairs]
        self.last = max((index for index, changes in enumerate(changed) if changes), default=-1)

    def _map_layers(self, work: Callable, label: str, progress) -> list:
        """The results of `work(anatomy before, anatomy after)` for all layers, in order.

        Layers that are fitted to the base's inputs do not wait for converted layers: a CPU fits some in parallel.
        """
        results, device = [], self.model.device
        begin(progress, label, len(self.targets))
        at_once = 1 if self.settings.sequential else layers_at_a_time(self.hook.anatomy)
        for result in parallel_map(work, self.hook.anatomy.layers, self.targets, device=device, at_once=at_once):
            results.append(result)
            if progress:
                progress(len(results), len(self.targets), label)
        return results

    def _layer(self, anatomy, target) -> tuple[dict[str, torch.Tensor], dict]:
        progress = self._convert_attention(anatomy, target)
        with self.converted_order.of(progress.index):
            return self._finish(progress)

    def _convert_attention(self, anatomy, target) -> LayerProgress:
        with self.base_order.of(anatomy.index), self.exclusive:
            progress = self._run_base(anatomy, target)
        if progress.result is None:
            progress.result = progress.conversion.convert()
        return progress

    def _run_base(self, anatomy, target) -> LayerProgress:
        """Run a layer on the base's states. Collect the data for its conversion, or load what an earlier run saved."""
        layer, layer_index = layer_of(self.model, anatomy), anatomy.index
        if not self.changes(anatomy, target):
            with self.states.layer(layer_index):
                for index in range(len(self.sequences)) if layer_index < self.last else ():
                    self.states.base_step(layer_index, index)
            return LayerProgress(layer_index, list(self.states.base), result=(layer, {}))
        saved = self.load_layer(layer_index)
        mlp_weight = saved[0].pop(MLP, None) if saved else None
        attention = saved or self.load_attention(layer_index)
        with self.states.layer(layer_index):
            inputs = self._layer_inputs(layer_index, layer, inputs_only=attention is not None)
        conversion = self.conversion(layer, target, inputs)
        result = None if attention is None else (conversion.restored(*attention), attention[1])
        return LayerProgress(layer_index, list(self.states.base), conversion, result, saved is not None, mlp_weight)

    def _finish(self, progress: LayerProgress) -> tuple[dict[str, torch.Tensor], dict]:
        """Run a layer on the converted model's states and refit its MLP; returns packed tensors and a record."""
        layer_index, (new, record) = progress.index, progress.result
        with self.states.layer(layer_index):
            if progress.conversion is None:
                for index in range(len(self.sequences)) if layer_index < self.last else ():
                    self._run_unchanged(progress, index)
                return pack(new), {}
            weight, mlp_record = self._run_converted(progress)
        if not progress.finished:
            record = record | mlp_record
            self.save_layer(layer_index, new.tensors() | ({MLP: weight} if weight is not None else {}), record)
        if weight is not None:
            name, _ = self._mlp(layer_index)
            self.mlps[name] = weight.to("cpu", self.model.get_parameter(name).dtype)
        return progress.conversion.packed(new), record

    @property
    def _needs_converted(self) -> bool:
        """Whether the converted model's activations must be computed, because something is fitted to them."""
        return self.settings.sequential or "mlp" in self.settings.refit

    def _run_unchanged(self, progress: LayerProgress, index: int) -> None:
        """Run a layer that stays unchanged on the converted model's state of one sequence."""
        if self._needs_converted:
            self.states.converted_step(progress.index, index, None)
        else:
            self.states.converted[index] = progress.base_states[index]

    def _mlp(self, layer_index: int) -> tuple[str, torch.nn.Module] | None:
        """Parameter name and module of the output projection of a layer's MLP; None where it is not refitted."""
        if "mlp" not in self.settings.refit:
            return None
        run, module = self.states.run, self.hook.modules[layer_index]
        block = run.blocks[layer_index]
        name = projection_of(block, module, run.outputs[layer_index])
        path = self.hook.anatomy.layers[layer_index].path.rpartition(".")[0]
        return None if name is None else (f"{path}.{name}.weight", block.get_submodule(name))

    def _run_converted(self, progress: LayerProgress) -> tuple[torch.Tensor | None, dict]:
        """Run a converted layer on the converted model's states, and refit its MLP's output projection.

        Returns:
            The new weight of that projection [D, n], or None, and a record.
        """
        layer_index, conversion, (new, _), states = progress.index, progress.conversion, progress.result, self.states
        mlp = self._mlp(layer_index)
        if not self._needs_converted:
            states.converted = list(progress.base_states)
            return None, {}
        if mlp is None and layer_index >= self.last:
            return None, {}

        def step(index: int) -> None:
            def heads(call: AttentionCall) -> torch.Tensor:
                if not self.settings.sequential:  # else the input is set already
                    conversion.set_input(index, self._drop_unused(layer_index, call))
                return conversion.head_outputs(new, index)

            states.converted_step(layer_index, index, heads)

        unchanged = {"mlp": "left as it is"} if "mlp" in self.settings.refit else {}
        with states.output(layer_index, new.o.flatten(1)):
            if mlp is None:
                for index in range(len(self.sequences)):
                    step(index)
                return None, unchanged
            writer = MLPOutput(mlp[1], progress.base_states, states.converted, step)
            if progress.finished:
                writer.run_with(progress.mlp_weight)
                return progress.mlp_weight, {}
            return writer.refit(list(self.settings.mlp_ridges)) or (None, unchanged)

    def _drop_unused(self, layer_index: int, call: AttentionCall) -> AttentionCall:
        """The attention call of the converted model without tensors that are not used again."""
        if self.hook.anatomy.layers[layer_index].qk_norm is None:
            call.query = call.key = None  # made by the old weights; used again only if a norm follows them
        return call

    def _layer_inputs(self, layer_index: int, layer: AttentionLayer, inputs_only: bool) -> LayerInputs:
        """Run a layer on the base's states and record its inputs; `inputs_only`: without samples to fit."""
        inputs, module = LayerInputs(), self.hook.modules[layer_index]
        device = next(self.states.run.blocks[layer_index].parameters()).device
        for index in range(len(self.sequences)):
            state = self.states.base[index][0].to(device)
            inputs.rms.append(state.float().square().mean(-1).sqrt())
            inputs.base.append(call := self.states.base_step(layer_index, index))
            converted_call = (
                self._drop_unused(layer_index, self.states.inputs(layer_index, index))
                if self.settings.sequential
                else call
            )
            inputs.x.append(with_ones(converted_call.x, layer.q_bias is not None))
            inputs.calls.append(converted_call)
            if inputs_only:
                continue
            length = len(converted_call.x)
            first, stride = 1 + index % self.settings.stride, self.settings.stride
            rows = torch.arange(min(first, length - 1), length, stride, device=converted_call.x.device)
            weights = self.hook.weights(module, call.query[None], call.key[None], rows, **call.settings)[0]
            scores = BaseScores(call, rows, weights)
            inputs.samples.append(ScoreSample(inputs.x[-1], rows, weights, scores))
        return inputs


class _ThreadState(threading.local):
    """The state of one thread, since layers may be fitted in parallel.

    Attributes:
        heads: computes, from the attention call, the outputs that replace those of the module's own heads; None: they
            are not replaced.
        stop: whether the call is stopped once its queries and keys are known.
        call: the attention call that is recorded.
    """

    def __init__(self):
        self.heads: Callable[[AttentionCall], torch.Tensor] | None = None
        self.stop = False
        self.call = AttentionCall(torch.empty(0))


class PairedStates:
    """Hidden states of the base and of the converted model before the next layer, one [1, T, D] for each sequence.

    Args:
        model: in memory; its attention calls must go to `attention` (`hook_attention`).
        sequences: tokens, long [samples, T].

    Attributes:
        base, converted: the hidden states of both.
        run: runs single layers of the model.
    """

    def __init__(self, model, sequences: torch.Tensor):
        self.model, self.sequences = model, sequences
        self._thread = _ThreadState()

    def begin(self, hook: AttentionHook) -> None:
        """Record the inputs of the first layer, and the other arguments of every layer."""
        self.hook = hook
        self.run = Layerwise(self.model, hook.anatomy, sequences=self.sequences)
        self.run.widen()
        self.base, self.converted = self.run.states, list(self.run.states)

    def attention(self, module, query, key, value, mask, **settings):
        """The attention function that replaces the model's own; it records the call."""
        self._thread.call.query, self._thread.call.key, self._thread.call.settings = query[0], key[0], settings
        if self._thread.heads is not None:
            return self._thread.heads(self._thread.call)[None].to(query), None
        if self._thread.stop:
            raise StopForward
        return surgery_attention(module, query, key, value, mask, **settings)

    @contextmanager
    def layer(self, layer_index: int) -> Iterator[None]:
        """Hold the layer's weights in float32 while it is measured: the fits need more than half precision."""
        block = self.run.blocks[layer_index]
        bring(self.model, block)
        before = [(parameter, parameter.dtype) for parameter in [*block.parameters(), *block.buffers()]]
        try:
            for parameter, dtype in before:
                if dtype.is_floating_point:
                    parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
            yield
        finally:
            for parameter, dtype in before:
                parameter.data = parameter.data.to(dtype)

    def base_step(self, layer_index: int, index: int) -> AttentionCall:
        """Run the layer on the base's state of a sequence; returns the attention call with its output."""
        projection = self.run.outputs[layer_index]

        def after(_, __, out):
            bias = getattr(projection, "bias", None)
            self._thread.call.output = (out if bias is None else out - bias)[0]

        handle = projection.register_forward_hook(after)
        try:
            with self._record_input(layer_index):
                self.base[index] = self.run.call(layer_index, self.base[index])
        finally:
            handle.remove()
        return self._thread.call

    def inputs(self, layer_index: int, index: int) -> AttentionCall:
        """The layer's attention call in the converted model, without output; queries and keys use the old weights."""
        self._thread.stop = True
        try:
            with self._record_input(layer_index):
                self.run.call(layer_index, self.converted[index])
        except StopForward:
            pass
        finally:
            self._thread.stop = False
        return self._thread.call

    def converted_step(
        self, layer_index: int, index: int, heads: Callable[[AttentionCall], torch.Tensor] | None
    ) -> None:
        """Run the converted layer on the converted model's state of a sequence.

        Args:
            heads: computes the outputs of its heads [T, H, d] from the attention call; None: the layer is the base's.
        """
        self._thread.heads = heads
        try:
            with self._record_input(layer_index):
                self.converted[index] = self.run.call(layer_index, self.converted[index])
        finally:
            self._thread.heads = None

    @contextmanager
    def output(self, layer_index: int, weight: torch.Tensor) -> Iterator[None]:
        """Give the layer another output projection [D, H d] inside the context; then restore its own."""
        own = self.run.outputs[layer_index].weight
        before = own.detach().clone()
        try:
            own.copy_(weight.T if self.hook.anatomy.layers[layer_index].layout.conv1d else weight)
            yield
        finally:
            own.copy_(before)

    @contextmanager
    def _record_input(self, layer_index: int) -> Iterator[None]:
        """Record the input of the layer's attention module in a new call of this thread."""
        check_cancelled()
        self._thread.call = AttentionCall(torch.empty(0))

        def before(_, args, kwargs):
            self._thread.call.x = (args[0] if args else kwargs["hidden_states"])[0]

        handle = self.hook.modules[layer_index].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
