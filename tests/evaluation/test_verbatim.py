"""Verbatim recall: planted models that can and cannot, floors, likelihoods by Transformers, command, gate, card."""

from __future__ import annotations

import math
import re

import pytest
import torch
from families import TINY, one_thread  # noqa: F401 (the last is a fixture)
from readers import Config, Planted, Said, reading_model  # noqa: F401 (the last is a fixture)
from tokenizers_of_bytes import byte_tokenizer
from transformers import GenerationConfig

from surgery.errors import SurgeryError
from surgery.evaluation.probes.settings import make
from surgery.evaluation.probes.verbatim import Verbatim
from surgery.evaluation.recall import Recitation
from surgery.report.gate import gate
from surgery.runtime.modeling_surgery import CACHE

FEW = {"distances": [128, 700], "samples": 2, "tokens": 32}
DONE = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}, "kl": {"mean": 0.0}}
SURE = 30.0  # logit of the token that a planted model says; the others have 0


class Says(Planted):
    """A model that says after all tokens so far what `choose` takes from them. It counts its calls."""

    def __init__(self, choose):
        self.choose, self.calls = choose, []

    def __call__(self, input_ids, use_cache, **cache):
        seen = [*cache.get(CACHE, []), *input_ids[0].tolist()]
        self.calls.append(input_ids.shape[1])
        logits = torch.zeros(1, input_ids.shape[1], 258)
        logits[0, -1, self.choose(seen)] = SURE
        return Said(logits, seen)


def copies(seen: list[int], window: int | None = None) -> int:
    """The token that followed the last eight tokens before; a space (35) if they are new."""
    back = seen[-window:] if window else seen
    for place in range(len(back) - 9, -1, -1):
        if back[place : place + 8] == back[-8:]:
            return back[place + 8]
    return 35


def cases_of(tokenizer, **settings):
    return make("verbatim", FEW | settings).make_cases(tokenizer, {"out": Config()})


def outcomes(result, choose, **settings):
    return Verbatim(**settings).run(Says(choose), result, lambda done: None)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def result(tokenizer):
    return cases_of(tokenizer)


def test_who_copies_is_right_gains_and_falls_to_the_floor_unread(result):
    found = outcomes(result, copies)
    assert all(each.hit and each.copied == 32 for each in found)
    assert max(each.nll for each in found) < 1e-6
    assert max(each.guessed for each in found) < 3
    for each in found:  # the floor: the letter is a space, or as likely as any other that is not said
        assert math.log(SURE) < each.unread
        assert each.gain == pytest.approx(each.unread - each.nll)


def test_who_does_not_read_gains_nothing(result):
    found = outcomes(result, lambda seen: 35)
    assert not any(each.hit for each in found)
    assert all(each.gain == 0 and each.copied == each.guessed for each in found)


def test_tokens_are_counted_up_to_the_first_departure(result):
    def departs(seen):
        return copies(seen) if len(seen) - start < 5 or len(seen) - start > 6 else 0

    for index, case in enumerate(result.cases):
        start = len(case.prompt)
        one = type(result)("done", result.settings, [case])
        (found,) = outcomes(one, departs)
        assert (found.hit, found.copied) == (False, 5), index


def test_a_window_loses_what_is_far(result):
    found = outcomes(result, lambda seen: copies(seen, window=420))
    assert [each.hit for each in found] == [True, True, False, False]
    assert all(each.gain == pytest.approx(0, abs=1e-6) for each in found[2:])


def test_the_second_beginning_comes_in_a_call_of_its_own_where_it_is_late(result):
    early, late = (Says(copies) for _ in range(2))
    case = result.cases[0]
    for model, settings in ((early, {}), (late, {"late": True})):
        one = type(result)("done", result.settings, [case])
        Verbatim(**settings).run(model, one, lambda done: None)
    rest = [1] * 31
    assert early.calls == [len(case.prompt), *rest] * 2
    assert late.calls == [case.question, 16, *rest] * 2, "what a cache keeps is chosen before"


def test_who_knows_the_text_by_heart_proves_nothing(result):
    """A model that goes on with each paragraph wherever it begins, whether it read it or not."""
    texts = [[*case.prompt[case.question :], *case.answer] for case in result.cases]

    def knows(seen):
        ways = (text[cut] for text in texts for cut in range(16, len(text)) if seen[-cut:] == text[:cut])
        return next(ways, 35)

    known = outcomes(result, knows)
    assert all(each.hit and each.guessed == 32 for each in known)
    result.outcomes = {"base": known, "out": known}
    record = result.to_dict()
    result.outcomes = {}
    assert (record["kept"]["of"], record["known_by_heart"]) == (0, 4)
    why = "the base knows all paragraphs by heart: name a text=FILE"
    assert gate(DONE | {"verbatim": record}, {"min_verbatim": 0.5}) == ("not run", [f"min_verbatim: {why}"])


