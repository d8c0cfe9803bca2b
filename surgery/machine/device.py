"""What this machine's processor has instructions for."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

BFLOAT16 = ("avx512_bf16", "amx_bf16")


def fast_in_bfloat16() -> bool:
    """Whether this CPU computes products in bfloat16 as they are; others convert, and are slower than in float32.

    Distilling SmolLM2-135M took half the time on a CPU with avx512_bf16 (178 tokens a second in place of 80).
    """
    import torch

    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return any(known.get(name) for name in BFLOAT16)


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
        facts = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(facts[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
