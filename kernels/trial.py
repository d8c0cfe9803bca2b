"""One small launch of each kernel: whether it runs where a compiler may be missing or a driver too old."""

from __future__ import annotations

import warnings

import torch

from . import block_sparse_prefill, estimators, gathered_heads, split_decode, streaming_prefill
from .surgery_triton import failed, in_a_line

LENGTH, SIZE = 32, 64


def _streaming(query):
    return streaming_prefill.streaming_prefill(query, query, query, 4, 8)


def _decode(query):
    table = split_decode.HeadTable([1, 1], [0, 1], [], query.device)
    return split_decode.split_decode(query[:, :, -1:], (query, query), None, table)


def _gathered(query):
    on = torch.ones(1, LENGTH, 2, dtype=torch.bool, device=query.device)
    return gathered_heads.gathered_heads(query, query, query, on)


def _sparse(query):
    blocks = torch.ones(1, 2, 1, 1, dtype=torch.bool, device=query.device)
    lists = block_sparse_prefill.BlockList.of(blocks, LENGTH)
    return block_sparse_prefill.block_sparse_prefill(query, query, query, lists)


def _sums(query):
    means = estimators.block_means(query, 16)
    bias = torch.zeros(1, 1, 2, device=query.device)
    return (
        estimators.pooled_mass(query, means, bias, 0.125, 16, LENGTH),
        estimators.antidiagonal_mass(query, query, 0.125, 16, 8),
    )


KERNELS = {
    "streaming_prefill": _streaming,
    "split_decode": _decode,
    "gathered_heads": _gathered,
    "block_sparse_prefill": _sparse,
    "estimators": _sums,
}


def fault(name: str, device: str, dtype: torch.dtype = torch.float16) -> str:
    """The error of a launch of a kernel, on two heads of 64 and 32 tokens; "" if it runs.

    Where `supports` gives a reason, PyTorch computes the trial, and there is no fault.
    """
    query = torch.zeros(1, 2, LENGTH, SIZE, dtype=dtype, device=device)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the result names the fault
            KERNELS[name](query)[0].sum().item()  # waits for the GPU
    except Exception as error:  # a GPU that is full, taken or broken raises errors of many classes
        return in_a_line(error)
    return "; ".join(failed(name))
