"""What reaches a budget of KV cache: recipes and pairs of them, worked out from plans. No weight is read.

The operations say which settings leave less of the cache (`Operation.ladders`). A recipe of a new operation takes part
without a change here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.catalogue import TRAINING_INCLUDED, TRAINING_NEEDED, Entry, entries
from surgery.config.recipe import Recipe
from surgery.conversion.plan import Plan, make_plan
from surgery.engines import find
from surgery.errors import SurgeryError
from surgery.operations.base import NATIVE, Operation

TEXT = "calibration_text"
ALIKE = "exact"  # purpose of operations that leave the results as they are
PROMPT = "prompt"  # purpose of operations that make prompts faster
PURPOSES = ("cache", "quality", ALIKE)  # of the operations that are tried: others change more than the cache
GOALS = ("quality", "decode", "prefill")  # the least damage, or the fastest of what passes its gate


@dataclass(frozen=True)
class Budget:
    """What a result may take, and where it must run.

    Attributes:
        share: of the base's KV cache, at most.
        context: tokens of the text whose cache is counted.
        native: only stock checkpoints.
        engine: an engine that must be able to run the result; "": none.
        goal: one of `GOALS`.
    """

    share: float
    context: int
    native: bool = False
    engine: str = ""
    goal: str = GOALS[0]

    def refusal_of_purposes(self, recipe: Recipe, anatomy: Anatomy) -> str:
        """Why a recipe serves another goal than this one; "": it may serve this one."""
        wanted = (*PURPOSES, PROMPT) if self.goal == "prefill" else PURPOSES
        if other := next((each.purpose for each in recipe.operations if each.purpose not in wanted), ""):
            return f"it changes more than the cache ({other})"
        if self.goal == "prefill":
            prompts = any(each.purpose == PROMPT for each in recipe.operations)
            return "" if prompts else "it makes no prompt faster"
        if not any(each.ladders(anatomy) for each in recipe.operations):
            return "no setting of it makes the cache smaller"
        return ""

    def refusal(self, plan: Plan) -> str:
        """Why a result that is small enough may not be taken; "": it may."""
        if self.native and plan.tier != NATIVE:
            return "its result is surgical: it needs code of its own"
        if self.engine and (obstacles := find(self.engine).obstacles(plan.after)):
            return f"{self.engine} cannot express {obstacles[0].what}"
        return ""


@dataclass(frozen=True)
class Option:
    """A recipe with settings that reach the budget.

    Attributes:
        name: the recipe and what was set in it.
        recipe, plan: the recipe, and what it does to the model.
        share: what is left of the base's KV cache at the budget's context.
    """

    name: str
    recipe: Recipe
    plan: Plan
    share: float


@dataclass
class Options:
    """What reaches a budget, and why other recipes do not.

    Attributes:
        found: the options, those that leave most of the cache first.
        left_out: recipe -> why it is not among them, of recipes that can make the cache smaller.
        others: recipe -> why it was not considered: it trains, or leaves the cache as it is.
        nearest: the least share that any recipe reaches, with its name; None: no recipe makes the cache smaller.
    """

    found: list[Option] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    nearest: tuple[float, str] | None = None


class Model(NamedTuple):
    """The model that is to become smaller.

    Attributes:
        chats: whether its tokenizer has a chat template, which the calibration text `conversations` needs.
    """

    anatomy: Anatomy
    name: str
    folder: Path
    chats: bool = True

    def recipe(self, name: str) -> Recipe:
        """A shipped recipe, with a calibration text that this model can write."""
        recipe = recipes.load(name)
        if self.chats:
            return recipe
        data = recipe.to_dict()
        steps = [step | ({TEXT: "mixed"} if step.get(TEXT) == "conversations" else {}) for step in data["operations"]]
        return recipes.load(data | {"operations": steps})


def options(model: Model, budget: Budget) -> Options:
    """Every shipped recipe with the mildest settings that reach a budget."""
    made = Options()
    for entry in entries():
        recipe = model.recipe(entry.name)
        if reason := _untrained(entry) or budget.refusal_of_purposes(recipe, model.anatomy):
            made.others[entry.name] = reason
        else:
            _try(made, recipe, model, budget)
    if budget.goal == GOALS[0]:
        made.found = _without_doubles(made)
    return made


def pairs(two: list[Option], model: Model, budget: Budget) -> list[Option]:
    """Both of two recipes, one after the other in either order, where they compose and each saves a part."""
    made = Options()
    for first, second in itertools.permutations(two, 2):
        _try(made, _joined(first.recipe, second.recipe), model, budget)
    return [option for option in made.found if _both_save(option, model, budget)]


def _both_save(option: Option, model: Model, budget: Budget) -> bool:
    """Whether each of the operations saves a part of the cache, and none reaches the budget alone."""
    data = option.recipe.to_dict()
    alone = (recipes.load(data | {"operations": [step]}) for step in data["operations"])
    return all(budget.share < _share(recipe, {}, model, budget)[1] < 1 for recipe in alone)


def _untrained(entry: Entry) -> str:
    """Why a recipe is not tried since it trains; "": it does not."""
    if entry.training == TRAINING_NEEDED:
        return "its result needs training"
    return "it trains, which `surgery heal` can do afterwards" if entry.training == TRAINING_INCLUDED else ""


def _joined(first: Recipe, second: Recipe) -> Recipe:
    """Both recipes one after the other, judged as the second is."""
    data = second.to_dict() | {"name": f"{first.name} + {second.name}", "description": ""}
    return recipes.load(data | {"operations": [*first.to_dict()["operations"], *data["operations"]]})


def _try(made: Options, recipe: Recipe, model: Model, budget: Budget) -> None:
    """Add what reaches the budget, or note why nothing does."""
    found, reasons = [], []
    for ways in _ladders(recipe, model, budget):
        option, reason = _mildest(recipe, ways, model, budget, made)
        found += [option] if option else []
        reasons += [reason] if reason else []
    made.found += found
    if not found:
        made.left_out[recipe.name] = reasons[-1] if reasons else "its first step leaves no place for the second"


def _ladders(recipe: Recipe, model: Model, budget: Budget) -> Iterator[list[dict[int, dict]]]:
    """Ladders of the recipe as a whole: operation -> changes, for each rung of its last operation with a ladder.

    Each of the operations before that takes an equal part of the budget, as a factor.
    """
    ladders = {index: rungs for index, each in enumerate(recipe.operations) if (rungs := _climbs(each, model))}
    if not ladders:
        yield [{}]
        return
    *others, last = ladders
    data, part = recipe.to_dict(), replace(budget, share=budget.share ** (1 / len(ladders)), native=False, engine="")
    chosen: list[list[dict[int, dict]]] = []
    for index in others:
        alone = recipes.load(data | {"operations": [data["operations"][index]]})
        mildest = [_first_rung(alone, ladder, model, part) for ladder in ladders[index]]
        chosen.append([{index: rung} for rung in mildest if rung is not None])
    for before in itertools.product(*chosen):
        changes = {index: rung for way in before for index, rung in way.items()}
        for ladder in ladders[last]:
            yield [changes | {last: rung} for rung in ladder]


def _climbs(operation: Operation, model: Model) -> list[list[dict[str, Any]]]:
    """The ladders of an operation that have rungs."""
    return [ladder for ladder in operation.ladders(model.anatomy) if ladder]


def _first_rung(recipe: Recipe, ladder: list[dict], model: Model, budget: Budget) -> dict | None:
    """The mildest rung of a ladder of the recipe's only operation that fits."""
    return next((rung for rung in ladder if _share(recipe, {0: rung}, model, budget)[1] <= budget.share), None)


