"""Heads removed in steps, with new scores after each step: against models that were really pruned, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from families import TOKENS, VOCAB, attention_modules, base, double, head_dim_of, logits_of, one_thread  # noqa: F401

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.machine.progress import within
from surgery.operations.prune_heads.importance import importance
from surgery.operations.prune_heads.operation import PruneHeads
from surgery.operations.prune_heads.select import choose_removed

SEQUENCES = torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))
SILENT = [[0, 5], [2]]


def scaled(model, gates: dict[tuple[int, int], float]):
    """The stock model in float64 whose heads' output columns are multiplied."""
    wide, size = double(model), head_dim_of(model)
    for layer, module in enumerate(attention_modules(wide)):
        output = getattr(module, "o_proj", None) or module.dense
        for head in range(8):
            output.weight.data[:, head * size : (head + 1) * size] *= gates.get((layer, head), 1.0)
    return wide


def losses(model, gates) -> torch.Tensor:
    logits = logits_of(scaled(model, gates), SEQUENCES).double().log_softmax(-1)
    return -logits[:, :-1].gather(-1, SEQUENCES[:, 1:, None])[..., 0].mean(1)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradient_scores_beside_silent_heads(name):
    """Central differences in float64 of the loss of a model whose silent heads write nothing."""
    model, step = base(name), 1e-3  # norms compute in float32: smaller steps drown in it
    off = {(layer, head): 0.0 for layer, heads in enumerate(SILENT) for head in heads}
    want = torch.zeros(2, 8, dtype=torch.float64)
    for layer in range(2):
        for head in set(range(8)) - set(SILENT[layer]):
            up, down = (losses(model, off | {(layer, head): 1 + sign * step}) for sign in (1, -1))
            want[layer, head] = ((up - down) / (2 * step)).abs().mean()
    want /= want.norm(dim=1, keepdim=True)
    got = torch.tensor(importance(model, "gradient", SEQUENCES, silent=SILENT).scores, dtype=torch.float64)
    assert (got - want).abs().max() < 1e-3
    alone = torch.tensor(importance(model, "gradient", SEQUENCES).scores, dtype=torch.float64)
    assert (alone - want).abs().max() > 1e-2, "the silent heads matter to the others"


def test_ablation_scores_beside_silent_heads():
    model = base("llama")
    got = importance(model, "ablation", SEQUENCES, silent=SILENT).scores
    off = {(layer, head): 0.0 for layer, heads in enumerate(SILENT) for head in heads}
    full = logits_of(scaled(model, off), SEQUENCES).log_softmax(-1)
    for layer, head in ((0, 1), (0, 7), (1, 3)):
        other = logits_of(scaled(model, off | {(layer, head): 0.0}), SEQUENCES).log_softmax(-1)
        assert got[layer][head] == pytest.approx((full.exp() * (full - other)).sum(-1).mean().item(), rel=1e-3)
    assert [got[layer][head] for layer, heads in enumerate(SILENT) for head in heads] == [0.0] * 3


@pytest.mark.parametrize("method", ["gradient", "ablation"])
def test_each_step_is_scored_on_the_pruned_model(method, monkeypatch):
    """The steps repeated by hand: prune with stock tools, score what is left, take the two lowest heads of all."""
    model = base("llama")
    monkeypatch.setattr(PruneHeads, "_sequences", lambda self, model, context: SEQUENCES)
    fields = {"granularity": "head", "per_layer": None, "scores": method, "refit": False, "score_samples": 4}
    done = copy.deepcopy(model)
    report = surgery.apply("prune-heads", done, ratio=6 / 16, rescore=2 / 16, **fields)
    gone: list[list[int]] = [[], []]
    for _ in range(3):
        pruned, left = copy.deepcopy(model), [[h for h in range(8) if h not in heads] for heads in gone]
        if any(gone):
            surgery.apply("prune-heads", pruned, **fields | {"scores": "random"}, heads=gone)
        table = importance(pruned, method, SEQUENCES).scores
        order = sorted((x, layer, left[layer][i]) for layer, row in enumerate(table) for i, x in enumerate(row))
        for _, layer, head in order[:2]:
            gone[layer] = sorted([*gone[layer], head])
    record = report.data["operations"][0]["record"]
    assert record["removed"] == gone
    assert record["importance"]["origin"] == {"rescore": 2 / 16, "scorings": 3}
    once = copy.deepcopy(model)
    report = surgery.apply("prune-heads", once, ratio=6 / 16, **fields)
    assert report.data["operations"][0]["record"]["importance"]["origin"] == {}
    assert "rescore" not in report.data["recipe"]["operations"][0], "a field that nobody set is not recorded"
    whole = copy.deepcopy(model)
    at_once = surgery.apply("prune-heads", whole, ratio=6 / 16, rescore=1.0, **fields)
    assert at_once.data["operations"][0]["record"]["removed"] == report.data["operations"][0]["record"]["removed"]


