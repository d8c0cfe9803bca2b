"""Repetition of KV heads, which is exact: GQA or MQA becomes MHA, or GQA with more groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from surgery.operations.base import InWords, PlannedChange, WeightRewrite

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer


class Expand(WeightRewrite):
    """Each KV head is copied to the query heads (or groups) that read it: the logits do not change."""

    summary: ClassVar[str] = "Repeat KV heads (GQA → MHA), exact."
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "More KV heads cost KV-cache memory and decode bandwidth. The function computed is the base's.",
    )

    op: Literal["expand"] = "expand"
    kv_heads: int | None = Field(None, ge=1, description="KV heads after; default: one for each query head (MHA).")

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("k", "v")

    def problems(self, anatomy: Anatomy) -> list[str]:
        if not anatomy.alike:
            return ["expand: the layers of this model have different heads; start from its base"]
        layer = anatomy.layers[0]
        target = self.kv_heads or layer.heads
        legal = [g for g in range(layer.kv_heads, layer.heads + 1) if g % layer.kv_heads == 0 and layer.heads % g == 0]
        if target not in legal:
            return [
                f"expand: {layer.kv_heads} KV heads on {layer.heads} query heads cannot become {target}; "
                f"possible: {', '.join(map(str, legal))}"
            ]
        if target != layer.kv_heads and (reason := anatomy.kv_heads_problem(target)):
            return [f"expand: {reason}"]
        return []

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        layer = anatomy.layers[0]
        target = self.kv_heads or layer.heads
        if target == layer.kv_heads:
            return PlannedChange(anatomy, (f"nothing: there are {target} KV heads already",))
        return PlannedChange(
            anatomy.with_kv_heads(target),
            (f"KV heads {layer.kv_heads} → {target} in {len(anatomy.layers)} layers, copies",),
        )

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        old, new = before.layers[0].kv_heads, after.layers[0].kv_heads
        if old == new:
            return None
        return InWords(
            f"{new} KV heads (repeated, was {old})",
            f"Its {old} KV heads were repeated to {new}; it computes what its base computes.",
            use="Use it with an engine that asks for this number of KV heads.",
            avoid="Do not use it otherwise: its cache is larger.",
        )

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict]:
        copies = target.kv_heads // layer.anatomy.kv_heads
        tensors = {name: tensor for name, tensor in layer.tensors().items() if name.startswith(("k", "v"))}
        copied = {name: tensor.repeat_interleave(copies, dim=0) for name, tensor in tensors.items()}
        return layer.replace(anatomy=target, **copied), {}
