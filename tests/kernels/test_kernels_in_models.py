"""Whole models by kernels, under Triton's interpreter (kernels_in_models.py), and where a kernel cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from kernels_in_models import AUTOCAST, CASES, HALF, QUICK, expected, operated, runs

from surgery.runtime import surgery_kernels
from surgery.runtime.surgery_config import FILES

ROOT = Path(__file__).parents[2]
REST = [name for name in CASES if name not in QUICK]
KERNELS = {name.partition(".")[2] for name in FILES if name.startswith("kernel.")}


def interpreted(names) -> dict:
    pytest.importorskip("triton", minversion="3.9", reason="older interpreters want an older numpy")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, ROOT / "tests/support/kernels_in_models.py", *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick():
    return interpreted(QUICK)


@pytest.fixture(scope="module")
def rest():
    return interpreted(REST)


def holds(found: dict, name: str) -> None:
    """Each way launches exactly the kernels of its operation; then PyTorch, which launches none, gives the same."""
    ways = {way: set(kernels) for way, kernels in found["ways"].items()}
    lookup = ways.pop("lookup", None)
    assert ways == expected(name)
    assert found["without"] == []
    assert found["error"] <= (2e-2 if name in HALF or name in AUTOCAST else 5e-6), found["error"]
    by_kernel, by_pytorch = found["work"]
    if "gate" in CASES[name][1]:  # the CPU gathers rows under masks, and multiplies them with more keys
        assert by_kernel.pop("attention") < by_pytorch.pop("attention")
    assert by_kernel == by_pytorch
    if lookup is not None:
        assert CASES[name][2] - {"split_decode"} <= lookup
        assert found["answers"][0] == found["answers"][1] or name in HALF or name in AUTOCAST


@pytest.mark.parametrize("name", QUICK)
def test_a_models_kernels_give_what_pytorch_gives(quick, name):
    """Prompt, chunks and decoding, alone and padded, and two generations."""
    holds(quick[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_the_other_models_kernels_give_what_pytorch_gives(rest, name):
    holds(rest[name], name)


def test_every_kernel_is_a_models():
    """Each one in `FILES` is launched by some case, and each file of the folder is one or serves one."""
    assert set.union(*(CASES[name][2] for name in QUICK)) == KERNELS
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    assert files == KERNELS | {"surgery_triton", "bench", "compile", "trial"}


@pytest.mark.parametrize("name", ["duo", "moh, gamma", "pooled, gamma", "xattention"])
def test_a_kernel_that_cannot_be_launched_gives_way_to_pytorch(name, monkeypatch):
    """As with a card for which it does not compile: one warning for each kernel, and what the rule's PyTorch gives."""
    from surgery.kernels import surgery_triton as common

    family, entry, kernels = CASES[name]
    model = operated(family, entry)
    monkeypatch.setattr("surgery.runtime.surgery_gated_compute.ROWS", 1)
    monkeypatch.setattr("surgery.runtime.surgery_gated_compute.gathered", lambda *given: None)  # the CPU's own
    want, _ = runs(model)
    monkeypatch.setattr(surgery_kernels, "INTERPRETED", True)  # so that the rule says kernels here
    monkeypatch.setattr(common, "_broken", {})

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no code for this card")

    for kernel in kernels:
        module = surgery_kernels._module(kernel)
        monkeypatch.setattr(module, "supports", lambda query, *shape: None)
        monkeypatch.setattr(module, "target", lambda device: "interpreter")
        for function in ("_attend", "_means", "_pooled_lse", "_antidiagonal"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, Broken())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got, ways = runs(model)
        runs(model)
    words = [str(each.message) for each in said]
    assert {word.partition("surgery.kernels.")[2].partition(":")[0] for word in words} == kernels
    assert len(words) == len(kernels)
    assert all("PyTorch runs in place of the kernel: RuntimeError: no code for this card" in word for word in words)
    assert torch.equal(got, want)
    assert not any(ways.values())


@pytest.mark.parametrize("why", ["gradients", "compile", "float64", "two sizes"])
def test_the_rule_says_pytorch(why, monkeypatch):
    monkeypatch.setattr(surgery_kernels, "INTERPRETED", True)
    module = surgery_kernels._module("split_decode")
    monkeypatch.setattr(module, "supports", lambda query: "float64" if query.dtype == torch.float64 else None)
    query, keys, values = (torch.zeros(1, 2, 3, 16) for _ in range(3))
    assert surgery_kernels.kernel_for("split_decode", query, keys, values) is module
    if why == "gradients":
        keys.requires_grad_()
    elif why == "compile":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif why == "float64":
        query = query.double()
    else:
        values = values[..., :8]
    assert surgery_kernels.kernel_for("split_decode", query, keys, values) is None
    with torch.no_grad():
        assert (surgery_kernels.kernel_for("split_decode", query, keys, values) is module) == (why == "gradients")


@pytest.mark.real_process
def test_a_checkpoints_own_kernels_are_called_and_check_names_them(tmp_path, monkeypatch):
    """In a fresh process without this package, by the files of the folder; and with it."""
    pytest.importorskip("triton", minversion="3.9", reason="older interpreters want an older numpy")
    from surgery.evaluation import check

    operated(*CASES["duo"][:2]).save_pretrained(tmp_path / "out")
    job = {"folder": str(tmp_path / "out"), "tokens": [list(range(3, 23))], "generate": 3}
    ways = [job | {"trust": True}, job | {"package": check.PACKAGE}]
    plain = check.load_in_fresh_process(ways[:1])[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = check.load_in_fresh_process(ways)
    for result in found:
        assert "error" not in result, result["error"]
        assert result["kernels"] == {"streaming_prefill": 4, "split_decode": 4}  # a forward and a generation, 2 layers
        assert result["kernel_faults"] == []
        assert result["generated"] == plain["generated"]
        said = {item.name: item.detail for item in check._loading_items(result, "loads")}
        assert said["generates"].endswith(
            "logits finite; attention of these tokens by the kernels split_decode, streaming_prefill"
        )
    assert plain["kernels"] == {}
    assert [item.detail for item in check._loading_items(plain, "loads")][1] == "3 tokens, logits finite"
    on_gpu = plain | {"device": "cuda", "kernel_faults": ["split_decode cuda:0: no compiler"]}
    words = "attention of these tokens by PyTorch; PyTorch in place of a kernel: split_decode cuda:0: no compiler"
    assert check._loading_items(on_gpu, "loads")[1].detail.endswith(words)
