"""far-mass: how much attention falls outside sinks + window on the rows where passkeys are repeated.

It needs neither gradients nor optimisation. On those rows a head that copies from the past must attend to the first
occurrence of the passkey. Rows that repeat ordinary text show less: the model predicts such text anyway, and heads
with uniform attention score highest. A KV head's score is the largest mean mass of its query heads: if one of them
needs the far past, the KV head must keep it.
"""

from __future__ import annotations

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.calibration.head_scores import HeadScores
from surgery.data.passkeys import calibration
from surgery.data.text import BUILTIN
from surgery.machine.progress import begin
from surgery.operations.base import Count, Length, Seed
from surgery.runtime.surgery_attention import surgery_attention


def far_mass(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: Count = 8,
    length: Length = 1024,
    keys: Count = 4,
    seed: Seed = 0,
    text=BUILTIN,
    per: str = "kv_heads",
    progress=None,
) -> HeadScores:
    """Mean attention mass outside sinks + window on the rows where passkeys are repeated.

    Args:
        model, tokenizer: in memory; the model is not changed.
        sinks, window: visibility of the planned streaming heads, in tokens.
        samples, length: number of sequences, and tokens in each (cut to the model's positions).
        keys: passkeys in a sequence.
        seed: seed of the windows of text, the passkeys and their positions.
        text: see `load_text`; the calibration part of the built-in text is used.
        per: "heads" for the number of each query head; "kv_heads" for the largest number in each KV head's group.
        progress: called with done, total and a label.
    """
    settings = {"samples": samples, "length": length, "keys": keys, "seed": seed}
    sequences, origin = calibration(model, tokenizer, text, sinks=sinks, window=window, **settings)

    def attention(module, query, key, value, mask, **kwargs):
        weights = hook.weights(module, query, key, sequence.rows, **kwargs)
        totals[module.layer_idx] += mass_outside(weights, sequence.rows, sinks, window).cpu().double()
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention) as hook, torch.no_grad():
        totals = [torch.zeros(layer.heads, dtype=torch.float64) for layer in hook.anatomy.layers]
        begin(progress, "measuring heads", samples)
        for index, sequence in enumerate(sequences):
            model.base_model(input_ids=sequence.ids[None].to(model.device), use_cache=False)
            if progress:
                progress(index + 1, samples, "measuring heads")
        table = hook.table([total / samples for total in totals], per)
    return HeadScores("far-mass", table, origin, per)


def mass_outside(weights: torch.Tensor, rows: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Mean over the rows of the attention mass on keys outside sinks + window.

    Args:
        weights: [1, heads, r, n], attention weights of the queries at positions `rows`, long [r].

    Returns:
        [heads].
    """
    position = torch.arange(weights.shape[-1], device=weights.device)
    far = (position >= sinks) & (rows.to(weights.device)[:, None] - position >= window)
    return (weights * far).sum(-1).mean(-1)[0]
