"""What this machine has: the instructions of its processor, its free memory, and the peak memory of a block of code.

The peak is the most memory that a block takes beyond what was taken before it. On a GPU it is PyTorch's own count. On
Linux it is the growth of resident memory, from the kernel's high-water mark, which is reset first. Elsewhere (macOS,
Windows, a /proc that may not be written) it is not measured, and None says so.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOAD_OVERHEAD = 1.3  # memory of a loaded model over its bytes on disk, with room for activations
BFLOAT16 = ("avx512_bf16", "amx_bf16")
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")


def fast_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers directly; others convert them and are slower than in float32.

    Distilling SmolLM2-135M took half the time on a CPU with avx512_bf16 (178 tokens a second in place of 80).
    """
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return any(capabilities.get(name) for name in BFLOAT16)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch has a class of its own for that on GPUs alone."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in NO_MEMORY)
    )


@contextmanager
def made_on_cpu() -> Iterator[None]:
    """A block in which tensors are made on the CPU unless their maker says otherwise.

    Scripts may have set another default (torch.set_default_device), which is not meant for what we read and measure.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_MARK = "5"  # see proc(5): the high-water mark becomes what is resident now


class PeakMemory:
    """A `with` block whose peak is in `bytes` afterwards, None where it cannot be measured.

    Freed memory that the C library still holds is given back to the system first, or the block would be seen to take
    less than it does. Resident memory is that of the whole process: nothing else should run in it.
    """

    def __init__(self, device=None):
        self.cuda = device if getattr(device, "type", "cpu") == "cuda" else None
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.cuda is not None:
            import torch

            torch.cuda.synchronize(self.cuda)
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self._before = torch.cuda.memory_allocated(self.cuda)
        else:
            _give_back()
            self._before = _resident("VmRSS") if _reset_mark() else None
        return self

    def __exit__(self, *exception) -> None:
        if self._before is None:
            return
        if self.cuda is not None:
            import torch

            torch.cuda.synchronize(self.cuda)
            peak = torch.cuda.max_memory_allocated(self.cuda)
        else:
            peak = _resident("VmHWM")
        self.bytes = None if peak is None else max(peak - self._before, 0)


def _give_back() -> None:
    """Ask glibc to return freed memory to the system; other C libraries have no such call."""
    with suppress(OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        ctypes.CDLL(None).malloc_trim(0)


def _reset_mark() -> bool:
    try:
        CLEAR.write_text(RESET_MARK)
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    """VmRSS (resident now) or VmHWM (the most since the mark was set back), in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def peak_memory() -> int | None:
    """The most memory that this process has had since it began, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor() -> str:
    """The name of the CPU, as well as the system knows it."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        if names := [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]:
            return names[0]
    return platform.processor() or platform.machine()


def accelerator() -> str:
    """The name of the GPU that PyTorch has computed on; "": none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""


def too_big(weights: int, memory: int | None = None, extra: int = 0) -> str:
    """Explain why a model does not fit in memory; "" where it fits.

    Args:
        weights: its bytes on disk (0 for a model that is in memory already).
        memory: bytes that may be used; default what is free now.
        extra: bytes needed besides the model.
    """
    free = free_memory() if memory is None else memory
    need = int(LOAD_OVERHEAD * weights) + extra
    if free is None or need <= free:
        return ""
    return f"needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def free_memory() -> int | None:
    """Bytes that a process may still take, or None where the system does not say (all but Linux)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container's limit; page cache counts as used there, but can be given back
        group = Path("/sys/fs/cgroup")
        memory_stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(memory_stat["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no container, or "max": no limit
        pass
    return free
