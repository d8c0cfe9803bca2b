"""A fit of scores, written out."""

from __future__ import annotations

import math

import torch

from surgery.calibration.closed_form.fit_scores import Rotation, ScoreSample

SMALL = 4  # channels of a head, inputs 5: the dense equations have 2 * 4 * 5 unknowns


def score_problem(groups: int, stride: int, seed: int):
    """Random samples, their base attention, and queries and keys to start from."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.polar(torch.ones(12, 1).double(), torch.arange(12).double()[:, None] * 0.7)
    rotation = Rotation.of(factors, 1.0, SMALL, "half")
    samples, heads = [], 2
    for index in range(4):
        x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        scores = 2 * torch.randn(heads, 12, 12, generator=generator, dtype=torch.float64)
        mask = torch.ones(12, 12).triu(1).bool()
        weights = scores.masked_fill(mask, -math.inf).softmax(-1) * 0.9  # a tenth goes to a learned sink
        rows = torch.arange(1 + index % stride, 12, stride)
        picked = scores.masked_fill(mask, 0.0)[:, rows]
        samples.append(ScoreSample(x, rows, weights[:, rows], lambda picked=picked: picked))
    q = torch.randn(heads, SMALL, 5, generator=generator, dtype=torch.float64)
    k = torch.randn(groups, SMALL, 5, generator=generator, dtype=torch.float64)
    return samples, rotation, q, k


def score_loss(samples, q, k) -> torch.Tensor:
    """½ Σ Var_p of the error, row by row; RoPE pair by pair; the sink is a key whose error is 0."""
    total = 0.0
    for sample in samples:
        angle = torch.arange(12).double() * 0.7

        def rope(z, angle=angle):
            a, b, c, s = z[..., 0], z[..., 1], angle.cos(), angle.sin()
            return torch.stack([a * c - b * s, a * s + b * c, z[..., 2], z[..., 3]], dim=-1)

        query, key = rope(sample.x @ q.mT), rope(sample.x @ k.mT)
        key = key.repeat_interleave(len(q) // len(k), dim=0)
        errors = 0.5 * (query @ key.mT)[:, sample.rows] - sample.scores()
        mean = (sample.weights * errors).sum(-1, keepdim=True)
        inside = (sample.weights * (errors - mean).square()).sum(-1)
        total = total + inside.sum() + ((1 - sample.weights.sum(-1)) * mean.squeeze(-1).square()).sum()
    return total / 2
