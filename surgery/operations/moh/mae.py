"""A mixture of h - 1 heads: for each token the head that it needs least is off, or all but it count a little more.

Source: Peng et al. 2020, "A Mixture of h - 1 Heads is Better than h Heads", arXiv 2005.06537. Unlike there the weights
follow from each token and not from the mean of a text, which a decoder does not know yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from surgery.operations.base import SURGICAL, Change, Context
from surgery.operations.moh.base import FITTED, Gated

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer_anatomy import LayerAnatomy
    from surgery.runtime.surgery_gates import Gate


class Mae(Gated):
    """Experts are all heads but one; a router weighs them, or chooses one."""

    summary: ClassVar[str] = "Mixture of h - 1 heads (MAE): for each token one head is off, or heads are weighed."
    limits: ClassVar[tuple[str, ...]] = (
        "Soft weights skip no work, and hard ones one head's, which is left out only where a layer has four heads or "
        "fewer: of more it costs less to compute all. The cache is as large as before.",
        FITTED,
    )

    op: Literal["mae"] = "mae"
    hard: bool = Field(
        True, description="One head is off; false: soft weights of all experts, identity at router: zero."
    )
    rescale: bool = Field(False, description="Hard: the heads that are on count H / (H - 1), as in the paper.")

    def problems(self, anatomy: Anatomy) -> list[str]:
        found = super().problems(anatomy)
        if not found and any(layer.heads < 2 for layer in self._layers(anatomy)):
            found.append("mae: a layer with a single query head has none to leave out")
        if self.rescale and not self.hard:
            found.append("mae: rescale is for hard: true; soft weights are scaled by themselves")
        return found

    def plan(self, anatomy: Anatomy) -> Change:
        layers = self._layers(anatomy)
        heads = sum(layer.heads for layer in layers)
        what = "the query heads are weighed for each token"
        if self.hard:
            what = f"{heads - len(layers)} of {heads} query heads are on for a token, all but one in each layer"
            what += ", scaled by H / (H - 1)" if self.rescale else ""
        router = f"{len(layers)} of {len(anatomy.layers)} layers have a router: {self.router}"
        notes = self._notes(anatomy, [(layer.heads - 1, layer.heads) for layer in layers])
        notes = notes if self.hard else ["soft weights turn nothing off: no work is skipped"]
        more = self._parameters(anatomy, [self._gate(layer) for layer in layers])
        return Change(anatomy, (what, router), SURGICAL, tuple(notes), measured=self._measures, parameters=more)

    def _gate(self, layer: LayerAnatomy) -> Gate:
        from surgery.runtime.surgery_gates import Gate

        return Gate("mae", (1,) * layer.heads, hard=self.hard, rescale=self.rescale)

    def apply(self, model, context: Context) -> dict:
        from surgery.architecture.anatomy import Anatomy
        from surgery.operations.moh.router import Planned

        anatomy = Anatomy.of(model)
        planned = {layer.index: Planned(self._gate(layer), 0) for layer in self._layers(anatomy)}
        return self._place(model, anatomy, planned, context)
