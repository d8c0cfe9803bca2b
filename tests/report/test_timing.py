"""`timing` in surgery.json: the device is the one on which the models of the run were."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from surgery import pipeline
from surgery.config.options import RunOptions
from surgery.evaluation import check
from surgery.healing import distributed
from surgery.io.loading import load_for_run
from surgery.machine import placement
from surgery.machine.device import note_device, note_devices_from_now, noted_devices
from surgery.machine.placement import Place
from surgery.machine.progress import StageClock
from surgery.report import timing as module

CARDS = {"cuda:0": "RTX 2080", "cuda:1": "H100", "cuda:2": "H100"}


@pytest.fixture(autouse=True)
def cards(monkeypatch):
    """Three GPUs; the process has computed on the first."""
    devices = [torch.device(name) for name in CARDS]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: CARDS[str(device or "cuda:0")])
    monkeypatch.setattr(placement, "accelerators", lambda: devices)
    note_devices_from_now()


def device() -> str:
    return module.timing(StageClock())["device"]


def test_it_is_the_gpu_of_the_models():
    note_device(torch.device("cpu"))
    assert device() == "cpu", "auto left it there"
    note_device(torch.device("cuda:1"), torch.device("cuda:2"))
    assert device() == "H100"
    note_device(torch.device("cuda:0"))
    assert device() == "H100, RTX 2080"
    note_devices_from_now()
    assert device() == "cpu", "of a new run"


def test_what_runs_a_model_notes_where(model, monkeypatch):
    monkeypatch.setattr(placement, "place_for", lambda *_: Place(torch.device("meta")))
    load_for_run(model)
    assert noted_devices() == [torch.device("meta")]
    monkeypatch.setattr(check, "device_for", lambda weights: torch.device("cuda:2"))
    assert check._place(1)["device"] == "cuda:2"
    monkeypatch.setattr(
        "accelerate.PartialState", lambda **_: SimpleNamespace(device=torch.device("cuda:1"), num_processes=1)
    )
    assert distributed.processes().device.index == 1
    assert [str(each) for each in noted_devices()] == ["meta", "cuda:2", "cuda:1"]


def test_the_record_of_a_run():
    note_device(torch.device("cuda:0"))  # of the run before
    report = SimpleNamespace(data={"gate": {"limits": {}}}, save=lambda: None)
    options = pipeline._timed(RunOptions())
    assert pipeline._close(report, options).data["timing"]["device"] == "cpu"
    note_device(torch.device("cuda:1"))
    assert pipeline._close(report, options).data["timing"]["device"] == "H100"
