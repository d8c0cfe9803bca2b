"""Several keys with a secret each, and a question about one of them: the multi-key retrieval of RULER (Hsieh et al.
2024). With a single needle, a model is right if it finds any number in the text. Here it must match the key.

All needles of a prompt use the same sentence. The other keys are evenly spread over the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from surgery.data.haystack import (
    KEYS,
    SECRETS,
    SENTENCE_START,
    TEMPLATES,
    Needle,
    draw_secret,
    make_needles,
)
from surgery.data.needle_kinds.base import Grid, Kind, keys_field
from surgery.data.text import Text
from surgery.errors import TextError

STRETCH = 2.5  # length of the stretch of text that a prompt is cut from, relative to the prompt
LETTERS = 20_000  # letters of the text from which the letters per token are computed
TRIES = 20  # most stretches of text that are tried for a prompt with the right number of keys


@dataclass(frozen=True)
class Stretch:
    """A stretch of text with the other keys in it.

    Attributes:
        statements: the needles of the other keys.
        template: index of the sentence in `TEMPLATES`.
        make: makes the prompt with the needle that is asked for, from (statement, question) or (statement, question,
            first words of the answer).
    """

    statements: tuple[str, ...]
    template: int
    make: Callable[[tuple[str, ...]], Needle]


class MultiKey(Kind):
    """Several keys with a secret each, hidden in one text, and a question about one of them."""

    name: ClassVar[str] = "multi"
    summary: ClassVar[str] = "several keys with a secret each, one is asked for"
    found: ClassVar[str] = "right one of {keys} hidden secrets"
    copies: ClassVar[bool] = True

    keys: int = keys_field()

    def make(self, tokenizer: Any, text: Text, form: str, grid: Grid) -> list[Needle]:
        cells = [(length, depth) for length in grid.lengths for depth in grid.depths]
        return [
            self._case(tokenizer, text, form, grid, (length, depth, sample))
            for length, depth in cells
            for sample in range(grid.samples)
        ]

    def chance(self, secret: str) -> float:
        return 1 / self.keys

    def detail(self, secret: str) -> str:
        return f"{self.keys} keys with {secret} each"

    def ask(self, tokenizer: Any, stretch: Stretch, template: tuple[str, str]) -> Needle | None:
        """The prompt of a stretch; None if it does not have each key once.

        Args:
            template: (statement, question) of the key that is asked for.
        """
        needle = stretch.make(template)
        prompt = tokenizer.decode(needle.prompt)
        counts = [prompt.count(sentence) for sentence in stretch.statements]
        return needle if (sum(counts), max(counts)) == (self.keys - 1, 1) else None

    def _case(self, tokenizer: Any, text: Text, form: str, grid: Grid, cell: tuple[int, float, int]) -> Needle:
        """A prompt that asks for a key at a depth. Settings, depth and sample determine everything in it."""
        length, depth, sample = cell
        draw = random.Random(f"{grid.seed} {self.keys} {length} {depth:.6f} {sample}")
        statement, question = draw.choice(TEMPLATES)
        asked_key, *others = draw.sample(KEYS.split(), len(KEYS.split()))
        kind, size = grid.secret, SECRETS[grid.secret]
        secrets = (draw_secret(draw, kind, size) for _ in others)
        pairs = zip(others, secrets, strict=True)
        statements = tuple(f"{statement.format(key=other)} {secret}." for other, secret in pairs)
        template = (statement.format(key=asked_key), question.format(key=asked_key))
        options = {"lengths": (length,), "depths": (depth,), "samples": 1, "form": form, "secret": grid.secret}
        for _ in range(TRIES):
            stretch = self._stretch_with_other_keys(draw, tokenizer, text.text.strip(), length, statements)
            seed = draw.getrandbits(32)
            if sum(sentence in stretch for sentence in statements) < self.keys - 1:  # the text has too few sentences
                continue

            def made(asked: tuple[str, ...], text: Text = replace(text, text=stretch), seed: int = seed) -> Needle:
                return make_needles(tokenizer, text=text, seed=seed, templates=(asked,), **options)[0]

            number = TEMPLATES.index((statement, question))
            if needle := self.ask(tokenizer, Stretch(statements, number, made), template):
                return replace(needle, sample=sample, seed=grid.seed)
        raise TextError(
            f"this text has no room for {self.keys} keys in {length} tokens",
            where=text.title,
            fix="fewer keys, a longer length, or a text of shorter sentences",
        )

    def _stretch_with_other_keys(
        self, draw: random.Random, tokenizer: Any, text: str, length: int, statements: tuple[str, ...]
    ) -> str:
        """A stretch of the text in which the other keys are inserted at even distances."""
        letters = int(STRETCH * length * _letters_per_token(tokenizer, text[:LETTERS]))
        start = draw.choice([0, *(match.end() for match in SENTENCE_START.finditer(text))])
        looped = f"{text[start:]}\n\n{text[:start]}\n\n".lstrip()  # the text starts again after its end
        stretch = (looped * (letters // len(looped) + 1))[:letters]
        gap = _letters_per_token(tokenizer, stretch) * length / self.keys - len(statements[0])
        passages, position, inserted = [], 0, 0
        for match in SENTENCE_START.finditer(stretch):
            if match.end() >= (inserted + 1) * gap:
                passages += [stretch[position : match.end()], f"{statements[inserted % len(statements)]} "]
                position, inserted = match.end(), inserted + 1
        return "".join([*passages, stretch[position:]])


def _letters_per_token(tokenizer: Any, text: str) -> float:
    return len(text) / max(1, len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
