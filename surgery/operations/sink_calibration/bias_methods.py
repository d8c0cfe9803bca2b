"""Methods of `sink_calibration` that reweight sinks: the first token (ZeroTuning), or other sinks (ACT).

Sources: Han et al. 2025, "ZeroTuning", arXiv 2505.11739; Yu et al. 2024, "Hidden Attention Sinks", arXiv 2406.15765.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from surgery.calibration.cost import GRADIENT, forward_flops
from surgery.machine.placement import GRADIENTS, Use
from surgery.operations.base import ApplyContext, Measurement, WholeNumber
from surgery.operations.sink_calibration.base import (
    CalibrationLength,
    CalibrationSamples,
    CalibrationText,
    Shapes,
    SinkCalibration,
    Targets,
)

if TYPE_CHECKING:
    import torch

    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.data.questions import Choice

GAMMAS, SHARES_TRIED = 4, 4  # numbers of settings tried by default: `GRID` of zero_tuning.py, `SHARES` of act.py
# Below the range, the first token's share is a difference of numbers that float32 cannot distinguish. Above it,
# nothing is left of the other keys.
Gamma = Annotated[float, Field(ge=1e-3, le=1e6)]
Grid = Annotated[list[Gamma], Field(min_length=1)]
Beta = Annotated[float, Field(gt=0, le=1)]
BETA, THRESHOLD = 0.4, 5.0  # the values of the ACT paper
LETTERS = 4  # in a token, roughly, for the estimate of what questions cost
Objective = Annotated[
    Literal["ce", "entropy"],
    Field(description="What is lowered: cross-entropy of the text, or entropy of the predictions (no labels)."),
]
Labelled = Annotated[
    str | None,
    Field(
        min_length=1,
        description="For the search, a JSONL file of questions (prompt, choices, answer) in place of text; "
        "what is lowered is -log of the right choice's share, and every second question is held back.",
    ),
]


class Reweighting(SinkCalibration):
    """Another weight for some keys, which is searched on text or on questions with known answers."""

    term: ClassVar[str | None] = "bias"

    if TYPE_CHECKING:
        objective: str
        labelled: str | None

    @property
    def aim(self) -> str:
        """What the search improves, in words."""
        return "right choices" if self.labelled else self.objective

    def faults_of_labelled(self, what: str, searched: bool) -> Iterator[str]:
        """Problems with `labelled`.

        Args:
            what: what the questions are for, in words.
            searched: whether these settings search it.
        """
        if self.labelled is not None:
            from surgery.data.questions import faults_of

            yield from faults_of(self.labelled)
            if not searched or self.objective != "ce":
                yield f"labelled is for {what}, with objective: ce"

    def questions(self, model: Any, context: ApplyContext) -> list[Choice]:
        """The questions of `labelled`, as tokens."""
        from surgery.calibration.scoring import fitting_questions

        tokenizer = context.tokenizer_for("calibration needs the tokenizer", self.op)
        return fitting_questions(self.labelled or "", tokenizer, model)

    def searched_half(self, anatomy: Anatomy) -> float:
        """Floating-point operations of one forward pass of the half of texts or questions on which it searches."""
        if self.labelled is None:
            return self._half(anatomy)
        from surgery.data.questions import read_questions

        rows = [[question.prompt, *question.choices] for question in read_questions(self.labelled)]
        lengths = [sum(map(len, texts)) / LETTERS for texts in rows]
        return forward_flops(anatomy, sum(lengths) / 2, round(max(lengths)))


class ZeroTuning(Reweighting):
    """The first token's weight times gamma."""

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
    labelled: Labelled = None

    @property
    def measures(self) -> bool:
        return self.gamma is None

    @property
    def model_use(self) -> Use:
        return GRADIENTS if self.measures and self.groups == "heads" else super().model_use  # sorted by a gradient

    def contradictions(self) -> Iterator[str]:
        if self.gamma is not None and {"grid", "groups", "objective"} & self.changed_fields():
            yield "grid, groups and objective are for a gamma that is searched: drop them, or gamma"
        yield from self.unread_text("labelled takes its place" if self.labelled else "")
        yield from self.faults_of_labelled("a gamma that is searched", self.measures)

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
        how = f"gamma {self.gamma:g}" if self.gamma else f"gamma searched ({self.groups}, {self.aim})"
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
        flops = forwards * self.searched_half(anatomy)
        on_gpu, passes = self._text_bytes(anatomy), self._passes(anatomy, flops)
        return (Measurement("trying gammas", flops, memory_on_gpu=on_gpu, passes=passes),)

    def calibration_data(self, model: Any, context: ApplyContext) -> Any:
        return super().calibration_data(model, context) if self.labelled is None else self.questions(model, context)

    def set_values(self, model: Any, anatomy: Anatomy, targets: Targets, data: Any, context: ApplyContext) -> dict:
        from surgery.operations.sink_calibration.zero_tuning import search_gamma

        return search_gamma(model, self, targets, data, context)


