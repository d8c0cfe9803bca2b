"""Query heads off at run time: against forwards with zeroed weights, the random draws, the probe, what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import (
    TINY,
    attention_modules,
    base,
    difference,
    double,
    head_dim_of,
    logits_of,
    one_thread,  # noqa: F401 (a fixture)
)
from tokenizers_of_bytes import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.head_scores import HeadScores, model_identity
from surgery.data.haystack import make_needles
from surgery.errors import SurgeryError
from surgery.evaluation.ablation import HeadAblation, heads_off
from surgery.evaluation.probes.needles import Needles
from surgery.evaluation.recall import run_needles
from surgery.report.card import render_card
from surgery.runtime.modeling_surgery import CACHE

OUTPUTS = ("o_proj", "dense", "c_proj", "out_proj")
OFF = [(0, 0), (0, 5), (1, 2), (1, 3), (1, 7)]
SMALL = {"lengths": (300,), "depths": 2, "samples": 2}


def without_columns(model, heads: list[tuple[int, int]]):
    """A copy whose output weights have zeros where they read these heads."""
    other, size = copy.deepcopy(model), head_dim_of(model)
    modules = attention_modules(other)
    for layer, head in heads:
        output = next(getattr(modules[layer], name) for name in OUTPUTS if hasattr(modules[layer], name))
        weight = output.weight.data.T if type(output).__name__ == "Conv1D" else output.weight.data
        weight[:, head * size : (head + 1) * size] = 0
    return other


@pytest.mark.parametrize("name", TINY)
def test_heads_off_are_zero_columns_in_every_family(name):
    model = double(base(name))
    before = logits_of(model)
    with heads_off(model, OFF):
        off = logits_of(model)
    assert difference(off, logits_of(without_columns(model, OFF))) < 1e-9
    assert difference(off, before) > 1e-3, "these heads change nothing here: the test has no power"
    assert torch.equal(logits_of(model), before), "the model is as it was"
    assert not any(module._forward_pre_hooks for module in model.modules())
    with heads_off(model, []):
        assert torch.equal(logits_of(model), before)


def test_an_error_leaves_the_model_as_it_was_and_a_projection_that_is_not_called_is_told():
    model = double(base("llama"))
    with pytest.raises(MemoryError), heads_off(model, OFF):
        raise MemoryError
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(SurgeryError, match="layer 1 was not called"), heads_off(model, OFF):
        model.model.layers[0].self_attn.o_proj(torch.zeros(1, 1, 64, dtype=torch.float64))


def test_left_padding_and_cached_decoding():
    """A row in a batch is the row alone, and decoding with the cache is the forward without one."""
    model, ids = double(base("llama")), torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(12) >= 3).long()[None]
    with torch.no_grad(), heads_off(model, OFF):
        alone = model(input_ids=ids).logits
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        in_batch = model(input_ids=padded, **inputs).logits[:, 3:]
        step = model(input_ids=ids[:, :6], use_cache=True)
        cached = [step.logits]
        for token in ids[0, 6:]:
            step = model(input_ids=token[None, None], **{CACHE: step[CACHE]}, use_cache=True)
            cached.append(step.logits)
    assert difference(in_batch, alone) < 1e-9
    assert difference(torch.cat(cached, 1), alone) < 1e-9


def test_off_for_the_answer_alone():
    """The prompt but for its last token is read by the unchanged model, and the rest by the one without the heads."""
    model, ids = double(base("llama")), torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with heads_off(model, OFF, last_only=True):
            prefill = model(input_ids=ids[:, :6], use_cache=True)
            answer = [prefill.logits[:, -1]]
            for token in ids[0, 6:]:
                prefill = model(input_ids=token[None, None], **{CACHE: prefill[CACHE]}, use_cache=True)
                answer.append(prefill.logits[:, -1])
        cache, bare = model(input_ids=ids[:, :5], use_cache=True)[CACHE], without_columns(model, OFF)
        for index, token in enumerate(ids[0, 5:]):
            step = bare(input_ids=token[None, None], **{CACHE: cache}, use_cache=True)
            cache = step[CACHE]
            assert difference(answer[index], step.logits[:, -1]) < 1e-9


# --- which heads ----------------------------------------------------------------------------------------------------


def table(tmp_path, rows: list[list[float]], anatomy: Anatomy, name: str = "s.json", **fields):
    file = tmp_path / name
    HeadScores("retrieval", rows, {"model": model_identity(anatomy)}, per="heads", **fields).save(file)
    return file


def of(file, anatomy, **options) -> HeadAblation:
    return HeadAblation.of(file, anatomy, **({"draws": 5, "seed": 0, "rows": "all"} | options))


def test_the_highest_heads_and_as_many_of_the_same_layers(tmp_path):
    anatomy = Anatomy.of(base("llama"))
    rows = [[0.0, 0.9, 0.05, 0.0, 0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 0.2]]
    file = table(tmp_path, rows, anatomy)
    chosen = of(file, anatomy, top=3)
    assert chosen.highest == ((0, 1), (0, 4), (1, 6))
    assert chosen.notes == ()
    assert len(chosen.draws) == 5
    for draw in chosen.draws:
        assert [layer for layer, _ in draw] == [0, 0, 1]
        assert len(set(draw)) == 3
        assert not set(draw) & set(chosen.highest)
    assert len(set(chosen.draws)) > 1
    assert of(file, anatomy, top=3).draws == chosen.draws
    assert of(file, anatomy, top=3, seed=1).draws != chosen.draws
    assert of(file, anatomy).highest == ((0, 1), (0, 4), (1, 6), (1, 7)), "above 0.1"
    (note,) = of(file, anatomy, top=6).notes
    assert note == "1 of the 6 highest heads have the score 0 or less"


def test_too_few_other_heads_are_told(tmp_path):
    anatomy = Anatomy.of(base("llama"))
    file = table(tmp_path, [[0.5] * 6 + [0.0] * 2, [0.0] * 7 + [0.5]], anatomy)
    chosen = of(file, anatomy, top=7)
    assert all(draw[:2] == ((0, 6), (0, 7)) and draw[2][0] == 1 for draw in chosen.draws)
    (note,) = chosen.notes
    assert note == ("too few other heads in the same layers (layer 0 has 2 for 6): a draw switches off 3, not 7")
    assert of(file, anatomy, top=7, draws=0).notes == ()


def test_what_is_refused(tmp_path):
    anatomy = Anatomy.of(base("llama"))
    file = table(tmp_path, [[0.05] * 8] * 2, anatomy)
    for options, words in (
        ({"top": 17}, "top is 17, and the model has 16 query heads"),
        ({"top": 16}, "no others to compare them with"),
        ({}, r"no query head scores above 0\.1"),
    ):
        with pytest.raises(SurgeryError, match=words):
            of(file, anatomy, **options)
    assert len(of(file, anatomy, top=16, draws=0).highest) == 16
    other = Anatomy.of(base("qwen3"))
    with pytest.raises(SurgeryError, match=r"the scores are of another model: .*config hash"):
        of(table(tmp_path, [[0.5] * 8] * 2, other, "other.json"), anatomy, top=1)
    with pytest.raises(SurgeryError, match=r"2 x 9 \(layers x query heads\)"):
        of(table(tmp_path, [[0.5] * 9] * 2, anatomy, "nine.json"), anatomy, top=1)
    many = Anatomy.of(base("gpt_neox"))  # as many KV heads as query heads
    HeadScores("far-mass", [[0.5] * 8] * 2, {"model": model_identity(many)}).save(tmp_path / "kv.json")
    with pytest.raises(SurgeryError, match="these are scores of KV heads") as caught:
        of(tmp_path / "kv.json", many, top=1)
    assert "--per heads" in caught.value.fix
    (tmp_path / "plain.txt").write_text("0.5 0 0 0 0 0 0 0\n" * 2)
    assert of(tmp_path / "plain.txt", many, top=2).highest == ((0, 0), (1, 0))


# --- the probe ------------------------------------------------------------------------------------------------------


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)).eval()


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def scores(tmp_path):
    return table(tmp_path, [[0.0, 0.9, 0.0, 0.0], [0.2, 0.0, 0.0, 0.8]], Anatomy.of(tiny()))


@pytest.mark.parametrize("off", ["all", "answer"])
def test_the_probe_is_the_recall_test_of_models_without_those_heads(scores, off):
    """Against copies with zeroed weights: NLL and hit of every needle, for the highest heads and for each draw."""
    model = tiny()
    probe = Needles(**SMALL, without=scores, top=2, draws=2, off=off)
    calls = []
    result = probe.measure(model, tokenizer=byte_tokenizer(), progress=lambda *call: calls.append(call))
    sets = [result.ablation.highest, *result.ablation.draws]
    assert sets[0] == ((0, 1), (1, 3))
    for heads, outcomes in zip(sets, result.changed["out"].values(), strict=True):
        if off == "all":
            want = run_needles(without_columns(model, heads), result.cases)
        else:
            with heads_off(model, heads, last_only=True):
                want = run_needles(model, result.cases)
        assert [one.hit for one in outcomes] == [other.hit for other in want]
        assert [one.nll for one in outcomes] == pytest.approx([other.nll for other in want], abs=1e-5)
        assert [one.nll for one in outcomes] != pytest.approx([one.nll for one in result.outcomes["out"]], abs=1e-4)
    needles = make_needles(byte_tokenizer(), **SMALL)
    assert result.outcomes["out"] == run_needles(tiny(), needles) == run_needles(model, needles), "it is restored"
    assert calls[0] == (0, 100, "recall test: asked 0 of 16, now the converted model")
    assert calls[-1] == (100, 100, "recall test: asked 16 of 16, now the converted model (random heads off, draw 2)")
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    facts = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    without = facts["without"]
    assert without["scores"] == {"file": "s.json", "method": "retrieval"}
    assert without["highest"]["heads"] == [[0, 1], [1, 3]]
    assert (without["rows"], without["top"], len(without["random"])) == (off, 2, 2)
    hits = [sum(outcome.hit for outcome in run) for run in result.changed["out"].values()]
    assert [without["highest"]["hits"], *(side["hits"] for side in without["random"])] == hits
    assert without["random_mean_hits"] == sum(hits[1:]) / 2
    assert all(len(case["without"]) == 3 for case in facts["cases"])


def test_without_a_score_file_nothing_changes(scores):
    plain = Needles(**SMALL).measure(tiny(), tiny(), tokenizer=byte_tokenizer())
    facts = plain.to_dict()
    assert "without" not in facts
    assert "without" not in facts["cases"][0]
    assert Needles(**SMALL).effort.read * 4 == Needles(**SMALL, without=scores).effort.read, "1 + 5 runs beside two"


@pytest.mark.parametrize("operation", [{"op": "duo_attention", "sinks": 2, "window": 30, "streaming_ratio": 0.5}])
def test_a_converted_model_and_its_base(folder, scores, tmp_path, operation, surgery):
    """The heads of the converted model are off, not the base's; card and surgery.json have the figures."""
    (tmp_path / "kv.txt").write_text("0.1 0.9\n0.8 0.2\n")
    block = {"lengths": "300", "depths": 1, "samples": 2, "without": "s.json", "top": 2, "draws": 1}
    recipe = {"version": 1, "name": "r", "operations": [operation | {"scores": "kv.txt"}]}
    recipe["evaluate"] = {"windows": 1, "length": 64, "probes": {"needles": block}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    ran = surgery("apply", "r.yaml", folder, "-o", "out", "--no-check", "--no-gate")
    assert ran.code == 0, ran.err
    data = json.loads((tmp_path / "out/surgery.json").read_text())
    without = data["evaluation"]["needles"]["without"]
    assert without["highest"]["of"] == without["random"][0]["of"] == data["evaluation"]["needles"]["out"]["of"] == 2
    card = (tmp_path / "out/README.md").read_text()
    assert "With its 2 query heads of the highest retrieval score off, the model finds" in card
    options = ("--probe", "needles", "lengths=300", "depths=1", "samples=2", "without=s.json", "top=2", "draws=1")
    alone = surgery("eval", "out", *options, "--json").json
    both = surgery("eval", "out", "--base", folder, *options, "--json").json
    assert alone["without"] == both["without"] == without
    split = package.load(tmp_path / "out")
    needles = make_needles(byte_tokenizer(), lengths=(300,), depths=1, samples=2)
    want = run_needles(without_columns(split, [(0, 1), (1, 3)]), needles)
    assert without["highest"]["nll"] == pytest.approx(sum(one.nll for one in want) / 2, abs=1e-4)


def test_the_command(folder, scores, surgery):
    options = ("--probe", "needles", "lengths=300", "depths=1", "samples=2", "without=s.json", "top=2", "draws=2")
    done = surgery("eval", folder, *options)
    assert done.code == 0, done.err
    for words in (
        "query heads off", "the 2 with the highest score", "random, draw 2", "random, mean",
        "The highest: layer 0 head 1, layer 1 head 3.",
        "With its 2 query heads of the highest retrieval score off, the model finds 0 of the 2 needles, and "
        "unchanged 0; with as many random heads of the same layers off, 0.0 (mean of 2 draws).",
    ):  # fmt: skip
        assert words in " ".join(done.out.split()), words


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["top=3"], ["top is read only with a score file of query heads", "without=SCORES.json"]),
        (["draws=3"], ["draws is read only with a score file"]),
        (["without=s.json", "top=0"], ["top should be at least 1"]),
        (["without=s.json", "top=9"], ["top is 9, and the model has 8 query heads"]),
        (["without=s.json", "draws=-1"], ["draws should be at least 0"]),
        (["without=s.json", "off=prompt"], ["off is 'prompt'", "all or answer"]),
        (["without=none.json"], ["no such score file", "none.json"]),
        (["without=base/config.json"], ["JSON, but no table of scores"]),
        (["without=kv.json", "top=1"], ["these are scores of KV heads", "--per heads"]),
        (["without=other.json", "top=1"], ["the scores are of another model", "score MODEL --per heads -o FILE"]),
        (["without=7"], ["without should be text"]),
    ],
)
def test_bad_input(folder, scores, refused, tmp_path, settings, says):
    identity = model_identity(Anatomy.of(tiny()))
    HeadScores("far-mass", [[0.5, 0.1]] * 2, {"model": identity}).save(tmp_path / "kv.json")
    other = identity | {"hash": "0" * 12, "name": "another"}
    HeadScores("retrieval", [[0.5] * 4] * 2, {"model": other}, per="heads").save(tmp_path / "other.json")
    refused("eval", folder, "--probe", "needles", "lengths=300", "depths=1", "samples=1", *settings, says=says)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"without": "s.json", "top": 9}, "top is 9, and the model has 8 query heads"),
        ({"without": "none.json"}, "no such score file"),
        ({"without": "base/config.json"}, "JSON, but no table of scores"),
        ({"without": "kv.txt", "top": 1}, "the scores are of another model"),
    ],
)
def test_a_recipe_is_refused_before_its_base_is_converted(folder, scores, refused, tmp_path, settings, says):
    (tmp_path / "kv.txt").write_text("0.1 0.9\n0.8 0.2\n")
    probes = {"needles": {"lengths": 300, "depths": 1, "samples": 1} | settings}
    recipe = {"version": 1, "name": "r", "operations": [{"op": "duo_attention", "streaming_ratio": 1.0}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"evaluate": {"windows": 1, "length": 64, "probes": probes}}))
    refused("apply", "r.yaml", folder, "-o", "out", "--no-check", "--no-gate", says=[says])
    assert not any(tmp_path.glob("out*"))


