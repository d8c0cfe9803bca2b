"""Whether the weight of a projection says what the projection makes."""

from __future__ import annotations

import torch


def is_hooked(module) -> bool:
    """Whether a hook may change what a module makes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_plain(projection) -> bool:
    """Whether a projection is its weight alone: no adapter, no quantisation, and no hook."""
    weight = projection._parameters.get("weight")  # a weight that is computed is no parameter
    plain = type(projection) is torch.nn.Linear and type(weight) is torch.nn.Parameter
    return plain and not is_hooked(projection) and not weight.is_meta
