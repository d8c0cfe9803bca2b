"""ablation: what the model loses on answers and on plain text when a single KV head sees only sinks + window.

Answers show which heads retrieve passkeys from the far past. Plain text shows which heads need their far past to
predict the next words. A split by answers alone costs perplexity on long texts; a split by plain text alone loses
passkeys. Both losses are KL divergences from the unchanged model. A head's score is the mean of its ranks in the two,
since their sizes cannot be compared: the loss on answers comes from a few heads. Every KV head costs a forward pass
for each sequence, so there are few sequences. Layers before the changed one are not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery.calibration.attention_hook import hook_attention, row_logits
from surgery.calibration.head_scores import HeadScores, ranks, refuse_not_finite
from surgery.calibration.layerwise import decoder_layers, each_layer
from surgery.data.passkeys import calibration, plain_windows
from surgery.data.text import BUILTIN, fitting_length, load_text
from surgery.machine.progress import begin
from surgery.operations.base import Count, Length, Seed


def ablation(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: Count = 2,
    length: Length = 768,
    keys: Count = 4,
    seed: Seed = 0,
    text=BUILTIN,
    progress=None,
) -> HeadScores:
    """The mean of a KV head's two ranks, 0 to 1, by the KL from the full model when this head alone streams.

    The origin of the scores has the KLs in nats per token: `lost`, [layers][KV heads] for each kind of text.

    Args: as for `far_mass`. There are as many samples of plain text as sequences with passkeys; each is twice as long.
    """
    settings = {"samples": samples, "length": length, "keys": keys, "seed": seed}
    recalls, origin = calibration(model, tokenizer, text, sinks=sinks, window=window, **settings)
    plain = plain_windows(
        load_text(text, "calibration"), tokenizer, fitting_length(model.config, 2 * length), samples, seed
    )
    answers = [(recall.ids, recall.rows) for recall in recalls]
    kinds = [answers, [(ids, far_rows(len(ids), sinks, window)) for ids in plain]]
    with hook_attention(model) as hook, torch.no_grad():
        total = sum(map(len, kinds)) * sum(hook.kv_heads)
        done, tables = 0, []
        begin(progress, "measuring heads", total)
        for kind in kinds:
            tables.append([[0.0] * heads for heads in hook.kv_heads])
            for ids, rows in kind:
                for layer, head, kl in _each_head_streaming(model, hook, ids, rows, sinks, window):
                    tables[-1][layer][head] += kl / len(kind)
                    done += 1
                    if progress:
                        progress(done, total, "measuring heads")
    refuse_not_finite(tables, "ablation")
    orders = [ranks(table) for table in tables]
    scores = [[sum(pair) / 2 for pair in zip(*rows, strict=True)] for rows in zip(*orders, strict=True)]
    return HeadScores("ablation", scores, origin | {"lost": dict(zip(("answers", "plain text"), tables, strict=True))})


def far_rows(length: int, sinks: int, window: int) -> torch.Tensor:
    """Positions, long [r], of every second row that has keys outside sinks + window."""
    return torch.arange(sinks + window, length, 2)


def _each_head_streaming(
    model, hook, ids: torch.Tensor, rows: torch.Tensor, sinks: int, window: int
) -> Iterator[tuple[int, int, float]]:
    """Yield (layer, KV head, KL from the full model in nats, mean over the rows) as each head streams alone."""
    blocks = decoder_layers(model, hook.anatomy)
    for layer, measure in each_layer(blocks, lambda: row_logits(model, ids, rows).log_softmax(-1)):
        for head in range(hook.kv_heads[layer]):
            hook.set_streaming(layer, [head], sinks, window)
            yield layer, head, measure()
        hook.set_streaming(layer)
