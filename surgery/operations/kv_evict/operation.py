"""The operation `kv_evict`: its policies, one line each."""

from __future__ import annotations

from surgery.operations.kv_evict import methods
from surgery.operations.kv_evict.base import KVEvict

METHODS = KVEvict.union(
    methods.AttentionEviction,
    methods.CaoteEviction,
    methods.LraEviction,
    methods.LfaEviction,
    methods.TaskEviction,
    methods.NormEviction,
    methods.WindowEviction,
    methods.RandomEviction,
)
