"""induction: how much a head attends to earlier copies of random tokens, and to the tokens that followed them.

The sequence repeats a block of random tokens until it is full. The next token then follows from the past alone, and
knowledge of language does not help. A head that attends to the earlier copy of a token (echo) or to the token after
that copy (induction) finds it by content, over any distance. A KV head's score is the largest mean mass of its query
heads on those tokens, outside sinks + window. No answers are needed.

Source: Tang et al. 2024, "RazorAttention", arXiv 2407.15891, which keeps a quota of each kind of head. Here the two
masses are added, so that one ratio decides; the origin has both. The random tokens are drawn from the tokens of a
text, since a vocabulary also holds tokens that occur in no text.
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
from surgery.operations.base import Count, Length, Seed
from surgery.runtime.surgery_attention import surgery_attention


def induction(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: Count = 8,
    length: Length = 1024,
    repeats: Count = 4,
    seed: Seed = 0,
    text=BUILTIN,
    per: str = "kv_heads",
    progress=None,
) -> HeadScores:
    """Mean attention mass on earlier copies of a token and on the tokens after them.

    Args: as for `far_mass`, and
        repeats: how often a sequence holds the random tokens; less often where a copy would be inside the window.

    Raises:
        SurgeryError: the sequence holds no copy outside sinks + window.
    """
    loaded, length = load_text(text, "calibration"), fitting_length(model.config, length)
    start = begin_of_text(tokenizer)
    period = max(window + 1, (length - len(start)) // repeats)
    if len(start) + 2 * period > length or sinks >= len(start) + period:
        what = f"sinks + window = {sinks + window} leave no far copy in {length} tokens"
        fix = "choose a smaller window, or longer sequences if the model has positions for them"
        raise RecipeMismatchError(what, fix=fix)
    known = sorted(set(plain_windows(loaded, tokenizer, length, samples, seed).flatten().tolist()) - set(start))
    draw = random.Random(seed)
    sequences = [repeated(start, known, period, length, draw) for _ in range(samples)]
    rows = torch.arange(length - period, length)  # rows of the last copy

    def attention(module, query, key, value, mask, **kwargs):
        weights = hook.weights(module, query, key, rows, **kwargs)
        masses = torch.stack(copy_mass(weights, rows, period, max(sinks, len(start))))
        totals[module.layer_idx] += masses.cpu().double()
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention) as hook, torch.no_grad():
        totals = [torch.zeros(2, layer.heads, dtype=torch.float64) for layer in hook.anatomy.layers]
        begin(progress, "measuring heads", samples)
        for index, ids in enumerate(sequences):
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
            if progress:
                progress(index + 1, samples, "measuring heads")
        means = [total / samples for total in totals]
        table = hook.table([mean.sum(0) for mean in means], per)
        kinds = {name: hook.table([mean[kind] for mean in means], per) for kind, name in enumerate(KINDS)}
    origin = {"text": loaded.title, "sha256": loaded.sha256[:12], "sinks": sinks, "window": window}
    origin |= {"samples": samples, "length": length, "period": period, "seed": seed}
    return HeadScores("induction", table, origin | kinds, per)


KINDS = ("echo", "induction")


def repeated(start: list[int], known: list[int], period: int, length: int, draw: random.Random) -> torch.Tensor:
    """A sequence, long [length]: the tokens that begin a text, then one block of random tokens, repeated.

    Args:
        start: the tokens that begin a text.
        known: the tokens to draw from; each is drawn at most once where there are enough.
        period: tokens in the block.
    """
    drawn = draw.sample(known, period) if len(known) >= period else draw.choices(known, k=period)
    copies = -(-(length - len(start)) // period)
    return torch.tensor([*start, *(drawn * copies)][:length])


def copy_mass(weights: torch.Tensor, rows: torch.Tensor, period: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over rows of the mass on earlier copies of the row's own token, and on the tokens after those copies.

    Args:
        weights: [1, heads, r, n], attention weights of the queries at positions `rows`, long [r].
        period: distance between copies in tokens; it is larger than the window.
        first: keys before this position do not count: sinks, and the tokens that begin a text.

    Returns:
        Two tensors [heads]: the mass on copies, and the mass on the tokens after them.
    """
    position = torch.arange(weights.shape[-1], device=weights.device)
    distance = rows.to(weights.device)[:, None] - position
    far = (position >= first) & (distance >= period - 1)
    echo, after = (far & (distance % period == rest) for rest in (0, period - 1))
    return tuple((weights * kind).sum(-1).mean(-1)[0] for kind in (echo, after))
