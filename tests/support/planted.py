"""Models with heads that are copies of one another."""

from __future__ import annotations

import copy
from functools import cache

import torch
from families import KV, attention_modules, base, get_head, key_norm, kv_heads_of, legal_rotation, orthogonal, set_head

from surgery.architecture.anatomy import Anatomy


@cache
def planted(name: str):
    """The family's model with KV heads that are rotated copies of others: of two in a criss-cross, or of the first."""
    model, generator = copy.deepcopy(base(name)), torch.Generator().manual_seed(3)
    groups = kv_heads_of(model)
    sources = [head % 2 if groups == KV else 0 for head in range(groups)]
    for module, anatomy in zip(attention_modules(model), Anatomy.of(model).layers, strict=True):
        norms = key_norm(model, module)
        for head, source in enumerate(sources):
            if head == source:
                continue
            value = orthogonal(anatomy.head_dim, generator) @ get_head(model, module, "v", source)
            key = get_head(model, module, "k", source)
            if anatomy.qk_norm:  # weights between projection and RoPE do not commute with a rotation
                if norms:
                    norms[head].copy_(norms[source])
            else:
                key = legal_rotation(anatomy, generator) @ key
            set_head(model, module, "v", head, value)
            set_head(model, module, "k", head, key)
    return model
