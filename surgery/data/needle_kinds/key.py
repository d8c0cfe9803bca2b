"""One key with one secret, in a text that has nothing like it: the needle in a haystack (Kamradt 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from surgery.data.haystack import Needle, chance, make_needles
from surgery.data.needle_kinds.base import Grid, Kind
from surgery.data.text import Text


class Key(Kind):
    """One key with a secret, and a question about it."""

    name: ClassVar[str] = "key"
    summary: ClassVar[str] = "one key with a secret"
    found: ClassVar[str] = "hidden passkeys found"
    guess: ClassVar[str] = "a random guess"
    copies: ClassVar[bool] = True

    def make(self, tokenizer: Any, text: Text, form: str, grid: Grid) -> list[Needle]:
        return make_needles(tokenizer, text=text, form=form, **vars(grid))

    def chance(self, secret: str) -> float:
        return chance(secret)

    def detail(self, secret: str) -> str:
        return f"random {secret}"
