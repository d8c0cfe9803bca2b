"""The method `by_head` of `sparse_prefill`: each query head has its own method, given or searched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from surgery.calibration.cost import activation_bytes, forward_flops
from surgery.machine.placement import LAYERS, PASSES, Use
from surgery.operations.base import ApplyContext, Measurement
from surgery.operations.sparse_prefill.base import FromOne, Share, SparsePrefill

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.operations.sparse_prefill.pattern_search import Patterns

DENSITY = 0.2


class ByHead(SparsePrefill):
    """A method of its own for each query head (MInference searches them so)."""

    method: Literal["by_head"]
    density: Share | None = Field(DENSITY, description="Share of the blocks that a head may read, of the search.")
    patterns: list[dict[str, Any]] | None = Field(
        None,
        description="For each query head in order a method and its settings, {method: ..., ...}; null: the best of "
        "each head at this density is searched on calibration text, as in MInference.",
    )
    calibration_samples: FromOne = Field(2, description="Texts of the search.")
    calibration_length: FromOne = Field(2048, description="Tokens in each of them.")

    @property
    def searches(self) -> bool:
        return self.patterns is None

    @property
    def model_use(self) -> Use:
        return PASSES if self.searches else LAYERS

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """The texts go through the model once, and the attention of every head is compared with each pattern."""
        length = min(self.calibration_length, anatomy.positions or self.calibration_length)
        flops = 3 * forward_flops(anatomy, self.calibration_samples * length, length)
        on_gpu = activation_bytes(anatomy, length)
        passes = self.calibration_samples
        measured = Measurement("measuring patterns", flops, memory_on_gpu=on_gpu, passes=passes)
        return (measured,) if self.searches else ()

    def problems_of_search(self, anatomy: Anatomy) -> list[str]:
        if self.searches and any(layer.streaming for layer in anatomy.layers):
            return [
                "the search of patterns needs heads that see all keys, and some stream here: set patterns, or write "
                "one recipe in which the operation sparse_prefill comes before duo_attention"
            ]
        return []

    def problems_of_layer(self, changes: dict[str, Any]) -> list[str]:
        searched = self.searches and changes.get("method", self.method) == self.method
        if searched and (fixed := sorted({"density", "block", "patterns"} & set(changes))):
            return [
                f"patterns are searched for all layers at once, and {', '.join(fixed)} would "
                "be for this one alone: drop it, or give patterns for all"
            ]
        return []

    def with_patterns(self, entry: dict[str, Any], patterns: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.searches or entry["method"] != self.method:
            return entry
        return {name: value for name, value in entry.items() if name != "density"} | {"patterns": patterns}

    def search(self, model: Any, context: ApplyContext) -> Patterns:
        from surgery.operations.sparse_prefill.pattern_search import search_patterns

        tokenizer = context.tokenizer_for("searching patterns needs the tokenizer", self.op, ", or give patterns")
        asked = {"density": self.density or DENSITY, "block": self.block}
        asked |= {"samples": self.calibration_samples, "length": self.calibration_length}
        return search_patterns(model, tokenizer, **asked, progress=context.progress)
