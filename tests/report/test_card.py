"""The card says what surgery.json says, passes through the Hub's own parser, and survives missing pieces."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

import surgery
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
    "operations": [
        {
            "op": "gqa",
            "record": {},
            "words": {
                "title": "1 KV head (GQA, was 3)",
                "done": "In each of its 30 layers, 3 KV heads were merged into 1 (method: mean), without training.",
                "gain": "",
                "use": "Use it where the KV cache is the limit: many or long sequences at once.",
                "avoid": "Do not use it where it must copy from its prompt.",
            },
        }
    ],
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
NEEDLES = {
    "status": "done",
    "settings": {"lengths": [1024], "secret": "digits", "text": {"title": "Help | topics"}},
    "needles": 12,
    "base": {"hits": 12, "of": 12, "accuracy": 1.0},
    "out": {"hits": 0, "of": 12, "accuracy": 0.0},
    "kept": {"of": 12, "kept": 0, "share": 0.0, "low": 0.0, "high": 0.25},
}
CHAT = {
    "status": "done",
    "settings": {"requests": "ten requests", "tokens": 128, "margin": 0.5},
    "base": {"answered": 9, "of": 10, "share": 0.9},
    "out": {"answered": 1, "of": 10, "share": 0.1},
    "kept": {"of": 9, "kept": 1, "share": 1 / 9, "low": 0.0, "high": 0.4},
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
        "model-index": data["model-index"],
    }
    head = render_card(REPORT, BASE_CARD).partition("\n---\n")[0]
    keys = [line.partition(":")[0] for line in head.splitlines()[1:] if line[:1].isalpha()]
    assert keys.index("base_model_relation") == keys.index("base_model") + 1
    assert keys[-1] == "model-index"


def test_what_was_measured_is_listed_on_the_hub():
    kept = {"of": 12, "kept": 0, "share": 0.0, "low": 0.0, "high": 0.25}
    evaluation = REPORT["evaluation"] | {"needles": NEEDLES | {"kept": kept}, "chat": CHAT}
    evaluation["kl"] = {"mean": None, "p99": None, "top_k": 512}
    results = ModelCard(render_card(changed(evaluation=evaluation), None)).data.eval_results
    figures = {(each.metric_type, each.metric_name): (each.metric_value, each.metric_args) for each in results}
    assert figures == {
        ("perplexity", "perplexity"): (15.2, {"base": 13.3}),
        ("accuracy", "same best token as the base"): (0.875, None),
        ("recall", "hidden passkeys found"): (0.0, {"base": 1.0}),
        ("accuracy", "short requests answered"): (0.1, {"base": 0.9}),
    }, "a KL that is no number is left out"
    assert results[0].dataset_name == "Help | topics"
    assert results[0].dataset_args == {"sha256": "0123456789abcdef", "windows": 8, "length": 512}
    unmeasured = changed(evaluation={"status": "not run", "reason": "memory"})
    assert "model-index" not in render_card(unmeasured, BASE_CARD)


def test_body():
    card = render_card(REPORT, BASE_CARD)
    for said in (
        "# Base-1B with 1 KV head (GQA, was 3)\n\nThis is [org/Base-1B](https://huggingface.co/org/Base-1B), conv",
        "In each of its 30 layers, 3 KV heads were merged into 1 (method: mean), without training.",
        "Its KV cache takes 0.333 of the base's (23,040 → 7,680 bytes per token).",
        "Its weights are 0.934 of the base's.",
        "Measured against its base: perplexity 13.30 → 15.20, KL 0.123 nats, same best token 87.5%.",
        "Use it where the KV cache is the limit",
        "Do not use it where it must copy",
        "**native**",
        "| perplexity | 13.3 | 15.2 | 1.143 |",
        "| cross-entropy, nats per token | 2.5880 | 2.7210 |  |",
        "| KL from the base, mean, nats per token |  | 0.123 |  |",
        "| same best token as the base |  | 87.5% |  |",
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
        "Every score in it is the base's, not the converted model's.",
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
    assert first.startswith("> **This model is far from its base: ")
    assert said in first
    assert "\n>\n> **Not usable before healing.**" in first
    assert "**The quality gate failed:** max_kl: 5.25, the limit is 1." in first
    assert "| nan |" not in body


@pytest.mark.parametrize("status", ["skipped", "not run", None])
def test_an_unmeasured_model_says_so_first(status):
    reason = {"status": "not run", "reason": "needs 90.0 GB of memory, 3.0 GB are free"}
    report = changed(
        evaluation=reason | {"out": {"load_bytes": 1000}, "base": None},
        gate={"status": status, "limits": {"max_kl": 1}},
    )
    card = render_card(report, None)
    assert "> **Not measured.** Measure this model before you rely on it" in card
    assert "What it lost was not measured, so measure it" in card
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


def test_surgical_folders_show_both_ways_to_load():
    card = render_card(changed(tier="surgical", code={"modeling_surgery.py": "ef" * 32}), None)
    assert (
        card.index("pip install attention-surgery")
        < card.index("surgery.register()")
        < card.index(".from_pretrained(")
    )
    assert "trust_remote_code=True, revision=revision" in card
    assert "*unchanged* attention" in card
    assert "`LlamaForCausalLM.from_pretrained`) loads this folder without an error" in card
    assert "Pin `revision` to a full commit hash" in card
    assert f"`modeling_surgery.py`: sha256 `{'ef' * 32}`" in card
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


def test_notes_of_the_plan_are_in_how_it_was_made():
    plan = REPORT["plan"] | {"notes": ["x is not a known family: its attention was understood by shape, a guess"]}
    before, _, made = render_card(changed(plan=plan), None).partition("## How it was made")
    assert "- X is not a known family: its attention was understood by shape, a guess." in made
    assert "known family" not in before


def test_the_command_is_there_only_where_one_repeats_it():
    command = "surgery apply gqa"
    assert command in render_card(REPORT, None)
    own = render_card(changed(recipe_source="file"), None)
    assert command not in own
    assert "The recipe was its author's own" in own
    memory = render_card(changed(in_memory={"class": "LlamaForCausalLM"}, notices=[]), None)
    assert command not in memory
    assert "no command repeats it" in memory
    assert "in [org/Base-1B](https://huggingface.co/org/Base-1B); add them to this folder" in memory


def test_no_limits_are_no_gate():
    card = render_card(changed(gate={"status": "not run", "limits": {}}), None)
    assert "> " not in card.partition("## What it costs")[0]
    assert "- quality gate: **none** (no limits)" in card


def test_streaming_heads_show_what_does_not_grow():
    plan = REPORT["plan"] | {"kv_bytes_fixed": {"before": 0, "after": 5120}}
    assert "| KV cache, bytes that do not grow | 0 | 5,120 |  |" in render_card(changed(plan=plan), None)
    assert "that do not grow" not in render_card(REPORT, None)
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


def first_lines(**changes) -> str:
    return split_card(render_card(changed(**changes), None))[1].strip().split("\n\n")[1]


def test_the_worst_damage_stands_first():
    evaluation = REPORT["evaluation"] | {"needles": NEEDLES, "chat": CHAT}
    assert first_lines(evaluation=evaluation) == (
        "> **This model no longer copies from its prompt: 0 of 12 hidden passkeys found; the base finds 12.**\n>\n"
        "> **Not usable before healing.** Also, it answers 1 of the 9 short requests that the base answers."
    )
    some = NEEDLES | {"out": {"hits": 5, "of": 12}, "kept": NEEDLES["kept"] | {"kept": 5}}
    lines = first_lines(evaluation=evaluation | {"needles": some}).split("\n>\n> ")
    assert lines == [
        "> **This model no longer answers most short requests: 1 of the 9 that the base answers.**",
        "**Not usable before healing.**",
        "This model hardly copies any more from its prompt: 5 of 12 hidden passkeys found; the base finds 12.",
    ]
    kept = NEEDLES | {"out": {"hits": 11, "of": 12}, "kept": NEEDLES["kept"] | {"kept": 11}}
    assert not first_lines(evaluation=REPORT["evaluation"] | {"needles": kept}).startswith(">")


def test_a_gate_is_never_said_not_to_be_run_above_figures():
    limits = {"max_kl": 0.1, "min_needles": 0.5}
    skipped = first_lines(gate={"status": "skipped", "limits": limits})
    assert skipped.startswith("> **The limits of the recipe were set aside** (`--no-gate`). It would have failed: ")
    passing = first_lines(gate={"status": "skipped", "limits": {"max_kl": 1.0}})
    assert passing.endswith("It would have passed.")
    missing = first_lines(gate={"status": "not run", "limits": {"min_needles": 0.5}})
    assert missing == "> **The quality gate is undecided**: min_needles: it was not asked for."
    for lines in (skipped, passing, missing):
        assert "not run" not in lines


def test_a_card_that_is_written_before_the_scores_says_so():
    early = changed(evaluation=None, gate={"status": "not run", "limits": {"max_kl": 1.0}})
    card = render_card(early, None)
    assert "**not measured**: this card was written before the scores that its recipe asks for." in card
    unasked = early | {"recipe": REPORT["recipe"] | {"evaluate": None}, "gate": {"status": "not run", "limits": {}}}
    assert "its recipe asks for no evaluation" in render_card(unasked, None)
    assert "not run" not in card.partition("## Checks")[0]


@pytest.mark.parametrize("heal", [{}, {"heal": None}])
def test_the_title_says_what_changed(heal):
    words = [{"title": "3 things", "done": "Three were made."}, {"title": "a fourth", "done": "One more.", "later": 1}]
    operations = [{"op": "gqa", "record": {}, "words": each} for each in words] + [{"op": "act", "record": {}}]
    card = render_card(changed(operations=operations, **heal), None)
    assert "# Base-1B with 3 things and a fourth\n" in card
    assert "Three were made. One more." in card
    assert "What changed:" not in card
    assert ModelCard(card).data.model_name == "Base-1B with 3 things and a fourth"


WORDS = [  # operation, what its record has, the title
    ({"op": "gqa", "kv_heads": 1, "method": "mean"}, {}, "1 KV head (GQA, was 3)"),
    ({"op": "gqa", "kv_heads": 1, "keep_layers": 0.5, "method": "closed_form"}, {},
     "1 KV head in 1 layer (GQA, was 3)"),
    ({"op": "gqa", "kv_heads": [3, 1]}, {}, "1 KV head in 1 layer (GQA, was 3)"),
    ({"op": "gqa", "kv_heads": 3}, {}, None),
    ({"op": "expand"}, {}, "9 KV heads (repeated, was 3)"),
    ({"op": "duo_attention"}, {"streaming": [[0], [1, 2]]}, "3 of 6 KV heads streaming (DuoAttention)"),
    ({"op": "duo_attention", "streaming_ratio": None, "threshold": 0.1}, {"streaming": [[0], []]},
     "1 of 6 KV heads streaming (DuoAttention)"),
    ({"op": "duo_attention", "streaming_ratio": 0.0}, {"streaming": [[], []]}, None),
    ({"op": "duo_attention", "streaming_ratio": 1.0, "window": 8, "sinks": 2}, {"streaming": [[0, 1, 2]] * 2},
     "a cache that stops growing (all KV heads see only 2 sinks + 8 tokens)"),
    ({"op": "moh"}, {}, "67% of its query heads on for a token (MoH)"),
    ({"op": "mae"}, {}, "a mixture of its heads (MAE)"),
    ({"op": "prune_heads", "per_layer": 1}, {}, "6 query heads (pruned, was 9)"),
    ({"op": "prune_heads", "granularity": "head", "heads": [[4], []]}, {}, "1 of 18 query heads pruned"),
    ({"op": "sink_calibration", "method": "zero_tuning"}, {}, "other weights on the first token (ZeroTuning)"),
    ({"op": "sparse_prefill", "method": "flexprefill"}, {}, "sparse prefill (flexprefill)"),
    ({"op": "head_mask", "values": {0: {1: 0.5, 2: 0.0}}}, {}, "gates on 2 of 18 query heads"),
    ({"op": "head_mask", "values": {0: {1: 1.0}}}, {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "record", "title"), WORDS)
def test_each_operation_has_words_for_what_it_did(operation, record, title):
    from conftest import LLAMA
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    (step,) = surgery.plan({"version": 1, "name": "x", "operations": [operation]}, model).steps
    kept = step.record(record)
    assert kept.get("words", {}).get("title") == title
    assert set(kept) == {"op", "record"} | ({"words"} if title else set())
    if title:
        assert kept["words"]["done"].endswith(".")


def test_an_operation_that_says_nothing_of_itself_is_named():
    recipe, plan = {"operations": [{"op": "of_a_plug_in"}]}, {"changes": ["all is other"]}
    report = changed(recipe=recipe, plan=plan, operations=[{"op": "of_a_plug_in", "record": {}}])
    card = render_card(report, None)
    assert "# Base-1B, of_a_plug_in\n" in card
    assert "What changed: all is other." in card


def test_a_base_without_a_licence():
    card = render_card(REPORT, "---\ntags: [a]\n---\nA model.")
    assert ModelCard(card).data.license is None
    assert "the base's card does not name it, so ask its author" in card


def test_pictures_are_shown_where_they_are_carried():
    heal = {
        "settings": {"method": "full", "loss": "distill", "length": 8}, "parameters": 5, "tokens": 64, "steps": 2,
        "step_tokens": 32, "minutes": 1, "processes": 1, "device": "cpu",
    }  # fmt: skip
    files = {"heads.png": {"sha256": "", "bytes": 1}, "healing/loss.png": {"sha256": "", "bytes": 1}}
    card = render_card(changed(heal=heal, other_files=files), None)
    assert "](heads.png)" in card
    assert "](healing/loss.png)" in card
    assert "](h" not in render_card(changed(heal=heal, other_files={}), None).replace("](https://", "")


def test_the_address_of_the_project_is_that_of_the_package(monkeypatch):
    from importlib import metadata
    from types import SimpleNamespace

    from surgery.report import card_summary

    urls = ["Issues, https://example.org/i", "Repository, https://example.org/r"]
    for entries, said in ((urls, "[attention-surgery](https://example.org/r)"), (None, "with attention-surgery.")):
        monkeypatch.setattr(metadata, "metadata", lambda name, e=entries: SimpleNamespace(get_all=lambda key: e))
        card_summary.project_url.cache_clear()
        assert said in render_card(REPORT, None)
    card_summary.project_url.cache_clear()
