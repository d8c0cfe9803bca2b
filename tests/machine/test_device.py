"""What is said of a device: its name, its peak memory, and whether an error means that its memory ran out."""

from __future__ import annotations

import pytest

from surgery.machine.device import is_out_of_memory


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
