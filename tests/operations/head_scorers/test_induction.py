"""The scorer `induction`: against eager attention, planted heads, and sequences that hold no far copy."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from conftest import TEXT
from families import TINY, double, one_thread  # noqa: F401 (one_thread: a fixture)

from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.operations.head_scorers.induction import copy_mass, repeated
from surgery.operations.head_scorers.scorers import score

SINKS, WINDOW, LENGTH, PERIOD = 2, 9, 180, 45
WORDS = Text("words", "0" * 64, TEXT)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def measured(model, tokenizer, **fields):
    asked = {"sinks": SINKS, "window": WINDOW, "samples": 1, "length": LENGTH, "text": WORDS}
    return score(model, tokenizer, "induction", **asked | fields)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_it_is_the_eager_attention_on_copies_and_what_followed_them(family, tokenizer, monkeypatch):
    """Against the weights of Transformers' own eager path in float64, key by key."""
    model, seen = TINY[family](max_position_embeddings=256), []
    forward = type(model.base_model).forward

    def watched(self, input_ids=None, **kwargs):
        seen.append(input_ids)
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", watched)
    got = measured(model, tokenizer)
    monkeypatch.undo()
    (ids,) = seen
    tokens = ids[0].tolist()
    assert all(tokens[i] == tokens[i - PERIOD] for i in range(PERIOD, LENGTH))
    eager = double(copy.deepcopy(model).eval())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(input_ids=ids, output_attentions=True).attentions
    kv_heads = eager.config.num_key_value_heads
    want = {}
    for kind, ahead in (("echo", 0), ("induction", 1)):
        want[kind] = []
        for table in attentions:
            heads = torch.zeros(table.shape[1], dtype=torch.float64)
            for row in range(LENGTH - PERIOD, LENGTH):
                for key in range(row % PERIOD + ahead, row, PERIOD):
                    if key >= SINKS and row - key >= WINDOW:
                        heads += table[0, :, row, key] / PERIOD
            want[kind].append(heads)
    both = [echo + after for echo, after in zip(want["echo"], want["induction"], strict=True)]
    for found, tables in ((got.scores, both), (got.origin["echo"], want["echo"])):
        expected = torch.stack([table.view(kv_heads, -1).amax(-1) for table in tables])
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), expected, atol=1e-5)
    assert max(map(max, got.scores)) > 0.01


def test_planted_heads():
    """Head 0 looks at the last copy of its token, 1 at what followed the first copy, 2 anywhere else, 3 at a sink."""
    period, length, first = 5, 15, 2
    rows = torch.arange(10, 15)
    weights = torch.zeros(1, 4, 5, length)
    for r, row in enumerate(rows.tolist()):
        weights[0, 0, r, row - period] = 1
        weights[0, 1, r, row - 2 * period + 1] = 1
        weights[0, 2, r, row - 2] = 1
        weights[0, 3, r, 0] = 1
    echo, after = copy_mass(weights, rows, period, first)
    assert echo.tolist() == [1, 0, 0, 0]
    # Row 10 has its first copy at 0, and what followed it at 1: both are among the first two keys.
    assert after.tolist() == pytest.approx([0, 0.8, 0, 0])


def test_sequences_repeat_what_was_drawn():
    ids = repeated([1], [*range(10, 40)], 7, 24, random.Random(0)).tolist()
    assert ids[0] == 1
    assert len(ids) == 24
    assert len(set(ids[1:8])) == 7, "each token once"
    assert all(ids[i] == ids[i - 7] for i in range(8, 24))
    few = repeated([], [3, 4], 7, 14, random.Random(0)).tolist()
    assert few[:7] == few[7:]


def test_a_window_that_hides_all_copies_is_refused(tokenizer):
    model = TINY["llama"](max_position_embeddings=256)
    assert measured(model, tokenizer, window=89).origin["period"] == 90
    for reach in ({"window": 90}, {"sinks": 46}):
        with pytest.raises(SurgeryError, match="no far copy in 180 tokens"):
            measured(model, tokenizer, **reach)
