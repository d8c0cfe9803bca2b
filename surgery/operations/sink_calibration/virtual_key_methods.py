"""Methods of `sink_calibration` that put virtual keys in place of the first token.

Sources: gpt_oss's learned sinks (learned); Sun et al. 2024, "Massive Activations in Large Language Models", arXiv
2402.17762 (kv_bias: explicit k' and v').
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.operations.base import ApplyContext, Measurement
from surgery.operations.sink_calibration.base import (
    CalibrationLength,
    CalibrationSamples,
    CalibrationText,
    Shapes,
    SinkCalibration,
    Targets,
)

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy

Start = Annotated[
    Literal["fit", "identity"],
    Field(
        description="fit: take the place of the first token where a head lost it; identity: change nothing, for "
        "training."
    ),
]


class VirtualKeys(SinkCalibration):
    """One virtual key for each head."""

    term: ClassVar[str | None] = "virtual keys"

    if TYPE_CHECKING:
        start: str
        calibration_length: int

    @property
    def measures(self) -> bool:
        return self.start == "fit"

    def contradictions(self) -> Iterator[str]:
        yield from self.unread_text()

    def chosen(self, layer: LayerAnatomy) -> list[int]:
        return self.lost(layer) if self.measures else super().chosen(layer)

    def problems_of_visibility(self, anatomy: Anatomy) -> list[str]:
        if not self.measures:
            return []
        lost = self.lost_by_layer(anatomy)
        if not lost:
            return [
                f"{self.method}: start: fit puts virtual keys in place of a first token that a head no longer sees, "
                "and these heads see it: split them before (duo_attention with sinks: 0), or start: identity"
            ]
        window = max(layer.streaming_window for layer in anatomy.layers if layer.index in lost)
        if (anatomy.positions or window + 2) < window + 2:  # samples of text are cut to the model's positions
            return [f"the model has no positions behind the window of {window} tokens: choose a smaller window"]
        if self.calibration_length < window + 2:
            what = f"calibration_length {self.calibration_length} does not leave the window of {window} tokens"
            return [f"{what}, so that nothing can be fitted: give more than {window + 1}"]
        return []

    def entry(self, layer: LayerAnatomy, targets: Targets) -> dict[str, Any]:
        entry = super().entry(layer, targets)
        return entry | {"stand_in": True} if entry and self.measures else entry

    def described(self, anatomy: Anatomy, targets: Targets, many: str) -> tuple[str, list[str]]:
        if self.measures:
            return f"virtual keys in place of the lost first token in {many}: {self.kind()}, measured", []
        return f"a virtual key {self.kind()} in {many} ({self.method})", []

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """The first token is measured on half of the texts, and the virtual keys are tested on the other half."""
        flops = 3 * self._half(anatomy)
        on_gpu, passes = self._text_bytes(anatomy), self._passes(anatomy, flops)
        return (Measurement("measuring first tokens", flops, memory_on_gpu=on_gpu, passes=passes),)

    def kind(self) -> str:
        """The parameters that a head gets, in words."""
        raise TypeError(f"method {self.method} does not say what a head gets")

    def set_values(self, model: Any, anatomy: Anatomy, targets: Targets, data: Any, context: ApplyContext) -> dict:
        record = {"method": self.method, "start": self.start}
        if not self.measures:
            return record | {"logit": self.set_logit(model, targets)}
        from surgery.operations.sink_calibration.virtual_keys import fit_virtual_keys

        return record | fit_virtual_keys(model, anatomy, targets, data, context.progress)

    def set_logit(self, model: Any, targets: Targets) -> float | None:
        """Set the logit that the recipe gives, and return it; None if there is none."""
        return None


class Learned(VirtualKeys):
    """A logit for each head, with a value or none."""

    method: Literal["learned"]
    start: Start = "fit"
    logit: float | None = Field(
        None, ge=-1e38, le=1e38, description="This logit for every query of these heads, in place of a fit."
    )
    value: Literal["zero", "fit"] = Field("fit", description="In a fit: no value, or the first token's mean.")
    calibration_samples: CalibrationSamples = 16
    calibration_length: CalibrationLength = 512
    text: CalibrationText = "builtin"

    @property
    def measures(self) -> bool:
        return super().measures and self.logit is None

    def contradictions(self) -> Iterator[str]:
        if self.start == "identity" and {"logit", "value"} & self.changed_fields():
            yield "logit and value are for start: fit"
        if self.logit is not None and "value" in self.changed_fields():
            yield "value is fitted, and logit takes the place of a fit: drop one of them"
        yield from super().contradictions()

    def kind(self) -> str:
        if self.measures:
            return f"a logit, value {self.value}"
        return "that changes nothing" if self.logit is None else f"of logit {self.logit:g}"

    def shapes(self, layer: LayerAnatomy) -> Shapes:
        value = {"surgery_value": [layer.kv_heads, 1, layer.head_dim]}
        return {"surgery_sink_logit": [layer.heads, 1]} | (value if self.measures and self.value == "fit" else {})

    def set_logit(self, model: Any, targets: Targets) -> float | None:
        from surgery.operations.sink_calibration.virtual_keys import set_logit

        if self.logit is not None:
            set_logit(model, targets, self.logit)
        return self.logit


class KvBias(VirtualKeys):
    """A key and a value for each KV head, and a logit for each query head."""

    method: Literal["kv_bias"]
    start: Start = "fit"
    calibration_samples: CalibrationSamples = 16
    calibration_length: CalibrationLength = 512
    text: CalibrationText = "builtin"

    def kind(self) -> str:
        return "a key and a value" if self.measures else "that changes nothing"

    def shapes(self, layer: LayerAnatomy) -> Shapes:
        pair = [layer.kv_heads, 1, layer.head_dim]
        return {"surgery_sink_logit": [layer.heads, 1], "surgery_value": pair, "surgery_key": pair}
