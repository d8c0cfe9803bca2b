"""What one model answers to needles: decoding that is led by the true tokens gives hit and loss in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.calibration.scoring import last_logits
from surgery.data.haystack import Needle
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
            outcomes.append(_outcome(needle, logits))
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


def _outcome(needle: Needle, logits) -> Outcome:
    hit, losses = True, []
    for token, row in zip(needle.answer, logits, strict=True):
        logp = row.float().log_softmax(-1)
        hit = hit and int(logp.argmax()) == token
        losses.append(-logp[token].item())
    return Outcome(hit and all(map(math.isfinite, losses)), math.fsum(losses) / len(losses))


def reach_of(config) -> tuple[int, int] | None:
    """The most sinks and the widest window of a model's streaming heads; None if it has none."""
    layers = (getattr(config, "surgery", None) or {}).get("layers", [])
    split = [(layer.get("sinks", 0), layer.get("window", 1)) for layer in layers if layer.get("streaming")]
    return (max(sinks for sinks, _ in split), max(window for _, window in split)) if split else None


def longest_sequence(needles: Sequence[Needle]) -> int:
    """Tokens of the longest prompt together with its answer."""
    return max(len(needle.prompt) + len(needle.answer) for needle in needles)
