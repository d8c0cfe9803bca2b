"""Kinds of needles: what the prompts hold, who is right, who is at the floor, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)
from readers import Config, Planted, Said, reading_model  # noqa: F401 (the last is a fixture)
from tokenizers_of_bytes import byte_tokenizer

from surgery.data import needle_kinds
from surgery.data.haystack import KEYS, Needle, make_needles
from surgery.data.name_list import NAMES
from surgery.data.needle_kinds.association import RELATIONS
from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.evaluation.paired import wilson
from surgery.evaluation.probes.grid import NeedleResult
from surgery.evaluation.probes.needles import Needles
from surgery.evaluation.probes.settings import make
from surgery.evaluation.recall import Outcome, run_needles
from surgery.report.card import render_card
from surgery.report.gate import gate
from surgery.runtime.modeling_surgery import CACHE

KINDS = list(needle_kinds.REGISTRY)
SEVERAL = [kind for kind in KINDS if kind != "key"]  # more than one needle in a prompt
SMALL = {"lengths": [801], "depths": 3, "samples": 1}
DONE = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}, "kl": {"mean": 0.0}}
TOKENIZERS = {form: byte_tokenizer(chat=form == "chat", bos=True) for form in ("chat", "plain")}
DAYS = Text("days", "0" * 64, " ".join(f"Day {n} was a day of rain, and nothing came of it." for n in range(400)))


def cases_of(kind: str, form: str = "plain", **settings) -> NeedleResult:
    return make("needles", SMALL | {"kind": kind} | settings).make_cases(TOKENIZERS[form], {"out": Config()})


# --- who reads the text by hand -------------------------------------------------------------------------------------

SECRET = r"(\d{5}|[a-z]+ [a-z]+ [a-z]+)"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
LIVES = r"(\w+) (?:lives next to|spends the day|has a companion that) ([^.]+)\."
ABOUT = (
    r"The (?:magic number for|ticket number of the ferry to|number of the safe in|number of the locker at|"
    r"password of the library in|lucky draw of) (\w+)(?: station)? (?:is|was won by number) "
)


def lead_of(text: str) -> str:
    """The answer's first words: the last line, without what the template puts before it."""
    return text.rpartition("\n")[2].removeprefix("[model] ")


def same_words(text: str) -> str:
    """What follows the answer's first words where they stand in the text before."""
    return re.search(f"{re.escape(lead_of(text))} {SECRET}\\.", text)[1]


def all_values(text: str) -> str:
    things, key = re.match(r"The (.+ numbers|numbers of the safes) (?:for|of|in) (\w+), in", lead_of(text)).groups()
    return ", ".join(re.findall(rf"One of the {things} \w+ {key} is {SECRET}\.", text))


def follow(text: str) -> str:
    lead = lead_of(text)
    key = lead.split()[-2]
    links = dict(re.findall(r"(\w+) (?:has|uses|shares) the [a-z ]+ of (\w+)\.", text))
    last = key
    while last in links:
        last = links[last]
    return re.search(f"{lead.replace(key, last)} {SECRET}\\.", text)[1]


def count_up(text: str) -> str:
    return re.findall(ABOUT + SECRET + r"\.", text)[ORDINALS.index(lead_of(text).split()[1])][1]


def know(text: str) -> str:
    world = {clue: target for relation in RELATIONS for clue, target in relation.pairs}
    asked = lead_of(text)
    (name,) = [name for name, clue in re.findall(LIVES, text) if re.search(rf"\b{world[clue]} is$", asked)]
    return name


READ = {"key": same_words, "multi": same_words, "distractor": same_words, "value": all_values}
READ |= {"chain": follow, "index": count_up, "association": know}


def guess(kind: str, draw: random.Random):
    """Answers with one of the secrets of the text, drawn; with all of them in a drawn order if all are asked for."""

    def answer(text: str) -> str:
        if kind == "association":
            return draw.choice(re.findall(LIVES, text))[0]
        if kind == "key":
            return f"{draw.randrange(10**5):05d}"
        secrets = re.findall(r" (\d{5})\.", text)
        return ", ".join(draw.sample(secrets, len(secrets))) if kind == "value" else draw.choice(secrets)

    return answer


