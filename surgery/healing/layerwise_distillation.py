"""A layer-wise start: each layer's attention fitted to the base's, on the base's inputs, before anything end to end.

All layers take a step of their own in one forward (forced.py), and no gradient goes from layer to layer. In memory
are, beside both models, what the base's layers and attentions gave for the rows of one step, the activations of one
attention, and of what trains a copy and AdamW's moments.

The error is |y − y'|² summed over tokens, each relative to the mean square of the layer's input at that token, as a
share of the same sum of |y|²: the first token's input is many times as large as others', and its error would rule.

A layer that is not nearer to the base on rows that were held back gets its weights back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from surgery.errors import SurgeryError
from surgery.healing.contexts import products
from surgery.healing.teacher_forcing import Pair, forced, pairs

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
            with products(heal, student.device):
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


class Fit:
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


def _fits(student, layers: list[Pair], trainable: Collection[str]) -> dict[int, Fit]:
    """Of each layer that something trains of; the others are told not to run."""
    wanted, found = set(trainable), {}
    for layer in layers:
        named = layer.attention.named_parameters(layer.path)
        parameters = [parameter for name, parameter in named if name in wanted]
        layer.runs = bool(parameters)
        if parameters:
            found[layer.number] = Fit(layer.number, parameters)
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
def _prepared(student, base, fits: dict[int, Fit]) -> Iterator[None]:
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

        with products(heal, student.device):
            forced(student, base, layers, _batch(rows, some, student.device), add)
    return sums
