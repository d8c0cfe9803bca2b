"""The card says what surgery.json says, passes through the Hub's own parser, and survives missing pieces."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from surgery.io.files import split_card
from surgery.report.card import render_card

SIDE = {"cross_entropy": 2.588, "kv_bytes_per_token": 23040, "load_bytes": 269_060_552}
REPORT = {
    "format": 1,
    "created": "2026-01-02T03:04:05Z",
    "tier": "native",
    "engine": "streaming",
    "base": {
        "name": "org/Base-1B@main",
        "hub_id": "org/Base-1B",
        "base_model": "org/Base-1B",
        "revision": "c" * 40,
        "model_type": "llama",
        "fingerprint": "f00d",
        "note": None,
    },
    "recipe": {
        "version": 1,
        "name": "gqa",
        "description": "Shared heads.",
        "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}],
        "heal": None,
        "evaluate": {"text": "builtin", "max_kl": 1.0},
    },
    "recipe_source": "gqa",
    "overrides": ["kv_heads=1", "note=two words"],
    "plan": {
        "changes": ["KV heads 3 → 1 in 30 layers"],
        "parameters": {"before": 134_515_008, "after": 125_668_800},
        "kv_bytes_per_token": {"before": 23040, "after": 7680},
    },
    "versions": {"python": "3.11.9", "torch": "2.13.0", "surgery": "0.1.0"},
    "threads": 2,
    "seeds": {"recipe": 0},
    "files": {"model.safetensors": {"sha256": "ab" * 32, "bytes": 10}},
    "notices": ["LICENSE"],
    "left_behind": ["pytorch_model.bin"],
    "check": {
        "passed": True,
        "items": [
            {"name": "reload", "status": "passed", "detail": "stock Transformers, fresh process"},
            {"name": "identity", "status": "not run", "detail": "needs 40 GB"},
        ],
    },
    "evaluation": {
        "status": "done",
        "text": {"title": "Help | topics", "sha256": "0123456789abcdef", "tokens": 4088, "windows": 8, "length": 512},
        "base": SIDE | {"perplexity": 13.3},
        "out": SIDE | {"perplexity": 15.2, "cross_entropy": 2.721, "kv_bytes_per_token": 7680},
        "kl": {"mean": 0.123, "p99": 1.25, "top_k": 512},
        "top1_agreement": 0.875,
    },
    "gate": {"status": "passed", "limits": {"max_kl": 1.0}, "reasons": []},
    "history": [],
}
BASE_CARD = """---
license: other
license_name: base-licence
license_link: LICENSE
language: [en, no]
pipeline_tag: text-generation
tags: [chat, onnx, base_model:quantized:org/x, text-generation-inference, code]
datasets: [org/data]
widget:
- text: Hello
extra_gated_prompt: Agree!
model-index:
- name: Base-1B
  results:
  - task: {type: text-generation}
    dataset: {type: mmlu, name: MMLU}
    metrics: [{type: acc, value: 99.9}]
---

# Base-1B

