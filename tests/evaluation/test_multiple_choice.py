"""Multiple choice: how questions are made and read, who is right, what the figures say, and a search on questions."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random

import pytest
import torch
from conftest import WORDS
from families import TINY, double, one_thread  # noqa: F401 (a fixture)
from sinks import log_gammas, recipe, sink
from tokenizers_of_bytes import byte_tokenizer

import surgery as package
from surgery.calibration.scoring import Chosen, ask, choice_logps
from surgery.cli.render import tables as display
from surgery.data.questions import Choice, Question, encode, make_choices, read_questions
from surgery.data.text import Text, load_text
from surgery.errors import SurgeryError
from surgery.evaluation.paired import wilson
from surgery.evaluation.probes.choices import ChoiceResult, Choices
from surgery.evaluation.probes.settings import make
from surgery.io.loading import load_model, read_tokenizer
from surgery.io.resume import SavedFigures
from surgery.operations.sink_calibration import zero_tuning as first_token
from surgery.runtime.modeling_surgery import CACHE, patch

SMALL = {"items": 12, "context": 60, "ending": 20}


def evaluate_choices(out, base=None, *, tokenizer=None, **settings):
    """The probe with these settings, of folders or loaded models."""
    return make("choices", settings).measure(out, base, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


# --- questions from a text ------------------------------------------------------------------------------------------


def test_the_right_ending_goes_on_and_wrong_ones_begin_other_sentences(tokenizer):
    text = load_text().text.strip()
    for item in make_choices(tokenizer, **SMALL):
        passage, endings = tokenizer.decode(item.prompt), [tokenizer.decode(choice) for choice in item.choices]
        assert (len(item.prompt), [len(choice) for choice in item.choices]) == (60, [20] * 4)
        assert text.count(passage + endings[item.answer]) >= 1
        assert passage.rstrip().endswith((".", "!", "?")) or endings[0].startswith("\n\n")
        begin = {ending[: len(ending) - len(ending.lstrip())] for ending in endings}
        assert begin in ({" "}, {"\n\n"}, {"\n\n    "}) or all(gap.startswith("\n\n") for gap in begin)
        for number, ending in enumerate(endings):
            if number != item.answer:
                said = ending.lstrip("\n") if "\n" in ending[:2] else ending.lstrip()
                at = text.index(said)
                assert text[:at].rstrip().endswith((".", "!", "?")) or text[at - 1] == "\n"
                assert said not in passage
                assert passage + ending not in text


def test_the_same_arguments_give_the_same_questions_and_another_seed_others(tokenizer):
    made = make_choices(tokenizer, **SMALL)
    assert make_choices(tokenizer, **SMALL) == made
    assert len({item.prompt for item in made}) == len(made) == 12
    assert not set(make_choices(tokenizer, **SMALL, seed=1)) & set(made)


def test_there_is_no_place_where_the_right_one_stands(tokenizer):
    answers = [item.answer for item in make_choices(tokenizer, **SMALL | {"items": 300, "context": 30})]
    counts = [answers.count(place) for place in range(4)]
    assert sum(counts) == 300
    assert min(counts) > 45  # 75 expected, standard deviation 7.5


def test_bos_and_tokens_over_the_edge():
    """ ". " and ".\\n" are tokens: what they hold of the passage belongs to all endings alike."""
    merged = byte_tokenizer(bos=True, merges=((".", "Ġ"), (".", "Ċ")))
    for item in make_choices(merged, **SMALL):
        assert item.prompt[0] == 0
        assert 0 not in item.prompt[1:]
        assert len(item.prompt) == 61
        passage = merged.decode(item.prompt[1:])
        whole = merged.decode((*item.prompt[1:], *item.choices[item.answer]))
        assert whole in load_text().text
        assert not passage.endswith(".") or not merged.decode(item.choices[item.answer]).startswith((" ", "\n"))


def test_texts_without_sentences_are_cut_at_words_and_short_ones_refused(tokenizer):
    draw = random.Random(0)
    words = " ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(400))
    made = make_choices(tokenizer, **SMALL, text=Text("words", "0" * 64, words))
    assert len(made) == 12
    assert all(tokenizer.decode(choice).startswith(" ") for item in made for choice in item.choices)
    chinese = "".join("".join(draw.choices("天地玄黄宇宙洪荒日月盈昃", k=6)) + "。" for _ in range(200))
    made = make_choices(tokenizer, **SMALL, text=Text("zh", "0" * 64, chinese))
    assert all(tokenizer.decode(item.prompt + item.choices[item.answer]).strip("\ufffd") in chinese for item in made)
    with pytest.raises(SurgeryError, match=r"room for \d+ questions"):
        make_choices(tokenizer, **SMALL, text=Text("short", "0" * 64, words[:120]))
    with pytest.raises(SurgeryError, match="at least 1"):
        make_choices(tokenizer, items=0)


# --- questions from a file ------------------------------------------------------------------------------------------


def test_a_file_of_questions(tmp_path):
    lines = [
        {"prompt": "one", "choices": ["a", "b"], "answer": 1, "id": 7},
        {"prompt": "two", "choices": ["a", "b", " c"], "answer": " c"},
        {"prompt": "three", "choices": ["1", "0"], "answer": "0"},
    ]
    (tmp_path / "q.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_questions(tmp_path / "q.jsonl") == [
        Question("one", ("a", "b"), 1),
        Question("two", ("a", "b", " c"), 2),
        Question("three", ("1", "0"), 1),
    ]


WRONG = {
    '{"prompt": "x", "choices": ["a", "b"], "answer": 0': "this is not JSON",
    "[1, 2]": "a question is an object, this is [1, 2]",
    '{"question": "x", "choices": ["a", "b"], "answer": 0}': "the key 'prompt' is missing",
    '{"prompt": "x", "choices": ["a", "b"]}': "the key 'answer' is missing",
    '{"prompt": " ", "choices": ["a", "b"], "answer": 0}': "prompt should be text",
    '{"prompt": 3, "choices": ["a", "b"], "answer": 0}': "prompt should be text",
    '{"prompt": "x", "choices": "ab", "answer": 0}': "choices should be a list of texts",
    '{"prompt": "x", "choices": ["a", 1], "answer": 0}': "choices should be a list of texts",
    '{"prompt": "x", "choices": ["a", ""], "answer": 0}': "choices should be a list of texts",
    '{"prompt": "x", "choices": ["a"], "answer": 0}': "choices should be two or more that differ",
    '{"prompt": "x", "choices": ["a", "a "], "answer": 0}': "choices should be two or more that differ",
    '{"prompt": "x", "choices": ["a", "b"], "answer": 2}': "answer should be 0 to 1",
    '{"prompt": "x", "choices": ["a", "b"], "answer": -1}': "answer should be 0 to 1",
    '{"prompt": "x", "choices": ["a", "b"], "answer": true}': "answer should be 0 to 1",
    '{"prompt": "x", "choices": ["a", "b"], "answer": 1.0}': "answer should be 0 to 1",
    '{"prompt": "x", "choices": ["a", "b"], "answer": "c"}': "answer should be 0 to 1 or one of the choices, it is 'c",
}
GOOD = '{"prompt": "x", "choices": ["a", "b"], "answer": 0}'


def test_every_wrong_line_is_told_at_once(refused, model, tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join(itertools.chain.from_iterable((GOOD, line) for line in WRONG)))
    says = [f"q.jsonl:{2 * i + 2}: {what}" for i, what in enumerate(WRONG.values())]
    found = refused("eval", model, "--choices", "--labelled", "q.jsonl", says=[*says, '"prompt": "Water is"'])
    assert found.err.count("q.jsonl:") == len(WRONG)
    (tmp_path / "many.jsonl").write_text("{}\n" * 50)
    refused("eval", model, "--choices", "--labelled", "many.jsonl", says=["many.jsonl:20:", "30 more lines"])
    refused("eval", model, "--choices", "--labelled", "none.jsonl", says=["no such text file"])


def test_prompt_and_choice_are_joined():
    merged = byte_tokenizer(merges=(("Ġ", "b"), ("e", "s")))
    joined = encode(merged, [Question("Is it?", ("b", "c d"), 1), Question("It ", ("is", "was"), 0)])
    assert [merged.decode(choice) for choice in joined[0].choices] == [" b", " c d"]
    assert [merged.decode(choice) for choice in joined[1].choices] == ["is", "was"]
    (merging,) = encode(merged, [Question("On the e", ("s", " x"), 0)])  # "es" is one token: no choice gets "e" alone
    assert merged.decode(merging.prompt) == "On the e"
    (whole,) = encode(merged, [Question("天", ("地", "x"), 0)])
    assert [merged.decode(choice) for choice in whole.choices] == ["地", "x"]
    (edge,) = encode(merged, [Question("yes ", ("b", "x"), 0)])  # " b" is one token
    assert (merged.decode(edge.prompt), [merged.decode(c) for c in edge.choices]) == ("yes", [" b", " x"])
    with pytest.raises(SurgeryError, match="nothing of a prompt of question 1"):
        encode(merged, [Question(" ", ("b", "x"), 0)])


# --- scoring --------------------------------------------------------------------------------------------------------


def random_items(count: int = 9) -> list[Choice]:
    """Prompts of 1 to 20 tokens, 2 to 5 choices of 1 to 8."""
    draw = random.Random(3)

    def some(most):
        return tuple(draw.choices(range(3, 128), k=draw.randint(1, most)))

    return [Choice(some(20), tuple(some(8) for _ in range(draw.randint(2, 5))), 0) for _ in range(count)]


@torch.no_grad()
def one_by_one(model, item: Choice) -> list[float]:
    """float64, no batch, no cache, no padding."""
    found = []
    for choice in item.choices:
        ids = torch.tensor([item.prompt + choice])
        logp = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        at = len(item.prompt)
        found.append(sum(logp[at + i - 1, token].item() for i, token in enumerate(choice)) / len(choice))
    return found


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "gpt2", "opt", "bloom"])
def test_log_probabilities_against_float64_one_by_one(family, cached):
    model, items = TINY[family]().eval(), random_items()
    exact, done = double(model), []
    with torch.no_grad():
        for item, found in zip(items, choice_logps(model, items, cached, done.append), strict=True):
            want = one_by_one(exact, item)
            assert found.dtype == torch.float64
            assert max(abs(a - b) for a, b in zip(found.tolist(), want, strict=True)) < 1e-4
    assert done == [4, 8, 9]


@pytest.mark.parametrize("cached", [True, False])
def test_log_probabilities_of_a_surgical_model(cached):
    """Streaming heads, a weight for each row's own first token, virtual keys."""
    model = TINY["llama"]().eval()
    shapes = {"surgery_log_gamma": [8], "surgery_sink_logit": [8, 1]}
    patch(model, {"layers": [{"streaming": [0, 3], "sinks": 1, "window": 4, "parameters": shapes}] * 2})
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "surgery_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
        exact = double(model)
        for item, found in zip(items := random_items(), choice_logps(model, items, cached), strict=True):
            want = one_by_one(exact, item)
            assert max(abs(a - b) for a, b in zip(found.tolist(), want, strict=True)) < 1e-4


