"""Weighted GQA: a shared KV head learns how much of each head of the base is in it, and is a plain weight afterwards.

    W_K' = W_K + Σ_h w_h W_K^h        and the same for V, with weights of their own

W_K is the shared head as the conversion made it, frozen or trained beside; the sum is over the base's heads of its
group. All w_h begin at 0, so the start is the conversion's, whichever it was: the mean (w_h = 1 / group in the paper's
spelling) or the closed form, which no sum of heads gives. A number for each head trains, or one for each of its
channels, and W_K' costs nothing once it is folded.

Source: Chinnakonduru and Mohapatra 2024, "Weighted Grouped Query Attention in Transformers", arXiv 2407.10855.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch.nn.utils import parametrize

from ..anatomy import Anatomy
from ..errors import SurgeryError
from ..layers import unpack
from ..merging import group_members


class Mixing(torch.nn.Module):
    """Adds the weighted heads of each group to a projection's weight or bias; for `torch.nn.utils.parametrize`.

    Args:
        heads: of the base: [groups, r, d, n] for a weight, [groups, r, d] for a bias. They stay out of checkpoints.
        weights: w [groups, r, 1 or d], shared by a projection's weight and bias.
        transposed: the weight is stored [in, out] (GPT-2).
    """

    def __init__(self, heads: torch.Tensor, weights: torch.nn.Parameter, transposed: bool = False):
        super().__init__()
        self.register_buffer("heads", heads.detach().clone(), persistent=False)
        self.weights, self.transposed = weights, transposed

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        weights = self.weights.to(self.heads) if self.heads.dim() == 3 else self.weights[..., None].to(self.heads)
        mixed = (weights * self.heads).sum(1).flatten(0, 1)
        return own + (mixed.T if self.transposed else mixed).to(own)


def add_mixing(
    student, base, per: Literal["head", "channel"] = "head", orders: list[list[int]] | None = None
) -> list[str]:
    """Give the shared K and V heads of a converted model their mixing weights, all 0.

    Args:
        student: the base after GQA, in memory.
        base: in memory, or a copy of its attention weights.
        per: one weight for each head, or one for each of its channels.
        orders: of each layer, the base's KV heads in the order in which they were grouped; default as they stand.

    Returns:
        The names of the new parameters.

    Raises:
        SurgeryError: fused projections; a model that is not the base after GQA.
    """
    ours, theirs = Anatomy.of(student), Anatomy.of(base)
    if len(ours.layers) != len(theirs.layers):
        raise SurgeryError(f"the model has {len(ours.layers)} layers, the base {len(theirs.layers)}")
    added = set()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        if mine.layout.qkv:
            raise SurgeryError(f"{ours.model_type} has q, k and v in one matrix: its shared heads cannot be mixed yet")
        if mine.kv_heads >= other.kv_heads or mine.head_dim != other.head_dim:
            raise SurgeryError(
                f"layer {mine.index} has {mine.kv_heads} KV heads, the base {other.kv_heads}: there is nothing to mix",
                fix="convert the base with gqa first",
            )
        module, of_base = student.get_submodule(mine.path), base.get_submodule(other.path)
        heads = unpack(other, {name: of_base.get_parameter(name) for name in other.tensor_names})
        order = orders[mine.index] if orders else list(range(other.kv_heads))
        members = [[order[head] for head in group] for group in group_members(other, mine.kv_heads)]
        size = max(map(len, members)), mine.head_dim if per == "channel" else 1
        for part in "kv":
            projection = module.get_submodule(getattr(mine.layout, part))
            first = next(projection.parameters())
            weights = torch.nn.Parameter(torch.zeros(len(members), *size, dtype=first.dtype, device=first.device))
            added.add(id(weights))
            for name, each in (("weight", getattr(heads, part)), ("bias", getattr(heads, f"{part}_bias"))):
                if each is not None:
                    transposed = mine.layout.conv1d and name == "weight"
                    mixing = Mixing(_stacked(each, members).to(first), weights, transposed)
                    parametrize.register_parametrization(projection, name, mixing)
    return [name for name, p in student.named_parameters() if id(p) in added]


def fold(student) -> int:
    """Make plain weights of mixed ones, in place; how many were mixed."""
    found = list(_mixed(student))
    for projection, name in found:
        parametrize.remove_parametrizations(projection, name, leave_parametrized=True)
    return len(found)


def _stacked(heads: torch.Tensor, members: list[list[int]]) -> torch.Tensor:
    """Heads [G, d, ...] of each group [groups, r, d, ...]; groups with fewer than r are filled with zeros."""
    room = heads.new_zeros(len(members), max(map(len, members)), *heads.shape[1:])
    for number, group in enumerate(members):
        room[number, : len(group)] = heads[group]
    return room


def _mixed(student) -> Iterator[tuple[torch.nn.Module, str]]:
    for module in student.modules():
        for name, chain in getattr(module, "parametrizations", {}).items():
            if any(isinstance(each, Mixing) for each in chain):
                yield module, name
