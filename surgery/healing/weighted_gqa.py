"""Weighted GQA: a shared KV head learns the weights of the base's heads that are added to it.

    W_K' = W_K + Σ_h w_h W_K^h        and likewise for V, with its own weights w_h

W_K is the shared head that the conversion made; it is frozen or trains as well. The sum is over the base's heads of
its group. Each head has one weight, or one for each of its channels, or one for each channel of the layer's input. All
w_h begin at 0, so the training starts from the converted model, for every conversion. After the training, W_K' is
folded into a plain weight, which costs nothing.

In the paper's notation the mean of the heads is w_h = 1 / group, and the heads W_K^h train jointly with their weights.
`heal.mixing_heads: train` does this: w_h begin at 1 / group, W_K^h begin at the base's heads, and what the conversion
has beside their mean (nothing, after `method: mean`) stays as it is.

The closed form has no such w_h: it rotates each head's RoPE pairs by individual angles before the sum, takes the best
values of lower rank, and refits both. So its result is W_K here, and the heads that are added are the base's, without
rotation.

Source: Chinnakonduru and Mohapatra 2024, "Weighted Grouped Query Attention in Transformers", arXiv 2407.10855.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.utils import parametrize

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import unpack
from surgery.errors import ModelMismatchError, SettingError, TrainingError, UnsupportedModelError
from surgery.healing.lora import TOLERANCE, logits, random_tokens
from surgery.io.printing import count as counted
from surgery.io.safetensors import Checkpoint
from surgery.operations.gqa.merge import group_members

if TYPE_CHECKING:
    from surgery.architecture.layer import LayerAnatomy
    from surgery.healing.parameters import Table

Per = Literal["head", "channel", "row"]
# A converted layer, the base's layer, and the base's KV heads in each group.
Merge = tuple["LayerAnatomy", "LayerAnatomy", list[list[int]]]
WEIGHTS, HEADS = "surgery_mixing", "surgery_heads"  # the parameters of a mixture
REGROUPING = ("gqa", "expand", "prune_heads")  # operations after which KV heads have other indices than in the base


class Mixing(torch.nn.Module):
    """Adds the weighted heads of each group to a projection's weight or bias; for `torch.nn.utils.parametrize`.

    Args:
        heads: the base's heads, [groups, r, d, n] for a weight, [groups, r, d] for a bias. Checkpoints do not contain
            them, unless they train: then they are the parameter `surgery_heads`.
        weights: w [groups, r, 1 or d] or [groups, r, 1, n], shared by a projection's weight and bias; the parameter
            `surgery_mixing`. A bias has no input channels: its weight is then the mean over n.
        transposed: the weight is stored [in, out] (GPT-2).
        trained: the heads train as well.
    """

    def __init__(
        self, heads: torch.Tensor, weights: torch.nn.Parameter, transposed: bool = False, trained: bool = False
    ):
        super().__init__()
        if trained:
            self.surgery_heads = torch.nn.Parameter(heads.detach().clone())
        else:
            self.register_buffer("surgery_heads", heads.detach().clone(), persistent=False)
        self.surgery_mixing, self.transposed = weights, transposed

    def mixture(self) -> torch.Tensor:
        """Σ_h w_h W^h, in the layout of the weight or bias."""
        heads = self.surgery_heads
        weights = self.surgery_mixing.to(heads)
        if weights.dim() == heads.dim() - 1:
            weights = weights[..., None]
        elif weights.dim() > heads.dim():
            weights = weights.mean(-1)
        mixed = (weights * heads).sum(1).flatten(0, 1)
        return mixed.T if self.transposed else mixed

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        """The weight or bias W' = W + Σ_h w_h W^h, in the shape and dtype of W (`own`)."""
        return own + self.mixture().to(own)


