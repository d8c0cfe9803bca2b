"""A question that shares no content word with the needle that answers it, so that matching words does not find it: the
idea of NoLiMa (Modarressi et al. 2025, arXiv 2502.05167), with associations of our own.

Several people each have a sentence in the text. "Nora lives next to the Eiffel Tower." answers "Which person has been
to France?". The other people of the prompt have other associations of the same sort.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from surgery.data.haystack import Hidden
from surgery.data.name_list import NAMES
from surgery.data.needle_kinds.base import PlantedKind, elsewhere, keys_field


@dataclass(frozen=True)
class Relation:
    """What links a needle with its question.

    Attributes:
        statement: the needle, with {name} and {clue}.
        question, lead: the question, and the first words of its answer, with {target}.
        pairs: (clue, target), each of which implies the other among these pairs.
    """

    statement: str
    question: str
    lead: str
    pairs: tuple[tuple[str, str], ...]


RELATIONS = (
    Relation(
        "{name} lives next to {clue}.",
        "Which person has been to {target}?",
        "The person who has been to {target} is",
        (
            ("the Eiffel Tower", "France"),
            ("the Colosseum", "Italy"),
            ("Big Ben", "England"),
            ("the Taj Mahal", "India"),
            ("the pyramids of Giza", "Egypt"),
            ("the Brandenburg Gate", "Germany"),
            ("the Statue of Liberty", "America"),
            ("the Forbidden City", "China"),
            ("Mount Fuji", "Japan"),
            ("the Kremlin", "Russia"),
            ("the Acropolis", "Greece"),
            ("Machu Picchu", "Peru"),
            ("the Sagrada Familia", "Spain"),
            ("the Sydney Opera House", "Australia"),
            ("the Blue Mosque", "Turkey"),
            ("Table Mountain", "South Africa"),
        ),
    ),
    Relation(
        "{name} spends the day {clue}.",
        "Which person is the {target}?",
        "The person who is the {target} is",
        (
            ("kneading dough beside a hot oven", "baker"),
            ("pulling out bad teeth", "dentist"),
            ("mending leaking pipes", "plumber"),
            ("saving families from burning houses", "firefighter"),
            ("explaining fractions to pupils", "teacher"),
            ("trimming beards and hair", "barber"),
            ("steering jets across the ocean", "pilot"),
            ("milking cows and ploughing fields", "farmer"),
            ("sewing suits and dresses", "tailor"),
            ("arresting thieves", "police officer"),
            ("defending the accused in court", "lawyer"),
            ("lending novels to readers", "librarian"),
            ("pulling nets full of cod out of the sea", "fisherman"),
            ("hammering horseshoes on an anvil", "blacksmith"),
            ("bandaging wounds in a hospital", "nurse"),
            ("sawing planks for tables and chairs", "carpenter"),
        ),
    ),
    Relation(
        "{name} has a companion that {clue}.",
        "Which person owns the {target}?",
        "The person who owns the {target} is",
        (
            ("barks at strangers", "dog"),
            ("purrs on the sofa and hunts mice", "cat"),
            ("swims round in a bowl", "goldfish"),
            ("repeats each sentence it hears", "parrot"),
            ("gallops with a saddle on its back", "horse"),
            ("hides its head in a hard shell", "tortoise"),
            ("lays an egg each morning", "hen"),
            ("gathers honey in a hive", "bee"),
            ("gives wool and bleats", "sheep"),
            ("croaks in the pond at night", "frog"),
            ("carries loads over sand from one oasis to another", "camel"),
            ("spins webs to catch flies", "spider"),
            ("jumps with a baby in its pouch", "kangaroo"),
            ("hangs upside down from the rafters", "bat"),
            ("dams the river with branches", "beaver"),
            ("nibbles carrots and digs burrows", "rabbit"),
        ),
    ),
)


class Association(PlantedKind):
    """People with a clue each, and a question that only knowledge of the world links with one clue."""

    name: ClassVar[str] = "association"
    summary: ClassVar[str] = "needle and question share no content word"
    found: ClassVar[str] = "right one of {keys} people found by association"
    guess: ClassVar[str] = "a guess among the people of the text"
    unread: ClassVar[tuple[str, ...]] = ("secret",)

    keys: int = keys_field()

    def chance(self, secret: str) -> float:
        return 1 / self.keys

    def detail(self, secret: str) -> str:
        return f"{self.keys} people with a clue each, one asked for in other words"

    def hide(self, draw: random.Random, depth: float, hay: str, secret: Callable[[], str]) -> Hidden:
        relation = draw.choice(RELATIONS)
        pairs = draw.sample(_unwritten(hay, relation.pairs, self.keys), self.keys)
        names = draw.sample([name for (name,) in _unwritten(hay, [(n,) for n in NAMES.split()], self.keys)], self.keys)
        depths = [depth, *elsewhere(draw, depth, self.keys - 1)]
        sentences = [
            (at, relation.statement.format(name=name, clue=clue))
            for at, name, (clue, _) in zip(depths, names, pairs, strict=True)
        ]
        target = pairs[0][1]
        return Hidden(
            sentences, [0], relation.question.format(target=target), relation.lead.format(target=target), names[0]
        )


def _unwritten(hay: str, entries, least: int) -> list:
    """The entries of which no part is in the text; all of them where too few are left."""
    left = [entry for entry in entries if not any(part in hay for part in entry)]
    return left if len(left) >= least else list(entries)
