"""Calls of a model's decoder layers, one at a time, on the hidden states of a calibration text.

Memory holds the model, the hidden states of all sequences [samples, length, hidden] once, and the activations of one
layer for one sequence. All sequences have the same length and no padding. So a layer's other arguments (rotary angles,
mask) are recorded once and used for all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.errors import UnsupportedModelError


class StopForward(Exception):
    """Raised to end a forward pass early, once its purpose is met."""


def decoder_layers(model, anatomy: Anatomy) -> list[torch.nn.Module]:
    """The modules that contain the attention modules, one for each layer."""
    return [model.get_submodule(layer.path.rpartition(".")[0]) for layer in anatomy.layers]


class Layerwise:
    """Decoder layers that are called by their index, and the hidden states before the next layer.

    Args:
        model: in memory and in eval mode; the caller is in `no_grad`.
        anatomy: the model's anatomy.
        sequences: tokens, long [samples, length].
    """

    def __init__(self, model, anatomy: Anatomy, sequences: torch.Tensor):
        self.outputs = [model.get_submodule(f"{layer.path}.{layer.layout.o}") for layer in anatomy.layers]
        self.blocks = decoder_layers(model, anatomy)
        self.states: list[torch.Tensor] = []
        self._calls: list[tuple] = [((), {})] * len(self.blocks)
        for index, sequence in enumerate(sequences):
            self._record(model, sequence[None].to(model.device), all_layers=index == 0)

    def _record(self, model, ids: torch.Tensor, all_layers: bool) -> None:
        def hook(index: int) -> Callable:
            def before(block, args, kwargs):
                states, *others = _split(args, kwargs)
                if index == 0:
                    self.states.append(states.detach().clone())
                if not all_layers:
                    raise StopForward
                self._calls[index] = tuple(others)

            return before

        handles = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(self.blocks)]
        try:
            with ended(self.blocks[-1]):
                model(input_ids=ids, use_cache=False)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def widen(self) -> None:
        """Convert the states and the recorded arguments to float32 or wider. The caller must widen the layers."""
        self.states = [_wide(state) for state in self.states]
        self._calls = [_wide(call) for call in self._calls]

    def call(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """The output of a layer for the hidden states of one sequence, both [1, length, hidden]."""
        args, kwargs = self._calls[layer]
        out = self.blocks[layer](state, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def heads(self, layer: int) -> Iterator[torch.Tensor]:
        """The input of a layer's output projection for each sequence: [length, heads * head_dim]."""
        for state in self.states:
            inputs: list[torch.Tensor] = []

            def before(_, args, inputs=inputs):
                inputs.append(args[0])
                raise StopForward  # the MLP is not needed

            handle = self.outputs[layer].register_forward_pre_hook(before)
            try:
                self.call(layer, state)
            except StopForward:
                pass
            finally:
                handle.remove()
            if not inputs:
                raise UnsupportedModelError(
                    f"layer {layer}'s output projection was not called", where=type(self).__name__
                )
            yield inputs[0].flatten(0, -2)

    def advance(self, layer: int) -> None:
        """Replace the hidden states by the outputs of a layer."""
        for sample, state in enumerate(self.states):
            self.states[sample] = self.call(layer, state)


def _split(args: tuple, kwargs: dict) -> tuple:
    """Split the arguments of a decoder layer's call into the hidden states and the others."""
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return args[0] if args else kwargs["hidden_states"], args[1:], others


def _wide(value):
    """The same structure with floating-point tensors in float32 or wider."""
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    if isinstance(value, dict):
        return {name: _wide(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value


@contextmanager
def ended(block) -> Iterator[None]:
    """End a forward pass inside the context after this block, so that the model's output layer is not computed."""

    def after(*_):
        raise StopForward

    hook = block.register_forward_hook(after)
    try:
        yield
    except StopForward:
        pass
    finally:
        hook.remove()


def each_layer(blocks: list, answer: Callable[[], torch.Tensor]) -> Iterator[tuple[int, Callable[[], float]]]:
    """Yield for each layer its index and a function that measures the loss from the present change of this layer.

    The layers before it are not computed again.

    Args:
        answer: returns the log-probabilities [rows, vocabulary] of one text. The loss is the KL, in nats, from those
            of the unchanged model to those at the time of the call.
    """
    with recorded(blocks) as outputs:
        base = answer()
    for layer in range(len(blocks)):
        with replayed(blocks[:layer], outputs):
            yield layer, lambda: kl(base, answer())


def kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """KL(base || other) in nats, mean over the rows of two tables of log-probabilities [rows, vocabulary]."""
    return float((base.exp() * (base - other)).sum(-1).mean())


@contextmanager
def recorded(blocks: list) -> Iterator[dict]:
    """Record the output of each block in a forward pass inside the context: block -> output."""
    outputs: dict = {}
    hooks = [block.register_forward_hook(lambda block, _, output: outputs.update({block: output})) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_calls(blocks: list) -> Iterator[dict]:
    """Record the call of each block in a forward pass inside the context: block -> (hidden states, args, kwargs)."""
    calls: dict = {}

    def before(block, args, kwargs):
        calls[block] = _split(args, kwargs)

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed(blocks: list, outputs: dict) -> Iterator[None]:
    """Let these blocks return their recorded outputs and compute nothing."""
    before = [(block, block.__dict__.get("forward")) for block in blocks]  # accelerate sets its own forward
    try:
        for block in blocks:
            block.forward = lambda *_, output=outputs[block], **__: output
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward
