"""Decoding that reads a part of the cache, written out token by token in float64, for one row.

The reference uses nothing of the runtime. The queries of the prompt see all keys before them. Each later query is a
step: of each KV head a rule says which keys it reads, from lists of numbers.
"""

from __future__ import annotations

import copy
import math

import torch
from families import double
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "reading_reference"


class Rule:
    """The rule of one layer.

    Attributes:
        settings: all settings of the reader, and `basis` [KV heads, d, dims] for loki.
    """

    def __init__(self, settings: dict):
        self.settings, self.state = settings, {}

    def always(self, t: int) -> list[int]:
        return [j for j in range(t + 1) if j < self.settings["sinks"] or j > t - self.settings["recent"]]

    def best(self, t: int, score) -> list[int]:
        always = self.always(t)
        others = sorted((j for j in range(t + 1) if j not in always), key=lambda j: -score[j])
        return sorted([*always, *others[: self.settings["keys"]]])

    def of_group(self, weights: torch.Tensor) -> list[float]:
        """[group, n] -> a number for each key."""
        return (weights.sum(0) if self.settings.get("group", "sum") == "sum" else weights.amax(0)).tolist()

    def read(self, t: int, queries: torch.Tensor, keys: torch.Tensor, score) -> list[list[int]]:
        """The keys that each KV head reads at position t.

        Args:
            queries: [KV heads, group, d].
            keys: [KV heads, t + 1, d].
            score: score(queries, keys) -> scaled and capped scores.
        """
        name, settings, heads = self.settings["name"], self.settings, range(len(queries))
        if t + 1 <= settings["sinks"] + settings["recent"] + settings.get("keys", 0):
            return [list(range(t + 1)) for _ in heads]
        weights = score(queries, keys).softmax(-1)  # [KV heads, group, t + 1]
        if name == "index":
            return [self.best(t, self.of_group(weights[head])) for head in heads]
        if name == "loki":
            basis = settings["basis"].double()
            low = score(queries @ basis, keys @ basis).softmax(-1)
            return [self.best(t, self.of_group(low[head])) for head in heads]
        if name == "threshold":
            wanted = [[(w >= settings["threshold"] * w.max()) for w in weights[head]] for head in heads]
            rest = [[j for j in range(t + 1) if any(bool(w[j]) for w in wanted[head])] for head in heads]
            return [sorted({*self.always(t), *rest[head]}) for head in heads]
        if name == "adaptive":
            return [self._adaptive(t, queries[head], keys[head], score) for head in heads]
        if name == "tree":
            return [self._tree(t, queries[head], keys[head]) for head in heads]
        return getattr(self, f"_{name}")(t, queries, weights)

    def _recycled(self, t, queries, weights) -> list[list[int]]:
        old = self.state.get("at")
        if old is None or t % self.settings["every"] == 0 or t - old >= self.settings["every"]:
            self.state = {"at": t, "chosen": [self.best(t, self.of_group(each)) for each in weights]}
            return [list(range(t + 1)) for _ in weights]
        return [sorted({*chosen, *range(old + 1, t + 1)}) for chosen in self.state["chosen"]]

    def _tokenselect(self, t, queries, weights) -> list[list[int]]:
        old, query = self.state.get("at"), queries.flatten()
        if old is not None and t - old < self.settings["every"]:
            last = self.state["query"]
            cosine = float(query @ last) / math.sqrt(float(query @ query) * float(last @ last))
            if cosine > self.settings["similarity"]:
                self.reused = getattr(self, "reused", 0) + 1
                return [sorted({*self.state["chosen"], *range(old + 1, t + 1)}) for _ in weights]
        self.state = {"at": t, "query": query, "chosen": self.best(t, self.of_group(weights.flatten(0, 1)))}
        return [self.state["chosen"] for _ in weights]

    def _adaptive(self, t, queries, keys, score) -> list[int]:
        near = self.always(t)
        far = keys[[j for j in range(t + 1) if j not in near]]
        mean = far.mean(0)
        covariance = (far - mean).T @ (far - mean) / len(far)
        for query in queries:
            log_far = math.log(len(far)) + float(query @ mean) * self.scale
            log_far += self.scale**2 * float(query @ covariance @ query) / 2
            log_near = float(score(query[None], keys[near]).logsumexp(-1))
            if 1 / (1 + math.exp(log_near - log_far)) > self.settings["share"]:
                return list(range(t + 1))
        return near

    def _tree(self, t, queries, keys) -> list[int]:
        settings, near, block = self.settings, self.always(t), self.settings["block"]
        first, last = settings["sinks"], t + 1 - settings["recent"]
        blocks = [list(range(begin, min(begin + block, last))) for begin in range(first, last, block)]
        top = settings["keys"] // block
        chunks = [blocks[part * len(blocks) // top : (part + 1) * len(blocks) // top] for part in range(top)]
        rounds = math.ceil(math.log2(max(max(map(len, chunks)), 1)))
        for _ in range(rounds):
            halves = [
                half for chunk in chunks for half in (chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]) if half
            ]

            def score(half):
                middle = min(half[0][0] + len(half) * block // 2, last - 1)
                return max(float(query @ keys[middle]) for query in queries)

            chunks = sorted(halves, key=score, reverse=True)[:top]
        return sorted({*near, *(token for chunk in chunks for each in chunk for token in each)})


def reading_model(model, readers: list[dict | None], prompt: int, gammas=None):
    """A stock model in float64 whose steps behind a prompt read a part, for batches of one unpadded row.

    Args:
        readers: of each layer, the settings of its reader, all of them; None: it reads all. `heads`: its KV heads.
        prompt: tokens of the prompt.
        gammas: of each layer, the log of the factor on the first token's weight, for each head.
    """
    model = double(copy.deepcopy(model).eval())
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    model.rules = {}

    def attend(module, query, key, value, _mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        index, (heads, length, size), kv_heads = module.layer_idx, query.shape[1:], key.shape[1]
        group, settings = heads // kv_heads, readers[index]
        limit = kwargs.get("sliding_window")
        if kinds is not None:
            limit = text.sliding_window if kinds[index] == "sliding_attention" else None
        scale = size**-0.5 if scaling is None else scaling

        def score(queries, keys):
            product = queries @ keys.mT * scale
            return product if softcap is None else softcap * torch.tanh(product / softcap)

        queries, keys, values = query[0].unflatten(0, (kv_heads, group)), key[0], value[0]
        rule = Rule(settings) if settings is not None and limit is None else None
        if rule is not None:
            rule.scale = scale
            model.rules[index] = rule
        outputs = torch.zeros_like(queries)
        for t in range(length):
            read = [[j for j in range(t + 1) if limit is None or t - j < limit]] * kv_heads
            if rule is not None and t >= prompt:
                under = settings.get("heads", range(kv_heads))
                chosen = rule.read(t, queries[list(under), :, t], keys[list(under), : t + 1], score)
                read = list(read)
                for head, slots in zip(under, chosen, strict=True):
                    read[head] = slots
            for head, slots in enumerate(read):
                logits = score(queries[head, :, t], keys[head, slots])
                if gammas is not None and slots[0] == 0:
                    own = gammas[index].double()[head * group : (head + 1) * group, None]
                    logits = torch.cat([logits[:, :1] + own, logits[:, 1:]], -1)
                if s_aux is not None:
                    own = s_aux[head * group : (head + 1) * group].double()[:, None]
                    weights = torch.cat([logits, own], -1).softmax(-1)[:, :-1]
                else:
                    weights = logits.softmax(-1)
                outputs[head, :, t] = weights @ values[head, slots]
        return outputs.flatten(0, 1)[None].transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda **_: None)
    model.set_attn_implementation(NAME)
    return model
