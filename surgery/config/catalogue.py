"""Recipes as a list to choose from: the purpose of each, the tier of its result, and whether it includes training.

A recipe does not state these. They follow from its operations with their settings (`Operation.purpose`, `start_only`,
`usual_tier`) and from its `heal:` block. A user's recipe is therefore classified like a shipped one. An override can
change the classification, for example if its result must be trained before use.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.config import recipe as recipes
from surgery.config.recipe import Recipe
from surgery.errors import SurgeryError
from surgery.operations.base import NATIVE, PURPOSES, SURGICAL
from surgery.operations.variants import Variants

NO_TRAINING, TRAINING_INCLUDED, TRAINING_NEEDED = "no", "included", "needed"


@dataclass(frozen=True)
class Entry:
    """A recipe in the list.

    Attributes:
        name, description: as in the recipe.
        ops: its operations, in order.
        purpose: a key of `PURPOSES`.
        tier: NATIVE or SURGICAL, as far as the settings determine it.
        training: "no"; "included": the recipe trains; "needed": the result must be trained before use.
        usual: whether its first operation has the method that it has if none is named.
    """

    name: str
    description: str
    ops: tuple[str, ...]
    purpose: str
    tier: str
    training: str
    usual: bool = True

    @property
    def line(self) -> str:
        """The first sentence of the description."""
        return self.description.partition(". ")[0].rstrip(".")

    @classmethod
    def of(cls, recipe: Recipe, name: str = "") -> Entry:
        """The entry of a loaded recipe; `name` is shown in place of the recipe's own name."""
        operations = recipe.operations
        trained, start = recipe.heal is not None, any(operation.start_only for operation in operations)
        purpose = "training" if trained or start else operations[0].purpose
        surgical = any(operation.usual_tier == SURGICAL for operation in operations)
        return cls(
            name or recipe.name,
            recipe.description,
            tuple(operation.op for operation in operations),
            purpose if purpose in PURPOSES else list(PURPOSES)[-1],
            SURGICAL if surgical else NATIVE,
            TRAINING_INCLUDED if trained else TRAINING_NEEDED if start else NO_TRAINING,
            not isinstance(operations[0], Variants) or operations[0].method == operations[0].default_method(),
        )


def entries() -> list[Entry]:
    """The shipped recipes in the order of their purposes; within a purpose, those with the fewest operations first."""
    listed = [Entry.of(recipes.load(name), name) for name in recipes.shipped()]
    order = list(PURPOSES)
    return sorted(listed, key=lambda entry: (order.index(entry.purpose), len(entry.ops), entry.name))


def find_operation(name: str) -> str:
    """`name` where an operation has this name, else ""."""
    from surgery import operations

    return name if name in (*operations.builtin_names(), *operations.third_party()) else ""


def unknown(name: str) -> SurgeryError:
    """The error for a name of neither a recipe nor an operation."""
    from surgery import operations
    from surgery.errors import nearest

    known = [*recipes.shipped(), *operations.builtin_names(), *operations.third_party()]
    close = nearest(name, known)
    fix = f"did you mean {close!r}?" if close else "`surgery ls` lists the recipes"
    return SurgeryError(f"no recipe or operation {name!r}", exists=", ".join(known), fix=fix)
