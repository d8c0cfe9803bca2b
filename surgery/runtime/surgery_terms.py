"""Terms that are added to the scores of attention: a bias on a row's first token or other sinks, and virtual keys.

A softmax over some keys is known by its output and its log-sum-exp. From these two, the output with one key weighted
anew, or with more keys, follows in closed form; no attention matrix is held.

    weight of the first token times gamma    out' = (out + (gamma - 1) a v) / (1 + (gamma - 1) a), a its weight in out
    m more keys                              out' = w_0 out + sum over them of w_j v'_j, w = softmax([lse, logits])
    other sinks' weight times beta           surgery_sinks.py

Sources: Han et al. 2025, "ZeroTuning", arXiv 2505.11739 (gamma); gpt_oss's learned sinks (a logit without a value);
Sun et al. 2024, "Massive Activations", arXiv 2402.17762 (explicit k' and v').
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .surgery_block import IDENTITY, TERMS
from .surgery_heads import HeadKinds
from .surgery_sinks import scale_sinks
from .surgery_stores import KeyValues


def add_keys(out, lse, logits, values=None):
    """Attention to m more keys, besides those that `out` attends to. Rows that attend to nothing stay so.

    Args:
        out: [..., n, d], the softmax's output.
        lse: [..., n], natural log-sum-exp of the scaled scores; -inf for a row that attends to nothing.
        logits: [..., n, m], scaled scores of the new keys.
        values: [..., m, d], or None: they have no value, and only take weight.

    Returns:
        The new output and log-sum-exp.
    """
    empty = lse == -torch.inf
    every = torch.cat([lse.masked_fill(empty, 0.0)[..., None], logits], dim=-1)
    weights = every.softmax(-1)
    added = out * weights[..., :1]
    if values is not None:
        added = added + weights[..., 1:] @ values.to(weights.dtype)
    return added.masked_fill(empty[..., None], 0.0), every.logsumexp(-1).masked_fill(empty, -torch.inf)


def scale_key(out, lse, logit, value, log_gamma, seen=None):
    """Attention in which the unnormalised weight of one key is multiplied by gamma.

    Half-precision `out` was rounded, which a gamma below 1 enlarges by 1 / (1 + (gamma - 1) a), at most 1 / gamma.

    Args:
        out, lse: as for `add_keys`.
        logit: [..., n], the key's own scaled score, which is one of those in `lse`.
        value: [..., 1, d], the key's value.
        log_gamma: log of gamma; broadcast to [..., n].
        seen: bool, broadcast to [..., n]: the rows that see the key; others stay as they are. None: all.

    Returns:
        The new output and log-sum-exp.
    """
    hidden = lse == -torch.inf if seen is None else (lse == -torch.inf) | ~seen
    share = (logit - lse).masked_fill(hidden, -torch.inf).exp().clamp(max=1.0)  # a; rounding may put it above 1
    more = torch.expm1(log_gamma) * share
    scaled = (out + more[..., None] * value.to(more.dtype)) / (1 + more)[..., None]
    return scaled, lse + torch.log1p(more)


@dataclass
class Terms:
    """The terms of the heads of one visibility in one layer; None for what they do not have.

    Attributes:
        log_gamma: [heads], of the weight of the row's first real token.
        log_beta, probe: [heads] and [heads, features], of the weight of other sinks, and which keys those are.
        logit: [heads, m], added to the scores of m virtual keys.
        key, value: [KV heads, m, head_dim]. A virtual key is scored against the query as it comes, after RoPE: it
            stands at position 0, and its score drifts with distance as that of the first token does. Without keys
            the logit is the score; without values they are 0.
        sink: [heads], logit of the base's own learned sink (`s_aux`).
        stand_in: the virtual keys are seen only by queries that do not see their row's first token (any more).
    """

    log_gamma: torch.Tensor | None = None
    log_beta: torch.Tensor | None = None
    probe: torch.Tensor | None = None
    logit: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    stand_in: bool = False

    def apply(self, out, lse, query, view: KeyValues, pad, scale, softcap) -> torch.Tensor:
        """The output with these terms.

        Args:
            out, lse: of `query` [batch, heads, n, head_dim] on the real keys of `view`.
            pad: [batch], slots before each row's first real token, or None for none.
        """
        first = _FirstToken(view, pad, query.shape[2]) if self.log_gamma is not None or self.stand_in else None
        wide = lse.dtype
        score = partial(scores, scale=scale, softcap=softcap, dtype=wide)
        if self.log_beta is not None:
            out, lse = scale_sinks(out, lse, query, view, pad, score, self.probe, self.log_beta.to(wide))
        if self.log_gamma is not None:
            logit = score(query, first.key)[..., 0]
            value = first.value.repeat_interleave(query.shape[1] // first.value.shape[1], dim=1)
            out, lse = scale_key(out, lse, logit, value, self.log_gamma.to(wide)[:, None], first.seen)
        if self.logit is not None:
            logits = self.logit.to(wide)[:, None]  # [heads, 1, m]
            if self.key is not None:
                logits = logits + score(query, self.key[None])
            logits = logits.expand(*lse.shape, -1)
            if self.stand_in:
                logits = logits.masked_fill(first.seen[..., None], -torch.inf)
            value = self.value
            if value is not None:
                value = value.repeat_interleave(query.shape[1] // len(value), dim=0)
            out, lse = add_keys(out, lse, logits, value)
        if self.sink is not None:
            out, lse = add_keys(out, lse, self.sink.to(wide)[:, None, None].expand(*lse.shape, 1))
        return out.to(query.dtype)


def split_terms(module, kinds: HeadKinds, sink: torch.Tensor | None) -> list[Terms | None]:
    """The terms of each kind of head of an attention module, None where there is nothing to add.

    Args:
        sink: [query heads], the base's learned sinks, or None.
    """
    names = getattr(module, "surgery_parameters", ())
    if not names and sink is None:
        return [None] * len(kinds.visibilities)
    tensors = {name.removeprefix("surgery_").removeprefix("sink_"): getattr(module, name) for name in names}
    tensors |= {} if sink is None else {"sink": sink}
    parts = {}
    for name, tensor in tensors.items():
        split = kinds.split_keys if name in ("key", "value") else kinds.split_queries
        parts[name] = [part[0] for part in split(tensor[None])]
    stand_in = getattr(module, "surgery_stand_in", False)
    each = zip(*parts.values(), strict=True)
    return [Terms(**dict(zip(parts, part, strict=True)), stand_in=stand_in) for part in each]


def register_terms(module, layer: dict) -> None:
    """Give an attention module the parameters that its entry in the surgery block names, with values that do nothing.

    A parameter that is there already, of this shape, keeps its values.
    """
    shapes = layer.get("parameters", {})
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    for name, shape in shapes.items():
        old = getattr(module, name, None)
        if old is None or tuple(old.shape) != tuple(shape):
            values = torch.full(shape, IDENTITY[name], dtype=like.dtype, device=like.device)
            module.register_parameter(name, torch.nn.Parameter(values))
    module.surgery_parameters = tuple(name for name in shapes if name in TERMS)
    module.surgery_stand_in = layer.get("stand_in", False)


def scores(query, keys, scale, softcap, dtype) -> torch.Tensor:
    """Scores [batch, heads, n, m] of queries [batch, heads, n, d] and keys [1 or batch, KV heads, m, d]."""
    batch, heads, length, size = query.shape
    rows = query.reshape(batch, keys.shape[1], -1, size).to(dtype)
    found = (rows @ keys.to(dtype).mT * scale).reshape(batch, heads, length, -1)
    return found if softcap is None else softcap * torch.tanh(found / softcap)


class _FirstToken:
    """The first real token of each row.

    Attributes:
        key, value: [batch, KV heads, 1, head_dim]; of a row that lost the token, anything.
        seen: [1 or batch, 1, n], which queries see it.
    """

    def __init__(self, view: KeyValues, pad: torch.Tensor | None, length: int):
        visibility, device = view.visibility, view.keys.device
        start = torch.zeros(1, dtype=torch.long, device=device) if pad is None else pad.long()
        if visibility.sinks:
            self.key, self.value = view.sink_keys[:, :, :1], view.sink_values[:, :, :1]
        else:
            width = view.keys.shape[2]
            index = start % width if view.ring else (start - view.start).clamp(0, width - 1)
            index = index[:, None, None, None].expand(*view.keys.shape[:2], 1, view.keys.shape[3])
            self.key, self.value = view.keys.gather(2, index), view.values.gather(2, index)
        position = torch.arange(view.end - length, view.end, device=device) - start[:, None]
        seen = position >= 0
        bounds = (visibility.limit, None if visibility.sinks else visibility.window)
        for bound in bounds:
            seen = seen if bound is None else seen & (position < bound)
        self.seen = seen[:, None]