def merges(ours: Anatomy, theirs: Anatomy, orders: list[list[int]] | None = None) -> list[Merge]:
    """The layers with fewer KV heads than in the base, with the base's heads in each group.

    Args:
        ours, theirs: anatomies of the base after GQA, and of the base.
        orders: for each layer, the base's KV heads in the order in which they were grouped; default unchanged order.

    Raises:
        SurgeryError: projections are fused, the model is not the base after GQA, or no layer has fewer KV heads.
    """
    if len(ours.layers) != len(theirs.layers):
        raise ModelMismatchError(f"the model has {len(ours.layers)} layers, the base {len(theirs.layers)}")
    merged = []
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        if mine.layout.qkv:
            raise UnsupportedModelError(
                f"{ours.model_type} has q, k and v in one matrix: its shared heads cannot be mixed yet",
                where="heal.mixing",
                fix="heal.mixing=none: the matrix trains as it is",
            )
        if mine.heads != other.heads or mine.head_dim != other.head_dim or mine.kv_heads > other.kv_heads:
            raise ModelMismatchError(
                f"layer {mine.index} has {mine.heads} query heads on {mine.kv_heads} KV heads, the base {other.heads} "
                f"on {other.kv_heads}: this is not the base after gqa",
                where="heal.mixing",
                fix="heal.mixing=none",
            )
        if mine.kv_heads < other.kv_heads:
            order = orders[mine.index] if orders else list(range(other.kv_heads))
            groups = group_members(other, mine.kv_heads)
            merged.append((mine, other, [[order[head] for head in group] for group in groups]))
    if not merged:
        raise SettingError(
            f"every layer has the base's {counted(ours.layers[0].kv_heads, 'KV head')}: there is nothing to mix",
            where="heal.mixing",
            fix="convert the base with gqa to fewer KV heads, or heal.mixing=none",
        )
    return merged


def mixing_table(merged: list[Merge], per: Per, hidden: int, train_heads: bool = False) -> Table:
    """The parameters that `add_mixing` will add: name -> (dtype, shape).

    Args:
        hidden: width of the layers' input.
    """
    table: Table = {}
    for mine, _, groups in merged:
        size = _size(mine, groups, per, hidden)
        for letter in "kv":
            inside = f"{mine.path}.{getattr(mine.layout, letter)}.parametrizations"
            table[f"{inside}.weight.0.{WEIGHTS}"] = ("F32", size)
            heads = (*size[:2], mine.head_dim)
            table |= {f"{inside}.weight.0.{HEADS}": ("F32", (*heads, hidden))} if train_heads else {}
            table |= {f"{inside}.bias.0.{HEADS}": ("F32", heads)} if train_heads and letter in mine.biases else {}
    return table


def weights_of(table: Table) -> int:
    """How many mixing weights a table of `mixing_table` has, without the heads that train beside them."""
    return sum(prod(shape) for name, (_, shape) in table.items() if name.endswith(WEIGHTS))


def orders_of(operations: Iterable[dict], anatomy: Anatomy) -> list[list[int]] | None:
    """For each layer, the order of heads that `gqa` recorded; None if the order is unchanged.

    Args:
        operations: the operations of a recipe, or those of surgery.json with their records.

    Raises:
        SurgeryError: anything but exactly one `gqa` regrouped the heads.
    """
    regrouping = [step for step in operations if step.get("op") in REGROUPING]
    if [step["op"] for step in regrouping] != ["gqa"]:
        names = ", ".join(step["op"] for step in regrouping) or "none"
        raise SettingError(
            "mixing weights are for KV heads that one gqa has merged",
            where="heal.mixing",
            exists=f"operations that change heads here: {names}",
            fix="heal.mixing=none, or a recipe whose one such operation is gqa",
        )
    record = regrouping[0].get("record") or {}
    orders = [record.get(layer.path, {}).get("kv_head_order") for layer in anatomy.layers]
    if not any(orders):
        return None
    count = max(len(order) for order in orders if order)
    return [order or list(range(count)) for order in orders]


