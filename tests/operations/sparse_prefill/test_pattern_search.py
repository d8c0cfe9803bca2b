"""The pattern of each head: what patterns hold and cost, by loops; planted heads; that a model is left as it was."""

from __future__ import annotations

import pytest
import torch
from families import base, one_thread  # noqa: F401 (a fixture)

from surgery.calibration.attention_hook import attention_weights
from surgery.errors import SurgeryError
from surgery.operations.sparse_prefill.pattern_search import best, candidates, measure, search_patterns
from surgery.runtime.surgery_estimators import choose, settings_problems


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def test_weight_and_cost_are_those_of_the_kept_blocks_entry_by_entry():
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 90, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 2, 90, 8, generator=generator, dtype=torch.float64)
    rows = torch.tensor([11, 40, 64, 89])
    among = [
        {"method": "streaming", "sinks": 2, "window": 20},
        {"method": "block_topk", "top": 2, "votes": 0.3},
        {"method": "pooled", "density": 0.5},
    ]
    weights = attention_weights(query, key, rows, scale=0.5)
    recovered, cost = measure(query, key, weights, rows, 0.5, 16, among)
    assert recovered.shape == cost.shape == (3, 4)
    for index, pattern in enumerate(among):
        settings = {name: value for name, value in pattern.items() if name != "method"}
        kept = choose(pattern["method"], query, key, 0.5, 16, settings)[0]
        for head in range(4):
            blocks = kept[head if len(kept) == 4 else head // 2].clone()
            for row in range(6):  # what would read most of a row, and the block that is cut, read all of it
                if blocks[row].sum() > 0.6 * (row + 1) or row == 5:
                    blocks[row, : row + 1] = True
            total = 0.0
            for i in rows.tolist():
                shares = (key[0, head // 2, : i + 1] @ query[0, head, i] * 0.5).softmax(0)
                total += sum(shares[j].item() for j in range(i + 1) if blocks[i // 16, j // 16])
            assert recovered[index, head].item() == pytest.approx(total / 4)
            assert cost[index, head].item() == pytest.approx(blocks.sum().item() / 21)  # 6 blocks of rows: 1 + ... + 6


def test_the_best_within_the_cost_and_of_equal_ones_the_cheapest():
    recovered = torch.tensor([[0.5, 0.9], [0.7, 0.9], [0.9, 0.2], [0.99, 0.99]])
    cost = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.2, 0.1], [0.5, 0.3]])
    assert best(recovered, cost, 0.2) == [2, 1]
    assert best(recovered, cost, 0.1) == [0, 1]
    assert best(recovered, cost, 1.0) == [3, 3]
    with pytest.raises(SurgeryError, match=r"at most 0.05 of the blocks; the cheapest reads 0.10") as caught:
        best(recovered, cost, 0.05)
    assert caught.value.where == "query head 0"


def planted(length: int = 1024, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads 0, 1, 2, each with its KV head: the key 300 places back; two single keys; blocks of one topic."""
    generator = torch.Generator().manual_seed(3)
    query, key = (0.2 * torch.randn(1, 3, length, size, generator=generator) for _ in "qk")
    angles = torch.arange(length)[:, None] * torch.tensor([2.0, 1.3, 0.77, 0.41])
    for tensor, offset in ((query, 300), (key, 0)):
        relative = angles - angles[offset]
        tensor[0, 0, :, :8] = 5 * torch.cat([relative.cos(), relative.sin()], -1)
    query[0, 1, :, 0], key[0, 1, [70, 200], 0] = 5.0, 5.0
    key[0, 1, [71, 201], 0] = -5.0  # in the mean of a block there is nothing left of them
    topic = torch.randint(0, 8, (length // 32,), generator=generator)  # blocks of 32 tokens have topics
    topics = torch.nn.functional.one_hot(topic, size).float().repeat_interleave(32, 0)
    query[0, 2], key[0, 2] = query[0, 2] + 6 * topics, key[0, 2] + 6 * topics
    return query, key


def test_planted_heads_get_a_pattern_that_shows_what_was_planted():
    query, key = planted()
    rows = torch.arange(310, 1024, 13)
    among = candidates(1024, 32)
    recovered, cost = measure(query, key, attention_weights(query, key, rows, scale=0.5), rows, 0.5, 32, among)
    chosen = best(recovered, cost, 0.35)
    kinds = [among[index]["method"] for index in chosen]
    assert kinds == ["vertical_slash", "vertical_slash", "block_topk"]
    for head, index in enumerate(chosen):
        assert recovered[index, head] > 0.7
        rivals = [
            rival
            for rival, pattern in enumerate(among)
            if pattern["method"] != kinds[head] and cost[rival, head] <= 0.35 * 1.02
        ]
        assert max(recovered[rival, head] for rival in rivals) < recovered[index, head] - 0.01


def test_every_candidate_is_valid_and_they_reach_from_cheap_to_dense():
    for length, block in ((2048, 64), (300, 128), (64, 16)):
        among = candidates(length, block)
        for pattern in among:
            settings = {name: value for name, value in pattern.items() if name != "method"}
            assert settings_problems(pattern["method"], settings, block) == []
        query = torch.randn(1, 1, length, 4, generator=torch.Generator().manual_seed(0))
        rows = torch.tensor([length - 1])
        _, cost = measure(query, query, attention_weights(query, query, rows), rows, 0.5, block, among)
        assert cost.max() == 1
        blocks = -(-length // block)  # the cheapest reads the first block and the diagonal one, of few blocks all
        read = [rows if 0.6 * rows < 2 or rows * block > length else 2 for rows in range(1, blocks + 1)]
        assert cost.min().item() == pytest.approx(sum(read) / (blocks * (blocks + 1) / 2))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_a_model_is_searched_and_left_as_it_was(family, tokenizer, text):
    model = base(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    patterns = search_patterns(model, tokenizer, density=0.85, block=16, samples=2, length=64, rows=8, text=text)
    again = search_patterns(model, tokenizer, density=0.85, block=16, samples=2, length=64, rows=8, text=text)
    assert patterns.to_dict() == again.to_dict()
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    heads = model.config.num_attention_heads
    sliding = [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or [""] * 2]
    assert [len(layer) for layer in patterns.layers] == [0 if windowed else heads for windowed in sliding]
    for patterns_of_layer, recovered, cost in zip(patterns.layers, patterns.recovered, patterns.cost, strict=True):
        assert len(patterns_of_layer) == len(recovered) == len(cost)
        assert all(0 < share <= 1 + 1e-6 for share in recovered)
        assert all(share <= 0.85 * 1.02 for share in cost)
        if patterns_of_layer:
            assert settings_problems("by_head", {"patterns": patterns_of_layer}, 16, heads) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"density": 0}, "not above 0"),
        ({"density": 1.5}, "not above 0"),
        ({"block": 48}, "power of two"),
        ({"among": [{"method": "streeming"}]}, "did you mean streaming"),
        ({"among": [{"method": "streaming", "window": 60}], "density": 0.1}, "the cheapest reads 1.00"),
        ({"samples": 10**4}, "too short"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_said(settings, says, tokenizer, text):
    with pytest.raises(SurgeryError, match=says):
        search_patterns(
            base("llama"), tokenizer, **{"block": 16, "samples": 1, "length": 60, "rows": 8, "text": text} | settings
        )
