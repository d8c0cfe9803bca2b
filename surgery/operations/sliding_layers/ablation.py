"""The layers in which a window costs least, found in rounds of ablation on answers and on plain text.

Answers show which layers carry what stands far back; plain text shows which layers need the first token or the far
past to predict the next words. Both losses are KL divergences from the unchanged model, in nats a token. A layer's
cost is the loss on plain text, and a share of the loss on answers, which is far larger for the layers that copy.

The costs of single layers do not add up: a layer that costs little alone may cost much beside another, or the reverse.
So each round tries the layers that are left beside those that were chosen before, and chooses the cheapest of them.
recipes/sliding-layers.md compares both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from surgery.calibration.attention_hook import AttentionHook, hook_attention, row_logits
from surgery.calibration.head_scores import refuse_not_finite
from surgery.calibration.layerwise import decoder_layers, kl, recorded, replayed
from surgery.data.passkeys import calibration, plain_windows
from surgery.data.text import fitting_length, load_text
from surgery.machine.progress import begin
from surgery.operations.sliding_layers.window_search import STAGE, WindowSearch

KEYS = 4  # passkeys in a sequence
ANSWERS, PLAIN = KINDS = ("answers", "plain text")


def choose_layers(
    model, tokenizer, layers: Sequence[int], search: WindowSearch, progress=None
) -> tuple[list[int], dict[str, Any]]:
    """The layers that get the window.

    Args:
        layers: indices of the layers to try.
        progress: called with done, total and a label.

    Returns:
        Indices in order, and a record with each round's KLs in nats a token, for each kind of text and layer.
    """
    options = {"samples": search.samples, "length": search.length, "seed": search.seed}
    recalls, origin = calibration(model, tokenizer, search.text, sinks=0, window=search.window, keys=KEYS, **options)
    length = fitting_length(model.config, search.length)
    plain = plain_windows(load_text(search.text, "calibration"), tokenizer, length, search.samples, search.seed)
    sequences = [[(recall.ids, recall.rows) for recall in recalls]]
    sequences.append([(ids, torch.arange(search.window, len(ids), 2)) for ids in plain])
    total, done = sum(map(len, sequences)) * search.trials(len(layers)), 0
    begin(progress, STAGE, total)
    chosen: list[int] = []
    record = origin | {"rounds": []}
    with hook_attention(model) as hook, torch.no_grad():
        for size in search.chosen_in_rounds():
            left = [index for index in layers if index not in chosen]
            lost = {kind: dict.fromkeys(left, 0.0) for kind in KINDS}
            for kind, texts in zip(KINDS, sequences, strict=True):
                for ids, rows in texts:
                    for index, loss in _losses(model, hook, ids, rows, search.window, chosen, left):
                        lost[kind][index] += loss / len(texts)
                        done += 1
                        if progress:
                            progress(done, total, STAGE)
            refuse_not_finite([[list(each.values())] for each in lost.values()], "sliding_layers")
            costs = {index: lost[PLAIN][index] + search.answers * lost[ANSWERS][index] for index in left}
            chosen += sorted(left, key=lambda index: costs[index])[:size]
            record["rounds"].append({"chosen": sorted(chosen), "lost": lost})
    return sorted(chosen), record


def _losses(
    model, hook: AttentionHook, ids: torch.Tensor, rows: torch.Tensor, window: int, chosen: list[int], left: list[int]
) -> Iterator[tuple[int, float]]:
    """Yield (layer, KL from the unchanged model in nats, mean over the rows) where it slides beside the chosen ones.

    The layers before the one that is tried are not computed again.
    """

    def answer() -> torch.Tensor:
        return row_logits(model, ids, rows).log_softmax(-1)

    def slide(index: int, slides: bool) -> None:
        hook.set_streaming(index, range(hook.kv_heads[index]) if slides else (), 0, window)

    blocks, base = decoder_layers(model, hook.anatomy), answer()
    for index in chosen:
        slide(index, True)
    with recorded(blocks) as outputs:
        answer()
    for index in left:
        slide(index, True)
        with replayed(blocks[:index], outputs):
            yield index, kl(base, answer())
        slide(index, False)
    for index in chosen:
        slide(index, False)