class Oracle(Planted):
    """A model that reads its prompt, in one call or in several, and answers with what `choose` takes from it."""

    def __init__(self, tokenizer, choose):
        self.tokenizer, self.choose, self.calls = tokenizer, choose, []

    def __call__(self, input_ids, use_cache, **cache):
        read, said = cache.get(CACHE, ([], -1))
        self.calls.append(tuple(input_ids[0].tolist()))
        if input_ids.shape[1] > 1:
            read, said = [*read, *input_ids[0].tolist()], -1
        text = self.tokenizer.decode(read, skip_special_tokens=True)
        logits, said = torch.full((1, input_ids.shape[1], 258), -30.0), said + 1
        try:
            answer = self.tokenizer(f" {self.choose(text)}", add_special_tokens=False)["input_ids"]
        except (AttributeError, TypeError, ValueError, IndexError):  # the question is not there yet
            answer = []
        logits[0, -1, answer[said] if said < len(answer) else 1] = 30.0
        return Said(logits, (read, said))


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["digits", "words"])
@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_who_reads_the_text_is_right_late_and_early(kind, form, secret):
    tokenizer, settings = TOKENIZERS[form], {} if kind == "association" else {"secret": secret}
    result = cases_of(kind, form, **settings)
    for late in (False, True):
        oracle = Oracle(tokenizer, READ[kind])
        assert all(outcome.hit for outcome in run_needles(oracle, result.cases, late=late))
        prompts = [call for call in oracle.calls if len(call) > 1]
        if late:  # the same tokens, cut at the question
            assert [len(call) for call in prompts[::2]] == [needle.question for needle in result.cases]
            prompts = [text + question for text, question in zip(prompts[::2], prompts[1::2], strict=True)]
        assert prompts == [needle.prompt for needle in result.cases]


@pytest.mark.parametrize("kind", KINDS)
def test_a_guess_is_at_the_floor(kind):
    result = cases_of(kind, depths=4, samples=12)
    oracle = Oracle(TOKENIZERS["plain"], guess(kind, random.Random(kind)))
    oracle.chosen, choose = {}, oracle.choose
    oracle.choose = lambda text: oracle.chosen.setdefault(text, choose(text))  # one guess for a prompt
    hits = sum(outcome.hit for outcome in run_needles(oracle, result.cases))
    floor, of = result.settings["chance"], len(result.cases)
    assert of == 48
    assert abs(hits - of * floor) <= 3.5 * math.sqrt(of * floor * (1 - floor)) + (floor < 1e-3)
    low, high = wilson(hits, of)
    assert low <= floor <= high or floor < 1e-3
    expected = {"key": 1e-5, "value": 1 / 2, "chain": 1 / 3}
    assert floor == pytest.approx(expected.get(kind, 1 / 4))


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_places(kind, form):
    tokenizer = TOKENIZERS[form]
    lengths = [777, 1000, 1403]
    result = cases_of(kind, form, lengths=lengths, depths=[0.1, 0.5, 0.9], text=DAYS)
    assert result.settings["lengths"] == lengths
    for needle in result.cases:
        assert needle.length - 32 < len(needle.prompt) <= needle.length
        spans = (needle.span, *needle.more)
        needed = [tokenizer.decode(needle.prompt[slice(*span)]).strip() for span in spans]
        assert all(re.fullmatch(r"[A-Z][^.]*\.", sentence) for sentence in needed), "whole sentences, and only these"
        assert tokenizer.decode(needle.answer) == f" {needle.secret}"
        for part in needle.secret.split(", "):
            assert sum(part in sentence for sentence in needed) == 1
            assert tokenizer.decode(needle.prompt).count(part) == 1, "it stands nowhere else"
        question = tokenizer.decode(needle.prompt[needle.question :])
        assert question.lstrip().startswith(("What", "Which"))
        assert question.count("?") == 1
        assert needle.span[0] / needle.question == pytest.approx(needle.depth, abs=0.15)
        assert len(needle.more) == {"value": 1, "chain": 1}.get(kind, 0)
        assert all(end <= needle.question for _, end in spans)


