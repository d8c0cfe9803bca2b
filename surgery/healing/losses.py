"""What healing lowers: cross-entropy of the text, and the distance to the base's probabilities and hidden states.

Logits are [batch, length, vocabulary], often the largest tensor of a training step. They are read a few rows at a
time, in float32 or wider, and each chunk leaves the gradient of its rows at once: beside the logits one tensor of
their size and dtype is made, no float32 copy of them, and none of their softmax. Several terms share that tensor.

A loss is a mean over the tokens that count, in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Values of a chunk. On a CPU it should stay in the cache between the passes over it; a GPU wants large kernels.
CHUNK = {"cpu": 1 << 20}
LARGE_CHUNK = 1 << 26


@dataclass
class Chunk:
    """Some rows of the student's logits.

    Attributes:
        rows: which, of all rows of the batch one after the other.
        logits: [r, V], float32 or wider.
    """

    rows: slice
    logits: torch.Tensor
    _known: dict = field(default_factory=dict)

    def log_probabilities(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log q and q of the softmax at a temperature, both [r, V]: worked out once, not to be changed."""
        if temperature not in self._known:
            log_q = log_softmax(self.logits, temperature)
            self._known[temperature] = log_q, log_q.exp()
        return self._known[temperature]


# Of a chunk: each row's loss [r], and its gradient with respect to the logits [r, V].
Term = Callable[[Chunk], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Mean of −log q(next token).

    Args:
        logits: [batch, length, V].
        labels: long [batch, length], the tokens themselves; −100 where a token is not to be predicted.
        count: tokens to average over; default those that this batch predicts.
    """
    return weighted(logits, predicts(labels), {"ce": (1.0, next_token(labels))}, count)[0]


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kept: torch.Tensor,
    temperature: float = 1.0,
    count: int | None = None,
) -> torch.Tensor:
    """Mean of T² KL(p ‖ q), p and q the softmax of teacher and student logits divided by T.

    T² keeps the gradient's size as T grows. Source: Hinton et al. 2015, arXiv 1503.02531.

    Args:
        student, teacher: logits [batch, length, V]; no gradient goes to the teacher.
        kept: bool [batch, length], the rows that count.
        count: rows to average over; default those kept.
    """
    return weighted(student, kept, {"kl": (1.0, to_teacher(teacher, temperature))}, count)[0]


def distillation_top_k(
    student: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rest: torch.Tensor,
    kept: torch.Tensor,
    temperature: float = 1.0,
    count: int | None = None,
) -> torch.Tensor:
    """As `distillation`, of a teacher of whom k tokens are known and the mass of all others.

    The KL of two distributions over k + 1 outcomes, the last of which is "another token": never above the KL over the
    vocabulary, and the same where k is all of it.

    Args:
        values: log p [batch, length, k] at the temperature.
        indices: their tokens, integers [batch, length, k].
        rest: log of the mass of all other tokens [batch, length]; −inf for none.
        Others: as for `distillation`.
    """
    return weighted(student, kept, {"kl": (1.0, to_top_k(values, indices, rest, temperature))}, count)[0]


def hidden_mse(
    student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], kept: torch.Tensor, count: int | None = None
) -> torch.Tensor:
    """Mean over layers and kept tokens of |s − t|² / |t|².

    Relative for each token: hidden states grow from layer to layer, and the first token's are hundreds of times as
    large as others'.

    Args:
        student, teacher: hidden states [batch, length, D] of each layer; no gradient goes to the teacher.
        kept: bool [batch, length].
    """
    total = torch.zeros((), device=kept.device)
    for ours, theirs in zip(student, teacher, strict=True):
        wide = torch.promote_types(ours.dtype, torch.float32)
        theirs = theirs.detach().to(ours.device, wide)
        apart = (ours.to(wide) - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-30)
        total = total.to(apart) + apart.masked_fill(~kept.to(apart.device), 0.0).sum()
    return total / (len(student) * _rows(kept, count))


def predicts(labels: torch.Tensor) -> torch.Tensor:
    """Rows whose next token is to be predicted: bool, as `labels`; never the last of a sequence."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    found[:, :-1] = labels[:, 1:] >= 0
    return found


def weighted(
    logits: torch.Tensor, kept: torch.Tensor, terms: dict[str, tuple[float, Term]], count: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of terms on the same logits, and each term's mean by itself, without a gradient.

    Args:
        logits: [batch, length, V].
        kept: bool [batch, length], the rows that count.
        terms: name -> (weight, term).
        count: rows to average over; default those kept.
    """
    wanted = logits.requires_grad and torch.is_grad_enabled()
    weights, functions = zip(*terms.values(), strict=True)
    loss, means = _Chunked.apply(logits, kept, weights, functions, _rows(kept, count), wanted)
    return loss, dict(zip(terms, means, strict=True))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, kept, weights, terms, count, wanted):
        flat, counts = logits.detach().flatten(0, -2), kept.flatten().to(logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(flat) if wanted else None
        sums = torch.zeros(len(terms), dtype=torch.float64 if flat.device.type != "mps" else wide, device=flat.device)
        step = max(1, CHUNK.get(flat.device.type, LARGE_CHUNK) // flat.shape[1])
        for first in range(0, len(flat), step):
            rows = slice(first, min(first + step, len(flat)))
            chunk, real = Chunk(rows, flat[rows].to(wide)), counts[rows]
            slope = None
            for number, (weight, term) in enumerate(zip(weights, terms, strict=True)):
                values, slopes = term(chunk)
                sums[number] += values.masked_fill(~real, 0.0).sum()
                slope = slopes.mul_(weight) if slope is None else slope.add_(slopes, alpha=weight)
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


def next_token(labels: torch.Tensor) -> Term:
    """Cross-entropy of the next token; `labels` as for `cross_entropy`."""
    following = torch.cat([labels[:, 1:], labels[:, :1]], dim=1).flatten().clamp(min=0)

    def term(chunk: Chunk):
        log_q, q = chunk.log_probabilities(1.0)
        target = following[chunk.rows].to(q.device)[:, None]
        slope = q.scatter_add(1, target, q.new_tensor(-1.0).expand(target.shape))
        return -log_q.gather(1, target)[:, 0], slope

    return term


def to_teacher(teacher: torch.Tensor, temperature: float) -> Term:
    """T² KL to a teacher's logits; see `distillation`."""
    flat = teacher.detach().flatten(0, -2)

    def term(chunk: Chunk):
        log_q, q = chunk.log_probabilities(temperature)
        log_p = log_softmax(flat[chunk.rows].to(q.device, q.dtype), temperature)
        p = log_p.exp()
        return temperature**2 * torch.linalg.vecdot(p, log_p - log_q), (q - p).mul_(temperature)

    return term


def to_top_k(values: torch.Tensor, indices: torch.Tensor, rest: torch.Tensor, temperature: float) -> Term:
    """T² KL to a teacher's k tokens and the mass of the others; see `distillation_top_k`."""
    values, indices, rest = values.detach().flatten(0, -2), indices.flatten(0, -2), rest.detach().flatten()

    def term(chunk: Chunk):
        log_q, q = chunk.log_probabilities(temperature)
        where = indices[chunk.rows].to(q.device).long()
        log_p = values[chunk.rows].to(q.device, q.dtype)
        log_p_rest = rest[chunk.rows].to(q.device, q.dtype)
        p, p_rest = log_p.exp(), log_p_rest.exp()
        slope = q.scatter(1, where, 0.0)  # q of the others: their sum is exact where 1 − Σ q of the k would be noise
        q_rest = slope.sum(-1).clamp(min=torch.finfo(q.dtype).tiny)
        of_rest = torch.where(p_rest > 0, p_rest * (log_p_rest - q_rest.log()), 0.0)
        of_k = torch.where(p > 0, p * (log_p - log_q.gather(1, where)), 0.0).sum(-1)
        slope.mul_((1 - p_rest / q_rest)[:, None]).scatter_(1, where, q.gather(1, where) - p)
        return temperature**2 * (of_k + of_rest), slope.mul_(temperature)

    return term


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _rows(kept: torch.Tensor, count: int | None):
    """What to divide by: never 0, which would make NaN of a batch without a row that counts."""
    return max(count, 1) if isinstance(count, int) else (kept.sum() if count is None else count).clamp(min=1)