def test_gradients_without_a_cache_are_those_of_one_by_one():
    model, items = TINY["llama"]().eval(), random_items(5)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (found,) = torch.autograd.grad(sum(row[0] for row in choice_logps(model, items, cached=False)), [weight])
    total = 0.0
    for item in items:
        logp = (
            model(input_ids=torch.tensor([item.prompt + item.choices[0]]), use_cache=False).logits[0].log_softmax(-1)
        )
        at = len(item.prompt)
        total = total + torch.stack([logp[at + i - 1, t] for i, t in enumerate(item.choices[0])]).mean()
    (want,) = torch.autograd.grad(total, [weight])
    assert (found - want).abs().max() < 1e-5 * want.abs().max() + 1e-7


class Counts(torch.nn.Module):
    """Knows one thing: after token t comes t + 1. Its cache is what it was last told to keep."""

    device, vocab = torch.device("cpu"), 50

    def forward(self, input_ids, attention_mask, use_cache, **given):
        logits = torch.zeros(*input_ids.shape, self.vocab)
        logits.scatter_(2, (input_ids[..., None] + 1) % self.vocab, 9.0)
        return Answer(logits)


class Answer(dict):
    def __init__(self, logits):
        super().__init__({CACHE: self})
        self.logits = logits

    def batch_select_indices(self, indices):
        self.rows = indices


