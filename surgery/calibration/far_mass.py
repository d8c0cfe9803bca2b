"""far-mass: how much attention falls outside sinks + window where a passage comes back. No gradient, no optimisation.

On the rows of a repetition a head that copies from the past must look at the first occurrence. A KV head's score is
the largest mean mass of its query heads: if one of them needs the far past, the KV head must keep it.
"""

from __future__ import annotations

import torch

from ..runtime.surgery_attention import surgery_attention
from .head_scores import HeadScores
from .sequences import fitting_length, repeats
from .text import BUILTIN, load_text
from .watching import watched


def far_mass(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: int = 8,
    length: int = 1024,
    seed: int = 0,
    text=BUILTIN,
    progress=None,
) -> HeadScores:
    """Mean attention mass outside sinks + window on the rows of a repeated passage, the largest of a group.

    Args:
        model, tokenizer: in memory; the model is left as it was.
        sinks, window: of the streaming heads that are planned.
        samples, length: sequences, and tokens in each (cut to what the model and the text allow).
        seed: which pieces of the text.
        text: see `load_text`; of the built-in text the calibration part.
        progress: called with done, total and a label.
    """
    text = load_text(text, part="calibration")
    length = fitting_length(model, length)
    sequences = repeats(text, tokenizer, samples=samples, length=length, reach=sinks + window, seed=seed)
    rows = sequences[0].rows

    def attention(module, query, key, value, mask, **kwargs):
        weights = seen.weights(module, query, key, rows, **kwargs)
        totals[module.layer_idx] += mass_outside(weights, rows, sinks, window).double().cpu()
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with watched(model, attention) as seen, torch.no_grad():
        totals = [torch.zeros(layer.heads, dtype=torch.float64) for layer in seen.anatomy.layers]
        for number, sequence in enumerate(sequences):
            model.base_model(input_ids=sequence.ids[None].to(model.device), use_cache=False)
            if progress:
                progress(number + 1, len(sequences), "head scores")
        table = [
            (total / len(sequences)).view(heads, -1).amax(-1).tolist()
            for total, heads in zip(totals, seen.kv_heads, strict=True)
        ]
    origin = {"text": text.title, "sha256": text.sha256[:12], "sinks": sinks, "window": window}
    return HeadScores("far-mass", table, origin | {"samples": len(sequences), "length": length, "seed": seed})


def mass_outside(weights: torch.Tensor, rows: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Mean over the rows of the attention mass on keys outside sinks + window.

    Args:
        weights: [1, heads, r, n], of queries at the positions `rows`, long [r].

    Returns:
        [heads].
    """
    position = torch.arange(weights.shape[-1], device=weights.device)
    far = (position >= sinks) & (rows.to(weights.device)[:, None] - position >= window)
    return (weights * far).sum(-1).mean(-1)[0]
