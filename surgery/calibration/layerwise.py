"""A model's decoder layers called one at a time on the hidden states of a calibration text.

What is in memory: the model, the hidden states of all sequences [samples, length, hidden] once, and the activations
of one layer for one sequence. Every sequence has the same length and no padding, so that what a layer is given beside
its input (rotary angles, mask) is recorded once and serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError


class StopForward(Exception):
    """Ends a forward early: what was wanted of it is known."""


def decoder_layers(model, anatomy: Anatomy) -> list[torch.nn.Module]:
    """The modules that hold the attention modules, one a layer."""
    return [model.get_submodule(layer.path.rpartition(".")[0]) for layer in anatomy.layers]


class Layerwise:
    """Decoder layers to be called by number, and the hidden states before the next one.

    Args:
        model: in memory, in eval mode, called under `no_grad`.
        anatomy: the model's.
        sequences: tokens, long [samples, length].
    """

    def __init__(self, model, anatomy: Anatomy, sequences: torch.Tensor):
        self.outputs = [model.get_submodule(f"{layer.path}.{layer.layout.o}") for layer in anatomy.layers]
        self.blocks = decoder_layers(model, anatomy)
        self.states: list[torch.Tensor] = []
        self._calls: list[tuple] = [((), {})] * len(self.blocks)
        for number, sequence in enumerate(sequences):
            self._record(model, sequence[None].to(model.device), all_layers=number == 0)

    def _record(self, model, ids: torch.Tensor, all_layers: bool) -> None:
        def hook(number: int) -> Callable:
            def before(block, args, kwargs):
                given = args[0] if args else kwargs["hidden_states"]
                if number == 0:
                    self.states.append(given.detach().clone())
                if not all_layers:
                    raise StopForward
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                self._calls[number] = (args[1:], rest)

            return before

        hooks = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(self.blocks)]
        try:
            with ended(self.blocks[-1]):
                model(input_ids=ids, use_cache=False)
        except StopForward:
            pass
        finally:
            for each in hooks:
                each.remove()

    def widen(self) -> None:
        """States, and what goes with them, in float32 or wider from here on; the layers are the caller's to widen."""
        self.states = [_wide(state) for state in self.states]
        self._calls = [_wide(call) for call in self._calls]

    def call(self, number: int, state: torch.Tensor) -> torch.Tensor:
        """What a layer makes of the hidden states of one sequence."""
        args, kwargs = self._calls[number]
        out = self.blocks[number](state, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def heads(self, number: int) -> Iterator[torch.Tensor]:
        """What the heads of a layer give to its output projection: [length, heads * head_dim] of each sequence."""
        for state in self.states:
            seen: list[torch.Tensor] = []

            def before(_, args, seen=seen):
                seen.append(args[0])
                raise StopForward  # the MLP is not needed

            hook = self.outputs[number].register_forward_pre_hook(before)
            try:
                self.call(number, state)
            except StopForward:
                pass
            finally:
                hook.remove()
            if not seen:
                raise SurgeryError(f"layer {number}'s output projection was not called", where=type(self).__name__)
            yield seen[0].flatten(0, -2)

    def advance(self, number: int) -> None:
        """Put the hidden states through a layer."""
        for place, state in enumerate(self.states):
            self.states[place] = self.call(number, state)


def _wide(given):
    """The same structure with floating-point tensors in float32 or wider."""
    if isinstance(given, tuple):
        return tuple(map(_wide, given))
    if isinstance(given, dict):
        return {name: _wide(value) for name, value in given.items()}
    if isinstance(given, torch.Tensor) and given.is_floating_point():
        return given.to(torch.promote_types(given.dtype, torch.float32))
    return given


@contextmanager
def ended(block) -> Iterator[None]:
    """A forward that runs inside ends after this block: the model's head is not computed."""

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
    """(layer, what a change of this layer loses) for each layer; layers before it are not computed again.

    Args:
        answer: the log-probabilities [rows, vocabulary] of one text. What is lost is their KL to the first ones,
            in nats, and is measured at each call.
    """
    with recorded(blocks) as outputs:
        whole = answer()
    for layer in range(len(blocks)):
        with replayed(blocks[:layer], outputs):
            yield layer, lambda: kl(whole, answer())


def kl(whole: torch.Tensor, other: torch.Tensor) -> float:
    """KL(whole || other) in nats, mean over the rows of two tables of log-probabilities."""
    return float((whole.exp() * (whole - other)).sum(-1).mean())


@contextmanager
def recorded(blocks: list) -> Iterator[dict]:
    """What each block gives in the forward that runs inside: block -> output."""
    outputs: dict = {}
    hooks = [block.register_forward_hook(lambda block, _, output: outputs.update({block: output})) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed(blocks: list, outputs: dict) -> Iterator[None]:
    """These blocks give what was recorded, and compute nothing."""
    before = [(block, block.__dict__.get("forward")) for block in blocks]  # accelerate sets one of its own
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
