"""One option, converted and measured: what it loses on plain text and on answers from far back.

Both losses count in one number, the damage: the KL from the base on held-out text, plus `ANSWERS` times what the right
answers lose, in nats a token. (The search for windows of `sliding_layers` weighs the two alike.) The answers repeat
passkeys that are hidden all over a text as long as the budget's context: a result that forgets the far past loses
nothing on short texts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from surgery.config import recipe as recipes
from surgery.data.text import load_text
from surgery.errors import ModelError, SurgeryError
from surgery.evaluation.paired import HALF_95
from surgery.io.loading import loaded, read_tokenizer
from surgery.pipeline import convert_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from surgery.config.recipe import Recipe
    from surgery.data.passkeys import Recall
    from surgery.machine.progress import Progress

ANSWERS = 0.1  # weight of what answers lose, in nats a token, beside 1 for plain text
# Settings of operations that say how much a conversion reads or tries -> the least of it in a quick one, which has a
# quarter.
QUICKER, FEWER = {"calibration_samples": 2, "score_samples": 2, "rounds": 1}, 4
KEYS = 8  # passkeys in a text
# They share no form and no words with those on which heads and layers are chosen: code words in place of the text's.
NEEDLE, QUESTION = "\n\nNote {label} of the log reads:", "\n\nRead note {label} of the log out:"
NEAR = 64  # tokens before the end of a text that hold none
EVERY, BLOCKS = 8, 16  # plain text is judged at every 8th token; its error comes from so many blocks of these
DECODED = 16  # tokens that are timed in decoding
PLAIN = 2048  # tokens of a plain text
FEW, KEPT = 4, 0.7  # of at least so many passkeys that the base repeats, a result keeps so large a share


class Round(NamedTuple):
    """A round of the search: how thoroughly an option is tried.

    Attributes:
        name: among the figures that are kept.
        quick: whether the conversion reads and tries less than the recipe asks for.
        texts: of each kind, plain and with passkeys.
    """

    name: str
    quick: bool
    texts: int


FIRST, WHOLE = Round("first", True, 1), Round("whole", False, 3)


@dataclass(frozen=True)
class Damage:
    """What an option lost.

    Attributes:
        kl: mean KL from the base on plain text, in nats a token.
        answers: nats a token that the right answers lost.
        kept, asked: passkeys repeated without a mistake, of those that the base repeats so.
        total: kl + ANSWERS * answers, where answers that became more probable count as 0.
        error: standard error of the total.
        blocks, lost: the KL of each block of plain text, and what each answer lost, of which these are the means.
        speed: times as fast as the base at what the search is for; None: that was not measured.
        seconds: what conversion and measurement took.
    """

    kl: float
    answers: float
    kept: int
    asked: int
    total: float
    error: float
    seconds: float
    blocks: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    speed: float | None = None

    def worse_than(self, other: Damage) -> bool:
        """Whether it lost more than another one, beyond the interval of the difference on the same texts."""
        error = math.hypot(self.error, other.error)
        if len(self.blocks) == len(other.blocks) > 1 and len(self.lost) == len(other.lost) > 1:
            plain, answers = (
                _error([one - another for one, another in zip(*pair, strict=True)])
                for pair in ((self.blocks, other.blocks), (self.lost, other.lost))
            )
            error = math.hypot(plain, ANSWERS * answers)
        return not self.total - other.total <= HALF_95 * error

    @property
    def keeps(self) -> bool:
        """Whether it repeats most of the passkeys that the base repeats; True where the base repeats too few."""
        return self.asked < FEW or self.kept >= KEPT * self.asked

    def __str__(self) -> str:
        kept = f", {self.kept} of {self.asked} passkeys" if self.asked else ""
        return f"damage {self.total:.3f} ± {HALF_95 * self.error:.3f} (KL {self.kl:.3f}{kept}), {self.seconds:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """The texts on which options are measured, and what the base says of them.

    Args:
        base: the base's folder.
        text: "builtin" (its held-out part) or a text file.
        context: tokens of a text with passkeys.
        texts: of each kind.
        timed: "decode" or "prefill", which is timed too; "": nothing is.
    """

    def __init__(self, base: Path, text: str, context: int, texts: int, timed: str = ""):
        from surgery.data.passkeys import passkeys, plain_windows

        self.context, self.timed = context, timed
        self.base, tokenizer, source = base, read_tokenizer(base), load_text(text, "held-out")
        size: dict[str, Any] = {
            "samples": texts,
            "length": context,
            "sinks": 0,
            "window": NEAR,
            "keys": KEYS,
            "seed": 1,
        }
        forms: dict[str, Any] = {"alphabet": "nato", "forms": (NEEDLE, QUESTION)}
        self.recalls: list[Recall] = passkeys(source, tokenizer, **size, **forms)
        self.plain = plain_windows(source, tokenizer, min(PLAIN, context), texts, 1)

    @cached_property
    def of_base(self) -> list[torch.Tensor]:
        """The base's log-probabilities, of each text at its `rows`."""
        with loaded(self.base) as model:
            return [each.cpu() for each in self._log_probabilities(model)]

    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each text's tokens, and the positions at which its next token is judged: plain ones first."""
        import torch

        plain = [(ids, torch.arange(0, len(ids) - 1, EVERY)) for ids in self.plain]
        return [*plain, *((recall.ids, recall.rows) for recall in self.recalls)]

    def measure(self, out: Path) -> dict[str, Any]:
        """The figures of a `Damage` but for its seconds."""
        from surgery.calibration.layerwise import kl

        expected = self.of_base
        blocks: list[float] = []
        lost: list[float] = []
        hits: list[tuple[bool, bool]] = []
        with loaded(out) as model:
            for index, got in enumerate(self._log_probabilities(model)):
                want = expected[index].to(got)
                if index < len(self.plain):
                    blocks += map(kl, want.chunk(BLOCKS), got.chunk(BLOCKS))
                else:
                    lost_here, hits_here = _answers(self.recalls[index - len(self.plain)], want, got)
                    lost, hits = lost + lost_here, hits + hits_here
        if not all(map(math.isfinite, (*blocks, *lost))):
            raise ModelError("its outputs are not finite")
        plain, answers = statistics.fmean(blocks), statistics.fmean(lost)
        error = math.hypot(_error(blocks), ANSWERS * _error(lost))
        known = [after for before, after in hits if before]
        total = plain + ANSWERS * max(0.0, answers)
        return {
            "kl": plain, "answers": answers, "kept": sum(known), "asked": len(known), "total": total, "error": error,
            "blocks": blocks, "lost": lost, "speed": self._speed(out) if self.timed else None,
        }  # fmt: skip

    def _speed(self, out: Path) -> float:
        """Times as fast as the base, on a prompt of the context or in decoding after it."""
        from surgery.evaluation.benchmark.run import bench

        (row,) = bench(out, self.base, lengths=(self.context - DECODED,), rounds=1, decode=DECODED).ratios()
        return row[f"{self.timed}_vs_stock"]

    def _log_probabilities(self, model: Any) -> Iterator[torch.Tensor]:
        import torch

        from surgery.calibration.attention_hook import row_logits

        with torch.no_grad():
            for ids, rows in self.rows():
                yield row_logits(model, ids, rows).float().log_softmax(-1)


