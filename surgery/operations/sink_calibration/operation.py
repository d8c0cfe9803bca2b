"""The operation `sink_calibration`: its methods, one line each."""

from __future__ import annotations

from surgery.operations.sink_calibration.base import SinkCalibration
from surgery.operations.sink_calibration.bias_methods import Act, ZeroTuning
from surgery.operations.sink_calibration.virtual_key_methods import KvBias, Learned

METHODS = SinkCalibration.union(
    ZeroTuning,
    Act,
    Learned,
    KvBias,
)
