"""Sinks other than the first token, and less weight for them (ACT): in closed form, no attention matrix is held.

A sink is known by its own value, so that it is the same token whether a text comes at once, in chunks or token by
token: token j is a sink of query head h if `probe_h . (v_j, |v_j|, 1) > 0`. The probes were calibrated once (ACT looks
at a whole attention map of each text, which no cached decode has). With a the weight that a query gives to all the
sinks it sees, and p their part of the output, the sum of a_j v_j,

    out' = (out - p) (1 - beta a) / (1 - a) + beta p

gives them beta a, and the rest to its other keys in proportion. As a bias on the sinks' scores this is
log(beta (1 - a) / (1 - beta a)), another one for each query.

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

MOST = 0.9  # a row with more weight on sinks has hardly any keys to give it to: its bias is that of a row with so much
ROWS = 256  # queries whose scores with the sinks are held at once


def scale_share(out, lse, share, share_output, log_beta):
    """Attention in which some keys together get beta times their weight, and the others the rest in proportion.

    Half-precision `out` was rounded, which is enlarged by (1 - beta a) / (1 - a), at most 10.

    Args:
        out: [..., n, d], the softmax's output. lse: [..., n], its log-sum-exp, -inf for a row that sees nothing.
        share: [..., n], a: the weight of these keys in `out`, 0 to 1; above `MOST` the bias is that of `MOST`.
        share_output: [..., n, d], the sum of their weights times their values.
        log_beta: log of beta, at most 0; broadcast to [..., n].

    Returns:
        The new output and log-sum-exp.
    """
    more = torch.expm1(log_beta) / (1 - log_beta.exp() * share.clamp(max=MOST))  # e ** bias, less 1
    total = 1 + more * share
    return (out + more[..., None] * share_output) / total[..., None], lse + total.log()


@dataclass
class SinkShare:
    """The weight of other sinks for the heads of one visibility in one layer.

    Attributes:
        log_beta: [heads], of what is left of it.
        sink_probe: [heads, features], which keys are sinks.
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
    """The weight of other sinks for each kind of head of an attention module that has a beta."""
    return [SinkShare(**named) for named in parameters_of_kinds(module, kinds, PART.parameters)]


def scale_sinks(out, lse, query, view: KeyValues, pad, scores, *, probe, log_beta):
    """The output and log-sum-exp with beta times the weight on the sinks of each head.

    Args:
        out, lse: of `query` [batch, heads, n, head_dim] on the keys of `view`.
        pad: [batch], slots before each row's first real token, or None for none.
        scores: of queries and keys, scaled and capped: ([batch, heads, n, d], [batch, heads, m, d]) -> [..., n, m].
        probe: [heads, features]. log_beta: [heads].
    """
    batch, heads, length, size = query.shape
    wanted = log_beta < 0
    if torch.is_grad_enabled() and log_beta.requires_grad:  # heads at beta = 1 have a gradient, too
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
    """What is looked at of each token: its value, the value's norm, and 1; [..., head_dim + 2], float32 or wider."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.cat([values, values.norm(dim=-1, keepdim=True), torch.ones_like(values[..., :1])], dim=-1)


def probe_scores(values, probe) -> torch.Tensor:
    """How much each token is a sink: above 0, it is one.

    Args:
        values: [batch, KV heads, K, head_dim].
        probe: [heads, head_dim + 2].

    Returns:
        [batch, heads, K].
    """
    features = probe_features(values)
    return (probe.to(features).reshape(values.shape[1], -1, features.shape[-1]) @ features.mT).flatten(1, 2)


def _keys(view: KeyValues, pad) -> tuple:
    """All keys of a view with what is known of them.

    Returns:
        Keys and values [batch, KV heads, K, head_dim]; their positions, long [1 or batch, K]; which are seen however
        far they are (kept first tokens), bool [K]; which hold a real token other than the first, bool [1 or batch, K].
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
