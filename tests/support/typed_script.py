"""What a user's package may hold: an operation of their own, and a script that plans with it. Checked, not run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

import surgery
from surgery import Anatomy, AttentionLayer, LayerAnatomy, PlannedChange


class KeepOne(surgery.WeightRewrite):
    """All query heads read one of the KV heads."""

    summary: ClassVar[str] = "Keep one KV head."
    LIMITATIONS: ClassVar[tuple[str, ...]] = ("What the other heads held is lost.",)

    op: Literal["keep_one"] = "keep_one"
    head: int = Field(default=0, ge=0, description="The KV head that stays.")
    layers: list[int] | None = Field(default=None, description="Layers that are changed; default all.")

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("k", "v")

    def problems(self, anatomy: Anatomy) -> list[str]:
        fewest = min(layer.kv_heads for layer in anatomy.layers)
        return [f"keep_one: there are {fewest} KV heads"] if self.head >= fewest else []

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        return PlannedChange(anatomy.with_kv_heads(1), (f"KV head {self.head} alone",))

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict[str, object]]:
        kept = {name: layer.tensors()[name][[self.head]] for name in ("k", "v")}
        return layer.replace(anatomy=target, **kept), {"kept": self.head}


class Nothing(surgery.Operation):
    """An operation that edits a loaded model, and leaves it as it was."""

    op: Literal["nothing"] = "nothing"

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        return PlannedChange(anatomy, ("nothing",))

    def apply(self, model: object, context: surgery.ApplyContext) -> dict[str, object]:
        if context.progress is not None:
            context.progress(1, 1, "nothing")
        return {}


def summary(model: str | Path) -> list[str]:
    """What a recipe would do to a model, a line for each change."""
    operation = KeepOne(head=1)
    recipe = {"version": 1, "name": "mine", "operations": [operation.model_dump()]}
    plan: surgery.Plan = surgery.plan(recipe, model, overrides=["evaluate=null"], head=2)
    try:
        report: surgery.Report = surgery.apply(recipe, model, output="out", check=False)
    except surgery.SurgeryError as error:
        return [error.what, error.fix]
    result = surgery.evaluate(model, text="builtin", windows=2)
    loaded = surgery.load("out")
    figures = result.to_dict()
    return [*plan.changes, *plan.notes, str(report.folder), type(loaded).__name__, *figures]