def test_steps_keep_the_rules_of_one_choice():
    groups = [[[0, 1], [2, 3]], [[0, 1], [2, 3]]]
    scores = [[0.1, 0.9, 0.2, 0.3], [0.5, 0.6, 0.05, 0.7]]
    heads = [[[0], [1], [2], [3]]] * 2
    first = choose_removed(scores, heads, per_layer=2, at_most=3)
    assert first == [[0, 2], [2]]
    assert choose_removed(scores, heads, per_layer=2, removed=first, at_most=3) == [[0, 2], [0, 2]]
    assert choose_removed(scores, heads, ratio=0.5, removed=[[1], []], at_most=2) == [[0, 1], [2]]
    assert choose_removed(scores, heads, ratio=0.5, removed=[[1], []]) == [[0, 1, 2], [2]]
    assert choose_removed(scores, groups, per_layer=1, removed=[[0, 1], []], at_most=5) == [
        [0, 1],
        [2, 3],
    ]


def test_the_plan_says_how_often():
    anatomy = Anatomy.of(base("llama"))
    notes = PruneHeads(granularity="head", ratio=0.375, rescore=0.125).plan(anatomy).notes
    assert "heads are scored 3 times, after each 2 query heads" in notes
    notes = PruneHeads(per_layer=1, rescore=0.2).plan(anatomy).notes
    assert "heads are scored once: rescore begins to act where more than 2 KV groups go" in notes
    by_head = {"granularity": "head", "ratio": 0.375, "refit": False}
    plans = [PruneHeads(**by_head, rescore=rescore).plan(anatomy) for rescore in (None, 0.125)]
    once, thrice = (sum(part.flops for part in plan.measurements) for plan in plans)
    assert thrice == pytest.approx(3 * once)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rescore": 0.1, "scores": "magnitude"}, "magnitude stays the same"),
        ({"rescore": 0.1, "scores": "random"}, "drop rescore, or scores: gradient or ablation"),
        ({"rescore": 0.1, "heads": [[0], []], "per_layer": None}, "heads are listed"),
        ({"rescore": 0.0}, "rescore should be greater than 0"),
        ({"rescore": 1.5}, "rescore should be at most 1; it is 1.5\n  to fix: a number above 0, up to 1"),
        ({"rescore": "often"}, "rescore should be a number"),
    ],
)
def test_wrong_settings(fields, says):
    with pytest.raises(SurgeryError) as error:
        surgery.apply("prune-heads", base("llama"), **fields)
    assert says in str(error.value)


def test_parts_of_a_stage_are_one_bar():
    calls = []
    for part in range(2):
        report = within(lambda *call: calls.append(call), part, 2)
        report(0, 4, "measuring heads")
        report(4, 4, "measuring heads")
    assert calls == [(0, 100, "measuring heads"), (50, 100, "measuring heads"), (100, 100, "measuring heads")]
    assert within(None, 0, 2) is None


def test_a_plan_does_not_say_how_many_heads_a_layer_keeps_before_they_are_measured():
    model = base("llama")
    by_head = {"granularity": "head", "per_layer": None, "ratio": 0.25}
    shown = str(surgery.plan("prune-heads", model, **by_head))
    assert "8 query heads on 4 KV heads: how many stay in which layer is measured" in shown
    assert "→" not in shown.partition("4 of 16 query heads go")[0]
    known = str(surgery.plan("prune-heads", model, **by_head, scores="random"))
    assert "is measured" not in known
    assert "8 → " in known
    assert "8 → 6 query heads" in str(surgery.plan("prune-heads", model, per_layer=1))
