"""The weighted sum of losses that a training lowers, a mean over the tokens that count.

Losses on logits read them a few rows at a time, and each chunk leaves the gradient of its rows at once: one
tensor of the logits' size and dtype is made, no float32 copy of them, and none of their softmax. Several losses
share that tensor.
"""

from __future__ import annotations

import torch

from surgery.healing.losses.base import Chunk, LogitLoss, Loss, LossInputs

# Values of a chunk. On a CPU it should stay in the cache between the passes over it; a GPU wants large kernels.
CHUNK = {"cpu": 1 << 20}
LARGE_CHUNK = 1 << 26


def measure(
    logits: torch.Tensor, losses: dict[str, tuple[float, Loss]], inputs: LossInputs, count: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of losses of one forward, and each loss's mean by itself.

    Args:
        logits: [batch, length, V].
        losses: name -> (weight, loss); at least one.
        count: tokens to average over; default those that `inputs` keeps.
    """
    rows = rows_counted(inputs.kept, count)
    logit_losses = {name: each for name, each in losses.items() if isinstance(each[1], LogitLoss)}
    loss, means = None, {}
    if logit_losses:
        wanted = logits.requires_grad and torch.is_grad_enabled()
        weights, functions = zip(*logit_losses.values(), strict=True)
        loss, each = _Chunked.apply(logits, inputs, weights, functions, rows, wanted)
        means = dict(zip(logit_losses, each, strict=True))
    for name, (weight, function) in losses.items():
        if name not in logit_losses:
            means[name] = function.mean(inputs, rows)
            term = weight * (means[name] if loss is None else means[name].to(loss))
            loss = term if loss is None else loss + term
    return loss, means


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, inputs, weights, losses, count, wanted):
        flat, counts = logits.detach().flatten(0, -2), inputs.kept.flatten().to(logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(flat) if wanted else None
        sums = torch.zeros(len(losses), dtype=torch.float64 if flat.device.type != "mps" else wide, device=flat.device)
        step = max(1, CHUNK.get(flat.device.type, LARGE_CHUNK) // flat.shape[1])
        for first in range(0, len(flat), step):
            rows = slice(first, min(first + step, len(flat)))
            chunk, real = Chunk(rows, flat[rows].to(wide)), counts[rows]
            slope = None
            for index, (weight, loss) in enumerate(zip(weights, losses, strict=True)):
                if wanted:
                    values, slopes = loss.rows_and_slopes(chunk, inputs)
                    slope = slopes.mul_(weight) if slope is None else slope.add_(slopes, alpha=weight)
                else:
                    values = loss.rows(chunk, inputs)
                sums[index] += values.masked_fill(~real, 0.0).sum()
            if wanted:  # rows that do not count get 0
                torch.mul(slope, (real.to(wide) / count)[:, None], out=gradient[rows])
        means = (sums / count).to(wide)
        ctx.factor = 1.0
        if wanted:
            ctx.save_for_backward(gradient.view(logits.shape))
        ctx.mark_non_differentiable(means)
        return (means * means.new_tensor(weights)).sum(), means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        (gradient,) = ctx.saved_tensors
        # In place: another tensor of this size may be what does not fit. (.data: autograd would refuse to give a saved
        # tensor out a second time if it saw it change; the second time this undoes the first one's factor.)
        gradient.data.mul_(upstream / ctx.factor)
        ctx.factor = upstream
        return gradient, None, None, None, None, None


def rows_counted(kept: torch.Tensor, count: torch.Tensor | int | None):
    """What to divide by: never 0, which would make NaN of a batch without a row that counts."""
    return max(count, 1) if isinstance(count, int) else (kept.sum() if count is None else count).clamp(min=1)
