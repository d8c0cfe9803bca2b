"""Which of the package's Triton kernels computes a call, and where PyTorch does.

    streaming_prefill      heads with sinks + window in a prompt that is longer than the window, and every prompt for
                           which PyTorch would need a mask or write out the softmax: in chunks, with padding, with
                           soft-capped scores, or where a term needs the log-sum-exp
    split_decode           one token from a cache: a full kind of heads and one with sinks + window in one launch, or
                           one kind for which PyTorch would need a mask or write out the softmax
    gathered_heads         a prompt in a layer whose gate turns heads off
    block_sparse_prefill   sparse prefill with lists of blocks
    estimators             the sums by which `pooled` and `xattention` choose blocks, and mean keys for others

`kernel_for` decides by what every kernel needs. A kernel runs on an NVIDIA or AMD GPU in float32, float16 or bfloat16,
for head sizes that its tiles fit (`supports` in each file). Kernels have no backward pass, and torch.compile cannot
trace their launches: PyTorch runs there. `of_prompt` and `of_token` decide by what the call is; the estimators and
sparse prefill ask for their own. kernels/README.md has all of this in a table.

Where a kernel does not compile or cannot be launched, it returns None (`nothing`), and PyTorch computes this call and
all later ones of its kind.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import zip_longest

import torch

from .surgery_config import load_file
from .surgery_stores import KeyValues, Scoring
from .surgery_visibility import HeadKinds

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, slowly, for tests
FEW = 16  # fewer queries than this over all keys: a launch would have too few programs to fill a GPU
_off: ContextVar[bool] = ContextVar("off", default=False)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels run where a tensor is."""
    return tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu")


def nothing() -> None:
    """What a kernel returns where it cannot be launched."""


@contextmanager
def by_pytorch() -> Iterator[None]:
    """Let PyTorch compute everything inside."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def kernel_for(name: str, *tensors: torch.Tensor, plain: bool = False, shape: tuple = ()):
    """The module of the kernel that computes a call, or None where PyTorch does.

    Args:
        name: a kernel's file.
        tensors: what the call reads: queries [batch, heads, n, head_dim], then keys and values, if there are any.
        plain: PyTorch computes the call by one kernel of its own, without a mask.
        shape: what the kernel's `supports` takes after the queries.
    """
    query, *others = tensors
    if plain or not on_gpu(query) or torch.compiler.is_compiling() or _off.get():
        return None
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return None
    if len({each.shape for each in others}) > 1 or any(each.shape[-1] != query.shape[-1] for each in others):
        return None  # keys and values of two sizes
    module = _module(name)
    if module is None or module.said_once(name, module.supports(query, *shape), query.device):
        return None
    return module


@lru_cache
def _module(name: str):
    """The module of a kernel, or None, with a warning, where its file or its imports are missing."""
    try:
        return load_file(f"kernel.{name}")
    except (ValueError, ImportError, OSError) as error:
        warnings.warn(f"PyTorch runs in place of the kernel {name}, which cannot be imported: {error}", stacklevel=2)
        return None


def of_prompt(query, view: KeyValues, scoring: Scoring, with_lse: bool, on) -> tuple | None:
    """Attention of a prompt, or of a chunk of it, to keys in consecutive slots, by a kernel.

    Args:
        query: [batch, heads, n, head_dim].
        with_lse: the log-sum-exp is needed.
        on: bool [batch, n, heads], the rows of full heads that are needed; None: all.

    Returns:
        Output [batch, heads, n, head_dim], log-sum-exp [batch, heads, n], and `on`, or None in its place where all
        rows were computed. None: no kernel is for this call.
    """
    length, visibility = query.shape[2], view.visibility
    full = visibility.window is None
    if not on_gpu(query) or view.ring or view.slots is not None or (length == 1 and full):
        return None
    if torch.is_grad_enabled() and query.requires_grad:  # as `kernel_for` says; before the copies of the next line
        return None
    query, keys, values = query.to(view.values.dtype), view.keys.to(view.values.dtype), view.values  # under autocast
    same = {"pad": scoring.pad, "softcap": scoring.softcap, "fallback": nothing}
    if on is not None and full and (kernel := kernel_for("gathered_heads", query, keys, values)) is not None:
        made = kernel.gathered_heads(query, keys, values, on, scoring.scale, **same)
        if made is not None:
            return *made, on
    window = view.end if full else visibility.window
    simple = not with_lse and scoring.softcap is None
    plain = simple and scoring.mask is None and length == view.end == keys.shape[2] and view.end <= window
    plain |= simple and full and length < min(FEW, view.end)
    if (kernel := kernel_for("streaming_prefill", query, keys, values, plain=plain)) is None:
        return None
    apart = None
    if visibility.sinks and view.start:
        apart = view.sink_keys.to(values.dtype), view.sink_values.to(values.dtype)
    same |= {"first": view.start, "apart": apart, "limit": visibility.limit}
    made = kernel.streaming_prefill(query, keys, values, visibility.sinks, window, scoring.scale, **same)
    return None if made is None else (*made, None)


def of_token(kinds: HeadKinds, query, views: list[KeyValues], scoring: Scoring, with_lse: bool) -> tuple | None:
    """Attention of one token to what the stores of a layer's cache hold, all kinds of heads, by a kernel.

    Args:
        query: [batch, heads, 1, head_dim].
        views: the view of each kind.
        with_lse: as for `of_prompt`.

    Returns:
        Output [batch, heads, 1, head_dim] and log-sum-exp [batch, heads, 1], or None: no kernel is for this call.
    """
    if query.shape[2] != 1 or not on_gpu(query):
        return None
    if not all(view.slots is None and (view.ring or view.visibility.window is None) for view in views):
        return None
    first, groups = views[0], max(kinds.spec[0])
    masked = first.ring and (first.sinks_and_ring is None or first.visibility.limit is not None)
    plain = len(views) == 1 and not with_lse and scoring.mask is None and scoring.softcap is None and not masked
    query = query.to(first.values.dtype)
    kernel = kernel_for("split_decode", query, first.keys, first.values, plain=plain, shape=(groups,))
    if kernel is None:
        return None
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    same = {"pad": scoring.pad, "softcap": scoring.softcap, "out": out, "lse": lse, "fallback": nothing}
    full, rings = ([kind for kind, view in enumerate(views) if view.ring == ring] for ring in (False, True))
    for pair in zip_longest(full, rings):
        table = _table(kernel, kinds, pair, query.device)
        keys, ring = (None if kind is None else views[kind] for kind in pair)
        kept = None if keys is None else (keys.keys.to(query.dtype), keys.values)
        if ring is not None:
            both, seen = ring.store.tensors, ring.visibility
            ring = kernel.Ring(both["keys"].to(query.dtype), both["values"], ring.end, seen.sinks, seen.limit)
        if kernel.split_decode(query, kept, ring, table, scoring.scale, **same) is None:
            return None
    return out, lse


def _table(kernel, kinds: HeadKinds, pair: tuple, device):
    """The kernel's table of the KV heads of two kinds, a full one and a ring, each a number or None; made once."""
    key = *pair, device
    if key not in kinds.tables:
        groups, each = kinds.spec
        kinds.tables[key] = kernel.HeadTable(groups, *([] if kind is None else each[kind][1] for kind in pair), device)
    return kinds.tables[key]
