"""KV eviction at absolute positions: what the policies of the files `surgery_kv_*.py` have in common.

Before each multiple of `interval`, counted from a row's first real token, a KV head keeps

    the first `sinks` tokens,  the last `recent` tokens,  and of the others the `keys` with the highest scores.

So a head never holds more than sinks + keys + recent + interval keys, unless the policy lets it keep every key
(`Policy.whole_heads`). A policy is a rule for the scores. Rules that
rest on attention count the votes of the last `observe` queries before a decision (`Voting`). Each query votes while it
is computed, and the votes are noted with the keys. So no query has to be kept, and a text that arrives in chunks has
the same votes.

With `when: prompt_end` there is one decision, at the end of the call that filled the empty cache, as in Li et al.
2024, "SnapKV", arXiv 2404.14469. All later tokens stay. What is kept then depends on how the prompt was cut into
calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .surgery_config import HeadCost, is_whole
from .surgery_kv_policy import Kept, Policy, Votes

BLOCKS, PROMPT_END = "blocks", "prompt_end"
SLOT = 4  # bytes of a key's slot
NOTE = 4  # bytes of a key's note


@dataclass
class Evict(Policy):
    """Keep sinks, recent tokens, and the `keys` others with the highest scores.

    Attributes:
        keys: how many of the other tokens a KV head keeps.
        sinks: first tokens of a row that always stay.
        recent: last tokens that always stay.
        interval: positions from one decision to the next; None with `when: prompt_end`.
        when: BLOCKS or PROMPT_END.
    """

    keys: int
    sinks: int = 4
    recent: int = 128
    interval: int | None = 256
    when: str = BLOCKS

    def scores(self, kept: Kept) -> torch.Tensor:
        """The score of each stored key, [batch, KV heads, kept]; of two equal scores the newer key's counts more."""
        raise NotImplementedError

    def survivors(self, kept: Kept) -> torch.Tensor:
        safe, others = self.safe_and_others(kept)
        scores = self.scores(kept).masked_fill(~others, -torch.inf)
        best = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., : self.keys]
        chosen = torch.zeros_like(others).scatter(-1, scores.shape[-1] - 1 - best, True)
        return safe | (chosen & others)

    def safe_and_others(self, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored keys that always stay, and those among which the policy chooses, bool [batch, KV heads, kept]."""
        positions, real = kept.positions, kept.positions >= 0
        newest = positions.amax((1, 2), keepdim=True)
        safe = real & ((positions < self.sinks) | (positions > newest - self.recent))
        return safe, real & ~safe

    @property
    def left(self) -> int:
        """The largest number of keys that a decision leaves to a KV head."""
        return self.sinks + self.keys + self.recent

    @property
    def at_prompt_end(self) -> bool:
        return self.when == PROMPT_END

    @property
    def keeps_first(self) -> bool:
        return self.sinks > 0

    @property
    def most(self) -> int | None:
        return None if self.interval is None else self.left + self.interval

    @property
    def probe_length(self) -> int:
        """A text of so many tokens shows some that a decision dropped, also behind a part of an interval."""
        step = self.voters or 1 if self.interval is None else self.interval
        return self.left + 2 * step

    def kv_cost(self, cost: HeadCost) -> HeadCost:
        """With PROMPT_END the cache goes on growing, how much a prompt leaves depends on its length, and the notes go
        after the decision.
        """
        if self.most is None:
            return cost._replace(beside=SLOT)
        return HeadCost(0, self.most, SLOT + NOTE * self.notes_of(cost.readers))

    def notes_of(self, readers: int) -> int:
        """How many numbers are noted with each key of a KV head that so many query heads read."""
        return 0

    def problem(self) -> str:
        least = {"keys": 1, "sinks": 0, "recent": 1}
        for name, smallest in least.items():
            if not is_whole(getattr(self, name), smallest):
                return f"{name} is {getattr(self, name)!r}, and must be whole and from {smallest}"
        if self.when not in (BLOCKS, PROMPT_END):
            return f"when is {self.when!r}; it is {BLOCKS} or {PROMPT_END}"
        if self.when == PROMPT_END and self.interval is not None:
            return f"an interval is for when: {BLOCKS}; with {PROMPT_END} it is null"
        if self.when == BLOCKS and not is_whole(self.interval, 1):
            return f"interval is {self.interval!r}, and must be whole and from 1"
        return ""


@dataclass
class Voting(Evict):
    """A policy whose scores are votes of queries.

    Attributes:
        observe: the queries before a decision that vote.
        group: how the query heads of a KV head vote: SUM or MAX of their votes.
    """

    observe: int = 32
    group: str = "sum"

    @property
    def voters(self) -> int:
        return self.observe

    def of_group(self, votes: torch.Tensor) -> torch.Tensor:
        """One vote of each KV head, from those of its query heads [batch, KV heads, group, ...]."""
        return votes.sum(2) if self.group == "sum" else votes.amax(2)

    def problem(self) -> str:
        if fault := super().problem():
            return fault
        if not is_whole(self.observe, 1):
            return f"observe is {self.observe!r}, and must be whole and from 1"
        if self.interval is not None and self.observe > self.interval:
            return f"observe is {self.observe}, more than the interval of {self.interval}"
        return "" if self.group in ("sum", "max") else f"group is {self.group!r}; it is sum or max"


@dataclass
class AttendedTo(Voting):
    """A policy that asks which queries gave a key a weight of at least `threshold`.

    Attributes:
        observe: the queries before a decision that are looked at.
        group: a query head's vote counts if it reaches the threshold (max), or with those of its group (sum).
    """

    observe: int = 256
    group: str = "max"
    threshold: float = 0.01

    def notes_of(self, readers: int) -> int:
        return 1

    def attended(self, votes: Votes) -> torch.Tensor:
        """Which queries did so, bool [batch, KV heads, n, kept]."""
        return self.of_group(votes.weights) >= self.threshold

    def problem(self) -> str:
        if fault := super().problem():
            return fault
        valid = type(self.threshold) in (int, float) and 0 < self.threshold < 1
        return "" if valid else f"threshold is {self.threshold!r}; it is between 0 and 1"


@dataclass
class MeanVote(Voting):
    """The score of a key is its mean vote of the queries that could see it.

    A sum would favour old keys, which more queries have seen.

    Attributes:
        memory: the votes before the last decision count, too.
    """

    memory: bool = False

    def notes_of(self, readers: int) -> int:
        return 2

    def vote(self, votes: Votes, kept: Kept) -> torch.Tensor:
        """The vote of each query for each key, [batch, KV heads, group, n, kept]; 0 of queries that have none."""
        raise NotImplementedError

    def add_votes(self, votes: Votes, kept: Kept) -> None:
        seen = (kept.positions[:, :, None] <= votes.positions[:, None, :, None]) & votes.voting.any(2)[..., None]
        self._add(kept, "votes", self.of_group(self.vote(votes, kept)).sum(2))
        self._add(kept, "voters", seen.sum(2))

    @staticmethod
    def _add(kept: Kept, name: str, more: torch.Tensor) -> None:
        old = kept.notes.get(name)
        kept.notes[name] = more.float() if old is None else old + more.float()

    def scores(self, kept: Kept) -> torch.Tensor:
        if "votes" not in kept.notes:  # every query was padding, or none has come
            return torch.zeros_like(kept.positions, dtype=torch.float32)
        return kept.notes["votes"] / kept.notes["voters"].clamp(min=1)

    def forget(self, notes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return notes if self.memory else {name: torch.zeros_like(noted) for name, noted in notes.items()}