def test_a_model_that_knows_is_right_and_one_that_is_sure_of_wrong_ones_is_not():
    """The first token of a choice alone tells, or a later one, or how many there are does not."""
    items = [
        Choice((3, 4), ((5, 6), (6, 7), (9,)), 0),
        Choice((8,), ((9, 10, 12), (9, 10, 11)), 1),
        Choice((1, 2), ((4,), (7, 8, 20, 21)), 1),  # two of four are sure: better by the mean, worse by the sum
    ]
    assert [each.right for each in ask(Counts(), items)] == [True, True, True]
    wrong = [Choice(item.prompt, item.choices, (item.answer + 1) % len(item.choices)) for item in items]
    assert [each.right for each in ask(Counts(), wrong)] == [False, False, False]
    sure = math.log(math.exp(9) / (math.exp(9) + 49))
    assert ask(Counts(), items)[1].logps == pytest.approx((sure - 3, sure), abs=1e-6)


def test_ties_and_nan_are_not_right():
    def told(*logps, answer=0):
        return Chosen.of(torch.tensor(logps, dtype=torch.float64), answer)

    assert told(-1.0, -2.0).right
    assert not told(-1.0, -1.0).right
    assert not told(-2.0, -1.0).right
    assert not told(math.nan, -1.0).right
    assert not told(-1.0, math.nan).right
    assert told(-1.0, -2.0, -3.0).nll == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)))
    assert told(-1.0, -2.0, answer=1).nll == pytest.approx(math.log(1 + math.exp(1)))


