"""What one model answers to requests, greedily: does it end, does it repeat itself, how likely is it to the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.calibration.scoring import last_logits
from surgery.io.loading import loaded
from surgery.machine.placement import exact

if TYPE_CHECKING:
    import torch

LONGEST_BLOCK, LEAST_TIMES, LEAST_TOKENS = 32, 3, 12  # tokens of a repeated block, repetitions, tokens in all


@dataclass
class Answer:
    """A model's answer.

    Attributes:
        ids: its tokens, including the one that ends it.
        text: the decoded tokens.
        ended: whether the model ended it before the limit.
        loops: whether it repeats itself (see `goes_in_circles`).
        broken: whether the model gave NaN or infinity.
        nll: mean negative log-likelihood of the tokens under the base, in nats; None if there is no base.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    loops: bool
    broken: bool = False
    nll: float | None = None

    @property
    def sound(self) -> bool:
        """Whether it has text, ended, does not repeat itself and came from finite logits."""
        return bool(self.text) and self.ended and not self.loops and not self.broken

    @property
    def empty(self) -> bool:
        """Whether it has no text, though its logits are finite."""
        return not self.text and not self.broken


def goes_in_circles(ids: Sequence[int]) -> bool:
    """Whether a block of up to 32 tokens is repeated: at least 3 times in a row, and over at least 12 tokens."""
    for size in range(1, min(LONGEST_BLOCK, len(ids) // LEAST_TIMES) + 1):
        needed, equal = max(LEAST_TIMES * size, LEAST_TOKENS) - size, 0
        for position in range(size, len(ids)):
            equal = equal + 1 if ids[position] == ids[position - size] else 0
            if equal >= needed:
                return True
    return False


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    named = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id)
    ends = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return {token for token in ends if isinstance(token, int)}


def run_requests(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, most: int, progress: Callable[[int], None]
) -> list[Answer]:
    """Greedy answers, decoded with the model's own cache; `generate` would apply sampling from a generation config.

    Args:
        model: a loaded model; its mode is restored.
        prompts: token ids, up to where the model answers.
        most: the most tokens of an answer.
        progress: called with the number of answers.
    """
    ends, answers = end_tokens(model, tokenizer), []
    with loaded(model):
        for prompt in prompts:
            ids, broken = _greedy(model, prompt, ends, most)
            ended = bool(ids) and ids[-1] in ends
            text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
            answers.append(Answer(tuple(ids), text, ended, goes_in_circles(ids), broken))
            progress(len(answers))
    return answers


def _greedy(model: Any, prompt: Sequence[int], ends: set[int], most: int) -> tuple[list[int], bool]:
    """The greedily decoded tokens after a prompt, up to the first of `ends`, and whether a logit was not finite."""
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    inputs, cache, ids = list(prompt), {}, []
    with torch.no_grad():
        while len(ids) < most and not (ids and ids[-1] in ends):
            batch = torch.tensor([inputs], device=model.device)
            step = model(input_ids=batch, use_cache=True, **cache, **last_logits(model, 1))
            logits = step.logits[0, -1]
            if not bool(logits.max().isfinite()):  # NaN if any logit is; a single -inf is allowed, it bans a token
                return ids, True
            ids.append(int(logits.argmax()))
            inputs, cache = ids[-1:], {CACHE: step[CACHE]}
    return ids, False


def score_answers(base: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> None:
    """Set `nll` of every answer, under the base."""
    import torch

    with loaded(base), torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.nll = _nll(base, prompt, answer.ids) if answer.ids else math.inf


def _nll(base: Any, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of tokens after a prompt, in nats."""
    import torch

    batch = torch.tensor([[*prompt, *ids]], device=base.device)
    # Of a long prompt, the logits over the vocabulary would take a gigabyte.
    step = base(input_ids=batch, use_cache=False, **last_logits(base, len(ids) + 1))
    logits: torch.Tensor = step.logits[0, -len(ids) - 1 : -1]
    targets = batch[0, len(prompt) :, None]
    return -exact(logits).log_softmax(-1).gather(1, targets).mean().item()
