"""The kernels' values, computed by Triton's interpreter in one process for all cases (kernel_cases.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import BF16, CASES, FP16, FP32

ROOT = Path(__file__).parents[2]
# Errors relative to the root of the mean square. bfloat16 is multiplied in float32 under the interpreter, which also
# cuts where a GPU rounds: its figure says that the kernel handles the type, not how exact a GPU is.
LIMITS = {"fp64": 1e-12, "fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-2}


@pytest.fixture(scope="module")
def measured():
    pytest.importorskip("triton", minversion="3.9", reason="older interpreters want an older numpy")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, ROOT / "tests/support/kernel_cases.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_values(measured, name):
    """Output, log-sum-exp, and that every element is written and none is NaN."""
    found, limit = measured[name], LIMITS[name.split()[1]]
    assert found
    assert found.get("out", 0.0) <= limit, found
    assert found.get("lse", 0.0) <= 1e-5, found
    assert found.get("holes", 0) == 0, found
    assert found.get("bits", 0) == 0, found


def test_shapes_are_many():
    kernels = {name.split()[0] for name in CASES}
    assert {"block_sparse", "streaming", "streaming_apart", "gathered", "decode", "pooled", "antidiagonal"} <= kernels
    assert len(CASES) >= 60
    assert {FP32, FP16, BF16} == {torch.float32, torch.float16, torch.bfloat16}


# --- what needs no triton ---


def shapes(dtype=torch.float32, **given):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return make(2, 4, 20, 16), make(2, 2, 33, 16), make(2, 2, 33, 16)


def block_list(heads=2, block=16):
    """All blocks, for 20 queries at the end of 33 tokens."""
    from surgery.kernels.block_sparse_prefill import BlockList

    columns = -(-33 // block)
    return BlockList.of(torch.ones(2, heads, columns - 13 // block, columns, dtype=torch.bool), block)


def test_everything_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import surgery.kernels, torch\n"
        "from surgery.kernels import surgery_triton as common, compile, bench\n"
        "from surgery.kernels.block_sparse_prefill import *\n"
        "import surgery.kernels.streaming_prefill, surgery.kernels.split_decode, surgery.kernels.gathered_heads\n"
        "import surgery.kernels.estimators\n"
        "q = torch.ones(1, 2, 20, 16)\n"
        "out, lse = block_sparse_prefill(q, q, q, BlockList.of(torch.ones(1, 2, 2, 2, dtype=torch.bool), 16))\n"
        "print(common.unsupported('cuda', torch.float32, 64), '|', float(out.mean()))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "triton is not installed (extra: kernels) | 1.0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": torch.zeros(2, 3, 33, 16)},
        {"value": torch.zeros(2, 2, 32, 16)},
        {"query": torch.zeros(2, 4, 40, 16)},
        {"key": torch.zeros(2, 2, 33, 16, dtype=torch.float64)},
        {"pad": torch.zeros(2)},
        {"pad": torch.zeros(3, dtype=torch.long)},
        {"blocks": 3},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_cannot_be_meant_is_refused(wrong):
    from surgery.kernels.block_sparse_prefill import block_sparse_prefill

    query, key, value = shapes()
    given = {"query": query, "key": key, "value": value, "blocks": block_list()} | wrong
    if given["blocks"] == 3:
        given["blocks"] = block_list(heads=3)
    with pytest.raises(ValueError, match="block_sparse_prefill"):
        block_sparse_prefill(**given)


def test_gradients_are_refused_aloud_and_the_reference_has_them():
    from surgery.kernels.block_sparse_prefill import block_sparse_prefill, reference
    from surgery.kernels.gathered_heads import gathered_heads

    query, key, value = shapes()
    query.requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        block_sparse_prefill(query, key, value, block_list())
    with pytest.raises(ValueError, match="no backward"):
        gathered_heads(query, key, value, torch.ones(2, 20, 4, dtype=torch.bool))
    with torch.no_grad():
        block_sparse_prefill(query, key, value, block_list())
    reference(query, key, value, block_list(), 0.25)[0].sum().backward()
    assert query.grad.isfinite().all()


def test_a_list_of_blocks_goes_there_and_back():
    from surgery.kernels.block_sparse_prefill import BlockList

    kept = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    kept[1, 0] = False
    blocks = BlockList.of(kept, 64)
    assert torch.equal(blocks.kept(7), kept)
    assert len(blocks.ids) == kept.sum()
    with pytest.raises(ValueError, match="bool"):
        BlockList.of(kept.float(), 64)


@pytest.mark.parametrize(
    ("name", "says"),
    [("sm_90", None), ("gfx942", None), ("sm_75", "compiled for sm_75"), ("gfx1100", "compiled for gfx1100")],
)
def test_a_gpu_that_is_not_known_gets_the_reference_and_one_warning(monkeypatch, recwarn, name, says):
    """Asked as if there were a GPU of that name."""
    from surgery.kernels import surgery_triton as common

    monkeypatch.setattr(common, "triton", SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(common, "target", lambda device: name)
    monkeypatch.setattr(common, "_warned", set())
    reason = common.unsupported("cuda", torch.float16, 80)
    assert reason is None if says is None else says in reason
    said = [common.said_once("streaming_prefill", reason, "cuda") for _ in range(3)]
    assert said == [says is not None] * 3
    assert len(recwarn) == (says is not None)


def test_a_kernel_that_cannot_be_launched_gives_way_to_the_reference(monkeypatch, recwarn):
    """The compiler fails as on a GPU machine without one: one warning, right values, no second try."""
    from surgery.kernels import block_sparse_prefill as module
    from surgery.kernels import surgery_triton as common

    tries = []

    class Broken:
        def __getitem__(self, grid):
            tries.append(grid)
            raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(module, "_attend", Broken())
    monkeypatch.setattr(common, "_broken", {})
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(module, "supports", lambda query, block: None)
    monkeypatch.setattr(module, "target", lambda device: "interpreter")
    query, key, value = (torch.randn(1, heads, 40, 16) for heads in (4, 2, 2))
    blocks = module.BlockList.of(torch.ones(1, 2, 3, 3, dtype=torch.bool), 16)
    want = module.reference(query, key, value, blocks, 0.25)
    out, lse = torch.full_like(query, torch.nan), torch.full((1, 4, 40), torch.nan)
    for given in ({}, {"out": out, "lse": lse}):
        got = module.block_sparse_prefill(query, key, value, blocks, 0.25, **given)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert torch.equal(out, want[0])
    mine = torch.ones_like(want[0]), torch.ones_like(want[1])
    got = module.block_sparse_prefill(query, key, value, blocks, 0.25, fallback=lambda: mine)
    assert all(torch.equal(one, other) for one, other in zip(got, mine, strict=True))
    assert common.failed("block_sparse_prefill") == common.failed() != []
    assert len(tries) == 1
    assert [str(each.message).split(": ", 1)[1] for each in recwarn] == [
        "PyTorch runs in place of the kernel: RuntimeError: Failed to find C compiler."
    ]


def test_an_old_triton_gets_the_reference(monkeypatch):
    from surgery.kernels import surgery_triton as common

    monkeypatch.setattr(common, "triton", SimpleNamespace(__version__="3.2.0"))
    assert common.unsupported("cuda", torch.float16, 64) == "triton 3.2.0 is older than 3.3"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "says"),
    [
        (torch.float16, 256, None),
        (torch.float16, 257, "size 257"),
        (torch.float32, 192, "size 192"),
        (torch.float64, 64, "float64"),
    ],
)
def test_what_no_kernel_serves(monkeypatch, dtype, head_dim, says):
    from surgery.kernels import surgery_triton as common

    monkeypatch.setattr(common, "triton", SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(common, "target", lambda device: "sm_80")
    reason = common.unsupported("cuda", dtype, head_dim)
    assert reason is None if says is None else says in reason


def test_a_block_that_no_tile_divides_gets_the_reference():
    from surgery.kernels.block_sparse_prefill import block_sparse_prefill, supports

    query, key, value = shapes()
    assert "multiple of 16" in supports(query, 20)
    out, lse = block_sparse_prefill(query, key, value, block_list(block=20))
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 101376"), False),
    ],
)
def test_a_lack_of_gpu_memory_is_raised(monkeypatch, recwarn, error, raised):
    from surgery.kernels import surgery_triton as common

    monkeypatch.setattr(common, "_broken", {})
    monkeypatch.setattr(common, "INTERPRETED", False)

    def launch():
        raise error

    if raised:
        with pytest.raises(type(error), match="out of memory"):
            common.started("split_decode", "cuda:0", launch)
        assert common.failed() == []
    else:
        assert not common.started("split_decode", "cuda:0", launch)
        assert len(common.failed()) == 1


def test_bench_stops_on_a_gpu_without_kernels(monkeypatch, capsys):
    from surgery.kernels import bench
    from surgery.kernels import surgery_triton as common

    monkeypatch.setattr(sys, "argv", ["bench", "4096"])
    monkeypatch.setattr(common, "triton", SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(common, "target", lambda device: "sm_75")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(bench, "prefill", lambda length, dtype: [("a reference", 1.0, 1.0)])
    monkeypatch.setattr(bench, "decode", lambda length, dtype: [])
    with pytest.raises(SystemExit, match=r"nothing was timed on Tesla T4.* compiled for sm_75 \(known: sm_80"):
        bench.main()
    assert capsys.readouterr().out == ""
