"""Compile every kernel ahead of time and say what it takes: `python -m surgery.kernels.compile`. Needs no GPU.

Triton does not check that a program's shared memory fits the target, nor that registers suffice: the first fails at
launch, the second makes it slow. NVIDIA's figures come from the `cuobjdump` that triton carries, AMD's from the
assembly.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .surgery_triton import INTERPRETED, SHARED, triton
from .trial import KERNELS

TARGETS = ("sm_80", "sm_90", "gfx942")
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
FLOATS = {"factor", "cap"}
GROUP = 4  # query heads of a KV head in Llama 3.1 8B, Qwen3 8B and Mistral 7B; 1 and 8 compile, too (a test)
SPILLS = 16  # AMD's compiler counts single registers: this many, outside of the loop, cost nothing measurable


@dataclass
class Taken:
    """The resources of one compiled kernel.

    Attributes:
        shared: bytes of shared memory that a program takes.
        limit: bytes of shared memory that the target has.
        registers: registers of a thread.
        stack: bytes of local memory.
        spills: registers that did not fit (on AMD; on NVIDIA they show in `stack`).
    """

    kernel: str
    variant: str
    target: str
    dtype: str
    head_dim: int
    shared: int
    limit: int
    registers: int
    stack: int
    spills: int

    @property
    def fits(self) -> bool:
        few = self.stack == 0 if self.target.startswith("sm_") else self.spills <= SPILLS
        return self.shared <= self.limit and few


def compile_all(
    targets=TARGETS, dtypes=tuple(POINTERS), head_dims=(64, 128, 256), kernels=tuple(KERNELS), group=GROUP
):
    """Yield a `Taken` for every kernel, variant, target, dtype and head size.

    Raises:
        RuntimeError: nothing can be compiled, since triton is not installed or interprets (TRITON_INTERPRET).
    """
    if triton is None or INTERPRETED:
        raise RuntimeError("compiling needs triton, in a process without TRITON_INTERPRET")
    for kernel in kernels:
        module = importlib.import_module(f".{kernel}", __package__)
        for name in targets:
            for dtype in dtypes:
                for size in head_dims:
                    for label, variant in module.variants(size, dtype, name, group).items():
                        facts = _take(_compiled(name, *variant), name)
                        kind = str(dtype).removeprefix("torch.")
                        yield Taken(kernel, label, name, kind, size, limit=SHARED[name] * 1024, **facts)


def _compiled(name: str, kernel, types: dict, constants: dict, options: dict):
    """Compile as for contiguous tensors: pointers are aligned, strides of 1 are constants, other strides are not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, known, aligned = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            known[argument] = constants[argument]
        elif argument.endswith("_d"):
            known[argument] = 1
        elif argument in types:
            signature[argument] = POINTERS.get(types[argument], types[argument])
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
            if re.fullmatch("[frs]?[qkvo]_[bhn]", argument):
                aligned[(place,)] = [["tt.divisibility", 16]]
    signature = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    arch = name if name.startswith("gfx") else int(name.removeprefix("sm_"))
    place = GPUTarget("hip", arch, 64) if name.startswith("gfx") else GPUTarget("cuda", arch, 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
    return triton.compile(source, target=place, options=options)


def _take(compiled, name: str) -> dict:
    shared = compiled.metadata.shared
    if name.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        found = {word: int(re.search(rf"\.{word}:\s*(\d+)", text)[1]) for word in (
            "vgpr_count", "vgpr_spill_count", "private_segment_fixed_size",
        )}  # fmt: skip
        return {
            "shared": shared,
            "registers": found["vgpr_count"],
            "stack": found["private_segment_fixed_size"],
            "spills": found["vgpr_spill_count"],
        }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file], check=True, capture_output=True, text=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout + text.stderr))
    return {
        "shared": shared,
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "spills": 0,
    }


def main() -> None:
    """Print the table; exit code 1 if something does not fit."""
    known = [name for name in SHARED if name != "interpreter"]
    parser = argparse.ArgumentParser(prog="python -m surgery.kernels.compile", description=__doc__)
    words = f"of {', '.join(KERNELS)} (default all); targets of {', '.join(known)} (default {', '.join(TARGETS)})"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"kernels {words}")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in (*KERNELS, *known)]:
        parser.error(f"there is no kernel or target {', '.join(unknown)}: kernels {words}")
    kernels = [name for name in names if name in KERNELS] or list(KERNELS)
    targets = [name for name in names if name in known] or TARGETS
    if triton is None or INTERPRETED:
        sys.exit("nothing can be compiled: triton is not installed (extra: kernels), or TRITON_INTERPRET is set")
    print(f"triton {triton.__version__}\n")
    print("| kernel | variant | head | dtype | target | shared KiB (limit) | registers | stack B | spills |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    bad = 0
    for row in compile_all(targets=targets, kernels=kernels):
        bad += not row.fits
        shared = f"{row.shared / 1024:.0f} ({row.limit // 1024})"
        cells = (row.kernel, row.variant, row.head_dim, row.dtype, row.target, shared, row.registers, row.stack)
        print("|", " | ".join(map(str, cells)), f"| {row.spills} |", "" if row.fits else " does not fit", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