def test_the_model_is_left_as_it_was():
    model = TINY["llama"]().train()
    ask(model, random_items(2))
    assert model.training


# --- what the figures say -------------------------------------------------------------------------------------------


def result_of(base: str, out: str) -> ChoiceResult:
    items = [Choice((1,), ((2,), (3,), (4,)), 0)] * len(out)
    sides = {"base": base, "out": out} if base else {"out": out}
    told = {label: [Chosen(letter == "y", 0.5, (-1.0, -2.0, -3.0)) for letter in row] for label, row in sides.items()}
    return ChoiceResult("done", {"text": {"title": "t", "sha256": "0"}, "context": 9, "seed": 0}, items, told)


@pytest.mark.parametrize(("base", "out"), [("yyyyynnnny", "yyynnyyyyn"), ("yyyy", "nnnn"), ("yn", "yn"), ("y", "n")])
def test_paired_counts_and_their_probability(base, out):
    paired = result_of(base, out).compare()
    differing = [(a, b) for a, b in zip(base, out, strict=True) if a != b]
    gained = sum(b == "y" for _, b in differing)
    assert (paired["only_base"], paired["only_out"]) == (len(differing) - gained, gained)
    assert paired["both"] + paired["neither"] == len(base) - len(differing)
    # Every way in which fair coins could fall.
    every = list(itertools.product((0, 1), repeat=len(differing)))
    uneven = abs(2 * gained - len(differing))
    as_uneven = sum(abs(2 * sum(coins) - len(differing)) >= uneven for coins in every)
    assert paired["p"] == pytest.approx(as_uneven / len(every))