def add_mixing(
    student, base, per: Per = "head", orders: list[list[int]] | None = None, train_heads: bool = False
) -> list[str]:
    """Give the shared K and V heads of a converted model their mixing weights, all 0.

    With `train_heads` a weight begins at 1 / group, and the mean of the base's heads is taken off W, so that W' is as
    before but for rounding.

    Args:
        student: the base after GQA, in memory.
        base: the base in memory, or its folder.
        per: "head": one weight for each head; "channel": one for each channel of a head; "row": one for each channel
            of the layer's input, and head.
        orders: as for `merges`.
        train_heads: the base's heads become parameters.

    Returns:
        The names of the new parameters.

    Raises:
        SurgeryError: as `merges` raises it.
    """
    added, read = set(), _reader(base)
    for mine, other, groups in merges(Anatomy.of(student), Anatomy.of(base), orders):
        module = student.get_submodule(mine.path)
        heads = unpack(other, {name: read(f"{other.path}.{name}") for name in other.tensor_names})
        for letter in "kv":
            projection = module.get_submodule(getattr(mine.layout, letter))
            weight = next(projection.parameters())
            size = _size(mine, groups, per, getattr(heads, letter).shape[-1])
            weights = torch.nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device))
            if train_heads:
                for index, group in enumerate(groups):
                    weights.data[index, : len(group)] = 1 / len(group)
            added.add(id(weights))
            for name, each in (("weight", getattr(heads, letter)), ("bias", getattr(heads, f"{letter}_bias"))):
                if each is not None:
                    transposed = mine.layout.conv1d and name == "weight"
                    mixing = Mixing(_stacked(each, groups).to(weight), weights, transposed, train_heads)
                    if train_heads:
                        added.add(id(mixing.surgery_heads))
                        getattr(projection, name).data -= mixing.mixture().detach()
                    parametrize.register_parametrization(projection, name, mixing)
    return [name for name, p in student.named_parameters() if id(p) in added]


def names_while_mixed(student, names: Iterable[str]) -> tuple[str, ...]:
    """The names of parameters while heads are mixed. A mixed weight is then the `original` of a parametrization."""
    mixed = {(id(projection), name) for projection, name in _mixed(student)}

    def called(name: str) -> str:
        path, _, leaf = name.rpartition(".")
        if (id(student.get_submodule(path)), leaf) in mixed:
            return f"{path}.parametrizations.{leaf}.original"
        return name

    return tuple(map(called, names))


def fold_and_check(student) -> dict:
    """Fold the mixing weights, and check that the logits did not move.

    Returns:
        A record: the number of mixed "weights", the "largest" mixing weight, and "moved_logits", how far the logits of
        random tokens moved.

    Raises:
        TrainingError: the logits moved; checkpoints are kept.
    """
    weights = [p.detach().abs().max().item() for name, p in student.named_parameters() if name.endswith("_mixing")]
    count = sum(p.numel() for name, p in student.named_parameters() if name.endswith("_mixing"))
    tokens = random_tokens(student, student.config.get_text_config().vocab_size)
    before = logits(student, tokens)
    fold(student)
    moved = (logits(student, tokens) - before).abs().max().item()
    if not moved <= TOLERANCE * max(1.0, before.std().item()):
        raise TrainingError(f"folding the mixing weights moved the logits by {moved:.3g}", where="heal.mixing")
    return {"weights": count, "largest": max(weights), "moved_logits": moved}


def fold(student) -> int:
    """Turn mixed weights into plain ones, in place. Returns how many weights were mixed."""
    mixed = list(_mixed(student))
    for projection, name in mixed:
        parametrize.remove_parametrizations(projection, name, leave_parametrized=True)
    return len(mixed)


def unmix(student) -> None:
    """Remove mixing weights without folding them. This restores the weights from before `add_mixing`.

    Where the base's heads train, it does not: the mean that was taken off is missing (see `restore_weights_on_error`).
    """
    for projection, name in list(_mixed(student)):
        parametrize.remove_parametrizations(projection, name, leave_parametrized=False)


def _reader(base) -> Callable[[str], torch.Tensor]:
    return Checkpoint(base).read if isinstance(base, str | Path) else base.get_parameter


def _size(mine: LayerAnatomy, groups: list[list[int]], per: Per, hidden: int) -> tuple[int, ...]:
    """The shape [groups, r, 1 or d] or [groups, r, 1, n] of a layer's mixing weights; r: size of the largest group."""
    shape = {"head": (1,), "channel": (mine.head_dim,), "row": (1, hidden)}[per]
    return len(groups), max(map(len, groups)), *shape


def _stacked(heads: torch.Tensor, members: list[list[int]]) -> torch.Tensor:
    """Heads [G, d, ...] by group, [groups, r, d, ...]; groups with fewer than r heads are padded with zeros."""
    padded = heads.new_zeros(len(members), max(map(len, members)), *heads.shape[1:])
    for index, group in enumerate(members):
        padded[index, : len(group)] = heads[group]
    return padded


def _mixed(student) -> Iterator[tuple[torch.nn.Module, str]]:
    for module in student.modules():
        for name, chain in getattr(module, "parametrizations", {}).items():
            if any(isinstance(each, Mixing) for each in chain):
                yield module, name
