"""Less weight for sinks other than the first token (ACT), in closed form and without an attention matrix.

A sink is recognised by its own value: token j is a sink of query head h if `probe_h . (v_j, |v_j|, 1) > 0`. So the
same tokens are sinks whether a text comes at once, in chunks or token by token. The probes were calibrated once. (ACT
reads the whole attention map of each text, which a cached decode does not have.) Let a be the weight that a query
gives to all the sinks it sees, and p their part of the output, the sum of a_j v_j. Then

    out' = (out - p) (1 - beta a) / (1 - a) + beta p

gives the sinks the weight beta a. The rest goes to the query's other keys in proportion. The same change as a bias on
the sinks' scores is log(beta (1 - a) / (1 - beta a)), which differs from query to query.

Source: Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks", arXiv 2406.15765.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .surgery_bias import fault_of_shapes, parameters_of_kinds, scores
from .surgery_config import QUERY_HEADS, Parameter, Part
from .surgery_stores import KeyValues
from .surgery_visibility import HeadKinds

MOST = 0.9  # a row with more weight on sinks has hardly any other key: it gets the bias of a row with this weight
ROWS = 256  # queries whose scores with the sinks are held at once


def scale_share(out, lse, share, share_output, log_beta):
    """Attention in which some keys together get beta times their weight, and the others the rest in proportion.

    The rounding error of a half-precision `out` grows by the factor (1 - beta a) / (1 - a), at most 10.

    Args:
        out: [..., n, d], the softmax's output. lse: [..., n], its log-sum-exp, -inf for a row that sees nothing.
        share: [..., n], the weight a of these keys in `out`, 0 to 1. Above `MOST` the bias is that of `MOST`.
        share_output: [..., n, d], the sum of their weights times their values.
        log_beta: log of beta, at most 0; broadcast to [..., n].

    Returns:
        The new output and log-sum-exp.
    """
    more = torch.expm1(log_beta) / (1 - log_beta.exp() * share.clamp(max=MOST))  # e ** bias - 1
    total = 1 + more * share
    return (out + more[..., None] * share_output) / total[..., None], lse + total.log()


@dataclass
class SinkShare:
    """The reduced weight of sinks other than the first token, for the heads of one visibility in one layer.

    Attributes:
        log_beta: [heads], the log of the share of the weight that the sinks keep.
        sink_probe: [heads, features], the probes that recognise sinks.
    """

    log_beta: torch.Tensor
    sink_probe: torch.Tensor

    def apply(self, out, lse, query, view: KeyValues, pad, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
        """A correction of attention's output and log-sum-exp; arguments as for `surgery_bias.Terms.apply`."""
        score = partial(scores, scale=scale, softcap=softcap, dtype=lse.dtype)
        return scale_sinks(
            out, lse, query, view, pad, score, probe=self.sink_probe, log_beta=self.log_beta.to(lse.dtype)
        )


def sink_shares(module, kinds: HeadKinds) -> list[SinkShare]:
    """A `SinkShare` for each kind of head of an attention module that has a beta."""
    return [SinkShare(**named) for named in parameters_of_kinds(module, kinds, PART.parameters)]


