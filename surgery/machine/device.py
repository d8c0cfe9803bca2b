"""The machine's processor and memory: its instructions, free memory, and the peak memory of a block of code.

The peak is the most memory that a block takes in addition to the memory in use before it. On a GPU, PyTorch counts it.
On Linux's CPUs it is the growth of resident memory, from the kernel's high-water mark, which is reset first. Elsewhere
(macOS, Windows, a /proc that is not writable, Apple's GPUs) it is not measured, and is None.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOAD_OVERHEAD = 1.3  # ratio of a loaded model's memory, including activations, to its bytes on disk
BFLOAT16 = ("avx512_bf16", "amx_bf16")
# The last words are those of CUDA's libraries: CUBLAS_STATUS_ALLOC_FAILED, CUSOLVER_..., CUDNN_...
NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory", "_STATUS_ALLOC_FAILED",
)  # fmt: skip


def fast_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers directly. Other CPUs convert them, and are faster in float32.

    On a CPU with avx512_bf16, bfloat16 halved the time for distilling SmolLM2-135M (178 instead of 80 tokens a
    second).
    """
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch lack this
    return any(capabilities.get(name) for name in BFLOAT16)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. PyTorch has an error class for this only on GPUs."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in NO_MEMORY)
    )


@contextmanager
def made_on_cpu() -> Iterator[None]:
    """A block in which tensors are made on the CPU, unless the code in it names a device.

    Scripts may have set another default (torch.set_default_device), which must not apply to our files and
    measurements.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_MARK = "5"  # resets the high-water mark to the current resident memory, see proc(5)


class PeakMemory:
    """A `with` block that measures its peak memory: `bytes` afterwards, None where it cannot be measured.

    First the C library returns freed memory to the system, since the block's use of this memory would not be seen.
    Resident memory belongs to the whole process, so no other work should run in it.
    """

    def __init__(self, device=None):
        self.gpu = device if getattr(device, "type", "cpu") != "cpu" else None
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.gpu is None:
            _give_back()
            self._before = _resident("VmRSS") if _reset_mark() else None
        elif hasattr(module := _module_of(self.gpu), "reset_peak_memory_stats"):  # not that of Apple's GPUs
            module.synchronize(self.gpu)
            module.reset_peak_memory_stats(self.gpu)
            self._before = module.memory_allocated(self.gpu)
        return self

    def __exit__(self, *exception) -> None:
        if self._before is None:
            return
        if self.gpu is not None:
            module = _module_of(self.gpu)
            module.synchronize(self.gpu)
            peak = module.max_memory_allocated(self.gpu)
        else:
            peak = _resident("VmHWM")
        self.bytes = None if peak is None else max(peak - self._before, 0)


def _module_of(device: torch.device) -> Any:
    """PyTorch's module for a kind of GPU: `torch.cuda`, `torch.xpu`, `torch.mps`."""
    import torch

    return torch.get_device_module(device)


def _give_back() -> None:
    """Make glibc return freed memory to the system; other C libraries have no such call."""
    with suppress(OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        ctypes.CDLL(None).malloc_trim(0)


def _reset_mark() -> bool:
    try:
        CLEAR.write_text(RESET_MARK)
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    """VmRSS (current resident memory) or VmHWM (its maximum since the mark was reset), in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def peak_memory() -> int | None:
    """The peak memory of this process since its start, in bytes; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor() -> str:
    """The name of the CPU, as far as the system knows it."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        if names := [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]:
            return names[0]
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of a CPU or GPU, as far as PyTorch and the system know it: "NVIDIA H100 80GB HBM3", "Apple M2"."""
    if device.type == "cpu":
        return processor()
    if device.type == "mps":
        import torch

        return getattr(torch.backends.mps, "get_name", lambda: "mps")()  # older versions of torch lack this
    module = _module_of(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else str(device)


_used: ContextVar[dict[torch.device, None] | None] = ContextVar("used", default=None)


def note_devices_from_now() -> None:
    """Let `note_device` remember the devices of the run that begins, and forget those of a run before it."""
    _used.set({})


def note_device(*devices: torch.device) -> None:
    """Remember that a model of this run is on these devices."""
    if (used := _used.get()) is not None:
        used.update(dict.fromkeys(devices))


def noted_devices() -> list[torch.device]:
    """The devices on which models of this run were, in the order of their first use."""
    return list(_used.get() or ())


def too_big(weights: int, memory: int | None = None, extra: int = 0) -> str:
    """The reason why a model does not fit in memory, "" if it fits.

    Args:
        weights: the model's bytes on disk (0 for a model that is already in memory).
        memory: bytes that may be used; default the free memory.
        extra: bytes needed in addition to the model.
    """
    free = free_memory() if memory is None else memory
    need = int(LOAD_OVERHEAD * weights) + extra
    if free is None or need <= free:
        return ""
    return f"needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def free_memory() -> int | None:
    """Bytes that a process may still take, or None where the system does not report them (all but Linux)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container's limit; it counts the page cache as used, but the page cache can be freed
        group = Path("/sys/fs/cgroup")
        memory_stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(memory_stat["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no container, or "max": no limit
        pass
    return free
