"""Which choices a model makes, alone or beside its base: the one with the highest log-probability per token.

The mean over the tokens is taken, not the sum, so that a choice is not preferred for being short. Where all choices of
a question have as many tokens, as those made from a text have, it makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.scoring import BATCH, Chosen, ask, refuse_unfit
from surgery.data.questions import Choice, encode, make_choices, read_questions
from surgery.data.text import BUILTIN, Text, load_text
from surgery.evaluation.paired import run_base_then_model, wilson
from surgery.evaluation.perplexity import LABELS, finite
from surgery.io.loading import read_config, read_tokenizer

if TYPE_CHECKING:
    from surgery.io.loading import Source


@dataclass
class ChoiceResult:
    """What `evaluate_choices` measured.

    Attributes:
        status: "done", or "not run" for the stated `reason`; then there are no outcomes.
        settings: where the questions are from (title, sha256), and how they were made.
        items: the questions, in the order of the outcomes.
        outcomes: "base" (if one was given) and "out" -> one `Chosen` a question.
    """

    status: str
    settings: dict
    items: list[Choice]
    outcomes: dict[str, list[Chosen]] = field(default_factory=dict)
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def chance(self) -> float:
        """Share that guessing gets right."""
        return math.fsum(1 / len(item.choices) for item in self.items) / len(self.items)

    def side(self, label: str) -> dict:
        """One model over all questions: right ones, accuracy with its 95% interval, mean nll."""
        outcomes = self.outcomes[label]
        right, of = sum(o.right for o in outcomes), len(outcomes)
        low, high = wilson(right, of)
        nll = math.fsum(o.nll for o in outcomes) / of
        return {"right": right, "of": of, "accuracy": right / of, "low": low, "high": high, "nll": nll}

    def paired(self) -> dict | None:
        """Questions that both, only the base, only `out` or neither get right, and McNemar's exact test of the two.

        `p`: how probable a split at least as uneven of those that one alone gets right is, if neither is better.
        """
        if "base" not in self.outcomes:
            return None
        pairs = [(a.right, b.right) for a, b in zip(self.outcomes["base"], self.outcomes["out"], strict=True)]
        names = {"both": (True, True), "only_base": (True, False), "only_out": (False, True)}
        counts = {name: pairs.count(pair) for name, pair in names.items()} | {"neither": pairs.count((False, False))}
        one, other = counts["only_base"], counts["only_out"]
        tail = sum(math.comb(one + other, k) for k in range(min(one, other) + 1))
        return counts | {"p": min(1.0, 2 * tail / 2 ** (one + other))}

    def to_dict(self) -> dict:
        """The same facts for JSON; NaN becomes None."""
        facts: dict[str, Any] = {"status": self.status} | ({"reason": self.reason} if self.reason else {})
        facts |= {"settings": self.settings, "items": len(self.items), "chance": self.chance}
        facts |= {label: self.side(label) for label in self.outcomes}
        if self.outcomes:
            cases = [{label: vars(told[i]) for label, told in self.outcomes.items()} for i in range(len(self.items))]
            cases = [{"answer": item.answer} | case for item, case in zip(self.items, cases, strict=True)]
            facts |= {"paired": self.paired(), "cases": cases}
        return finite(facts | ({"notes": self.notes} if self.notes else {}))


def evaluate_choices(
    out: Source,
    base: Source | None = None,
    *,
    tokenizer: Any = None,
    text: str | Path | Text = BUILTIN,
    labelled: str | Path | None = None,
    items: int = 320,
    context: int = 96,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> ChoiceResult:
    """Put the same questions to a model and to its base, one after the other.

    Args:
        out, base: model folder, or loaded model. A loaded model stays where and as it is.
        tokenizer: needed where no folder is given; otherwise taken from base, or from out without a base.
        text, items, context, seed: see `make_choices`.
        labelled: a JSONL file of questions in place of a text (see `read_questions`).
        progress: called as progress(done, total, label) after each batch; label is "base" or "out".

    Raises:
        SurgeryError: as `make_choices`, `read_questions` and `encode`; questions longer than a model's positions, a
            tokenizer of another model, a folder that is not a model or has no safetensors, a base that yields NaN.
    """
    sources = dict(zip(LABELS, (base, out), strict=True)) if base is not None else {"out": out}
    configs = {label: read_config(source) for label, source in sources.items()}
    questions = None if labelled is None else read_questions(labelled)
    words = load_text(text, part="held-out") if labelled is None else load_text(Path(labelled))
    tokenizer = tokenizer or read_tokenizer(next(iter(sources.values())))
    settings: dict[str, Any] = {"text": {"title": words.title, "sha256": words.sha256[:12]}}
    if questions is None:
        drawn = {"items": items, "context": context, "seed": seed}
        made, settings = make_choices(tokenizer, text=words, **drawn), settings | drawn
    else:
        made = encode(tokenizer, questions)
    refuse_unfit(configs, made)
    result = ChoiceResult("done", settings, made)
    tokens = max(item.longest * len(item.choices) for item in made)
    run_base_then_model(
        result,
        sources,
        lambda model, tick: ask(model, made, tick),
        what="questions",
        cases=len(made),
        extra=lambda kv_bytes: 2 * BATCH * tokens * kv_bytes,  # twice the cache: growing it copies it
        broken=lambda outcome: not all(map(math.isfinite, outcome.logps)),
        progress=progress,
    )
    return result