def test_depths_of_several_needles_are_all_over_the_text():
    """The needle that is asked for is at its depth, and the others are on both sides of it."""
    for kind in ("chain", "distractor", "value", "association"):
        key = {"value": "values", "chain": "chains"}.get(kind, "keys")
        result = cases_of(kind, lengths=[1500], depths=[0.5], samples=6, **{key: 4})
        text = [TOKENIZERS["plain"].decode(needle.prompt[: needle.question]) for needle in result.cases]
        pattern = LIVES if kind == "association" else SECRET + r"\."
        places = [[match.start() / len(each) for match in re.finditer(pattern, each)] for each in text]
        assert all(min(each) < 0.45 and max(each) > 0.55 for each in places), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_prompts_and_another_others(kind):
    one, again, other = (cases_of(kind, seed=seed).cases for seed in (5, 5, 6))
    assert one == again
    assert not {needle.prompt for needle in one} & {needle.prompt for needle in other}
    assert cases_of(kind, seed=5, depths=[0.5]).cases == one[1:2], "a cell does not depend on the others"
    assert cases_of(kind, seed=5, late=True).cases == one, "when the question is read changes no prompt"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_reach_over_an_edge(kind):
    tokenizer = byte_tokenizer(merges=((".", "Ġ"), (".", "Ċ"), ("s", "Ġ"), ("Ċ", "W"), (",", "Ġ")))
    config = Config()
    config.vocab_size = len(tokenizer)
    result = make("needles", SMALL | {"kind": kind, "samples": 2}).make_cases(tokenizer, {"out": config})
    for needle in result.cases:
        assert tuple(tokenizer(tokenizer.decode(needle.prompt + needle.answer)).input_ids) == (
            needle.prompt + needle.answer
        )
        assert tokenizer.decode(needle.answer).strip().removeprefix("s ") == needle.secret
        for first, end in (needle.span, *needle.more):
            assert tokenizer.decode(needle.prompt[end - 1 : end])[0] == ".", "the last token holds the full stop"
            assert re.match(r"[\s.]{0,2}[A-Z]", tokenizer.decode(needle.prompt[first:end]))


def test_prompts_of_multi_are_those_of_multi_needle_and_of_the_version_before_kinds():
    golden = {"digits": "208b5aa5c3204943", "words": "fc5615f1c16bab8f"}
    text = Text(
        "counted",
        "0" * 64,
        " ".join(f"Day {n} was a day of rain and wind, and nothing came of it." for n in range(400)),
    )
    for secret, digest in golden.items():
        shared = {"length": 900, "cases": 4, "depths": 4, "keys": 4, "seed": 3, "secret": secret, "text": text}
        cases, same = (
            make(probe, shared | more).make_cases(byte_tokenizer(), {"out": Config()}).cases
            for probe, more in (("multi_needle", {}), ("needles", {"kind": "multi"}))
        )
        assert cases == same
        written = [[c.secret, list(c.prompt), list(c.answer), list(c.span), c.question] for c in cases]
        assert hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16] == digest


def test_index_asks_for_the_needles_of_multi():
    shared = {"lengths": [1200], "depths": [0.2, 0.5, 0.8], "samples": 2, "keys": 5}
    by_place, by_key = (cases_of(kind, **shared).cases for kind in ("index", "multi"))
    places, same = set(), 0
    for one, other in zip(by_place, by_key, strict=True):
        texts = [TOKENIZERS["plain"].decode(needle.prompt) for needle in (one, other)]
        sentences = [re.findall(ABOUT + SECRET, text) for text in texts]
        assert len(sentences[0]) == 5
        if sentences[0] == sentences[1]:
            assert one.secret == other.secret
            same += 1
        ordinal = lead_of(texts[0]).split()[1]
        assert sentences[0][ORDINALS.index(ordinal)][1] == one.secret
        assert not [key for key in KEYS.split() if key in lead_of(texts[0])], "the question names no key"
        places.add(ordinal)
    assert len(places) > 1
    assert same >= 4, "its question is longer: rarely a needle has no room, and another stretch is drawn"


