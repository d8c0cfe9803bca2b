"""Methods of `sink_calibration` that reweight sinks: the first token (ZeroTuning), or other sinks (ACT).

Sources: Han et al. 2025, "ZeroTuning", arXiv 2505.11739; Yu et al. 2024, "Hidden Attention Sinks", arXiv 2406.15765.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.calibration.cost import GRADIENT
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

GAMMAS, SHARES_TRIED = 4, 4  # numbers of settings tried by default: `GRID` of zero_tuning.py, `SHARES` of act.py
# Below the range, the first token's share is a difference of numbers that float32 cannot distinguish. Above it,
# nothing is left of the other keys.
Gamma = Annotated[float, Field(ge=1e-3, le=1e6)]
Grid = Annotated[list[Gamma], Field(min_length=1)]
Beta = Annotated[float, Field(gt=0, le=1)]
BETA, THRESHOLD = 0.4, 5.0  # the values of the ACT paper
Objective = Annotated[
    Literal["ce", "entropy"],
    Field(description="What is lowered: cross-entropy of the text, or entropy of the predictions (no labels)."),
]


class ZeroTuning(SinkCalibration):
    """The first token's weight times gamma."""

    term: ClassVar[str | None] = "bias"
    needs_equal_groups: ClassVar[bool] = False

    method: Literal["zero_tuning"]
    gamma: Gamma | None = Field(None, description="The same for all these heads; default: searched.")
    groups: Literal["uniform", "layers", "heads"] = Field(
        "heads",
        description="What is searched: one gamma, one a layer, or gamma and 1 / gamma for heads by their slope.",
    )
    grid: Grid | None = Field(None, description="Values of gamma that are tried; default 1.1 to 2, and 1 over them.")
    objective: Objective = "ce"
    calibration_samples: CalibrationSamples = 16
    calibration_length: CalibrationLength = 512
    text: CalibrationText = "builtin"
    labelled: str | None = Field(
        None,
        min_length=1,
        description="For the search, a JSONL file of questions (prompt, choices, answer) in place of text; "
        "what is lowered is -log of the right choice's share, and every second question is held back.",
    )

    @property
    def measures(self) -> bool:
        return self.gamma is None

    def contradictions(self) -> Iterator[str]:
        if self.gamma is not None and {"grid", "groups", "objective"} & self.changed_fields():
            yield "grid, groups and objective are for a gamma that is searched: drop them, or gamma"
        yield from self.unread_text("labelled takes its place" if self.labelled else "")
        if self.labelled is not None:
            from surgery.data.questions import faults_of

            yield from faults_of(self.labelled)
            if self.gamma is not None or self.objective != "ce":
                yield "labelled is for a gamma that is searched, with objective: ce"

    def problems_after(self, later: Anatomy) -> list[str]:
        problems = self.problems_of_visibility(later)
        return [f"sink_calibration before duo_attention: {problems[0]}"] if problems else []

    def problems_of_visibility(self, anatomy: Anatomy) -> list[str]:
        lost = self.lost_by_layer(anatomy)
        if not lost:
            return []
        layer, heads = next(iter(lost.items()))
        named = [anatomy.layers[layer].query_name(head) for head in heads]
        return [
            f"zero_tuning: heads {named} of layer {layer} stream without sinks, so "
            "the first token leaves their window: keep sinks (duo_attention.sinks from 1), or leave them out"
        ]

    def described(self, anatomy: Anatomy, targets: Targets, many: str) -> tuple[str, list[str]]:
        aim = "right choices" if self.labelled else self.objective
        how = f"gamma {self.gamma:g}" if self.gamma else f"gamma searched ({self.groups}, {aim})"
        windows = any(anatomy.layers[i].window for i in targets)
        note = "where the base has a sliding window, the first token is weighted while it is seen"
        return f"the first token's weight in {many}: {how}", [note] if windows else []

    def shapes(self, layer: LayerAnatomy) -> Shapes:
        return {"surgery_log_gamma": [layer.heads]}

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """Half of the texts for every gamma (and for a gradient, if it sorts the heads), and twice the other half."""
        grid = len(self.grid) if self.grid else GAMMAS
        tried = {"heads": 3 * grid, "uniform": 2 * grid, "layers": 2 * grid * len(anatomy.layers)}[self.groups]
        forwards = 1 + tried + GRADIENT * (self.groups == "heads") + 2
        return (Measurement("trying gammas", forwards * self._half(anatomy)),)

    def calibration_data(self, model: Any, context: ApplyContext) -> Any:
        if self.labelled is None:
            return super().calibration_data(model, context)
        from surgery.calibration.scoring import fitting_questions

        tokenizer = context.tokenizer_for("calibration needs the tokenizer", self.op)
        return fitting_questions(self.labelled, tokenizer, model)

    def set_values(self, model: Any, anatomy: Anatomy, targets: Targets, data: Any, context: ApplyContext) -> dict:
        from surgery.operations.sink_calibration.zero_tuning import search_gamma

        return search_gamma(model, self, targets, data, context)


class Act(SinkCalibration):
    """Other sinks' weight times beta, in heads that gain from it."""

    term: ClassVar[str | None] = "bias"

    method: Literal["act"]
    objective: Objective = "ce"
    beta: Beta | None = Field(
        BETA, description="What is left of the weight on other sinks, in heads that gain from it; 1: nothing changes."
    )
    threshold: Gamma | None = Field(THRESHOLD, description="A sink's mean weight is above this / N tokens.")
    calibration_samples: CalibrationSamples = 16
    calibration_length: CalibrationLength = 512
    text: CalibrationText = "builtin"

    @property
    def measures(self) -> bool:
        return self.beta != 1

    def contradictions(self) -> Iterator[str]:
        yield from self.unread_text()

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """Probes and thresholds on half of the texts, their agreement on the other half, and the choice of heads."""
        half = self._half(anatomy)
        stages = {"fitting probes": half, "setting thresholds": half, "judging probes": half}
        stages["choosing heads"] = (GRADIENT + 1 + SHARES_TRIED + 2) * half
        return tuple(Measurement(stage, flops) for stage, flops in stages.items())

    def described(self, anatomy: Anatomy, targets: Targets, many: str) -> tuple[str, list[str]]:
        how = f"{self.beta:g} of their weight is left, the heads by their slope ({self.objective})"
        note = "sinks are known by a probe on a token's value; the record says how well it agrees with ACT"
        return f"sinks other than the first token in up to {many}: {how}", [note]

    def shapes(self, layer: LayerAnatomy) -> Shapes:
        probe = [layer.heads, layer.head_dim + 2]  # weights for a value, its norm, and the constant 1
        return {"surgery_log_beta": [layer.heads], "surgery_sink_probe": probe}

    def set_values(self, model: Any, anatomy: Anatomy, targets: Targets, data: Any, context: ApplyContext) -> dict:
        from surgery.operations.sink_calibration.act import calibrate_sinks

        record: dict[str, Any] = {"method": self.method, "beta": self.beta, "threshold": self.threshold}
        if data is not None:  # otherwise beta is 1
            options = {"beta": self.beta, "alpha": self.threshold, "objective": self.objective}
            record |= calibrate_sinks(model, targets, data, **options, progress=context.progress)
            for layer, heads in record["heads"].items():
                heads[:] = map(anatomy.layers[int(layer)].query_name, heads)
        return record
