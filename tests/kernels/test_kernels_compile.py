"""Every shipped tile compiles for GPUs that are not here, fits their shared memory and spills nothing.

In a process of its own: under TRITON_INTERPRET, which the value tests need, nothing can be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Older ones want AMD's linker on the machine, and their interpreter an older numpy.
pytest.importorskip("triton", minversion="3.9")

ROOT = Path(__file__).parents[2]
KERNELS = ("block_sparse_prefill", "streaming_prefill", "split_decode", "gathered_heads", "estimators")
QUICK = "compile_all(dtypes=(torch.float16,), head_dims=(64,))"


def compiled(call: str, before: str = "pass") -> list[dict]:
    code = (
        f"import dataclasses, json, torch; from surgery.kernels.compile import compile_all; {before};"
        f"print(json.dumps([dataclasses.asdict(row) | {{'fits': row.fits}} for row in {call}]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(rows):
    """Limits from the vendors' tables, not from the package: bytes of shared memory a program may have."""
    limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
    for row in rows:
        assert row["fits"], row
        assert row["shared"] <= limits[row["target"]], row
        assert row["stack"] == 0, row
        assert row["spills"] == 0, row
        assert 0 < row["registers"] <= (255 if row["target"].startswith("sm_") else 512), row


def test_half_precision_at_the_demo_models_head_size():
    rows = compiled(QUICK)
    check(rows)
    assert {(row["kernel"], row["target"]) for row in rows} == {
        (kernel, target) for kernel in KERNELS for target in ("sm_80", "sm_90", "gfx942")
    }


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_type_and_head_size(kernel):
    rows = compiled(f"compile_all(kernels=['{kernel}'])")
    check(rows)
    served = {(row["target"], row["dtype"], row["head_dim"]) for row in rows}
    sizes = (64, 128) if kernel == "estimators" else (64, 128, 256)
    everything = {
        (t, d, s) for t in ("sm_80", "sm_90", "gfx942") for d in ("float32", "float16", "bfloat16") for s in sizes
    }
    # float32 heads of 256 are the reference's on NVIDIA
    assert everything - served == {("sm_80", "float32", 256), ("sm_90", "float32", 256)} & everything


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 8])
def test_other_groups_of_models_of_8b(group):
    """Heads of 128 in bfloat16, each KV head read by one query head (Llama 2 7B) or by 8 (after GQA to half of 8)."""
    rows = compiled(f"compile_all(dtypes=(torch.bfloat16,), head_dims=(128,), group={group})")
    check(rows)
    assert {row["kernel"] for row in rows} == set(KERNELS)


def test_a_tile_that_does_not_fit_is_seen():
    """The check itself: a program with a tile far too large is reported, though triton compiles it without a word."""
    before = "from surgery.kernels.surgery_triton import TILES; TILES['hip', 'float32', 128] = (128, 64, 8, 3)"
    what = "targets=['gfx942'], dtypes=[torch.float32], head_dims=[128], kernels=['streaming_prefill']"
    rows = compiled(f"compile_all({what})", before)
    assert rows
    assert not any(row["fits"] for row in rows)
