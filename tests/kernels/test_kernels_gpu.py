"""The kernels on a GPU: the interpreter's cases again, tiles of a GPU's size, and what only a GPU can do wrong."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BF16, CASES, FP32, brute, causal, made, ratio, seen_blocks
from kernels_in_models import AUTOCAST, HALF, expected, measured
from kernels_in_models import CASES as MODELS

from surgery.runtime.surgery_estimators import estimator_names

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LIMITS = {"fp64": 1e-12, "fp32": 1e-5, "fp16": 5e-3, "bf16": 1e-2}


@pytest.fixture(autouse=True)
def served():
    from surgery.kernels import surgery_triton as common

    if reason := common.unsupported("cuda", torch.float16, 64):
        pytest.skip(reason)
    common._broken.clear()
    yield
    assert not common.failed(), "PyTorch ran in place of a kernel"


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    found, limit = CASES[name]("cuda"), LIMITS[name.split()[1]]
    assert found.get("out", 0.0) <= limit, found
    assert found.get("lse", 0.0) <= (1e-4 if limit < 5e-3 else 1e-3), found
    assert found.get("holes", 0) == 0, found


@pytest.mark.parametrize("name", MODELS)
def test_a_models_kernels_give_what_pytorch_gives(name, monkeypatch):
    """As under the interpreter: prompt, chunks and decoding of whole models, alone and padded."""
    monkeypatch.setattr("surgery.runtime.surgery_gated_compute.ROWS", 1)
    found = measured(name, "cuda")
    assert found["error"] <= (2e-2 if name in HALF or name in AUTOCAST else 1e-4), found
    assert {way: set(kernels) for way, kernels in found["ways"].items() if way != "lookup"} == expected(name)


@pytest.mark.parametrize("per", ["kv", "head"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_tiles_that_a_gpu_gets(d, per):
    """Blocks of 128, as many rows and keys in a tile as no interpreted case has."""
    from surgery.kernels.block_sparse_prefill import BlockList, block_sparse_prefill

    query = made(1, 1, 6, 700, d, dtype=BF16, device="cuda")
    key, value = (made(i, 1, 2, 1000, d, dtype=BF16, device="cuda") for i in (2, 3))
    kept = torch.rand(1, 2 if per == "kv" else 6, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    out, lse = block_sparse_prefill(query, key, value, BlockList.of(kept.cuda(), 128))
    wanted, wanted_lse = brute(query, key, value, seen_blocks(kept, 6, 128, 700, 1000, None).cuda())
    finite = wanted_lse.isfinite()
    assert ratio(out, wanted) <= 1e-2
    assert (lse[finite] - wanted_lse[finite]).abs().max() <= 1e-3
    assert torch.equal(lse.isneginf(), ~finite)


def test_offsets_beyond_two_to_the_31():
    """A batch row that begins past 2^31 elements is read and written where it is."""
    from surgery.kernels.streaming_prefill import streaming_prefill

    rows, heads, length, d = 5, 16, 2**18, 128
    if torch.cuda.mem_get_info()[0] < 3 * rows * heads * length * d * 2:
        pytest.skip("needs 16 GB of GPU memory")
    query = torch.zeros(rows, heads, 64, d, device="cuda", dtype=BF16)
    key = torch.zeros(rows, heads, length, d, device="cuda", dtype=BF16)
    value = torch.zeros(rows, heads, length, d, device="cuda", dtype=BF16)
    query[-1, -1], key[-1, -1, -64:] = (made(i, 64, d, dtype=BF16, device="cuda") for i in (1, 2))
    value[-1, -1, -64:] = made(3, 64, d, dtype=BF16, device="cuda")
    out, _ = streaming_prefill(query, key, value, 0, 32)
    last = tuple(part[-1:, -1:, -95:] for part in (query, key, value))
    distance = torch.arange(31, 95, device="cuda")[:, None] - torch.arange(95, device="cuda")
    seen = ((distance >= 0) & (distance < 32))[None, None]
    assert ratio(out[-1:, -1:], brute(*last, seen)[0]) <= 1e-2


def test_float32_is_not_tf32():
    from surgery.kernels.streaming_prefill import streaming_prefill

    query, key, value = (made(i, 1, 4, 512, 64, dtype=FP32, device="cuda") for i in (1, 2, 3))
    out, _ = streaming_prefill(query, key, value, 0, 512)
    assert ratio(out, brute(query, key, value, causal(512, 512, None, 1, "cuda"))[0]) <= 1e-5


@pytest.mark.parametrize("method", sorted({*estimator_names()} - {"by_head"}))
def test_the_runtime_on_a_gpu_is_that_on_a_cpu(method):
    """Estimator, lists and attention, in float32."""
    from surgery.runtime.surgery_sparse_prefill import Sparse

    query, key, value = (made(i, 1, heads, 700, 64, dtype=FP32) for i, heads in ((1, 6), (2, 3), (3, 3)))
    sparse = Sparse(method, 64, 128)
    with torch.no_grad():
        want = sparse.attend(query, key, value, None, 0.125, None)[0]
        got = sparse.attend(*(part.cuda() for part in (query, key, value)), None, 0.125, None)[0].cpu()
    assert ratio(got, want) <= 1e-3
