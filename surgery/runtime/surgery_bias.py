"""Terms that are added to the scores of attention: a bias on a row's first token or other sinks, and virtual keys.

The output and the log-sum-exp of a softmax over some keys are enough to give one key another weight, or to add keys.
Both have a closed form, and no attention matrix is held.

    weight of the first token times gamma    out' = (out + (gamma - 1) a v) / (1 + (gamma - 1) a), a its weight in out
    m more keys                              out' = w_0 out + sum over them of w_j v'_j, w = softmax([lse, logits])
    other sinks' weight times beta           surgery_act.py, a part of its own

Sources: Han et al. 2025, "ZeroTuning", arXiv 2505.11739 (gamma); gpt_oss's learned sinks (a logit without a value);
Sun et al. 2024, "Massive Activations", arXiv 2402.17762 (explicit k' and v').
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .surgery_attention import add_keys
from .surgery_config import KV_HEADS, QUERY_HEADS, Parameter, Part, all_whole
from .surgery_stores import KeyValues, Scoring
from .surgery_visibility import HeadKinds


def scale_key(out, lse, logit, value, log_gamma, seen=None):
    """Attention in which the unnormalised weight of one key is multiplied by gamma.

    With a gamma below 1, the rounding error of a half-precision `out` grows by the factor 1 / (1 + (gamma - 1) a), at
    most 1 / gamma.

    Args:
        out, lse: as for `add_keys`.
        logit: [..., n], the key's own scaled score, which is one of those in `lse`.
        value: [..., 1, d], the key's value.
        log_gamma: log of gamma; broadcast to [..., n].
        seen: bool, broadcast to [..., n]: the rows that see the key. Other rows stay unchanged. None: all rows see it.

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
    """The terms of the heads of one visibility in one layer. An attribute is None where the heads lack the term.

    Attributes:
        log_gamma: [heads], the log of the factor on the weight of the row's first real token.
        sink_logit: [heads, m], added to the scores of m virtual keys.
        key, value: [KV heads, m, head_dim]. A virtual key is scored against the query after RoPE. So it is at position
            0, and its score changes with distance as the first token's does. Without keys, the logit is the score.
            Without values, the values are 0.
        stand_in: only queries whose window (narrower than the base's own) no longer reaches their row's first token
            see the virtual keys.
    """

    log_gamma: torch.Tensor | None = None
    sink_logit: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    stand_in: bool = False

    def apply(self, out, lse, query, view: KeyValues, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and log-sum-exp with these terms.

        Args:
            out, lse: attention's result for `query` [batch, heads, n, head_dim] on the real keys of `view`.
        """
        first = _FirstToken(view, scoring.pad, query.shape[2]) if self.log_gamma is not None or self.stand_in else None
        wide = lse.dtype
        score = partial(scores, scale=scoring.scale, softcap=scoring.softcap, dtype=wide)
        if self.log_gamma is not None:
            logit = score(query, first.key)[..., 0]
            value = first.value.repeat_interleave(query.shape[1] // first.value.shape[1], dim=1)
            out, lse = scale_key(out, lse, logit, value, self.log_gamma.to(wide)[:, None], first.seen)
        if self.sink_logit is not None:
            logits = self.sink_logit.to(wide)[:, None]  # [heads, 1, m]
            if self.key is not None:
                logits = logits + score(query, self.key[None])
            logits = logits.expand(*lse.shape, -1)
            if self.stand_in:
                logits = logits.masked_fill((first.seen | ~first.reached)[..., None], -torch.inf)
            value = self.value
            if value is not None:
                value = value.repeat_interleave(query.shape[1] // len(value), dim=0)
            out, lse = add_keys(out, lse, logits, value)
        return out, lse


def split_terms(module, kinds: HeadKinds, stand_in: bool = False) -> list[Terms]:
    """The `Terms` of each kind of head, for an attention module that has any."""
    return [Terms(**named, stand_in=stand_in) for named in parameters_of_kinds(module, kinds, PART.parameters)]


def parameters_of_kinds(module, kinds: HeadKinds, known: dict[str, Parameter]) -> list[dict[str, torch.Tensor]]:
    """The known parameters of an attention module, split by kind of head: name without `surgery_` -> rows."""
    rows = {}
    for name in (name for name in module.surgery_parameters if name in known):
        split = kinds.split_keys if known[name].rows == KV_HEADS else kinds.split_queries
        rows[name.removeprefix("surgery_")] = [tensor[0] for tensor in split(getattr(module, name)[None])]
    return [dict(zip(rows, one, strict=True)) for one in zip(*rows.values(), strict=True)]


def fault_of_shapes(config, named: dict, groups: list[int]) -> str:
    """The error in the shapes of the terms' parameters, "" if there is none.

    Args:
        named: name -> shape.
        groups: query heads that read each KV head.
    """
    text = config.get_text_config()
    heads, kv_heads = sum(groups), len(groups)
    logit = named.get("surgery_sink_logit", [heads, 1])
    if not all_whole(logit, 1) or len(logit) != 2:
        return f"gives surgery_sink_logit the shape {logit}; it is [{heads}, virtual keys]"
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    right = {"surgery_log_gamma": [heads], "surgery_sink_logit": [heads, logit[1]]}
    right |= {"surgery_log_beta": [heads], "surgery_sink_probe": [heads, size + 2]}
    right |= {name: [kv_heads, logit[1], size] for name in ("surgery_key", "surgery_value")}
    for name, shape in named.items():
        if not all_whole(shape, 1) or shape != right[name]:
            return f"gives {name} the shape {shape}; it is {right[name]}"
    return ""


def scores(query, keys, scale, softcap, dtype) -> torch.Tensor:
    """Scores [batch, heads, n, m] of queries [batch, heads, n, d] and keys [1 or batch, KV heads, m, d]."""
    batch, heads, length, size = query.shape
    rows = query.reshape(batch, keys.shape[1], -1, size).to(dtype)
    product = (rows @ keys.to(dtype).mT * scale).reshape(batch, heads, length, -1)
    return product if softcap is None else softcap * torch.tanh(product / softcap)


class _FirstToken:
    """The first real token of each row.

    Attributes:
        key, value: [batch, KV heads, 1, head_dim]; arbitrary for a row that lost the token.
        seen: [1 or batch, 1, n], which queries see it.
        reached: [1 or batch, 1, n], for which queries the base's own sliding window reaches it.
    """

    def __init__(self, view: KeyValues, pad: torch.Tensor | None, length: int):
        visibility, device = view.visibility, view.keys.device
        start = torch.zeros(1, dtype=torch.long, device=device) if pad is None else pad.long()
        if visibility.sinks:
            self.key, self.value = view.sink_keys[:, :, :1], view.sink_values[:, :, :1]
        else:
            width = view.keys.shape[2]
            if view.slots is not None:  # a policy has dropped keys, and kept this one
                index = (view.slots == start[:, None, None]).int().argmax(-1)[..., None, None]
            else:
                index = start % width if view.ring else (start - view.start).clamp(0, width - 1)
                index = index[:, None, None, None]
            index = index.expand(*view.keys.shape[:2], 1, view.keys.shape[3])
            self.key, self.value = view.keys.gather(2, index), view.values.gather(2, index)
        position = torch.arange(view.end - length, view.end, device=device) - start[:, None]
        every = torch.ones_like(position, dtype=torch.bool)
        own = visibility.window if visibility.of_base else visibility.limit
        reached = every if own is None else position < own
        in_window = every if visibility.sinks or visibility.window is None else position < visibility.window
        self.reached, self.seen = reached[:, None], ((position >= 0) & reached & in_window)[:, None]


class BiasAndVirtualKeys(Part):
    """A weight for the row's first token (a bias), and virtual keys; each head has its own parameters.

    An entry may have `stand_in`: then only queries that do not see the first token see the virtual keys.
    """

    keys = ("stand_in",)
    parameters = {  # noqa: RUF012
        "surgery_log_gamma": Parameter(0.0, QUERY_HEADS),
        "surgery_sink_logit": Parameter(-1e4, QUERY_HEADS),
        "surgery_key": Parameter(0.0, KV_HEADS),
        "surgery_value": Parameter(0.0, KV_HEADS),
    }

    def by_first_token(self, layer: dict) -> bool:
        return "surgery_log_gamma" in layer.get("parameters", {}) or bool(layer.get("stand_in"))

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        named = {name: shape for name, shape in layer.get("parameters", {}).items() if name in self.parameters}
        if fault := fault_of_shapes(config, named, groups):
            return fault
        for name in ("surgery_key", "surgery_value"):
            if name in named and "surgery_sink_logit" not in named:
                return f"has {name} without surgery_sink_logit"
        stand_in = layer.get("stand_in", False)
        if not isinstance(stand_in, bool) or (stand_in and "surgery_sink_logit" not in named):
            return f"has stand_in {stand_in!r}, which must be true or false, and is for virtual keys alone"
        return ""

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        if set(self.parameters) & set(layer.get("parameters", {})):
            module.surgery_corrections["bias"] = partial(split_terms, stand_in=layer.get("stand_in", False))

    def terms(self, layer: dict) -> tuple[str, ...]:
        named = {"surgery_log_gamma": "bias", "surgery_sink_logit": "virtual keys"}
        return tuple(term for name, term in named.items() if name in layer.get("parameters", {}))


PART = BiasAndVirtualKeys()
