"""Constant gates on heads: a head's output is multiplied by its gate; 0 silences it, 1 leaves it unchanged.

A constant gate on a head is a factor on the head's columns of the output projection, so the result is a stock
checkpoint. Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", arXiv 1905.10650 (mask variables
on heads). Heads are numbered as in the base.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from surgery.architecture.layer import groups_of, query_names, shown_names
from surgery.calibration.head_scores import choose_streaming, load_scores, read_scores
from surgery.errors import RecipeMismatchError, SurgeryError
from surgery.operations.base import (
    TERMS_OF_A_HEAD,
    InWords,
    PlannedChange,
    WeightRewrite,
    WholeNumber,
    whole_keys,
)

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer

Gate = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class HeadMask(WeightRewrite):
    """Multiply the output columns of each query head by its gate; in float64, rounded once."""

    summary: ClassVar[str] = "A constant weight (gate) for each query head, by hand or from scores; 0 silences it."
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "A head whose gate is 0 is still computed, and its keys and values are still cached. prune_heads removes "
        "heads for good. Healing may give a silenced head weight again.",
    )
    # A factor on a head's output changes neither its visibility nor its attention weights.
    carries_terms: ClassVar[tuple[str, ...]] = TERMS_OF_A_HEAD

    op: Literal["head_mask"] = "head_mask"
    values: Annotated[dict[WholeNumber, list[Gate] | dict[WholeNumber, Gate]], BeforeValidator(whole_keys)] | None = (
        Field(
            None,
            description="Gates by hand. Layer: a gate for each query head, in order, or {head: gate}; what is left "
            "out is 1.",
        )
    )
    scores: str | None = Field(
        None,
        description="Instead of values: a file of `surgery score` (KV heads), or a table [layers][query heads]; heads "
        "with low scores get `gate`.",
    )
    ratio: float | None = Field(None, ge=0, le=1, description="With scores: the share of the heads that get `gate`.")
    gate: Gate = Field(0.0, description="With scores: the weight of the heads that score lowest.")
    protect_layers: list[WholeNumber] = Field([], description="With scores: layers whose heads all keep gate 1.")

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("o",)

    def problems(self, anatomy: Anatomy) -> list[str]:
        return [f"head_mask: {problem}" for problem in self._problems(anatomy)]

    def _problems(self, anatomy: Anatomy) -> list[str]:
        if (self.values is None) == (self.scores is None):
            return ["give either values or scores (a file, with ratio)"]
        if self.values is not None:
            unused = {"ratio", "gate", "protect_layers"} & self._changed_fields
            problems = [f"{name} is for scores, and values name the gates" for name in sorted(unused)]
            return problems + list(self._faults_of_values(anatomy))
        if self.ratio is None:
            return ["scores need ratio: the share of the heads that gets the gate"]
        if wrong := [layer for layer in self.protect_layers if layer >= len(anatomy.layers)]:
            return [f"protect_layers {wrong}: there are layers 0 to {len(anatomy.layers) - 1}"]
        try:
            load_scores(self.scores, anatomy, per=("heads", "kv_heads"))
        except SurgeryError as error:
            return [error.in_a_line()]
        return []

    @property
    def _changed_fields(self) -> set[str]:
        """Fields that differ from their defaults. A recipe that is written out in full names every field."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    def _faults_of_values(self, anatomy: Anatomy):
        for index, gates in self.values.items():
            if index >= len(anatomy.layers):
                yield f"values: there is no layer {index}, but 0 to {len(anatomy.layers) - 1}"
                continue
            layer = anatomy.layers[index]
            names = query_names(layer)
            shown = shown_names(names)
            if isinstance(gates, list) and len(gates) != layer.heads:
                yield f"values: layer {index} has {layer.heads} query heads ({shown}), and {len(gates)} gates"
            elif wrong := [head for head in gates if head not in names] if isinstance(gates, dict) else []:
                yield f"values: layer {index} has no query heads {wrong}; it has {shown}"

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        rows = [[gate for gate in self._gates(layer) if gate != 1] for layer in anatomy.layers]
        gates = Counter(gate for row in rows for gate in row)
        if not gates:
            return PlannedChange(anatomy, ("nothing: all gates are 1",))
        total, silent = sum(layer.heads for layer in anatomy.layers), gates.pop(0.0, 0)
        how = [f"{silent} silenced"] if silent else []
        if gates:
            low, high = min(gates), max(gates)
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            how.append(f"{sum(gates.values())} times {span}")
        note = f"{silent} query heads are silenced and computed all the same: prune_heads (heads: ...) removes them"
        many = f"{sum(map(len, rows))} of {total} query heads in {sum(map(bool, rows))} layers"
        return PlannedChange(anatomy, (f"gates of {many}: {', '.join(how)}",), notes=(note,) if silent else ())

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        gated = sum(gate != 1 for layer in before.layers for gate in self._gates(layer))
        if not gated:
            return None
        heads = f"{gated} of {sum(layer.heads for layer in before.layers)} query heads"
        return InWords(
            f"gates on {heads}",
            f"{heads} are multiplied by a constant gate; 0 silences a head.",
            use="Use it to see what heads do.",
            avoid="Do not use it to save memory or time: silenced heads are computed all the same.",
        )

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict]:
        import torch

        gates = self._gates(layer.anatomy)
        if all(gate == 1 for gate in gates):
            return layer.replace(anatomy=target), {}
        o = (layer.o.double() * torch.tensor(gates, dtype=torch.float64)[:, None]).to(layer.o.dtype)
        if not o.isfinite().all():
            raise RecipeMismatchError(
                f"head_mask: layer {target.index}: a gate of {max(gates, key=abs):g} makes the output projection "
                f"larger than {str(o.dtype).removeprefix('torch.')} holds",
                fix="a smaller gate",
            )
        named = {str(head): gate for head, gate in zip(query_names(target), gates, strict=True) if gate != 1}
        return layer.replace(anatomy=target, o=o), {"gates": named}

    def _gates(self, layer: LayerAnatomy) -> list[float]:
        """The gate of every query head of a layer, in the order in which the heads are stored."""
        if self.values is None:
            return self._gates_by_scores(layer)
        gates = self.values.get(layer.index, {})
        if isinstance(gates, list):
            return gates
        return [gates.get(name, 1.0) for name in query_names(layer)]

    def _gates_by_scores(self, layer: LayerAnatomy) -> list[float]:
        table = read_scores(self.scores).scores
        lowest = choose_streaming(table, ratio=self.ratio, protect=self.protect_layers)[layer.index]
        one_by_one = len(table[layer.index]) == layer.heads
        units = [[head] for head in range(layer.heads)] if one_by_one else groups_of(layer)
        low = {head for index in lowest for head in units[index]}
        return [self.gate if head in low else 1.0 for head in range(layer.heads)]
