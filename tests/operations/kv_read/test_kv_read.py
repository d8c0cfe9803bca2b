"""Sparse decoding through the command and the library: plan, directions of keys, card, export, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import MISSING, fields

import pytest
import torch
from dense import batch, chunked, difference, given
from families import TINY
from tokenizers_of_bytes import Letters

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.operations.kv_read.base import NOT_OF_A_READER
from surgery.operations.kv_read.key_directions import key_directions
from surgery.operations.kv_read.operation import METHODS
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime.surgery_config import load_file

SMALL = ("keys=8", "sinks=2", "recent=4", "evaluate.windows=1", "evaluate.length=64")
QUICK = ("--no-gate", "--no-eval")


def recipe(**settings) -> dict:
    return {"version": 1, "name": "reading", "operations": [{"op": "kv_read"} | settings], "evaluate": None}


@pytest.mark.real_process
@pytest.mark.parametrize(("name", "more"), [("tokenselect", ()), ("loki", ("dims=4", "calibration_length=32"))])
def test_through_the_command(surgery, model, tmp_path, name, more):
    done = surgery("apply", name, model, "-o", "out", *more, *SMALL, *QUICK)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out/surgery.json").read_text())
    assert report["tier"] == "surgical"
    assert {item["status"] for item in report["check"]["items"]} <= {"passed", "skipped"}
    assert report["operations"][0]["record"]["layers"] == [0, 1]
    card = (tmp_path / "out/README.md").read_text()
    assert "A decoding step now reads 14 keys" in card
    planned = surgery("plan", name, model, *more, *SMALL, "--json").json
    size = Anatomy.of(model).layers[0].head_dim
    share = 1 + 4 / (2 * size) if name == "loki" else 1
    assert planned["kv_bytes_per_token"]["after"] == planned["kv_bytes_per_token"]["before"] * share
    for engine, file in (("llama.cpp", "out.gguf"), ("vllm", "exported")):
        exported = surgery("export", "out", "--for", engine, "-o", file)
        assert exported.code == 2
        assert "read a part of the cache" in exported.err


@torch.no_grad()
def test_directions_are_those_of_the_keys():
    """Against the keys that stock attention gets, by a singular value decomposition of them all."""
    base = TINY["llama"]().eval()
    sequences = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(2))
    seen: list[list[torch.Tensor]] = [[] for _ in range(base.config.num_hidden_layers)]

    def listen(module, query, key, value, mask, **kwargs):
        seen[module.layer_idx].append(key.double())
        return sdpa(module, query, key, value, mask, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = key_directions(base, sequences, 3)
    sdpa, model = ALL_ATTENTION_FUNCTIONS["sdpa"], copy.deepcopy(base)
    ALL_ATTENTION_FUNCTIONS.register("listening", listen)
    model.config._attn_implementation = "listening"
    for ids in sequences:
        model(ids[None])
    for layer, keys in enumerate(seen):
        every = torch.cat(keys, dim=2)[0]  # [KV heads, tokens, head_dim]
        for head, rows in enumerate(every):
            wanted = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
            assert (wanted @ found[layer][head]).abs().sub(torch.eye(3)).abs().max() <= 1e-4
    assert bool(torch.isfinite(base(sequences).logits).all())


@torch.no_grad()
def test_all_dims_rank_as_the_keys_do():
    """`loki` with a whole basis reads what `index` reads."""
    base = TINY["llama"]().eval()
    ids, mask = batch(base)
    some = {"keys": 5, "sinks": 1, "recent": 3}
    models = {}
    for name, own in (
        ("index", {}),
        ("loki", {"dims": base.config.head_dim, "calibration_samples": 2, "calibration_length": 24}),
    ):
        models[name] = copy.deepcopy(base)
        surgery.apply(recipe(method=name, **some, **own), models[name], tokenizer=Letters())
    steps = [20, *[1] * 25]
    want = chunked(models["index"], ids, mask, steps)
    assert difference(chunked(models["loki"], ids, mask, steps), want, mask) <= 1e-4
    assert difference(want, base(**given(base, ids, mask), use_cache=False).logits, mask) > 1e-3


def test_defaults_are_those_of_the_runtime():
    for name, method in METHODS.items():
        own = {each.name: each.default for each in fields(load_file(f"read.{name}").READER)}
        model_fields = {key: field for key, field in method.model_fields.items() if key not in NOT_OF_A_READER}
        assert set(own) == set(model_fields), name
        for key, field in model_fields.items():
            assert own[key] is MISSING or field.default == own[key], (name, key)


def test_what_streams_or_evicts_is_left_to_itself():
    model = TINY["llama"]().eval()
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 5, "protect_layers": [1]}
    surgery.apply({"version": 1, "name": "split", "operations": [split], "evaluate": None}, model)
    report = surgery.apply(recipe(keys=4, sinks=1, recent=2), model)
    assert report.data["operations"][0]["record"]["layers"] == [1]
    assert ["read" in layer for layer in model.config.surgery["layers"]] == [False, True]
    evicting = TINY["llama"]().eval()
    evict = {"op": "kv_evict", "keys": 4, "sinks": 1, "recent": 2, "interval": 8, "observe": 2, "protect_layers": [0]}
    surgery.apply({"version": 1, "name": "evict", "operations": [evict], "evaluate": None}, evicting)
    report = surgery.apply(recipe(keys=4, sinks=1, recent=2), evicting)
    assert report.data["operations"][0]["record"]["layers"] == [0]


@torch.no_grad()
def test_a_tree_in_prompts_and_in_steps():
    """The operations of the recipe `hip` in one model: each phase as if the other were not there."""
    base = TINY["llama"]().eval()
    sparse = {"op": "sparse_prefill", "method": "hierarchical", "block": 16, "top": 1, "dense_below": 0, "local": 1}
    read = {"op": "kv_read", "method": "tree", "keys": 4, "block": 2, "sinks": 1, "recent": 2}
    both, one = copy.deepcopy(base), copy.deepcopy(base)
    surgery.apply({"version": 1, "name": "hip", "operations": [sparse, read], "evaluate": None}, both)
    surgery.apply({"version": 1, "name": "sparse", "operations": [sparse], "evaluate": None}, one)
    ids, mask = batch(base, (0, 0), 60)
    got, want = (chunked(model, ids, mask, [56, 1, 1, 1, 1]) for model in (both, one))
    assert difference(got[:, :56], want[:, :56], mask[:, :56]) <= 1e-5
    assert difference(got[:, 56:], want[:, 56:], mask[:, 56:]) > 1e-3
    assert {type(module.surgery_keepers["read"]).__name__ for module in runtime.attention_modules(both)} == {
        "LayerReader"
    }


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keys": 0}, "keys"),
        ({"method": "adaptive", "keys": 3}, "keys is for method"),
        ({"method": "index", "every": 3}, "every is for method: tokenselect or recycled, not index"),
        ({"method": "loki", "dims": 0}, "dims"),
        ({"method": "tree", "keys": 4, "block": 8}, "block is 8"),
        ({"method": "nothing"}, "method should be 'tokenselect', 'loki'"),
        ({"layers": [7]}, "there are layers 0 to 1"),
        ({"layers": []}, "no head of these layers sees all tokens"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(SurgeryError) as caught:
        surgery.apply(recipe(**settings), TINY["llama"](), tokenizer=Letters())
    assert says in " ".join([str(caught.value), *map(str, caught.value.others)])
