"""A layer-wise start: each layer's attention fitted to the base's, on the base's inputs, before anything end to end.

All layers take a step of their own in one forward (forced.py), and no gradient goes from layer to layer. In memory
are, beside both models, what the base's layers and attentions gave for the rows of one step, the activations of one
attention, and of what trains a copy and AdamW's moments.

The error is |y − y'|² summed over tokens, each relative to the mean square of the layer's input at that token, as a
share of the same sum of |y|²: the first token's input is many times as large as others', and its error would rule.

A layer that is not nearer to the base on rows that were held back gets its weights back.

A student's attention, layer by layer, on what the base's layers were given.

The base reads some rows. Then the student does, but each of its layers gives what the base's layer gave, so that the
next one is given what the base's was; and of the layer only the attention runs. Neither the student's MLPs nor its
head are computed, and no gradient goes from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.layerwise import StopForward, ended
from surgery.data.packing import arguments
from surgery.errors import SurgeryError
from surgery.healing.contexts import autocast_products

# AdamW's rate. On SmolLM2-135M's first four layers after mean pooling 3 KV heads to 1, 24 steps of 512 tokens brought
# the errors 0.64, 0.51, 0.80, 0.95 to 0.04, 0.11, 0.39, 0.50; at 1e-3 to 0.10, 0.16, 0.50, 0.59. Steps add up over the
# inputs of a row, so wider rows take smaller ones (Yang et al. 2022, arXiv 2203.03466).
RATE, WIDTH = 3e-3, 576
STEP_TOKENS = 2048
HELD = 8  # of so many rows one is held back
MOST_HELD = 4096  # tokens held back at most


def warm_start(student, base, rows, heal, trainable: Collection[str], progress=None) -> dict:
    """Fit the attention of every layer of `student` to that of `base`, in place.

    Args:
        student, base: in memory; not wrapped by peft. Both are left in the mode they were in, base unchanged.
        rows: a `Packed` data set; every eighth row is held back.
        heal: warm_start (tokens), seed, length and precision are read.
        trainable: parameters that may change, as `student.named_parameters()` calls them; those outside of
            attention do not.
        progress: called as progress(done, total, label), in tokens.

    Returns:
        tokens, steps, held_back (tokens), layers: of each the error on rows that were held back "before" and "after",
        and "kept" where the fit was no better and the weights are those from before. Layers without anything to
        train are not in it.

    Raises:
        SurgeryError: nothing to train, too few rows, models of different depth, an error that is not finite.
    """
    layers, length = pairs(student, base), rows.ids.shape[1]
    fits = _fits(student, layers, trainable)
    held, order = _rows(len(rows), length, heal.seed)
    each = max(1, STEP_TOKENS // length)  # rows of a step
    steps = math.ceil(heal.warm_start / (each * length))
    with _prepared(student, base, fits):
        before = _errors(student, base, layers, rows, held, each, heal)
        for step in range(steps):
            batch = _batch(rows, [next(order) for _ in range(each)], student.device)
            factor = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            with autocast_products(heal, student.device):
                forced(student, base, layers, batch, lambda at, error, by=factor: fits[at.number].step(error, by))
            if progress:
                progress((step + 1) * each * length, steps * each * length, "layer-wise start")
        after = _errors(student, base, layers, rows, held, each, heal)
    records = []
    for number, fit in fits.items():
        kept = not after[number] < before[number]
        if kept:
            fit.undo()
        new = before[number] if kept else after[number]
        records.append({"layer": number, "before": before[number], "after": new, "kept": kept})
    return {"tokens": steps * each * length, "steps": steps, "held_back": len(held) * length, "layers": records}


class LayerFit:
    """What trains of one layer.

    Args:
        parameters: of its attention.
    """

    def __init__(self, number: int, parameters: list[torch.nn.Parameter]):
        self.number, self.parameters = number, parameters
        self.first = [parameter.detach().clone() for parameter in parameters]
        self.rates = [RATE * min(1.0, WIDTH / p.shape[-1]) if p.dim() > 1 else RATE for p in parameters]
        self.optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], weight_decay=0.0)

    def step(self, error: torch.Tensor, factor: float) -> None:
        """One step of the optimiser down the gradient of `error`, at `factor` times the rates."""
        if not error.isfinite():
            raise SurgeryError(
                f"layer {self.number}'s attention gave numbers that are not finite",
                where="heal.warm_start",
                fix="heal.warm_start=0, or heal.precision=float32",
            )
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(error.device.type, enabled=False):
            found = torch.autograd.grad(error, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def undo(self) -> None:
        for parameter, first in zip(self.parameters, self.first, strict=True):
            parameter.data.copy_(first)


def _fits(student, layers: list[Pair], trainable: Collection[str]) -> dict[int, LayerFit]:
    """Of each layer that something trains of; the others are told not to run."""
    wanted, found = set(trainable), {}
    for layer in layers:
        named = layer.attention.named_parameters(layer.path)
        parameters = [parameter for name, parameter in named if name in wanted]
        layer.runs = bool(parameters)
        if parameters:
            found[layer.number] = LayerFit(layer.number, parameters)
    if not found:
        raise SurgeryError(
            "a layer-wise start has nothing to train: no attention parameter is among those that train",
            where="heal.warm_start",
            fix="heal.warm_start=0, or another heal.method",
        )
    return found


def _rows(count: int, length: int, seed: int) -> tuple[list[int], Iterator[int]]:
    """Rows that are held back, and the others without end, each time round in another order."""
    held = list(range(0, count, HELD))[: max(1, MOST_HELD // length)]
    others = [row for row in range(count) if row not in set(held)]
    if not others:
        raise SurgeryError(
            f"a layer-wise start needs 2 rows at least, there is {count}", where="heal.warm_start", fix="use more data"
        )
    generator = torch.Generator().manual_seed(seed)

    def endless():
        while True:
            yield from (others[place] for place in torch.randperm(len(others), generator=generator).tolist())

    return held, endless()


def _batch(rows, numbers: list[int], device) -> dict[str, torch.Tensor]:
    items = [rows[number] for number in numbers]
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


@contextmanager
def _prepared(student, base, fits: dict[int, LayerFit]) -> Iterator[None]:
    """Both in eval mode (no dropout, and gates choose as they will), gradients for what trains alone."""
    training = [(module, module.training) for model in (student, base) for module in model.modules()]
    wanted = [(p, p.requires_grad) for model in (student, base) for p in model.parameters()]
    try:
        for model in (student, base):
            model.eval().requires_grad_(False)
        for fit in fits.values():
            for parameter in fit.parameters:
                parameter.requires_grad_(True)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


@torch.no_grad()
def _errors(student, base, layers: list[Pair], rows, held: list[int], each: int, heal) -> dict[int, float]:
    """The error of each layer that runs, on some rows."""
    sums: dict[int, float] = {}
    for first in range(0, len(held), each):
        some = held[first : first + each]

        def add(layer: Pair, error: torch.Tensor, share=len(some) / len(held)) -> None:
            sums[layer.number] = sums.get(layer.number, 0.0) + float(error) * share

        with autocast_products(heal, student.device):
            forced(student, base, layers, _batch(rows, some, student.device), add)
    return sums


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
class BaseLayerOutput:
    """What one layer of the base was given and gave.

    Attributes:
        rms: [batch, length], mean square of the layer's input.
        output: [batch, length, D], what its attention's output projection gave.
        result: what the whole layer gave.
    """

    rms: torch.Tensor | None = None
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
    seen = [BaseLayerOutput() for _ in layers]
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
def _recorded(layer: Pair, seen: BaseLayerOutput) -> Iterator[None]:
    """What a layer of the base does goes to `seen`."""

    def after_block(_, args, kwargs, result):
        states = args[0] if args else kwargs["hidden_states"]
        seen.rms, seen.result = wide(states).square().mean(-1), result

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
def _led(layer: Pair, seen: BaseLayerOutput, then: Callable[[Pair, torch.Tensor], None]) -> Iterator[None]:
    """A layer of the student runs its attention alone, and gives what the base's layer gave."""
    own, found = layer.block.forward, []

    def forward(*args, **kwargs):
        if layer.runs:
            with suppress(StopForward):
                own(*args, **kwargs)
        return _as(seen.result, layer.output.weight.dtype)  # a base in bfloat16 beside a student in float32

    def after_output(_, __, output):
        found.append(output)

    def after_attention(*_):
        then(layer, error_of(found.pop(), seen.output, seen.rms))
        raise StopForward  # the MLP is not needed

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


def error_of(output: torch.Tensor, wanted: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
    """Σ |y − y'|² / m over Σ |y|² / m, m the mean square of what came into the layer at that token.

    Args:
        output, wanted: [batch, length, D], or [batch * length, D]; no gradient goes to `wanted`.
        rms: m [batch, length].
    """
    ours, theirs = wide(output).flatten(0, -2), wide(wanted).flatten(0, -2).to(output.device)
    rms = rms.flatten().to(ours)
    weights = 1 / rms.clamp(min=SILENT * rms.mean() + torch.finfo(ours.dtype).tiny)
    energy = (theirs.square().sum(-1) * weights).sum()
    return ((ours - theirs).square().sum(-1) * weights).sum() / energy.clamp(min=torch.finfo(ours.dtype).tiny)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
