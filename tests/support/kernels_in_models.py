"""Whole models by kernels and by PyTorch, under Triton's interpreter: how far apart, and which kernels were launched.

Run as a program under TRITON_INTERPRET=1 (`kernel_cases.py` says why): prints one JSON object, case -> {"error": the
largest difference of a logit, relative to the largest logit, "launches": {kernel: number} in one `generate`, "failed":
launches that failed, "without": launches where the rule says PyTorch}.

A case is a tiny base and an entry of the `surgery` block for each layer. Its texts come as a whole without a cache, in
chunks into one, and token by token, alone and in a batch with padding on the left and on the right.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from itertools import pairwise

import torch
from families import TINY, text_config

from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_gated_compute, surgery_kernels
from surgery.runtime.surgery_gates import Gate

SPLIT = {"sinks": 2, "window": 6}
STREAMING, DECODE = "streaming_prefill", "split_decode"
SPARSE, SUMS, GATHERED = "block_sparse_prefill", "estimators", "gathered_heads"
LENGTH, CHUNKS = 50, (0, 20, 21, 46, 47, 48, 50)
MOH = {"kind": "moh", "unit": "head", "shared": [0], "active": 3}
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
# Case -> family, entry of each layer, kernels that one `generate` launches.
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
    "duo in float16": ("qwen3", split([0]), {STREAMING, DECODE}),
    "gamma, split, in bfloat16": ("qwen3", GAMMA | split([1]), {STREAMING, DECODE}),
}  # fmt: skip
HALF = {"duo in float16": torch.float16, "gamma, split, in bfloat16": torch.bfloat16}
QUICK = ("duo", "uneven groups, split", "gamma, split", "moh, gamma", "pooled, gamma", "xattention")


def operated(family: str, entry: dict, dtype=torch.float32, device: str = "cpu"):
    """The base of a case with the entry in each layer, and parameters that do something."""
    model = copy.deepcopy(TINY[family]()).eval()
    runtime.patch(model, {"layers": [entry] * text_config(model).num_hidden_layers})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "surgery_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 - 0.5)
    return model.to(device, dtype)


def texts() -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Tokens and mask: one text, and three in a batch, of which two are shorter."""
    ids = torch.randint(3, 60, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :5], left[2, :31] = 0, 0
    right[1, 44:] = 0
    return [(ids[:1], None), (ids, left), (ids[:2], right[:2])]


@torch.no_grad()
def runs(model) -> torch.Tensor:
    """The logits of real tokens, of each text in each way."""
    found = []
    for ids, mask in texts():
        ids, mask = ids.to(model.device), mask if mask is None else mask.to(model.device)
        given = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        found.append(model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[real])
        if mask is not None and not mask[:, -1].all():
            continue  # padding on the right is not fed into a cache
        cache, parts = None, []
        for begin, end in pairwise(CHUNKS):
            near = {"attention_mask": None if mask is None else mask[:, :end]}
            near |= {name: positions[:, begin:end] for name, positions in given.items()}
            out = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, **near)
            cache = out.past_key_values
            parts.append(out.logits)
        found.append(torch.cat(parts, dim=1)[real])
    return torch.cat([logits.flatten() for logits in found]).double().cpu()


def measured(name: str, device: str = "cpu") -> dict:
    """What this module's docstring says, of one case."""
    from surgery.kernels import surgery_triton

    family, entry, _ = CASES[name]
    model, ids = operated(family, entry, HALF.get(name, torch.float32), device), texts()[0][0].to(device)
    by_kernel = runs(model)
    surgery_triton.LAUNCHES.clear()
    model.generate(ids, max_new_tokens=4, do_sample=False)
    launches = surgery_kernels.launches()
    surgery_triton.LAUNCHES.clear()
    rule, surgery_kernels._module = surgery_kernels._module, lambda name: None
    by_pytorch = runs(model)
    surgery_kernels._module = rule
    return {
        "error": float((by_kernel - by_pytorch).abs().max() / by_pytorch.abs().max()),
        "launches": launches,
        "failed": surgery_triton.failed(),
        "without": surgery_kernels.launches(),
    }


def main() -> None:
    torch.set_num_threads(1)
    surgery_gated_compute.ROWS = 1
    warnings.simplefilter("error", RuntimeWarning)
    json.dump({name: measured(name) for name in sys.argv[1:] or CASES}, sys.stdout)


if __name__ == "__main__":
    main()
