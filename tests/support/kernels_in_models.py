"""Whole models by kernels and by PyTorch, under Triton's interpreter: how far apart, and which kernels were launched.

Run as a program under TRITON_INTERPRET=1 (`kernel_cases.py` says why): prints one JSON object, case -> {"error": the
largest difference of a logit, relative to the largest logit, "ways": {way: kernels that were launched}, "without":
launches where the rule says PyTorch}.

A case is a tiny base and an entry of the `surgery` block for each layer. Its texts come in these ways: a whole prompt
without a cache (`alone`, and in a batch padded on the `left` or `right`), and into a cache as a first chunk, more
chunks, and single tokens (`left: tokens`). `generate` and `lookup` are one generation each, the latter with prompt
lookup, which takes tokens back.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from contextlib import contextmanager
from itertools import pairwise

import torch
from families import TINY, text_config

from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_gated_compute, surgery_kernels
from surgery.runtime.surgery_gates import Gate

SPLIT = {"sinks": 2, "window": 6}
STREAMING, DECODE = "streaming_prefill", "split_decode"
SPARSE, SUMS, GATHERED = "block_sparse_prefill", "estimators", "gathered_heads"
LENGTH, FIRST, TOKENS = 50, 20, 46  # the first chunk ends at FIRST, a second one at TOKENS
CHUNKS = {"first": (0, FIRST), "chunks": (FIRST, TOKENS), "tokens": (TOKENS, 47, 48)}
MOH = {"kind": "moh", "unit": "head", "shared": [0], "active": 3}
MAE = {"kind": "mae", "hard": True, "rescale": True}
POOLED = {"method": "pooled", "block": 16, "density": 0.3, "reduce": "sum"}


def split(streaming, **more) -> dict:
    return SPLIT | {"streaming": streaming} | more


def gated(gate: dict) -> dict:
    return {"gate": gate, "parameters": Gate.of(gate, [2] * 4).shapes(64)}


def sparse(**settings) -> dict:
    return {"sparse": POOLED | settings}


def by(method: str, **settings) -> dict:
    return {"sparse": {"method": method, "block": 16} | settings}


GAMMA = {"parameters": {"surgery_log_gamma": [8]}}
VIRTUAL = {"parameters": {"surgery_sink_logit": [8, 2], "surgery_key": [4, 2, 16], "surgery_value": [4, 2, 16]}}
UNEVEN = {"query_groups": [3, 1, 2, 2]}
# Case -> family, entry of each layer, kernels that an unpadded `generate` launches (`expected` has the other ways).
CASES = {
    "duo": ("qwen3", split([0]), {STREAMING, DECODE}),
    "duo, every head": ("qwen3", split([0, 1, 2, 3]), {STREAMING}),
    "duo, no sinks": ("qwen3", split([1], sinks=0, window=9), {STREAMING, DECODE}),
    "duo of sliding layers": ("mistral", split([0], window=4), {STREAMING, DECODE}),
    "duo with soft-capped scores": ("gemma2", split([0]), {STREAMING, DECODE}),
    "duo with the base's own sinks": ("gpt_oss", split([1]), {STREAMING, DECODE}),
    "full heads with the base's own sinks": ("gpt_oss", split([]), {STREAMING, DECODE}),
    "uneven groups": ("qwen3", UNEVEN, {DECODE}),
    "uneven groups, split": ("qwen3", UNEVEN | split([0]), {STREAMING, DECODE}),
    "gamma": ("qwen3", GAMMA, {STREAMING, DECODE}),
    "gamma, split": ("qwen3", GAMMA | split([1]), {STREAMING, DECODE}),
    "virtual keys": ("qwen3", VIRTUAL, {STREAMING, DECODE}),
    "act by map": ("qwen3", {"parameters": {"surgery_log_beta": [8]}, "act": {"alpha": 1.3}}, {STREAMING, DECODE}),
    "moh": ("qwen3", gated(MOH), {GATHERED}),
    "moh, soft-capped": ("gemma2", gated(MOH), {GATHERED, STREAMING, DECODE}),
    "moh of KV heads": ("qwen3", gated(MOH | {"unit": "kv_group", "active": 1}), {GATHERED}),
    "moh, split": ("qwen3", gated(MOH) | split([0]), {GATHERED, STREAMING, DECODE}),
    "moh, gamma": ("qwen3", gated(MOH) | {"parameters": gated(MOH)["parameters"] | GAMMA["parameters"]},
                   {GATHERED, DECODE}),
    "pooled, each": ("qwen3", sparse(), {SPARSE, SUMS}),
    "pooled, all, lists by head": ("qwen3", sparse(queries="all", reduce="none"), {SPARSE, SUMS}),
    "pooled, soft-capped": ("gemma2", sparse(), {SPARSE, SUMS, STREAMING, DECODE}),
    "pooled, delta": ("qwen3", sparse(delta=8), {SPARSE, SUMS}),
    "pooled, gamma": ("qwen3", sparse() | GAMMA, {SPARSE, SUMS, DECODE}),
    "pooled, split": ("qwen3", sparse() | split([0]), {SPARSE, SUMS, STREAMING, DECODE}),
    "xattention": ("qwen3", by("xattention", density=0.3, stride=4), {SPARSE, SUMS}),
    "block_topk": ("qwen3", by("block_topk", top=2), {SPARSE, SUMS}),
    "streaming blocks": ("qwen3", by("streaming", sinks=16, window=16), {SPARSE}),
    "exact": ("qwen3", by("block_topk", top=2, exact=True), {SUMS}),
    "max_threshold": ("qwen3", by("max_threshold"), {SPARSE, SUMS}),
    "hierarchical": ("qwen3", by("hierarchical", top=2), {SPARSE, SUMS}),
    "pooled, mean queries, similarity": ("qwen3", sparse(queries="mean", similarity=0.2), {SPARSE, SUMS}),
    "mae of four heads": ("qwen3", {"gate": MAE, "parameters": Gate.of(MAE, [1] * 4).shapes(64)}, {GATHERED}),
    "duo under autocast": ("qwen3", split([0]), {STREAMING, DECODE}),
    "pooled, gamma, under autocast": ("qwen3", sparse() | GAMMA, {SPARSE, SUMS, DECODE}),
    "moh, gamma, in float16": ("qwen3", gated(MOH) | {"parameters": gated(MOH)["parameters"] | GAMMA["parameters"]},
                               {GATHERED, DECODE}),
    "xattention in float16": ("qwen3", by("xattention", density=0.3, stride=4), {SPARSE, SUMS}),
    "duo in float16": ("qwen3", split([0]), {STREAMING, DECODE}),
    "gamma, split, in bfloat16": ("qwen3", GAMMA | split([1]), {STREAMING, DECODE}),
}  # fmt: skip
AUTOCAST = ("duo under autocast", "pooled, gamma, under autocast")  # of float16
HALF = {"duo in float16": torch.float16, "gamma, split, in bfloat16": torch.bfloat16}
HALF |= {"moh, gamma, in float16": torch.float16, "xattention in float16": torch.float16}
QUICK = (
    "duo", "duo of sliding layers", "duo with soft-capped scores", "uneven groups, split", "gamma, split",
    "moh, gamma", "pooled, gamma", "xattention",
)  # fmt: skip


# Ways in which a case differs from `expected`'s rule.
PADDED = ("left", "left: first", "left: chunks", "right")
DIFFERENT = {
    # PyTorch computes a whole prompt of full heads: other prompts need a mask there.
    "uneven groups": {way: {STREAMING} for way in ("alone: chunks", *PADDED)},
    # A first chunk of 20 tokens is dense: `top` blocks of 16 hold it.
    "exact": {"alone: first": set(), "left: first": {STREAMING}},
}


def expected(name: str) -> dict[str, set]:
    """Way -> the kernels that it launches, by the table in kernels/README.md."""
    kernels = CASES[name][2]
    prompt, token = kernels - {DECODE}, kernels & {DECODE}
    ways = dict.fromkeys(("alone", "alone: first", "alone: chunks", *PADDED), prompt)
    if SPARSE in prompt:
        ways["alone: chunks"] = prompt - {
            SUMS
        }  # without padding, the second chunk holds no whole block that is sparse
    ways |= {"alone: tokens": token, "left: tokens": {DECODE}, "generate": kernels}
    return ways | DIFFERENT.get(name, {})


def operated(family: str, entry: dict, dtype=torch.float32, device: str = "cpu"):
    """The base of a case with the entry in each layer, and parameters that do something."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4} if entry.get("gate") == MAE else {}
    model = copy.deepcopy(TINY[family](**heads)).eval()
    runtime.patch(model, {"layers": [entry] * text_config(model).num_hidden_layers})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "surgery_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 - 0.5)
    return model.to(device, dtype)


