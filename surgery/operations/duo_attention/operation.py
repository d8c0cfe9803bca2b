"""Split the heads: retrieval heads keep the whole past, streaming heads keep a few sinks and a window.

Source: Xiao et al. 2024, "DuoAttention", arXiv 2410.10819 (the split); Xiao et al. 2023, "StreamingLLM", arXiv
2309.17453 (sinks + window). Unlike in the released code, visibility is a set of positions here. So prefill in one
piece, prefill in chunks and decoding give the same result: a streaming head sees sinks + window in all three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.machine.placement import Use
from surgery.operations.base import (
    SURGICAL,
    ApplyContext,
    InWords,
    Operation,
    PlannedChange,
    Seed,
    WholeNumber,
    give_entries,
)
from surgery.operations.head_scorers.choice import HeadChoice
from surgery.operations.head_scorers.scorers import METHODS, how_chosen

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

LONGEST_WINDOW, STEP = 16384, 64  # tokens: the windows that `surgery fit` tries where all heads stream
MOST_KEPT = 1 << 20  # most sinks, and most tokens of a window, as in the runtime (surgery_visibility.py)


class DuoAttention(Operation):
    """Give the KV heads with the lowest scores the visibility sinks + window."""

    summary: ClassVar[str] = "Head split: retrieval heads see all, streaming heads sinks + window (DuoAttention)."
    purpose: ClassVar[str] = "cache"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Streaming heads do not see what lies between the sinks and the window. Recall over long distances rests on "
        "the other heads. A recall test, where this card has one, tests it with literal answers alone.",
        "The cache shrinks only with the cache that this model makes itself (`generate`, or `use_cache=True` without "
        "a cache of yours); a `DynamicCache` that you pass gives the same results without the saving.",
    )
    term: ClassVar[str | None] = "visibility"
    LATER: ClassVar[tuple[str, ...]] = ("scoring",)

    op: Literal["duo_attention"] = "duo_attention"
    streaming_ratio: float | None = Field(0.5, ge=0, le=1, description="Share of the KV heads that stream.")
    threshold: float | None = Field(None, description="Instead of a ratio: KV heads with a lower score stream.")
    sinks: WholeNumber = Field(16, le=MOST_KEPT, description="First tokens of a sequence that a streaming head keeps.")
    window: int = Field(240, ge=1, le=MOST_KEPT, strict=True, description="Newest tokens that a streaming head keeps.")
    scores: str = Field(
        "far-mass",
        description=f"{', '.join(METHODS)} (measured here); or a score file, relative to the current folder.",
    )
    scoring: dict[str, Any] | None = Field(
        None, description="Settings of this method, as in `surgery score --method METHOD KEY=VALUE`."
    )
    calibration_samples: int | None = Field(None, ge=1, description="Calibration sequences; null: the method's own.")
    calibration_length: int | None = Field(None, ge=2, description="Tokens in each; null: the method's own.")
    per_layer_min_retrieval: WholeNumber = Field(0, description="KV heads that every layer keeps full.")
    protect_layers: list[WholeNumber] = Field([], description="Layers whose heads all stay full.")
    seed: Seed = Field(0, description="Seed of the calibration sequences.")

    @property
    def _choice(self) -> HeadChoice:
        return HeadChoice(
            self.op,
            self.streaming_ratio,
            self.scores,
            self.sinks,
            self.window,
            threshold=self.threshold,
            scoring=self.scoring,
            samples=self.calibration_samples,
            length=self.calibration_length,
            least=self.per_layer_min_retrieval,
            protect=self.protect_layers,
            seed=self.seed,
        )

    def problems(self, anatomy: Anatomy) -> list[str]:
        problems = []
        if self.streaming_ratio is None and self.threshold is None:
            problems.append("duo_attention: give streaming_ratio, or threshold in its place")
        elif self.streaming_ratio is not None and self.threshold is not None:
            problems.append(
                f"duo_attention: streaming_ratio ({self.streaming_ratio:g}) and threshold both choose the heads: "
                "streaming_ratio=null, or leave threshold out"
            )
        return problems + self._choice.problems(anatomy)

    def milder(self) -> str:
        return f"streaming_ratio={self.streaming_ratio / 2:g}" if self.streaming_ratio else ""

    def ladders(self, anatomy: Anatomy) -> list[list[dict[str, Any]]]:
        if self.streaming_ratio is None:
            return []
        if self.streaming_ratio == 1:  # all heads stream: what is left is the window
            longest = min(anatomy.positions or LONGEST_WINDOW, LONGEST_WINDOW)
            return [[{"window": window} for window in range(longest // STEP * STEP, 0, -STEP)]]
        return [[{"streaming_ratio": share / 100} for share in range(1, 100)]]

    def problems_before(self, earlier: Anatomy) -> list[str]:
        """Refuse a checkpoint that weighs the first token in heads that could stream without sinks and so lose it."""
        entries = (getattr(earlier.config, "surgery", None) or {}).get("layers", [])
        weighed = {i for i, entry in enumerate(entries) if "surgery_log_gamma" in entry.get("parameters", {})}
        weighed -= {*self.protect_layers, *self._local(earlier)}
        if self.sinks or self.streaming_ratio == 0 or not weighed:
            return []
        return [
            f"duo_attention: this checkpoint weighs the first token (zero_tuning) in layers {sorted(weighed)}, and "
            "heads that stream without sinks lose it: sinks from 1, or protect_layers"
        ]

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        local, choice, total = self._local(anatomy), self._choice, self._able(anatomy)
        measured = choice.measured
        notes, known = [], ""
        if local:
            notes.append(
                f"{len(local)} of {len(anatomy.layers)} layers see no farther than {self.window} tokens by the base's "
                "own window: they stay as they are, and the ratio is of the others"
            )
        wide = [layer for layer in anatomy.layers if layer.window is not None and layer.index not in local]
        if measured and wide:
            notes.append(
                f"{len(wide)} of {len(anatomy.layers)} layers have a window of the base's own, where a streaming head "
                "saves little: how much smaller the cache gets depends on the choice of heads"
            )
        streaming = choice.planned(anatomy, local)
        if measured:  # how many heads stream is known, unless a threshold decides
            known = "up to " if self.threshold is not None else ""
            if choice.needs_scores:
                notes.append(f"which heads stream is decided by a measurement on the model (scores={self.scores})")
        count = sum(map(len, streaming))
        if self.streaming_ratio is not None and count < (wanted := round(self.streaming_ratio * total)):
            notes.append(
                f"streaming_ratio asks for {wanted}: protect_layers and per_layer_min_retrieval leave {count}"
            )
        line = f"{known}{count} of {total} KV heads see only {self.sinks} sinks + {self.window} tokens"
        return PlannedChange(
            anatomy.with_streaming(streaming, self.sinks, self.window),
            (line,),
            SURGICAL,
            tuple(notes),
            measured=measured,
            measurements=choice.measurements(anatomy),
        )

    @property
    def model_use(self) -> Use:
        return self._choice.model_use

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        total, count = self._able(before), sum(map(len, record["streaming"]))
        if not count:
            return None
        tokens = (
            f"the first {self.sinks} and the last {self.window:,} tokens"
            if self.sinks
            else (f"the last {self.window:,} tokens")
        )
        if count == total:
            return InWords(
                f"a cache that stops growing (all KV heads see only {self.sinks} sinks + {self.window:,} tokens)",
                f"All of its {total} KV heads now keep only {tokens} of a sequence.",
                use="Use it on endless streams where the recent text is what matters.",
                avoid="Do not use it where an answer lies farther back: it cannot be seen any more.",
            )
        some = (
            f"Half of its KV heads ({count} of {total})" if 2 * count == total else f"{count} of its {total} KV heads"
        )
        scores = record.get("scores") or {}
        chosen = how_chosen(scores.get("method", ""), scores.get("origin") or {})
        return InWords(
            f"{count} of {total} KV heads streaming (DuoAttention)",
            f"{some} now keep only {tokens} of a sequence; the others still see all of it.{chosen}",
            use="Use it for long chats and long documents in little memory.",
            avoid=f"Do not use it for sequences of up to {self.sinks + self.window:,} tokens: nothing is saved there.",
        )

    def apply(self, model, context: ApplyContext) -> dict:
        scores = self._choice.measure(model, context)
        streaming = self._choice.chosen(scores.scores, self._local(context.before))
        layers = [{"streaming": s, "sinks": self.sinks, "window": self.window} for s in streaming]
        give_entries(model, layers, self.op)
        named = [[x.kv_name(head) for head in s] for x, s in zip(context.before.layers, streaming, strict=True)]
        return {"streaming": named, "scores": scores.to_dict()}

    @property
    def unchanged_within(self) -> int:
        return self.sinks + self.window

    def _able(self, anatomy: Anatomy) -> int:
        """The number of KV heads that could stream."""
        local = self._local(anatomy)
        return sum(layer.kv_heads for layer in anatomy.layers if layer.index not in local)

    def _local(self, anatomy: Anatomy) -> list[int]:
        """Layers that the split would not change, since the base's own window is no wider than `window`."""
        return [layer.index for layer in anatomy.layers if layer.window is not None and layer.window <= self.window]