def test_figures_and_lines(capsys):
    result = result_of("yyyn", "yynn")
    facts = result.to_dict()
    assert facts["chance"] == pytest.approx(1 / 3)
    assert (facts["base"]["right"], facts["out"]["accuracy"]) == (3, 0.5)
    assert (facts["out"]["low"], facts["out"]["high"]) == wilson(2, 4)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    ((data, (metric,)),) = Choices.metrics(facts)
    assert data["name"].startswith("Multiple choice: ")
    assert (metric.kind, metric.value, metric.base) == ("accuracy", 0.5, 0.75)
    display.measured(Choices, result)
    said = capsys.readouterr().out
    for words in ("base:      3 of 4 questions right (75.0%", "both right 2, only the base 1", "p = 1", "33.3%"):
        assert words in said
    alone = result_of("", "yn")
    assert alone.to_dict()["paired"] is None
    display.measured(Choices, alone)
    assert "model:     1 of 2" in capsys.readouterr().out


def test_nan_of_the_base_is_refused_and_of_out_never_right(tokenizer):
    broken = TINY["llama"](vocab_size=258)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    good, options = TINY["llama"](vocab_size=258), {"tokenizer": tokenizer, "items": 5, "context": 30}
    with pytest.raises(SurgeryError, match="base model itself gives NaN"):
        evaluate_choices(good, broken, **options)
    result = evaluate_choices(broken, good, **options)
    assert result.side("out")["right"] == 0
    assert "5 of 5 questions" in result.notes[0]
    json.dumps(result.to_dict(), allow_nan=False)


def test_questions_that_do_not_fit_a_model(tokenizer):
    model = TINY["llama"](vocab_size=258)
    with pytest.raises(SurgeryError, match="has 64 positions, prompt and choice have 76"):
        evaluate_choices(model, tokenizer=tokenizer, items=5, context=60)
    with pytest.raises(SurgeryError, match="out knows 128"):
        evaluate_choices(TINY["llama"](), tokenizer=byte_tokenizer(), items=5, context=30)


# --- the command ----------------------------------------------------------------------------------------------------


def questions(count: int = 12) -> str:
    """Words that the tiny tokenizer knows; choices of one to three words."""
    draw, lines = random.Random(5), []
    for number in range(count):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))
        choices = [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(3)]
        lines.append(json.dumps({"prompt": prompt, "choices": choices, "answer": number % 3}))
    return "\n".join(lines)


