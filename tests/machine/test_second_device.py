"""A loaded model is converted on the device where it lies: shown on a device that needs no GPU (`second_device`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
NAMES = [
    "gqa", "gqa by means", "duo_attention", "moh", "mae", "prune_heads", "zero_tuning", "act", "learned",
    "sparse_prefill",
]  # fmt: skip
WITHOUT_TEXT = {"gqa by means", "learned", "sparse_prefill"}  # nothing runs the model


def measured(*arguments: str) -> dict:
    command = [sys.executable, "-P", str(SUPPORT / "on_second_device.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def converted() -> dict:
    """Operation -> what it did on the second device, in one process."""
    found = measured()
    assert sorted(found) == sorted(NAMES)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_that_of_the_cpu(converted, name):
    assert converted[name]["difference"] <= 1e-5
    assert converted[name]["devices"] == ["second"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_TEXT])
def test_the_work_is_done_there(converted, name):
    found = converted[name]
    assert found["multiply_adds"] > 1e7
    assert found["share"] >= 0.95, found["on_cpu"]


def test_work_on_the_cpu_is_seen():
    """The check above fails where a part of an operation moves its tensors to the CPU."""
    found = measured("--router-on-cpu", "moh")["moh"]
    assert found["difference"] <= 1e-5
    assert found["share"] < 0.95
    assert found["on_cpu"]["aten::addmm_"] > 0


SCRIPT = """
import torch
from second_device import NAME, Work
x = torch.arange(6.0).view(2, 3)
there = x.to(NAME)
for mixed in (lambda: there + x, lambda: x @ there.T, lambda: torch.cat([there, x])):
    try:
        mixed()
    except RuntimeError as error:
        assert "an operand is on the cpu" in str(error), error
    else:
        raise SystemExit("tensors of two devices were mixed")
assert (there * torch.tensor(2.0)).tolist() == (2 * x).tolist(), "a number may come from the CPU"
with Work() as work:
    made = there @ torch.ones(3, 5, device=NAME)
    _ = x @ torch.ones(3, 4)
    view = made[:1]
    del made
    assert work.alive == 4 * (3 * 5 + 2 * 5) - 4 * 3 * 5, "a view keeps the bytes"
assert (work.second.total(), work.cpu.total(), work.peak) == (2 * 3 * 5, 2 * 3 * 4, 100)
assert torch.equal((there.to(torch.complex64) * 1j).conj().imag.cpu(), -x)
"""


def test_the_device_itself():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=SUPPORT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
