"""Every operation in the setting that changes nothing, on every family of the attention interface: a line for each."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import LENGTH, batch, chunked, difference, given
from families import (
    OFF_THE_INTERFACE,
    TINY,
    TOKENS,
    logits_of,
    one_thread,  # noqa: F401 (a fixture)
    open_doors,
)

import surgery
from surgery.architecture.anatomy import Anatomy

IDENTITIES = {
    "gqa, all KV heads": lambda layer: {"op": "gqa", "kv_heads": layer.kv_heads},
    "expand, no more": lambda layer: {"op": "expand", "kv_heads": layer.kv_heads},
    "duo_attention, none stream": lambda layer: {"op": "duo_attention", "streaming_ratio": 0.0},
    "duo_attention, window": lambda layer: {"op": "duo_attention", "streaming_ratio": 1.0, "window": LENGTH},
    "zero_tuning, gamma 1": lambda layer: sinks("zero_tuning", gamma=1.0),
    "learned, identity": lambda layer: sinks("learned", start="identity"),
    "learned, logit -1e4": lambda layer: sinks("learned", logit=-1e4),
    "kv_bias, identity": lambda layer: sinks("kv_bias", start="identity"),
    "sparse_prefill, gamma 1": lambda layer: {"op": "sparse_prefill", "gamma": 1.0, "block": 16, "dense_below": 0},
    "prune_heads, none": lambda layer: {"op": "prune_heads", "per_layer": 0},
    "head_mask, ones": lambda layer: {"op": "head_mask", "values": {0: [1.0] * layer.heads, 1: {2: 1}}},
}
REFUSED = {
    ("olmo2", "prune_heads, none"),  # a QK-norm over all heads: no head can go, and the plan says so
    ("mistral", "sparse_prefill, gamma 1"),  # the base's own window in every layer: no head sees all
    ("starcoder2", "sparse_prefill, gamma 1"),
}
STOCK = ("gqa", "expand", "prune_heads", "head_mask")  # what changes no weight leaves a stock model
FAMILIES = [name for name in TINY if name not in OFF_THE_INTERFACE and not Anatomy.of(TINY[name]()).composite]


def sinks(method: str, **fields) -> dict:
    return {"op": "sink_calibration", "method": method} | fields


def recipe(*steps: dict) -> dict:
    return {"version": 1, "name": "test", "operations": list(steps), "evaluate": None}


@pytest.fixture(scope="module")
def bases():
    return {name: TINY[name]().eval().requires_grad_(False) for name in FAMILIES}


RUNS = [(family, step) for family in FAMILIES for step in IDENTITIES if (family, step) not in REFUSED]


@pytest.mark.parametrize(("family", "step"), RUNS)
@torch.no_grad()
def test_identity(bases, family, step):
    """Cached and not, rows alone and left-padded."""
    base, model = bases[family], copy.deepcopy(bases[family])
    facts = Anatomy.of(base).layers[0]
    report = surgery.apply(recipe(IDENTITIES[step](facts)), model)
    assert report.data["tier"] == ("native" if step.startswith(STOCK) else "surgical")
    ids, mask = batch(base)
    for rows in (slice(0, 1), slice(None)):
        want = base(**given(base, ids[rows], mask[rows]), use_cache=False).logits
        whole = model(**given(model, ids[rows], mask[rows]), use_cache=False).logits
        assert difference(whole, want, mask[rows]) <= 1e-5
        assert difference(chunked(model, ids[rows], mask[rows], [20, 1, 24]), want, mask[rows]) <= 1e-5


def test_identity_through_both_doors_and_saved_again(bases, tmp_path):
    """All operations at once: one checkpoint of each family."""
    folders = []
    for family, base in bases.items():
        model, layer = copy.deepcopy(base), Anatomy.of(base).layers[0]
        # One operation of each term; where all heads have a window, none has a prompt to read by blocks.
        left = ("duo_attention, none stream", "learned, identity", "kv_bias, identity", "sparse_prefill, gamma 1")
        steps = [make(layer) for step, make in IDENTITIES.items() if step not in left and (family, step) in RUNS]
        surgery.apply(recipe(*steps), model)
        model.save_pretrained(tmp_path / family)
        surgery.load(tmp_path / family).save_pretrained(tmp_path / f"{family}-again")
        folders += [tmp_path / family, tmp_path / f"{family}-again"]
    for folder, answer in open_doors(folders, tmp_path, trust=True).items():
        assert "error" not in answer, f"{folder.name}: {answer}"
        want = logits_of(bases[folder.name.removesuffix("-again")])
        assert (answer["logits"] - want).abs().max() <= 1e-5 * want.std(), folder.name
        assert torch.equal(logits_of(surgery.load(folder), TOKENS), answer["logits"].double()), folder.name
