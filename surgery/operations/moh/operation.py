"""Mixture of heads: some heads are on for every token, of the others a router chooses a few for each.

Source: Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. Unlike its code:
which heads are shared is measured, the router starts from data without training, and what is off is not computed.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from surgery.operations.base import SURGICAL, Change, Context
from surgery.operations.moh.base import FITTED, Gated

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer_anatomy import LayerAnatomy
    from surgery.runtime.surgery_gates import Gate


class Moh(Gated):
    """A router turns on as many heads, or KV groups, as `active_ratio` says."""

    summary: ClassVar[str] = "Mixture of heads (MoH): a router turns heads on for each token."
    limits: ClassVar[tuple[str, ...]] = (
        "Keys and values are still made and kept for every token: the cache is as large as before.",
        FITTED + " Heads that only rare text needs may be off when it comes.",
        "Work is skipped without gradients: in prompts from 512 tokens on; in decoding on a CPU by projections of "
        "wide models, and after 2k tokens by attention, of KV heads without any head that is on. Attention on a GPU, "
        "or of a batch with padding, computes all heads.",
    )

    op: Literal["moh"] = "moh"
    active_ratio: float = Field(0.67, gt=0, le=1, description="Share of the heads that are on for a token.")
    shared_ratio: float = Field(0.25, ge=0, lt=1, description="Share of the heads that are on for all tokens.")
    granularity: Literal["head", "kv_group"] = Field(
        "head", description="What the router turns on: single query heads, or those of a KV head together."
    )

    def problems(self, anatomy: Anatomy) -> list[str]:
        found = super().problems(anatomy)
        if found:
            return found
        if 0 < self.shared_ratio >= self.active_ratio:
            return [
                f"moh: shared_ratio {self.shared_ratio:g} is not less than active_ratio {self.active_ratio:g}: shared "
                "heads are among those that are on, and the router chooses at least one more"
            ]
        units = "KV groups" if self.granularity == "kv_group" else "query heads"
        for layer, (on, _) in zip(self._layers(anatomy), self._counts(anatomy), strict=True):
            if on < 1:
                found.append(
                    f"moh: active_ratio {self.active_ratio:g} of {self._units(layer)} {units} leaves layer "
                    f"{layer.index} none that is on; give at least 1/{self._units(layer)}, "
                    f"{ceil(1000 / self._units(layer)) / 1000:g}"
                )
        return found[:1]

    def _units(self, layer: LayerAnatomy) -> int:
        return layer.kv_heads if self.granularity == "kv_group" else layer.heads

    def _counts(self, anatomy: Anatomy) -> list[tuple[int, int]]:
        """(units on, shared ones among them) of each gated layer.

        What rounding leaves over goes on to the next layer, so that the ratios hold over all of them.
        """
        found, want_on, want_shared = [], 0.0, 0.0
        for layer in self._layers(anatomy):
            units = self._units(layer)
            want_on += self.active_ratio * units
            want_shared += self.shared_ratio * units
            on = min(units, _round(want_on))
            shared = max(0, min(on - 1, _round(want_shared)))
            want_on, want_shared = want_on - on, want_shared - shared
            found.append((on, shared))
        return found

    def plan(self, anatomy: Anatomy) -> Change:
        layers, counts = self._layers(anatomy), self._counts(anatomy)
        units = sum(self._units(layer) for layer in layers)
        on, shared = (sum(numbers) for numbers in zip(*counts, strict=True))
        name = "KV groups" if self.granularity == "kv_group" else "query heads"
        each = sorted({(f"{a} of {self._units(layer)}", s) for layer, (a, s) in zip(layers, counts, strict=True)})
        shown = ", ".join(f"{a} ({s} shared)" for a, s in each[:4]) + (", ..." if len(each) > 4 else "")
        line = (
            f"{on} of {units} {name} are on for a token ({on / units:.1%}), {shared} of them for every token; "
            f"a layer has {shown}"
        )
        router = f"{len(layers)} of {len(anatomy.layers)} layers have a router: {self.router}"
        measured = self._measures or shared > 0
        notes = self._notes(anatomy, [(on, self._units(layer)) for layer, (on, _) in zip(layers, counts, strict=True)])
        gates = [self._gate(layer, *pair, tuple(range(pair[1]))) for layer, pair in zip(layers, counts, strict=True)]
        more = self._parameters(anatomy, gates)
        return Change(anatomy, (line, router), SURGICAL, tuple(notes), measured=measured, parameters=more)

    def _gate(self, layer: LayerAnatomy, on: int, shared: int, which: tuple[int, ...] = ()) -> Gate:
        """A layer's gate; which units are shared is not known before they are measured."""
        from surgery.architecture.layer_anatomy import groups_of
        from surgery.runtime.surgery_gates import Gate

        groups = [len(group) for group in groups_of(layer)]
        units = tuple(groups) if self.granularity == "kv_group" else (1,) * layer.heads
        return Gate("moh", units, which, on - shared)

    def apply(self, model, context: Context) -> dict:
        from surgery.architecture.anatomy import Anatomy
        from surgery.operations.moh.router import Planned

        anatomy = Anatomy.of(model)
        counts = zip(self._layers(anatomy), self._counts(anatomy), strict=True)
        planned = {layer.index: Planned(self._gate(layer, *pair), pair[1]) for layer, pair in counts}
        return self._place(model, anatomy, planned, context)


def _round(number: float) -> int:
    """To the nearest whole number, halves up; what is lost in adding ratios does not turn the scale."""
    return int(number + 0.5 + 1e-9)
