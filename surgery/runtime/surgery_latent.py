"""Latent attention (MLA) that decodes from the latent vectors, without making keys and values of the past.

An entry of the `surgery` block may hold `latent: "absorbed"`. The stock module makes the keys and values of all heads
of the whole past anew at every step, by `kv_b_proj`, whose rows for head h are W_k and W_v:

    score_h(j) = q_h.(W_k c_j) + r_h.k_j        out_h = sum over j of p_h(j) * (W_v c_j)

with c_j the latent vector of token j and k_j its rotated key. Both products may be taken in another order:

    score_h(j) = (W_k^T q_h).c_j + r_h.k_j      out_h = W_v * (sum over j of p_h(j) * c_j)

So a query is mapped once, and all heads read the vectors as they lie in the cache (DeepSeek-AI 2024, "DeepSeek-V2",
arXiv 2405.04434, section 2.1.2). For r numbers in the vector, this reads a key in 2r + e products for each head in
place of p + e + d, so that it pays for few queries of a long past alone. Other calls, such as prompts, make keys and
values as the stock module does. The cache holds the same numbers either way.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .surgery_config import Part
from .surgery_projections import is_plain

ABSORBED = "absorbed"
LONG = 320  # tokens of a prompt that makes keys and values, unless the vector is short and the heads are wide
BLOCK = 512  # queries whose scores of all keys exist at once, where a mask is needed


class LatentPart(Part):
    """Latent attention: few queries read the latent vectors themselves."""

    keys = ("latent",)

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        if layer["latent"] != ABSORBED:
            return f"has latent {layer['latent']!r}; there is {ABSORBED!r}"
        if not getattr(config, "kv_lora_rank", None) or len(groups) != 1:
            return "has latent, and this model has no latent vectors that all heads read"
        return ""

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        if "latent" in layer:
            if not hasattr(type(module), "expand_kv"):
                raise ValueError(f"{type(module).__name__} of this version makes keys and values before its cache")
            module.expand_kv, module.surgery_latent = _as_they_are, attend
        else:
            for name in ("expand_kv", "surgery_latent"):
                vars(module).pop(name, None)

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("way of decoding",)

    def describe(self, layer: dict) -> tuple[str, str] | None:
        return "decoding", "from the latent vectors (absorbed)"

    def display_key(self, layer: dict):
        return layer.get("latent")

    def probe_length(self, layer: dict, least: int) -> int:
        return least + LONG  # where a prompt is computed in the other way


PART = LatentPart()


def _as_they_are(vectors, rotated):
    """In place of the stock `expand_kv`: the attention function gets the latent vectors and the rotated keys."""
    return vectors, rotated


def attend(module, query, vectors, rotated, mask, scale: float) -> torch.Tensor:
    """Causal attention of a call's queries, the last ones of all tokens.

    Args:
        module: the stock attention module.
        query: [batch, heads, n, p + e]; their last e channels are rotated.
        vectors: [batch, 1, N, r], latent vectors.
        rotated: [batch, 1, N, e], rotated keys.
        mask: bool [batch, N], the slots of real tokens; None: all are real.
        scale: factor on the scores.

    Returns:
        [batch, n, heads, d], zero for queries that see no key.
    """
    few = query.shape[2] <= _most_absorbed(module) and is_plain(module.kv_b_proj)
    made = _absorbed(module, query, vectors, rotated) if few else _expanded(module, query, vectors, rotated)
    length, end = query.shape[2], vectors.shape[2]
    if not few and mask is None and length == end:
        return made(slice(None), end, None, scale, causal=True).transpose(1, 2)
    outputs = []
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        seen = _seen(end - length + first, end - length + last, mask, query.device)
        out = made(slice(first, last), end - length + last, seen, scale)
        if mask is not None and seen is not None:
            out = out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _seen(first: int, end: int, mask, device) -> torch.Tensor | None:
    """The keys below slot `end` that queries from slot `first` on see: bool [1 or batch, 1, n, keys]; None: all."""
    if mask is None and end - first == 1:
        return None
    slots = torch.arange(end, device=device)
    seen = (slots[None, :] <= slots[first:, None])[None, None]
    return seen if mask is None else seen & mask[:, None, None, :end]


def _most_absorbed(module) -> int:
    """Up to so many queries, reading the vectors takes fewer products than making keys and values, for any past."""
    rank, made = module.kv_lora_rank, module.qk_nope_head_dim + module.v_head_dim
    more = 2 * rank - made  # products that a query spends on each key beyond those of an expanded one
    return rank * made // more if more > 0 else 1 << 30


def _expanded(module, query, vectors, rotated):
    """A function that attends as the stock module does: [batch, heads, queries, d] of a slice of the queries."""
    keys, values = type(module).expand_kv(module, vectors, rotated)

    def block(rows: slice, end: int, seen, scale: float, causal: bool = False):
        of_block = query[:, :, rows], keys[:, :, :end], values[:, :, :end]
        return sdpa(*of_block, attn_mask=seen, scale=scale, is_causal=causal)

    return block


def _absorbed(module, query, vectors, rotated):
    """A function that reads the vectors themselves: [batch, heads, queries, d] of a slice of the queries."""
    free, heads = module.qk_nope_head_dim, query.shape[1]
    maps = module.kv_b_proj.weight.view(heads, -1, vectors.shape[-1])
    to_key, to_value = maps[:, :free], maps[:, free:]  # [heads, p, r], [heads, d, r]

    def block(rows: slice, end: int, seen, scale: float):
        of_block, past, turned = query[:, :, rows], vectors[:, :, :end], rotated[:, :, :end]
        shape = of_block.shape[:3]
        mapped = (of_block[..., :free] @ to_key).flatten(1, 2)[:, None]  # the rows of all heads read a vector once
        scores = mapped @ past.mT + of_block[..., free:].flatten(1, 2)[:, None] @ turned.mT
        scores = scores.view(*shape, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        read = scores.softmax(-1).to(past.dtype).flatten(1, 2)[:, None] @ past
        return read.view(*shape, -1) @ to_value.mT

    return block