def test_command(surgery, model, tmp_path):
    (tmp_path / "q.jsonl").write_text(questions())
    done = surgery("eval", model, "--base", model, "--choices", "--labelled", "q.jsonl")
    assert done.code == 0, done.err
    for words in (
        "base:      ",
        "converted: ",
        " of 12 questions right",
        "only the base 0",
        "33.3%",
        "q.jsonl (sha256",
    ):
        assert words in done.out
    facts = surgery("eval", model, "--choices", "--labelled", "q.jsonl", "--json").json
    exact, tokenizer = double(load_model(model)), read_tokenizer(model)
    for case, item in zip(facts["cases"], encode(tokenizer, read_questions("q.jsonl")), strict=True):
        want = one_by_one(exact, item)
        assert case["out"]["logps"] == pytest.approx(want, abs=2e-2)  # the model is in bfloat16
        assert case["answer"] == item.answer
    made = surgery("eval", model, "--choices", "--choice-items", "3", "--text", tmp_path / "long.txt")
    assert made.code == 2
    (tmp_path / "long.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=900)))
    made = surgery("eval", model, "--choices", "--choice-items", "3", "--text", tmp_path / "long.txt")
    assert made.code == 0, made.err
    assert "of 3 questions right" in made.out
    assert "passages of 96 tokens, seed 0" in made.out


def test_command_refuses(refused, model, tmp_path):
    (tmp_path / "q.jsonl").write_text(questions())
    refused("eval", model, "--labelled", "q.jsonl", says=["--labelled is only for choices", "--choices"])
    refused("eval", model, "--choice-items", "5", says=["--choice-items is only for choices"])
    refused("eval", model, "--choices", "--windows", "5", says=["--windows is not for choices"])
    refused("eval", model, "--choices", "--depths", "5", says=["--depths is only for needles"])
    refused("eval", model, "--seed", "5", says=["--seed is only for needles and choices"])
    refused("eval", model, "--choices", "--needles", says=["use either --needles or --choices, not both"])
    refused("eval", model, "--choices", "--labelled", "q.jsonl", "--seed", "1", says=["not for questions of a file"])


# --- a search on questions, and its resuming ------------------------------------------------------------------------

SEARCH = {"grid": [1.5, 3.0], "labelled": "q.jsonl"}


@pytest.mark.parametrize("groups", ["uniform", "layers", "heads"])
def test_search_on_questions(model, tmp_path, monkeypatch, groups):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(questions())
    loaded, tokenizer, labels = load_model(model, dtype=torch.float32), read_tokenizer(model), []
    items, before = encode(tokenizer, read_questions("q.jsonl")), copy.deepcopy(loaded)
    step = sink("zero_tuning", groups=groups, **SEARCH)
    report = package.apply(recipe(step), loaded, tokenizer=tokenizer, progress=lambda *call: labels.append(call[2]))
    record = report.data["operations"][0]["record"]

    def losses(model, chosen):
        rows = [torch.tensor(one_by_one(double(model), item)) for item in chosen]
        nll = [-row.log_softmax(-1)[item.answer].item() for row, item in zip(rows, chosen, strict=True)]
        return sum(nll) / len(nll), [row.argmax().item() == i.answer for row, i in zip(rows, chosen, strict=True)]

    assert record["tried"][0]["fit"] == pytest.approx(losses(before, items[::2])[0], abs=1e-4)
    best = [min(trial["fit"] for trial in record["tried"][: i + 2]) for i in range(len(labels))]
    assert labels == [f"trying gammas: best {value:.4f}" for value in best]
    if "held_back_change" in record:
        loss, right = losses(before, items[1::2])
        assert record["held_back_before"] == pytest.approx(loss, abs=1e-4)
        assert (record["questions"], record["held_back_accuracy_before"]) == (6, sum(right) / 6)
        if record["kept"]:
            loss_after, right_after = losses(loaded, items[1::2])
            assert record["held_back_change"] == pytest.approx(loss_after - loss, abs=1e-4)
            assert record["held_back_accuracy_after"] == sum(right_after) / 6
            assert loss_after < loss
    assert record["kept"] == any(found.any() for found in log_gammas(loaded))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("groups", ["layers", "heads"])
def test_a_stopped_search_goes_on_and_ends_as_if_it_had_not(
    surgery, model, text, tmp_path, monkeypatch, groups, labelled
):
    (tmp_path / "q.jsonl").write_text(questions())
    of_text = {"grid": [1.5, 3.0], "text": "words.txt", "calibration_samples": 4, "calibration_length": 48}
    step = sink("zero_tuning", groups=groups, **(SEARCH if labelled else of_text))
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(step)))
    measured, whole = [], first_token.Trial.measure
    stop_at = math.inf

    def watched(trial, name, values, pieces):
        if name not in trial.figures.known:
            if len(measured) == stop_at:
                raise KeyboardInterrupt
            measured.append(name)
        return whole(trial, name, values, pieces)

    monkeypatch.setattr(first_token.Trial, "measure", watched)
    done = surgery("apply", "r.yaml", model, "-o", "whole", "--no-check")
    assert done.code == 0, done.err
    every, stop_at = list(measured), 3
    assert len(every) > 4
    measured.clear()
    assert surgery("apply", "r.yaml", model, "-o", "out", "--no-check").code != 0
    assert measured == every[:3]
    (state,) = (tmp_path / "out.partial").glob("*.state")
    with open(state, "a") as file:
        file.write('["held back, noth')  # killed while it wrote
    measured.clear()
    stop_at = math.inf
    done = surgery("apply", "r.yaml", model, "-o", "out", "--no-check", "--resume")
    assert done.code == 0, done.err
    assert measured == every[3:]
    records = [json.loads((tmp_path / name / "surgery.json").read_text())["operations"] for name in ("whole", "out")]
    assert records[0] == records[1]
    one, two = (load_model(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "out").glob("*.state"))