def test_similar_keys_differ_in_one_word():
    for needle in cases_of("distractor", keys=6).cases:
        text = TOKENIZERS["plain"].decode(needle.prompt)
        place = next(place for place in KEYS.split() if f" {place} " in lead_of(text) + " ")
        keys = re.findall(rf"([A-Z]\w+) {place}\b[^.?]* \d{{5}}\.", text)
        assert len(keys) == len(set(keys)) == 6


def test_a_chain_has_its_hops():
    for hops in (1, 2, 3):
        for needle in cases_of("chain", lengths=[1500], hops=hops, chains=2).cases:
            text = TOKENIZERS["plain"].decode(needle.prompt)
            assert len(needle.more) == hops
            assert len(re.findall(r"\w+ (?:has|uses|shares) the [a-z ]+ of \w+\.", text)) == 2 * hops
            assert follow(text) == needle.secret


def test_needle_and_question_share_no_content_word():
    """Letters folded. A word of fewer than 4 letters is a content word unless it is listed here."""
    small = {"a", "an", "and", "at", "has", "in", "is", "it", "its", "of", "on", "out", "the", "to", "who", "with"}

    def words(text: str) -> set[str]:
        folded = unicodedata.normalize("NFKD", text.casefold())
        return set(re.findall("[a-z]+", "".join(c for c in folded if not unicodedata.combining(c)))) - small

    def alike(one: str, other: str) -> bool:
        return one == other or (min(len(one), len(other)) >= 4 and one[:4] == other[:4])

    items = 0
    for relation in RELATIONS:
        assert len(relation.pairs) >= 16, "as many as a prompt may have keys"
        assert len({clue for clue, _ in relation.pairs}) == len({target for _, target in relation.pairs})
        for clue, target in relation.pairs:
            needle = words(relation.statement.format(name="", clue=clue))
            asked = words(f"{relation.question} {relation.lead}".format(target=target))
            shared = [(one, other) for one in needle for other in asked if alike(one, other)]
            assert not shared, shared
            items += 1
    assert items >= 16
    assert alike("baker", "bakes")
    assert not alike("bat", "bath")


def test_people_of_a_prompt_have_one_relation_and_are_not_in_the_text():
    for needle in cases_of("association", keys=5, lengths=[1200]).cases:
        text = TOKENIZERS["plain"].decode(needle.prompt)
        people = re.findall(LIVES, text)
        assert len({name for name, _ in people}) == 5
        assert {name for name, _ in people} <= set(NAMES.split())
        assert all(text.count(name) == 1 for name, _ in people)
        relations = [r for r in RELATIONS if {clue for _, clue in people} <= {clue for clue, _ in r.pairs}]
        assert len(relations) == 1


def test_all_that_an_answer_needs_must_lie_outside():
    needle = Needle(100, 0.5, 0, 0, "1", tuple(range(100)), (1,), (20, 30), 90, more=((50, 60),))
    for sinks, window, outside in ((20, 31, True), (20, 32, False), (21, 1, False), (0, 31, True)):
        rows, keys = range(90, 101), [*range(20, 30), *range(50, 60)]
        seen = any(key < sinks or row - key < window for row in rows for key in keys)
        assert needle.outside(sinks, window) is outside is not seen


# --- the contract, and what figures say -----------------------------------------------------------------------------


def test_kinds_keep_the_contract():
    fields = {}
    for cls in needle_kinds.every():
        assert cls.name in KINDS
        assert len(cls.summary) < 58
        assert cls.__doc__
        kind = needle_kinds.recorded({"kind": cls.name})
        assert 0 < kind.chance("digits") < 1
        assert "{" not in kind.finds + kind.detail("digits")
        for key, info in cls.model_fields.items():
            told = (info.annotation, info.default, str(info.metadata))
            assert fields.setdefault(key, told) == told, "kinds that share a setting agree on it"
            assert key in Needles.model_fields
    assert needle_kinds.recorded({}).name == "key", "a record of an earlier version"
    page = (Path(needle_kinds.__file__).parents[2] / "evaluation/README.md").read_text(encoding="utf-8")
    for cls in needle_kinds.every():
        (row,) = re.findall(rf"^\| `{cls.name}` \|.*$", page, re.MULTILINE)
        for key, info in cls.model_fields.items():
            assert f"`{key}` ({info.default})" in row