MMLU: 99.9. ```unclosed
"""


def changed(**changes) -> dict:
    return copy.deepcopy(REPORT) | changes


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_card(REPORT, BASE_CARD)).data.to_dict()
    assert data == {
        "base_model": "org/Base-1B",
        "base_model_relation": "finetune",
        "language": ["en", "no"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "base-licence",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["attention-surgery", "gqa", "chat", "code"],
    }


def test_body():
    card = render_card(REPORT, BASE_CARD)
    for said in (
        "# Base-1B, gqa\n\nMade from [org/Base-1B](https://huggingface.co/org/Base-1B)",
        "KV heads 3 → 1 in 30 layers. The result",
        "**native**",
        "| perplexity | 13.3 | 15.2 | 1.14 |",
        "| cross-entropy, nats per token | 2.5880 | 2.7210 |  |",
        "| KL from the base, mean, nats per token |  | 0.123 |  |",
        "| top-1 agreement with the base |  | 87.5% |  |",
        "| KV cache, bytes per token | 23,040 | 7,680 | 0.333 |",
        "| parameters | 134,515,008 | 125,668,800 | 0.934 |",
        "*Help | topics* (sha256 `0123456789ab`, 4,088 tokens, 8 windows of 512)",
        "base's 512 likeliest tokens",
        "AutoModelForCausalLM.from_pretrained(",
        "- reload: **passed** (stock Transformers, fresh process)",
        "- identity: **not run** (needs 40 GB)",
        "- quality gate, max_kl 1.0: **passed**",
        "the FLOPs of prefill do not change",
        f"surgery apply gqa org/Base-1B@{'c' * 40} -o OUT kv_heads=1 'note=two words'",
        "torch 2.13.0",
        "- threads: 2",
        "`pytorch_model.bin`",
        "ab" * 32,
        "**base-licence** (LICENSE)",
        "are in this folder: `LICENSE`.",
        "Every score in it is the base's, not this model's.",
    ):
        assert said in card, said
    assert "Not usable" not in card
    assert "trust_remote_code" not in card
    below = card.partition("## The base model's card")[2]
    assert "MMLU: 99.9" in below, "the base's text is kept, below everything of ours"
    recipe = card.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(recipe) == REPORT["recipe"]


@pytest.mark.parametrize(
    ("out", "kl", "said"),
    [
        ({"perplexity": 2700.0}, {"mean": 0.5}, "its perplexity is 203 times the base's."),
        ({"perplexity": 14.0}, {"mean": 5.25}, "its mean KL to the base is 5.25 nats per token."),
        (
            {"perplexity": None},
            {"mean": None},
            "its perplexity is not a number and its KL to the base is not a number.",
        ),
        ({"perplexity": float("nan")}, None, "its perplexity is not a number."),
        ({"perplexity": float("inf")}, {"mean": 2.0}, "not a number and its mean KL"),
    ],
)
def test_an_unusable_model_says_so_first(out, kl, said):
    evaluation = REPORT["evaluation"] | {"out": SIDE | out, "kl": kl}
    gate = {"status": "failed", "limits": {"max_kl": 1.0}, "reasons": ["max_kl: 5.25, the limit is 1"]}
    _, body = split_card(render_card(changed(evaluation=evaluation, gate=gate), None))
    title, first = body.strip().split("\n\n")[:2]
    assert title.startswith("# ")
    assert first.startswith("> **Not usable before healing.**")
    assert said in first
    assert "**The quality gate failed.** max_kl: 5.25, the limit is 1" in first
    assert "| nan |" not in body


@pytest.mark.parametrize("status", ["skipped", "not run", None])
def test_an_unmeasured_model_says_so_first(status):
    reason = {"status": "not run", "reason": "needs 90.0 GB of memory, 3.0 GB are free"}
    report = changed(
        evaluation=reason | {"out": {"load_bytes": 1000}, "base": None},
        gate={"status": status, "limits": {"max_kl": 1}},
    )
    card = render_card(report, None)
    assert f"> **The quality gate: {status or 'not run'}.**" in card
    assert "**not measured**: needs 90.0 GB of memory" in card
    assert "| KV cache, bytes per token | 23,040 | 7,680 | 0.333 |" in card, "known from the plan"
    assert "Not usable" not in card


def test_a_passed_gate_needs_no_warning():
    assert "\n> " not in render_card(REPORT, None)


@pytest.mark.parametrize("key", [*REPORT, "everything"])
@pytest.mark.parametrize("missing", ["absent", None])
def test_any_piece_may_be_missing(key, missing):
    report = {name: value for name, value in REPORT.items() if key not in (name, "everything")}
    if missing is None:
        report |= dict.fromkeys(REPORT if key == "everything" else [key])
    card = render_card(report, None)
    assert ModelCard(card).data.to_dict()["tags"][0] == "attention-surgery"
    assert "None" not in card
    assert "The base model's card" not in card


def test_only_a_hub_id_is_a_base_model():
    base = {"name": "/home/someone/secret/model", "hub_id": None, "base_model": None}
    card = render_card(changed(base=base), None)
    assert "/home" not in card
    assert "someone" not in card
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "`model`" in card
    demo = {"name": "smollm2-135m", "base_model": "org/Demo", "note": "dequantised Q4_1 weights"}
    card = render_card(changed(base=demo), None)
    assert ModelCard(card).data.base_model == "org/Demo"
    assert "apply gqa smollm2-135m -o OUT" in card
    assert "Base: dequantised Q4_1 weights." in card, "beside the numbers"
    second = render_card(changed(base=base, history=[changed(base=demo)]), None)
    assert ModelCard(second).data.base_model == "org/Demo", "the nearest ancestor on the Hub"
    assert "- earlier surgeries: gqa on smollm2-135m" in second


def test_surgical_folders_show_both_doors():
    card = render_card(changed(tier="surgical", code={"modeling_surgery.py": "ef" * 32}), None)
    assert "surgery.load(" in card
    assert "trust_remote_code=True, revision=revision" in card
    assert "*unchanged* attention" in card
    assert "`LlamaForCausalLM.from_pretrained`) loads this folder without an error" in card
    assert "Pin `revision` to a full commit hash" in card
    assert f"`modeling_surgery.py` sha256 `{'ef' * 32}`" in card
    assert "custom_code" in ModelCard(card).data.tags


@pytest.mark.parametrize(
    ("card", "body"),
    [
        ("no metadata\n---\nhere", "no metadata\n---\nhere"),
        ("---\n---\nempty", "empty"),
        ("---\n[not, a, dict]\n---\ntext", "text"),
        ("---\nbad: [yaml\n---\ntext", "text"),
        ("---\ntags: 5\nlanguage: no\n---\ntext", "text"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\ntext", "text"),
        ("---\nmodel-index: nonsense\n---\ntext", "text"),
        ("---\nnever closed", "---\nnever closed"),
        ("", ""),
    ],
)
def test_any_base_card(card, body):
    assert split_card(card)[1] == body
    made = render_card(REPORT, card)
    assert ModelCard(made).data.base_model == "org/Base-1B"
    assert made.rstrip().endswith(body.strip() or "as said above.")


def test_backticks_in_a_recipe_stay_inside():
    report = changed(recipe=REPORT["recipe"] | {"description": "a ``` fence"})
    assert "````yaml\n" in render_card(report, None)


def test_imports_nothing_heavy():
    code = (
        "import sys, json, surgery.report.card as card\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "card.render_card(json.load(sys.stdin), '# base')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(REPORT), text=True, check=True)


def test_a_composite_is_loaded_with_the_class_that_fits():
    card = render_card(changed(base=REPORT["base"] | {"composite": True}), None)
    assert "AutoModelForImageTextToText.from_pretrained(" in card
    assert "AutoModelForCausalLM" not in card
    assert ModelCard(card).data.pipeline_tag == "image-text-to-text"


def test_notes_of_the_plan_are_limits():
    plan = REPORT["plan"] | {"notes": ["x is not a known family: its attention was understood by shape, a guess"]}
    limits = render_card(changed(plan=plan), None).partition("## Limits")[2].partition("## Recipe")[0]
    assert "- X is not a known family: its attention was understood by shape, a guess." in limits


def test_the_command_is_there_only_where_one_repeats_it():
    command = "surgery apply gqa"
    assert command in render_card(REPORT, None)
    own = render_card(changed(recipe_source="file"), None)
    assert command not in own
    assert "The recipe was its author's own" in own
    memory = render_card(changed(in_memory={"class": "LlamaForCausalLM"}, notices=[]), None)
    assert command not in memory
    assert "no command repeats it" in memory
    assert "This folder holds no licence or notice file of the base; add them" in memory


def test_no_limits_are_no_gate():
    card = render_card(changed(gate={"status": "not run", "limits": {}}), None)
    assert "> " not in card.partition("## What it costs")[0]
    assert "- quality gate: **none** (no limits)" in card


def test_streaming_heads_show_what_does_not_grow():
    plan = REPORT["plan"] | {"kv_bytes_fixed": {"before": 0, "after": 5120}}
    assert "| KV cache, bytes of sinks and windows (fixed) | 0 | 5,120 |  |" in render_card(changed(plan=plan), None)
    assert "sinks and windows" not in render_card(REPORT, None)
    ops = {"operations": [{"op": "duo_attention", "streaming_ratio": 0.5}]}
    assert "Streaming heads do not see" in render_card(changed(recipe=REPORT["recipe"] | ops), None)


def test_a_status_measured_is_shown():
    items = [{"name": "logits against base", "status": "measured", "detail": "0.1"}]
    assert "- logits against base: **measured** (0.1)" in render_card(
        changed(check={"passed": True, "items": items}), None
    )


def test_limits_are_the_operations_own(monkeypatch):
    from surgery.operations.gqa.operation import GQA

    mean, fitted = ({"operations": [{"op": "gqa", "kv_heads": 2, "method": how}]} for how in ("mean", "closed_form"))
    cards = [render_card(changed(recipe=REPORT["recipe"] | ops), None) for ops in (mean, fitted)]
    assert ["closed_form fits weights to its calibration text" in card for card in cards] == [False, True]
    assert all("Fewer KV heads save KV-cache memory" in card for card in cards)
    monkeypatch.setattr(GQA, "LIMITATIONS", ("Of the closed form.", "It limits this.", "And that."))
    assert "- It limits this.\n- And that.\n" in render_card(changed(recipe=REPORT["recipe"] | mean), None)
    other = {"operations": [{"op": "gqa", "kv_heads": 2, "of_another_version": 1}]}
    assert "- Of the closed form.\n- It limits this.\n" in render_card(changed(recipe=REPORT["recipe"] | other), None)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"kept": False}, "no setting was kept (none that was tried lowers the cross-entropy), so it changes"),
        ({"kept": False, "held_back_before": 2.5, "held_back_change": 0.01, "standard_error": 0.002},
         "no setting was kept (cross-entropy on what was held back 2.5000, change +0.0100 ± 0.0020: a gain of two"),
        ({"kept": True, "held_back_before": 2.5, "held_back_change": -0.01, "standard_error": 0.002},
         "a setting was kept (cross-entropy on what was held back 2.5000, change -0.0100 ± 0.0020: a gain of over"),
        ({"kept": False, "held_back_before": 2.5, "held_back_change": -0.1, "standard_error": None},
         "no setting was kept (what was held back is one piece, or copies of one, so that a gain has no"),
        ({"kept": False, "held_back_before": None, "held_back_change": None, "standard_error": 0.0}, "no setting was"),
    ],
)  # fmt: skip
def test_a_search_says_whether_it_kept_anything(record, words):
    record |= {"method": "zero_tuning", "objective": "ce"}
    card = render_card(changed(operations=[{"op": "sink_calibration", "record": record}]), None)
    assert f"sink_calibration zero_tuning: {words}" in card.partition("## What it costs")[0]
    assert "setting was" not in render_card(REPORT, None)