def test_two_searches_of_a_recipe_keep_their_figures_apart(surgery, model, text, tmp_path, monkeypatch):
    """Stopped in the second one: nothing of the first is measured again."""
    fields = {"groups": "uniform", "grid": [1.5], "text": "words.txt", "calibration_samples": 4}
    steps = [sink("zero_tuning", layers=[layer], calibration_length=48, **fields) for layer in (0, 1)]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(*steps)))
    measured, judge, stop_at = [], first_token.Trial.judge, 5

    def watched(trial, pieces):
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append(len(pieces))
        return judge(trial, pieces)

    monkeypatch.setattr(first_token.Trial, "judge", watched)
    assert surgery("apply", "r.yaml", model, "-o", "out", "--no-check", "--no-eval").code == 130
    states = sorted(path.name for path in (tmp_path / "out.partial").glob("*.state"))
    assert states == ["0-sink-calibration.state", "1-sink-calibration.state"]
    kept = [len((tmp_path / "out.partial" / name).read_text().splitlines()) - 1 for name in states]
    assert (sum(kept), min(kept) > 0) == (5, True)
    stop_at = math.inf
    measured.clear()
    done = surgery("apply", "r.yaml", model, "-o", "out", "--no-check", "--no-eval", "--resume")
    assert done.code == 0, done.err
    resumed = len(measured)
    measured.clear()
    assert surgery("apply", "r.yaml", model, "-o", "whole", "--no-check", "--no-eval").code == 0
    assert resumed == len(measured) - 5


def test_resume_with_other_questions_is_refused(surgery, model, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text(questions())
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(sink("zero_tuning", **SEARCH))))
    whole = first_token.Trial.settle
    monkeypatch.setattr(first_token.Trial, "settle", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert surgery("apply", "r.yaml", model, "-o", "out", "--no-check").code == 130
    monkeypatch.setattr(first_token.Trial, "settle", whole)
    (tmp_path / "q.jsonl").write_text(questions(14))
    ran = surgery("apply", "r.yaml", model, "-o", "out", "--no-check", "--resume")
    assert (ran.code, "start again with --overwrite" in ran.err) == (2, True)


def test_figures_of_other_settings_are_measured_anew(tmp_path):
    for settings, known in (("a", False), ("a", True), ("b", False)):
        found = SavedFigures(tmp_path / "x.state", settings)
        assert ("n" in found.known) == known
        assert found.once("n", lambda: [1.5]) == [1.5]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["labelled=none.jsonl"], ["labelled: none.jsonl: no such file of questions"]),
        (["labelled=few.jsonl"], ["few.jsonl has 7 different questions; at least 8"]),
        (["labelled=wrong.jsonl"], ["wrong.jsonl:2: answer should be", "wrong.jsonl:3: this is not JSON"]),
        (["labelled=q.jsonl", "objective=entropy"], ["with objective: ce"]),
        (["labelled=q.jsonl", "gamma=2"], ["for a gamma that is searched"]),
        (
            ["labelled=q.jsonl", "method=learned", "start=identity"],
            ["labelled is for method: zero_tuning or act, not learned"],
        ),
    ],
)
def test_what_cannot_be_searched_on_is_refused_by_plan(refused, model, tmp_path, overrides, says):
    (tmp_path / "q.jsonl").write_text(questions(8))
    (tmp_path / "few.jsonl").write_text(questions(7))
    (tmp_path / "wrong.jsonl").write_text(f"{GOOD}\n{GOOD.replace('0', '5')}\nx\n")
    refused("plan", "zero-tuning", model, *overrides, says=says)


def test_a_recipe_file_names_no_questions_elsewhere(refused, model, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(sink("zero_tuning", labelled="/etc/passwd"))))
    refused("plan", "r.yaml", model, says=["labelled of a recipe file may not be absolute"])


def test_questions_too_long_for_the_model_leave_it_as_it_was(model, tmp_path):
    asked = [{"prompt": f"{i} " + "the cat " * 600, "choices": ["sat", "ran"], "answer": 0} for i in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    loaded = load_model(model)
    with pytest.raises(SurgeryError, match="has 1024 positions"):
        package.apply(
            recipe(sink("zero_tuning", labelled=str(tmp_path / "q.jsonl"))), loaded, tokenizer=read_tokenizer(model)
        )
    assert not hasattr(loaded.config, "surgery")