class ActData(NamedTuple):
    """What `Act` measures on: texts, long [texts, length], and questions; None where it reads none."""

    texts: torch.Tensor | None
    questions: list[Choice] | None


class Act(Reweighting):
    """Other sinks' weight times beta, in heads that gain from it.

    With `find: map` sinks are found in each prompt by the paper's rule, and alpha / N is of the prompt's own N. They
    depend on where the prompt ends: on the call that fills the empty cache (surgery/runtime/surgery_act.py). With
    `find: probe` they are found by a token's value alone. A probe is fitted to alpha / N of the calibration's texts.
    It does not scale with the N of a prompt, because what it reads, a value, does not.

    The paper tries each head alone on labelled samples (`trials: each`). `slope` asks for one gradient instead.
    """

    LATER: ClassVar[tuple[str, ...]] = ("layers", "find", "trials")
    OF_A_PROMPT: ClassVar[tuple[str, ...]] = (
        "Which tokens are sinks is decided by a whole prompt, that is, by the call that fills the empty cache. So "
        "decoding with the cache differs from one forward pass over prompt and answer, and a prompt that comes in "
        "chunks is judged by its first chunk.",
        "In a perplexity of whole windows, the choice of sinks has seen the tokens that are predicted: judge this "
        "model by its answers to prompts.",
    )

    method: Literal["act"]
    layers: list[WholeNumber] | Literal["paper"] | None = Field(  # type: ignore[assignment]
        None,
        description="Layers that are changed; null: all. Where it is not set, paper: from the third to the last but "
        "one, as in the paper's code.",
    )
    objective: Objective = "ce"
    beta: Beta | None = Field(
        BETA, description="What is left of the weight on other sinks, in heads that gain from it; 1: nothing changes."
    )
    threshold: Gamma | None = Field(THRESHOLD, description="A sink's mean weight is above this / N tokens.")
    calibration_samples: CalibrationSamples = 16
    calibration_length: CalibrationLength = 512
    text: CalibrationText = "builtin"
    labelled: Labelled = None
    find: Literal["map", "probe"] = Field(
        "probe",
        description="How sinks are found. map: in each prompt, by its attention, as in the paper; probe: by a token's "
        "value, the same in prompt and decode.",
    )
    trials: Literal["slope", "each"] = Field(
        "slope",
        description="How heads are chosen. slope: by one gradient; each: every head alone on labelled questions, as "
        "in the paper.",
    )

    @property
    def needs_equal_groups(self) -> bool:  # type: ignore[override]  # a map is found by the runtime, for any groups
        return self.find == "probe"

    @property
    def measures(self) -> bool:
        return self.beta != 1

    @property
    def model_use(self) -> Use:
        return GRADIENTS if self.measures and self.trials == "slope" else super().model_use

    def limitations(self) -> tuple[str, ...]:
        return super().limitations() + (self.OF_A_PROMPT if self.measures and self.find == "map" else ())

    def contradictions(self) -> Iterator[str]:
        instead = self.measures and self.find == "map" and self.labelled
        yield from self.unread_text("labelled takes its place" if instead else "")
        yield from self.faults_of_labelled("heads that are chosen (beta below 1)", self.measures)
        if self.trials == "each" and self.labelled is None:
            yield (
                "trials: each tries every head on labelled questions: give labelled=FILE.jsonl with prompt, choices "
                "and answer, or trials: slope"
            )

    def _layers(self, anatomy: Anatomy) -> list[int]:
        count = len(anatomy.layers)
        return super()._layers(anatomy) if self.given_layers else list(range(2, count - 1)) or list(range(count))

    @property
    def given_layers(self) -> bool:
        """Whether somebody said which layers; null says all."""
        return "layers" in self.model_fields_set and self.layers != "paper"

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """Probes and thresholds on half of the texts, their agreement on the other half, and the choice of heads."""
        probing = ("fitting probes", "setting thresholds", "judging probes") if self.find == "probe" else ()
        stages = {stage: self._half(anatomy) for stage in probing}
        tried = GRADIENT + SHARES_TRIED
        if self.trials == "each":
            tried = 1 + sum(map(len, self._targets(anatomy).values()))
        stages["choosing heads"] = (1 + tried + 2) * self.searched_half(anatomy)
        on_gpu = self._text_bytes(anatomy)
        return tuple(
            Measurement(stage, flops, memory_on_gpu=on_gpu, passes=self._passes(anatomy, flops))
            for stage, flops in stages.items()
        )

    def described(self, anatomy: Anatomy, targets: Targets, many: str) -> tuple[str, list[str]]:
        chosen = "the heads by their slope" if self.trials == "slope" else "each head tried alone"
        how = f"{self.beta:g} of their weight is left, {chosen} ({self.aim})"
        notes = ["sinks are known by a probe on a token's value; the record says how well it agrees with ACT"]
        if self.find == "map":
            notes = [
                f"sinks are those of each prompt's own attention, above {self.threshold:g} / N: the call that fills "
                "the empty cache decides, later tokens are no sinks, and without a cache the whole text is a prompt"
            ]
        if not self.given_layers and len(targets) < len(anatomy.layers):
            layers = self._layers(anatomy)
            notes.append(f"layers {layers[0]} to {layers[-1]}, as in the paper's code; layers=null for all")
        return f"sinks other than the first token in up to {many}: {how}", notes

    def shapes(self, layer: LayerAnatomy) -> Shapes:
        probe = [layer.heads, layer.head_dim + 2]  # weights for a value, its norm, and the constant 1
        return {"surgery_log_beta": [layer.heads]} | ({"surgery_sink_probe": probe} if self.find == "probe" else {})

    def entry(self, layer: LayerAnatomy, targets: Targets) -> dict[str, Any]:
        entry = super().entry(layer, targets)
        return entry | {"act": {"alpha": self.threshold}} if entry and self.find == "map" else entry

    def calibration_data(self, model: Any, context: ApplyContext) -> ActData:
        read = self.find == "probe" or self.labelled is None
        texts = super().calibration_data(model, context) if read else None
        return ActData(texts, None if self.labelled is None else self.questions(model, context))

    def set_values(self, model: Any, anatomy: Anatomy, targets: Targets, data: Any, context: ApplyContext) -> dict:
        from surgery.operations.sink_calibration.act import calibrate_sinks

        record = {name: getattr(self, name) for name in ("method", "beta", "threshold", "find", "trials")}
        if data is not None:  # otherwise beta is 1
            record |= calibrate_sinks(model, self, targets, data, context)
            for layer, heads in record["heads"].items():
                heads[:] = map(anatomy.layers[int(layer)].query_name, heads)
            for each in record.get("alone", ()):
                each["head"] = anatomy.layers[each["layer"]].query_name(each["head"])
        return record
