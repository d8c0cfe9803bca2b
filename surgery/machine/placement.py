"""Where a run's models are: on which device, and in which dtype.

A public function sets the placement for its length (`placed`), and whatever loads a model to measure it asks for it
(`run_dtype`, `put`). So an option of the command line reaches all models of a run. A model that a script has loaded
stays where it is.

"auto" takes the GPU with the most free memory, and the CPU if no GPU has enough. A model that is larger than every GPU
is spread over several, or streamed: its layers go to one GPU one at a time (`machine.offload`). A device that is named
must have room for that.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from surgery.errors import MachineError, SettingError, shown
from surgery.machine.device import LOAD_OVERHEAD, is_out_of_memory, made_on_cpu, note_device
from surgery.version import __version__

if TYPE_CHECKING:
    import torch

    from surgery.machine.offload import ModelSizes

AUTO, CPU = "auto", "cpu"
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # name -> bytes of a number
GIB = 2**30
GRADIENTS, PASSES, LAYERS = "gradients", "passes", "layers"
Use = Literal["gradients", "passes", "layers"]
"""What a run does with a model: gradients flow through all layers, texts pass through all, or all texts pass through
one layer before the next. A model that is too large for a GPU is spread over several for the first two, and streamed
for the last; for passes it is streamed where several have no room either."""

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Placement:
    """What a run asks for.

    Attributes:
        device: "auto", or a device of PyTorch: "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto" (that of the stored weights), or a name in `DTYPES`.
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
    device, dtype = str(device), str(dtype).removeprefix("torch.")
    _refuse(device, dtype)
    before = _asked.set(Placement(CPU if device.partition(":")[0] == CPU else device, dtype))
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


def refuse_for_loaded() -> None:
    """Raise where a run has a loaded model, and names a device or a dtype: such a model stays as it is."""
    if current() != Placement():
        raise SettingError(
            "device and dtype are for a name or folder, and this is a loaded model, which stays where it is",
            fix="move it before: model.to(...)",
            code="invalid-argument",
        )


def run_dtype() -> Any:
    """The dtype in which models are loaded: of torch, or "auto"."""
    name = current().dtype
    if name == AUTO:
        return name
    import torch

    return getattr(torch, name)


