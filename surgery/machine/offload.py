"""A model that is larger than the GPU: it is spread over several, or its layers run on one, one at a time.

A model that is spread has whole layers on each GPU, and all else on the one with most room (Accelerate's device map).

The layers of a model that is streamed lie in main memory. All that is not a layer (embeddings, the last norm, the
head) stays on the GPU. A layer is moved there when it is called, and leaves when another one is called. So a
calibration that runs one layer on all texts moves each layer once, and a forward pass of the whole model moves all of
them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from surgery.errors import MachineError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ModelSizes:
    """The bytes of a model and of its layers.

    Attributes:
        layers: of each layer.
        rest: of all that is not a layer.
    """

    layers: tuple[int, ...]
    rest: int

    @classmethod
    def of_tensors(cls, sizes: dict[str, int], layers: Iterable[str]) -> ModelSizes:
        """The sizes of stored tensors, from name -> bytes and the paths of the layers."""
        of_layers = dict.fromkeys(layers, 0)
        for name, size in sizes.items():
            if (layer := next((path for path in of_layers if name.startswith(f"{path}.")), None)) is not None:
                of_layers[layer] += size
        return cls(tuple(of_layers.values()), sum(sizes.values()) - sum(of_layers.values()))

    @classmethod
    def of(cls, model: nn.Module) -> ModelSizes:
        """The sizes of a model in memory; one without layers that run in turn is all rest."""
        layers = tuple(map(_bytes_of, layers_of(model)))
        return cls(layers, _bytes_of(model) - sum(layers))

    @property
    def whole(self) -> int:
        """Bytes of the model."""
        return self.rest + sum(self.layers)

    @property
    def streamed(self) -> int:
        """Bytes on the GPU if layers are streamed: the rest, one layer, and another one while they change places."""
        return self.rest + 2 * max(self.layers, default=0)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: of all lists of modules in a model, the one that holds most."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=_bytes_of, default=()))


def _bytes_of(module: nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


STREAMED = "_surgery_streamed"  # attribute of a model whose layers are streamed: its `StreamedLayers`


def bring(model: nn.Module, layer: nn.Module) -> None:
    """Move a layer to the model's device, where it stays until another one is called or brought.

    Its parameters can then be held and replaced. Without streaming, every layer is there.
    """
    streamed = vars(model).get(STREAMED)
    if streamed is not None:
        streamed.bring(layer)


def end_streaming(model: nn.Module) -> None:
    """Let a model's layers stay on the CPU, if they were streamed."""
    if (streamed := vars(model).pop(STREAMED, None)) is not None:
        streamed.end()


@contextmanager
def whole_on_cpu(model: nn.Module) -> Iterator[None]:
    """A block in which a model that is streamed is on the CPU; another one stays where it is.

    A streamed model writes text faster there: each token needs all layers, and the CPU reads weights faster than they
    move to a GPU.
    """
    streamed = vars(model).get(STREAMED)
    if streamed is None:
        yield
        return
    end_streaming(model)
    model.to("cpu")
    try:
        yield
    finally:
        vars(model)[STREAMED] = StreamedLayers(model, streamed.device)


class StreamedLayers:
    """The layers of a model that are moved to a device when they are called.

    Args:
        model: on the CPU. What is not a layer is moved to `device` now.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device, self.there = device, None
        layers = layers_of(model)
        _move_rest(model, set(layers), device)
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True) for layer in layers
        ]

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        import torch

        if torch.is_grad_enabled() and any(each.requires_grad for each in (*layer.parameters(), *_tensors(args))):
            raise MachineError(
                f"gradients need the whole model on {self.device}, and it is too large for that",
                where="--device",
                fix="--device cpu",
            )
        self.bring(layer)
        return _moved(args, self.device), _moved(kwargs, self.device)

    def bring(self, layer: nn.Module) -> None:
        """Move a layer to the device, and the one that is there back to the CPU."""
        if layer is not self.there:
            self.leave()
            layer.to(self.device)
            self.there = layer

    def leave(self) -> None:
        """Move the layer that is on the device back to the CPU."""
        if self.there is not None:
            self.there.to("cpu")
            self.there = None

    def end(self) -> None:
        """Stream no longer: the layers stay on the CPU."""
        self.leave()
        for hook in self._hooks:
            hook.remove()


def in_turn(sizes: list[int], rooms: dict[torch.device, int]) -> tuple[torch.device, ...]:
    """The device of each layer, in proportion to the devices' room; () if one of them would be too full."""
    ends = list(accumulate(rooms.values()))
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    devices = list(rooms)
    places = [devices[bisect_left(ends, middle / sum(sizes) * ends[-1])] for middle in middles]
    used = Counter()
    for device, size in zip(places, sizes, strict=True):
        used[device] += size
    return tuple(places) if all(used[device] <= rooms[device] for device in devices) else ()


def spread(model: nn.Module, rest: torch.device, layers: Sequence[torch.device]) -> nn.Module:
    """Put each layer of a model on its device, and all else on `rest`. Inputs are moved to where they are read."""
    from accelerate import dispatch_model

    where = dict(zip(layers_of(model), layers, strict=True))
    stays = getattr(model, "_skip_keys_device_placement", None)  # the cache, whose layers lie where their layers do
    return dispatch_model(model, dict(_device_map("", model, where, rest)), main_device=rest, skip_keys=stays)


def _device_map(path: str, module: nn.Module, layers: dict[nn.Module, torch.device], rest: torch.device):
    """Pairs of a module's path and its device: the layers, and the largest modules without layers."""
    if module in layers or layers.keys().isdisjoint(module.modules()):
        yield path, layers.get(module, rest)
        return
    for name, child in module.named_children():
        yield from _device_map(f"{path}.{name}" if path else name, child, layers, rest)


def end_spreading(model: nn.Module) -> None:
    """Let a model that was spread be one that can be moved as others."""
    if vars(model).pop("hf_device_map", None) is not None:
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(model)
        for name in ("to", "cuda", "xpu", "npu"):  # Accelerate's, which warn
            vars(model).pop(name, None)


def _move_rest(module: nn.Module, layers: set[nn.Module], device: torch.device) -> None:
    """Move a module without the layers in it."""
    if module in layers:
        return
    if layers.isdisjoint(module.modules()):
        module.to(device)
        return
    module._apply(lambda tensor: tensor.to(device), recurse=False)
    for child in module.children():
        _move_rest(child, layers, device)


def _tensors(args: tuple) -> list[torch.Tensor]:
    import torch

    return [each for each in args if isinstance(each, torch.Tensor)]


def _moved(value: Any, device: torch.device) -> Any:
    """The same structure with its tensors on a device."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    return value
