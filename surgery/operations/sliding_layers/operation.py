"""Give some layers a sliding window, in a stock model: their cache stops growing, and they forget what lies before.

Source: Beltagy et al. 2020, "Longformer", arXiv 2004.05150 (the window); models that are trained with both kinds of
layers: Gemma Team 2024, "Gemma 2", arXiv 2408.00118. The choice of layers is our own: see `ablation.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.architecture.sliding import sliding_fields, sliding_problem
from surgery.calibration.cost import Measurement, activation_bytes, forward_flops, logit_bytes
from surgery.data.text import BUILTIN, CALIBRATION_TEXTS
from surgery.io.printing import count
from surgery.machine.placement import PASSES, Use
from surgery.operations.base import (
    NATIVE,
    ApplyContext,
    Count,
    InWords,
    Length,
    PlannedChange,
    Seed,
    WeightRewrite,
    WholeNumber,
)
from surgery.operations.sliding_layers.window_search import STAGE, WindowSearch
from surgery.operations.variants import Variants

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer


BEYOND = 512  # tokens of a calibration text beyond the window


class SlidingLayers(Variants, WeightRewrite):
    """A window in some layers; the others see all tokens, as before."""

    summary: ClassVar[str] = "A sliding window in some layers, as a stock model."
    purpose: ClassVar[str] = "cache"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Layers with the window do not see what lies before it, the first token among it. Recall over long distances "
        "rests on the other layers. A recall test, where this card has one, tests it with literal answers alone.",
    )

    op: Literal["sliding_layers"] = "sliding_layers"
    method: str = Field(description="How the layers with the window are chosen.")
    window: Length = Field(
        512, description="Newest tokens that such a layer sees. A base that has a window keeps its own: name that."
    )

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ()

    @property
    def unchanged_within(self) -> int:
        return self.window

    def wanted(self, anatomy: Anatomy) -> list[int]:
        """The layers that get the window, by index; where they are measured, as many others."""
        raise TypeError(f"method {self.method} of sliding_layers names no layers")

    def problems_of_method(self, anatomy: Anatomy) -> Iterator[str]:
        """Why this method cannot choose layers of such a model."""
        yield from ()

    def problems(self, anatomy: Anatomy) -> list[str]:
        if reason := sliding_problem(anatomy):
            return [f"sliding_layers: {reason}"]
        own, problems = {layer.window for layer in anatomy.layers} - {None}, []
        if not full_layers(anatomy):
            return [f"sliding_layers: all layers of this {anatomy.model_type} slide already"]
        if own and own != {self.window}:
            held = min(own)
            problems.append(
                f"sliding_layers: window: a config has one window, and layers of this {anatomy.model_type} have "
                f"{held} tokens: window={held}"
            )
        if anatomy.positions and self.window >= anatomy.positions:
            problems.append(
                f"sliding_layers: window: this model takes {anatomy.positions:,} tokens, so that a window of "
                f"{self.window:,} leaves nothing out: take a smaller one"
            )
        problems += [f"sliding_layers: {reason}" for reason in self.problems_of_method(anatomy)]
        if not problems and len(self.wanted(anatomy)) >= len(full_layers(anatomy)):
            problems.append("sliding_layers: no layer would see all tokens: leave at least one full")
        return problems

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        chosen = self.wanted(anatomy)
        if not chosen:
            return PlannedChange(anatomy, ("nothing: no layer gets the window",))
        line = f"{len(chosen)} of {count(len(anatomy.layers), 'layer')} see the last {self.window:,} tokens alone"
        after = self.after(anatomy, chosen)
        return PlannedChange(after, (line,), NATIVE, tuple(self._notes(anatomy, after)))

    def after(self, anatomy: Anatomy, chosen: Collection[int]) -> Anatomy:
        """The anatomy in which these layers, and those that slide already, have the window."""
        sliding = {layer.index for layer in anatomy.layers if layer.window is not None} | {*chosen}
        return anatomy.with_windows(sliding, self.window, sliding_fields(anatomy, sliding, self.window))

    def _notes(self, anatomy: Anatomy, after: Anatomy) -> Iterator[str]:
        if after.model_type != anatomy.model_type:
            yield f"the result is a stock {after.model_type}, which computes what {anatomy.model_type} does"
        if already := len(anatomy.layers) - len(full_layers(anatomy)):
            yield f"{count(already, 'layer')} of the base slide already, and stay as they are"

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        chosen, total = record.get("sliding") or self.wanted(before), len(before.layers)
        if not chosen:
            return None
        some = (
            f"Half of its layers ({len(chosen)} of {total})"
            if 2 * len(chosen) == total
            else (f"{len(chosen)} of its {total} layers")
        )
        return InWords(
            f"a window of {self.window:,} tokens in {len(chosen)} of {total} layers",
            f"{some} now see the last {self.window:,} tokens of a sequence alone; the others still see all of it.",
            use="Use it for long chats and long documents in little memory, with any engine that has such layers.",
            avoid=f"Do not use it for sequences of up to {self.window:,} tokens: nothing is saved there.",
        )

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict]:
        return layer.replace(anatomy=target), {}


class Ablation(SlidingLayers):
    """The layers in which a window costs least, alone, on answers and on plain text."""

    method: Literal["ablation"] = "ablation"
    sliding: float = Field(0.5, gt=0, lt=1, description="Share of the full layers that get the window.")
    rounds: Count = Field(
        3, description="Rounds in which they are chosen: each tries those that are left beside those chosen before."
    )
    answers: float = Field(0.1, ge=0, description="How much a nat lost on answers counts; one on plain text counts 1.")
    calibration_samples: Count = Field(1, description="Texts of each kind: with passkeys, and plain.")
    calibration_length: Length | None = Field(
        None, description=f"Tokens in each. null: {BEYOND:,} beyond the window, or as many as the model takes."
    )
    calibration_text: str = Field(BUILTIN, description="builtin (Python's language reference), or a UTF-8 text file.")
    seed: Seed = Field(0, description="Seed of the texts.")

    @property
    def streams(self) -> bool:
        return False

    @property
    def model_use(self) -> Use:
        return PASSES

    def milder(self) -> str:
        return f"sliding={self.sliding / 2:g}"

    def wanted(self, anatomy: Anatomy) -> list[int]:
        full = full_layers(anatomy)
        return full[: round(self.sliding * len(full))]

    def length(self, anatomy: Anatomy) -> int:
        """Tokens of a text."""
        asked = self.calibration_length or self.window + BEYOND
        return min(asked, anatomy.positions or asked)

    def _search(self, anatomy: Anatomy) -> WindowSearch:
        length, samples = self.length(anatomy), self.calibration_samples
        sliding = len(self.wanted(anatomy))
        text = self.calibration_text, length, samples, self.seed
        return WindowSearch(self.window, sliding, self.rounds, self.answers, *text)

    def problems_of_method(self, anatomy: Anatomy) -> Iterator[str]:
        if reason := anatomy.runtime_problem():
            yield f"{reason}, so that no window can be tried: method=listed"
        if self.calibration_text in CALIBRATION_TEXTS and self.calibration_text != BUILTIN:
            yield f"calibration_text: {self.calibration_text} is not for this operation: {BUILTIN}, or a text file"
        if (length := self.length(anatomy)) <= self.window:
            yield f"calibration_length: texts of {length} tokens show nothing of a window of {self.window}"
        if not self.wanted(anatomy):
            yield f"sliding: {self.sliding:g} of {count(len(full_layers(anatomy)), 'full layer')} is none: take more"

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        change, length = super().plan(anatomy), self.length(anatomy)
        # The layers before the one that is tried are not computed again: half of a forward pass for two texts.
        passes = self.calibration_samples * self._search(anatomy).trials(len(full_layers(anatomy)))
        on_gpu = activation_bytes(anatomy, length) + logit_bytes(anatomy, length)
        flops = passes * forward_flops(anatomy, length, length)
        measured = Measurement(STAGE, flops, memory_on_gpu=on_gpu, passes=passes)
        notes = (*change.notes, "which layers get the window is decided by a measurement on the model")
        return replace(change, notes=notes, measured=True, measurements=(measured,))

    def apply(self, model: Any, context: ApplyContext) -> dict[str, Any]:
        from surgery.operations.rewrite import rewrite_model
        from surgery.operations.sliding_layers.ablation import choose_layers

        before = context.before
        tokenizer = context.tokenizer_for("trying windows needs the tokenizer", self.op, ", or method: listed")
        search = self._search(before)
        chosen, record = choose_layers(model, tokenizer, full_layers(before), search, context.progress)
        context.after = self.after(before, chosen)
        rewrite_model(model, self, replace(context, change=replace(context.change, after=context.after)))
        return {"sliding": chosen, "measured": record}


class Every(SlidingLayers):
    """All layers but every n-th, as in models that are trained with both kinds."""

    method: Literal["every"]
    full_every: int = Field(
        2, ge=2, strict=True, description="Every so many layers one sees all tokens: layers n - 1, 2n - 1, and so on."
    )

    def wanted(self, anatomy: Anatomy) -> list[int]:
        return [index for index in full_layers(anatomy) if (index + 1) % self.full_every]


class Listed(SlidingLayers):
    """The layers that the recipe names."""

    method: Literal["listed"]
    layers: list[WholeNumber] = Field(description="Layers that get the window, from 0.")

    def wanted(self, anatomy: Anatomy) -> list[int]:
        return sorted(set(self.layers))

    def problems_of_method(self, anatomy: Anatomy) -> Iterator[str]:
        if wrong := sorted(index for index in set(self.layers) if index >= len(anatomy.layers)):
            yield f"layers: {wrong}: there are layers 0 to {len(anatomy.layers) - 1}"
        elif already := sorted(set(self.layers) - {*full_layers(anatomy)}):
            yield f"layers: {already} slide already, by the base's own window: leave them out"


def full_layers(anatomy: Anatomy) -> list[int]:
    """The layers that see all tokens, by index."""
    return [layer.index for layer in anatomy.layers if layer.window is None]


METHODS = SlidingLayers.union(Ablation, Every, Listed)
