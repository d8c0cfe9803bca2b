"""The needles of the kind `multi`, asked for by their place among the needles instead of by their key: "the 3rd magic
number of the text". A look-up by key copies what follows a match. A look-up by place must count.

With the same settings, the needles and their text are those of `multi`, so the two kinds differ in the question alone.
The question is longer, so that a prompt has a little less text. Rarely, a needle then has no room, and another stretch
of the text is drawn.
"""

from __future__ import annotations

from typing import Any, ClassVar

from surgery.data.haystack import Needle
from surgery.data.needle_kinds.multi import MultiKey, Stretch

NOUNS = (  # for each of haystack.TEMPLATES
    "magic number",
    "ticket number of a ferry",
    "number of a safe",
    "number of a locker",
    "password of a library",
    "winning number of a lucky draw",
)
QUESTION = "What is the {ordinal} {noun} that the text names?"
LEAD = "The {ordinal} {noun} that the text names is"
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth"
)


class Index(MultiKey):
    """Several keys with a secret each, and a question about the secret at a place in their order."""

    name: ClassVar[str] = "index"
    summary: ClassVar[str] = "the needles of multi, asked for by place (the 3rd)"
    found: ClassVar[str] = "secret at a place among {keys} found"
    copies: ClassVar[bool] = False

    def detail(self, secret: str) -> str:
        return f"{super().detail(secret)}, asked for by their order"

    def ask(self, tokenizer: Any, stretch: Stretch, template: tuple[str, str]) -> Needle | None:
        """See `MultiKey.ask`. The question's length decides how much text fits, so the place is confirmed."""
        if (by_key := super().ask(tokenizer, stretch, template)) is None:
            return None
        statement, place = template[0], _place(tokenizer, by_key, stretch)
        for _ in range(self.keys):
            words = {"ordinal": ORDINALS.split()[place], "noun": NOUNS[stretch.template]}
            needle = super().ask(tokenizer, stretch, (statement, QUESTION.format(**words), LEAD.format(**words)))
            if needle is None:
                return None
            if (seen := _place(tokenizer, needle, stretch)) == place:
                return needle
            place = seen
        return None


def _place(tokenizer: Any, needle: Needle, stretch: Stretch) -> int:
    """How many of the other needles come before the one that is asked for."""
    before = tokenizer.decode(needle.prompt[: needle.span[0]])
    return sum(statement in before for statement in stretch.statements)
