"""Layer-wise distillation before the training: each layer's attention is fitted to the base's, on the base's inputs.

One forward gives every layer a step of its own (`run_teacher_forced`), and no gradient flows from layer to layer.
Memory holds both models, the outputs of the base's layers and attentions for the rows of one step, and the activations
of one attention. It also holds a copy of the parameters that it fits, and AdamW's moments.

The error is the sum of |y − y'|² over tokens, as a share of the same sum of |y|². Each token is weighted by the
inverse mean square of the layer's input at that token. The first token's input is many times as large as others', and
its error would dominate otherwise. A layer that is not nearer to the base on the validation rows gets its old weights
back.

Teacher forcing runs the student's attention, layer by layer, on the inputs of the base's layers. The base reads some
rows first, and then the student reads them. Each student layer runs only its attention, and returns the output of the
base's layer, so that the next layer gets the base's input. The student's MLPs and its head are not computed.
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
from surgery.errors import ModelError, ModelMismatchError, SettingError
from surgery.healing.contexts import autocast_products
from surgery.machine.progress import begin

# AdamW's rate. On SmolLM2-135M's first four layers, after mean pooling of 3 KV heads to 1, 24 steps of 512 tokens
# reduced the errors 0.64, 0.51, 0.80, 0.95 to 0.04, 0.11, 0.39, 0.50; a rate of 1e-3 to 0.10, 0.16, 0.50, 0.59. WIDTH
# is the input width of this model: the effect of a step grows with a weight's input width, so a wider model takes
# smaller steps (Yang et al. 2022, arXiv 2203.03466).
RATE, WIDTH = 3e-3, 576
STEP_TOKENS = 2048
VALIDATION_EVERY = 8  # one of this many rows is for validation
VALIDATION_TOKENS = 4096  # at most


def warm_start(student, base, rows, heal, trainable: Collection[str], progress=None) -> dict:
    """Fit the attention of every layer of `student` to that of `base`, in place.

    Args:
        student, base: models in memory, not wrapped by peft. Both keep their mode, and the base's weights stay
            unchanged.
        rows: a `Packed` data set; every eighth row is held back.
        heal: its warm_start (tokens), seed, length and precision are read.
        trainable: names of the parameters that may change, as in `student.named_parameters()`. Parameters outside
            of attention stay unchanged.
        progress: called as progress(done, total, label), in tokens.

    Returns:
        A record: tokens, steps, held_back (tokens) and layers. Each layer has its error on the held-back rows "before"
        and "after". It has "kept" where the fit was no better and the old weights were restored. Layers without
        trainable parameters are left out.

    Raises:
        SurgeryError: nothing to train, too few rows, models of different depth, an error that is not finite.
    """
    layers, length = pairs(student, base), rows.ids.shape[1]
    fits = _fits(student, layers, trainable)
    validation, order = _split_rows(len(rows), length, heal.seed)
    step_rows = max(1, STEP_TOKENS // length)  # rows in a step
    steps = math.ceil(heal.warm_start / (step_rows * length))
    begin(progress, "fitting layer by layer", steps * step_rows * length)
    with _only_fits_train(student, base, fits):
        before = _errors(student, base, layers, rows, validation, step_rows, heal)
        for step in range(steps):
            batch = _batch(rows, [next(order) for _ in range(step_rows)], student.device)
            factor = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            with autocast_products(heal, student.device):
                run_teacher_forced(
                    student, base, layers, batch, lambda layer, error, by=factor: fits[layer.index].step(error, by)
                )
            if progress:
                progress((step + 1) * step_rows * length, steps * step_rows * length, "fitting layer by layer")
        after = _errors(student, base, layers, rows, validation, step_rows, heal)
    records = []
    for index, fit in fits.items():
        undone = not after[index] < before[index]
        if undone:
            fit.undo()
        new = before[index] if undone else after[index]
        records.append({"layer": index, "before": before[index], "after": new, "kept": undone})
    return {
        "tokens": steps * step_rows * length,
        "steps": steps,
        "held_back": len(validation) * length,
        "layers": records,
    }


class LayerFit:
    """The trainable parameters of one layer, with their optimiser.

    Args:
        index: the layer's index.
        parameters: the trainable parameters of its attention.
    """

    def __init__(self, index: int, parameters: list[torch.nn.Parameter]):
        self.index, self.parameters = index, parameters
        self.originals = [parameter.detach().clone() for parameter in parameters]
        self.rates = [RATE * min(1.0, WIDTH / p.shape[-1]) if p.dim() > 1 else RATE for p in parameters]
        self.optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], weight_decay=0.0)

    def step(self, error: torch.Tensor, factor: float) -> None:
        """Take one optimiser step on `error`, at `factor` times the learning rates."""
        if not error.isfinite():
            raise ModelError(
                f"layer {self.index}'s attention gave numbers that are not finite",
                where="heal.warm_start",
                fix="heal.warm_start=0, or heal.precision=float32",
            )
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(error.device.type, enabled=False):
            gradients = torch.autograd.grad(error, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def undo(self) -> None:
        """Restore the weights from before the fit."""
        for parameter, original in zip(self.parameters, self.originals, strict=True):
            parameter.data.copy_(original)


def _fits(student, layers: list[Pair], trainable: Collection[str]) -> dict[int, LayerFit]:
    """The fits of the layers with trainable parameters, by layer. The pairs of other layers are marked not to run."""
    wanted, fits = set(trainable), {}
    for layer in layers:
        named = layer.attention.named_parameters(layer.path)
        parameters = [parameter for name, parameter in named if name in wanted]
        layer.runs = bool(parameters)
        if parameters:
            fits[layer.index] = LayerFit(layer.index, parameters)
    if not fits:
        raise SettingError(
            "a layer-wise start has nothing to train: no attention parameter is among those that train",
            where="heal.warm_start",
            fix="heal.warm_start=0, or another heal.method",
        )
    return fits


def _split_rows(count: int, length: int, seed: int) -> tuple[list[int], Iterator[int]]:
    """Indices of the validation rows, and an endless iterator over the other rows, which is shuffled in each round."""
    validation = list(range(0, count, VALIDATION_EVERY))[: max(1, VALIDATION_TOKENS // length)]
    training = [row for row in range(count) if row not in set(validation)]
    if not training:
        raise SettingError(
            f"a layer-wise start needs 2 rows at least, there is {count}", where="heal.warm_start", fix="use more data"
        )
    generator = torch.Generator().manual_seed(seed)

    def endless():
        while True:
            yield from (training[index] for index in torch.randperm(len(training), generator=generator).tolist())

    return validation, endless()


def _batch(rows, indices: list[int], device) -> dict[str, torch.Tensor]:
    items = [rows[index] for index in indices]
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


@contextmanager
def _only_fits_train(student, base, fits: dict[int, LayerFit]) -> Iterator[None]:
    """Put both models in eval mode (no dropout, routers as in inference); only the fits' parameters get gradients."""
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
def _errors(student, base, layers: list[Pair], rows, validation: list[int], step_rows: int, heal) -> dict[int, float]:
    """The error of each layer that runs, on the validation rows."""
    sums: dict[int, float] = {}
    for first in range(0, len(validation), step_rows):
        some = validation[first : first + step_rows]

        def add(layer: Pair, error: torch.Tensor, share=len(some) / len(validation)) -> None:
            sums[layer.index] = sums.get(layer.index, 0.0) + float(error) * share

        with autocast_products(heal, student.device):
            run_teacher_forced(student, base, layers, _batch(rows, some, student.device), add)
    return sums


