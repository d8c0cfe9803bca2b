"""Gradients for measurements, whatever gradient mode the calling script has set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


@contextmanager
def with_gradients() -> Iterator[None]:
    """Record gradients, even if the calling script has disabled them or is in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def recomputed(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Compute the activations of these layers again in the backward pass, which must lie in the context as well.

    Memory then holds the inputs of all layers and the activations of one.
    """
    own = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer, _ in own:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in own:
            del layer.forward
            if forward is not None:
                layer.forward = forward
