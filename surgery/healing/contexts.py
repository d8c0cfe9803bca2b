"""Context managers that change model state for training and always restore it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.errors import MachineError
from surgery.healing.distributed import on_cpu
from surgery.machine.device import fast_in_bfloat16, is_out_of_memory

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.healing.parameters import TrainableParameters

PRECISION = "ACCELERATE_MIXED_PRECISION"
LEAVES = ("weight", "bias")
PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def use_bfloat16(heal: Heal) -> bool:
    """Whether products are computed in bfloat16, which is faster only on a GPU or CPU with instructions for it."""
    if heal.precision != "auto":
        return heal.precision == "bfloat16"
    if not on_cpu():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return fast_in_bfloat16()


def autocast_products(heal: Heal, device: torch.device):
    """A context in which a model on this device computes its products in the precision of `heal.precision`.

    Rounded weights are not cached, since the weights change between forwards.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(heal), cache_enabled=False)


@contextmanager
def unprepared(model) -> Iterator[None]:
    """Remove from the model what accelerate leaves on it.

    This is a wrapped `forward` for mixed precision, and the mark of a prepared model, which would make a second
    training run in float32.
    """
    before = {name: vars(model).get(name) for name in PREPARED}
    try:
        yield
    finally:
        for name, value in before.items():
            vars(model).pop(name, None)
            if value is not None:
                setattr(model, name, value)


@contextmanager
def restore_weights_on_error(model, trained: TrainableParameters, mixing: bool) -> Iterator[None]:
    """Restore the weights after an error or an interruption, from a copy of the weights that may change.

    Args:
        trained: the parameters that train, and those that the layer-wise start fits; low-rank updates also change the
            weights that they are merged into.
        mixing: whether mixing weights are folded, which changes K and V.
    """
    parameters = dict(model.named_parameters())  # mixing weights do not exist yet
    names = [*trained.parameters, *trained.started, *(f"{path}.weight" for path in trained.adapted)]
    for layer in Anatomy.of(model).layers if mixing else ():
        names += [
            f"{layer.path}.{projection}.{leaf}" for projection in (layer.layout.k, layer.layout.v) for leaf in LEAVES
        ]
    originals = {name: parameters[name].detach().to("cpu", copy=True) for name in names if name in parameters}
    try:
        yield
    except BaseException:
        for name, tensor in originals.items():
            model.get_parameter(name).data.copy_(tensor)
        raise


@contextmanager
def in_float32(model) -> Iterator[None]:
    """Keep the model in float32 while it trains; restore its dtypes and modes afterwards, also after an error.

    Original buffers are put back instead of cast ones: RoPE's frequencies are float32 in a bfloat16 model.
    """
    parameters = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    buffers = [(module, *each) for module in model.modules() for each in module.named_buffers(recurse=False)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.float()
        yield
    finally:
        for name, parameter in model.named_parameters():
            dtype, requires_grad = parameters.get(name, (parameter.dtype, True))
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)
        for module, name, tensor in buffers:
            module.register_buffer(name, tensor.to(model.device), name not in module._non_persistent_buffers_set)
        for module, mode in modes:
            module.training = mode


@contextmanager
def own_precision(heal: Heal) -> Iterator[None]:
    """Set the launcher's precision (accelerate's environment variable) to `heal.precision`."""
    before = os.environ.get(PRECISION)
    os.environ[PRECISION] = "bf16" if use_bfloat16(heal) else "no"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PRECISION]
        else:
            os.environ[PRECISION] = before


@contextmanager
def checkpointed(model, wanted: bool) -> Iterator[None]:
    """Turn on gradient checkpointing if it is wanted and not on already, by either of its names in Transformers 5."""
    on = getattr(model, "is_activation_checkpointing", None)
    on = model.is_gradient_checkpointing if on is None else on
    if not wanted or on:
        yield
        return
    settings = {"use_reentrant": False}  # else the gradient of values computed before a layer would be lost
    if switch := getattr(model, "activation_checkpointing_enable", None):
        switch(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(settings)
    try:
        yield
    finally:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


@contextmanager
def without_attention_dropout(model) -> Iterator[None]:
    """Turn off attention dropout, which a surgical model's base may have been trained with: the runtime refuses it.

    Adapters are added later, and keep their own dropout.
    """
    dropouts = []
    if hasattr(model.config, "surgery"):
        for layer in Anatomy.of(model).layers:
            for module in model.get_submodule(layer.path).modules():
                names = ["p"] if isinstance(module, torch.nn.Dropout) else [n for n in vars(module) if "dropout" in n]
                dropouts += [(module, name, getattr(module, name)) for name in names]
    dropouts = [(module, name, rate) for module, name, rate in dropouts if isinstance(rate, float)]
    try:
        for module, name, _ in dropouts:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in dropouts:
            setattr(module, name, rate)


def overwrite_hint(in_memory: bool) -> str:
    """The end of an error's remedy that changes a setting: a run on disk must then be overwritten."""
    return "" if in_memory else "; with another setting, start again with --overwrite"


@contextmanager
def enough_memory(heal: Heal, in_memory: bool) -> Iterator[None]:
    """Turn "out of memory" into an error that names the settings which reduce memory.

    Raises:
        MachineError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            "out of memory",
            where="heal",
            exists=f"batch_tokens {heal.batch_tokens}, gradient_checkpointing {heal.gradient_checkpointing}, "
            f"length {heal.length}",
            fix="a smaller heal.batch_tokens, heal.gradient_checkpointing=true, or a shorter heal.length"
            + overwrite_hint(in_memory),
            code="out-of-memory",
        ) from error
