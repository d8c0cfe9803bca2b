"""The method `closed_form` of `gqa`: the merge that loses least on a calibration text, followed by refits.

The method is our own: see `closed_form.py`, `layerwise_fit.py` and `fit_scores.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.calibration.closed_form.cost import TRIED, Calibration, efforts
from surgery.data.text import CALIBRATION_TEXTS_ARE, VARIED, CalibrationText
from surgery.errors import UnsupportedModelError, all_of
from surgery.io.printing import count
from surgery.operations.base import (
    SURGICAL,
    ApplyContext,
    CalibrationRecall,
    Measurement,
    recall_notes,
    recall_problems,
)
from surgery.operations.gqa.base import GQA, MergeSeed
from surgery.operations.gqa.heads_by_layer import choose_heads, largest_total, possible_numbers
from surgery.operations.head_scorers.choice import HeadChoice

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy


# SmolLM2-135M, whose 3 KV heads become 1, passes the recipe's gate where four fifths of its layers keep theirs. Where
# three quarters do, it fails on one machine and passes on another (recipes/gqa.md).
KEPT = 0.8
# The far past of the scores, as of a head split with its defaults; and the score above which a head copies (Wu et al.
# 2024, arXiv 2404.15574).
SINKS, WINDOW, COPIES = 16, 240, 0.1


class ClosedForm(GQA):
    """What loses least on calibration text, the rest refitted."""

    LATER: ClassVar[tuple[str, ...]] = ("keep_kv", "kept_by", "calibration_recall")

    method: Literal["closed_form"]
    keep_layers: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the layers that keep their KV heads, those where sharing costs most on the "
        f"calibration text (surgical tier). 0: none, or {KEPT} where kv_heads and keep_kv are null.",
    )
    keep_kv: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the KV heads of all layers that is left, in place of keep_layers. A measurement decides "
        "how many each layer keeps: any number that divides the query heads, or with kv_heads set, that number or all "
        "(surgical tier).",
    )
    kept_by: Literal["copying", "loss"] | None = Field(
        None,
        description="Which layers keep their KV heads. copying: first those whose heads copy from far back, by "
        "retrieval scores (induction scores where the model repeats no passkey), then those where fewer heads cost "
        "most; loss: only the latter. null: copying with keep_kv, else loss.",
    )
    seed: MergeSeed = 0
    refit: list[Literal["q", "k", "v", "o", "mlp"]] = Field(
        ["q", "k", "v", "o", "mlp"],
        description="Projections that are refitted after the merge: those of attention to the base's "
        "attention; the MLP's output (mlp) to the base's states behind each layer.",
    )
    sequential: bool = Field(
        False, description="Attention is fitted to what the converted layers give it, not the base's."
    )
    ridge: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        "auto",
        description="Pull of output projections to what they were, relative to their inputs' energy; "
        "auto: of each layer what is best on text held back.",
    )
    calibration_samples: int = Field(
        28, ge=2, strict=True, description="Pieces of text; a sixth is held back. More, to 40, lose less."
    )
    calibration_length: int = Field(512, ge=8, strict=True, description="Tokens in a piece.")
    calibration_text: str = Field("mixed", description=CALIBRATION_TEXTS_ARE)
    calibration_recall: CalibrationRecall = 0.0

    @property
    def start_only(self) -> bool:
        return False

    @property
    def usual_tier(self) -> str:
        return SURGICAL if self.kept_share or self.keep_kv else super().usual_tier

    @property
    def streams(self) -> bool:
        return False

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o")  # queries and outputs absorb the maps of the merge

    def milder(self) -> str:
        if self.keep_kv:
            return f"keep_kv={round((1 + self.keep_kv) / 2, 2):g}" if self.keep_kv <= 0.9 else ""
        return "" if self.kept_share or isinstance(self.kv_heads, list) else f"keep_layers={KEPT}"

    def ladders(self, anatomy: Anatomy) -> list[list[dict[str, Any]]]:
        heads, kv_heads = anatomy.layers[0].heads, anatomy.layers[0].kv_heads
        fewer = [count for count in range(kv_heads - 1, 0, -1) if heads % count == 0]
        if not fewer:
            return []
        rungs = [
            (share / 100, {"kv_heads": None, "keep_layers": 0, "keep_kv": share / 100})
            for share in range(99, ceil(100 * fewer[-1] / kv_heads) - 1, -1)
        ]
        same = [(count / kv_heads, {"kv_heads": count, "keep_layers": 0}) for count in fewer]  # native
        return [[rung for _, rung in sorted(rungs + same, key=lambda each: -each[0])]]

    @property
    def kept_share(self) -> float:
        """The share of the layers that keep their KV heads; 0 where keep_kv says how many heads are left."""
        return self.keep_layers or (KEPT if self.kv_heads is None and not self.keep_kv else 0.0)

    def kept_layers(self, anatomy: Anatomy) -> int:
        """How many layers keep their KV heads; which ones is measured."""
        kept = int(self.kept_share * len(anatomy.layers) + 0.5)
        return kept if self.keep_layers else min(kept, len(anatomy.layers) - 1)

    def candidates(self, anatomy: Anatomy) -> tuple[int, ...]:
        if self.keep_kv and not isinstance(self.kv_heads, list):
            own, possible = anatomy.layers[0].kv_heads, self._possible(anatomy)
            return tuple(number for number in possible if number < own) if len(possible) > 1 else ()
        shares = isinstance(self.kv_heads, list) or self.shared_heads >= anatomy.layers[0].kv_heads
        return () if shares or not self.kept_layers(anatomy) else (self.shared_heads,)

    @property
    def _scores(self) -> HeadChoice:
        """The scores of heads that copy."""
        return HeadChoice("gqa", 0.5, "retrieval", SINKS, WINDOW)

    def by_copying(self, anatomy: Anatomy) -> bool:
        """Whether layers whose heads copy keep their heads first."""
        if self.kept_by or not self.keep_kv:
            return self.kept_by == "copying"
        return not self._scores.problems(anatomy)

    def targets(self, anatomy: Anatomy) -> list[int]:
        heads = [layer.kv_heads for layer in anatomy.layers]
        if isinstance(self.kv_heads, list):
            return self.kv_heads
        if self.keep_kv and (possible := self._possible(anatomy)):
            return choose_heads([dict.fromkeys(possible, 0.0)] * len(heads), self._total(anatomy) or 0)
        kept_layers = 0 if self.keep_kv else self.kept_layers(anatomy)
        return heads[:kept_layers] + [self.shared_heads] * (len(heads) - kept_layers)

    def _fewer(self, anatomy: Anatomy) -> list[int]:
        """The numbers of KV heads below the base's that keep_kv may give to a layer."""
        layer = anatomy.layers[0]
        asked = range(1, layer.kv_heads) if self.kv_heads is None else [self.shared_heads]
        return [
            number
            for number in asked
            if number < layer.kv_heads and layer.heads % number == 0 and not anatomy.kv_heads_problem(number)
        ]

    def _total(self, anatomy: Anatomy) -> int | None:
        """The KV heads of all layers together under keep_kv; None: it leaves too few."""
        layers, own = len(anatomy.layers), anatomy.layers[0].kv_heads
        most = int((self.keep_kv or 1.0) * layers * own + 1e-6)
        return largest_total([*self._fewer(anatomy), own], layers, most)

    def _possible(self, anatomy: Anatomy) -> list[int]:
        """The numbers of KV heads that a layer may have under keep_kv, in order."""
        total = self._total(anatomy)
        numbers = [*self._fewer(anatomy), anatomy.layers[0].kv_heads]
        return [] if total is None else possible_numbers(numbers, len(anatomy.layers), total)

    def problems(self, anatomy: Anatomy) -> list[str]:
        problems = super().problems(anatomy)
        if not anatomy.alike or len(targets := self.targets(anatomy)) != len(anatomy.layers):
            return problems
        if self.calibration_recall:
            problems += recall_problems("gqa", self.calibration_length)
        if self.kept_by == "copying":
            if not self.keep_kv and not self.kept_share:
                problems.append("gqa: kept_by: copying needs keep_kv or keep_layers, since no layer keeps its heads")
            problems += self._scores.problems(anatomy)
        if self.keep_kv:
            return problems or list(self._problems_of_share(anatomy))
        if not self.keep_layers:
            return problems
        if isinstance(self.kv_heads, list):
            problems.append("gqa: kv_heads lists what each layer gets: drop keep_layers, or give kv_heads one number")
        elif (kept_layers := self.kept_layers(anatomy)) in (0, len(targets)):
            share = "none" if kept_layers == 0 else "all"
            problems.append(
                f"gqa: keep_layers: {self.keep_layers} of {len(targets)} layers is {share} of them; 0 keeps none"
            )
        return problems

    def _problems_of_share(self, anatomy: Anatomy) -> Iterator[str]:
        layer, layers, fewer = anatomy.layers[0], len(anatomy.layers), self._fewer(anatomy)
        if self.keep_layers:
            yield "gqa: keep_kv and keep_layers both say how much is left: drop keep_kv, or set keep_layers=0"
        if isinstance(self.kv_heads, list):
            yield "gqa: kv_heads lists what each layer gets: drop keep_kv, or give kv_heads one number or null"
        elif not fewer and (self.keep_kv or 1) < 1:
            number = f"kv_heads: {self.kv_heads}, and" if self.kv_heads else "a layer with"
            yield f"gqa: keep_kv: nothing can go, with {number} {count(layer.kv_heads, 'KV head')} in the model"
        elif self._total(anatomy) is None:
            yield (
                f"gqa: keep_kv: {self.keep_kv:g} of {layers * layer.kv_heads} KV heads is fewer than "
                f"{min(fewer)} in each of {layers} layers: take at least {_up(min(fewer) / layer.kv_heads):g}"
            )
        if self.grouping == "similarity" and len(self.candidates(anatomy)) > 1:
            yield "gqa: grouping: similarity orders heads for one number of groups: give kv_heads one number"

    def problems_of_method(self, anatomy: Anatomy) -> list[str]:
        return [f"gqa: method: closed_form: {reason}" for reason in self._problems_of_fit(anatomy)]

    def _problems_of_fit(self, anatomy: Anatomy) -> Iterator[str]:
        if reason := anatomy.runtime_problem():
            yield f"{reason}, and it must be measured: use method: mean"
        if anatomy.layers[0].qk_norm == "whole":
            yield f"the QK-norm of {anatomy.model_type} spans all heads: use method: mean"
        if self.align != "none":
            yield "it aligns heads by what they say on text: drop align"
        if len(set(self.refit)) < len(self.refit):
            yield f"refit names a projection twice: {', '.join(self.refit)}"

    def measurements(self, anatomy: Anatomy, shared: int) -> tuple[Measurement, ...]:
        fitted = len(anatomy.layers) if self.candidates(anatomy) else shared
        scores = self._scores.measurements(anatomy) if self.candidates(anatomy) and self.by_copying(anatomy) else ()
        return (*scores, *self._calibration(anatomy).measurements(anatomy, fitted))

    @property
    def _text(self) -> CalibrationText:
        return CalibrationText(
            self.calibration_text, self.calibration_length, self.calibration_samples, self.calibration_recall
        )

    def _calibration(self, anatomy: Anatomy) -> Calibration:
        of_scores = len({"q", "k"} & set(self.refit)) if not anatomy.layers[0].qk_norm else 0
        return Calibration(
            self.calibration_samples,
            self.calibration_length,
            efforts(max(0, 2 * of_scores - 1)),  # queries are fitted twice where keys are fitted, too
            "v" in self.refit,
            written=self._text.written_tokens,
            tried=TRIED if self.candidates(anatomy) else 0,
            trials=max(1, len(self.candidates(anatomy))),
            outputs=("o" in self.refit) * (1 + ("v" in self.refit)),  # before and after the fit of values
            mlp="mlp" in self.refit,
            copied=self.grouping == "similarity",
            ahead=not self.sequential,
        )

    def notes_of_method(self, anatomy: Anatomy) -> Iterator[str]:
        norm = anatomy.layers[0].qk_norm
        projections = [projection for projection in self.refit if not (norm and projection in "qk")]
        fitted = all_of(projections) or "nothing"
        if "mlp" in projections:
            fitted += " (the MLP's output projection; not refitted in layers with experts or a norm after the MLP)"
        calibration = self._calibration(anatomy)
        half = "text, half of it written by the model"
        kind = {
            "mixed": half,
            VARIED: f"{half} from openings of many kinds",
            "conversations": f"{half}, with conversations",
            "self": "text that the model writes",
        }
        text = kind.get(self.calibration_text, "text")
        yield f"fitted on {calibration.tokens:,} tokens of {text}; refitted after the merge: {fitted}"
        if self.candidates(anatomy):
            if self.by_copying(anatomy):
                yield (
                    "layers whose heads copy from far back keep all their KV heads, the strongest first; what is left "
                    "goes to the layers where fewer heads cost most, each tried alone"
                )
            elif self.keep_kv:
                yield (
                    "how many KV heads each layer keeps is measured: each layer is tried alone with each number, and "
                    "the numbers are taken whose losses have the least sum"
                )
            else:
                which = f"which {self.kept_layers(anatomy)} of {len(anatomy.layers)} layers keep their KV heads"
                yield f"{which} is measured: the layers where sharing costs most, each tried alone"
        yield from recall_notes(self.calibration_recall)
        if norm:
            yield (
                "a norm stands between keys and RoPE, so keys cannot be mixed: of each group one key head stays as it "
                "is, queries too; values and output projection are fitted"
            )
        if anatomy.layers[0].soft_cap:
            yield "scores are fitted before their soft-cap, as if there were none"

    def apply(self, model: Any, context: ApplyContext) -> dict[str, Any]:
        from surgery.calibration.closed_form.layer_inputs import FitSettings
        from surgery.operations.gqa.closed_form import share_kv_heads

        before, targets = context.before, self.targets(context.before)
        if set(targets) == {before.layers[0].kv_heads}:
            return {}
        orders, candidates = None, self.candidates(before)
        if self.grouping == "similarity":
            shared = [candidates[0]] * len(targets) if candidates else targets
            orders = [partial(self.order, groups=target) for target in shared]
        ridges = {} if self.ridge == "auto" else dict.fromkeys(("ridges", "mlp_ridges"), (self.ridge,))
        settings = FitSettings(refit=tuple(self.refit), sequential=self.sequential, **ridges)
        copying = partial(self._copying, model, context) if self.by_copying(before) else None
        return share_kv_heads(model, context, self._text, settings, orders, candidates, copying)

    def _copying(self, model: Any, context: ApplyContext) -> tuple[str, list[float]]:
        """The name of the scores, and each layer's strength: the sum of the scores of its heads that copy."""
        try:
            found = self._scores.measure(model, context)
        except UnsupportedModelError:  # it repeats no passkey
            found = replace(self._scores, scores="induction").measure(model, context)
        return found.method, [sum(score for score in of_layer if score > COPIES) for of_layer in found.scores]


def _up(share: float) -> float:
    """A share, rounded up to three digits."""
    return ceil(share * 1000 - 1e-9) / 1000
