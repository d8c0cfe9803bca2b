"""The two parts of a card that may change after surgery wrote it: the owner's notes and the repository's name.

The notes stand between two comments. surgery.json records the hash of the card without them, so that `surgery check`
accepts notes and finds any other change. `surgery push` replaces `OWNER/NAME` by the repository's name in the card
that it uploads.
"""

from __future__ import annotations

import re

BEGIN = "<!-- notes: begin. What the owner writes between these two lines stays, and `surgery check` allows it. -->"
END = "<!-- notes: end -->"
NO_NOTES = "Nothing was added to this card by hand."
REPOSITORY = "OWNER/NAME"  # stands in the card until the repository is known
BASE_HEADING = "## The base model's card"
# A span of code, which stays, or what begins or ends Markdown inside a line; a lone * or < between spaces does not.
_MARKUP = re.compile(
    r"(?P<code>(?<!`)(?P<ticks>`+)(?!`)[^`]+(?P=ticks)(?!`))|"
    r"\\(?=[!-/:-@\[-`{-~]|$)|[\[\]`~&]|<(?=[A-Za-z/!?])|\*(?=\S)|(?<=\S)\*|(?<![^\W_])_|_(?![^\W_])"
)
_NOTES = re.compile(rf"^{re.escape(BEGIN)}\n(.*?)^{re.escape(END)}$", re.DOTALL | re.MULTILINE)


def notes_of(card: str) -> str:
    """The owner's notes in a card; "" where there are none, or where the block for notes was damaged."""
    found = _place(card)
    notes = found[1].strip() if found else ""
    return "" if notes == NO_NOTES else notes


def without_notes(card: str) -> str:
    """The card with an empty block for notes."""
    found = _place(card)
    return card if found is None else card[: found.start()] + notes_block("") + card[found.end() :]


def notes_block(notes: str) -> str:
    """The block of a card that holds the owner's notes."""
    return f"{BEGIN}\n\n{notes.strip() or NO_NOTES}\n\n{END}"


def literal(words: str) -> str:
    """Words of a record, in one line, as Markdown that shows them as they are: no link, no emphasis, no tag.

    What stands between backticks stays code.
    """
    line = re.sub(r"\s*[\r\n]\s*", " ", words)
    return _MARKUP.sub(lambda found: found[0] if found["code"] else f"\\{found[0]}", line)


def without_markers(text: str) -> str:
    """A base's card without the comments that mark notes: the base may be a converted model, whose card has them."""
    return text.replace(BEGIN, "").replace(END, "")


def named(card: str, repository: str, before: str = REPOSITORY) -> str:
    """The card with a repository's name in its examples; the part that quotes the base's card stays unchanged."""
    ours, heading, base = card.partition(f"\n{BASE_HEADING}\n")
    return ours.replace(f'"{before}"', f'"{repository}"') + heading + base


def _place(card: str) -> re.Match | None:
    """The match of the notes; None unless there is one block, without a comment that could hide the text after it."""
    if card.count(BEGIN) != 1 or card.count(END) != 1:
        return None
    found = _NOTES.search(card)
    return None if found is None or "<!--" in found[1] else found
