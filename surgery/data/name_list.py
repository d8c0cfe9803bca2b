"""Prompts with a list of names, and a question about one of them: "The guest Alice sits at table number 48213." and 11
more such lines, then "The guest Alice sits at table number".

Each line of the list is as good a match as the one that is asked for, so a model must read the name to be right. No
other text is in a prompt, and the list is made of sentences: neither the needles nor the rows that healing trains on
(`surgery.data.repeats`) look like it.
"""

from __future__ import annotations

import random

from surgery.data.haystack import Composed, Needle, asked, form_for, in_tokens
from surgery.data.text import begin_of_text
from surgery.errors import SettingError

# (statement before the number, question). The statement is also the beginning of the answer.
FACTS = (
    ("The guest {name} sits at table number", "At which table does {name} sit?"),
    ("The guest {name} has badge number", "Which badge number does {name} have?"),
)
NAMES = (
    "Alice Peter Maria Thomas Emma Daniel Laura Robert Sarah Kevin Julia Martin Helen Oscar Nora Victor Irene Simon "
    "Clara Hugo Diana Felix Grace Leonard"
)
MOST = len(NAMES.split())  # names in a list: each is in it once
NUMBERS = range(10_000, 100_000)


def make_lookups(tokenizer, *, names: int = 12, cases: int = 24, seed: int = 0, form: str = "auto") -> list[Needle]:
    """Prompts with a list of names. The places that are asked for go from the list's first line to its last.

    Args:
        names: how many are in a list, 2 to `MOST`.
        form: as for `make_needles`.

    Returns:
        Needles. `depth` is the place of the name in the list, from 0 (first) to 1 (last); `length` is the number of
        tokens of the prompt.

    Raises:
        SurgeryError: too few or too many names, no chat template, or the tokenizer cannot encode a number.
    """
    if not 2 <= names <= MOST or cases < 1:
        raise SettingError(
            f"a list of {names} names, asked {cases} times, is not possible",
            exists=f"2 to {MOST} names",
            fix="names=12 cases=24",
        )
    form = form_for(tokenizer, form)
    return [_make(tokenizer, names, index, cases, seed, form) for index in range(cases)]


def _make(tokenizer, names: int, index: int, cases: int, seed: int, form: str) -> Needle:
    draw = random.Random(f"{seed} names {names} {index}")
    statement, question = draw.choice(FACTS)
    drawn = draw.sample(NAMES.split(), names)
    numbers = list(map(str, draw.sample(NUMBERS, names)))
    lines = [f"{statement.format(name=name)} {number}." for name, number in zip(drawn, numbers, strict=True)]
    place = round(index * (names - 1) / max(1, cases - 1))
    before = "".join(f"{line}\n" for line in lines[:place])
    question = question.format(name=drawn[place])
    content = "\n".join(lines) + f"\n\n{question}"
    text, shift = asked(tokenizer, form, content, statement.format(name=drawn[place]))
    span = (shift + len(before), shift + len(before) + len(lines[place]))
    composed = Composed(text, span, shift + len(content) - len(question))
    bos = begin_of_text(tokenizer) if form == "plain" else []  # a chat template adds its own

    def encode(words: str) -> list[int]:
        return bos + tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]

    parts = in_tokens(tokenizer, encode, numbers[place], composed, "this test needs a tokenizer that can write digits")
    return Needle(len(parts["prompt"]), place / (names - 1), index, seed, numbers[place], **parts)