# A token whose input is 0 (the embedding of padding, which generated text may contain) counts no more than a token
# with this share of the mean square.
SILENT = 1e-4


@dataclass
class Pair:
    """A layer of the student and its counterpart in the base, as modules.

    Attributes:
        path: path of the student's attention.
        block, attention, output: the student's decoder layer, its attention and its output projection.
        base_block, base_output: the base's decoder layer and output projection.
        runs: whether the student's attention runs; otherwise the layer only returns the base's output.
    """

    index: int
    path: str
    block: torch.nn.Module
    attention: torch.nn.Module
    output: torch.nn.Module
    base_block: torch.nn.Module
    base_output: torch.nn.Module
    runs: bool = True


@dataclass
class BaseLayerOutput:
    """Input scale and outputs of one layer of the base.

    Attributes:
        rms: [batch, length], mean square of the layer's input.
        output: [batch, length, D], result of the attention's output projection.
        result: result of the layer.
    """

    rms: torch.Tensor | None = None
    output: torch.Tensor | None = None
    result: Any = None


def pairs(student, base) -> list[Pair]:
    """The pairs of all layers of two models.

    Raises:
        SurgeryError: the models have different numbers of layers.
    """
    ours, theirs = Anatomy.of(student), Anatomy.of(base)
    if len(ours.layers) != len(theirs.layers):
        raise ModelMismatchError(f"the model has {len(ours.layers)} layers, the base {len(theirs.layers)}")
    paired = []
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        block, attention, output = _modules(student, mine)
        base_block, _, base_output = _modules(base, other)
        paired.append(Pair(mine.index, mine.path, block, attention, output, base_block, base_output))
    return paired