def test_likelihoods_are_transformers_own_in_float64_and_tokens_those_of_generate(tokenizer):
    config = {"vocab_size": 258, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = TINY["llama"](**config).eval()
    model.lm_head.weight.data = torch.randn_like(model.lm_head.weight) * 0.3
    exact = TINY["llama"](**config).double().eval()
    exact.load_state_dict(model.state_dict())
    probe = make("verbatim", {"distances": [128, 300], "samples": 2, "tokens": 12})
    result = probe.make_cases(tokenizer, {"out": model.config})
    greedy = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    for late in (False, True):
        found = make("verbatim", {"tokens": 12, "late": late}).run(model, result, lambda done: None)
        for case, each in zip(result.cases, found, strict=True):
            for prompt, nll, copied in (
                (case.prompt, each.nll, each.copied),
                (case.unread, each.unread, each.guessed),
            ):
                whole = torch.tensor([[*prompt, *case.answer]])
                labels = whole.clone()
                labels[:, : len(prompt)] = -100
                assert nll == pytest.approx(exact(input_ids=whole, labels=labels).loss.item(), abs=1e-4)
                start = torch.tensor([prompt])
                said = model.generate(start, attention_mask=torch.ones_like(start), generation_config=greedy)
                said = said[0, len(prompt) :].tolist()
                same = [one == other for one, other in zip(said, case.answer, strict=True)]
                assert copied == (same.index(False) if False in same else 12)


def planted(result, **hits):
    """Outcomes by hand: of four paragraphs the base continues three; the model one of them, and the fourth."""
    base = [(32, 0.25, 2.25, 0)] * 3 + [(4, 1.0, 2.0, 0)]
    out = [(32, 0.5, 2.0, 0), (20, 1.5, 2.0, 1), (0, 2.0, 2.0, 0), (32, 0.5, 2.5, 0)]
    result.outcomes = {
        label: [Recitation(copied == 32, nll, copied, unread, guessed) for copied, nll, unread, guessed in rows]
        for label, rows in (("base", base), ("out", out))
    }
    return result.to_dict()


def test_gate_card_and_closing_line(tokenizer):
    result = cases_of(tokenizer)
    record = planted(result)
    assert (record["kept"]["kept"], record["kept"]["of"]) == (1, 3), "what the base does not recall does not count"
    assert record["kept"]["gain"] == pytest.approx((1.5 + 0.5 + 0 + 2) / (2 + 2 + 2 + 1))
    assert record["base"]["gain"] == pytest.approx(7 / 4)
    assert record["out"]["copied"] == pytest.approx(21)
    assert [(row["distance"], row["hits"], row["copied"]) for row in record["out"]["distances"]] == [
        (128, 1, 26.0),
        (700, 1, 16.0),
    ]
    assert [case["distance"] for case in record["cases"]] == [128, 128, 700, 700]
    assert [case["out"]["gain"] for case in record["cases"]] == [1.5, 0.5, 0.0, 2.0]
    assert gate(DONE | {"verbatim": record}, {"min_verbatim": 0.3}) == ("passed", [])
    assert gate(DONE | {"verbatim": record}, {"min_verbatim": 0.34})[0] == "failed"
    sentence = "paragraphs continued verbatim kept 1 of 3, gain from reading 57% of the base's"
    assert Verbatim.sentence(record) == sentence
    words = (
        "Quoted paragraphs (32 tokens after a cue of 16, at a distance of 128, 700 tokens): the base answers 3 of 4, "
        "the converted model 2 of 4."
    )
    card = Verbatim.paragraph(record)
    assert card.startswith(words)
    assert "it keeps 1 of 3" in card
    assert (
        "worth 1.75 nats a token to the base and 1.00 to the converted model (of 2.19 where it was not read)" in card
    )
    names = [row.name for row in Verbatim.rows(record)]
    assert names[1:3] == ["tokens continued exactly, of 32", "the same, of a paragraph that was not read (floor)"]


def test_few_paragraphs_at_a_distance_are_told(tokenizer):
    result = cases_of(tokenizer)
    record = planted(result)
    note = "A cell of 2 prompts has no share of its own: 48 make it reportable (samples=48)."
    assert Verbatim.lines(result).count(note) == 1
    result.cases, result.outcomes = result.cases * 24, {k: v * 24 for k, v in result.outcomes.items()}
    assert not [line for line in Verbatim.lines(result) if "reportable" in str(line)]
    ((data, (share,)),) = Verbatim.metrics(record)
    assert data["name"].startswith("Quoted paragraphs: ")
    assert (data["distances"], share.kind, share.value, share.base) == ([128, 700], "recall", 0.5, 0.75)


def test_what_a_window_sees_does_not_count(tokenizer):
    result = cases_of(tokenizer)
    result.reach = (16, 400)
    record = planted(result)
    assert (record["kept"]["kept"], record["kept"]["of"]) == (0, 1), "the two of 128 tokens are inside the window"
    assert record["kept"]["gain"] == pytest.approx((0 + 2) / (2 + 1))
    assert record["streaming"]["needles_inside"] == 2
    said = [line for line in Verbatim.lines(result) if isinstance(line, str)]
    assert any(line.startswith("2 of 4 prompts prove nothing and do not count") for line in said)


def test_a_model_that_gives_nan(tokenizer):
    result = cases_of(tokenizer)
    found = Recitation(False, math.nan, 0, math.nan, 0)
    assert Verbatim().is_broken(found)
    result.outcomes = {"base": [Recitation(True, 0.1, 32, 2.0, 0)] * 4, "out": [found] * 4}
    record = result.to_dict()
    assert (record["kept"]["kept"], record["kept"]["gain"], record["out"]["gain"]) == (0, None, None)
    assert "kept 0 of 4" in Verbatim.sentence(record)
    assert Verbatim.paragraph(record)
    assert Verbatim.lines(result)


def test_the_command(surgery, reading_model):
    given = ("--probe", "verbatim", "distances=64,128", "samples=2", "tokens=8")
    done = surgery("eval", reading_model, "--base", reading_model, *given)
    assert done.code == 0, done.err
    for said in (
        "paragraphs continued verbatim, share of prompts",
        "tokens continued exactly, of 8",
        "the same, not read (floor)",
        "gain from having read it, nats a token",
        "4 plain prompts (8 tokens after a cue of 16, at a distance of 64, 128 tokens), seed 0",
        "The text is Python",
    ):
        assert said in done.out
    assert re.search(r"64 tokens\s+\d of 2 to the end, [\d.]+ tokens, gain -?[\d.]+ nats", done.out)
    alone = surgery("eval", reading_model, *given, "--json").json
    assert (alone["prompts"], alone["kept"]) == (4, None)
    assert {"copied", "unread", "guessed", "gain", "distances"} <= set(alone["out"])


def test_distances_are_cut_and_prompts_left_out_that_a_model_does_not_take(tokenizer):
    config = TINY["llama"](vocab_size=258, max_position_embeddings=1024).config
    cut = Verbatim().cuts(config)["distances"]
    assert cut == [128, 512, 671]
    whole = Verbatim(distances=cut, samples=4).make_cases(tokenizer, {"out": config})
    assert (len(whole.cases), whole.notes) == (12, []), "what is cut fits"
    some = Verbatim(distances=(128, 900), samples=4).make_cases(tokenizer, {"out": config})
    assert some.notes == ["4 of 8 prompts are longer than the 1,024 tokens that the model takes, and were left out"]
    assert some.settings["distances"] == [128]
    assert Verbatim(distances=(128,)).cuts(config) == {}
    assert len(Verbatim(distances=(128, 128), samples=2).make_cases(tokenizer, {"out": config}).cases) == 2


def test_refused(refused, reading_model):
    for setting, says in (
        ("distances=0", ["quotations need at least one distance"]),
        ("distances=[]", ["quotations need at least one distance"]),
        ("tokens=0", ["tokens should be at least 1; it is 0"]),
        ("cue=0", ["cue should be at least 1; it is 0"]),
        ("samples=0", ["samples should be at least 1; it is 0"]),
        ("distances=2000", ["1024 positions, prompt and answer have", "shorter distances"]),
        ("text=none.txt", ["no such text file"]),
        ("words=3", ["unknown key 'words'", "it is a key of the probe repeats"]),
    ):
        refused("eval", reading_model, "--probe", "verbatim", setting, says=says)
    with pytest.raises(SurgeryError, match="shorter distances"):
        Verbatim(distances=(200_000,)).make_cases(byte_tokenizer(), {"out": Config()})
