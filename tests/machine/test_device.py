"""What is said of a device: its name, its peak memory, and whether an error means that its memory ran out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from surgery.evaluation.benchmark.run import machine_name
from surgery.machine.device import PeakMemory, device_name, is_out_of_memory, processor


@pytest.mark.parametrize(
    ("error", "means_it"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory(error, means_it):
    assert is_out_of_memory(error) == means_it


def test_a_device_has_its_own_name(monkeypatch):
    assert device_name(torch.device("cpu")) == processor()
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2", raising=False)
    assert device_name(torch.device("mps")) == "Apple M2"
    assert machine_name(torch.device("mps")) == f"Apple M2, torch {torch.__version__}"
    monkeypatch.delattr(torch.backends.mps, "get_name")
    assert device_name(torch.device("mps")) == "mps"
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"Arc {device.index}")
    assert device_name(torch.device("xpu", 1)) == "Arc 1"
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert device_name(torch.device("xpu", 1)) == "xpu:1"


def test_peak_memory_is_the_devices_own(monkeypatch):
    """Of Apple's GPUs PyTorch knows no peak, and the host's would be another figure."""
    with PeakMemory(torch.device("mps")) as peak:
        pass
    assert peak.bytes is None
    counts = {"memory_allocated": lambda device: 100, "max_memory_allocated": lambda device: 130}
    calls = dict.fromkeys(("synchronize", "reset_peak_memory_stats"), lambda device: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**counts, **calls))
    with PeakMemory(torch.device("xpu", 0)) as peak:
        pass
    assert peak.bytes == 30
