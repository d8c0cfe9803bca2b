"""Keys that refer to other keys, and in the end to a secret: the variable tracking of RULER (Hsieh et al. 2024) in
sentences. "Lima has the magic number of Oslo." and "The magic number for Oslo is 48213." answer a question about Lima.

A prompt holds several such chains, so that the right secret is not the only one. The sentences of all chains lie in a
random order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

from pydantic import Field

from surgery.data.haystack import KEYS, Hidden
from surgery.data.needle_kinds.base import PlantedKind, elsewhere, places_of
from surgery.errors import SettingError

# (statement before a secret, link from a key to another, question). The statement is also the beginning of the answer.
TEMPLATES = (
    ("The magic number for {key} is", "{key} has the magic number of {other}.", "What is the magic number for {key}?"),
    ("The password of {key} is", "{key} uses the password of {other}.", "What is the password of {key}?"),
    ("The telephone code of {key} is", "{key} shares the telephone code of {other}.", "What is {key}'s phone code?"),
)
MOST_KEYS = len(KEYS.split())


class Chain(PlantedKind):
    """Several chains from a key over other keys to a secret, and a question about the first key of one."""

    name: ClassVar[str] = "chain"
    summary: ClassVar[str] = "a key that refers to a key with a secret"
    found: ClassVar[str] = "secret at the end of {hops} hops found"

    hops: int = Field(1, ge=1, le=4, description="Sentences that lead from a key to the key with the secret.")
    chains: int = Field(3, ge=2, le=8, description="Chains in a prompt, the one that is asked for among them.")

    def refuse(self) -> None:
        needed = self.chains * (self.hops + 1)
        if needed > MOST_KEYS:
            raise SettingError(
                f"{self.chains} chains of {self.hops} hops need {needed} keys",
                exists=f"{MOST_KEYS} keys",
                fix=f"chains={MOST_KEYS // (self.hops + 1)}",
            )

    def chance(self, secret: str) -> float:
        return 1 / self.chains

    def detail(self, secret: str) -> str:
        hops = "1 hop" if self.hops == 1 else f"{self.hops} hops"
        return f"{self.chains} chains of {hops} to random {secret}, one asked for"

    def hide(self, draw: random.Random, depth: float, hay: str, secret: Callable[[], str]) -> Hidden:
        statement, link, question = draw.choice(TEMPLATES)
        keys = iter(places_of(draw, self.chains * (self.hops + 1)))
        chains = [[next(keys) for _ in range(self.hops + 1)] for _ in range(self.chains)]
        secrets = [secret() for _ in chains]
        written = []
        for chain, value in zip(chains, secrets, strict=True):
            written.append(f"{statement.format(key=chain[-1])} {value}.")
            written += [link.format(key=key, other=other) for key, other in pairwise(chain)]
        depths = [depth, *elsewhere(draw, depth, len(written) - 1)]
        first = chains[0][0]
        asked = (question.format(key=first), statement.format(key=first), secrets[0])
        return Hidden(list(zip(depths, written, strict=True)), range(self.hops + 1), *asked)
