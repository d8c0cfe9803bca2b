"""induction: how much a head looks at earlier copies of random tokens, and at what followed them. No answers needed.

Random tokens are repeated until the sequence is full: what comes next can be known from the past alone, and language
says nothing about it. A head that looks at the same token before (echo) or at the one after it (induction) does so by
content, over any distance. A KV head's score is the largest mean mass of its query heads on those tokens, outside
sinks + window.

Source: Tang et al. 2024, "RazorAttention", arXiv 2407.15891, which keeps a quota of each kind of head. Here both
masses are one score, so that one ratio decides, and both are in the origin; the tokens are the text's own, since a
vocabulary holds tokens that no text has.
"""

from __future__ import annotations

import random

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.calibration.head_scores import HeadScores
from surgery.data.passkeys import plain_windows
from surgery.data.text import BUILTIN, begin_of_text, fitting_length, load_text
from surgery.errors import RecipeMismatchError
from surgery.machine.progress import begin
from surgery.runtime.surgery_attention import surgery_attention


def induction(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: int = 8,
    length: int = 1024,
    repeats: int = 4,
    seed: int = 0,
    text=BUILTIN,
    progress=None,
) -> HeadScores:
    """Mean attention mass on copies of a repeated token and on what followed them, the largest of a group.

    Args: as for `far_mass`, and
        repeats: how often the random tokens stand in a sequence; fewer where a copy would be in the window.

    Raises:
        SurgeryError: the sequence holds no copy outside sinks + window.
    """
    loaded, length = load_text(text, "calibration"), fitting_length(model, length)
    start = begin_of_text(tokenizer)
    period = max(window + 1, (length - len(start)) // repeats)
    if len(start) + 2 * period > length or sinks >= len(start) + period:
        what = f"sinks + window = {sinks + window} leave no far copy in {length} tokens"
        fix = "choose a smaller window, or longer sequences if the model has positions for them"
        raise RecipeMismatchError(what, fix=fix)
    known = sorted(set(plain_windows(loaded, tokenizer, length, samples, seed).flatten().tolist()) - set(start))
    draw = random.Random(seed)
    sequences = [repeated(start, known, period, length, draw) for _ in range(samples)]
    rows = torch.arange(length - period, length)  # of the last copy

    def attention(module, query, key, value, mask, **kwargs):
        weights = hook.weights(module, query, key, rows, **kwargs)
        masses = torch.stack(copy_mass(weights, rows, period, max(sinks, len(start))))
        totals[module.layer_idx] += masses.double().cpu()
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention) as hook, torch.no_grad():
        totals = [torch.zeros(2, layer.heads, dtype=torch.float64) for layer in hook.anatomy.layers]
        begin(progress, "measuring heads", samples)
        for index, ids in enumerate(sequences):
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
            if progress:
                progress(index + 1, samples, "measuring heads")
        means = [total / samples for total in totals]
        table = hook.largest_of_groups([mean.sum(0) for mean in means])
        kinds = {name: hook.largest_of_groups([mean[kind] for mean in means]) for kind, name in enumerate(KINDS)}
    origin = {"text": loaded.title, "sha256": loaded.sha256[:12], "sinks": sinks, "window": window}
    origin |= {"samples": samples, "length": length, "period": period, "seed": seed}
    return HeadScores("induction", table, origin | kinds)


KINDS = ("echo", "induction")


def repeated(start: list[int], known: list[int], period: int, length: int, draw: random.Random) -> torch.Tensor:
    """Random tokens again and again after the tokens that begin a text: long [length].

    Args:
        known: what they are drawn from, each once where there are enough.
        period: tokens until they come again.
    """
    drawn = draw.sample(known, period) if len(known) >= period else draw.choices(known, k=period)
    copies = -(-(length - len(start)) // period)
    return torch.tensor([*start, *(drawn * copies)][:length])


def copy_mass(weights: torch.Tensor, rows: torch.Tensor, period: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over rows of the mass on earlier copies of the row's own token, and on what followed those copies.

    Args:
        weights: [1, heads, r, n], of queries at the positions `rows`, long [r].
        period: tokens until they come again, more than the window.
        first: keys before this one do not count: sinks, and what begins a text.

    Returns:
        Two of [heads].
    """
    position = torch.arange(weights.shape[-1], device=weights.device)
    distance = rows.to(weights.device)[:, None] - position
    far = (position >= first) & (distance >= period - 1)
    echo, after = (far & (distance % period == rest) for rest in (0, period - 1))
    return tuple((weights * kind).sum(-1).mean(-1)[0] for kind in (echo, after))
