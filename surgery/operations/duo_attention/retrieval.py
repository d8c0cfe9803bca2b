"""retrieval: how often a head attends most to the token that comes next, while a passkey is repeated.

Source: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574. At a step
that generates token y, a head scores if the key that it attends to most lies in the needle and is the token y.

Here the steps are teacher-forced: they are the answer's rows in one prefill that contains the answer. A decoding step
that gives the right token has the same attention. The origin records the share of steps at which the model would
decode the right token. Where this share is small, the scores mean little (the original leaves such samples out).

The method finds only the heads that copy. Most heads score 0, and so do the heads in lower layers on which the copying
heads depend.
"""

from __future__ import annotations

import torch

from surgery.calibration.attention_hook import answer_logits, hook_attention
from surgery.calibration.head_scores import HeadScores
from surgery.data.passkeys import calibration
from surgery.data.text import BUILTIN
from surgery.machine.progress import begin
from surgery.operations.base import Count, Length, Seed
from surgery.runtime.surgery_attention import surgery_attention


def retrieval(
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
    progress=None,
) -> HeadScores:
    """The share of passkey tokens at whose source a head's strongest attention points; the largest in each group.

    Args: as for `far_mass`.
    """
    settings = {"samples": samples, "length": length, "keys": keys, "seed": seed}
    sequences, origin = calibration(model, tokenizer, text, sinks=sinks, window=window, **settings)

    def attention(module, query, key, value, mask, **kwargs):
        weights = hook.weights(module, query, key, sequence.rows, **kwargs)
        totals[module.layer_idx] += copies(weights, sequence).sum(-1).double().cpu()
        return surgery_attention(module, query, key, value, mask, **kwargs)

    answered = steps = 0
    with hook_attention(model, attention) as hook, torch.no_grad():
        totals = [torch.zeros(layer.heads, dtype=torch.float64) for layer in hook.anatomy.layers]
        begin(progress, "measuring heads", samples)
        for index, sequence in enumerate(sequences):
            right = answer_logits(model, sequence).argmax(-1).cpu() == sequence.ids[sequence.rows + 1]
            answered, steps = answered + int(right.sum()), steps + len(right)
            if progress:
                progress(index + 1, samples, "measuring heads")
        table = hook.largest_of_groups([total / steps for total in totals])
    origin |= {"steps": steps, "answered": round(answered / steps, 4)}
    return HeadScores("retrieval", table, origin)


def copies(weights: torch.Tensor, sequence) -> torch.Tensor:
    """Whether a row's strongest attention lies in the passkey that it repeats, on the token that comes next.

    Args:
        weights: [1, heads, r, n], attention weights of the queries at `sequence.rows`.
        sequence: a `Recall` with r rows and n tokens.

    Returns:
        bool [heads, r].
    """
    ids, rows, spans = (tensor.to(weights.device) for tensor in (sequence.ids, sequence.rows, sequence.row_spans))
    best = weights[0].argmax(-1)
    inside = (best >= spans[:, 0]) & (best < spans[:, 1])
    return inside & (ids[best] == ids[rows + 1])