def put(model: Any, *, use: Use = PASSES, beside: int = 0) -> Any:
    """Move a model that was just loaded to the device of this run, or to several, or layer by layer.

    Args:
        use: what the run does with it, which decides between the last two.
        beside: bytes that the run needs on each device in addition to the model and its activations.

    Raises:
        SurgeryError: a device was named, and the model is quantised.
        MachineError: it does not fit on the device that was named.
    """
    import torch

    from surgery.machine.offload import STREAMED, ModelSizes, StreamedLayers, spread

    if getattr(model, "is_quantized", False):  # its kernels decide where it runs
        if current().device != AUTO and not _of_kind(torch.device(current().device), [model.device]):
            raise _quantised(str(model.device))
        return model
    place = place_for(ModelSizes.of(model), use, beside)
    if place.device.type == CPU:
        return model
    try:
        note_device(*place.devices)
        if place.streamed:
            vars(model)[STREAMED] = StreamedLayers(model, place.device)
            return model
        if place.layers:
            return spread(model, place.device, place.layers)
        return model.to(place.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _full(place.device, str(error).splitlines()[0]) from error


@contextmanager
def measured_in_place(model: Any, *, use: Use = LAYERS, beside: int = 0) -> Iterator[dict[str, str]]:
    """A block that measures and edits a model on the device and in the dtype of this run.

    Afterwards the model is on the CPU, in its own dtype. Weights that the block left as they were have their own bits
    again, also if the run's dtype is narrower. The block gets what is not as on the CPU: "device", "dtype".

    Args:
        use, beside: as for `put`.
    """
    from surgery.machine.offload import end_spreading, end_streaming

    dtype, before = run_dtype(), {}
    quantised = getattr(model, "is_quantized", False)
    if dtype != AUTO and not quantised:  # buffers, such as the frequencies of RoPE, stay as exact as they are
        before = {name: each.data for name, each in model.named_parameters() if each.is_floating_point()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
    try:
        put(model, use=use, beside=beside)
        kind = _device_of(model).type
        yield ({} if kind == CPU else {"device": kind}) | ({"dtype": current().dtype} if before else {})
    finally:
        devices = {each.device for each in model.parameters()}
        end_streaming(model)
        end_spreading(model)
        if not quantised:  # which stays where Transformers put it
            model.to(CPU)
        for device in devices:
            give_back(device)
        if before:
            _restore(model, before, dtype)


def _device_of(model: Any) -> torch.device:
    """The device of a model; of a streamed one, that of what is not a layer."""
    return next(model.parameters()).device


def _restore(model: Any, before: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give parameters of `dtype` the dtype that they had `before`, and the unchanged ones their bits."""
    usual = next(iter(before.values())).dtype
    for name, parameter in model.named_parameters():
        old = before.get(name)
        if old is not None and old.shape == parameter.shape and old.to(parameter.dtype).equal(parameter.data):
            parameter.data = old
        elif parameter.dtype == dtype:  # else an operation chose its dtype
            parameter.data = parameter.data.to(usual if old is None else old.dtype)


@dataclass(frozen=True)
class Place:
    """Where a model runs.

    Attributes:
        device: the device; of a model that is spread, that of all that is not a layer.
        streamed: its layers lie in main memory, and one at a time is on the device (`machine.offload`).
        layers: the device of each layer, if the model is spread over several.
    """

    device: torch.device
    streamed: bool = False
    layers: tuple[torch.device, ...] = ()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices of the model, in the order of their layers."""
        return tuple(dict.fromkeys((self.device, *self.layers)))


def device_for(weights: int) -> torch.device:
    """The device of this run for a model of so many bytes, which is there as a whole; raises as `place_for`."""
    from surgery.machine.offload import ModelSizes

    return place_for(ModelSizes((), weights)).device


def conditions(model: Any = None) -> dict[str, str]:
    """What scores depend on besides settings: this version, device and dtype, of a loaded model or of this run."""
    device, dtype = (device_for(0), current().dtype) if model is None else (model.device, model.dtype)
    return {"surgery": __version__, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}


def place_for(sizes: ModelSizes, use: Use = PASSES, beside: int = 0) -> Place:
    """Where a model runs: on the device of this run as a whole if it fits, else spread or streamed, else on the CPU.

    Args:
        sizes: of the model, which is neither spread nor streamed if its layers are not known.
        use, beside: as for `put`.

    Raises:
        MachineError: it does not fit on the device that was named.
    """
    import torch

    asked = current().device
    if asked == CPU:
        return Place(torch.device(CPU))
    there = accelerators()
    mine = there if asked == AUTO else _of_kind(torch.device(asked), there)
    if (dtype := current().dtype) != AUTO:
        mine = [device for device in mine if _has_room_and(dtype, device)] if asked == AUTO else mine
    free = {device: free_on(device) for device in mine}  # another GPU may be so full that asking it fails
    needs = int(LOAD_OVERHEAD * sizes.whole) + beside
    if fitting := _fitting(free, needs, mine):
        return Place(fitting[0])
    if sizes.layers and use != LAYERS and (spread := _spread(sizes, free, beside)):
        return spread
    streams = bool(sizes.layers) and use != GRADIENTS
    by_layers = int(LOAD_OVERHEAD * sizes.streamed) + beside
    if streams and (fitting := _fitting(free, by_layers, mine)):
        return Place(fitting[0], streamed=True)
    if asked == AUTO:
        return Place(torch.device(CPU))
    words = f"the model needs about {_size(needs)}"
    if streams:
        words += f", or {_size(by_layers)} layer by layer"
    what = f"{words}, and {_size(max(free[device] or 0 for device in mine))} are free"
    free |= {device: free_on(device) for device in there if device not in free}
    exists = [f"{device}: {_size(free[device] or 0)} free" for device in free]
    raise _full(mine[0] if len(mine) == 1 else asked, what, exists, next(map(str, _fitting(free, needs, free)), ""))


def _spread(sizes: ModelSizes, free: dict[torch.device, int | None], beside: int) -> Place | None:
    """A place on as few devices as have room together, two at least; None if all have not.

    The devices' shares of the layers are as their free memory. The one with most also has what is not a layer.
    """
    from surgery.machine.offload import in_turn

    rooms = {device: (room or 0) - beside for device, room in free.items()}
    ordered = sorted(rooms, key=lambda device: -rooms[device])
    if ordered:
        rooms[ordered[0]] -= int(LOAD_OVERHEAD * sizes.rest)
    for count in range(2, len(ordered) + 1):
        chosen = ordered[:count]
        if min(rooms[device] for device in chosen) <= 0:
            break
        layers = in_turn([int(LOAD_OVERHEAD * size) for size in sizes.layers], {d: rooms[d] for d in chosen})
        if layers:
            return Place(ordered[0], layers=layers)
    return None


def refuse_for_training() -> None:
    """Raise where a run names another device than the first of its kind, where the Trainer trains."""
    import torch

    asked = torch.device(CPU if current().device == AUTO else current().device)
    if asked.index:
        raise SettingError(
            f"training goes to the first {asked.type} device that PyTorch sees",
            where=f"--device {asked}",
            fix=f"CUDA_VISIBLE_DEVICES={asked.index} and --device cuda" if asked.type == "cuda" else "--device cpu",
        )


def refuse_for_quantised(config: Any) -> None:
    """Raise where a run names a GPU, and its model will be quantised: Transformers puts it where its kernels are."""
    if current().device not in (AUTO, CPU) and getattr(config, "quantization_config", None):
        raise _quantised("the CPU, or the device of its kernels")


def _quantised(where: str) -> SettingError:
    return SettingError(
        f"this model is quantised, and stays where Transformers put it: {where}",
        where=f"--device {current().device}",
        fix="leave --device out, or name the model before its quantisation",
    )


def _fitting(free: dict[torch.device, int | None], need: int, among: Iterable[torch.device]) -> list[torch.device]:
    """The devices with so many bytes free, or an unknown number; the one with most comes first."""
    fitting = [device for device in among if free[device] is None or free[device] >= need]
    return sorted(fitting, key=lambda device: -(free[device] or 0))


def _of_kind(named: torch.device, devices: Iterable[torch.device]) -> list[torch.device]:
    """Those of these devices that a name means: "cuda" means every GPU, "cuda:1" one."""
    return [device for device in devices if device.type == named.type and named.index in (None, device.index)]


def _full(device: torch.device | str, what: str, exists: list[str] | None = None, other: str = "") -> MachineError:
    narrower = ", or --dtype bfloat16" if current().dtype in ("float32", "float64") else ""
    fix = f"--device {other}" if other else f"--device cpu{narrower}"
    return MachineError(
        f"out of memory on {device}: {what}",
        where="--device",
        exists=", ".join(exists or []),
        fix=fix,
        code="out-of-memory",
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def accelerators() -> list[torch.device]:
    """The GPUs that PyTorch sees."""
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())] if kind else []


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, those included that this process keeps unused; None where PyTorch cannot say."""
    import torch

    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    module = torch.get_device_module(device)
    if (ask := getattr(module, "mem_get_info", None)) is None:
        return None
    try:
        kept = module.memory_reserved(device) - module.memory_allocated(device) if device.type == "cuda" else 0
        return ask(device)[0] + kept
    except RuntimeError as error:  # a full GPU has no room for the process that asks
        if not is_out_of_memory(error):
            raise
        return 0


def give_back(device: torch.device) -> None:
    """Let other processes have the memory of a GPU that this one no longer uses."""
    import torch

    if device.type != CPU and (empty := getattr(torch.get_device_module(device), "empty_cache", None)):
        gc.collect()
        empty()


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64: on its device, or on the CPU where the device has no float64 (Apple's GPUs)."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs do not."""
    return device.type in (CPU, "cuda") or _computes(str(device), "float64")


def _has_room_and(dtype: str, device: torch.device) -> bool:
    """Whether a device computes in a dtype; False for one that is too full for a trial."""
    try:
        return _computes(str(device), dtype)
    except MachineError:
        return False


@functools.lru_cache
def _computes(device: str, dtype: str) -> bool:
    """Whether a device multiplies matrices of this dtype, by a trial."""
    import torch

    try:
        one = torch.ones(2, 2, dtype=getattr(torch, dtype), device=device)
        return bool((one @ one).float().cpu().eq(2).all())
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):  # says nothing about the dtype
            raise _full(torch.device(device), str(error).splitlines()[0]) from error
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
    if dtype == AUTO or device == AUTO:
        return
    if named.type != CPU and named.index is None and len(mine := _of_kind(named, accelerators())) > 1:
        named = next((each for each in mine if _has_room_and(dtype, each)), named)
    if not _computes(str(named), dtype):
        raise MachineError(
            f"{device} does not compute in {dtype}", where="--dtype", fix="--dtype float32, or leave it out"
        )
