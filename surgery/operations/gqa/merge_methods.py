"""Methods of `gqa` that need only the weights: the mean of a group, its first head, random heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from surgery.operations.gqa.base import GQA, MergeSeed
from surgery.operations.gqa.merge import first_head, mean_head, merged, random_heads

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer


class Mean(GQA):
    """Mean of the group's heads (Ainslie et al. 2023)."""

    method: Literal["mean"] = "mean"
    seed: MergeSeed = 0

    def merge(self, layer: AttentionLayer, target: LayerAnatomy) -> AttentionLayer:
        return merged(layer, target, mean_head, aligned=self.align == "procrustes")


class First(GQA):
    """First head of the group (a control)."""

    method: Literal["first"]
    seed: MergeSeed = 0

    def merge(self, layer: AttentionLayer, target: LayerAnatomy) -> AttentionLayer:
        return merged(layer, target, first_head, aligned=self.align == "procrustes")


class Random(GQA):
    """New random heads of the same scale (a control)."""

    method: Literal["random"]
    seed: MergeSeed = 0

    def merge(self, layer: AttentionLayer, target: LayerAnatomy) -> AttentionLayer:
        return layer.replace(anatomy=target, **random_heads(layer, target, self.seed))

    def problems_of_method(self, anatomy: Anatomy) -> list[str]:
        if self.align == "none":
            return []
        return ["gqa: align turns heads towards each other, and method: random keeps none; drop one of them"]
