"""A student's attention, layer by layer, on what the base's layers were given.

The base reads some rows. Then the student does, but each of its layers gives what the base's layer gave, so that the
next one is given what the base's was; and of the layer only the attention runs. Neither the student's MLPs nor its
head are computed, and no gradient goes from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.layerwise import Enough, ended
from surgery.data.packing import arguments
from surgery.errors import SurgeryError

# A token whose input is 0 (the embedding of padding, which a text of the base may hold) counts no more than one with
# this share of the mean square.
SILENT = 1e-4


@dataclass
class Pair:
    """A layer of the student and its counterpart in the base, as modules.

    Attributes:
        path: of the student's attention.
        block, attention, output: of the student: decoder layer, attention, output projection.
        base_block, base_output: of the base.
        runs: whether the attention runs; the layer of a pair that does not is passed over.
    """

    number: int
    path: str
    block: torch.nn.Module
    attention: torch.nn.Module
    output: torch.nn.Module
    base_block: torch.nn.Module
    base_output: torch.nn.Module
    runs: bool = True


@dataclass
class Seen:
    """What one layer of the base was given and gave.

    Attributes:
        loud: [batch, length], mean square of the layer's input.
        output: [batch, length, D], what its attention's output projection gave.
        result: what the whole layer gave.
    """

    loud: torch.Tensor | None = None
    output: torch.Tensor | None = None
    result: Any = None


def pairs(student, base) -> list[Pair]:
    """All layers of two models.

    Raises:
        SurgeryError: they have not equally many.
    """
    ours, theirs = Anatomy.of(student), Anatomy.of(base)
    if len(ours.layers) != len(theirs.layers):
        raise SurgeryError(f"the model has {len(ours.layers)} layers, the base {len(theirs.layers)}")
    found = []
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        block, attention, output = _modules(student, mine)
        base_block, _, base_output = _modules(base, other)
        found.append(Pair(mine.index, mine.path, block, attention, output, base_block, base_output))
    return found


def _modules(model, facts) -> tuple:
    """A layer's block, attention and output projection."""
    block = model.get_submodule(facts.path.rpartition(".")[0])
    return block, model.get_submodule(facts.path), model.get_submodule(f"{facts.path}.{facts.layout.o}")


def forced(student, base, layers: list[Pair], batch: dict, then: Callable[[Pair, torch.Tensor], None]) -> None:
    """Call `then` with the error of each layer's attention on a batch of `Packed` rows, one layer after the other."""
    seen = [Seen() for _ in layers]
    with ExitStack() as hooks:
        for layer, what in zip(layers, seen, strict=True):
            hooks.enter_context(_recorded(layer, what))
        with torch.no_grad(), ended(layers[-1].base_block):
            base(**arguments(base, {name: tensor.to(base.device) for name, tensor in batch.items()}, hidden=False))
    with ExitStack() as hooks:
        for layer, what in zip(layers, seen, strict=True):
            hooks.enter_context(_led(layer, what, then))
        with ended(layers[-1].block):
            student(**arguments(student, batch, hidden=False))


@contextmanager
def _recorded(layer: Pair, seen: Seen) -> Iterator[None]:
    """What a layer of the base does goes to `seen`."""

    def after_block(_, args, kwargs, result):
        states = args[0] if args else kwargs["hidden_states"]
        seen.loud, seen.result = wide(states).square().mean(-1), result

    def after_output(_, __, output):
        seen.output = output

    hooks = [
        layer.base_block.register_forward_hook(after_block, with_kwargs=True),
        layer.base_output.register_forward_hook(after_output),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _led(layer: Pair, seen: Seen, then: Callable[[Pair, torch.Tensor], None]) -> Iterator[None]:
    """A layer of the student runs its attention alone, and gives what the base's layer gave."""
    own, found = layer.block.forward, []

    def forward(*args, **kwargs):
        if layer.runs:
            with suppress(Enough):
                own(*args, **kwargs)
        return _as(seen.result, layer.output.weight.dtype)  # a base in bfloat16 beside a student in float32

    def after_output(_, __, output):
        found.append(output)

    def after_attention(*_):
        then(layer, error_of(found.pop(), seen.output, seen.loud))
        raise Enough  # the MLP is not needed

    hooks = [
        layer.output.register_forward_hook(after_output),
        layer.attention.register_forward_hook(after_attention),
    ]
    instance = "forward" in vars(layer.block)  # accelerate puts its own there
    layer.block.forward = forward
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if instance:
            layer.block.forward = own
        else:
            del layer.block.forward


def _as(result, dtype: torch.dtype):
    """What a layer gave, a tensor or a tuple with some in it, in another dtype."""
    if isinstance(result, tuple):
        return tuple(_as(each, dtype) for each in result)
    return result.to(dtype) if isinstance(result, torch.Tensor) and result.is_floating_point() else result


def error_of(output: torch.Tensor, wanted: torch.Tensor, loud: torch.Tensor) -> torch.Tensor:
    """Σ |y − y'|² / m over Σ |y|² / m, m the mean square of what came into the layer at that token.

    Args:
        output, wanted: [batch, length, D], or [batch * length, D]; no gradient goes to `wanted`.
        loud: m [batch, length].
    """
    ours, theirs = wide(output).flatten(0, -2), wide(wanted).flatten(0, -2).to(output.device)
    loud = loud.flatten().to(ours)
    weights = 1 / loud.clamp(min=SILENT * loud.mean() + torch.finfo(ours.dtype).tiny)
    energy = (theirs.square().sum(-1) * weights).sum()
    return ((ours - theirs).square().sum(-1) * weights).sum() / energy.clamp(min=torch.finfo(ours.dtype).tiny)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
