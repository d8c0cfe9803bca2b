"""Share key/value heads between query heads: MHA → GQA → MQA, from the weights alone or in closed form on a text.

What the methods share is here; each method is a class (`merge_methods.py`, `closed_form_method.py`), listed in
`operation.py`.

Source: Ainslie et al. 2023, "GQA", arXiv 2305.13245 (mean pooling; "first" and "random" are its controls);
Jin et al. 2024, arXiv 2412.20677 (alignment before merging, grouping by similarity).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from surgery.errors import any_of
from surgery.io.printing import count
from surgery.operations.base import (
    NATIVE,
    SURGICAL,
    InWords,
    Measurement,
    PlannedChange,
    Seed,
    WeightRewrite,
)
from surgery.operations.gqa.grouping import similar_order
from surgery.operations.gqa.merge import permute_kv_heads
from surgery.operations.variants import Variants

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer

Heads = Annotated[int, Field(ge=1, strict=True)]
MergeSeed = Annotated[Seed, Field(description="Seed of method: random; the others take it, too.")]


class GQA(Variants, WeightRewrite):
    """Merge the KV heads of each group into one; computed in float64, rounded once."""

    summary: ClassVar[str] = "Share key/value heads between query heads (GQA, MQA)."
    purpose: ClassVar[str] = "cache"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "method: closed_form fits weights to its calibration text (by default half Python's language reference, half "
        "what the model writes itself); text of another kind loses more.",
        "Fewer KV heads save KV-cache memory and decode bandwidth; the FLOPs of prefill do not change.",
        "Perplexity does not show whether the model still copies from its prompt: a recall test does (`surgery eval "
        "OUT --base MODEL --probe needles`). Layers that keep their KV heads (keep_layers, keep_kv) keep more of "
        "that.",
    )

    op: Literal["gqa"] = "gqa"
    kv_heads: Heads | list[Heads] | None = Field(
        description="KV heads after; divides the query heads. A list has a number for each layer (surgical tier). "
        "null: as keep_kv says, or else one, with method: closed_form in the fifth of the layers that loses least "
        "(surgical tier)."
    )
    method: str = Field(
        description="closed_form: what loses least on calibration text, the rest refitted; mean of the group; its "
        "first head; or new random heads of the same scale (a control).",
    )
    align: Literal["none", "procrustes"] = Field(
        "none",
        description="procrustes: turn the heads of a group towards each other first (exact for the base).",
    )
    grouping: Literal["neighbours", "similarity"] = Field(
        "neighbours", description="similarity: reorder the heads so that like ones share a group."
    )

    @property
    def start_only(self) -> bool:
        """The mean of a group, its first head or a random one is where the papers start to train."""
        return True

    @property
    def usual_tier(self) -> str:
        return SURGICAL if isinstance(self.kv_heads, list) and len(set(self.kv_heads)) > 1 else NATIVE

    @classmethod
    def misplaced(cls, keys: list[str]) -> list[tuple[str, str]]:
        by_readers: dict[str, list[str]] = {}
        for key in keys:
            by_readers.setdefault(any_of(cls.readers(key)), []).append(key)
        method = cls.own_method()
        return [
            (some[0], f"{', '.join(some)}: read by method: {readers} alone, not by {method}; drop this")
            for readers, some in by_readers.items()
        ]

    def milder(self) -> str:
        return "method=closed_form"

    def limitations(self) -> tuple[str, ...]:
        return self.LIMITATIONS[self.streams :]

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        if self.align == "none" and self.grouping == "neighbours":
            return ("k", "v")
        return ("q", "k", "v", "o")  # queries and outputs absorb a turn, and move along with their KV head

    def problems(self, anatomy: Anatomy) -> list[str]:
        if not anatomy.alike:
            return ["gqa: the layers of this model have different heads already; start from its base"]
        targets = self.targets(anatomy)
        if len(targets) != len(anatomy.layers):
            return [f"gqa: kv_heads lists {len(targets)} layers, the model has {len(anatomy.layers)}"]
        wanted = targets if isinstance(self.kv_heads, list) else [self.shared_heads]
        problems = [problem for target in dict.fromkeys(wanted) for problem in self._problems(anatomy, target)]
        if len(set(targets)) > 1 and (reason := anatomy.shapes_problem()):
            problems.append(f"gqa: {reason}: give one number of KV heads for all layers")
        return list(dict.fromkeys(problems))

    @property
    def shared_heads(self) -> int:
        """KV heads of a layer that shares them, where all such layers get the same number."""
        return self.kv_heads if isinstance(self.kv_heads, int) else 1

    def targets(self, anatomy: Anatomy) -> list[int]:
        """KV heads after, for each layer; which of them keep their heads is not known yet."""
        return self.kv_heads if isinstance(self.kv_heads, list) else [self.shared_heads] * len(anatomy.layers)

    def candidates(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Numbers of KV heads, other than its own, with which each layer is tried alone: the layer's is measured."""
        return ()

    def problems_of_method(self, anatomy: Anatomy) -> list[str]:
        """Why this method cannot share the heads of such layers."""
        return []

    def notes_of_method(self, anatomy: Anatomy) -> Iterable[str]:
        """What a plan with this method should say."""
        return ()

    def seconds(self, anatomy: Anatomy, shared: int) -> float:
        """Rough time for so many layers that share heads."""
        layer = anatomy.layers[0]
        # Alignment: some 30 rounds of products [d, n] x [n, d] for every head, at 25 GFLOP/s.
        flops = 30 * 4 * layer.kv_heads * layer.head_dim**2 * getattr(anatomy.config, "hidden_size", 0)
        return shared * flops / 25e9 if self.align != "none" else 0.0

    def measurements(self, anatomy: Anatomy, shared: int) -> tuple[Measurement, ...]:
        """What is measured, where so many layers share heads."""
        return ()

    def _problems(self, anatomy: Anatomy, target: int) -> list[str]:
        """Why no layer can have so many KV heads."""
        layer = anatomy.layers[0]
        legal = [g for g in range(1, layer.kv_heads + 1) if layer.heads % g == 0]
        if target not in legal:
            more = "; `expand` repeats heads" if target > layer.kv_heads and layer.heads % target == 0 else ""
            return [
                f"gqa: {layer.kv_heads} KV heads on {layer.heads} query heads cannot become {target}; "
                f"possible: {', '.join(map(str, legal))}{more}"
            ]
        if target == layer.kv_heads:
            return []
        problems = []
        if reason := anatomy.kv_heads_problem(target):
            problems.append(
                f"gqa: {reason}; what would work: a family that honours the number (llama, mistral, qwen2, gemma, "
                "phi, ...); others need code beyond stock Transformers, which this version does not have"
            )
        problems += self.problems_of_method(anatomy)
        if self.align != "none" and layer.positions == "unknown":
            problems.append(
                f"gqa: align: {self.align} must know how RoPE pairs channels, and {anatomy.model_type} is a guess: "
                "use align: none"
            )
        if self.grouping == "similarity" and layer.kv_heads % target:
            problems.append(
                f"gqa: grouping: similarity makes groups of equal size, and {target} does not divide {layer.kv_heads}"
            )
        if self.grouping == "similarity" and layer.positions == "unknown":
            problems.append(
                f"gqa: grouping: similarity reorders heads, and what else follows them in {anatomy.model_type}, "
                "a guess, is not known: use grouping: neighbours"
            )
        if self.grouping == "similarity" and layer.positions == "alibi" and target > 1:
            problems.append(
                "gqa: ALiBi ties slopes to head numbers, so heads cannot be reordered; use grouping: neighbours"
            )
        return problems

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        layer, targets = anatomy.layers[0], self.targets(anatomy)
        if set(targets) == {layer.kv_heads}:
            heads = "is 1 KV head" if layer.kv_heads == 1 else f"are {layer.kv_heads} KV heads"
            return PlannedChange(anatomy, (f"nothing: there {heads} already",))
        how = [self.method.replace("_", " ")] + [
            x for x in (self.align, self.grouping) if x not in ("none", "neighbours")
        ]
        merged = [target for target in targets if target != layer.kv_heads]
        candidates = self.candidates(anatomy)
        lines = tuple(
            f"KV heads {layer.kv_heads} → {target} in {merged.count(target)} layers ({', '.join(how)})"
            for target in sorted(set(merged))
        )
        if len(candidates) > 1:
            numbers, mean = any_of([*map(str, candidates), str(layer.kv_heads)]), sum(targets) / len(targets)
            lines = (f"KV heads {layer.kv_heads} → {numbers} by layer, {mean:.3g} on average ({', '.join(how)})",)
        seconds = self.seconds(anatomy, len(merged))
        after, tier = anatomy.with_kv_heads_by_layer(targets), SURGICAL if len(set(targets)) > 1 else NATIVE
        notes, measurements = tuple(self._notes(anatomy, targets)), self.measurements(anatomy, len(merged))
        return PlannedChange(after, lines, tier, notes, seconds, bool(candidates), measurements=measurements)

    def _notes(self, anatomy: Anatomy, targets: list[int]) -> Iterator[str]:
        layer = anatomy.layers[0]
        if getattr(anatomy.config, "new_decoder_architecture", False) and not layer.layout.interface:
            yield "Falcon repeats KV heads before its cache here; from 5.25 on, Transformers does not, nor do engines"
        for target in sorted({*targets, *self.candidates(anatomy)}):
            if layer.kv_heads % target:
                yield f"{target} does not divide {layer.kv_heads}: some KV heads enter two groups"
        if self.align != "none" and layer.qk_norm:
            yield "keys are not aligned: the QK-norm's weights between projection and RoPE do not commute with a turn"
        yield from self.notes_of_method(anatomy)
        if layer.qk_norm == "whole":
            yield "the key norm spans all heads: its weight is rescaled as white inputs would need it"

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        # Where the numbers were measured, `after` has only their sum.
        counts = [(record.get(layer.path) or {}).get("kv_heads", layer.kv_heads) for layer in after.layers]
        merged = [new for old, new in zip(before.layers, counts, strict=True) if new < old.kv_heads]
        if not merged:
            return None
        old, total = before.layers[0].kv_heads, len(before.layers)
        numbers = " or ".join(map(str, sorted(set(merged))))
        heads, where = count(merged[0], "KV head"), f"In each of its {total} layers"
        if len(set(merged)) > 1:
            heads = f"{numbers} KV heads in {'its' if len(merged) == total else 'some'} layers"
            where = f"In {len(merged)} of its {total} layers" if len(merged) < total else where
        elif len(merged) < total:
            heads, where = f"{heads} in {count(len(merged), 'layer')}", f"In {len(merged)} of its {total} layers"
        how = {"closed_form": ", in closed form on calibration text, without training"}.get(
            self.method, f" (method: {self.method}), without training"
        )
        return InWords(
            f"{heads} (GQA, was {old})",
            f"{where}, {old} KV heads were merged into {numbers}{how}.",
            use="Use it where the KV cache is the limit: many or long sequences at once.",
            avoid="Do not use it where it must copy from its prompt (retrieval, code editing, long chats), unless "
            "recall was measured on this card and kept.",
        )

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict]:
        if target.kv_heads == layer.anatomy.kv_heads:
            return layer, {}
        record = {}
        if self.grouping == "similarity":
            order = self.order(layer, groups=target.kv_heads)
            if order != sorted(order):
                layer, record = permute_kv_heads(layer, order), {"kv_head_order": order}
        return self.merge(layer, target), record

    def merge(self, layer: AttentionLayer, target: LayerAnatomy) -> AttentionLayer:
        """One layer with fewer KV heads, whose groups stand side by side already: what a method must define."""
        raise TypeError(f"method {self.method} of gqa defines no merge")

    def order(self, layer: AttentionLayer, groups: int) -> list[int]:
        """The layer's KV heads in an order in which like ones share a group."""
        return similar_order(layer, groups, self.align == "procrustes", not self.streams)