def _answers(recall: Recall, want: torch.Tensor, got: torch.Tensor) -> tuple[list[float], list[tuple[bool, bool]]]:
    """Of each passkey: the nats a token that it lost, and whether base and result repeat it without a mistake."""
    lost, hits, at = [], [], 0
    for first, end in recall.answers:
        rows, right = slice(at, at + end - first), recall.ids[first:end, None].to(got.device)
        change = want[rows].gather(1, right) - got[rows].gather(1, right)
        lost.append(change.double().mean().item())
        hits.append(tuple(bool((each[rows].argmax(-1) == right[:, 0]).all()) for each in (want, got)))
        at += end - first
    return lost, hits


def _error(values: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def quick(recipe: Recipe) -> Recipe:
    """The recipe with a faster conversion."""
    data = recipe.to_dict()
    steps = [
        step | {key: min(step[key], max(least, step[key] // FEWER)) for key, least in QUICKER.items() if step.get(key)}
        for step in data["operations"]
    ]
    try:
        return recipes.load(data | {"operations": steps})
    except SurgeryError:  # a setting that needs more
        return recipe


def tried(
    recipe: Recipe, model: str, out: Path, stage: Round, judge: Judge, say: Callable[[str], Progress | None]
) -> Damage:
    """Convert and measure a recipe; its result stays in the folder `out`, neither checked nor scored.

    Args:
        say: gives the callback of a stage, by its name.
    """
    begun = time.monotonic()
    convert_only(quick(recipe) if stage.quick else recipe, model, out, say("converting"))
    if (measuring := say("measuring")) is not None:
        measuring(0, 0, "measuring")
    return Damage(**judge.measure(out), seconds=time.monotonic() - begun)
