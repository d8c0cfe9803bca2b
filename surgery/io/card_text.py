"""What may change in a card after surgery wrote it: the owner's notes, and the name of the repository.

Notes stand between two comments. A card's entry in surgery.json is of the card as it is without them, so that
`surgery check` lets an owner write there and finds any other change. `surgery push` puts the repository's name in the
place of `OWNER/NAME`, in the card that it uploads.
"""

from __future__ import annotations

import re

BEGIN = "<!-- notes: begin. What the owner writes between these two lines stays, and `surgery check` allows it. -->"
END = "<!-- notes: end -->"
NO_NOTES = "Nothing was added to this card by hand."
REPOSITORY = "OWNER/NAME"  # until it is known
BASE_HEADING = "## The base model's card"
_NOTES = re.compile(rf"^{re.escape(BEGIN)}\n(.*?)^{re.escape(END)}$", re.DOTALL | re.MULTILINE)


def notes_of(card: str) -> str:
    """What the owner wrote into a card; "" for nothing, and for a card whose place for it is not as it was made."""
    found = _place(card)
    notes = found[1].strip() if found else ""
    return "" if notes == NO_NOTES else notes


def without_notes(card: str) -> str:
    """The card as it is when its owner has written nothing."""
    found = _place(card)
    return card if found is None else card[: found.start()] + notes_block("") + card[found.end() :]


def notes_block(notes: str) -> str:
    """The place for the owner's notes, with what is written there."""
    return f"{BEGIN}\n\n{notes.strip() or NO_NOTES}\n\n{END}"


def without_markers(text: str) -> str:
    """A text that stands in a card without being ours: it may have been a card of ours."""
    return text.replace(BEGIN, "").replace(END, "")


def named(card: str, repository: str, before: str = REPOSITORY) -> str:
    """The card with the name of a repository in its examples; what the base's card says stays as it is."""
    ours, heading, base = card.partition(f"\n{BASE_HEADING}\n")
    return ours.replace(f'"{before}"', f'"{repository}"') + heading + base


def _place(card: str) -> re.Match | None:
    """Where the notes stand. There is one such place, and no comment in it that could hide what comes after."""
    if card.count(BEGIN) != 1 or card.count(END) != 1:
        return None
    found = _NOTES.search(card)
    return None if found is None or "<!--" in found[1] else found
