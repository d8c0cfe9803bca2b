"""The order of two passages: what the prompts hold, who is right, that a preference for a letter cancels."""

from __future__ import annotations

import json
import re

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)
from readers import Config, Planted, Said, reading_model  # noqa: F401 (the last is a fixture)
from tokenizers_of_bytes import byte_tokenizer

from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.evaluation.probes.order import Order, OrderResult, Preference
from surgery.evaluation.probes.settings import make
from surgery.report.gate import gate
from surgery.runtime.modeling_surgery import CACHE

SMALL = {"length": 901, "cases": 4, "words": 8}
DONE = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}, "kl": {"mean": 0.0}}
DAYS = Text("days", "0" * 64, " ".join(f"Day {n} was a day of rain, and nothing came of it." for n in range(400)))
TOKENIZERS = {form: byte_tokenizer(chat=form == "chat", bos=True) for form in ("chat", "plain")}


def cases_of(form: str = "plain", **settings) -> OrderResult:
    return make("order", SMALL | settings).make_cases(TOKENIZERS[form], {"out": Config()})


def places(text: str) -> tuple[int, int]:
    """Where the passages A and B are in the text before the question, by hand."""
    body, _, rest = text.partition("Which of these two passages")
    a, b = re.search(r'A: "(.*)"\n\nB: "(.*)"\n', rest).groups()
    body = " ".join(body.split())
    assert body.count(a) == body.count(b) == 1
    return body.index(a), body.index(b)


class Chooser(Planted):
    """A model that gives A `advantage` nats over B, as a function of the text that it read."""

    def __init__(self, tokenizer, advantage):
        self.tokenizer, self.advantage, self.calls = tokenizer, advantage, []

    def __call__(self, input_ids, use_cache, **cache):
        tokens = input_ids[0].tolist()
        read = [*cache.get(CACHE, []), *tokens]
        self.calls.append(tuple(tokens))
        text = self.tokenizer.decode(read, skip_special_tokens=True)
        logits = torch.zeros(1, len(tokens), 258)
        if text.endswith("is passage "):
            (a,) = self.tokenizer("A", add_special_tokens=False)["input_ids"]
            logits[0, -1, a] = self.advantage(text)
        return Said(logits, read)


def ran(result: OrderResult, advantage, form: str = "plain", late: bool = False) -> tuple[list[Preference], Chooser]:
    model = Chooser(TOKENIZERS[form], advantage)
    return Order(late=late).run(model, result, lambda done: None), model


def by_order(text: str) -> float:
    first, second = places(text)
    return 2.0 if first < second else -2.0


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_a_pair_is_asked_in_both_orders(form):
    tokenizer, result = TOKENIZERS[form], cases_of(form)
    assert len(result.cases) == 4
    for pair in result.cases:
        ab, ba = [tokenizer.decode(needle.prompt, skip_special_tokens=True) for needle in pair.asked]
        assert places(ab)[0] < places(ab)[1]
        assert places(ba) == places(ab)[::-1]
        assert [needle.secret for needle in pair.asked] == ["A", "B"]
        for needle, wrong in zip(pair.asked, pair.wrong, strict=True):
            assert 901 - 24 < len(needle.prompt) <= 901
            assert tokenizer.decode(needle.answer) == needle.secret
            assert tokenizer.decode([wrong]) == ("B" if needle.secret == "A" else "A")
            spans = [" ".join(tokenizer.decode(needle.prompt[slice(*s)]).split()) for s in (needle.span, *needle.more)]
            assert all(len(span.split()) == 8 for span in spans)
            assert needle.span[1] <= needle.more[0][0] < needle.more[0][1] <= needle.question
            assert tokenizer.decode(needle.prompt[needle.question :]).lstrip().startswith("Which of these two")
        assert pair.distance == pair.asked[0].more[0][0] - pair.asked[0].span[0]


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("late", [False, True])
def test_who_knows_the_order_is_right(form, late):
    result = cases_of(form)
    outcomes, model = ran(result, by_order, form, late)
    assert all(outcome.hit for outcome in outcomes)
    assert [outcome.margin for outcome in outcomes] == pytest.approx([2.0] * 4, abs=1e-5)
    needles = [needle for pair in result.cases for needle in pair.asked]
    calls = model.calls
    if late:  # the same tokens, cut at the question
        assert [len(call) for call in calls[::2]] == [needle.question for needle in needles]
        calls = [text + question for text, question in zip(calls[::2], calls[1::2], strict=True)]
    assert calls == [needle.prompt for needle in needles]
    wrong, _ = ran(result, lambda text: -by_order(text), form, late)
    assert not any(outcome.hit for outcome in wrong)


