"""Share key/value heads between query heads: MHA → GQA → MQA, from the weights alone or in closed form on a text.

Source: Ainslie et al. 2023, "GQA", arXiv 2305.13245 (mean pooling; "first" and "random" are its controls);
Jin et al. 2024, arXiv 2412.20677 (alignment before merging, grouping by similarity). The closed form is ours: see
`closed_form.py`, `score_fit.py` and `calibration/shared_model.py`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from surgery.data.text import written_samples
from surgery.operations.base import NATIVE, SURGICAL, ApplyContext, PlannedChange, WeightRewrite
from surgery.operations.gqa.cost import TRIED, Calibration
from surgery.operations.gqa.grouping import similar_order
from surgery.operations.gqa.merge import first_head, mean_head, merged, permute_kv_heads, random_heads

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer


Heads = Annotated[int, Field(ge=1, strict=True)]
OF_CLOSED_FORM = (
    *("keep_layers", "refit", "sequential", "ridge"),
    *("calibration_samples", "calibration_length", "calibration_text"),
)
FLOPS = 91e9  # a second, in float32: SmolLM2-135M and 28 pieces took five minutes on two slow cores


class GQA(WeightRewrite):
    """Merge the KV heads of each group into one; computed in float64, rounded once."""

    summary: ClassVar[str] = "Share key/value heads between query heads (GQA, MQA)."
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "method: closed_form fits weights to its calibration text (by default half Python's language reference, half "
        "what the model writes itself); text of another kind loses more.",
        "Fewer KV heads save KV-cache memory and decode bandwidth; the FLOPs of prefill do not change.",
        "Perplexity does not show whether the model still copies from its prompt: `surgery eval --needles` does, and "
        "layers that keep their KV heads (keep_layers) keep more of that.",
    )

    op: Literal["gqa"] = "gqa"
    kv_heads: Heads | list[Heads] = Field(
        description="KV heads after; divides the query heads. A list has a number for each layer (surgical tier)."
    )
    method: Literal["closed_form", "mean", "first", "random"] = Field(
        "mean",
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
    keep_layers: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="closed_form: share of the layers that keep their KV heads, those where sharing costs most on the "
        "calibration text (surgical tier).",
    )
    seed: int = Field(0, ge=0, strict=True, description="Seed of method: random.")
    refit: list[Literal["q", "k", "v", "o", "mlp"]] = Field(
        ["q", "k", "v", "o", "mlp"],
        description="closed_form: projections that are refitted after the merge: those of attention to the base's "
        "attention; the MLP's output (mlp) to the base's states behind each layer.",
    )
    sequential: bool = Field(
        False, description="closed_form: attention is fitted to what the converted layers give it, not the base's."
    )
    ridge: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        "auto",
        description="closed_form: pull of output projections to what they were, relative to their inputs' energy; "
        "auto: of each layer what is best on text held back.",
    )
    calibration_samples: int = Field(
        28, ge=2, strict=True, description="closed_form: pieces of text; a sixth is held back. More, to 40, lose less."
    )
    calibration_length: int = Field(512, ge=8, strict=True, description="Tokens in a piece.")
    calibration_text: str = Field(
        "mixed",
        description="builtin (the calibration part of Python's language reference), self (what the model writes), "
        "mixed (half of each), or a UTF-8 text file.",
    )

    def limitations(self) -> tuple[str, ...]:
        return self.LIMITATIONS[self.streams :]

    @property
    def streams(self) -> bool:
        return self.method != "closed_form"

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        absorbs = self.method == "closed_form" or self.align != "none"  # by queries and outputs
        return ("q", "k", "v", "o") if absorbs else ("k", "v")

    def problems(self, anatomy: Anatomy) -> list[str]:
        if not anatomy.alike:
            return ["gqa: the layers of this model have different heads already; start from its base"]
        targets = self._targets(anatomy)
        if len(targets) != len(anatomy.layers):
            return [f"gqa: kv_heads lists {len(targets)} layers, the model has {len(anatomy.layers)}"]
        asked = targets if isinstance(self.kv_heads, list) else [self.kv_heads]
        found = [problem for target in dict.fromkeys(asked) for problem in self._problems(anatomy, target)]
        if len(set(targets)) > 1 and (reason := anatomy.shapes_problem()):
            found.append(f"gqa: {reason}: give one number of KV heads for all layers")
        if self.keep_layers and isinstance(self.kv_heads, list):
            found.append("gqa: kv_heads lists what each layer gets: drop keep_layers, or give kv_heads one number")
        elif self.keep_layers and (kept := self._kept(anatomy)) in (0, len(targets)):
            share = "none" if kept == 0 else "all"
            found.append(
                f"gqa: keep_layers: {self.keep_layers} of {len(targets)} layers is {share} of them; 0 keeps none"
            )
        fields = type(self).model_fields
        given = [name for name in OF_CLOSED_FORM if getattr(self, name) != fields[name].get_default()]
        if given and self.method != "closed_form":
            found.append(
                f"gqa: {', '.join(given)}: read by method: closed_form alone, not by {self.method}; drop this"
            )
        return list(dict.fromkeys(found))

    def _targets(self, anatomy: Anatomy) -> list[int]:
        """KV heads after, for each layer; which of them keep their heads (`keep_layers`) is not known yet."""
        if isinstance(self.kv_heads, list):
            return self.kv_heads
        kept, heads = self._kept(anatomy), [layer.kv_heads for layer in anatomy.layers]
        return heads[:kept] + [self.kv_heads] * (len(heads) - kept)

    def _kept(self, anatomy: Anatomy) -> int:
        """How many layers keep their KV heads by `keep_layers`."""
        return int(self.keep_layers * len(anatomy.layers) + 0.5)

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
        found = []
        if reason := anatomy.kv_heads_problem(target):
            found.append(
                f"gqa: {reason}; what would work: a family that honours the number (llama, mistral, qwen2, gemma, "
                "phi, ...); others need code beyond stock Transformers, which this version does not have"
            )
        if self.method == "closed_form":
            found += [f"gqa: method: closed_form: {reason}" for reason in self._problems_of_closed_form(anatomy)]
        if self.method == "random" and self.align != "none":
            found.append("gqa: align turns heads towards each other, and method: random keeps none; drop one of them")
        if self.align != "none" and layer.positions == "unknown":
            found.append(
                f"gqa: align: {self.align} must know how RoPE pairs channels, and {anatomy.model_type} is a guess: "
                "use align: none"
            )
        if self.grouping == "similarity" and layer.kv_heads % target:
            found.append(
                f"gqa: grouping: similarity makes groups of equal size, and {target} does not divide {layer.kv_heads}"
            )
        if self.grouping == "similarity" and layer.positions == "unknown":
            found.append(
                f"gqa: grouping: similarity reorders heads, and what else follows them in {anatomy.model_type}, "
                "a guess, is not known: use grouping: neighbours"
            )
        if self.grouping == "similarity" and layer.positions == "alibi" and target > 1:
            found.append(
                "gqa: ALiBi ties slopes to head numbers, so heads cannot be reordered; use grouping: neighbours"
            )
        return found

    def _problems_of_closed_form(self, anatomy: Anatomy):
        if reason := anatomy.runtime_problem():
            yield f"{reason}, and it must be measured: use method: mean"
        if anatomy.layers[0].qk_norm == "whole":
            yield f"the QK-norm of {anatomy.model_type} spans all heads: use method: mean"
        if self.align != "none":
            yield "it aligns heads by what they say on text: drop align"
        if len(set(self.refit)) < len(self.refit):
            yield f"refit names a projection twice: {', '.join(self.refit)}"

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        layer, targets = anatomy.layers[0], self._targets(anatomy)
        if set(targets) == {layer.kv_heads}:
            return PlannedChange(anatomy, (f"nothing: there are {layer.kv_heads} KV heads already",))
        how = [self.method.replace("_", " ")] + [
            x for x in (self.align, self.grouping) if x not in ("none", "neighbours")
        ]
        merged = [target for target in targets if target != layer.kv_heads]
        lines = tuple(
            f"KV heads {layer.kv_heads} → {target} in {merged.count(target)} layers ({', '.join(how)})"
            for target in sorted(set(merged))
        )
        # Alignment: some 30 rounds of products [d, n] x [n, d] for every head, at 25 GFLOP/s.
        flops = 30 * 4 * layer.kv_heads * layer.head_dim**2 * getattr(anatomy.config, "hidden_size", 0)
        seconds = len(merged) * flops / 25e9 if self.align != "none" else 0.0
        if self.method == "closed_form":
            fitted = len(targets) if self._kept(anatomy) else len(merged)
            seconds = self._calibration(anatomy).flops(anatomy, fitted) / FLOPS
        after, tier = anatomy.with_kv_heads_by_layer(targets), SURGICAL if len(set(targets)) > 1 else NATIVE
        measured = self._kept(anatomy) > 0
        return PlannedChange(after, lines, tier, tuple(self._notes(anatomy, targets)), seconds, measured)

    def _notes(self, anatomy: Anatomy, targets: list[int]):
        layer = anatomy.layers[0]
        if getattr(anatomy.config, "new_decoder_architecture", False):
            yield "Transformers' Falcon repeats KV heads before its cache: only engines that do not cache fewer bytes"
        for target in sorted(set(targets)):
            if layer.kv_heads % target:
                yield f"{target} does not divide {layer.kv_heads}: some KV heads enter two groups"
        if self.align != "none" and layer.qk_norm:
            yield "keys are not aligned: the QK-norm's weights between projection and RoPE do not commute with a turn"
        if self.method == "closed_form":
            yield from self._closed_form_notes(anatomy)
        if layer.qk_norm == "whole":
            yield "the key norm spans all heads: its weight is rescaled as white inputs would need it"

    def _calibration(self, anatomy: Anatomy) -> Calibration:
        of_scores = len({"q", "k"} & set(self.refit)) if not anatomy.layers[0].qk_norm else 0
        return Calibration(
            self.calibration_samples,
            self.calibration_length,
            max(0, 2 * of_scores - 1),  # queries twice, where keys are fitted, too
            "v" in self.refit,
            written=written_samples(self.calibration_text, self.calibration_samples) * self.calibration_length,
            tried=TRIED if self._kept(anatomy) else 0,
            mlp="mlp" in self.refit,
            copied=self.grouping == "similarity",
            ahead=not self.sequential,
        )

    def _closed_form_notes(self, anatomy: Anatomy):
        norm = anatomy.layers[0].qk_norm
        parts = [part for part in self.refit if not (norm and part in "qk")]
        fitted = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"
        fitted += ", this where an MLP has one output that is added as it is" if "mlp" in parts else ""
        calibration = self._calibration(anatomy)
        needed = calibration.memory(anatomy, len(anatomy.layers))
        kind = {"mixed": "text, half of it written by the model", "self": "text that the model writes"}
        text = kind.get(self.calibration_text, "text")
        yield f"measured on {calibration.tokens:,} tokens of {text}; refitted after the merge: {fitted}"
        if kept := self._kept(anatomy):
            which = f"which {kept} of {len(anatomy.layers)} layers keep their KV heads is measured"
            yield f"{which}: those where sharing, each tried alone, costs most"
        yield f"the measurement needs the model in memory and about {needed / 1e9:.1f} GB beside it"
        if norm:
            yield (
                "a norm stands between keys and RoPE, so keys cannot be mixed: of each group one key head stays as it "
                "is, queries too; values and output projection are fitted"
            )
        if anatomy.layers[0].soft_cap:
            yield "scores are fitted before their soft-cap, as if there were none"

    def apply(self, model, context: ApplyContext) -> dict:
        if self.streams:
            return super().apply(model, context)
        from surgery.operations.gqa.closed_form import share_kv_heads
        from surgery.operations.gqa.layer_inputs import FitSettings

        before, targets = context.before, self._targets(context.before)
        if set(targets) == {before.layers[0].kv_heads}:
            return {}
        orders = None
        if self.grouping == "similarity":
            shared = [self.kv_heads] * len(targets) if self._kept(before) else targets
            orders = [partial(self._order, groups=target) for target in shared]
        ridges = {} if self.ridge == "auto" else dict.fromkeys(("ridges", "mlp_ridges"), (self.ridge,))
        settings = FitSettings(refit=tuple(self.refit), sequential=self.sequential, **ridges)
        asked = self.calibration_text, self.calibration_length, self.calibration_samples
        return share_kv_heads(model, context, asked, settings, orders, self._kept(before))

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict]:
        if target.kv_heads == layer.anatomy.kv_heads:
            return layer, {}
        record = {}
        if self.grouping == "similarity":
            order = self._order(layer, groups=target.kv_heads)
            if order != sorted(order):
                layer, record = permute_kv_heads(layer, order), {"kv_head_order": order}
        if self.method == "random":
            return layer.replace(anatomy=target, **random_heads(layer, target, self.seed)), record
        merge = first_head if self.method == "first" else mean_head
        return merged(layer, target, merge, turned=self.align == "procrustes"), record

    def _order(self, layer: AttentionLayer, groups: int) -> list[int]:
        return similar_order(layer, groups, self.align == "procrustes", self.method == "closed_form")
