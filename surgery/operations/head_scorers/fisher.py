"""fisher: a second-order estimate of the loss on plain text when a KV head streams, and far-mass on passkeys.

A KV head that streams changes its output at position s by d(s) = near - full. To second order the KL from the full
model that this costs is 1/2 E[(g . d)^2], where g is the gradient of log p(y) with respect to the head's output and y
is a token drawn from the model: the Fisher information along d (Martens 2020, "New insights and perspectives on the
natural gradient method", arXiv 1412.1193). One backward pass serves all heads of all layers, where `ablation` needs a
forward pass for each. Changes at different positions are taken to be independent, and so are the heads.

The curvature misses the few heads that copy: at passkeys the model is so sure of the next token that it is nearly 0
there. So the sequences contain passkeys, and their rows are measured as in `far-mass`. A head's score is the mean of
its two ranks.

For the backward pass the layers are run again one at a time. Memory holds the hidden states before each layer, and
the activations of one layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from surgery.calibration.attention_hook import AttentionHook, hook_attention, row_logits
from surgery.calibration.gradients import with_gradients
from surgery.calibration.head_scores import HeadScores, ranks, refuse_not_finite
from surgery.calibration.layerwise import decoder_layers, ended, recorded, recorded_calls, replayed
from surgery.data.passkeys import calibration
from surgery.data.text import BUILTIN
from surgery.machine.placement import exact
from surgery.machine.progress import begin
from surgery.operations.base import Count, Length, Seed
from surgery.operations.head_scorers.far_mass import mass_outside
from surgery.runtime.surgery_attention import surgery_attention

ROWS = 256  # rows whose logits are in memory at once


def fisher(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: Count = 2,
    length: Length = 2048,
    keys: Count = 8,
    seed: Seed = 0,
    text=BUILTIN,
    progress=None,
) -> HeadScores:
    """The mean, 0 to 1, of a KV head's rank by the KL that its streaming costs on text and its rank by far-mass.

    The origin of the scores has the KL in nats per token (`lost`) and `far_mass`, both [layers][KV heads].

    Args: as for `far_mass`.
    """
    settings = {"samples": samples, "length": length, "keys": keys, "seed": seed}
    begin(progress, "measuring heads")
    sequences, origin = calibration(model, tokenizer, text, sinks=sinks, window=window, **settings)
    draw = torch.Generator().manual_seed(seed)
    attention = _BothOutputs(sinks, window)
    with with_gradients(), hook_attention(model, attention) as hook:
        attention.hook = hook
        attention.mass = [torch.zeros(layer.heads, dtype=torch.float64) for layer in hook.anatomy.layers]
        lost = [torch.zeros(heads, dtype=torch.float64) for heads in hook.kv_heads]
        layers, done = len(hook.kv_heads), 0
        for sequence in sequences:
            attention.rows = sequence.rows
            rows = torch.arange(sinks + window, len(sequence.ids))
            for layer, terms in output_changes(model, attention, sequence.ids, rows, sampled_tokens(draw)):
                lost[layer] += terms.square().sum(0) / 2 / len(rows) / len(sequences)
                done += 1
                if progress:
                    progress(done, layers * len(sequences), "measuring heads")
        mass = hook.largest_of_groups([total / len(sequences) for total in attention.mass])
    table = [row.tolist() for row in lost]
    refuse_not_finite([table, mass], "fisher")
    pairs = zip(ranks(table), ranks(mass), strict=True)
    scores = [[sum(pair) / 2 for pair in zip(*rows, strict=True)] for rows in pairs]
    return HeadScores("fisher", scores, origin | {"lost": table, "far_mass": mass})


class _BothOutputs:
    """An attention function for `hook_attention` that computes full heads and records how streaming would change them.

    Attributes:
        hook: set inside the context.
        rows: positions where passkeys are repeated, long [r].
        mass: for each layer, far-mass on these rows, summed over the sequences; float64 [query heads].
        full, change: output of the layer that ran last with gradients, and near - full; [1, n, heads, head_dim].
    """

    hook: AttentionHook
    rows: torch.Tensor
    mass: list[torch.Tensor]
    full: torch.Tensor
    change: torch.Tensor

    def __init__(self, sinks: int, window: int):
        self.sinks, self.window = sinks, window

    def __call__(self, module, query, key, value, mask, **kwargs):
        layer, full = module.layer_idx, surgery_attention(module, query, key, value, mask, **kwargs)
        if full[0].requires_grad:
            self.full = full[0]
            with torch.no_grad():
                reach = {"sinks": self.sinks, "window": self.window}
                self.change = self.hook.streamed(module, query, key, value, mask, **reach, **kwargs) - self.full
                weights = self.hook.weights(module, query, key, self.rows, **kwargs)
                self.mass[layer] += mass_outside(weights, self.rows, self.sinks, self.window).cpu().double()
        return full


def output_changes(model, attention, ids: torch.Tensor, rows: torch.Tensor, targets: Callable):
    """Yield (layer, g . d) for each layer from the last to the first: float64 [n, KV heads], on the CPU.

    Args:
        attention: the hooked function, with attributes `hook`, `full` and `change`.
        ids: tokens, long [n].
        rows: positions whose next tokens are predicted, long [r].
        targets: returns the tokens y, long [rows, 1], for log-probabilities [rows, vocabulary].
    """
    hook = attention.hook
    blocks = decoder_layers(model, hook.anatomy)
    with torch.no_grad(), recorded_calls(blocks) as calls, recorded(blocks) as outputs, ended(blocks[-1]):
        model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    gradient = _gradient_of_states(model, blocks, outputs, ids, rows, targets)
    for layer in reversed(range(len(blocks))):
        state, args, kwargs = calls[blocks[layer]]
        state = state.detach().requires_grad_()
        out = blocks[layer](state, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        gradient, of_heads = torch.autograd.grad(out, [state, attention.full], gradient)
        terms = (exact(of_heads) * exact(attention.change))[0].flatten(1)
        yield layer, terms.view(len(ids), hook.kv_heads[layer], -1).sum(-1).cpu()


def sampled_tokens(draw: torch.Generator) -> Callable:
    """A function that draws tokens from log-probabilities, on the CPU: a seed gives the same tokens on any device."""
    return lambda logps: torch.multinomial(logps.detach().exp().cpu(), 1, generator=draw).to(logps.device)


def _gradient_of_states(model, blocks, outputs: dict, ids, rows, targets: Callable) -> torch.Tensor:
    """The gradient of the sum over the rows of log p(y) with respect to the last layer's output [1, n, hidden]."""
    last = outputs[blocks[-1]]
    states, rest = (last[0], last[1:]) if isinstance(last, tuple) else (last, None)
    gradient = torch.zeros_like(states)
    for some in rows.split(ROWS):
        leaf = states.detach().requires_grad_()
        with replayed(blocks, outputs | {blocks[-1]: leaf if rest is None else (leaf, *rest)}):
            logps = row_logits(model, ids, some).log_softmax(-1)
        gradient += torch.autograd.grad(logps.gather(-1, targets(logps)).sum(), leaf)[0]
    return gradient
