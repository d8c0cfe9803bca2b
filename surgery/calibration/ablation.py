"""ablation: what the model's answers lose when one KV head alone sees sinks + window.

The score is the KL divergence to the model as it is, mean over the rows where passkeys are repeated. Every KV head
costs a forward, so sequences are short and few. What comes before the changed layer is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .head_scores import HeadScores
from .sequences import calibration
from .text import BUILTIN
from .watching import answer_logits, watched


def ablation(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: int = 2,
    length: int = 768,
    keys: int = 4,
    seed: int = 0,
    text=BUILTIN,
    progress=None,
) -> HeadScores:
    """KL to the whole model in nats per answer token when a KV head streams, all others full.

    Args: as for `far_mass`.
    """
    settings = {"samples": samples, "length": length, "keys": keys, "seed": seed}
    sequences, origin = calibration(model, tokenizer, text, sinks=sinks, window=window, **settings)
    with watched(model) as seen, torch.no_grad():
        table = [[0.0] * heads for heads in seen.kv_heads]
        done, total = 0, samples * (sum(seen.kv_heads) + 1)
        paths = {module: path for path, module in model.named_modules()}
        blocks = [model.get_submodule(paths[module].rpartition(".")[0]) for module in seen.modules]
        for sequence in sequences:
            with recorded(blocks) as outputs:
                whole = answer_logits(model, sequence).log_softmax(-1)
            for layer, heads in enumerate(seen.kv_heads):
                with replayed(blocks[:layer], outputs):
                    for head in range(heads):
                        seen.look(layer, [head], sinks, window)
                        other = answer_logits(model, sequence).log_softmax(-1)
                        table[layer][head] += kl(whole, other) / samples
                        done += 1
                        if progress:
                            progress(done, total, "head scores")
                seen.look(layer)
            done += 1
    return HeadScores("ablation", table, origin)


def kl(whole: torch.Tensor, other: torch.Tensor) -> float:
    """KL(whole || other) in nats, mean over the rows of two tables of log-probabilities."""
    return float((whole.exp() * (whole - other)).sum(-1).mean())


@contextmanager
def recorded(blocks: list) -> Iterator[dict]:
    """What each block gives in the forward that runs inside: block -> output."""
    outputs: dict = {}
    hooks = [block.register_forward_hook(lambda block, _, output: outputs.update({block: output})) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed(blocks: list, outputs: dict) -> Iterator[None]:
    """These blocks give what was recorded, and compute nothing."""
    before = [(block, block.__dict__.get("forward")) for block in blocks]  # accelerate sets one of its own
    try:
        for block in blocks:
            block.forward = lambda *_, output=outputs[block], **__: output
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward
