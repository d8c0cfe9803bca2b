"""Heads pruned after their prefill became sparse: settings by query head follow the heads that stay."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import batch, chunked, difference, given
from families import one_thread  # noqa: F401 (a fixture)
from sparse import BLOCK, LENGTH, PADS, base_of, recipe

import surgery
from surgery.runtime.modeling_surgery import attention_modules

WINDOWS = [1, 20, 40, 60, 20, 1, 60, 40]
WAYS = {  # lists of query heads: without a head the others read what they read
    "windows": {"method": "streaming", "sinks": 4, "window": WINDOWS},
    "patterns": {
        "method": "by_head",
        "patterns": [{"method": "streaming", "sinks": 4, "window": window} for window in WINDOWS],
    },
    "one for all": {"method": "pooled", "density": 0.3, "reduce": "none"},
}
REMOVED = {"head": [[0, 5, 6], [2, 3, 7]], "kv_group": [[2, 3], [6, 7]]}  # in layer 1 a KV head goes with its heads


@pytest.mark.parametrize("granularity", REMOVED)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_values_are_those_of_silenced_heads(way, granularity, tmp_path):
    base, removed = base_of("llama"), REMOVED[granularity]
    sparse = {"op": "sparse_prefill", "block": BLOCK, "dense_below": 32} | WAYS[way]
    prune = {"op": "prune_heads", "granularity": granularity, "heads": removed, "refit": False}
    silenced, model = copy.deepcopy(base), copy.deepcopy(base)
    surgery.apply(recipe(sparse), silenced)
    silenced.save_pretrained(tmp_path / "sparse")
    for module, heads in zip(attention_modules(silenced), removed, strict=True):
        for head in heads:
            module.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
    surgery.apply(recipe(sparse, prune), model)
    ids, mask = batch(base, PADS, LENGTH)
    want = silenced(**given(base, ids, mask), use_cache=False).logits
    assert difference(model(**given(base, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    assert difference(chunked(model, ids[:1], mask[:1], [64, 80, 6]), want[:1], mask[:1]) <= 1e-4
    dense = copy.deepcopy(base)
    surgery.apply(recipe(prune), dense)
    assert difference(dense(**given(base, ids, mask), use_cache=False).logits, want, mask) > 1e-3
    left = [[head for head in range(8) if head not in removed_heads] for removed_heads in removed]
    for layer, heads in zip(model.config.surgery["layers"], left, strict=True):
        if way == "windows":
            assert layer["sparse"]["window"] == [WINDOWS[head] for head in heads]
        elif way == "patterns":
            assert [each["window"] for each in layer["sparse"]["patterns"]] == [WINDOWS[head] for head in heads]
        else:
            assert layer["sparse"]["density"] == 0.3
    model.save_pretrained(tmp_path / "out")
    again = surgery.load(tmp_path / "out")
    assert torch.equal(again(**given(base, ids, mask)).logits, model(**given(base, ids, mask)).logits)
    later = surgery.load(tmp_path / "sparse")  # a second surgery, on the checkpoint
    surgery.apply(recipe(prune), later)
    assert later.config.surgery == model.config.surgery


@torch.no_grad()
def test_patterns_that_were_searched_follow_too(surgery, model, tmp_path):
    import json

    steps = [
        {"op": "sparse_prefill", "method": "by_head", "density": 0.5, "block": 16, "dense_below": 32}
        | {"calibration_samples": 1, "calibration_length": 128},
        {"op": "prune_heads", "granularity": "head", "heads": [[1, 8], [0]], "refit": True}
        | {"calibration_samples": 2, "calibration_length": 64},
    ]
    (tmp_path / "both.yaml").write_text(json.dumps(recipe(*steps)))
    done = surgery("apply", "both.yaml", model, "-o", "out")
    assert done.code == 0, done.err
    (tmp_path / "first.yaml").write_text(json.dumps(recipe(steps[0])))
    assert surgery("apply", "first.yaml", model, "-o", "first", "--no-check").code == 0
    patterns = {}
    for name in ("out", "first"):
        block = json.loads((tmp_path / name / "config.json").read_text())["surgery"]["layers"]
        patterns[name] = [layer["sparse"]["patterns"] for layer in block]
    for pruned, full, removed_heads in zip(patterns["out"], patterns["first"], ([1, 8], [0]), strict=True):
        assert pruned == [pattern for head, pattern in enumerate(full) if head not in removed_heads]
