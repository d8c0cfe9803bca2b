"""The contract of a kind of needles, and how prompts with several needles are made."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from surgery.data.haystack import KEYS, SECRETS, Hidden, Needle, NeedleMaker
from surgery.data.text import Text
from surgery.errors import SettingError

MOST_KEYS = 16
MARGIN = 0.15  # share of its stratum, at both ends, in which no other needle lies


@dataclass(frozen=True)
class Grid:
    """The cells of a recall test, and what is drawn in each.

    Attributes:
        lengths: numbers of tokens of the prompts.
        depths: places of the needle that is asked for, from 0 (beginning of the text) to 1 (end).
        samples: prompts in each cell.
        seed: seed of what is drawn.
        secret: "digits" or "words".
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    seed: int
    secret: str


class Kind(BaseModel):
    """One kind of needles. The fields are its own settings, which are settings of the probe.

    Kinds that have a field of the same name have the same type, default and bounds for it.

    Attributes:
        name: as in the registry.
        summary: what is hidden and asked, in a few words.
        found: what a right answer finds, with settings in braces ("right one of {keys} hidden secrets").
        guess: what is right with the probability `chance`.
        copies: whether an answer is one copied secret, so that a model that misses most cannot copy.
        unread: settings of the probe that the kind does not read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    found: ClassVar[str]
    guess: ClassVar[str] = "a guess among the secrets of the text"
    copies: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def make(self, tokenizer: Any, text: Text, form: str, grid: Grid) -> list[Needle]:
        """The prompts, cell by cell. The same arguments give the same prompts.

        Args:
            form: "chat" or "plain".

        Raises:
            SurgeryError: a length has no room for the needles, or the tokenizer cannot write an answer.
        """

    @abstractmethod
    def chance(self, secret: str) -> float:
        """The floor: the probability that a guess is right, with secrets of this sort."""

    @abstractmethod
    def detail(self, secret: str) -> str:
        """What a prompt hides, in a few words ("random digits", "4 keys with digits each")."""

    @property
    def finds(self) -> str:
        """What a right answer finds, with these settings."""
        return self.found.format(**self.model_dump())

    @property
    def secrets(self) -> int:
        """How many secrets an answer has."""
        return 1

    def refuse(self) -> None:
        """Raise a SurgeryError where settings do not go together."""


class UnknownKind(Kind):
    """A record's kind that this version does not know, or cannot read. It has words for tables, and makes nothing."""

    name: ClassVar[str] = "unknown"
    summary: ClassVar[str] = "needles of an unknown kind"
    found: ClassVar[str] = "needles of an unknown kind found"

    def make(self, tokenizer: Any, text: Text, form: str, grid: Grid) -> list[Needle]:
        raise SettingError("needles of an unknown kind cannot be made", fix="the version that wrote the record")

    def chance(self, secret: str) -> float:
        raise SettingError("an unknown kind has no known floor", fix="the version that wrote the record")

    def detail(self, secret: str) -> str:
        return "secrets of an unknown kind"


class PlantedKind(Kind):
    """A kind whose prompts are a stretch of text with sentences between its own, and a question."""

    @abstractmethod
    def hide(self, draw: random.Random, depth: float, hay: str, secret: Callable[[], str]) -> Hidden:
        """What one prompt hides and asks.

        Args:
            draw: gives everything that is random.
            depth: place of the needle that is asked for, from 0 to 1.
            hay: the stretch of text. What is hidden must not be in it.
            secret: gives another secret at each call.
        """

    def make(self, tokenizer: Any, text: Text, form: str, grid: Grid) -> list[Needle]:
        maker = NeedleMaker(tokenizer, text, form, grid.secret, SECRETS[grid.secret])
        cells = [(length, depth) for length in grid.lengths for depth in grid.depths]
        return [self._case(maker, grid.seed, *cell, i) for cell in cells for i in range(grid.samples)]

    def _case(self, maker: NeedleMaker, seed: int, length: int, depth: float, sample: int) -> Needle:
        own = " ".join(f"{key}={value}" for key, value in self.model_dump().items())
        draw = random.Random(f"{seed} {self.name} {own} {length} {depth:.6f} {sample}")
        hay, given = maker.stretch(draw, length), set()

        def another() -> str:
            while (secret := maker.secret(draw, hay)) in given:
                pass
            given.add(secret)
            return secret

        hidden = self.hide(draw, depth, hay, another)
        return Needle(length, depth, sample, seed, hidden.answer, **maker.fit(hay, length, hidden))


def keys_field(description: str = "Keys in a prompt, the one that is asked for among them.") -> Any:
    """The setting `keys`, which several kinds have."""
    return Field(4, ge=2, le=MOST_KEYS, description=description)


def elsewhere(draw: random.Random, depth: float, count: int) -> list[float]:
    """`count` depths away from `depth`, one drawn in each of as many equal parts of the text, in random order."""
    parts = count + 1
    own = min(int(depth * parts), count)
    low, high = MARGIN, 1 - MARGIN
    depths = [(part + draw.uniform(low, high)) / parts for part in range(parts) if part != own]
    return draw.sample(depths, count)


def places_of(draw: random.Random, count: int) -> list[str]:
    """`count` different keys."""
    return draw.sample(KEYS.split(), count)