def test_the_card_of_a_figure_that_is_not_a_number():
    record = {"status": "done", "settings": {"secret": "digits", "lengths": [64]}, "kept": {}}
    side = {"hits": 0, "of": 2, "nll": None, "heads": [[0, 1]]}
    record |= {"base": side, "out": side}
    record["without"] = {"scores": {"method": "retrieval"}, "rows": "answer", "top": 1, "highest": side, "random": []}
    card = render_card({"evaluation": {"status": "done", "out": {"perplexity": 2.0}, "needles": record}}, None)
    assert "With its 1 query head of the highest retrieval score off while it answers, the model finds 0 of" in card


@pytest.mark.parametrize(
    "step",
    [
        {"op": "duo_attention", "sinks": 1, "window": 4, "streaming_ratio": 0.5, "scores": "kv.txt"},
        {"op": "moh", "router": "random", "calibration_samples": 4, "calibration_length": 32},
        {"op": "sparse_prefill", "method": "pooled", "block": 16, "dense_below": 16, "density": 0.5},
        {"op": "prune_heads", "granularity": "head", "per_layer": 1, "scores": "magnitude", "refit": False},
    ],
    ids=lambda step: step["op"],
)
def test_heads_off_in_converted_models_with_and_without_a_cache(step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kv.txt").write_text("1 2 3 4\n4 3 2 1\n")
    model, recipe = TINY["llama"](vocab_size=300), {"version": 1, "name": "t", "operations": [step], "evaluate": None}
    package.apply(recipe, model, tokenizer=byte_tokenizer())
    ids = torch.randint(3, 100, (1, 60), generator=torch.Generator().manual_seed(1))
    heads = [(0, 2), (1, 0), (1, 6)]

    def logits(other, cached: bool) -> torch.Tensor:
        with torch.no_grad():
            if not cached:
                return other(input_ids=ids, use_cache=False).logits[:, 55:]
            step = other(input_ids=ids[:, :56], use_cache=True)
            rows = [step.logits[:, -1:]]
            for token in ids[0, 56:]:
                step = other(input_ids=token[None, None], use_cache=True, **{CACHE: step[CACHE]})
                rows.append(step.logits)
            return torch.cat(rows, 1)

    sizes = [layer.head_dim for layer in Anatomy.of(model).layers]
    bare = copy.deepcopy(model)
    for layer, head in heads:
        weight = attention_modules(bare)[layer].o_proj.weight.data
        weight[:, head * sizes[layer] : (head + 1) * sizes[layer]] = 0
    for cached in (False, True):
        before = logits(model, cached)
        with heads_off(model, heads):
            off = logits(model, cached)
        assert difference(off, logits(bare, cached)) < 1e-4
        assert difference(off, before) > 1e-3, "no power"
        assert torch.equal(logits(model, cached), before)
