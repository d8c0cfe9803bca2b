"""What one model answers to needles: decoding that is led by the true tokens gives hit and loss in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from surgery.calibration.scoring import last_logits
from surgery.data.haystack import Needle
from surgery.data.quotations import Quotation
from surgery.io.loading import loaded


@dataclass(frozen=True)
class Outcome:
    """The result of one model on one needle.

    Attributes:
        hit: whether greedy decoding gives exactly the answer's tokens.
        nll: mean nats per token of the answer; each token is predicted from the true ones before it.
    """

    hit: bool
    nll: float


@dataclass(frozen=True)
class Recitation(Outcome):
    """The result of one model on one quotation.

    Attributes:
        copied: tokens that greedy decoding continues exactly, before it first departs from the passage.
        unread: as `nll`, where another passage stands in the place of the first occurrence.
        guessed: as `copied`, in that case.
    """

    copied: int
    unread: float
    guessed: int

    @property
    def gain(self) -> float:
        """Nats a token that the passage is more probable for having been read."""
        return self.unread - self.nll


def run_needles(
    model,
    needles: Sequence[Needle],
    progress: Callable[[int], None] | None = None,
    *,
    cached: bool = True,
    late: bool = False,
) -> list[Outcome]:
    """Ask a loaded model for every needle. The model's mode is restored.

    The prompt is one prefill. Then the answer's true tokens are fed one by one through the model's own cache, as in
    decoding. As long as each true token is also the most probable one, this equals greedy decoding; at the first that
    is not, greedy decoding misses the needle. So one pass gives both hit and NLL.

    Args:
        progress: called with the number of needles done.
        cached: False runs prompt and answer in one forward without a cache, which is faster. The figures are the same
            for a head split, but not for a method that acts in prefill only.
        late: the question is read in a call of its own after the text, as in a conversation about a document. A
            method that chooses what to read, or to keep, by the prompt does not know the question then.
    """
    import torch

    outcomes = []
    with loaded(model), torch.no_grad():
        for needle in needles:
            logits = cached_logits(model, needle, late) if cached else _uncached_logits(model, needle)
            copied, losses = _followed(needle.answer, logits)
            outcomes.append(Outcome(_is_hit(needle.answer, copied, losses), _mean(losses)))
            if progress:
                progress(len(outcomes))
    return outcomes


def run_quotations(
    model, quotations: Sequence[Quotation], progress: Callable[[int], None] | None = None, *, late: bool = False
) -> list[Recitation]:
    """Let a loaded model continue every quotation, once after it read the passage and once where it did not.

    Both prompts run as those of `run_needles`, and have the same number of tokens.

    Args:
        progress: called with the number of quotations done.
        late: the beginning of the second occurrence is read in a call of its own.
    """
    import torch

    outcomes = []
    with loaded(model), torch.no_grad():
        for quotation in quotations:
            unread = replace(quotation, prompt=quotation.unread)
            (copied, losses), (guessed, others) = (
                _followed(each.answer, cached_logits(model, each, late)) for each in (quotation, unread)
            )
            hit = _is_hit(quotation.answer, copied, losses)
            outcomes.append(Recitation(hit, _mean(losses), copied, _mean(others), guessed))
            if progress:
                progress(len(outcomes))
    return outcomes


def cached_logits(model, needle: Needle, late: bool):
    """Logits [vocabulary] that predict each of the answer's tokens, computed one by one with the cache.

    Args:
        late: see `run_needles`.
    """
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    cut = needle.question if late else 0
    calls = [*filter(None, (needle.prompt[:cut], needle.prompt[cut:])), *((token,) for token in needle.answer[:-1])]
    cache, first = {}, len(calls) - len(needle.answer)
    for number, tokens in enumerate(calls):
        ids = torch.tensor([tokens], device=model.device)
        step = model(input_ids=ids, use_cache=True, **cache, **last_logits(model, 1))
        cache = {CACHE: step[CACHE]}
        if number >= first:
            yield step.logits[0, -1]


def _uncached_logits(model, needle: Needle):
    """The same logits from one forward without a cache."""
    import torch

    ids, count = torch.tensor([[*needle.prompt, *needle.answer[:-1]]], device=model.device), len(needle.answer)
    return model(input_ids=ids, use_cache=False, **last_logits(model, count)).logits[0, -count:]


def _followed(answer: Sequence[int], logits) -> tuple[int, list[float]]:
    """How many tokens greedy decoding continues exactly, and the loss of each true token in nats."""
    copied, losses = 0, []
    for index, (token, row) in enumerate(zip(answer, logits, strict=True)):
        logp = row.float().log_softmax(-1)
        copied += copied == index and int(logp.argmax()) == token
        losses.append(-logp[token].item())
    return copied, losses


def _is_hit(answer: Sequence[int], copied: int, losses: Sequence[float]) -> bool:
    return copied == len(answer) and all(map(math.isfinite, losses))


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses)


def reach_of(config) -> tuple[int, int] | None:
    """The most sinks and the widest window of a model's streaming heads; None if it has none."""
    layers = (getattr(config, "surgery", None) or {}).get("layers", [])
    split = [(layer.get("sinks", 0), layer.get("window", 1)) for layer in layers if layer.get("streaming")]
    return (max(sinks for sinks, _ in split), max(window for _, window in split)) if split else None


def longest_sequence(needles: Sequence[Needle]) -> int:
    """Tokens of the longest prompt together with its answer."""
    return max(len(needle.prompt) + len(needle.answer) for needle in needles)
