"""KV eviction written out token by token in float64, for one row: which keys each KV head holds, by each paper's rule.

The reference uses nothing of the runtime. Every query sees the keys that its KV head still holds. Before each multiple
of the interval the rule is asked, from lists of all earlier weights and outputs.
"""

from __future__ import annotations

import copy
import math

import torch
from families import double
from transformers import AttentionInterface, AttentionMaskInterface

from surgery.architecture.anatomy import Anatomy

NAME = "evicting_reference"


class Head:
    """What a KV head of one layer has held and seen so far.

    Attributes:
        weights: position of a query -> for each query head of the group, its weights by position of the key.
        outputs: position of a query -> for each query head of the group, its output.
    """

    def __init__(self, keys, values, projections, settings):
        self.keys, self.values, self.settings = keys.detach(), values.detach(), settings
        self.projections = None if projections is None else [each.detach() for each in projections]
        self.held: list[int] = []
        self.weights: dict[int, list[dict[int, float]]] = {}
        self.outputs: dict[int, list[torch.Tensor]] = {}

    def group(self, votes: list[float]) -> float:
        return sum(votes) if self.settings.get("group", "sum") == "sum" else max(votes)

    def change(self, query: int, head: int, key: int) -> float:
        """The squared change of an output without a key, worked out from the weights that are left."""
        weights, out = self.weights[query][head], self.outputs[query][head]
        if key not in weights or weights[key] == 1:  # nothing would be left: a sink alone can be so
            return 0.0
        if self.settings.get("fast"):
            out = torch.stack([self.values[j] for j in self.held]).mean(0)
            change = weights[key] / (1 - weights[key]) * (out - self.values[key])
        else:  # the definition: the softmax of the others, less what it was (both without the base's own sinks)
            change = (out - weights[key] * self.values[key]) / (1 - weights[key]) - out
        if self.projections is not None:
            change = self.projections[head] @ change
        return float(change @ change)

    def score(self, key: int, voters: list[int]) -> float:
        """The rule of each policy for one key; `voters` are the queries that vote since the last decision, or ever."""
        name = self.settings["name"]
        heads = range(len(next(iter(self.weights.values()))))
        if name == "norm":
            return -float(self.keys[key].norm())
        if name == "window":
            return float(key)
        weight = {q: [self.weights[q][h].get(key, 0.0) for h in heads] for q in voters if q >= key}
        if name == "lra":
            hits = [q for q, votes in weight.items() if self._reached(votes)]
            return float(max([key, *hits]))
        if name == "lfa":
            return float(sum(self._reached(votes) for votes in weight.values()))
        if not weight:
            return 0.0
        if name in ("attention", "task_kv"):
            return math.fsum(self.group(votes) for votes in weight.values()) / len(weight)
        assert name == "caote"
        votes = [self.group([self.changes[q, h, key] for h in heads]) for q in weight]
        return math.fsum(votes) / len(votes)

    def _reached(self, votes: list[float]) -> bool:
        total = max(votes) if self.settings.get("group", "max") == "max" else sum(votes)
        return total >= self.settings["threshold"]

    def note(self, query: int) -> None:
        """What CAOTE's rule is for a query when it is computed, from the keys that are held then."""
        if self.settings["name"] == "caote":
            known = getattr(self, "changes", {})
            heads = range(len(self.weights[query]))
            self.changes = known | {(query, h, j): self.change(query, h, j) for h in heads for j in self.held}

    def decide(self, end: int) -> None:
        """Drop keys before the query at position `end`."""
        settings = self.settings
        every, observe = settings["interval"], settings.get("observe", 0)
        ever = settings.get("memory") or settings["name"] in ("lra", "lfa")
        voters = [q for q in range(end) if q % every >= every - observe and (ever or q >= end - every)]
        safe = [j for j in self.held if j < settings["sinks"] or j >= end - settings["recent"]]
        others = [j for j in self.held if j not in safe]
        if settings.get("greedy"):
            best = self._one_by_one(others, voters)
        else:
            best = sorted(others, key=lambda j: (self.score(j, voters), j), reverse=True)[: settings["keys"]]
        self.held = sorted([*safe, *best])

    def _one_by_one(self, others: list[int], voters: list[int]) -> list[int]:
        """Drop the key whose loss changes the outputs least, from what the earlier losses left of them, and again."""
        left, heads = list(others), range(len(next(iter(self.weights.values()))))
        weights = {(q, h): dict(self.weights[q][h]) for q in voters for h in heads}

        def output(some: dict[int, float]) -> torch.Tensor:
            """The softmax over the keys that are left: their weights, scaled to a sum of 1."""
            total = math.fsum(some.values())
            return sum(weight / total * self.values[j] for j, weight in some.items())

        def loss(key: int) -> float:
            votes = []
            for q in voters:
                changes = []
                for h in heads:
                    now = weights[q, h]
                    change = output({j: w for j, w in now.items() if j != key}) - output(now)
                    change = change if self.projections is None else self.projections[h] @ change
                    changes.append(float(change @ change))
                votes.append(self.group(changes))
            seen = [vote for q, vote in zip(voters, votes, strict=True) if q >= key]
            return math.fsum(seen) / max(len(seen), 1)

        while len(left) > self.settings["keys"]:
            gone = min(left, key=lambda j: (loss(j), j))
            left.remove(gone)
            for some in weights.values():
                some.pop(gone, None)
        return left


