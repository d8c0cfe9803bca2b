"""The base class of the methods of `sink_calibration`, which change the weight of sinks or add virtual keys.

Each method is a class in `bias_methods.py` or `virtual_key_methods.py`. `operation.py` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.architecture.layer import groups_of, query_names, shown_names
from surgery.calibration.cost import activation_bytes, forward_flops, gradient_bytes, logit_bytes
from surgery.calibration.head_scores import UNEQUAL, unsupported
from surgery.data.text import BUILTIN
from surgery.machine.placement import GRADIENTS, LAYERS, PASSES, Use
from surgery.operations.base import (
    SURGICAL,
    ApplyContext,
    InWords,
    Measurement,
    Operation,
    PlannedChange,
    WholeNumber,
    give_entries,
)
from surgery.operations.variants import Variants

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy

Targets = dict[int, list[int]]  # layer -> query heads whose parameters get values
Shapes = dict[str, list[int]]  # parameter of a layer -> its shape
CalibrationSamples = Annotated[int, Field(ge=4, description="Pieces of text; every second one is held back.")]
CalibrationLength = Annotated[int, Field(ge=8, description="Tokens in a piece.")]
CalibrationText = Annotated[
    str, Field(description="'builtin' (calibration part of Python's reference) or a text file.")
]
OF_TEXT = ("text", "calibration_samples", "calibration_length")


class SinkCalibration(Variants, Operation):
    """One term of one method: a bias on the first token's score or other sinks', or one virtual key for each head."""

    summary: ClassVar[str] = (
        "Another weight for the first token (ZeroTuning) or other sinks (ACT), or virtual keys: learned, k' and v'."
    )
    purpose: ClassVar[str] = "quality"
    TEXTS: ClassVar[tuple[str, ...]] = (BUILTIN,)
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "The sink was calibrated on one text or set of questions; a setting is kept only where its gain on text "
        "held back from the search is more than two standard errors, and the record in surgery.json "
        "says what was found.",
    )

    op: Literal["sink_calibration"] = "sink_calibration"
    method: str = Field(
        description="zero_tuning: first token's weight times gamma; act: other sinks' weight times beta; learned: a "
        "logit, with a value or none; kv_bias: a key and a value."
    )
    layers: list[WholeNumber] | None = Field(None, description="Layers that are changed; default all.")
    heads: list[WholeNumber] | None = Field(
        None, description="Query heads that are changed in these layers; default all."
    )
    exclude: list[Annotated[list[WholeNumber], Field(min_length=2, max_length=2)]] = Field(
        [], description="Pairs [layer, query head] that stay as they are."
    )
    needs_equal_groups: ClassVar[bool] = True  # measuring needs the same number of query heads for every KV head

    @property
    def measures(self) -> bool:
        """Whether the values are found by measuring the model on text or questions."""
        raise TypeError(f"method {self.method} does not say whether it measures")

    def contradictions(self) -> Iterator[str]:
        """Fields of the method that exclude each other."""
        return iter(())

    def problems_of_visibility(self, anatomy: Anatomy) -> list[str]:
        """Problems with the visibility of the first token in the chosen heads."""
        return []

    def described(self, anatomy: Anatomy, targets: Targets, many: str) -> tuple[str, list[str]]:
        """The line and the notes of a plan.

        Args:
            many: the numbers of heads and layers, in words.
        """
        raise TypeError(f"method {self.method} describes no plan")

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        if record.get("kept") is False:
            return None
        names = {
            "zero_tuning": ("other weights on the first token (ZeroTuning)", "the first token has another weight"),
            "act": (
                "calibrated attention sinks (ACT)",
                "tokens that draw attention for no reason have another weight",
            ),
        }
        virtual = ("virtual attention sinks", "every query also sees a key that is no token")
        title, what = names.get(self.method, virtual)
        gain = (
            "It saves nothing. It lowers perplexity on text like the calibration text." if self.method in names else ""
        )
        return InWords(title, f"In its attention {what} in each head that was chosen.", gain)

    def shapes(self, layer: LayerAnatomy) -> Shapes:
        """The parameters that a layer gets. Keys and values are per KV head, like those of the first token."""
        raise TypeError(f"method {self.method} names no parameters")

    def set_values(self, model: Any, anatomy: Anatomy, targets: Targets, data: Any, context: ApplyContext) -> dict:
        """Set the parameters of a patched model; returns a record.

        Args:
            data: result of `calibration_data`; None: nothing is measured.
        """
        raise TypeError(f"method {self.method} sets nothing")

    def limitations(self) -> tuple[str, ...]:
        return self.LIMITATIONS if self.measures else ()

    def problems(self, anatomy: Anatomy) -> list[str]:
        if reason := unsupported(anatomy):
            return [f"sink_calibration: {reason}"]
        problems, count = [], len(anatomy.layers)
        listed = self.layers if isinstance(self.layers, list) else []
        if wrong := [layer for layer in listed if layer >= count]:
            problems.append(f"layers {wrong}: there are layers 0 to {count - 1}")
        chosen = [anatomy.layers[i] for i in self._layers(anatomy) if i < count]
        for names in map(query_names, chosen):
            if wrong := [head for head in self.heads or [] if head not in names]:
                problems.append(f"heads {wrong}: a layer has query heads {shown_names(names)}")
                break
        if [] in (self.layers, self.heads):
            problems.append("layers and heads must not be empty; leave them out for all")
        layers = dict(enumerate(anatomy.layers))
        if wrong := [
            pair for pair in self.exclude if pair[0] not in layers or pair[1] not in query_names(layers[pair[0]])
        ]:
            problems.append(f"exclude {wrong}: there are no such layers and query heads")
        if not problems and not any(map(self._heads, chosen)):
            problems.append("exclude leaves no head")
        problems += self.contradictions()
        if self.measures and self.needs_equal_groups and any(layer.query_groups for layer in anatomy.layers):
            problems.append(f"{self.method}: {UNEQUAL}: calibrate before pruning, or prune whole KV groups")
        if not problems:
            problems += self.problems_of_visibility(anatomy)
        return [f"sink_calibration: {problem}" for problem in problems]

    def changed_fields(self) -> set[str]:
        """Fields whose values differ from the defaults."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    def unread_text(self, otherwise: str = "") -> Iterator[str]:
        """Problems: settings of the calibration text that were given although no text is read.

        Args:
            otherwise: why no text is read, in words.
        """
        changed = self.changed_fields()
        if (of_text := [name for name in OF_TEXT if name in changed]) and (otherwise or not self.measures):
            yield f"calibration text, and {otherwise or 'nothing is measured here'}: drop {' and '.join(of_text)}"

    def term_layers(self, anatomy: Anatomy) -> set[int]:
        return set(self._layers(anatomy))

    def _layers(self, anatomy: Anatomy) -> list[int]:
        return list(range(len(anatomy.layers))) if self.layers is None else sorted(set(self.layers))

    def _heads(self, layer: LayerAnatomy) -> list[int]:
        """Indices of the chosen query heads in a layer. The settings choose heads by their numbers in the base."""
        chosen = (name for name in query_names(layer) if self.heads is None or name in self.heads)
        return [query_names(layer).index(name) for name in chosen if [layer.index, name] not in self.exclude]

    def chosen(self, layer: LayerAnatomy) -> list[int]:
        """The query heads of a layer whose parameters get values."""
        return self._heads(layer)

    def lost_by_layer(self, anatomy: Anatomy) -> Targets:
        """The result of `lost` for each chosen layer where it is not empty."""
        lost = {layer.index: self.lost(layer) for layer in anatomy.layers if layer.index in self._layers(anatomy)}
        return {layer: heads for layer, heads in lost.items() if heads}

    def lost(self, layer: LayerAnatomy) -> list[int]:
        """The chosen query heads of a layer that lost the first token of a long text, which they see in the base."""
        narrower = bool(layer.window) and layer.window <= layer.streaming_window  # the base's own
        if not layer.streaming or layer.sinks or narrower:
            return []
        owner = [kv_head for kv_head, group in enumerate(groups_of(layer)) for _ in group]
        return [head for head in self._heads(layer) if owner[head] in layer.streaming]

    def _targets(self, anatomy: Anatomy) -> Targets:
        targets = {i: self.chosen(anatomy.layers[i]) for i in self._layers(anatomy)}
        return {layer: heads for layer, heads in targets.items() if heads}

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        targets = self._targets(anatomy)
        many = f"{sum(map(len, targets.values()))} query heads in {len(targets)} layers"
        line, notes = self.described(anatomy, targets, many)
        if self.measures:
            notes.append("a setting that is not two standard errors better than none on text held back is not kept")
        entries = [self.entry(layer, targets) for layer in anatomy.layers]
        more = sum(prod(shape) for entry in entries for shape in entry.get("parameters", {}).values())
        details = {"parameters": more, "measurements": self.measurements(anatomy) if self.measures else ()}
        pairs = zip(anatomy.layers, entries, strict=True)
        after = replace(anatomy, layers=tuple(_with(layer, entry) if entry else layer for layer, entry in pairs))
        return PlannedChange(after, (line,), SURGICAL, tuple(notes), measured=self.measures, **details)

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """The stages that a method which measures runs."""
        return ()

    def _half(self, anatomy: Anatomy) -> float:
        """Floating-point operations of one forward pass of half of the calibration texts."""
        samples, length = (getattr(self, name) for name in ("calibration_samples", "calibration_length"))
        length = min(length, anatomy.positions or length)
        return forward_flops(anatomy, samples / 2 * length, length)

    def _passes(self, anatomy: Anatomy, flops: float) -> float:
        """How many calibration texts go through the model for so many floating-point operations."""
        return flops / self._half(anatomy) * self.calibration_samples / 2

    @property
    def model_use(self) -> Use:
        return PASSES if self.measures else LAYERS

    def _text_bytes(self, anatomy: Anatomy) -> int:
        """Bytes on a GPU of one calibration text, with gradients if the measurement needs them."""
        length = self.calibration_length
        length = min(length, anatomy.positions or length)
        if self.model_use == GRADIENTS:
            return gradient_bytes(anatomy, length)
        return activation_bytes(anatomy, length) + logit_bytes(anatomy, length)

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.architecture.anatomy import Anatomy

        anatomy = Anatomy.of(model)  # which heads stream may have been measured since the plan was made
        targets = self._targets(anatomy)
        data = self.calibration_data(model, context) if self.measures else None
        give_entries(model, [self.entry(layer, targets) for layer in anatomy.layers], self.op)
        return self.set_values(model, anatomy, targets, data, context)

    def calibration_data(self, model: Any, context: ApplyContext) -> Any:
        """The data to measure on: samples of text, long [samples, tokens], unless a method overrides this."""
        from surgery.data.calibration_text import calibration_sequences

        tokenizer = context.tokenizer_for("calibration needs the tokenizer", self.op)
        text, length, samples = (getattr(self, name) for name in ("text", "calibration_length", "calibration_samples"))
        return calibration_sequences(model, tokenizer, text, length, samples)

    def entry(self, layer: LayerAnatomy, targets: Targets) -> dict[str, Any]:
        """A layer's entry in the `surgery` block."""
        return {"parameters": self.shapes(layer)} if layer.index in targets else {}


def _with(layer: LayerAnatomy, entry: dict[str, Any]) -> LayerAnatomy:
    """A layer with what an entry adds; the parameters of both stay."""
    parameters = layer.entry.get("parameters", {}) | entry.get("parameters", {})
    return layer.with_entry(**entry | {"parameters": parameters})
