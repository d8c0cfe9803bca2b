"""Gradients of what is measured, whatever the script around it has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def with_gradients() -> Iterator[None]:
    """Record gradients, also where a script has turned them off or is in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
