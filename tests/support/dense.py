"""Attention written out in float64, every weight of every row and head held; padded batches, forwards in chunks.

The reference uses nothing of the runtime: a mask for each row and head, the terms as more columns of the scores.
"""

from __future__ import annotations

import copy
import math

import torch
from families import double
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from surgery.runtime.modeling_surgery import CACHE

LENGTH, PADS = 45, (0, 11, 0, 4)
KINDS = ["gamma", "act", "logit", "logit and value", "key and value", "stand in", "all", "act and keys"]


def batch(model: PreTrainedModel, pads=PADS, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [rows, length] and their mask, row r padded on the left by `pads[r]`."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (len(pads), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return ids, mask


def given(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, begin: int = 0) -> dict:
    """Keyword arguments of a forward on the columns of `ids` from `begin` on; OPT makes positions from the mask."""
    arguments = {"input_ids": ids[:, begin:], "attention_mask": mask}
    if model.config.model_type == "opt":
        return arguments
    return arguments | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begin:]}


def chunked(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, chunks, holder: list | None = None):
    """Logits of a forward in chunks of these lengths, through the cache that the model makes.

    Args:
        holder: gets the cache.
    """
    cache, begin, logits = None, 0, []
    for size in chunks:
        end = begin + size
        known = {} if cache is None else {CACHE: cache}
        out = model(**given(model, ids[:, :end], mask[:, :end], begin), use_cache=True, **known)
        cache = out[CACHE]
        assert hasattr(model, "make_cache") == (type(cache).__name__ == "SurgeryCache")
        logits.append(out.logits)
        begin = end
    if holder is not None:
        holder.append(cache)
    return torch.cat(logits, 1)


