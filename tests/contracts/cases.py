"""What every operation must keep: one line an operation. The tests of this folder run all of them on each line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from dense import LENGTH
from families import OFF_THE_INTERFACE, TINY

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.layer import LayerAnatomy

FAMILIES = [name for name in TINY if name not in OFF_THE_INTERFACE and not Anatomy.of(TINY[name]()).composite]
ACTING = 93  # tokens: the fourth and fifth block of 16 queries leave out blocks of keys, and the last one is cut
FEW = (
    "llama",
    "qwen3",
    "gemma2",
    "gpt_oss",
    "mistral",
    "gpt2",
)  # where an operation acts: a layout, a norm, a window each


# Families whose first layer can get a window while the other one stays full.
SLIDING = ("llama", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class Case:
    """How an operation is held to its contracts.

    Attributes:
        acts: fields with which it changes what the model says, measured on nothing or on a few texts of `Letters`.
        identity: name -> fields, made from the first layer's anatomy, with which it changes nothing.
        wrong: a key and a value that its own model refuses.
        native: whether the result is a stock checkpoint.
        chunks: lengths of the forwards through the cache, of `ACTING` tokens together.
        padded: whether rows of unequal length may be cut at `chunks`: blocks of keys count from the first real token.
        by_prompt: fields with which the result depends on where the prompt ends, measured on nothing, and what sets
            the model's parameters so that it acts. Only such a setting is not held to "cached is uncached".
        in_steps: it acts in decoding steps alone, so that a call of several tokens gives what the base gives.
        refused: families on which the plan refuses what `acts`.
        refused_always: families on which the plan refuses any setting.
    """

    acts: dict[str, Any]
    identity: dict[str, Callable[[LayerAnatomy], dict[str, Any]]]
    wrong: tuple[str, Any]
    native: bool = False
    chunks: tuple[int, ...] = (20, 1, 72)
    padded: bool = True
    by_prompt: tuple[dict[str, Any], Callable[[Any], None]] | None = None
    in_steps: bool = False
    refused: tuple[str, ...] = ()
    refused_always: tuple[str, ...] = ()


def sinks(method: str, **fields: Any) -> Callable[[LayerAnatomy], dict[str, Any]]:
    return lambda _: {"method": method} | fields


def evicting(method: str, **fields: Any) -> Callable[[LayerAnatomy], dict[str, Any]]:
    votes = {"observe": 2} if method not in ("norm", "window", "random") else {}
    return lambda _: {"method": method} | votes | fields


def reading(method: str, **fields: Any) -> Callable[[LayerAnatomy], dict[str, Any]]:
    return lambda _: {"method": method, "sinks": 1, "recent": 2} | fields


def lower_betas(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("surgery_log_beta"):
            parameter.data.copy_(torch.linspace(-2, 0, len(parameter)))


CASES: dict[str, Case] = {
    "gqa": Case(
        {"kv_heads": 1, "method": "mean"},
        {"gqa, all KV heads": lambda layer: {"kv_heads": layer.kv_heads}},
        ("kv_heads", 0),
        native=True,
        refused=("gpt2",),  # its config has no number of KV heads
    ),
    "mla": Case(
        {"rank": 16, "rope": 4, "calibration_text": "builtin", "calibration_samples": 3, "calibration_length": 24},
        {},  # of several KV heads the stock model keeps one rotated key: tests/operations/mla has the identity
        ("rope", 3),
        native=True,
        refused_always=("qwen3", "gemma2", "gpt_oss", "mistral", "gpt2", "granite", "phi"),
    ),
    "low_rank_kv": Case(
        {"rank": 20, "calibration_text": "builtin", "calibration_samples": 3, "calibration_length": 24},
        {},  # it needs a text at any rank: tests/operations/low_rank_kv has the identity
        ("rank", 0),
        refused_always=("mistral", "starcoder2", "gpt2", "gpt_neox", "phi3", "gptj"),
    ),
    "absorb": Case(
        {},
        {},  # every setting computes what its base does, which is latent attention: tests/operations/mla
        ("op", "absorbed"),
        refused_always=tuple(FAMILIES),
    ),
    "expand": Case({}, {"expand, no more": lambda layer: {"kv_heads": layer.kv_heads}}, ("kv_heads", 0), native=True),
    "sliding_layers": Case(
        {"method": "listed", "layers": [0], "window": 4},
        {"sliding_layers, window": lambda _: {"method": "listed", "layers": [0], "window": LENGTH}},
        ("window", 0),
        native=True,
        refused_always=tuple(name for name in FAMILIES if name not in SLIDING),
    ),
    "duo_attention": Case(
        {"streaming_ratio": 1.0, "sinks": 2, "window": 4},
        {
            "duo_attention, none stream": lambda _: {"streaming_ratio": 0.0},
            "duo_attention, window": lambda _: {"streaming_ratio": 1.0, "window": LENGTH},
        },
        ("window", 0),
    ),
    "kv_evict": Case(
        {"keys": 3, "sinks": 1, "recent": 2, "interval": 8, "observe": 2},
        {
            f"kv_evict, {method}": evicting(method, keys=LENGTH, interval=8)
            for method in ("attention", "caote", "task_kv", "lra", "lfa", "norm", "window", "random")
        },
        ("keys", 0),
        refused_always=("mistral", "starcoder2"),  # the base's own window in every layer drops keys already
    ),
    "kv_read": Case(
        {"method": "index", "keys": 4, "sinks": 1, "recent": 2},
        {
            "kv_read, adaptive": reading("adaptive", share=0.0),
            "kv_read, threshold": reading("threshold", threshold=0.0),
        }
        | {
            f"kv_read, {method}": reading(method, keys=LENGTH + 3)  # whole blocks of 16
            for method in ("tokenselect", "recycled", "tree", "index", "random")
        },
        ("sinks", -1),
        chunks=(20, 3, 70),
        in_steps=True,
        refused_always=("mistral", "starcoder2"),  # the base's own window in every layer
    ),
    "sink_calibration": Case(
        {"method": "zero_tuning", "gamma": 3.0},
        {
            "zero_tuning, gamma 1": sinks("zero_tuning", gamma=1.0),
            "learned, identity": sinks("learned", start="identity"),
            "learned, logit -1e4": sinks("learned", logit=-1e4),
            "kv_bias, identity": sinks("kv_bias", start="identity"),
        },
        ("gamma", 0.0),
        by_prompt=({"method": "act", "find": "map", "beta": 1.0, "threshold": 1.3}, lower_betas),
    ),
    "sparse_prefill": Case(
        {"method": "streaming", "block": 16, "sinks": 4, "window": 4, "dense_below": 0},
        {
            "sparse_prefill, gamma 1": lambda _: {"gamma": 1.0, "block": 16, "dense_below": 0},
            "sparse_prefill, exact, dense rows": lambda _: {
                "method": "block_topk",
                "exact": True,
                "top": 1,
                "block": 16,
                "dense_below": 0,
                "last_rows_dense": LENGTH,
            },
        },
        ("block", 3),
        chunks=(32, 48, 12, 1),
        padded=False,
        refused_always=("mistral", "starcoder2"),  # the base's own window in every layer: no head sees all
    ),
    "prune_heads": Case(
        {"granularity": "head", "heads": [[0], [1]], "refit": False},
        {"prune_heads, none": lambda _: {"per_layer": 0}},
        ("ridge", 0.0),
        refused=("gpt2",),  # its forward counts heads by the config
        refused_always=("olmo2",),  # a QK-norm over all heads: no head can go
    ),
    "head_mask": Case(
        {"values": {0: {3: 0.0}, 1: {2: 2.0}}},
        {"head_mask, ones": lambda layer: {"values": {0: [1.0] * layer.heads, 1: {2: 1}}}},
        ("gate", "loud"),
        native=True,
    ),
    "moh": Case(
        {"active_ratio": 0.5, "shared_ratio": 0.0, "router": "random"},
        {"moh, all heads on": lambda _: {"active_ratio": 1.0, "shared_ratio": 0.0, "router": "random"}},
        ("active_ratio", 0.0),
    ),
    "mae": Case(
        {"router": "random"}, {"mae, soft and even": lambda _: {"hard": False, "router": "zero"}}, ("hard", 1)
    ),
}


def recipe(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "contract", "operations": list(steps), "evaluate": None}
