"""Models are converted and measured on the run's device: shown on a device that needs no GPU (`second_device`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
NAMES = [
    "gqa", "gqa by means", "mla", "duo_attention", "moh", "mae", "prune_heads", "prune_heads by magnitude",
    "zero_tuning", "act", "learned", "sparse_prefill",
]  # fmt: skip
WITHOUT_TEXT = {"gqa by means", "learned", "sparse_prefill"}  # nothing runs the model


def measured(*arguments: str, **environment: str) -> dict:
    command = [sys.executable, "-P", str(SUPPORT / "on_second_device.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
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


@pytest.fixture(scope="module")
def of_verbs() -> dict:
    """Operation, or "base" -> verb -> what `--device second` did, in one process."""
    return measured("--verbs", *CONVERTED)


CONVERTED = ["gqa", "duo_attention", "moh", "act", "sparse_prefill"]  # of each kind one: all ten would take minutes
VERBS = ["apply", "eval", "needles", "choices"]
CHECKED = ["gqa", "duo_attention"]
OF_BASES = [
    "score far-mass", "score gates", "score fisher", "score ablation", "score induction", "inspect --sinks", "try",
    "lookup", "massive",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "verb"),
    [(name, verb) for name in CONVERTED for verb in VERBS]
    + [(name, "check") for name in CHECKED]
    + [("base", verb) for verb in OF_BASES],
)
def test_a_verb_works_there_and_finds_what_the_cpu_finds(of_verbs, name, verb):
    found = of_verbs[name][verb]
    assert found["difference"] <= 1e-5
    if verb == "apply":
        assert found["peak_bytes"] <= found["planned"]
    if verb == "apply" and name in WITHOUT_TEXT:
        assert not found["multiply_adds"]
    else:
        assert found["multiply_adds"] > 1e5
        assert found["share"] >= 0.95, found["on_cpu"]


def test_no_verb_is_left_out(of_verbs):
    expected = {name: VERBS + ["check"] * (name in CHECKED) for name in CONVERTED} | {"base": OF_BASES}
    assert {name: list(verbs) for name, verbs in of_verbs.items()} == expected


@pytest.mark.parametrize(
    "names", [("moh", "prune_heads by magnitude"), pytest.param(("gqa", "mla"), marks=pytest.mark.slow)]
)
def test_a_model_that_is_too_large_is_streamed(names):
    """Its layers are on the device one at a time, and the weights are the same to the bit."""
    found = measured("--streamed", *names)
    for of_one in found.values():
        assert of_one["passed"]
        assert of_one["difference"] == 0
        assert of_one["share"] >= 0.95, of_one["on_cpu"]
        assert of_one["whole_peak"] > of_one["model"]
        assert of_one["evaluated"]["difference"] <= 1e-5
        assert of_one["evaluated"]["share"] == 1
        assert of_one["evaluated"]["peak_bytes"] < of_one["model"] / 2
        if of_one is not found.get("prune_heads by magnitude"):  # whose plan says no memory of a measurement
            assert of_one["peak_bytes"] <= of_one["planned"]
    if "gqa" in found:
        assert found["gqa"]["peak_bytes"] < 0.75 * found["gqa"]["model"], "refitted weights wait in main memory"
    if "moh" in found:
        assert found["moh"]["peak_bytes"] < found["moh"]["model"] / 3


@pytest.mark.parametrize("use", ["passes", "gradients"])
def test_a_model_is_spread_over_two_devices(use):
    """Passes read texts; what needs gradients has the CPU as its other device, on which half of the work is done."""
    found = measured("--spread", use, SECOND_DEVICE_COUNT="2")
    assert found
    for name, of_one in found.items():
        assert of_one["devices"] == 2, name
        assert of_one["difference"] <= 1e-5, (name, of_one)
        assert of_one["share"] == 1 if use == "passes" else 0.3 < of_one["share"] < 0.7, (name, of_one)
    planned = [of_one["planned"]["device"]["spread"] for of_one in found.values() if "planned" in of_one]
    assert planned == ([] if use == "passes" else 5 * [["second:0", "cpu"]])


NO_FLOAT64 = {"SECOND_DEVICE_NO_FLOAT64": "1"}


def test_a_device_without_float64_gives_the_same_result():
    """What needs float64 is then computed on the CPU; the rest stays there."""
    found = measured("gqa", "moh", "prune_heads", "act", **NO_FLOAT64)
    assert max(of_one["difference"] for of_one in found.values()) <= 1e-5
    assert min(of_one["share"] for of_one in found.values()) > 0.5


@pytest.mark.slow
def test_no_verb_needs_float64_on_the_device():
    found = measured("--verbs", "duo_attention", **NO_FLOAT64)
    assert {name: list(verbs) for name, verbs in found.items()} == {
        "duo_attention": [*VERBS, "check"],
        "base": OF_BASES,
    }
    assert max(of_one["difference"] for verbs in found.values() for of_one in verbs.values()) <= 1e-5


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
    assert work.alive[0] == 4 * (3 * 5 + 2 * 5) - 4 * 3 * 5, "a view keeps the bytes"
assert (work.second.total(), work.cpu.total(), work.peak) == (2 * 3 * 5, 2 * 3 * 4, 100)
assert torch.equal((there.to(torch.complex64) * 1j).conj().imag.cpu(), -x)
"""


def test_the_device_itself():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=SUPPORT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