def texts() -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Tokens and mask: one text, and some in a batch, of which one or two are shorter."""
    ids = torch.randint(3, 60, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :5], left[2, :31] = 0, 0
    right[1, 44:] = 0
    return {"alone": (ids[:1], None), "left": (ids, left), "right": (ids[:2], right[:2])}


class Ways(dict):
    """Way -> the names of the kernels that it launched."""

    @contextmanager
    def of(self, name: str):
        from surgery.kernels.surgery_triton import LAUNCHES

        LAUNCHES.clear()
        yield
        self[name] = sorted(LAUNCHES)


@torch.no_grad()
def runs(model, autocast: torch.dtype | None = None) -> tuple[torch.Tensor, Ways]:
    """The logits of real tokens of each text in each way, and the kernels that were launched."""
    found, ways = [], Ways()
    for name, (ids, mask) in texts().items():
        ids, mask = ids.to(model.device), mask if mask is None else mask.to(model.device)
        given = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            with ways.of(name):
                found.append(model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[real])
            cache, parts = None, []
            for chunk, cuts in CHUNKS.items() if name != "right" else ():  # such padding is not fed into a cache
                with ways.of(f"{name}: {chunk}"):
                    for begin, end in pairwise(cuts):
                        near = {"attention_mask": None if mask is None else mask[:, :end]}
                        near |= {key: positions[:, begin:end] for key, positions in given.items()}
                        out = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, **near)
                        cache = out.past_key_values
                        parts.append(out.logits)
        if parts:
            found.append(torch.cat(parts, dim=1)[real[:, : CHUNKS["tokens"][-1]]])
    return torch.cat([logits.flatten() for logits in found]).double().cpu(), ways


@torch.no_grad()
def multiply_adds(model, ids) -> dict[str, int]:
    """What `surgery bench` counts for a prompt: component -> multiply-adds."""
    with surgery_gated_compute.counted(model) as work:
        model(input_ids=ids, use_cache=False)
    return work.done


def measured(name: str, device: str = "cpu") -> dict:
    """What this module's docstring says, of one case."""
    family, entry, _ = CASES[name]
    model, ids = operated(family, entry, HALF.get(name, torch.float32), device), texts()["alone"][0].to(device)
    autocast = torch.float16 if name in AUTOCAST else None
    by_kernel, ways = runs(model, autocast)
    answers = {}
    for way, more in {"generate": {}, "lookup": {"prompt_lookup_num_tokens": 3}}.items():
        if more and "act" in entry:
            continue  # it must know where a prompt ends: assisted decoding is refused
        with ways.of(way):
            answers[way] = model.generate(ids, max_new_tokens=6, do_sample=False, **more).tolist()
    work = [multiply_adds(model, ids)]
    rule, surgery_kernels._module = surgery_kernels._module, lambda name: None
    by_pytorch, without = runs(model, autocast)
    work.append(multiply_adds(model, ids))
    surgery_kernels._module = rule
    return {
        "error": float((by_kernel - by_pytorch).abs().max() / by_pytorch.abs().max()),
        "ways": ways,
        "answers": list(answers.values()),
        "work": work,
        "without": sorted({kernel for kernels in without.values() for kernel in kernels}),
    }


def main() -> None:
    torch.set_num_threads(1)
    surgery_gated_compute.ROWS = 1
    warnings.simplefilter("error", RuntimeWarning)
    json.dump({name: measured(name) for name in sys.argv[1:] or CASES}, sys.stdout)


if __name__ == "__main__":
    main()
