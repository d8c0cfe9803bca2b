"""DuoAttention's training of gates: its presets against the paper, by attention of this test's own in float64."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from conftest import TEXT
from families import TINY, double
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer

from surgery.calibration.gradients import recomputed
from surgery.data.passkeys import NATO, passkeys
from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.operations.head_scorers import learned_gates
from surgery.operations.head_scorers.learned_gates import PRESETS, gates
from surgery.operations.head_scorers.scorers import (
    METHODS,
    how_chosen,
    refuse_wrong_settings,
    resolved_settings,
    score,
    settings_of,
)

WORDS = Text("words", "0" * 64, TEXT)
LENGTHS = [150, 120, 180]
SMALL = {"samples": 4, "length": LENGTHS, "keys": 2, "words": 3, "steps": 6, "train_sinks": 3, "train_window": 11}
DEPLOYED = {"sinks": 2, "window": 9}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def tiny(family: str = "llama"):
    fields = {"sliding_window": 40} if family in ("gemma2", "gpt_oss") else {}
    return double(TINY[family](max_position_embeddings=256, **fields).eval())


class Paper:
    """The mix of the paper, computed by stock Transformers in float64 with an attention function of this test.

    A KV head's output is a * full + (1 - a) * streaming. With `from_base` the full output is the unchanged model's, as
    in the released code.
    """

    def __init__(self, model, sinks: int, window: int, from_base: bool):
        self.model, self.from_base, self.gates, self.kept = model, from_base, None, {}

        def attend(module, query, key, value, _mask, scaling=None, **_):
            groups, length = query.shape[1] // key.shape[1], query.shape[2]
            key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
            i, j = torch.arange(length)[:, None], torch.arange(length)[None]
            scores = query @ key.mT * scaling
            full = scores.masked_fill(j > i, -math.inf).softmax(-1) @ value
            if self.gates is None:
                self.kept[module.layer_idx] = full.detach()
                return full.transpose(1, 2), None
            near = scores.masked_fill((j > i) | ((j >= sinks) & (i - j >= window)), -math.inf).softmax(-1) @ value
            heads = key.shape[1] // groups
            own = self.gates[module.layer_idx * heads : (module.layer_idx + 1) * heads]
            gate = own.repeat_interleave(groups)[None, :, None, None]
            full = self.kept[module.layer_idx] if self.from_base else full
            return (gate * full + (1 - gate) * near).transpose(1, 2), None

        AttentionInterface.register("paper_mix", attend)
        AttentionMaskInterface.register("paper_mix", lambda **_: None)
        model.set_attn_implementation("paper_mix")

    def states(self, ids: torch.Tensor, gates: torch.Tensor | None, rows: list[int]) -> torch.Tensor:
        self.gates = gates
        return self.model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, rows]


def trained(paper: Paper, sequences, steps: int, rate: float, weight: float, rows_of, count: int):
    """Gates after AdamW without decay, by its formulas; and the distance of every step."""
    gates, mean, square, distances = torch.ones(count, dtype=torch.float64), 0.0, 0.0, []
    for step in range(steps):
        each = sequences[step % len(sequences)]
        rows = rows_of(each)
        with torch.no_grad():
            full = paper.states(each.ids, None, rows)
        gates = gates.detach().requires_grad_()
        distance = ((paper.states(each.ids, gates, rows) - full) ** 2).mean()
        (slope,) = torch.autograd.grad(distance + weight * gates.abs().mean(), [gates])
        distances.append(distance.item())
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        warm = max(1, steps // 5)
        factor = min(1.0, max(0.1, (step + 1) / warm), max(0.1, (steps - step) / warm))
        move = (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        gates = (gates.detach() - rate * factor * move).clamp(0, 1)
    return gates, distances


def answer_rows(each) -> list[int]:
    return [row for first, end in each.answers for row in range(first - 1, end - 1)]


def question_rows(each) -> list[int]:
    return [
        row for (first, _), (_, end) in zip(each.questions, each.answers, strict=True) for row in range(first, end)
    ]


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_preset_is_the_papers_training_in_float64(preset, family, tokenizer):
    """Every step's loss and the gates after the last step; only sizes and the rate are other than the paper's."""
    model, rate, weight = tiny(family), 0.1, 0.3
    got = score(model, tokenizer, "gates", **DEPLOYED, preset=preset, text=WORDS, rate=rate, weight=weight, **SMALL)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    made, sequences = {}, []
    lengths = [LENGTHS[order[index % 3]] for index in range(4)]
    for length in lengths:
        if length not in made:
            made[length] = passkeys(
                WORDS,
                tokenizer,
                samples=lengths.count(length),
                length=length,
                sinks=3,
                window=11,
                seed=random.Random(f"0 {length}").getrandbits(32),
                keys=2,
                words=3,
                alphabet="nato",
            )
        sequences.append(made[length].pop(0))
    rows_of = answer_rows if preset == "paper" else question_rows
    paper = Paper(copy.deepcopy(model), 3, 11, from_base=preset == "released")
    count = 2 * model.config.num_key_value_heads
    want, distances = trained(paper, sequences, 6, rate, weight, rows_of, count)
    assert [loss[0] for loss in got.origin["losses"]] == pytest.approx(distances, rel=1e-4, abs=1e-10)
    assert torch.tensor(got.scores).flatten().tolist() == pytest.approx(want.tolist(), abs=1e-4)
    assert max(distances) > 1e-3
    assert len(set(want.tolist())) > 2, "the gates moved, and not all alike"
    assert (got.origin["preset"], got.origin["sinks"], got.origin["train_window"]) == (preset, 2, 11)


def test_sequences_of_several_lengths_share_no_passkey(tokenizer):
    """Also where the text has equally many windows of them."""
    settings = PRESETS["paper"] | {"samples": 6, "length": [200, 201, 202], "keys": 1, "words": 8, "seed": 0}
    settings |= {"alphabet": "text"}  # this tokenizer knows no NATO words
    made = learned_gates._Sequences(tiny(), tokenizer, WORDS, DEPLOYED, settings)
    keys = [tuple(each.ids[slice(*each.spans[0])].tolist()) for each in (made[index] for index in range(6))]
    assert sorted(made.lengths) == [200, 200, 201, 201, 202, 202]
    assert len(set(keys)) == 6


def test_the_papers_values():
    """Section 3.1 and the released scripts: 2,000 steps at 0.02, weight 0.05, 10 keys of 32 words, 1k to 32k."""
    paper = resolved_settings("gates", {"preset": "paper"})
    assert (paper["steps"], paper["rate"], paper["weight"], paper["distance"]) == (2000, 0.02, 0.05, "square")
    assert (paper["keys"], paper["words"], paper["alphabet"]) == (10, 32, "nato")
    assert (paper["train_sinks"], paper["train_window"], paper["samples"]) == (128, 256, 2000)
    assert (paper["length"][0], paper["length"][-1], len(paper["length"])) == (1000, 32_000, 50)
    assert resolved_settings("gates", {"preset": "paper", "rate": 0.5})["rate"] == 0.5
    assert len(set(NATO)) == len(NATO) == 26
    for preset in PRESETS.values():
        refuse_wrong_settings("gates", preset | {"train_sinks": 1, "train_window": 1})
        assert set(preset) < set(settings_of("gates"))


def test_the_old_settings_are_the_default(tokenizer):
    """The preset `short` is the training of earlier versions: relative distance, answers, words of the text."""
    given = {"samples": 2, "length": 180, "keys": 2, "steps": 4, "text": WORDS}
    short = score(tiny(), tokenizer, "gates", **DEPLOYED, **given)
    named = score(
        tiny(), tokenizer, "gates", **DEPLOYED, **given, preset="short", weight=0.12, rate=0.05, full="mixed"
    )
    assert short.scores == named.scores
    sequences = passkeys(WORDS, tokenizer, samples=2, length=180, keys=2, seed=0, **DEPLOYED)
    paper = Paper(tiny(), **DEPLOYED, from_base=False)
    first = short.origin["losses"][1]
    gates_before = torch.full((8,), first[1], dtype=torch.float64)  # one step of Adam moves all alike: no distance yet
    rows = answer_rows(sequences[1])
    with torch.no_grad():
        full, mixed = (paper.states(sequences[1].ids, each, rows) for each in (None, gates_before))
    assert first[0] == pytest.approx(float((mixed - full).square().mean() / full.square().mean()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("full", ["mixed", "base"])
def test_layers_that_are_computed_again_give_the_same_gates(family, full, tokenizer, monkeypatch):
    """Long sequences recompute each layer in the backward pass. It changes no gate, and the model stays as it was."""
    model = tiny(family)
    settings = {"samples": 2, "length": 180, "keys": 2, "steps": 3, "full": full, "text": WORDS, **DEPLOYED}
    want = score(model, tokenizer, "gates", **settings).scores
    before = [vars(module).get("forward") for module in model.modules()]
    calls = []
    monkeypatch.setattr(learned_gates, "LONG", 100)
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    assert score(model, tokenizer, "gates", **settings).scores == want
    handle.remove()
    assert len(calls) == (3 if full == "base" else 2) + 2 * 3, "full passes, and each step forward twice"
    assert [vars(module).get("forward") for module in model.modules()] == before


def test_a_failure_leaves_the_layers_as_they_were():
    layer = torch.nn.Linear(2, 2)
    layer.forward = own = lambda x: x
    with pytest.raises(ZeroDivisionError), recomputed([layer, torch.nn.Linear(2, 2)]):
        raise ZeroDivisionError
    assert layer.forward is own


def test_passkeys_of_code_words(tokenizer):
    made = passkeys(WORDS, tokenizer, samples=2, length=180, seed=1, keys=2, words=4, alphabet="nato", **DEPLOYED)
    again = passkeys(WORDS, tokenizer, samples=2, length=180, seed=1, keys=2, words=4, alphabet="nato", **DEPLOYED)
    for each, same in zip(made, again, strict=True):
        assert torch.equal(each.ids, same.ids)
        assert len(each.questions) == len(each.answers) == 2
        for (first, end), (answer, _), span in zip(each.questions, each.answers, each.spans, strict=True):
            assert first < end == answer
            assert torch.equal(each.ids[slice(*span)], each.ids[answer : answer + span[1] - span[0]])


def test_an_unfinished_run_of_an_earlier_version_goes_on(tokenizer, tmp_path):
    """Its state file knows no preset: it is one of `short`. A run with another preset is refused."""
    import json

    settings = {"samples": 2, "length": 180, "keys": 2, "steps": 4, "text": WORDS, **DEPLOYED}
    whole = score(tiny(), tokenizer, "gates", **settings).scores
    state = tmp_path / "state"

    def stop(done, total, label):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gates(tiny(), tokenizer, **settings, state=state, progress=stop)
    data = json.loads(state.read_text())
    for name in learned_gates.ADDED:
        del data["settings"][name]
    state.write_text(json.dumps(data))
    with pytest.raises(SurgeryError, match=r"another .*distance"):
        gates(tiny(), tokenizer, **settings, preset="paper", state=state)
    assert gates(tiny(), tokenizer, **settings, state=state).scores == whole


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "papers"}, "preset should be 'short', 'paper' or 'released'"),
        ({"rate": 0.0}, "rate should be greater than 0"),
        ({"rate": "1e-3"}, "write 1.0e-3"),
        ({"length": []}, "length should be"),
        ({"steps": 0}, "steps should be at least 1"),
        ({"steps": True}, "steps should be"),
        ({"weigth": 0.1}, "did you mean 'weight'"),
        ({"full": "teacher"}, "full should be 'mixed' or 'base'"),
    ],
)
def test_wrong_settings(settings, says, tokenizer):
    with pytest.raises(SurgeryError) as error:
        score(tiny(), tokenizer, "gates", **DEPLOYED, **settings)
    assert says in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_scorer_says_what_its_settings_may_be(method):
    with pytest.raises(SurgeryError, match="samples should be at least 1"):
        refuse_wrong_settings(method, {"samples": 0})
    refuse_wrong_settings(method, {"samples": 3, "seed": 5, "text": WORDS})


def test_the_card_names_the_settings(tokenizer):
    paper = score(tiny(), tokenizer, "gates", **DEPLOYED, preset="paper", text=WORDS, **SMALL)
    assert (
        "preset `paper`, but samples 4, keys 2, words 3, steps 6, train_sinks 3, train_window 11, other lengths."
        in (how_chosen(paper.method, paper.origin))
    )
    mass = score(tiny(), tokenizer, "far-mass", **DEPLOYED, samples=2, length=180, text=WORDS)
    assert how_chosen(mass.method, mass.origin).endswith("where passkeys are repeated.")
