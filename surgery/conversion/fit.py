"""Which recipes fit a model, and what each would do to it. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.arguments import no_model
from surgery.config.catalogue import Entry, entries
from surgery.conversion.plan import Plan, conflicts, make_plan
from surgery.errors import SurgeryError
from surgery.io.safetensors import header_table
from surgery.operations.base import NATIVE


@dataclass(frozen=True)
class Fit:
    """One shipped recipe on one model.

    Attributes:
        entry: the recipe's entry in the catalogue.
        plan: what the recipe would do; None if it cannot be applied.
        problems: why it cannot be applied, or why it would change nothing; (): it fits.
        needs_base: it cannot follow the surgery of this checkpoint, but may be applied to the checkpoint's base.
    """

    entry: Entry
    plan: Plan | None
    problems: tuple[str, ...] = ()
    needs_base: bool = False

    def to_dict(self) -> dict:
        """What the recipe would do, as plain data."""
        facts = {"tier": self.entry.tier, "training": self.entry.training, "purpose": self.entry.purpose}
        if self.plan is None:
            return facts | {"needs_base": self.needs_base}
        cache = {key: self.plan.summary()[key] for key in ("kv_bytes_per_token", "kv_bytes_fixed")}
        return facts | {"tier": self.plan.tier, "changes": self.plan.changes} | cache


def anatomy_of(model: str | Path | Any) -> Anatomy:
    """The anatomy of a folder, a name, a Hub id, a loaded model or a config; no weight is read."""
    if not isinstance(model, str | Path):
        if not hasattr(model, "config") and not hasattr(model, "get_text_config"):
            raise no_model(model)
        return Anatomy.of(model)
    from surgery.io.hub import resolve

    source = resolve(str(model), weights=False)
    return Anatomy.of(source.path, header_table(source.headers))


def fitting_recipes(anatomy: Anatomy) -> dict[str, list[str]]:
    """For each shipped recipe, the reasons why it cannot be applied to a model with this anatomy ([]: it can)."""
    return {fit.entry.name: list(fit.problems) for fit in fits(anatomy)}


def fits(anatomy: Anatomy) -> list[Fit]:
    """Every shipped recipe on a model with this anatomy, in the order of `surgery ls`."""
    return [_fit(entry, anatomy) for entry in entries()]


def _fit(entry: Entry, anatomy: Anatomy) -> Fit:
    recipe = recipes.load(entry.name)
    try:
        plan = make_plan(recipe, anatomy, "")
    except SurgeryError as error:
        needs_base = bool(anatomy.terms) and any(conflicts(op, [], anatomy) for op in recipe.operations)
        whose = f"{recipe.operations[0].op}: " if len(recipe.operations) == 1 else ""  # the recipe's name says it
        return Fit(entry, None, tuple(fault.what.removeprefix(whose) for fault in (error, *error.others)), needs_base)
    if all(step.change.after is step.before for step in plan.steps) and plan.tier == NATIVE:
        return Fit(entry, None, (f"it changes {'; '.join(plan.changes)}",))
    idle = [step.without_effect for step in plan.steps]
    return Fit(entry, None, tuple(idle)) if all(idle) else Fit(entry, plan, ())
