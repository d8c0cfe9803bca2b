"""Recipes as a list to choose from: what each is for, the tier of its result, whether it is trained.

None of this is written in a recipe: it follows from the operations and their settings (`Operation.purpose`,
`start_only`, `usual_tier`) and from the `heal:` block. So a recipe of a user's own is listed as those that come with
the package, and an override that makes a start for training out of a finished recipe moves it.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.config import recipe as recipes
from surgery.config.recipe import Recipe
from surgery.errors import SurgeryError
from surgery.operations.base import NATIVE, PURPOSES, SURGICAL

NO_TRAINING, TRAINING_INCLUDED, TRAINING_NEEDED = "no", "included", "needed"


@dataclass(frozen=True)
class Entry:
    """A recipe in the list.

    Attributes:
        name, description: of the recipe.
        ops: its operations, in order.
        purpose: a key of `PURPOSES`.
        tier: NATIVE or SURGICAL, as far as the settings tell it.
        training: "no"; "included": the recipe trains; "needed": train the result before you use it.
    """

    name: str
    description: str
    ops: tuple[str, ...]
    purpose: str
    tier: str
    training: str

    @property
    def line(self) -> str:
        """The first sentence of the description."""
        return self.description.partition(". ")[0].rstrip(".")

    @classmethod
    def of(cls, recipe: Recipe, name: str = "") -> Entry:
        """The entry of a loaded recipe; `name`: as the user names it."""
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
        )


def entries() -> list[Entry]:
    """The recipes that come with the package, in the order of their purposes and, in each, the plainest first."""
    listed = [Entry.of(recipes.load(name), name) for name in recipes.shipped()]
    order = list(PURPOSES)
    return sorted(listed, key=lambda entry: (order.index(entry.purpose), len(entry.ops), entry.name))


def find_operation(name: str) -> str:
    """The operation of this name, or "" where there is none."""
    from surgery import operations

    return name if name in (*operations.builtin_names(), *operations.third_party()) else ""


def unknown(name: str) -> SurgeryError:
    """The error for what is neither a recipe nor an operation."""
    from surgery import operations
    from surgery.errors import nearest

    known = [*recipes.shipped(), *operations.builtin_names(), *operations.third_party()]
    close = nearest(name, known)
    fix = f"did you mean {close!r}?" if close else "`surgery ls` lists the recipes"
    return SurgeryError(f"no recipe or operation {name!r}", exists=", ".join(known), fix=fix)
