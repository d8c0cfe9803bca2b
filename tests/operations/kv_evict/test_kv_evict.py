"""KV eviction through the command and the library: plan, choice of heads, card, export, and what is refused."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields

import pytest
import torch
from families import TINY

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.head_scores import HeadScores
from surgery.errors import SurgeryError
from surgery.operations.kv_evict.base import OF_HEADS
from surgery.operations.kv_evict.operation import METHODS
from surgery.runtime.surgery_cache import CACHE
from surgery.runtime.surgery_config import load_file

SMALL = ("keys=8", "sinks=2", "recent=4", "interval=8", "evaluate.windows=1", "evaluate.length=64")
QUICK = ("--no-gate", "--no-eval")


def recipe(**settings) -> dict:
    return {"version": 1, "name": "evicting", "operations": [{"op": "kv_evict"} | settings], "evaluate": None}


def test_through_the_command(surgery, model, tmp_path):
    done = surgery("apply", "evict", model, "-o", "out", "observe=2", *SMALL, *QUICK)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out/surgery.json").read_text())
    assert report["tier"] == "surgical"
    assert {item["status"] for item in report["check"]["items"]} <= {"passed", "skipped"}
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["both ways to load agree"] == "passed"
    assert report["operations"][0]["record"]["evicting"] == [[0, 1, 2], [0, 1, 2]]
    card = (tmp_path / "out/README.md").read_text()
    assert "All KV heads now keep the first 2 and the last 4 tokens and 8 others, chosen every 8 tokens" in card
    assert "A later question finds them only through heads that keep every key" in card
    planned = surgery("plan", "evict", model, "observe=2", *SMALL, "--json").json
    head_dim, kept = Anatomy.of(model).layers[0].head_dim, 2 + 4 + 8 + 8
    assert planned["kv_bytes_per_token"]["after"] == 0
    assert planned["kv_bytes_fixed"]["after"] == 2 * 3 * kept * (2 * head_dim * 2 + 4 + 8)  # bfloat16
    again = surgery("apply", "evict", tmp_path / "out", "-o", "again", "observe=2", *SMALL)
    assert again.code == 2
    assert "sets the visibility of the cache (which keys the cache keeps) already" in again.err
    for engine, file in (("llama.cpp", "out.gguf"), ("vllm", "exported")):
        exported = surgery("export", "out", "--for", engine, "-o", file)
        assert exported.code == 2
        assert "a cache that drops keys" in exported.err


def test_heads_with_the_lowest_scores_evict(surgery, model, tmp_path):
    scores = [[0.1, 0.9, 0.8], [0.7, 0.2, 0.3]]
    path = tmp_path / "scores.json"
    HeadScores("own", scores).save(path)
    done = surgery("apply", "evict-duo", model, "-o", "out", f"scores={path}", "observe=2", *SMALL, *QUICK)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out/surgery.json").read_text())
    assert report["operations"][0]["record"]["evicting"] == [[0], [1, 2]]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [layer["policy"]["heads"] for layer in config["surgery"]["layers"]] == [[0], [1, 2]]
    assert "3 of 6 KV heads now keep" in (tmp_path / "out/README.md").read_text()
    half = surgery("plan", "evict-duo", model, f"scores={path}", "observe=2", *SMALL, "--json").json
    assert half["kv_bytes_per_token"]["after"] == half["kv_bytes_per_token"]["before"] / 2


def test_heads_are_measured(surgery, model):
    asked = ("calibration_samples=1", "calibration_length=96", "scores=far-mass", "observe=2")
    done = surgery("apply", "evict-duo", model, "-o", "out", *asked, *SMALL, *QUICK, "--json")
    assert done.code == 0, done.err
    record = done.json["operations"][0]["record"]
    assert sum(map(len, record["evicting"])) == 3
    assert record["scores"]["method"] == "far-mass"


def test_each_text_chooses_heads(surgery, model, tmp_path):
    done = surgery("apply", "task-kv", model, "-o", "out", "observe=2", *SMALL, *QUICK)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [layer["policy"]["full_heads"] for layer in config["surgery"]["layers"]] == [1, 1]
    card = (tmp_path / "out/README.md").read_text()
    said = (
        "4 of 6 KV heads now keep the first 2 and the last 4 tokens and 8 others, chosen every 8 tokens by the policy "
    )
    said += "task_kv; the other heads keep every key, and each text chooses which heads these are."
    assert said in card
    planned = surgery("plan", "task-kv", model, "observe=2", *SMALL, "--json").json
    pair, kept = 2 * Anatomy.of(model).layers[0].head_dim * 2, 2 + 4 + 8  # bfloat16
    assert planned["kv_bytes_per_token"]["after"] == 2 * (pair + 4)
    assert planned["kv_bytes_fixed"]["after"] == 2 * (3 * (kept + 8) * (pair + 4 + 8) - kept * (pair + 4))
    refused = surgery("plan", "task-kv", model, "observe=2", "full_heads=3", *SMALL)
    assert refused.code == 2
    assert "full_heads is 3 of 3 KV heads, so that none drops a key: at most 2" in refused.err
    refused = surgery("plan", "task-kv", model, "observe=2", "evicting_ratio=0.5", *SMALL)
    assert refused.code == 2
    assert "full_heads says how many" in refused.err


def test_after_a_head_split_the_other_heads_evict():
    base = TINY["llama"]().eval()
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 5, "protect_layers": [1]}
    evict = {"op": "kv_evict", "keys": 4, "sinks": 1, "recent": 2, "interval": 8, "observe": 2}
    both = {"version": 1, "name": "both", "operations": [split, evict], "evaluate": None}
    report = surgery.apply(both, base)
    kv_heads = base.config.num_key_value_heads
    assert report.data["operations"][1]["record"]["evicting"] == [[], list(range(kv_heads))]
    assert Anatomy.of(base).kv_bytes_per_token == 0
    pair = 2 * base.config.head_dim * 4
    assert Anatomy.of(base).kv_bytes_fixed == kv_heads * (6 * pair + 15 * (pair + 12))


def test_defaults_are_those_of_the_runtime():
    for name, method in METHODS.items():
        policy = load_file(f"policy.{name}").POLICY
        own = {each.name: each.default for each in fields(policy)}
        model_fields = {key: field for key, field in method.model_fields.items() if key not in OF_HEADS}
        assert set(own) == set(model_fields), name
        for key, field in model_fields.items():
            if own[key] is not MISSING and key != "output":  # a name in the runtime, and yes or no in a recipe
                assert field.default == own[key], (name, key)


def test_heads_that_are_pruned_later_leave_the_policy(tmp_path):
    base = TINY["llama"]().eval()
    scores = [[0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.2, 0.8]]
    path = tmp_path / "scores.json"
    HeadScores("own", scores).save(path)
    some = {"keys": 4, "sinks": 1, "recent": 2, "interval": 8, "observe": 2, "evicting_ratio": 0.5}
    surgery.apply(recipe(scores=str(path), **some), base)
    assert [layer["policy"]["heads"] for layer in base.config.surgery["layers"]] == [[0, 2], [1, 2]]
    prune = {"op": "prune_heads", "granularity": "kv_group", "heads": [[0, 1], [0, 1]], "refit": False}
    surgery.apply({"version": 1, "name": "prune", "operations": [prune], "evaluate": None}, base)
    assert [layer["policy"]["heads"] for layer in base.config.surgery["layers"]] == [[1], [0, 1]]
    ids = torch.randint(3, 60, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert bool(base(ids).logits.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keys": 0}, "keys"),
        ({"interval": 0}, "interval"),
        ({"interval": 8, "observe": 9}, "observe is 9, more than the interval of 8"),
        ({"method": "norm", "observe": 3}, "observe is for method: attention, caote, lra, lfa or task_kv, not norm"),
        ({"method": "random", "greedy": True}, "greedy is for method: caote, not random"),
        (
            {"method": "caote", "greedy": True, "fast": True},
            "greedy drops keys by the weights since the last decision",
        ),
        ({"method": "nothing"}, "method should be 'attention', 'caote'"),
        ({"when": "prompt_end", "interval": 8}, "interval is for when: blocks"),
        ({"evicting_ratio": 0.0}, "evicting_ratio"),
        ({"evicting_ratio": 0.5, "scores": "nowhere.json"}, "nowhere.json"),
        ({"protect_layers": [0, 1]}, "no KV head is left"),
        ({"protect_layers": [7]}, "there are layers 0 to 1"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(SurgeryError) as caught:
        surgery.apply(recipe(**settings), TINY["llama"]())
    assert says in " ".join([str(caught.value), *map(str, caught.value.others)])


def test_layers_that_slide_by_themselves_are_left_alone():
    with pytest.raises(SurgeryError, match="every layer has a sliding window of the base's own"):
        surgery.apply(recipe(), TINY["mistral"]())
    model = TINY["gemma2"]().eval()
    surgery.apply(recipe(keys=4, sinks=1, recent=2, interval=8, observe=2), model)
    policies = ["policy" in layer for layer in model.config.surgery["layers"]]
    assert policies == [layer.window is None for layer in Anatomy.of(model).layers]


def test_a_second_choice_beside_a_split_is_refused():
    model = TINY["llama"]().eval()
    split = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 5, "protect_layers": [1]}
    surgery.apply({"version": 1, "name": "split", "operations": [split], "evaluate": None}, model)
    with pytest.raises(SurgeryError, match="stream already"):
        surgery.apply(recipe(evicting_ratio=0.5, keys=4, recent=2, interval=8, observe=2), model)


@pytest.mark.real_process
def test_with_merged_heads_and_a_weight_on_the_first_token(surgery, model, tmp_path):
    """`gqa`, `kv_evict` on some heads, `zero_tuning`: one checkpoint, both ways to load, saved again."""
    scores = tmp_path / "scores.json"
    HeadScores("own", [[0.1], [0.7]]).save(scores)
    text = """version: 1
