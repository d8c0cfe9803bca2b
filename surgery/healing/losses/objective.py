"""The weighted sum of losses that a training lowers, as a mean over the tokens that count.

Losses on logits read a few rows (a chunk) at a time, and write the gradient of these rows at once. This makes only one
tensor of the logits' size and dtype, which all losses share. There is no float32 copy of the logits or their softmax.
"""

from __future__ import annotations

import torch

from surgery.healing.losses.base import Chunk, LogitLoss, Loss, LossInputs
from surgery.machine.placement import has_float64

# Values in a chunk. On a CPU a chunk should stay in the cache between the passes over it. A GPU needs large kernels.
CHUNK = {"cpu": 1 << 20}
LARGE_CHUNK = 1 << 26


def measure(
    logits: torch.Tensor, losses: dict[str, tuple[float, Loss]], inputs: LossInputs, count: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the losses of one forward, and the unweighted mean of each loss.

    With `inputs.sure` the rows of losses on logits are weighted too: in the sum and its gradient, not in the means.

    Args:
        logits: [batch, length, V].
        losses: name -> (weight, loss); at least one.
        count: number of tokens to average over; default those that `inputs.kept` marks.
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
        sum_dtype = torch.float64 if has_float64(flat.device) else wide
        sums = torch.zeros(len(losses), dtype=sum_dtype, device=flat.device)
        weighted_sums = torch.zeros_like(sums)
        step = max(1, CHUNK.get(flat.device.type, LARGE_CHUNK) // flat.shape[1])
        for first in range(0, len(flat), step):
            rows = slice(first, min(first + step, len(flat)))
            chunk, real = Chunk(rows, flat[rows].to(wide)), counts[rows]
            slope, row_weights = None, inputs.row_weights(chunk)
            for index, (weight, loss) in enumerate(zip(weights, losses, strict=True)):
                if wanted:
                    values, slopes = loss.rows_and_slopes(chunk, inputs)
                    slope = slopes.mul_(weight) if slope is None else slope.add_(slopes, alpha=weight)
                else:
                    values = loss.rows(chunk, inputs)
                values = values.masked_fill(~real, 0.0)
                sums[index] += values.sum()
                weighted_sums[index] += (values if row_weights is None else values * row_weights).sum()
            if wanted:  # rows that do not count get 0
                share = real.to(wide) / count
                share = share if row_weights is None else share * row_weights
                torch.mul(slope, share[:, None], out=gradient[rows])
        means, weighted_means = ((each / count).to(wide) for each in (sums, weighted_sums))
        ctx.factor = 1.0
        if wanted:
            ctx.save_for_backward(gradient.view(logits.shape))
        ctx.mark_non_differentiable(means)
        return (weighted_means * means.new_tensor(weights)).sum(), means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        (gradient,) = ctx.saved_tensors
        # In place, since another tensor of this size may not fit. (`.data` hides the change from autograd, which would
        # otherwise refuse a second backward pass. A second pass first undoes the factor of the first.)
        gradient.data.mul_(upstream / ctx.factor)
        ctx.factor = upstream
        return gradient, None, None, None, None, None


def rows_counted(kept: torch.Tensor, count: torch.Tensor | int | None):
    """The divisor of the mean. It is never 0, so that a batch without a row that counts gives no NaN."""
    return max(count, 1) if isinstance(count, int) else (kept.sum() if count is None else count).clamp(min=1)
