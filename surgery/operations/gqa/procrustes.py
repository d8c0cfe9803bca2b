"""Generalised Procrustes: turn the heads of a group towards each other before they are merged.

Only turns that leave the model as it is are allowed (Jin et al. 2024, arXiv 2412.20677):

- keys under RoPE: RoPE multiplies the complex number z_f of a channel pair by a phase, and of all linear maps
  on one pair only multiplication by a complex number commutes with that; of those, the ones that keep lengths
  are the rotations e^{i phi_f}, one a frequency. The score is Re(q conj(k)), so the queries that read the head
  are turned by the *same* angle.
- keys without RoPE (or the channels that a partial RoPE leaves alone): any orthogonal matrix, queries likewise.
- values: any orthogonal matrix, undone in W_O.

All in float64. A turn is a matrix [d, d]; the first head of a group is the reference and keeps the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS, TOLERANCE = 100, 1e-8


def pair_channels(rotary: int, positions: str) -> tuple[list[int], list[int]]:
    """Channels that hold the real and the imaginary parts of RoPE's complex numbers."""
    if positions == "interleaved":
        return list(range(0, rotary, 2)), list(range(1, rotary, 2))
    return list(range(rotary // 2)), list(range(rotary // 2, rotary))


def key_turns(keys: Tensor, rotary: int, positions: str) -> Tensor:
    """Turns [m, d, d] that bring m key heads [m, d, n] closest to their mean; they commute with RoPE."""
    import torch

    heads, size, _ = keys.shape
    turns = torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1)
    if rotary:
        real, imag = pair_channels(rotary, positions)
        phases = _phases(torch.complex(keys[:, real], keys[:, imag]))
        turns[:, real, real] = phases.real
        turns[:, imag, imag] = phases.real
        turns[:, real, imag] = -phases.imag
        turns[:, imag, real] = phases.imag
    if rotary < size:
        turns[:, rotary:, rotary:] = orthogonal_turns(keys[:, rotary:])
    return turns


def orthogonal_turns(heads: Tensor) -> Tensor:
    """Orthogonal matrices R [m, d, d] that minimise sum_h |R_h X_h - mean|^2 for X [m, d, n]; R_0 is the identity."""
    import torch

    count, size, _ = heads.shape
    turns = torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    target, last = heads[0], -1.0
    for _ in range(ROUNDS):
        u, _, vh = torch.linalg.svd(target @ heads.mT)
        turns = u @ vh
        target = (turns @ heads).mean(dim=0)
        now = float(target.square().sum())
        if now - last <= TOLERANCE * now:
            break
        last = now
    turns = turns[0].mT @ turns
    turns[0] = torch.eye(size, dtype=torch.float64)  # exactly, not to round-off: its weights keep their bits
    return turns


def _phases(heads: Tensor) -> Tensor:
    """Unit complex numbers [m, f] that bring the rows of z [m, f, n] closest to their mean; the first is 1."""
    import torch

    phases = torch.ones(heads.shape[:2], dtype=torch.complex128)
    target, last = heads[0], -1.0
    for _ in range(ROUNDS):
        inner = (target * heads.conj()).sum(-1)
        phases = torch.where(inner.abs() > 0, torch.sgn(inner), torch.ones_like(inner))
        target = (phases.unsqueeze(-1) * heads).mean(dim=0)
        now = float(target.abs().square().sum())
        if now - last <= TOLERANCE * now:
            break
        last = now
    phases = phases * phases[0].conj()
    phases[0] = 1.0
    return phases
