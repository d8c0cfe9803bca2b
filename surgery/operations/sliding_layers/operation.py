"""Give some layers a sliding window, in a stock model: their cache stops growing, and they forget what lies before.

Source: Beltagy et al. 2020, "Longformer", arXiv 2004.05150 (the window); models that are trained with both kinds of
layers: Gemma Team 2024, "Gemma 2", arXiv 2408.00118. The choice of layers is our own: see `ablation.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.architecture.sliding import full_layers, slides, sliding_fields, sliding_problem
from surgery.calibration.cost import Measurement, activation_bytes, forward_flops, logit_bytes
from surgery.data.text import BUILTIN
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


BEYOND, LEAST = 512, 256  # tokens of a calibration text beyond the window: by default, and at least


class SlidingLayers(Variants, WeightRewrite):
    """A window in some layers; the others see all tokens, as before."""

    summary: ClassVar[str] = "A sliding window in some layers, as a stock model."
    purpose: ClassVar[str] = "cache"
    TEXTS: ClassVar[tuple[str, ...]] = (BUILTIN,)
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Layers with the window do not see what lies before it, not even the first token. Recall over long distances "
        "rests on the other layers. A recall test, where this card has one, tests it with literal answers alone.",
    )

    op: Literal["sliding_layers"] = "sliding_layers"
    method: str = Field(description="How the layers with the window are chosen.")
    window: Length = Field(
        512, description="Last tokens that such a layer sees. Where layers of the base slide, it must be theirs."
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
        kind, positions, problems = anatomy.model_type, anatomy.positions, []
        own = {anatomy.layers[index].window for index in slides(anatomy)}
        if own and own != {self.window}:
            held = min(filter(None, own))
            problems.append(
                f"sliding_layers: window: a config has one window, and that of this {kind} is {held}: window={held}"
            )
        elif positions and self.window >= positions:
            problems.append(
                f"sliding_layers: window: this model takes {positions:,} tokens, so that a window of {self.window:,} "
                "leaves nothing out: take a smaller one"
            )
        problems += [f"sliding_layers: {reason}" for reason in self.problems_of_method(anatomy)]
        if not problems and len(self.wanted(anatomy)) >= len(full_layers(anatomy)):
            problems.append("sliding_layers: no layer would see all tokens: leave at least one full")
        return problems

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        chosen, total = self.wanted(anatomy), count(len(anatomy.layers), "layer")
        if not chosen:
            return PlannedChange(anatomy, ("nothing: no layer gets the window",))
        which = f" ({spans(chosen)})" if self.streams else ""  # else a measurement chooses them
        line = f"a window of {self.window:,} tokens in {len(chosen)} of {total}{which}"
        after = self.after(anatomy, chosen)
        return PlannedChange(after, (line,), NATIVE, tuple(self._notes(anatomy, after)))

    def after(self, anatomy: Anatomy, chosen: Collection[int]) -> Anatomy:
        """The anatomy in which these layers, and those that slide already, have the window."""
        sliding = {*slides(anatomy), *chosen}
        return anatomy.with_windows(sliding, self.window, sliding_fields(anatomy, sliding, self.window))

    def _notes(self, anatomy: Anatomy, after: Anatomy) -> Iterator[str]:
        if after.model_type != anatomy.model_type:
            yield f"the result is a stock {after.model_type}, which computes what {anatomy.model_type} does"
        if already := slides(anatomy):
            yield f"{count(len(already), 'layer')} had the window before: layers {spans(already)}"

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        chosen, already, total = record.get("sliding") or self.wanted(before), slides(before), len(before.layers)
        if not chosen:
            return None
        sliding, before_that = sorted({*chosen, *already}), ""
        if already:
            before_that = f" ({len(already)} of them did so before)"
        return InWords(
            f"a window of {self.window:,} tokens in {len(sliding)} of {total} layers",
            f"{len(sliding)} of its {total} layers see only the last {self.window:,} tokens of a "
            f"sequence{before_that}: layers {spans(sliding)}. The others see all of it.",
            use="Use it for long chats and long documents in little memory. An engine that does not read "
            "`layer_types` computes full attention, without a word.",
            avoid=f"Do not use it for sequences of up to {self.window:,} tokens: nothing is saved there.",
        )

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict]:
        return layer.replace(anatomy=target), {}


class Ablation(SlidingLayers):
    """The layers that lose least with a window, on plain text and on answers; they are chosen in rounds."""

    method: Literal["ablation"] = "ablation"
    sliding: float = Field(0.5, gt=0, lt=1, description="Share of the full layers that get the window.")
    rounds: Count = Field(
        3, description="Rounds of the choice. Each tries the layers that are left, beside those chosen before."
    )
    answers: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="Weight of what answers lose (passkeys from far back), beside 1 for plain text.",
    )
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
        return f"sliding={round(self.sliding / 2, 3):g}"

    def ladders(self, anatomy: Anatomy) -> list[list[dict[str, Any]]]:
        layers = len(full_layers(anatomy))
        return [[{"sliding": count / layers} for count in range(1, layers)]]

    def wanted(self, anatomy: Anatomy) -> list[int]:
        full = full_layers(anatomy)
        return full[: int(self.sliding * len(full) + 0.5)]

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
        if (beyond := self.length(anatomy) - self.window) < LEAST:
            remedy = f"calibration_length={self.window + BEYOND}"
            if anatomy.positions and self.window + LEAST > anatomy.positions:
                longest = anatomy.positions - LEAST
                remedy = f"a window of up to {longest:,}, as this model takes {anatomy.positions:,}"
            yield (
                f"calibration_length: {max(beyond, 0)} tokens beyond the window are too few for a question about what "
                f"lies before it: {remedy}, or method=listed"
            )
        if not self.wanted(anatomy):
            yield (
                f"sliding: {self.sliding:g} of {count(len(full_layers(anatomy)), 'full layer')} is none: take more, "
                "or method=listed"
            )

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        change, length = super().plan(anatomy), self.length(anatomy)
        # Layers before the one that is tried are not computed again: one forward pass for a text of each kind. Each
        # round also runs each text through the base, and with the layers that are chosen already.
        search = self._search(anatomy)
        passes = self.calibration_samples * (
            search.trials(len(full_layers(anatomy))) + 4 * len(search.chosen_in_rounds())
        )
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
        2,
        ge=2,
        strict=True,
        description="n: layers n - 1, 2n - 1, ... see all tokens, the others get the window.",
    )

    def wanted(self, anatomy: Anatomy) -> list[int]:
        return [index for index in full_layers(anatomy) if (index + 1) % self.full_every]


class Listed(SlidingLayers):
    """The layers that the recipe names."""

    method: Literal["listed"]
    layers: list[WholeNumber] = Field(description="Layers that get the window, from 0.")

    def wanted(self, anatomy: Anatomy) -> list[int]:
        return sorted({*self.layers})

    def problems_of_method(self, anatomy: Anatomy) -> Iterator[str]:
        if wrong := [index for index in self.wanted(anatomy) if index >= len(anatomy.layers)]:
            yield f"layers: {wrong}: there are layers 0 to {len(anatomy.layers) - 1}"
        elif already := sorted({*self.layers} & {*slides(anatomy)}):
            yield f"layers: {already} have the window already: leave them out"
        if len({*self.layers}) < len(self.layers):
            yield f"layers names a layer twice: {self.layers}"


def spans(indices: Collection[int]) -> str:
    """Numbers as text, with runs of three or more as a range: "0 to 4, 7, 9"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = (f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(parts)


METHODS = SlidingLayers.union(Ablation, Every, Listed)
