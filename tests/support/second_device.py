"""A second device for machines without a GPU: `torch.device("second")`. Its tensors hold CPU data and really compute.

Importing this file registers PyTorch's PrivateUse1 device in this process, for good: import it in a process of its own
(`on_second_device.py`), since other tests would find an accelerator.

An operation on a tensor of this device and one of the CPU is an error, as on a GPU. Only numbers (tensors without
dimensions) and lists of indices may come from the CPU. `Work` counts what runs on which device.

With the environment's SECOND_DEVICE_NO_FLOAT64 it has no float64, as Apple's GPUs. With SECOND_DEVICE_COUNT there are
several, which do not share operands either. With `Work(memory=...)` more bytes on one are an error, as on a GPU.

How it works: a tensor is a wrapper, which names the device, and keeps a CPU tensor. What PyTorch dispatches to the
wrapper is computed with what it keeps. Tensors that PyTorch makes from nothing on this device have no wrapper yet, and
reach the kernels that are registered below.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import flop_registry

NAME = "second"
LACKING = (torch.float64, torch.complex128) if os.environ.get("SECOND_DEVICE_NO_FLOAT64") else ()
COUNT = int(os.environ.get("SECOND_DEVICE_COUNT", "1"))
UNLIMITED = 1 << 40
aten = torch.ops.aten
FROM_CPU = {  # operations that may read a CPU tensor: copies, and indices
    aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._unsafe_index.Tensor, aten._index_put_impl_.default,
}  # fmt: skip
# Multiply-adds of what the flop counter does not know, from the shapes of the arguments.
SOLVERS = {
    aten._linalg_eigh.default: lambda a, *_: 9 * a.shape[-1] ** 3 * a.shape[:-2].numel(),
    aten.linalg_inv_ex.default: lambda a, **_: a.shape[-1] ** 3 * a.shape[:-2].numel(),
    aten.linalg_cholesky_ex.default: lambda a, *_: a.shape[-1] ** 3 // 3 * a.shape[:-2].numel(),
    aten.cholesky_solve.default: lambda b, a, *_: a.shape[-1] ** 2 * b.shape[-1] * a.shape[:-2].numel(),
    aten._linalg_svd.default: lambda a, *_: 9 * a.shape[-1] * a.shape[-2] * min(a.shape[-2:]) * a.shape[:-2].numel(),
    aten._linalg_solve_ex.default: lambda a, b, *_: a.shape[-1] ** 2 * (a.shape[-1] // 3 + b.shape[-1]),
    aten.linalg_solve_triangular.default: lambda a, b, **_: a.shape[-1] ** 2 * b.shape[-1] * a.shape[:-2].numel(),
    aten._scaled_dot_product_flash_attention_for_cpu.default: lambda q, k, v, *_, **__: (
        q.shape[:2].numel() * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    ),
}


class _Backend:
    """What `torch.second` offers. The current device is always the first."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return COUNT

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Generators of this device are the CPU's."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Bytes that are free, and those of the whole memory."""
        work = Work._counting
        index = torch.device(device or NAME).index or 0
        return (work.memory - work.alive[index], work.memory) if work else (UNLIMITED, UNLIMITED)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Work(TorchDispatchMode):
    """Counts multiply-adds by device: `with Work() as work: ...`, then `work.share` and `work.on_cpu`.

    Args:
        memory: bytes of a second device.

    Attributes:
        second, cpu: operation -> multiply-adds.
        alive: index of a second device -> bytes there.
        peak: the most bytes alive on one of them.
    """

    _counting: Work | None = None

    def __init__(self, memory: int = UNLIMITED):
        super().__init__()
        self.memory = memory
        self.second: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self.alive: Counter[int] = Counter()
        self.peak = 0

    def __enter__(self) -> Work:
        Work._counting = self
        return super().__enter__()

    def __exit__(self, *raised) -> None:
        Work._counting = None
        super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(isinstance(each, Second) for each in _pytree.tree_leaves((args, kwargs, out))):
            self.cpu[func.name()] += _multiply_adds(func, args, kwargs or {}, out)
        return out

    @property
    def share(self) -> float:
        """The share of the multiply-adds that ran on the second device."""
        second, cpu = sum(self.second.values()), sum(self.cpu.values())
        return second / max(second + cpu, 1)

    def born(self, tensor: torch.Tensor, index: int) -> None:
        """Count the bytes of a new tensor's storage on a device until it is freed; views and empty ones have none."""
        storage = tensor.untyped_storage()
        if getattr(storage, "counted", None) is None and (size := storage.nbytes()):
            storage.counted = True
            used = self.alive[index]
            if used + size > self.memory:
                raise RuntimeError(f"the second device is out of memory: {used:,} bytes are used, {size:,} more")
            self.alive[index] += size
            self.peak = max(self.peak, self.alive[index])
            weakref.finalize(storage, self._died, size, index)

    def _died(self, size: int, index: int) -> None:
        self.alive[index] -= size


def _multiply_adds(func, args, kwargs, out) -> int:
    if func in SOLVERS:
        return int(SOLVERS[func](*args, **kwargs))
    packet = str(func._overloadpacket).removeprefix("aten.")
    known = flop_registry.get(getattr(aten, packet.removesuffix("_"), None))  # addmm_ as addmm
    return known(*args, **kwargs, out_val=out) // 2 if known else 0


