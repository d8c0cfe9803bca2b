"""Which choices a model makes, alone or beside its base: the one with the highest log-probability per token.

The mean over the tokens is taken, not the sum, so that a choice is not preferred for being short. Where all choices of
a question have as many tokens, as those made from a text have, it makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.text import BUILTIN, Text, load_text
from surgery.io.loading import loaded, read_config, read_tokenizer
from surgery.data.questions import Choice, encode, make_choices, read_questions
from surgery.evaluation.paired import ask_in_turn, last_logits, refuse_other_tokenizer, refuse_too_long, wilson
from surgery.evaluation.perplexity import LABELS, finite

if TYPE_CHECKING:
    import torch

    from surgery.io.loading import Source

BATCH = 4  # questions in one forward


@dataclass(frozen=True)
class Chosen:
    """How one model did on one question.

    Attributes:
        right: the right choice is the most probable one; not where another is as probable.
        nll: see `choice_loss`.
        logps: log-probability per token of each choice.
    """

    right: bool
    nll: float
    logps: tuple[float, ...]

    @classmethod
    def of(cls, logps: torch.Tensor, answer: int) -> Chosen:
        """From the vector of log-probabilities and the right index."""
        best = sum(map(bool, logps >= logps[answer])) == 1
        return cls(best and bool(logps.isfinite().all()), choice_loss(logps, answer).item(), tuple(logps.tolist()))


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


def choice_logps(
    model, items: Sequence[Choice], cached: bool = True, progress: Callable[[int], None] | None = None
) -> list[torch.Tensor]:
    """Log-probability per token of every choice after its prompt; the model is used in the mode it is in.

    Args:
        cached: prompts are run once, and the choices through the model's own cache. False: prompt and choice are run
            whole without a cache, which takes longer and gives gradients. The figures are the same as far as cached
            is uncached.
        progress: called with the number of questions done.

    Returns:
        Of each question a vector [choices], float64, on the CPU.
    """
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(items)), key=lambda number: items[number].longest)  # little padding
    for first in range(0, len(order), BATCH):
        numbers = order[first : first + BATCH]
        batch = [items[number] for number in numbers]
        logps = (_through_cache if cached else _at_once)(model, batch).cpu()
        found |= zip(numbers, logps.split([len(item.choices) for item in batch]), strict=True)
        if progress:
            progress(len(found))
    return [found[number] for number in range(len(items))]


def choice_loss(logps: torch.Tensor, answer: int) -> torch.Tensor:
    """-log softmax over the choices' log-probabilities per token, at the right one: nats, 0 where it is certain."""
    return -logps.log_softmax(-1)[answer]


def _through_cache(model, items: list[Choice]) -> torch.Tensor:
    """Prompts padded on the left, then all choices, padded on the right, each after a copy of its prompt's cache."""
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    prompts, mask = _padded([item.prompt for item in items], model.device, left=True)
    begun = model(**_given(model, prompts, mask), use_cache=True, **last_logits(model, 1))
    owners = torch.tensor([n for n, item in enumerate(items) for _ in item.choices], device=model.device)
    choices, real = _padded([choice for item in items for choice in item.choices], model.device)
    found = _picked(begun.logits[:, -1:], choices[:, :1], owners)
    if choices.shape[1] > 1:
        begun[CACHE].batch_select_indices(owners)
        given = _given(model, choices[:, :-1], torch.cat([mask[owners], real[:, :-1]], dim=1))
        logits = model(**given, **{CACHE: begun[CACHE]}, use_cache=True).logits
        found = torch.cat([found, _picked(logits, choices[:, 1:])], dim=1)
    return _mean(found, real)


def _at_once(model, items: list[Choice]) -> torch.Tensor:
    """Every prompt with every choice, padded on the right, without a cache."""
    rows = [(len(item.prompt), item.prompt + choice) for item in items for choice in item.choices]
    ids, mask = _padded([row for _, row in rows], model.device)
    first = min(begin for begin, _ in rows)
    keep = ids.shape[1] - first + 1  # the token before the first choice predicts it
    logits = model(**_given(model, ids, mask), use_cache=False, **last_logits(model, keep)).logits[:, -keep:-1]
    real = mask[:, first:].clone()
    for row, (begin, _) in zip(real, rows, strict=True):
        row[: begin - first] = 0
    return _mean(_picked(logits, ids[:, first:]), real)


def _padded(rows: Sequence[tuple[int, ...]], device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [rows, longest]; what is masked is token 0."""
    import torch

    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for number, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, part], mask[number, part] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def _given(model, ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """The last columns of a mask belong to the tokens; positions are counted from each row's first real token."""
    import inspect

    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return given


def _picked(logits: torch.Tensor, tokens: torch.Tensor, rows=slice(None)) -> torch.Tensor:
    """Log-probabilities [rows, n] of tokens by logits [rows, n, vocabulary], `rows` of these if given."""
    logits = logits.float()
    totals = logits.logsumexp(-1)[rows]
    return logits[rows].gather(-1, tokens[..., None])[..., 0] - totals


def _mean(logps: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return logps.double().masked_fill(real == 0, 0.0).sum(1) / real.sum(1)


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
    ask_in_turn(
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


def refuse_unfit(configs: dict, items: Sequence[Choice]) -> None:
    """Raise where questions are longer than the positions of a model, or hold tokens that it does not know."""
    longest = max(item.longest for item in items)
    refuse_too_long(configs, longest, "prompt and choice", "shorter questions")
    refuse_other_tokenizer(configs, max(max(map(max, (item.prompt, *item.choices))) for item in items))


def fitting_questions(file: str | Path, tokenizer, model) -> list[Choice]:
    """A file's different questions for a loaded model; raises as `read_questions`, `encode` and `refuse_unfit`."""
    questions = encode(tokenizer, list(dict.fromkeys(read_questions(file))))
    refuse_unfit({type(model).__name__: model.config}, questions)
    return questions


def ask(model, items: Sequence[Choice], progress: Callable[[int], None] | None = None) -> list[Chosen]:
    """Put questions to a loaded model, which is left in the mode it was in; arguments as for `choice_logps`."""
    import torch

    with loaded(model), torch.no_grad():
        logps = choice_logps(model, items, progress=progress)
    return [Chosen.of(row, item.answer) for row, item in zip(logps, items, strict=True)]
