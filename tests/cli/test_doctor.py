"""`surgery doctor`: it loads checkpoints in both ways, and says what is wrong with an installation."""

from __future__ import annotations

import subprocess
from importlib import metadata

import pytest

from surgery.cli import doctor
from surgery.evaluation import check as checking


def test_doors_are_opened(capfd):
    states = doctor._both_ways()
    assert list(states) == ["native", "surgical, with surgery", "surgical, without it"]
    assert all(state.startswith("works: ") for state in states.values()), states
    assert capfd.readouterr().err == ""


def test_a_door_that_does_not_open(monkeypatch):
    good = {"missing": [], "unexpected": [], "mismatched": [], "finite": True}
    answers = [{"error": "ImportError: no torch"}, good | {"missing": ["a.weight"]}, good | {"finite": False}]
    monkeypatch.setattr(checking, "load_in_fresh_process", lambda jobs, timeout: answers)
    assert doctor._both_ways() == {
        "native": "fails: ImportError: no torch",
        "surgical, with surgery": "fails: the logits hold NaN or infinite values",
        "surgical, without it": "fails: 1 of the weights do not fit, the first is a.weight",
    }


@pytest.mark.real_process
def test_a_process_that_hangs_is_ended(monkeypatch):
    def hangs(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired(args[0], timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert doctor._both_ways()["native"] == "fails: no answer within 180 seconds"


def test_another_package_of_that_name(monkeypatch):
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"surgery": ["attention-surgery"]})
    assert not [problem for problem in doctor._problems() if "import name" in problem]
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"surgery": ["attention-surgery", "surgery"]})
    said = [problem for problem in doctor._problems() if "import name surgery" in problem]
    assert len(said) == 1
    assert "(surgery)" in said[0]
    assert "uninstall both" in said[0]


def test_it_lists_what_device_takes(monkeypatch, capsys):
    """Also an Intel GPU, which PyTorch calls xpu; and a GPU that is too full for a trial of its dtypes."""
    import torch

    from surgery.cli.render.tables import doctor as printed
    from surgery.cli.render.tables import doctor_verdict
    from surgery.errors import MachineError
    from surgery.machine import device as machine
    from surgery.machine import placement

    def computes(name, dtype):
        if name == "xpu:1":
            raise MachineError("out of memory on xpu:1", code="out-of-memory")
        return (name, dtype) not in {("xpu:0", "float64"), ("mps", "float64")}

    gpus = [torch.device("xpu", 0), torch.device("xpu", 1)]
    monkeypatch.setattr(placement, "accelerators", lambda: gpus)
    monkeypatch.setattr(placement, "free_on", lambda device: None if device.index else 3 * 10**9)
    monkeypatch.setattr(placement, "_computes", computes)
    monkeypatch.setattr(machine, "device_name", lambda device: device.type.upper())
    monkeypatch.setattr(machine, "free_memory", lambda: 10**9)
    found = doctor._devices()
    trials = [(each["bfloat16"], each["float64"]) for each in found]
    assert [each["device"] for each in found] == ["cpu", "xpu:0", "xpu:1"]
    assert trials == [(True, True), (True, False), (None, None)]
    monkeypatch.setattr(doctor, "_both_ways", dict)
    monkeypatch.setattr(doctor, "_problems", list)
    report = doctor.examine()
    assert doctor_verdict(report) == "Everything works here. GPU: xpu:0 (XPU), xpu:1 (XPU)."
    assert set(report["kernels"].values()) <= {
        "PyTorch: xpu:0 is no GPU of NVIDIA or AMD",
        "PyTorch: triton is not installed (extra: kernels)",
    }
    printed(report)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "--device cpu (CPU): 1.0 GB free, bfloat16, float64" in lines
    assert "--device xpu:0 (XPU): 3.0 GB free, bfloat16, no float64" in lines
    assert "--device xpu:1 (XPU): free memory unknown, perhaps bfloat16, perhaps float64" in lines
    gpus[:] = [torch.device("mps", 0)]
    assert [(each["device"], each["float64"]) for each in doctor._devices()] == [("cpu", True), ("mps", False)]


def test_it_says_what_runs_each_kernel(monkeypatch):
    import torch

    from surgery.kernels import surgery_triton as common
    from surgery.kernels import trial

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(common, "executor", lambda device: asked.append(device) or "Triton 3.9.0, compiled for sm_90")
    monkeypatch.setattr(trial, "fault", lambda name, device: "no compiler" if name == "split_decode" else "")
    runs = doctor._kernels()
    assert set(asked) == {"cuda:0"}
    assert runs.pop("split_decode") == "PyTorch: it cannot be launched (no compiler)"
    assert set(runs) == {"streaming_prefill", "gathered_heads", "block_sparse_prefill", "estimators"}
    assert set(runs.values()) == {"Triton 3.9.0, compiled for sm_90"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(trial, "fault", lambda name, device: "no compiler" if device == "cuda:1" else "")
    both = "Triton 3.9.0, compiled for sm_90 on cuda:0; PyTorch: it cannot be launched (no compiler) on cuda:1"
    assert set(doctor._kernels().values()) == {both}
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(said.startswith("PyTorch: ") for said in doctor._kernels().values())


BROKEN = {"estimators": "_antidiagonal"} | dict.fromkeys(
    ("streaming_prefill", "split_decode", "gathered_heads", "block_sparse_prefill"), "_attend"
)


@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_that_cannot_be_launched_is_said(monkeypatch, name):
    """As on a GPU machine without a compiler; the launch itself runs here, by PyTorch."""
    import importlib

    from surgery.kernels import surgery_triton as common
    from surgery.kernels import trial

    module = importlib.import_module(f"surgery.kernels.{name}")
    monkeypatch.setattr(common, "_broken", {})
    assert trial.fault(name, "cpu") == ""

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.")

    class Works:
        def __getitem__(self, grid):
            return lambda *given, **more: None

    for function in ("_attend", "_means", "_pooled_lse", "_pooled_sum", "_antidiagonal"):
        if hasattr(module, function) and function != BROKEN[name]:
            monkeypatch.setattr(module, function, Works())
    monkeypatch.setattr(module, BROKEN[name], Broken())

    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(module, "supports", lambda query, *more: None)
    monkeypatch.setattr(module, "target", lambda device: "interpreter")
    assert "RuntimeError: Failed to find C compiler." in trial.fault(name, "cpu")
