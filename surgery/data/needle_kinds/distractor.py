"""Near-identical needles: the same sentence with a similar key, which differs in one word. "The magic number for Old
Oslo is" is no answer to a question about New Oslo.

The papers that rank distractors take those that a model finds most likely. Here the base and the converted model read
the same prompts, whichever they are, so distractors are alike by construction and no model ranks them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

from surgery.data.haystack import TEMPLATES, Hidden
from surgery.data.needle_kinds.base import PlantedKind, elsewhere, keys_field, places_of

FIRST_WORDS = "North South East West Upper Lower Old New Inner Outer Greater Little Central Royal Port Fort"


class Distractor(PlantedKind):
    """Several keys that differ in one word, with a secret each, and a question about one of them."""

    name: ClassVar[str] = "distractor"
    summary: ClassVar[str] = "keys that differ in one word, one is asked for"
    found: ClassVar[str] = "right one of {keys} similar keys found"
    copies: ClassVar[bool] = True

    keys: int = keys_field()

    def chance(self, secret: str) -> float:
        return 1 / self.keys

    def detail(self, secret: str) -> str:
        return f"{self.keys} similar keys with {secret} each"

    def hide(self, draw: random.Random, depth: float, hay: str, secret: Callable[[], str]) -> Hidden:
        statement, question = draw.choice(TEMPLATES)
        (place,) = places_of(draw, 1)
        keys = [f"{first} {place}" for first in draw.sample(FIRST_WORDS.split(), self.keys)]
        secrets = [secret() for _ in keys]
        depths = [depth, *elsewhere(draw, depth, self.keys - 1)]
        sentences = [
            (at, f"{statement.format(key=key)} {value}.") for at, key, value in zip(depths, keys, secrets, strict=True)
        ]
        return Hidden(sentences, [0], question.format(key=keys[0]), statement.format(key=keys[0]), secrets[0])
