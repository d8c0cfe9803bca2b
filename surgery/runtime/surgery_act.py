"""Less weight for sinks other than the first token (ACT), in closed form and without an attention matrix.

Sinks are found in one of two ways.

By the map, as in the paper. Let A be the attention of head h in a prompt, and N its number of real tokens. Token j is
a sink of h if it is not the row's first token and its column mean, the sum of A_ij over the queries i divided by the
number of queries that see it, is above alpha / N. In a full head N - j queries see it, so its last keys are judged by
the few queries that see them, as in the paper. In a head with a window, as many see it as the window lets, and N is
the most keys that a query sees. The means are summed over blocks of queries, from the log-sum-exps that attention has
computed already. So they cost one more product of queries and keys, in heads that have a beta, and no [N, N] map is
held.

A prompt is a call that fills an empty cache, or a call without a cache. Its sinks are found in this call, weigh less
in it, and then stay: a later token is never a sink, whether it comes alone, with others (the rest of a prompt in
chunks) or in a later turn. So tokens after the prompt give the same results however they come. But a prompt with its
continuation in one call without a cache is a longer prompt, in which other tokens may be sinks: what a cached decode
gives depends on where the prompt ended. And what a prompt's own token gives depends on the tokens after it: a loss
over these tokens was computed with knowledge of what it predicts. The cache holds the slots of the prompt's sinks
with the row (`KeyValues.prompt_slots`).

By a probe on the token's own value: j is a sink of h if `probe_h . (v_j, |v_j|, 1) > 0`. The probes were calibrated
once, on texts of one length, with alpha / N for this length. They do not scale with N. But the same tokens are sinks
whether a text comes at once, in chunks or token by token.

Let a be the weight that a query gives to all the sinks it sees, and p their part of the output, the sum of a_j v_j.

    out' = (out - p) (1 - beta a) / (1 - a) + beta p

gives the sinks the weight beta a. The rest goes to the query's other keys in proportion, the first token among them,
as in the paper's code. The same change as a bias on the sinks' scores is log(beta (1 - a) / (1 - beta a)), which
differs from query to query.

Source: Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks", arXiv 2406.15765. Its code drops the first
sink that it finds, which is the first token wherever that is one. It sets the first token's own weight to 1, and reads
one row as a map when it decodes. These three are not done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf

import torch

from .surgery_bias import fault_of_shapes, parameters_of_kinds, scores
from .surgery_config import QUERY_HEADS, Parameter, Part
from .surgery_stores import KeyValues, Scoring
from .surgery_visibility import HeadKinds

MOST = 0.9  # a row with more weight on sinks has hardly any other key: it gets the bias of a row with this weight
ROWS = 256  # queries whose scores with the sinks are held at once
HELD = 1 << 24  # scores of a map that are held at once, at most; but at least those of one query
NOTE = "sinks"  # the name under which the cache holds a prompt's sinks


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
        sink_probe: [heads, features], the probes that recognise sinks. None: the map of each prompt shows them.
        alpha: a key of a prompt is a sink if its mean weight is above alpha / N; not read with probes.
    """

    log_beta: torch.Tensor
    sink_probe: torch.Tensor | None = None
    alpha: float = 0.0

    @property
    def wanted(self) -> torch.Tensor:
        """Heads whose sinks are needed, bool [heads]: beta is below 1, or needs a gradient."""
        if torch.is_grad_enabled() and self.log_beta.requires_grad:
            return torch.ones_like(self.log_beta, dtype=torch.bool)
        return self.log_beta < 0

    def apply(self, out, lse, query, view: KeyValues, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
        """A correction of attention's output and log-sum-exp; arguments as for `surgery_bias.Terms.apply`.

        Raises:
            ValueError: these are not a prompt's tokens, and no cache of ours holds what was found in their prompt.
        """
        start = query.new_zeros(1, dtype=torch.long) if scoring.pad is None else scoring.pad.long()
        keys = _Keys.of(view, start)
        if self.sink_probe is not None:
            index, marked = keys.probed(self.sink_probe, self.wanted)
        else:
            index, marked = keys.places(self.slots(query, view, lse, scoring), start)
        if not index.shape[-1]:
            return out, lse
        length = query.shape[2]
        at = torch.arange(view.end - length, view.end, device=query.device) - start[:, None]  # [1 or batch, n]
        score = partial(scores, scale=scoring.scale, softcap=scoring.softcap, dtype=lse.dtype)
        sinks = keys.pick(index, marked, query.shape[1])
        return scale_sinks(out, lse, query, sinks, at[:, None, :, None], score, self.log_beta.to(lse.dtype))

    @torch.compiler.disable  # a prompt's loops depend on its length
    def slots(self, query, view: KeyValues, lse, scoring: Scoring) -> torch.Tensor:
        """The slots of the prompt's sinks, int [batch, heads, m], -1 where a head has fewer. A prompt's are noted."""
        if query.shape[2] == view.end:
            slots = sinks_of_map(query, view, lse, scoring, self.alpha, self.wanted)
            if view.prompt_slots is not None:
                view.prompt_slots[NOTE] = slots
            return slots
        if view.prompt_slots is None:
            raise ValueError(
                "this surgery finds sinks in a prompt and notes them in the model's own cache, which was not given: "
                "leave the cache out, or begin with make_cache()"
            )
        return view.prompt_slots.get(NOTE, query.new_zeros((*query.shape[:2], 0), dtype=torch.int32))


def sink_shares(module, kinds: HeadKinds, alpha: float = 0.0) -> list[SinkShare | None]:
    """A `SinkShare` for each kind of head of an attention module, None where every beta is 1: nothing is computed."""
    shares = [SinkShare(**named, alpha=alpha) for named in parameters_of_kinds(module, kinds, PART.parameters)]
    return [share if bool(share.wanted.any()) else None for share in shares]


def scale_sinks(out, lse, query, sinks: _Keys, at, score, log_beta):
    """The output and log-sum-exp after the weight on each head's sinks is multiplied by beta.

    Args:
        out, lse: attention's result for `query` [batch, heads, n, head_dim].
        sinks: the sinks of each head, from `_Keys.pick`.
        at: positions of the queries, long [1 or batch, 1, n, 1].
        score: a function that gives scaled and capped scores: (queries [batch, heads, n, d],
            keys [batch, heads, m, d]) -> [..., n, m].
        log_beta: [heads].
    """
    log_beta, chunks = log_beta.clamp(max=0.0)[:, None], []
    for begin in range(0, query.shape[2], ROWS):
        rows = slice(begin, begin + ROWS)
        seen = sinks.seen(at[:, :, rows]) & (lse[:, :, rows, None] > -torch.inf)
        logits = score(query[:, :, rows], sinks.keys) - lse[:, :, rows, None]
        weights = logits.masked_fill(~seen, -torch.inf).exp()
        share = weights.sum(-1).clamp(max=1.0)  # rounding may put it above
        sink_output = weights @ sinks.values.to(weights.dtype)
        chunks.append(scale_share(out[:, :, rows], lse[:, :, rows], share, sink_output, log_beta))
    outs, lses = zip(*chunks, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


@torch.no_grad()
def sinks_of_map(query, view: KeyValues, lse, scoring: Scoring, alpha: float, wanted) -> torch.Tensor:
    """The sinks of each head in a prompt, by the means of the columns of its attention map.

    Args:
        query: [batch, heads, N, head_dim], the whole prompt. lse: [batch, heads, N], of the heads' attention to the
            keys of `view`.
        alpha: a key is a sink if its mean weight is above alpha / N.
        wanted: bool [heads], the heads to search; others get no sinks.

    Returns:
        Slots, int32 [batch, heads, m], -1 where a head has fewer than m sinks.
    """
    (batch, heads, length, _), device = query.shape, query.device
    chosen = wanted.nonzero()[:, 0]
    start = torch.zeros(1, dtype=torch.long, device=device) if scoring.pad is None else scoring.pad.long()
    position = torch.arange(length, device=device) - start[:, None]
    real = position >= 0 if scoring.mask is None else scoring.mask[:, :length]  # [1 or batch, N]
    with torch.autocast(device.type, enabled=False):  # else rounded sums would decide
        total = _column_sums(query, view, lse, scoring, chosen, position, real)
    seen_by, most = _bounds(view, position, real)
    mean = total / seen_by[:, None]
    marked = (real & (position > 0))[:, None] & (mean > alpha / most.to(mean.dtype)[:, None, None])
    count = int(marked.sum(-1).max())
    slots = torch.full((batch, heads, count), -1, dtype=torch.int32, device=device)
    if count:
        index = marked.int().topk(count, dim=-1).indices
        slots[:, chosen] = torch.where(marked.gather(2, index), index, -1).int()
    return slots


def _column_sums(query, view: KeyValues, lse, scoring: Scoring, chosen, position, real) -> torch.Tensor:
    """The weight that each key gets from all real queries: [batch, chosen heads, N].

    The heads that read one KV head run together, so that its keys are converted once and never copied for each head.

    Args: those of `sinks_of_map`; chosen: indices of heads. position, real: [1 or batch, N], of the tokens.
    """
    (batch, heads, length, _), kv_heads = query.shape, view.keys.shape[1]
    if scoring.sink is not None:  # the base's learned sink has its share in the map
        lse = torch.logaddexp(lse, scoring.sink.to(lse.dtype)[:, None])
    total, owners = lse.new_zeros(batch, len(chosen), length), chosen * kv_heads // heads
    at, real = position[:, None, :, None], real[:, None]
    columns, lasting = position[:, None, None], (position < view.visibility.sinks)[:, None, None]
    for owner in owners.unique().tolist():
        mine, keys = owners == owner, view.keys[:, owner : owner + 1].to(lse.dtype)
        own = chosen[mine]
        rows, sums = max(1, min(ROWS, HELD // (batch * len(own) * length))), lse.new_zeros(batch, len(own), length)
        for begin in range(0, length, rows):
            block = slice(begin, begin + rows)
            part, norm = query[:, own, block], lse[:, own, block, None]
            for near in _columns(view, position, begin, min(begin + rows, length)):
                seen = _sees(view, at[:, :, block], columns[..., near], lasting[..., near])
                seen = seen & real[:, :, block, None] & real[:, :, None, near]
                if view.read is not None:
                    by_head = columns[..., near].expand(batch, heads, 1, -1)
                    seen = seen & view.read(at[:, :, block].expand(batch, -1, -1, -1), by_head)[:, own]
                logits = scores(part, keys[:, :, near], scoring.scale, scoring.softcap, lse.dtype)
                sums[:, :, near] += (logits - norm).masked_fill(~seen, -torch.inf).exp().sum(2)
        total[:, mine] = sums
    return total


def _columns(view: KeyValues, position, begin: int, end: int) -> Iterator[slice]:
    """The slots of a prompt's keys that its queries in slots `begin` to `end` may see."""
    reach = [each for each in (view.visibility.window, view.visibility.limit) if each is not None]
    low = max(0, begin - min(reach) + 1) if reach else 0
    first = int((position < view.visibility.sinks).sum(-1).max())  # slots up to the last one that is kept for good
    if view.visibility.sinks and first < low:
        yield slice(0, first)
    yield slice(0 if view.visibility.sinks and first >= low else low, end)


def _bounds(view: KeyValues, position, real) -> tuple[torch.Tensor, torch.Tensor]:
    """How many real queries see each key of a prompt, long [1 or batch, N], and the most keys that one sees, [...]."""
    visibility, count = view.visibility, real.sum(-1)
    queries, most = (count[:, None] - position).clamp(min=1), count
    if visibility.window is not None:
        near = queries.clamp(max=visibility.window)
        queries = torch.where(position < visibility.sinks, queries, near)
        most = most.clamp(max=visibility.sinks + visibility.window)
    if visibility.limit is not None:
        queries, most = queries.clamp(max=visibility.limit), most.clamp(max=visibility.limit)
    return queries, most


def _sees(view: KeyValues, at, position, lasting) -> torch.Tensor:
    """Whether queries at these positions see keys at those; `lasting`: keys that are seen at any distance."""
    distance = at - position
    seen = distance >= 0
    if view.visibility.limit is not None:
        seen = seen & (distance < view.visibility.limit)
    if view.visibility.window is not None:
        seen = seen & (lasting | (distance < view.visibility.window))
    return seen


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


@dataclass
class _Keys:
    """Keys of a view with their values, positions and flags: all of them, or those that were picked for each head.

    Attributes:
        keys, values: [batch, KV heads, K, head_dim]; kept first tokens come before the others. Picked:
            [batch, heads, m, head_dim].
        position: long [1 or batch, K]; picked: [batch, heads, 1, m].
        lasting: which keys are seen at any distance (kept first tokens), bool [K]; picked: [batch, heads, 1, m].
        usable: which keys may be used, bool [1 or batch, K]: real tokens other than the first. Picked:
            [batch, heads, 1, m].
    """

    view: KeyValues
    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor
    lasting: torch.Tensor
    usable: torch.Tensor

    @classmethod
    def of(cls, view: KeyValues, start: torch.Tensor) -> _Keys:
        """All keys of a view; `start`: long [1 or batch], the slot of each row's first real token."""
        device, sinks = view.keys.device, view.visibility.sinks
        slots = view.store.slots(device) if view.ring else torch.arange(view.start, view.end, device=device)
        position = slots - start[:, None]
        usable = (slots >= 0) & (position >= max(sinks, 1))
        lasting = torch.arange(sinks + len(slots), device=device) < sinks
        if not sinks:
            return cls(view, view.keys, view.values, position, lasting, usable)
        first = torch.arange(sinks, device=device).expand(len(position), -1)
        keys = torch.cat([view.sink_keys, view.keys], dim=2)
        values = torch.cat([view.sink_values, view.values], dim=2)
        return cls(view, keys, values, torch.cat([first, position], -1), lasting, torch.cat([first > 0, usable], -1))

    def probed(self, probe, wanted) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys that a probe [heads, features] calls sinks: index [batch, heads, m] and whether it is one."""
        marked = (probe_scores(self.values, probe) > 0) & self.usable[:, None] & wanted[:, None]
        index = marked.int().topk(int(marked.sum(-1).max()), dim=-1).indices
        return index, marked.gather(2, index)

    def places(self, slots, start) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys in these slots [batch, heads, m], -1 for none: index and whether the view still holds it."""
        visibility, view, slots = self.view.visibility, self.view, slots.long()
        if view.ring:
            width, newest = view.keys.shape[2], view.end - 1
            index, held = slots % width, (slots >= 0) & (slots > newest - width)
        else:
            index, held = slots - view.start, slots >= max(view.start, 0)
        position = slots - start[:, None, None]
        kept = (slots >= 0) & (position < visibility.sinks)
        index = torch.where(kept, position, index + visibility.sinks)
        held = held | kept
        return index.masked_fill(~held, 0), held

    def pick(self, index, marked, heads: int) -> _Keys:
        """The keys at `index` [batch, heads, m] for each head; `marked`: the usable ones among them."""
        batch, most, size = len(index), index.shape[-1], self.keys.shape[-1]
        flat = index.reshape(batch, self.keys.shape[1], -1, 1).expand(-1, -1, -1, size)
        picked = (tensor.gather(2, flat).reshape(batch, heads, most, size) for tensor in (self.keys, self.values))
        position = self.position[:, None].expand(batch, heads, -1).gather(2, index)[:, :, None]
        return _Keys(self.view, *picked, position, self.lasting[index][:, :, None], marked[:, :, None])

    def seen(self, at) -> torch.Tensor:
        """Which of the picked keys are usable for queries at these positions, [batch, heads, n, m]."""
        seen = self.usable & _sees(self.view, at, self.position, self.lasting)
        if self.view.read is None:
            return seen
        return seen & self.view.read(at.expand(len(self.keys), -1, -1, -1), self.position)


class SinkWeights(Part):
    """ACT: less weight for sinks other than the first token, by a beta for each query head.

    An entry has `act`, {"alpha": 5.0}, if the sinks are those of each prompt's map. Otherwise each query head has a
    probe.
    """

    keys = ("act",)
    parameters = {  # noqa: RUF012
        "surgery_log_beta": Parameter(0.0, QUERY_HEADS),
        "surgery_sink_probe": Parameter(0.0, QUERY_HEADS),
    }
    by_slots = True

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        named = layer.get("parameters", {})
        if fault := fault_of_shapes(config, {name: named[name] for name in self.parameters if name in named}, groups):
            return fault
        if "surgery_log_beta" not in named:
            own = "surgery_sink_probe" if "surgery_sink_probe" in named else "act"
            return f"has one of surgery_log_beta and {own} without the other"
        if "act" not in layer and "surgery_sink_probe" not in named:
            return "has one of surgery_log_beta and surgery_sink_probe without the other, and no act either"
        if "act" in layer and "surgery_sink_probe" in named:
            return "has act and surgery_sink_probe: sinks are found in one way"
        alpha = layer["act"].get("alpha") if isinstance(layer.get("act"), dict) else None
        number = type(alpha) in (int, float) and 0 < alpha < inf
        if "act" in layer and not (number and set(layer["act"]) == {"alpha"}):
            return f"has act {layer['act']!r}, which must be a number alpha above 0"
        if "surgery_log_gamma" in named:
            return "has surgery_log_gamma and surgery_log_beta: a layer has one bias"
        return ""

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        module.surgery_reads_map = "act" in layer
        if "surgery_log_beta" in layer.get("parameters", {}):
            module.surgery_corrections["act"] = partial(sink_shares, **layer.get("act", {}))

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("bias",)

    def by_prompt(self, layer: dict) -> bool:
        return "act" in layer

    def describe(self, layer: dict) -> tuple[str, str] | None:
        return ("sinks of a prompt", f"mean weight above {layer['act']['alpha']:g} / N") if "act" in layer else None

    def display_key(self, layer: dict):
        return layer.get("act")


PART = SinkWeights()
