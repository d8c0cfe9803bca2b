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


def test_it_says_what_runs_each_operation(monkeypatch):
    import torch

    from surgery.kernels import surgery_triton as common

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "executor", lambda device: asked.append(device) or "Triton 3.9.0, compiled for sm_90")
    monkeypatch.setattr(doctor, "_not_launched", lambda device: [])
    runs = doctor._kernels()
    assert asked == ["cuda"]
    assert runs["sparse_prefill"] == "Triton 3.9.0, compiled for sm_90 (block_sparse_prefill)"
    assert all(said.startswith("PyTorch") for name, said in runs.items() if name != "sparse_prefill")
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch: " in doctor._kernels()["sparse_prefill"]


def test_a_kernel_that_cannot_be_launched_is_said(monkeypatch):
    """As on a GPU machine without a compiler; the launch itself runs here, by PyTorch."""
    import torch

    from surgery.kernels import block_sparse_prefill as module
    from surgery.kernels import surgery_triton as common

    monkeypatch.setattr(common, "_broken", {})
    assert doctor._not_launched("cpu") == []

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(module, "_attend", Broken())
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(module, "supports", lambda query, block: None)
    monkeypatch.setattr(module, "target", lambda device: "interpreter")
    assert len(doctor._not_launched("cpu")) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "executor", lambda device: "Triton")
    monkeypatch.setattr(doctor, "_not_launched", lambda device: ["block_sparse_prefill cuda"])
    assert "PyTorch: it cannot be launched" in doctor._kernels()["sparse_prefill"]
