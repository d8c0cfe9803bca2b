"""Gradients for measurements, whatever gradient mode the calling script has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def with_gradients() -> Iterator[None]:
    """Record gradients, even if the calling script has disabled them or is in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