def evicting_model(model, policies: list[dict | None], gammas=None):
    """A stock model in float64 whose layers drop keys, for batches of one unpadded row.

    Args:
        policies: of each layer, the settings of its policy, all of them; None: it keeps every key. `heads`: the KV
            heads under it.
        gammas: of each layer, the log of the factor on the first token's weight, for each head.
    """
    model = double(copy.deepcopy(model).eval())
    text, layers = model.config.get_text_config(), Anatomy.of(model).layers
    kinds = getattr(text, "layer_types", None)
    held: dict[int, list[list[list[int]]]] = {}

    def attend(module, query, key, value, _mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        assert len(query) == 1
        index, (heads, length, size), kv_heads = module.layer_idx, query.shape[1:], key.shape[1]
        group, settings = heads // kv_heads, policies[index]
        limit = kwargs.get("sliding_window")
        if kinds is not None:
            limit = text.sliding_window if kinds[index] == "sliding_attention" else None
        scores = query[0] @ key[0].repeat_interleave(group, 0).mT * (size**-0.5 if scaling is None else scaling)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if gammas is not None:
            scores = scores + torch.nn.functional.pad(gammas[index].double()[:, None], (0, length - 1))[:, None]
        projection = _projection(module, layers[index].layout.o, heads)
        whole = _whole_heads(scores, value[0], settings, projection) if settings and limit is None else []
        outputs, held[index] = [], []
        for kv_head in range(kv_heads):
            mine = range(kv_head * group, (kv_head + 1) * group)
            under = settings is not None and limit is None and kv_head in settings.get("heads", range(kv_heads))
            rows = [projection[head] for head in mine] if under and settings.get("output") else None
            state = Head(key[0, kv_head], value[0, kv_head], rows, settings)
            made, record = [], []
            for t in range(length):
                if under and kv_head not in whole and t and t % settings["interval"] == 0:
                    state.decide(t)
                state.held.append(t)
                record.append(list(state.held))
                seen = [j for j in state.held if limit is None or t - j < limit]
                each = [scores[head, t, seen].softmax(-1) for head in mine]
                outs = [weights @ value[0, kv_head, seen] for weights in each]
                state.weights[t] = [dict(zip(seen, weights.tolist(), strict=True)) for weights in each]
                state.outputs[t] = [out.detach() for out in outs]
                if under:
                    state.note(t)
                if s_aux is not None:
                    logits = [scores[head, t, seen].logsumexp(-1) - s_aux[head].double() for head in mine]
                    outs = [out * torch.sigmoid(logit) for out, logit in zip(outs, logits, strict=True)]
                made.append(torch.stack(outs))
            outputs.append(torch.stack(made, dim=1))
            held[index].append(record)
        return torch.cat(outputs)[None].transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda **_: None)
    model.set_attn_implementation(NAME)
    model.held = held  # layer -> KV head -> position of a query -> the keys that it saw
    return model


def _whole_heads(scores, values, settings: dict, projection) -> list[int]:
    """The KV heads that Task-KV keeps whole: the farthest from the mean head, over the queries before the first drop.

    Until then every query sees all, so that plain attention tells.
    """
    every, length = settings["interval"], scores.shape[1]
    held = settings["sinks"] + settings["keys"] + settings["recent"]
    first = next((t for t in range(every, length + 1, every) if t > held), None)
    if settings["name"] != "task_kv" or first is None:
        return []
    under, group = settings.get("heads", range(len(values))), len(scores) // len(values)
    means = {}
    for kv_head in under:
        for head in range(kv_head * group, (kv_head + 1) * group):
            rows = [scores[head, t, : t + 1].softmax(-1) @ values[kv_head, : t + 1]
                    for t in range(first - settings["observe"], first)]  # fmt: skip
            mean = torch.stack(rows).mean(0).detach()
            means[kv_head, head] = projection[head] @ mean if settings.get("output") else mean
    center = torch.stack([*means.values()]).mean(0)
    far = {kv_head: [float((z - center).norm()) for (owner, _), z in means.items() if owner == kv_head]
           for kv_head in under}  # fmt: skip
    vote = max if settings.get("group") == "max" else sum
    return sorted(under, key=lambda kv_head: -vote(far[kv_head]))[: settings.get("full_heads", 1)]


def _projection(module, name: str, heads: int) -> torch.Tensor:
    """The columns of the output projection of each head, [heads, hidden, head_dim], by feeding it unit vectors."""
    owner = module.get_submodule(name)
    width = owner.weight.shape[1] if isinstance(owner, torch.nn.Linear) else owner.weight.shape[0]
    with torch.no_grad():
        unit = torch.eye(width, dtype=torch.float64)
        made = owner(unit) - owner(torch.zeros_like(unit[:1]))
    return made.unflatten(0, (heads, -1)).mT