def _mildest(
    recipe: Recipe, ways: list[dict[int, dict]], model: Model, budget: Budget, made: Options
) -> tuple[Option | None, str]:
    """The first of some ways, from the mildest on, with which the result fits; else None and why."""
    refused, least, faulty = "", inf, ""
    for way in ways:
        plan, share = _share(recipe, way, model, budget)
        if not isinstance(plan, Plan):
            faulty = faulty or plan
        elif refusal := budget.refusal(plan):
            refused = refused or refusal
        elif share <= budget.share:
            return Option(_name(recipe, way), plan.recipe, plan, share), ""
        else:
            least = min(least, share)
    if least < inf and (made.nearest is None or least < made.nearest[0]):
        made.nearest = (least, recipe.name)
    return None, refused or (f"it leaves {least:.0%} of the cache at least" if least < inf else faulty)


def _share(recipe: Recipe, changes: dict[int, dict], model: Model, budget: Budget) -> tuple[Plan | str, float]:
    """The plan with some settings, and what it leaves of the cache; or why there is none, and infinity."""
    data = recipe.to_dict()
    steps = [step | changes.get(index, {}) for index, step in enumerate(data["operations"])]
    try:
        plan = make_plan(recipes.load(data | {"operations": steps}), model.anatomy, model.name, model.folder)
    except SurgeryError as error:
        return error.what, inf
    return plan, plan.after.kv_bytes_at(budget.context) / model.anatomy.kv_bytes_at(budget.context)


def _name(recipe: Recipe, changes: dict[int, dict[str, Any]]) -> str:
    """The recipe, and what was set in it: "mla keep_kv=0.5"."""
    set_here = [f"{key}={_shown(value)}" for step in changes.values() for key, value in step.items()]
    return " ".join([recipe.name, *set_here])


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _without_doubles(made: Options) -> list[Option]:
    """The options, the largest share first, without those that compute what an earlier one computes."""
    kept: dict[str, Option] = {}
    for option in sorted(made.found, key=lambda option: (-option.share, len(option.recipe.operations))):
        computed = [step.model_dump(mode="json") for step in option.recipe.operations if not _alike(step)]
        double = kept.setdefault(json.dumps(computed, sort_keys=True), option)
        if double is not option:
            made.left_out[option.recipe.name] = f"it computes what {double.recipe.name} computes"
    return list(kept.values())


def _alike(operation: Operation) -> bool:
    return operation.purpose == ALIKE
