"""The benchmark of sparse prefill: on text where the weights are real, with the share of pairs that was multiplied."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)

from surgery.data.text import load_text
from surgery.evaluation.benchmark.models import RANDOM, make_prompts, sparse_figures
from surgery.evaluation.benchmark.result import SPLIT, STOCK

WINDOW = ("method=streaming", "block=16", "gamma=null", "dense_below=32", "sinks=1", "window=1")


@pytest.fixture
def made(surgery, model, tmp_path):
    def apply(*fields):
        done = surgery(
            "apply", "sparse-prefill", model, "-o", "out", "--no-check", "--no-eval", "--overwrite", *fields
        )
        assert done.code == 0, done.err

    return apply


def test_prompts_are_one_text_cut_to_each_length(model):
    from transformers import AutoTokenizer

    prompts, what, reason = make_prompts(model, 64, (40, 300))
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = load_text(part="calibration")
    wanted = tokenizer(text.text, add_special_tokens=False)["input_ids"][:300]
    assert prompts[300].tolist() == [wanted]
    assert prompts[40].tolist() == [wanted[:40]]
    assert (what, reason) == (text.title, "")


def test_random_tokens_where_there_is_no_text(model):
    prompts, what, reason = make_prompts(None, 64, (40, 300))
    assert (what, reason) == (RANDOM, "")
    assert prompts[300].shape == (1, 300)
    assert 0 <= prompts[300].min() < prompts[300].max() < 64
    assert torch.equal(prompts[40], make_prompts(None, 64, (40, 300))[0][40])
    assert "the text is too short" in make_prompts(model, 64, (10**6,))[2]
    (model / "tokenizer.json").unlink()
    _, what, reason = make_prompts(model, 64, (40,))
    assert (what, reason) == (RANDOM, "no tokenizer files")


def test_pairs_that_were_multiplied(surgery, made, model):
    """Blocks 3 to 8 of 150 tokens read the first block and their own, the others all: 2 of 3 is more than 0.6."""
    made(*WINDOW)
    args = ("bench", "out", "--base", model, "--lengths", "24,150", "--rounds", "1", "--decode", "1")
    result = surgery(*args, "--json").json
    own = 9 * 16 * 17 // 2 + 6 * 7 // 2
    before = 16 * 16 * (1 + 2 + 6) + 6 * 9 * 16  # blocks before their own: of rows 1, 2, 3 to 8, and 9, which is cut
    read = own + before
    rows = {row["length"]: row for row in result["ratios"]}
    assert rows[150]["pairs_read"] == pytest.approx(read / (150 * 151 / 2))
    assert rows[150]["multiply_adds"] == pytest.approx(rows[150]["pairs_read"])  # no estimator
    assert rows[24]["pairs_read"] == 1
    work = {t["model"]: t["work"] for t in result["timings"] if t["length"] == 150}
    assert work[STOCK] == {}
    assert set(work[SPLIT]) == {"attention", "estimator"}
    said = surgery(*args).out
    assert "converted: sparse prefill beyond 32 tokens, streaming, in 2 layers" in said
    assert f"at 24, {read / (150 * 151 / 2):.1%} at 150" in said
    assert "prompts: Python" in said
    assert "note:" not in said


def test_random_weights_say_nothing_of_lists_that_follow_from_text(surgery, made, model):
    args = ("bench", "out", "--base", model, "--lengths", "300", "--rounds", "1", "--decode", "1", "--synthetic")
    made("block=16", "every=8", "dense_below=32")
    said = surgery(*args).out
    assert "note: how many blocks the sparse prefill reads follows from text and weights" in said
    assert "prompts: random tokens" in said
    made("block=16", "every=8", "dense_below=32", "gamma=null", "density=0.2")
    result = surgery(*args, "--json").json
    assert result["notes"] == []
    assert result["sparse"] == {"layers": 2, "methods": ["sampled"], "dense_below": [32], "by_text": False}
    assert result["ratios"][0]["pairs_read"] < 0.5
    assert result["ratios"][0]["multiply_adds"] > result["ratios"][0]["pairs_read"]


def test_facts():
    entries = [{"sparse": {"method": "pooled", "dense_below": 8}}, {}, {"sparse": {"method": "streaming"}}]
    facts = sparse_figures(SimpleNamespace(surgery={"layers": entries}))
    assert facts == {"layers": 2, "methods": ["pooled", "streaming"], "dense_below": [0, 8], "by_text": True}
    assert sparse_figures(SimpleNamespace(surgery={"layers": [{}]})) is None
    assert sparse_figures(SimpleNamespace()) is None
