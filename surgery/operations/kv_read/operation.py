"""The operation `kv_read`: its readers, one line each."""

from __future__ import annotations

from surgery.operations.kv_read import methods
from surgery.operations.kv_read.base import KVRead

METHODS = KVRead.union(
    methods.TokenSelectReading,
    methods.LokiReading,
    methods.RecycledReading,
    methods.TreeReading,
    methods.AdaptiveReading,
    methods.IndexReading,
    methods.ThresholdReading,
    methods.RandomReading,
)