name: three
operations:
  - {op: gqa, kv_heads: 1, method: mean}
  - {op: kv_evict, method: caote, keys: 6, sinks: 1, recent: 3, interval: 8, observe: 2, evicting_ratio: 0.5,
     scores: scores.json}
  - {op: sink_calibration, method: zero_tuning, gamma: 1.7}
heal: null
evaluate: null
"""
    (tmp_path / "three.yaml").write_text(text)
    done = surgery("apply", "three.yaml", model, "-o", "out")
    assert done.code == 0, done.err
    items = {
        item["name"]: item["status"]
        for item in json.loads((tmp_path / "out/surgery.json").read_text())["check"]["items"]
    }
    assert items["both ways to load agree"] == "passed"
    layers = json.loads((tmp_path / "out/config.json").read_text())["surgery"]["layers"]
    assert ["policy" in layer for layer in layers] == [True, False]
    assert all("surgery_log_gamma" in layer["parameters"] for layer in layers)
    assert surgery("check", "out").code == 0


EVICT = {"op": "kv_evict", "keys": 4, "sinks": 1, "recent": 2, "interval": 8, "observe": 2}
READ = {"op": "kv_read", "keys": 4, "sinks": 1, "recent": 2}
GAMMA = {"op": "sink_calibration", "method": "zero_tuning", "gamma": 2.0}
SPARSE = {"op": "sparse_prefill", "block": 16}


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([READ, EVICT], "a reader and a policy for KV heads"),
        ([EVICT, READ], "no head of these layers sees all tokens"),
        ([SPARSE, EVICT], "and sparse, which needs all keys in order"),
        ([EVICT, SPARSE], "and sparse, which needs all keys in order"),
        ([EVICT | {"sinks": 0}, GAMMA], "bias, which needs the first token"),
        ([READ | {"sinks": 0}, GAMMA], "bias, which needs the first token"),
        ([EVICT, EVICT], "sets the visibility of the cache of the same heads"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_plan(steps, says):
    with pytest.raises(SurgeryError) as caught:
        surgery.plan({"version": 1, "name": "both", "operations": steps, "evaluate": None}, TINY["llama"]())
    assert says in " ".join([str(caught.value), *map(str, caught.value.others)])


def test_after_heads_that_are_read_unequally():
    """Nothing is measured where all heads evict, so that groups of any size do."""
    model = TINY["llama"]().eval()
    prune = {"op": "prune_heads", "granularity": "head", "heads": [[0], [3]], "refit": False}
    surgery.apply({"version": 1, "name": "both", "operations": [prune, EVICT], "evaluate": None}, model)
    ids = torch.randint(3, 60, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        out = model(ids[:, :11], use_cache=True)
        rest = model(ids[:, 11:], use_cache=True, **{CACHE: out[CACHE]}).logits
    assert (torch.cat([out.logits, rest], 1) - want).abs().max() <= 1e-5 * want.std()
    some = {"version": 1, "name": "both", "operations": [prune, EVICT | {"evicting_ratio": 0.5}], "evaluate": None}
    with pytest.raises(SurgeryError, match="put it before prune_heads"):
        surgery.plan(some, TINY["llama"]())