def difference(got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest difference on real tokens, relative to the spread of the logits."""
    real = mask.bool()
    return ((got.double() - want.double())[real].abs().max() / want.double()[real].std()).item()


def random_terms(model, kind: str, seed: int, m: int = 2) -> list[dict]:
    """Random tensors of the terms of this kind, `m` virtual keys, for every layer, in float32."""
    text = model.config.get_text_config()
    heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    names = {
        "gamma": ["surgery_log_gamma"],
        "act": ["surgery_log_beta", "surgery_sink_probe"],
        "act by map": ["surgery_log_beta"],
        "logit": ["surgery_sink_logit"],
        "logit and value": ["surgery_sink_logit", "surgery_value"],
    }.get(kind, ["surgery_sink_logit", "surgery_key", "surgery_value"])
    names = names + (["surgery_log_gamma"] if kind == "all" else [])
    names = names + (["surgery_log_beta", "surgery_sink_probe"] if kind == "act and keys" else [])
    made = {
        "surgery_log_gamma": lambda: normal(heads) * 1.5,
        "surgery_log_beta": lambda: (normal(heads) * 2).clamp(-2.0, 0.0),  # some heads stay as they are
        "surgery_sink_probe": lambda: normal(heads, size + 2) - torch.eye(size + 2)[-1],
        "surgery_sink_logit": lambda: normal(heads, m),
        "surgery_key": lambda: normal(kv_heads, m, size),
        "surgery_value": lambda: normal(kv_heads, m, size),
    }
    return [{name: made[name]() for name in names} for _ in range(model.config.num_hidden_layers)]


def sparse_rows(sparse: dict, real: list[bool]) -> torch.Tensor:
    """Which keys the queries of a row may read in a prefill by blocks that sinks + window reach: bool [N, N].

    As surgery_sparse_prefill.py says, token by token: block edges from the first real token; a block of queries
    that lies in no one call, or ends by `dense_below`, or holds one of the call's last rows, reads all, and so does
    one of whose blocks more than 0.6 are kept.
    """
    size, start, length = sparse["block"], real.index(True), len(real)
    ends, begin, calls = sparse.get("calls", [length]), 0, []
    for end in ends:
        first, last = max(begin, start) - start, max(min(end, length - real[::-1].index(True)) - start, 0)
        calls.append((first, last))
        begin = end
    seen = torch.zeros(length, length, dtype=torch.bool)
    for first, last in calls:
        for i in range(first, last):
            own = i // size
            kept = [
                j
                for j in range(own + 1)
                if j in (0, own) or j * size < sparse["sinks"] or own * size - (j * size + size - 1) < sparse["window"]
            ]
            complete = own * size >= first and (own + 1) * size <= last
            late = (own + 1) * size > last - sparse.get("last_rows_dense", 0)
            early = (own + 1) * size <= sparse.get("dense_below", 0)
            if not complete or late or early or len(kept) > 0.6 * (own + 1):
                kept = range(own + 1)
            for j in kept:
                seen[start + i, start + j * size : start + (j + 1) * size] = True
    return seen


def marks_of_map(weights, seen, alpha: float, prompt: int | None = None) -> torch.Tensor:
    """Which keys are sinks by ACT's rule, key by key: bool [rows, heads, length]; a row's first token may be one.

    Args:
        weights: [rows, heads, length, length]. seen: bool, the same: which real queries see which real keys.
        prompt: where the prompt ends. Later queries do not count, and later keys are no sinks.
    """
    marks, end = torch.zeros(weights.shape[:3], dtype=torch.bool), prompt or weights.shape[-1]
    for row in range(len(weights)):
        for head in range(weights.shape[1]):
            most = max(int(seen[row, head, i].sum()) for i in range(end))
            columns = zip(weights[row, head].T.tolist(), seen[row, head].T.tolist(), strict=True)
            for j, (weight, sees) in enumerate(columns):
                of_queries = [w for w, saw in zip(weight[:end], sees[:end], strict=True) if saw]
                marks[row, head, j] = bool(of_queries) and math.fsum(of_queries) / len(of_queries) > alpha / most
    return marks


def dense_logits(model, layers: list[dict], ids, mask, tensors=None, silent=None) -> torch.Tensor:
    """float64 logits of a stock model with these surgeries; arguments as for `dense_model`."""
    model = dense_model(model, layers, mask, tensors, silent)
    with torch.no_grad():
        return model(**given(model, ids, mask), use_cache=False).logits


def dense_model(model, layers: list[dict], mask, tensors=None, silent=None):
    """A stock model in float64 with these surgeries, for one batch, until the next one is made.

    Args:
        layers: of each layer, as in the surgery block: streaming, sinks, window, stand_in, act, with `prompt`: where
            in the batch the prompt ends (default: at the end), and sparse of method streaming, with `calls`: where in
            the batch each forward ends (default: one forward). And `held`, bool [rows, KV heads, length, length]:
            which keys the cache still has for which queries of full heads.
        mask: [rows, length] of the batch.
        tensors: of each layer, name -> values of its terms.
        silent: of each layer, the query heads whose output is left out.
    """
    model, real, length = double(copy.deepcopy(model).eval()), mask.bool(), mask.shape[1]
    text = model.config.get_text_config()
    kinds, i, j = getattr(text, "layer_types", None), torch.arange(length)[:, None], torch.arange(length)
    first = real.int().argmax(1)[:, None, None, None]

    def attend(module, query, key, value, _mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        layer_index, heads = module.layer_idx, query.shape[1]
        entry, group = layers[layer_index], heads // key.shape[1]
        terms = {name: tensor.double() for name, tensor in (tensors[layer_index] if tensors else {}).items()}
        limit = kwargs.get("sliding_window")
        if kinds is not None:
            limit = text.sliding_window if kinds[layer_index] == "sliding_attention" else None

        def score(product):
            scores = product * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            return scores if softcap is None else softcap * torch.tanh(scores / softcap)

        narrow = torch.tensor([head // group in entry.get("streaming", ()) for head in range(heads)])[:, None, None]
        seen = ((j <= i) & (i - j < (limit or length)) & real[:, None, None]).expand(-1, heads, -1, -1)
        if "sparse" in entry and limit is None:
            blocks = torch.stack([sparse_rows(entry["sparse"], row.tolist()) for row in real])
            seen = seen & (blocks[:, None] | narrow)
        if "held" in entry:
            seen = seen & (entry["held"].repeat_interleave(group, 1) | narrow)
        if narrow.any():
            seen = seen & ~(narrow & (j - first >= entry["sinks"]) & (i - j >= entry["window"]))
        by_visibility = (j <= i) & (i - j < (limit or length)) & real[:, None, None] & real[:, None, :, None]
        by_visibility = by_visibility.expand(-1, heads, -1, -1)
        if narrow.any():
            by_visibility = by_visibility & ~(narrow & (j - first >= entry["sinks"]) & (i - j >= entry["window"]))
        sees_first = (seen & (j == first)).any(-1, keepdim=True)
        columns, visible = [score(query @ key.repeat_interleave(group, 1).mT)], [seen]
        values = [value.repeat_interleave(group, 1)]
        if "surgery_log_gamma" in terms:
            columns[0] = columns[0] + (j == first) * terms["surgery_log_gamma"][:, None, None]
        if "surgery_log_beta" in terms:
            beta = terms["surgery_log_beta"].exp()[:, None, None]
            weights = columns[0].masked_fill(~seen, -1e300).softmax(-1)
            if "act" in entry:
                whole = weights
                if s_aux is not None:
                    top = columns[0].masked_fill(~seen, -1e300).logsumexp(-1, keepdim=True)
                    whole = weights * (1 + (s_aux.double()[:, None, None] - top).exp()).reciprocal()
                marks = marks_of_map(whole * seen, by_visibility, **entry["act"])
            else:
                probe = terms["surgery_sink_probe"][:, None]
                marks = (values[0] * probe[..., :-2]).sum(-1) + values[0].norm(dim=-1) * probe[..., -2] + probe[
                    ..., -1
                ] > 0
            sinks = marks[:, :, None] & (j != first) & seen
            share = (weights * sinks).sum(-1, keepdim=True).clamp(max=0.9)
            columns[0] = columns[0] + sinks * (beta * (1 - share) / (1 - beta * share)).log()

        def add(logits, more, shown):
            columns.append(logits.expand(*seen.shape[:3], -1))
            values.append(more.expand(len(mask), -1, -1, -1))
            visible.append(shown.expand(*seen.shape[:3], logits.shape[-1]))

        if "surgery_sink_logit" in terms:
            logits = terms["surgery_sink_logit"][:, None]
            more = value.new_zeros(heads, logits.shape[-1], value.shape[-1])
            if "surgery_key" in terms:
                logits = logits + score(query @ terms["surgery_key"].repeat_interleave(group, 0).mT)
            if "surgery_value" in terms:
                more = terms["surgery_value"].repeat_interleave(group, 0)
            lost = ~sees_first & (i - first < (limit or length))  # to the split, not to the base's own window
            add(logits, more, lost if entry.get("stand_in") else torch.tensor(True))
        if s_aux is not None:
            add(s_aux.double()[:, None, None], value.new_zeros(heads, 1, value.shape[-1]), torch.tensor(True))
        scores = torch.cat(columns, -1).masked_fill(~torch.cat(visible, -1), -1e300)
        out = (scores.softmax(-1) @ torch.cat(values, 2)).masked_fill(~seen.any(-1, keepdim=True), 0.0)
        if silent is not None:
            out[:, silent[layer_index]] = 0.0
        return out.transpose(1, 2), None

    AttentionInterface.register("dense_reference", attend)
    AttentionMaskInterface.register("dense_reference", lambda **_: None)
    model.set_attn_implementation("dense_reference")
    return model