def scale_sinks(out, lse, query, view: KeyValues, pad, scores, *, probe, log_beta):
    """The output and log-sum-exp after the weight on each head's sinks is multiplied by beta.

    Args:
        out, lse: attention's result for `query` [batch, heads, n, head_dim] on the keys of `view`.
        pad: [batch], slots before each row's first real token, or None for none.
        scores: a function that gives scaled and capped scores: (queries [batch, heads, n, d],
            keys [batch, heads, m, d]) -> [..., n, m].
        probe: [heads, features]. log_beta: [heads].
    """
    batch, heads, length, size = query.shape
    wanted = log_beta < 0
    if torch.is_grad_enabled() and log_beta.requires_grad:  # heads with beta = 1 need a gradient as well
        wanted = torch.ones_like(wanted)
    keys, values, position, lasting, usable = _keys(view, pad)
    marked = (probe_scores(values, probe) > 0) & usable[:, None] & wanted[:, None]
    most = int(marked.sum(-1).max())
    if not most:
        return out, lse
    index = marked.int().topk(most, dim=-1).indices  # [batch, heads, m]
    flat = index.reshape(batch, keys.shape[1], -1, 1).expand(-1, -1, -1, size)
    keys, values = (tensor.gather(2, flat).reshape(batch, heads, most, size) for tensor in (keys, values))
    position = position[:, None].expand(batch, heads, -1).gather(2, index)[:, :, None]
    lasting, marked = lasting[index][:, :, None], marked.gather(2, index)[:, :, None]
    start = 0 if pad is None else pad.long()[:, None]
    at = torch.arange(view.end - length, view.end, device=query.device) - start  # [n] or [batch, n]
    at = at.expand(batch, -1)[:, None, :, None]
    log_beta, chunks = log_beta.clamp(max=0.0)[:, None], []
    for begin in range(0, length, ROWS):
        rows = slice(begin, begin + ROWS)
        distance = at[:, :, rows] - position
        seen = marked & (distance >= 0) & (lse[:, :, rows, None] > -torch.inf)
        if view.visibility.limit is not None:
            seen = seen & (distance < view.visibility.limit)
        if view.visibility.window is not None:
            seen = seen & (lasting | (distance < view.visibility.window))
        if view.read is not None:
            seen = seen & view.read(at[:, :, rows], position)
        logits = scores(query[:, :, rows], keys) - lse[:, :, rows, None]
        weights = logits.masked_fill(~seen, -torch.inf).exp()
        share = weights.sum(-1).clamp(max=1.0)  # rounding may put it above
        sink_output = weights @ values.to(weights.dtype)
        chunks.append(scale_share(out[:, :, rows], lse[:, :, rows], share, sink_output, log_beta))
    outs, lses = zip(*chunks, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def probe_features(values) -> torch.Tensor:
    """The features of each token: its value, the value's norm, and 1; [..., head_dim + 2], float32 or wider."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.cat([values, values.norm(dim=-1, keepdim=True), torch.ones_like(values[..., :1])], dim=-1)


def probe_scores(values, probe) -> torch.Tensor:
    """The probe's score of each token; a token with a score above 0 is a sink.

    Args:
        values: [batch, KV heads, K, head_dim].
        probe: [heads, head_dim + 2].

    Returns:
        [batch, heads, K].
    """
    features = probe_features(values)
    return (probe.to(features).reshape(values.shape[1], -1, features.shape[-1]) @ features.mT).flatten(1, 2)


def _keys(view: KeyValues, pad) -> tuple:
    """All keys of a view with their values, positions and flags.

    Returns:
        Keys and values [batch, KV heads, K, head_dim]; their positions, long [1 or batch, K]; which keys are seen at
        any distance (kept first tokens), bool [K]; which hold a real token other than the first, bool [1 or batch, K].
    """
    device, sinks = view.keys.device, view.visibility.sinks
    slots = view.store.slots(view.keys.device) if view.ring else torch.arange(view.start, view.end, device=device)
    start = torch.zeros(1, dtype=torch.long, device=device) if pad is None else pad.long()
    position = slots - start[:, None]
    usable = (slots >= 0) & (position >= max(sinks, 1))
    lasting = torch.arange(sinks + len(slots), device=device) < sinks
    if not sinks:
        return view.keys, view.values, position, lasting, usable
    first = torch.arange(sinks, device=device).expand(len(position), -1)
    keys = torch.cat([view.sink_keys, view.keys], dim=2)
    values = torch.cat([view.sink_values, view.values], dim=2)
    return keys, values, torch.cat([first, position], -1), lasting, torch.cat([first > 0, usable], -1)


class SinkWeights(Part):
    """ACT: less weight for sinks other than the first token, by a probe and a beta for each query head."""

    parameters = {  # noqa: RUF012
        "surgery_log_beta": Parameter(0.0, QUERY_HEADS),
        "surgery_sink_probe": Parameter(0.0, QUERY_HEADS),
    }
    by_slots = True

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        named = layer["parameters"]
        if fault := fault_of_shapes(config, {name: named[name] for name in self.parameters if name in named}, groups):
            return fault
        if not set(self.parameters) <= set(named):
            return "has one of surgery_log_beta and surgery_sink_probe without the other"
        if "surgery_log_gamma" in named:
            return "has surgery_log_gamma and surgery_log_beta: a layer has one bias"
        return ""

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        if "surgery_log_beta" in layer.get("parameters", {}):
            module.surgery_corrections["act"] = sink_shares

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("bias",)


PART = SinkWeights()