class Second(torch.Tensor):
    """A tensor of the second device.

    Attributes:
        held: the CPU tensor that it keeps; sizes and strides are asked of this one.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, index: int):
        if held.dtype in LACKING:
            raise TypeError("the second device has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, index), dispatch_sizes_strides_policy="sizes",
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_) -> str:
        return f"{self.held}, on the second device"

    def tolist(self) -> list:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


# Questions about a tensor, which `dispatch_sizes_strides_policy` sends here. None: PyTorch finds the answer itself.
METADATA = {
    aten.sym_size.default: torch.Tensor.size,
    aten.size.default: torch.Tensor.size,
    aten.sym_stride.default: torch.Tensor.stride,
    aten.stride.default: torch.Tensor.stride,
    aten.sym_storage_offset.default: torch.Tensor.storage_offset,
    aten.storage_offset.default: torch.Tensor.storage_offset,
    aten.dim.default: torch.Tensor.dim,
    aten.sym_numel.default: torch.Tensor.numel,
    aten.numel.default: torch.Tensor.numel,
    aten.is_contiguous.default: torch.Tensor.is_contiguous,
    aten.is_contiguous.memory_format: lambda held, form=None: held.is_contiguous(memory_format=form),
    aten.is_strides_like_format.default: lambda held, form=None: None,
    aten.is_non_overlapping_and_dense.default: aten.is_non_overlapping_and_dense,
}


def _run(func, args: tuple, kwargs: dict[str, Any]):
    """Compute an operation of the second device with what its tensors keep."""
    if func in METADATA:
        return METADATA[func](args[0].held, *args[1:], **kwargs)
    if func is aten._to_copy.default:
        return _copied(*args, **kwargs)
    if func is aten.copy_.default:
        target, source = args[:2]
        _held(target).copy_(_held(source))
        return target
    if func is aten._conj.default:  # a lazy view, whose mark the wrapper would not have
        return _wrapped(aten.conj_physical(args[0].held), {}, args[0].device.index)
    if func is aten._neg_view.default:
        return _wrapped(aten.neg(args[0].held), {}, args[0].device.index)
    device = kwargs.get("device")
    stays = device is None or torch.device(device).type == NAME
    if device is not None and stays:
        kwargs = kwargs | {"device": "cpu"}
    operands = [each for each in _pytree.tree_leaves((args, kwargs)) if isinstance(each, Second)]
    if func in FROM_CPU and not isinstance(args[0], Second):
        raise RuntimeError(f"{func.name()}: a tensor on the {args[0].device.type} is indexed from the second device")
    wrappers = {id(each.held): each for each in operands}
    index = _index_of(func, operands) if device is None else torch.device(device).index or 0
    held_args, held_kwargs = _pytree.tree_map(lambda each: _operand(func, each), (args, kwargs))
    if func is aten.histc.default:  # the CPU's has no whole numbers; a GPU's has
        held_args = (held_args[0].float(), *held_args[1:])
    with torch.utils._python_dispatch._disable_current_modes():
        out = func(*held_args, **held_kwargs)
    if Work._counting is not None:
        Work._counting.second[func.name()] += _multiply_adds(func, held_args, held_kwargs, out)
    return _pytree.tree_map(lambda each: _wrapped(each, wrappers, index), out) if stays else out


def _index_of(func, operands: list[Second]) -> int:
    """Which of the second devices computes."""
    found = {each.device.index for each in operands} or {0}
    if len(found) > 1:
        raise RuntimeError(f"{func.name()}: operands are on several second devices: {sorted(found)}")
    return found.pop()


def _copied(source: torch.Tensor, *, device=None, **options) -> torch.Tensor:
    """`source.to(device, ...)`, which is a copy."""
    goal = source.device if device is None else torch.device(device)
    copy = aten._to_copy.default(_held(source), **options)
    return _wrapped(copy, {}, goal.index or 0) if goal.type == NAME else copy


def _held(each):
    return each.held if isinstance(each, Second) else each


def _operand(func, each):
    """What an operation computes with in place of an argument."""
    if isinstance(each, torch.Tensor) and not isinstance(each, Second) and each.ndim and func not in FROM_CPU:
        raise RuntimeError(f"{func.name()}: an operand is on the {each.device.type}, the others on the second device")
    return _held(each)


def _wrapped(each, wrappers: dict[int, Second], index: int):
    if not isinstance(each, torch.Tensor):
        return each
    if id(each) in wrappers:  # in place
        return wrappers[id(each)]
    if Work._counting is not None:
        Work._counting.born(each, index)
    return Second(each, index)


def _kernel(op):
    return lambda *args, **kwargs: _run(op, args, kwargs)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
torch.accelerator.empty_cache = lambda: None  # which accelerate calls: PyTorch looks for an allocator in C++
_every = torch.library.Library("_", "IMPL")
_every.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
# The fallback is not called where PyTorch has switched off Python's dispatch (torch.tensor, indexing with lists), nor
# by operations that are made of others (arange).
_some = torch.library.Library("aten", "IMPL")
for _name in ("copy_", "_to_copy", "detach", "lift_fresh", "lift", "alias"):
    _some.impl(_name, _kernel(getattr(aten, _name).default), "PrivateUse1")
for _name in ("arange", "randperm", "linspace", "logspace", "eye"):
    for _overload in getattr(aten, _name).overloads():
        if not any(word in _overload for word in ("out", "Tensor", "names")):
            _op = getattr(getattr(aten, _name), _overload)
            _some.impl(_op.name().removeprefix("aten::"), _kernel(_op), "PrivateUse1")

_cpu_generator = torch.Generator


class _Generator(_cpu_generator):
    """A generator that says that it is of the second device. It draws what the CPU's draws."""

    def __new__(cls, device: Any = "cpu"):
        made = _cpu_generator.__new__(cls, "cpu" if torch.device(device).type == NAME else device)
        made.named = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.named


torch.Generator = _Generator
