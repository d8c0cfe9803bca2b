"""Small launches of each kernel: whether it runs on a machine, where a compiler may be missing or a driver too old."""

from __future__ import annotations

import warnings

import torch

from . import block_sparse_prefill, estimators, gathered_heads, split_decode, streaming_prefill
from .surgery_triton import failed, in_a_line

LENGTH = 64
SHAPES = ((torch.float16, 64), (torch.bfloat16, 128))  # dtype and head size: the demo model's, and those of 8B


def _streaming(query, **more):
    near = query[:, :, 16:]
    sinks = query[:, :, :4], query[:, :, :4]
    streaming_prefill.streaming_prefill(query, query, query, 4, 8, **more)
    return streaming_prefill.streaming_prefill(near[:, :, -8:], near, near, 4, 8, first=16, apart=sinks, **more)


def _decode(query, **more):
    table = split_decode.HeadTable([1, 1], [0, 1], [], query.device)
    return split_decode.split_decode(query[:, :, -1:], (query, query), None, table, piece=32, **more)


def _gathered(query, **more):
    on = torch.ones(1, LENGTH, 2, dtype=torch.bool, device=query.device)
    return gathered_heads.gathered_heads(query, query, query, on, **more)


def _sparse(query, **more):
    blocks = torch.ones(1, 2, 2, 2, dtype=torch.bool, device=query.device)
    lists = block_sparse_prefill.BlockList.of(blocks, LENGTH // 2)
    return block_sparse_prefill.block_sparse_prefill(query, query, query, lists, **more)


def _sums(query, **more):
    means = estimators.block_means(query, 16)
    bias = torch.zeros(1, 1, LENGTH // 16, device=query.device)
    estimators.pooled_mass(query, means, bias, 0.125, 16, LENGTH)
    estimators.pooled_mass(query, means, bias, 0.125, 16, LENGTH, "all")
    return estimators.antidiagonal_mass(query, query, 0.125, 16, 8)


KERNELS = {
    "streaming_prefill": _streaming,
    "split_decode": _decode,
    "gathered_heads": _gathered,
    "block_sparse_prefill": _sparse,
    "estimators": _sums,
}


def fault(name: str, device: str) -> str:
    """The first error of some launches of a kernel; "" if all run.

    They have two heads of each of `SHAPES`, without padding and cap, and with both. What the kernel does not support
    there is PyTorch's, and no error.
    """
    before = set(failed(name))
    for dtype, size in SHAPES:
        for more in ({}, {"pad": torch.ones(1, dtype=torch.long, device=device), "softcap": 5.0}):
            query = torch.zeros(1, 2, LENGTH, size, dtype=dtype, device=device)
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the result names the fault
                    KERNELS[name](query, **more)[0].sum().item()  # waits for the GPU
            except Exception as error:  # a GPU that is full, taken or broken raises errors of many classes
                return in_a_line(error)
    return min(set(failed(name)) - before, default="")
