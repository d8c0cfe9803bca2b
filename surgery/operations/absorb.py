"""Decoding from latent vectors: the products of latent attention (MLA) in another order, which is exact.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv 2405.04434, section 2.1.2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from surgery.operations.base import SURGICAL, ApplyContext, InWords, Operation, PlannedChange, give_entries

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

TERM = "way of decoding"


class Absorb(Operation):
    """A decoding step of latent attention reads the vectors in the cache, and makes no keys and values of the past."""

    summary: ClassVar[str] = "Decode from the latent vectors (MLA), exact: no keys and values are made of the past."
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Only decoding is faster, and calls of few tokens behind a long past. Prompts, and weights with an adapter on "
        "kv_b_proj or in a quantised form, are computed as in stock Transformers.",
    )
    term: ClassVar[str | None] = TERM
    on_latent: ClassVar[bool] = True

    op: Literal["absorb"] = "absorb"

    def problems(self, anatomy: Anatomy) -> list[str]:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

        if anatomy.latent is None:
            return ["absorb: this model has no latent attention; put mla before it"]
        if not hasattr(stock.DeepseekV3Attention, "expand_kv"):
            return ["absorb: the installed Transformers makes keys and values before its cache: 5.24 and later do not"]
        count = len(anatomy.layers)
        if any(name.startswith(f"model.layers.{count}.") for name in anatomy.tensors):
            return [
                f"absorb: this folder has a layer {count} that predicts several tokens (MTP). Transformers does not "
                "load it, and the result would lack it: remove it from a copy of the folder first"
            ]
        return []

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        from surgery.runtime.surgery_latent import ABSORBED

        layers = tuple(layer.with_entry(latent=ABSORBED) for layer in anatomy.layers)
        line = f"decoding reads the latent vectors in {len(layers)} layers"
        return PlannedChange(replace(anatomy, layers=layers), (line,), SURGICAL)

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        return InWords(
            "decoding from latent vectors",
            "A decoding step multiplies in another order than stock Transformers, so that it makes no keys and values "
            "of the past. The results are the same.",
            gain="A decoding step reads the vectors of the past as they are.",
        )

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.runtime.surgery_latent import ABSORBED

        layers = [{"num_key_value_heads": 1, "latent": ABSORBED} for _ in context.before.layers]
        give_entries(model, layers, self.op)
        return {}
