"""What a search for the layers with a window tries, and how often: known before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

STAGE = "trying windows"  # its name in progress and plan


@dataclass(frozen=True)
class WindowSearch:
    """What a search tries.

    Attributes:
        window: tokens that a layer sees, the newest one among them.
        count: how many layers get it.
        rounds: in how many rounds they are chosen.
        answers: how much the loss on answers counts; that on plain text counts 1.
        text: source of the text: "builtin" or a file.
        length, samples: tokens of a sequence, and number of sequences of each kind.
        seed: seed of the texts.
    """

    window: int
    count: int
    rounds: int
    answers: float
    text: str
    length: int
    samples: int
    seed: int

    def chosen_in_rounds(self) -> list[int]:
        """How many layers each round chooses."""
        rounds = min(self.rounds, self.count)
        return [(self.count * (n + 1)) // rounds - (self.count * n) // rounds for n in range(rounds)]

    def trials(self, layers: int) -> int:
        """How many layers are tried in all rounds together, where so many may get the window."""
        sizes = self.chosen_in_rounds()
        return sum(layers - sum(sizes[:n]) for n in range(len(sizes)))