def _modules(model, layer) -> tuple:
    """A layer's block, attention and output projection."""
    block = model.get_submodule(layer.path.rpartition(".")[0])
    return block, model.get_submodule(layer.path), model.get_submodule(f"{layer.path}.{layer.layout.o}")


def run_teacher_forced(
    student, base, layers: list[Pair], batch: dict, on_error: Callable[[Pair, torch.Tensor], None]
) -> None:
    """Call `on_error` with each layer's pair and its attention's error on a batch of `Packed` rows, layer by layer."""
    outputs = [BaseLayerOutput() for _ in layers]
    with ExitStack() as hooks:
        for layer, output in zip(layers, outputs, strict=True):
            hooks.enter_context(_recording(layer, output))
        with torch.no_grad(), ended(layers[-1].base_block):
            base(**arguments(base, {name: tensor.to(base.device) for name, tensor in batch.items()}, hidden=False))
    with ExitStack() as hooks:
        for layer, output in zip(layers, outputs, strict=True):
            hooks.enter_context(_teacher_forcing(layer, output, on_error))
        with ended(layers[-1].block):
            student(**arguments(student, batch, hidden=False))


@contextmanager
def _recording(layer: Pair, base_output: BaseLayerOutput) -> Iterator[None]:
    """Record the input scale and the outputs of a layer of the base in `base_output`."""

    def after_block(_, args, kwargs, result):
        states = args[0] if args else kwargs["hidden_states"]
        base_output.rms, base_output.result = wide(states).square().mean(-1), result

    def after_output(_, __, output):
        base_output.output = output

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
def _teacher_forcing(
    layer: Pair, base_output: BaseLayerOutput, on_error: Callable[[Pair, torch.Tensor], None]
) -> Iterator[None]:
    """Make a student layer run only its attention, and return the output of the base's layer."""
    own, outputs = layer.block.forward, []

    def forward(*args, **kwargs):
        if layer.runs:
            with suppress(StopForward):
                own(*args, **kwargs)
        # The base may be in bfloat16, and the student in float32.
        return _cast(base_output.result, layer.output.weight.dtype)

    def after_output(_, __, output):
        outputs.append(output)

    def after_attention(*_):
        on_error(layer, error_of(outputs.pop(), base_output.output, base_output.rms))
        raise StopForward  # the MLP is not needed

    hooks = [
        layer.output.register_forward_hook(after_output),
        layer.attention.register_forward_hook(after_attention),
    ]
    instance = "forward" in vars(layer.block)  # accelerate may have replaced it on the instance
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


def _cast(result, dtype: torch.dtype):
    """A layer's output (a tensor, or a tuple with tensors) in another dtype."""
    if isinstance(result, tuple):
        return tuple(_cast(each, dtype) for each in result)
    return result.to(dtype) if isinstance(result, torch.Tensor) and result.is_floating_point() else result


def error_of(output: torch.Tensor, wanted: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
    """(Σ |y − y'|² / m) / (Σ |y|² / m), where m is the mean square of the layer's input at a token.

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
    """The tensor in float32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