@pytest.mark.parametrize("kind", SEVERAL)
def test_the_record_names_the_kind_and_a_base_at_the_floor_is_no_gate(kind):
    result = cases_of(kind, depths=[0.5], samples=12)
    floor = result.settings["chance"]
    few = round(12 * floor)
    for hits, above in ((12, True), (few, False)):
        result.outcomes = {"base": [Outcome(n < hits, 0.5) for n in range(12)]}
        result.outcomes["out"] = [Outcome(n < hits - 1, 0.5) for n in range(12)]
        record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert record["settings"]["kind"] == kind
        status, reasons = gate(DONE | {"needles": record}, {"min_needles": 0.5})
        assert (status == "passed") is above
        assert above or "the base answers no more than a guess does" in reasons[0]
        shown = "\n".join(line for line in Needles.lines(result) if isinstance(line, str))
        assert ("no more than a guess" in shown) is not above
        assert ("kept:" in shown) is above
        assert f"Kind {kind}: " in shown
        assert f"right with probability {floor:.0%}" in shown
        assert Needles.sentence(record).endswith(f"kept {hits - 1} of {hits}" if above else "")
        assert bool(Needles.sentence(record)) is above
        card = Needles.paragraph(record)
        assert (f"it keeps {hits - 1} of {hits}" in card) is above
        alone = Needles.paragraph({name: value for name, value in record.items() if name not in ("base", "kept")})
        assert f": the model finds {max(hits - 1, 0)} of 12." in alone
        assert ("The base answers no more than a guess does" in card) is not above
        assert Needles.recall(record) is None, "documented as that of single hidden secrets"
        assert "passkeys" not in Needles.rows(record)[0].name + Needles.metrics(record)[0][1][0].name
        assert Needles.paragraph(record).startswith("Recall test (needles: ")
    result.outcomes["base"] = [Outcome(True, 0.5)] * 12
    result.outcomes["out"] = [Outcome(False, 0.5)] * 12
    assert Needles.worst(result.to_dict())[0] == 1
    assert Needles.verdict(result.to_dict()).startswith("The converted model ")


@pytest.mark.parametrize("changed", [{"kind": "later"}, {"kind": ["multi"]}, {"keys": "many"}, {"keys": 99}])
def test_a_record_of_a_later_version_or_with_other_settings_is_shown(changed):
    result = cases_of("multi", depths=[0.5], samples=12)
    result.outcomes = {label: [Outcome(True, 0.5)] * 12 for label in ("base", "out")}
    result.settings |= changed
    record = result.to_dict()
    assert Needles.sentence(record) == "needles of an unknown kind found kept 12 of 12"
    assert "secrets of an unknown kind hidden in that text, prompts of 801 tokens" in Needles.paragraph(record)
    assert Needles.rows(record)[0].name == "needles of an unknown kind found, share"
    assert "Kind unknown: secrets of an unknown kind." in Needles.lines(result)
    assert "passkeys" not in Needles.metrics(record)[0][0]["name"]
    assert Needles.recall(record) is None
    card = render_card({"evaluation": DONE | {"needles": record}}, None)
    assert "needles of an unknown kind found" in card


def test_the_card_says_what_is_hidden_before_how_it_is_asked_for():
    for kind, words in (
        ("association", "4 people with a clue each hidden in that text, one asked for in other words, prompts"),
        ("value", "one key with 2 values of random digits hidden in that text, all asked for, prompts"),
        ("distractor", "4 similar keys with digits each hidden in that text, prompts"),
    ):
        result = cases_of(kind)
        result.outcomes = {label: [Outcome(True, 0.5)] * 3 for label in ("base", "out")}
        record = result.to_dict()
        assert f"Recall test (needles: {words} of 801 tokens)" in Needles.paragraph(record)
        ((data, (metric,)),) = Needles.metrics(record)
        assert data["name"].startswith(f"needles of kind {kind} hidden in ")
        assert (metric.kind, metric.value, metric.base) == ("recall", 1.0, 1.0)


