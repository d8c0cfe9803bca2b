"""A calibration text put through a model twice, layer by layer: as the base is, and as the model will be.

Later layers of the converted model meet what the earlier ones really give, and are fitted to what the base did on the
base's own activations: errors are mended, not passed on. (GPTQ and SparseGPT quantise and prune in this order.)

The new layer is never built: its heads' outputs are given to the old module in place of its own, so that no shape in
the model changes while it is measured. Memory: `closed_form_cost.Calibration`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from surgery.calibration.attention_hook import Watched
from surgery.calibration.layerwise import Enough, Layerwise
from surgery.machine.parallel import go_on
from surgery.runtime.surgery_attention import surgery_attention


@dataclass
class Call:
    """What one attention call of one sequence was given and gave.

    Attributes:
        x: [T, D], the attention module's input.
        query [H, T, d], key [G, T, d]: after norms and RoPE.
        settings: the other arguments of the call (scaling, softcap, s_aux ...).
        output: [T, D], what the output projection gave, without its bias; None if the call was cut short.
    """

    x: torch.Tensor
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    settings: dict | None = None
    output: torch.Tensor | None = None


class _Now(threading.local):
    """What a thread is at: layers may be worked on side by side.

    Attributes:
        heads: gives what stands in place of the module's own heads, by the call.
        stop: the call is cut short once its queries and keys are known.
    """

    def __init__(self):
        self.heads: Callable[[Call], torch.Tensor] | None = None
        self.stop = False
        self.call = Call(torch.empty(0))


class TwoStreams:
    """Hidden states of the base and of the converted model before the next layer, one [1, T, D] a sequence.

    Args:
        model: in memory; its attention calls must go to `attention` (`watching.watched`).
        sequences: tokens, long [samples, T].
    """

    def __init__(self, model, sequences: torch.Tensor):
        self.model, self.sequences = model, sequences
        self._now = _Now()

    def begin(self, watch: Watched) -> None:
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
            raise Enough
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

    def base_step(self, number: int, place: int) -> Call:
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

    def inputs(self, number: int, place: int) -> Call:
        """What the layer's attention is given in the converted model (its keys and queries: of the old weights)."""
        self._now.stop = True
        try:
            with self._watched(number):
                self.run.call(number, self.converted[place])
        except Enough:
            pass
        finally:
            self._now.stop = False
        return self._now.call

    def converted_step(self, number: int, place: int, heads: Callable[[Call], torch.Tensor] | None) -> None:
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
        go_on()
        self._now.call = Call(torch.empty(0))

        def before(_, args, kwargs):
            self._now.call.x = (args[0] if args else kwargs["hidden_states"])[0]

        hook = self.watch.modules[number].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
