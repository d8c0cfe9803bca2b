"""Where a run's models are: on which device, and in which dtype.

A public function sets the placement for its length (`placed`), and whatever loads a model to measure it asks for it
(`run_dtype`, `put`). So an option of the command line reaches all models of a run. A model that a script has loaded
stays where it is.

"auto" takes the GPU with the most free memory if the model fits there, and the CPU otherwise. A device that is named
must have room for the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from surgery.errors import MachineError, SettingError, shown
from surgery.machine.device import LOAD_OVERHEAD, is_out_of_memory, made_on_cpu

if TYPE_CHECKING:
    import torch

AUTO, CPU = "auto", "cpu"
DTYPES = ("float32", "bfloat16", "float16", "float64")
GIB = 2**30

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Placement:
    """What a run asks for.

    Attributes:
        device: "auto", or a device of PyTorch: "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto" (that of the stored weights), or one of `DTYPES`.
    """

    device: str = AUTO
    dtype: str = AUTO


_asked: ContextVar[Placement | None] = ContextVar("placement", default=None)


def current() -> Placement:
    """What this run asks for."""
    return _asked.get() or Placement()


@contextmanager
def placed_on(device: str = AUTO, dtype: str = AUTO) -> Iterator[None]:
    """A block whose models are loaded on this device and in this dtype.

    Raises:
        SurgeryError: there is no such device or dtype.
        MachineError: this machine has no such device, or the device cannot compute in this dtype.
    """
    _refuse(str(device), dtype)
    before = _asked.set(Placement(str(device), dtype))
    try:
        yield
    finally:
        _asked.reset(before)


def placed(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Let a public function run under its keyword arguments `device` and `dtype`.

    A function inside another one keeps the placement of the outer one, unless it names a device or a dtype itself.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        asked = {name: kwargs[name] for name in ("device", "dtype") if kwargs.get(name, AUTO) != AUTO}
        with made_on_cpu():
            if not asked:
                return function(*args, **kwargs)
            with placed_on(**(vars(current()) | asked)):
                return function(*args, **kwargs)

    return run


def run_dtype() -> Any:
    """The dtype in which models are loaded: of torch, or "auto"."""
    name = current().dtype
    if name == AUTO:
        return name
    import torch

    return getattr(torch, name)


def put(model: Any, *, beside: int = 0) -> Any:
    """Move a model that was just loaded to the device of this run.

    Args:
        beside: bytes that the run needs there in addition to the model and its activations.

    Raises:
        MachineError: it does not fit on the device that was named.
    """
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    device = device_for(weights, beside)
    if device.type == CPU:
        return model
    try:
        return model.to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _full(device, str(error).splitlines()[0]) from error


@contextmanager
def measured_in_place(model: Any) -> Iterator[None]:
    """A block that measures and edits a model on the device and in the dtype of this run.

    Afterwards the model is on the CPU, in its own dtype. Weights that the block left as they were have their own bits
    again, also if the run's dtype is narrower.
    """
    dtype, before = run_dtype(), {}
    if dtype != AUTO:  # buffers, such as the frequencies of RoPE, stay as exact as they are
        before = {name: each.data for name, each in model.named_parameters() if each.is_floating_point()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
    try:
        yield put(model)
    finally:
        model.to(CPU)
        if before:
            _restore(model, before, dtype)


def _restore(model: Any, before: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give parameters of `dtype` the dtype that they had `before`, and the unchanged ones their bits."""
    usual = next(iter(before.values())).dtype
    for name, parameter in model.named_parameters():
        old = before.get(name)
        if old is not None and old.shape == parameter.shape and old.to(parameter.dtype).equal(parameter.data):
            parameter.data = old
        elif parameter.dtype == dtype:  # else an operation chose its dtype
            parameter.data = parameter.data.to(usual if old is None else old.dtype)


def device_for(weights: int, beside: int = 0) -> torch.device:
    """The device of this run for a model of so many bytes; `beside` and errors as for `put`."""
    import torch

    asked, need = current().device, int(LOAD_OVERHEAD * weights) + beside
    if asked == CPU:
        return torch.device(CPU)
    free = {device: free_on(device) for device in accelerators()}
    fitting = [device for device, room in free.items() if room is None or room >= need]
    if asked == AUTO:
        return max(fitting, key=lambda device: free[device] or 0, default=torch.device(CPU))
    named = torch.device(asked)
    same = _of_kind(named, free)
    if found := [device for device in same if device in fitting]:
        return max(found, key=lambda device: free[device] or 0)
    room = max(free[device] or 0 for device in same)
    raise _full(
        same[0] if len(same) == 1 else named,
        f"the model needs about {need / GIB:.1f} GiB, {room / GIB:.1f} GiB are free",
        [f"{device}: {(free[device] or 0) / GIB:.1f} GiB free" for device in free],
        next((str(device) for device in fitting), ""),
    )


def _of_kind(named: torch.device, devices: Iterable[torch.device]) -> list[torch.device]:
    """Those of these devices that a name means: "cuda" means every GPU, "cuda:1" one."""
    return [device for device in devices if device.type == named.type and named.index in (None, device.index)]


def _full(device: torch.device, what: str, exists: list[str] | None = None, other: str = "") -> MachineError:
    fix = f"--device {other}" if other else "--device cpu, or --dtype bfloat16"
    return MachineError(
        f"out of memory on {device}: {what}",
        where="--device",
        exists=", ".join(exists or []),
        fix=fix,
        code="out-of-memory",
    )


def accelerators() -> list[torch.device]:
    """The GPUs that PyTorch sees."""
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())] if kind else []


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None where PyTorch cannot say."""
    import torch

    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if ask is None else ask(device)[0]


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64: on its device, or on the CPU where the device has no float64 (Apple's GPUs)."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs do not."""
    return device.type == CPU or _computes(str(device), "float64")


@functools.lru_cache
def _computes(device: str, dtype: str) -> bool:
    """Whether a device multiplies matrices of this dtype, by a trial."""
    import torch

    try:
        one = torch.ones(2, 2, dtype=getattr(torch, dtype), device=device)
        return bool((one @ one).float().cpu().eq(2).all())
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        return False


def _refuse(device: str, dtype: str) -> None:
    """Raise unless this machine has the device, and the device the dtype."""
    if dtype != AUTO and dtype not in DTYPES:
        exists = ", ".join((AUTO, *DTYPES))
        raise SettingError(f"unknown dtype {shown(dtype)}", where="--dtype", exists=exists)
    if device in (AUTO, CPU) and dtype == AUTO:
        return
    import torch

    try:
        named = torch.device(CPU if device == AUTO else device)
    except RuntimeError:
        exists = "auto, cpu, cuda, cuda:N, mps"
        raise SettingError(f"unknown device {shown(device)}", where="--device", exists=exists) from None
    if named.type != CPU and not _of_kind(named, accelerators()):
        exists = ", ".join(map(str, [CPU, *accelerators()]))
        what = f"PyTorch sees no such device: {device}"
        raise MachineError(what, where="--device", exists=exists, fix="--device auto")
    if dtype != AUTO and device != AUTO and not _computes(str(named), dtype):
        raise MachineError(
            f"{device} does not compute in {dtype}", where="--dtype", fix="--dtype float32, or leave it out"
        )