def test_a_preference_for_a_letter_cancels():
    result = cases_of()
    result.outcomes = {"out": ran(result, lambda text: 3.0)[0]}
    side = result.side("out")
    assert side["margin"]["mean"] == pytest.approx(0, abs=1e-6)
    assert side["bias"] == pytest.approx(3.0, abs=1e-5)
    assert side["hits"] == 0
    result.outcomes = {"out": ran(result, lambda text: 3.0 + by_order(text) / 4)[0]}
    side = result.side("out")
    assert (side["margin"]["mean"], side["bias"]) == pytest.approx((0.5, 3.0), abs=1e-5)
    assert side["hits"] == 4


def test_figures_gate_and_card():
    result = cases_of(text=DAYS, cases=12)
    result.outcomes = {
        "base": [Preference((1.0, 1.0), 0.1)] * 11 + [Preference((-1.0, 0.5), 0.1)],
        "out": [Preference((0.5, 0.5), 0.1)] * 8 + [Preference((0.5, -1.5), 0.1)] * 4,
    }
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (record["kept"]["kept"], record["kept"]["of"]) == (8, 11)
    # Changes: -0.5 eight times, -1.5 three times, -0.25 once.
    changes = [-0.5] * 8 + [-1.5] * 3 + [-0.25]
    mean = sum(changes) / 12
    spread = (sum((change - mean) ** 2 for change in changes) / 11 / 12) ** 0.5
    assert record["kept"]["margin"] == pytest.approx(
        {"mean": mean, "low": mean - 1.959964 * spread, "high": mean + 1.959964 * spread}
    )
    assert gate(DONE | {"order": record}, {"min_order": 0.7}) == ("passed", [])
    assert gate(DONE | {"order": record}, {"min_order": 0.8})[0] == "failed"
    assert Order.sentence(record) == "order of two passages recalled kept 8 of 11"
    assert [row.base for row in Order.rows(record)] == pytest.approx([11 / 12, 10.75 / 12])
    assert "Pairs of passages (of 8 words in prompts of 901 tokens, each asked in both orders)" in Order.paragraph(
        record
    )
    result.outcomes["base"] = result.outcomes["out"][4:] + result.outcomes["out"][8:]  # four of 12
    record = result.to_dict()
    status, reasons = gate(DONE | {"order": record}, {"min_order": 0.1})
    assert status == "not run"
    assert "the base answers no more than a guess does (4 of 12" in reasons[0]
    assert "The base answers no more than a guess" in Order.paragraph(record)
    assert "it keeps" not in Order.paragraph(record)
    assert Order.sentence(record) == ""


def test_the_same_seed_gives_the_same_prompts():
    one, again, other = (cases_of(seed=seed).cases for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert cases_of(seed=3, cases=2).cases == one[:2]


def test_passages_must_lie_outside_sinks_and_window():
    pair = cases_of(text=DAYS, cases=1).cases[0]
    needle = pair.asked[0]
    window = min(n.question for n in pair.asked) - (needle.more[0][1] - 1)
    assert pair.outside(needle.span[0], window)
    assert not pair.outside(needle.span[0] + 1, window)
    assert not pair.outside(needle.span[0], window + 1)


def test_the_command(surgery, reading_model, refused):
    options = ("--probe", "order", "length=900", "cases=2", "words=6")
    done = surgery("eval", reading_model, "--base", reading_model, *options)
    assert done.code == 0, done.err
    for words in ("order of two passages recalled, share of prompts", "for the right order; bias to A", "change: "):
        assert words in done.out
    assert "a guess between A and B is right with probability 50%" in done.out
    facts = surgery("eval", reading_model, *options, "late=true", "--json").json
    assert (facts["pairs"], facts["kept"], facts["settings"]["late"]) == (2, None, True)
    for setting, says in (
        ("length=100", ["length should be at least 128"]),
        ("words=2", ["words should be at least 4"]),
        ("form=chat", ["no chat template"]),
        ("length=2000", ["1024 positions", "a shorter length"]),
        ("kind=multi", ["unknown key 'kind' of the probe order", "it is a key of the probe needles"]),
    ):
        refused("eval", reading_model, "--probe", "order", setting, says=says)
    refused("eval", reading_model, "--probe", "order", "--write-task", "made", says=["order cannot be written"])


def test_no_room_is_said():
    with pytest.raises(SurgeryError, match="no room for two passages of 64 words"):
        cases_of(length=500, words=64)
    with pytest.raises(SurgeryError, match="no room"):  # every passage occurs again
        cases_of(text=Text("same", "0" * 64, "It rains and it rains and it rains again. " * 300))
