"""The KV heads that lose the far past: those with the lowest scores, by a scorer or a score file.

An operation that chooses heads has the fields that `HeadChoice` names, and asks it for problems, costs and heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

from surgery.calibration.cost import GRADIENT, activation_bytes, forward_flops, gradient_bytes, logit_bytes
from surgery.calibration.head_scores import (
    UNEQUAL,
    HeadScores,
    choose_streaming,
    load_scores,
    names_method,
    unsupported,
)
from surgery.data.text import BUILTIN
from surgery.errors import SurgeryError
from surgery.machine.placement import GRADIENTS, LAYERS, PASSES, Use
from surgery.operations.base import ApplyContext, Measurement, missing_text
from surgery.operations.head_scorers.scorers import METHODS, refuse_wrong_settings, resolved_settings, score

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

OWN = ("sinks", "window", "seed", "state", "per")  # settings of a scorer that are fields here, or have no meaning


@dataclass(frozen=True)
class HeadChoice:
    """The fields by which an operation chooses heads.

    Attributes:
        op: the operation, which errors name.
        ratio, threshold: the share of the KV heads that is chosen; or the score below which a head is.
        scores, scoring, samples, length: the scorer or the score file, and the scorer's settings.
        sinks, window: what a chosen head still sees when it is measured.
        least: KV heads that every layer keeps as they are.
        protect: layers whose heads all stay as they are.
        seed: of the calibration sequences.
        fields: the operation's fields for sinks, window and seed, which errors name.
    """

    op: str
    ratio: float | None
    scores: str
    sinks: int
    window: int
    threshold: float | None = None
    scoring: dict[str, Any] | None = None
    samples: int | None = None
    length: int | None = None
    least: int = 0
    protect: list[int] = field(default_factory=list)
    seed: int = 0
    fields: tuple[str, str, str] = ("sinks", "window", "seed")

    @property
    def measured(self) -> bool:
        """Whether a scorer decides, and not a file."""
        return names_method(self.scores, METHODS, "a score file, which `surgery score MODEL -o FILE` writes")

    @property
    def needs_scores(self) -> bool:
        """Whether the scores decide anything."""
        return self.ratio not in (0.0, 1.0) or self.least > 0

    @property
    def model_use(self) -> Use:
        """What measuring does with the model."""
        if self.scores not in METHODS or not self.needs_scores:
            return LAYERS
        return GRADIENTS if METHODS[self.scores].gradients else PASSES

    def problems(self, anatomy: Anatomy) -> list[str]:
        """Why heads of this model cannot be chosen so."""
        problems = [f"{self.op}: {reason}"] if (reason := unsupported(anatomy)) else []
        if wrong := [i for i in self.protect if i >= len(anatomy.layers)]:
            problems.append(f"{self.op}: protect_layers {wrong}: there are layers 0 to {len(anatomy.layers) - 1}")
        fewest = min(layer.kv_heads for layer in anatomy.layers)
        if self.least > fewest:
            problems.append(f"{self.op}: per_layer_min_retrieval: a layer has only {fewest} KV heads")
        if not problems:
            try:
                if self.measured and self.needs_scores and any(layer.query_groups for layer in anatomy.layers):
                    problems.append(f"{self.op}: {UNEQUAL}: put it before prune_heads, or give a score file")
                if not self.measured:
                    load_scores(self.scores, anatomy)
            except SurgeryError as error:
                problems.append(f"{self.op}: {error.in_a_line()}")
        if not problems:
            problems += [f"{self.op}: scoring: {problem}" for problem in self._problems_of_scoring()]
        reach = self.sinks + self.window
        far = (anatomy.positions or reach + 1) > reach
        if not problems and self.needs_scores and self.measured and not far:
            problems.append(
                f"{self.op}: this model takes {anatomy.positions} tokens, sinks + window are {reach}: there is no "
                f"far past to measure heads on; choose a smaller {self.fields[1].replace(', ', ' or ')}"
            )
        return problems

    def _problems_of_scoring(self) -> Iterator[str]:
        if self.scoring is None:
            return
        if not self.measured:
            yield f"{self.scores} is a score file, which has no settings: drop scoring"
            return
        if own := [key for key in self.scoring if key in OWN]:
            first, second, third = self.fields
            yield f"{', '.join(own)} cannot be set here; {self.op} has the fields {first}, {second} and {third}"
        text = self.scoring.get("text", BUILTIN)
        if isinstance(text, str) and (reason := missing_text(text, (BUILTIN,))):
            yield reason
        for key in ("samples", "length"):
            if key in self.scoring and getattr(self, key) is not None:
                yield f"{key} and calibration_{key} are two ways to say the same: drop one"
        try:
            refuse_wrong_settings(self.scores, self.scoring)
        except SurgeryError as error:
            for fault in (error, *error.others):
                yield "; ".join(filter(None, (fault.what, fault.exists and f"available: {fault.exists}", fault.fix)))

    def _settings(self) -> dict[str, Any]:
        """The settings of the scorer that are not None."""
        own = {"samples": self.samples, "length": self.length}
        return {key: value for key, value in (own | (self.scoring or {})).items() if value is not None}

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """What the scorer runs, counted in forward passes of its sequences."""
        if not (self.measured and self.needs_scores):
            return ()
        settings = resolved_settings(self.scores, self._settings())
        samples, asked = settings["samples"], settings["length"]
        lengths = [min(length, anatomy.positions or inf) for length in (asked if isinstance(asked, list) else [asked])]
        one = sum(forward_flops(anatomy, length, length) for length in lengths) / len(lengths)
        if "steps" in settings:
            full = max(samples, settings["steps"]) if settings["full"] == "base" else min(samples, settings["steps"])
            flops = one * (full + GRADIENT * settings["steps"])
            return (Measurement("training gates", flops, memory_on_gpu=gradient_bytes(anatomy, max(lengths))),)
        # An ablation runs two texts from each head's layer on, which is half of a forward pass on average.
        forwards = sum(layer.kv_heads for layer in anatomy.layers) if self.scores == "ablation" else 1
        of_text = gradient_bytes if METHODS[self.scores].gradients else activation_bytes
        on_gpu = of_text(anatomy, max(lengths)) + logit_bytes(anatomy, max(lengths))
        passes = samples * forwards
        return (Measurement("measuring heads", one * passes, memory_on_gpu=on_gpu, passes=passes),)

    def planned(self, anatomy: Anatomy, local: list[int]) -> list[list[int]]:
        """The heads by the score file; with a scorer only their number is right, since it measures later.

        Args:
            local: layers that do not change, since they see no farther anyway. The ratio does not count them.
        """
        if self.measured:
            return self.chosen([[0.0] * layer.kv_heads for layer in anatomy.layers], local)
        return self.chosen(load_scores(self.scores, anatomy).scores, local)

    def measure(self, model, context: ApplyContext) -> HeadScores:
        """The scores, measured on the model or from the file."""
        if not self.measured:
            return load_scores(self.scores, context.before)
        if not self.needs_scores:
            return HeadScores("none", [[0.0] * layer.kv_heads for layer in context.before.layers])
        tokenizer = context.tokenizer_for(
            "measuring heads needs the tokenizer", self.op, ", or a score file (scores: FILE)"
        )
        given = {"sinks": self.sinks, "window": self.window, "seed": self.seed, "progress": context.progress}
        return score(model, tokenizer, self.scores, **given, **self._settings())

    def chosen(self, scores: list[list[float]], local: list[int]) -> list[list[int]]:
        """The chosen KV heads of each layer."""
        return choose_streaming(
            scores,
            ratio=self.ratio,
            threshold=self.threshold,
            min_retrieval=self.least,
            protect=self.protect,
            local=local,
        )
