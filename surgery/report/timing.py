"""How long a run took, and on which machine: `timing` in surgery.json.

It differs between any two runs, so no hash of the record covers it, and `check` does not verify it.
"""

from __future__ import annotations

import shlex
from typing import Any

from surgery.io.files import published, published_override, utf8
from surgery.machine import command
from surgery.machine.device import device_name, noted_devices, peak_memory, processor
from surgery.machine.placement import CPU
from surgery.machine.progress import StageClock

KEY = "timing"  # in surgery.json


def timing(clock: StageClock) -> dict[str, Any]:
    """The content of `timing`.

    Returns:
        A dict. seconds: stage -> wall seconds; total_seconds; peak_memory_bytes: of this process since it started
        (None if the system does not report it); device: the names of the GPUs on which models were, else "cpu";
        processor; threads; command: with the names of files and folders but without their paths (None if a script
        ran).
    """
    import torch

    seconds = clock.seconds()
    return {
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "peak_memory_bytes": peak_memory(),
        "device": _used_gpus() or CPU,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "command": _published_command(),
    }


def _used_gpus() -> str:
    """The names of the GPUs on which models of this run were, "" if there were none."""
    return ", ".join(dict.fromkeys(device_name(device) for device in noted_devices() if device.type != CPU))


def _published_command() -> str | None:
    arguments = command.typed.get()
    if arguments is None:
        return None
    return utf8(shlex.join(["surgery", *map(_published_word, arguments)]))


def _published_word(word: str) -> str:
    """A word of the command line: an override, or what may be a path, which can hold "=" too."""
    key = word.partition("=")[0]
    return published_override(word) if "=" in word and not {"/", "\\"} & set(key) else published(word)
