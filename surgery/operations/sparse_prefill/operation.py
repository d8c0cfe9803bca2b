"""The operation `sparse_prefill`: its methods, one line each."""

from __future__ import annotations

from surgery.operations.sparse_prefill import methods
from surgery.operations.sparse_prefill.base import SparsePrefill
from surgery.operations.sparse_prefill.by_head import ByHead

METHODS = SparsePrefill.union(
    methods.Pooled,
    methods.Streaming,
    methods.TriShape,
    methods.VerticalSlash,
    methods.FlexPrefill,
    methods.XAttention,
    methods.Sampled,
    methods.BlockTopK,
    methods.MaxThreshold,
    methods.Hierarchical,
    ByHead,
)
