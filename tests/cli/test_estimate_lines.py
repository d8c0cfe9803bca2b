"""What `surgery plan` prints of the device on which a model is measured."""

from __future__ import annotations

import pytest

from surgery.cli.render.estimate import cost
from surgery.conversion.estimate import DeviceUse, Estimate, StageEstimate

BYTES = 20 * 10**9
MEASURING = StageEstimate("measuring", "measure", 60.0, 1e9)


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (DeviceUse("cuda:0", False, BYTES), "cuda:0: about 20.0 GB there"),
        (DeviceUse("cuda:0", True, BYTES), "cuda:0, one layer at a time: about 20.0 GB there"),
        (
            DeviceUse("cuda:1", False, BYTES, ("cuda:1", "cuda:0")),
            "cuda:1 and cuda:0, whole layers on each: about 20.0 GB there",
        ),
    ],
)
def test_the_device_is_named(capsys, use, line):
    cost(Estimate((MEASURING,), 10**9, 10**9, None, use))
    assert f"device:  {line}" in capsys.readouterr().out


def test_the_cpu_is_not(capsys):
    cost(Estimate((MEASURING,), 10**9, 10**9, 2))
    assert "device:" not in capsys.readouterr().out
