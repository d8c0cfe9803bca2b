"""One key with several values, each in a sentence of its own, all of which are asked for: the multi-value retrieval of
RULER (Hsieh et al. 2024). The answer names them in the order of the text, so that there is one right answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from surgery.data.haystack import Hidden
from surgery.data.needle_kinds.base import PlantedKind, elsewhere, places_of

# (statement before a value, question, first words of the answer)
TEMPLATES = (
    (
        "One of the magic numbers for {key} is",
        "What are the magic numbers for {key}, in the order of the text?",
        "The magic numbers for {key}, in the order of the text, are",
    ),
    (
        "One of the lucky numbers of {key} is",
        "What are the lucky numbers of {key}, in the order of the text?",
        "The lucky numbers of {key}, in the order of the text, are",
    ),
    (
        "One of the numbers of the safes in {key} is",
        "What are the numbers of the safes in {key}, in the order of the text?",
        "The numbers of the safes in {key}, in the order of the text, are",
    ),
)


class MultiValue(PlantedKind):
    """One key with several values at different places, and a question about all of them."""

    name: ClassVar[str] = "value"
    summary: ClassVar[str] = "one key with several values, all are asked for"
    found: ClassVar[str] = "all {values} values of a key found in order"
    guess: ClassVar[str] = "naming the values of the text in any order"

    values: int = Field(2, ge=2, le=8, description="Values of the key.")

    @property
    def secrets(self) -> int:
        return self.values

    def chance(self, secret: str) -> float:
        return 1 / math.factorial(self.values)

    def detail(self, secret: str) -> str:
        return f"one key with {self.values} values of random {secret}, all asked for"

    def hide(self, draw: random.Random, depth: float, hay: str, secret: Callable[[], str]) -> Hidden:
        (key,) = places_of(draw, 1)
        statement, question, lead = (part.format(key=key) for part in draw.choice(TEMPLATES))
        depths = [depth, *elsewhere(draw, depth, self.values - 1)]
        values = [secret() for _ in depths]
        in_order = [value for _, value in sorted(zip(depths, values, strict=True))]
        sentences = [(at, f"{statement} {value}.") for at, value in zip(depths, values, strict=True)]
        return Hidden(sentences, range(self.values), question, lead, ", ".join(in_order))