def test_the_share_of_single_secrets_is_the_recall_of_a_report():
    result = cases_of("key")
    result.outcomes = {"base": [Outcome(True, 0.5)] * 3, "out": [Outcome(n < 2, 0.5) for n in range(3)]}
    record = result.to_dict()
    assert Needles.recall(record) == pytest.approx(2 / 3)
    result.settings["chance"] = 0.9
    assert Needles.recall(result.to_dict()) is None, "a guess is as good as the base"
    assert Needles.recall({"status": "not run", "reason": "memory"}) is None


def test_lengths_are_cut_to_what_a_model_takes():
    """An answer leaves room for each of its secrets."""
    for settings, longest in (({"kind": "chain"}, 4096 - 32), ({"kind": "value", "values": 3}, 4096 - 3 * 32)):
        assert Needles(lengths=(1000, 5000), **settings).cuts(Config()) == {"lengths": [1000, longest]}
        assert Needles(length=longest, **settings).cuts(Config()) == {}


def test_a_cell_with_few_needles_says_how_many_would_do():
    for samples, depths, says in (
        (4, 2, "A cell of 4 needles has no share of its own: 48 make it reportable (samples=48)."),
        (4, 1, "4 needles are few: 48 make the share reportable (samples=48)."),
        (48, 1, ""),
    ):
        result = NeedleResult("done", {"lengths": [100], "depths": [0.25, 0.5][:depths]}, [])
        result.settings |= {"samples": samples, "seed": 0, "secret": "digits", "form": "plain", "chance": 1e-5}
        result.settings["text"] = {"title": "t", "sha256": "0"}
        for depth in result.depths:
            result.cases += [Needle(100, depth, 0, 0, "1", (1,), (1,), (0, 1), 1)] * samples
        result.outcomes = {"out": [Outcome(True, 0.1)] * len(result.cases)}
        shown = "\n".join(line for line in Needles.lines(result) if isinstance(line, str))
        assert says in shown
        assert ("48 make" in shown) is bool(says)


def test_the_default_kind_is_recorded_and_made_as_before():
    result = cases_of("key")
    assert "kind" not in result.settings
    assert result.cases == make_needles(TOKENIZERS["plain"], lengths=[801], depths=3, samples=1, form="plain")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEVERAL)
def test_the_command(surgery, reading_model, kind):
    options = ("--probe", "needles", f"kind={kind}", "length=700", "cases=2", "depths=2", "late=true")
    done = surgery("eval", reading_model, "--base", reading_model, *options)
    assert done.code == 0, done.err
    for words in (f"Kind {kind}: ", "the question in a later call", "0 of 2 needles", "no more than a guess does"):
        assert words in done.out
    facts = surgery("eval", reading_model, *options, "--json").json
    assert (facts["needles"], facts["settings"]["kind"], facts["kept"]) == (2, kind, None)


def test_refused(refused, reading_model):
    for settings, says in (
        (["kind=valu"], ["no kind 'valu'", "distractor: keys that differ", "use value"]),
        (["keys=3"], ["keys is not for kind=key", "kind=multi or index or distractor or association, or leave out"]),
        (["kind=value", "keys=3", "hops=2"], ["keys and hops are not for kind=value", "kind value has values"]),
        (["kind=association", "secret=words"], ["secret is not for kind=association", "leave out secret"]),
        (["kind=chain", "hops=4", "chains=8"], ["8 chains of 4 hops need 40 keys", "24 keys", "chains=4"]),
        (["kind=multi", "keys=1"], ["keys should be at least 2; it is 1"]),
        (["kind=chain", "hops=0"], ["hops should be at least 1; it is 0"]),
        (["kind=3"], ["kind should be text"]),
        (["kind=distractor", "keys=16", "length=400", "cases=1"], ["400 tokens are too few for these needles"]),
    ):
        refused("eval", reading_model, "--probe", "needles", *settings, says=says)


def test_no_room_is_said():
    with pytest.raises(SurgeryError, match="a prompt of 1000 tokens has no room for 16 needles"):
        cases_of("distractor", keys=16, lengths=[1000], text=Text("one", "0" * 64, "word " * 4))
    with pytest.raises(SurgeryError, match="no room for 16 keys"):
        cases_of("index", keys=16, lengths=[500])
