"""Head scores: each method against a computation of its own, on tiny models of several families; then the files."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import TEXT
from families import TINY, double
from recalls import plant_answers

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.attention_hook import answer_logits, attention_weights, hook_attention
from surgery.calibration.head_scores import (
    HeadScores,
    choose_streaming,
    load_scores,
    model_identity,
    names_method,
    ranks,
)
from surgery.data.passkeys import Recall, passkeys, plain_windows
from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.operations.head_scorers import fisher
from surgery.operations.head_scorers import learned_gates as gates_module
from surgery.operations.head_scorers.far_mass import mass_outside
from surgery.operations.head_scorers.learned_gates import MixedAttention, answer_states, gates, schedule
from surgery.operations.head_scorers.retrieval import NOWHERE, rows_of_passkeys, strongest_tokens
from surgery.operations.head_scorers.scorers import METHODS, score, settings_of
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime.surgery_attention import surgery_attention

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")
SINKS, WINDOW, LENGTH = 2, 9, 180
REACH = {"sinks": SINKS, "window": WINDOW}
SHORT = {**REACH, "samples": 2, "length": LENGTH}
PASSKEYS = {**SHORT, "keys": 2, "seed": 0}
WORDS = Text("words", "0" * 64, TEXT)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def tiny(family: str, **fields):
    """A tiny model with room for the sequences; windows of the base are wider than one token block."""
    fields = {"max_position_embeddings": 256} | fields
    if family in ("gemma2", "gpt_oss"):
        fields |= {"sliding_window": 40}
    return TINY[family](**fields)


def settings(method: str) -> dict:
    return SHORT | {"text": WORDS} | ({"steps": 3} if method == "gates" else {})


# --- sequences ----------------------------------------------------------------------------------------------


def test_passkeys_come_back_token_by_token_from_outside_sinks_and_window(tokenizer):
    made = passkeys(WORDS, tokenizer, **PASSKEYS)
    assert [len(each.ids) for each in made] == [LENGTH] * 2
    for each in made:
        assert len(each.spans) == len(each.answers) == 2
        for (first, end), (again, upto) in zip(each.spans, each.answers, strict=True):
            assert torch.equal(each.ids[first:end], each.ids[again:upto])
            assert end - first == upto - again == 8, "eight words, each a token here"
            assert first >= SINKS
            assert int(each.rows.min()) - (end - 1) >= WINDOW, "in nobody's window"
        assert each.rows.tolist() == [row for a, b in each.answers for row in range(a - 1, b - 1)]
        assert each.row_spans.tolist() == [list(span) for span in each.spans for _ in range(8)]
    same, other = passkeys(WORDS, tokenizer, **PASSKEYS), passkeys(WORDS, tokenizer, **PASSKEYS | {"seed": 1})
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(made, same, strict=True))
    assert not torch.equal(made[0].ids, other[0].ids)


def test_fewer_passkeys_where_there_is_no_room_for_all(tokenizer):
    made = passkeys(WORDS, tokenizer, **PASSKEYS | {"keys": 8})
    assert {len(each.spans) for each in made} == {4}, "of the eight asked for"
    assert {len(each.ids) for each in made} == {LENGTH}
    for each in made:
        ends = [end for _, end in each.spans]
        assert int(each.rows.min()) - (max(ends) - 1) >= WINDOW


def test_sequences_without_a_far_past_are_refused(tokenizer):
    with pytest.raises(SurgeryError, match="no far past"):
        passkeys(WORDS, tokenizer, **PASSKEYS | {"window": LENGTH - 42})
    with pytest.raises(SurgeryError, match="different words"):
        passkeys(Text("one", "0" * 64, "word " * 300), tokenizer, **PASSKEYS)
    with pytest.raises(SurgeryError, match="too short"):
        passkeys(WORDS, tokenizer, **PASSKEYS | {"length": 500})


def test_bos_stands_first_where_the_tokenizer_begins_with_it(tiny_llama):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    with_bos = AutoTokenizer.from_pretrained(tiny_llama)
    with_bos._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for each in passkeys(WORDS, with_bos, **PASSKEYS):
        assert int(each.ids[0]) == 1
        assert len(each.ids) == LENGTH


# --- attention weights, and what is read from them --------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("learned", [False, True])
def test_attention_weights_and_far_mass_by_brute_force(softcap, limit, learned):
    """Each weight alone in Python's own float64."""
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 20, 8, generator=draw) * 2 for heads in (6, 3))
    s_aux = torch.randn(6, generator=draw) if learned else None
    rows = torch.tensor([3, 11, 19])
    got = attention_weights(query, key, rows, scale=0.4, limit=limit, softcap=softcap, s_aux=s_aux)
    assert got.shape == (1, 6, 3, 20)
    far = [0.0] * 6
    for head in range(6):
        for r, i in enumerate(rows.tolist()):
            logits = {}
            for j in range(20):
                if j <= i and (limit is None or i - j < limit):
                    x = 0.4 * math.fsum(
                        float(a) * float(b) for a, b in zip(query[0, head, i], key[0, head // 2, j], strict=True)
                    )
                    logits[j] = math.exp(softcap * math.tanh(x / softcap) if softcap else x)
            total = math.fsum(logits.values()) + (math.exp(float(s_aux[head])) if learned else 0.0)
            for j in range(20):
                assert float(got[0, head, r, j]) == pytest.approx(logits.get(j, 0.0) / total, abs=2e-6)
                far[head] += logits.get(j, 0.0) / total / 3 if j >= 2 and i - j >= 4 else 0.0
    assert mass_outside(got, rows, sinks=2, window=4).tolist() == pytest.approx(far, abs=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_far_mass_is_the_eager_attention_outside_sinks_and_window(family, tokenizer):
    """Against the weights that Transformers' own eager path gives in float64: soft-cap and learned sinks included."""
    model = tiny(family)
    got = score(model, tokenizer, "far-mass", **PASSKEYS, text=WORDS)
    sequences = passkeys(WORDS, tokenizer, **PASSKEYS)
    eager = double(copy.deepcopy(model).eval())
    eager.set_attn_implementation("eager")
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    far = ((j >= SINKS) & (i - j >= WINDOW)).double()
    want = 0
    with torch.no_grad():
        for each in sequences:
            weights = torch.stack(eager(input_ids=each.ids[None], output_attentions=True).attentions)
            rows = [row for first, end in each.answers for row in range(first - 1, end - 1)]
            want = want + (weights[:, 0] * far).sum(-1)[:, :, rows].mean(-1) / len(sequences)  # [layers, heads]
    kv_heads = eager.config.num_key_value_heads
    want = want.view(len(want), kv_heads, -1).amax(-1)
    assert torch.allclose(torch.tensor(got.scores, dtype=torch.float64), want, atol=1e-5)
    assert want.max() > 0.1


def test_a_head_that_looks_at_the_token_to_come_scores():
    """Planted: head 0 copies, 1 looks at the same words elsewhere, 2 at wrong ones, 3 is right two times of three."""
    ids = torch.tensor([5, 6, 7, 8, 9, 6, 7, 8, 6, 7, 8])
    sequence = Recall(ids, spans=((1, 4),), answers=((8, 11),))
    assert sequence.rows.tolist() == [7, 8, 9]
    target = {0: [1, 2, 3], 1: [5, 6, 7], 2: [2, 3, 1], 3: [1, 5, 3]}
    key = 30 * torch.eye(11)[None, None].expand(1, 2, 11, 11)  # two KV heads, key j points along axis j
    query = torch.zeros(1, 4, 11, 11)
    for head, positions in target.items():
        for row, position in zip([7, 8, 9], positions, strict=True):
            query[0, head, row, position] = 1
    tokens = strongest_tokens(attention_weights(query, key, sequence.rows, scale=1.0), sequence)
    assert tokens.tolist() == [[6, 7, 8], [NOWHERE] * 3, [7, 8, 6], [6, NOWHERE, 8]]
    hits = tokens == ids[sequence.rows + 1]
    assert hits.tolist() == [[True] * 3, [False] * 3, [False] * 3, [True, False, True]]


def test_with_two_passkeys_each_row_has_its_own():
    """The same word stands in both: looking at the other one's is no copy of this one."""
    ids = torch.tensor([3, 9, 4, 9, 5, 5, 9, 6, 9])
    sequence = Recall(ids, spans=((1, 2), (3, 4)), answers=((6, 7), (8, 9)))
    weights = torch.zeros(1, 1, 2, 9)
    weights[0, 0, :, 1] = 1
    assert strongest_tokens(weights, sequence).tolist() == [[9, NOWHERE]]
    assert rows_of_passkeys(sequence) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("per", ["kv_heads", "heads"])
def test_retrieval_against_eager_attention(tokenizer, monkeypatch, per):
    """Of four passkeys one is failed, and one has a wrong token, for which a head copies if it looks at that token."""
    model, made = tiny("llama"), passkeys(WORDS, tokenizer, **PASSKEYS)
    wrong = {id_of(made[0]): range(6), id_of(made[1]): [2]}
    assert all(end - first < 12 for each in made for first, end in each.answers)
    plant_answers(monkeypatch, lambda sequence: wrong[id_of(sequence)])
    got = score(model, tokenizer, "retrieval", **PASSKEYS, text=WORDS, per=per)
    eager = double(copy.deepcopy(model).eval())
    eager.set_attn_implementation("eager")
    total, kept, steps, right = torch.zeros(2, 8, dtype=torch.float64), 0, 0, 0
    for each in made:
        with torch.no_grad():
            attentions = eager(input_ids=each.ids[None], output_attentions=True).attentions
        index = 0
        for (first, end), (again, upto) in zip(each.spans, each.answers, strict=True):
            hits, correct = torch.zeros(2, 8, dtype=torch.float64), 0
            for row in range(again - 1, upto - 1):
                written = 0 if index in wrong[id_of(each)] else int(each.ids[row + 1])
                index, correct = index + 1, correct + (written == each.ids[row + 1]).item()
                for layer, table in enumerate(attentions):
                    for head in range(8):
                        best = int(table[0, head, row].argmax())
                        hits[layer, head] += first <= best < end and each.ids[best] == written
            steps, right = steps + end - first, right + correct
            if correct / (end - first) > 0.5:
                kept, total = kept + 1, total + hits / (end - first)
    assert (got.origin["steps"], got.origin["passkeys"], got.origin["left_out"]) == (steps, 4, 4 - kept)
    assert kept == 3
    assert got.origin["answered"] == pytest.approx(right / steps, abs=1e-4)
    want = total / kept if per == "heads" else (total / kept).view(2, 4, 2).amax(-1)
    assert got.scores == want.tolist()
    assert want.max() > 0
    assert got.per == per


def id_of(sequence: Recall) -> tuple:
    return tuple(sequence.ids.tolist())


def test_a_model_that_repeats_nothing_has_no_retrieval_score(tokenizer):
    with pytest.raises(
        SurgeryError, match=r"it repeats none of 4 passkeys \(0% of their tokens are right\)"
    ) as caught:
        score(tiny("llama"), tokenizer, "retrieval", **PASSKEYS, text=WORDS)
    assert "far-mass" in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("method", [name for name, scorer in METHODS.items() if not scorer.kv_only])
def test_scores_of_query_heads_and_of_kv_heads_are_one_measurement(method, tokenizer, monkeypatch):
    plant_answers(monkeypatch)
    model = tiny("qwen3")
    queries = score(model, tokenizer, method, **settings(method), per="heads")
    groups = score(model, tokenizer, method, **settings(method))
    assert (queries.per, groups.per) == ("heads", "kv_heads")
    assert [len(row) for row in queries.scores] == [8, 8]
    if method != "induction":  # there the largest sum is not the sum of the largest
        assert groups.scores == [[max(row[i : i + 2]) for i in (0, 2, 4, 6)] for row in queries.scores]
    file = json.loads(json.dumps(queries.to_dict()))
    assert (file["format"], file["per"]) == (2, "heads")
    assert "per" not in groups.to_dict()


def test_methods_without_a_number_for_each_query_head_say_why(tokenizer):
    for method, words in (("gates", "one gate"), ("ablation", "stream together"), ("fisher", "stream together")):
        with pytest.raises(SurgeryError, match=words) as caught:
            score(tiny("llama"), tokenizer, method, **settings(method), per="heads")
        assert "far-mass, retrieval, induction" in caught.value.exists
    with pytest.raises(SurgeryError, match="not measured per 'queries'"):
        score(tiny("llama"), tokenizer, "far-mass", **SHORT, per="queries")


def test_a_file_of_query_heads_is_no_file_of_kv_heads(tmp_path):
    """Also where the model has as many of both, and their shapes say nothing."""
    for model, heads in ((tiny("llama"), 8), (TINY["gpt_neox"](), 8)):
        anatomy, file = Anatomy.of(model), tmp_path / f"{heads}.json"
        found = HeadScores("retrieval", [[0.25] * heads] * 2, {"model": model_identity(anatomy)}, per="heads")
        found.save(file)
        assert load_scores(file, anatomy, per="heads") == found
        assert load_scores(file, anatomy, per=("heads", "kv_heads")) == found
        with pytest.raises(SurgeryError, match="these are scores of query heads, and scores of KV heads") as caught:
            load_scores(file, anatomy)
        assert "--per kv-heads" in caught.value.fix
    file = tmp_path / "kv.json"
    anatomy = Anatomy.of(tiny("llama"))
    HeadScores("far-mass", [[0.25] * 4] * 2, {}).save(file)
    with pytest.raises(SurgeryError, match="these are scores of KV heads, and scores of query heads") as caught:
        load_scores(file, anatomy, per="heads")
    assert "--per heads" in caught.value.fix
    file.write_text(json.dumps({"format": 2, "per": "kv_heads", "method": "m", "scores": [[0.0]], "origin": {}}))
    with pytest.raises(SurgeryError, match="per 'kv_heads' in format 2"):
        load_scores(file, anatomy, per="heads")
    file.write_text(json.dumps({"format": 3, "method": "m", "scores": [[0.0]], "origin": {}}))
    with pytest.raises(SurgeryError, match="format 3, known is 1 for KV heads, 2 for query heads"):
        load_scores(file, anatomy)


def test_how_many_heads_are_above_a_threshold():
    scores = HeadScores("retrieval", [[0.1, 0.5, 0.0], [0.5, 0.2, 0.1]], per="heads")
    assert scores.above(0.1) == {
        "threshold": 0.1, "above": 3, "of": 6, "share": 0.5,
        "top": [{"layer": 0, "head": 1, "score": 0.5}, {"layer": 1, "head": 0, "score": 0.5},
                {"layer": 1, "head": 1, "score": 0.2}],
    }  # fmt: skip
    assert scores.above(0.5)["above"] == 0
    many = HeadScores("retrieval", [[1.0] * 25])
    assert (many.above(0)["above"], len(many.above(0)["top"])) == (25, 20)


# --- fisher --------------------------------------------------------------------------------------------------


class Mixed:
    """An attention function whose heads add `share[layer, head, position]` of what streaming changes."""

    def __init__(self, share):
        self.share = share

    def __call__(self, module, query, key, value, mask, **kwargs):
        layer, heads = module.layer_idx, self.share.shape[1]
        self.hook.set_streaming(layer)
        full, _ = surgery_attention(module, query, key, value, mask, **kwargs)
        self.hook.set_streaming(layer, range(heads), **REACH)
        near, _ = surgery_attention(module, query, key, value, mask, **kwargs)
        share = self.share[layer].repeat_interleave(query.shape[1] // heads, 0).T[None, :, :, None]
        return full + share * (near - full), None


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_has_the_slope_of_the_log_probabilities(family, tokenizer):
    """Against central differences in float64 of the whole model, a head at a position at a time."""
    every_expert = {"num_experts_per_tok": 4} if family == "gpt_oss" else {}  # a choice of experts jumps
    model = double(tiny(family, **every_expert).eval())
    each = passkeys(WORDS, tokenizer, **PASSKEYS)[0]
    rows, heads = torch.arange(REACH["sinks"] + REACH["window"], LENGTH), model.config.num_key_value_heads
    targets = each.ids[rows - 1, None]  # any tokens: they are the same on both sides

    remembered = iter(targets.split(fisher.ROWS))
    attention = fisher._BothOutputs(**REACH)
    attention.rows = each.rows
    with hook_attention(model, attention) as hook:
        attention.hook, attention.mass = hook, [torch.zeros(x.heads, dtype=torch.float64) for x in hook.anatomy.layers]
        changes = fisher.output_changes(model, attention, each.ids, rows, lambda logps: next(remembered))
        got = dict(changes)
    mixed = Mixed(torch.zeros(2, heads, LENGTH, dtype=torch.float64))
    with hook_attention(model, mixed) as mixed.hook, torch.no_grad():

        def total() -> float:
            logps = model(input_ids=each.ids[None], use_cache=False).logits[0, rows].log_softmax(-1)
            return float(logps.gather(-1, targets).sum())

        for layer, head, position in [(0, 0, 50), (0, heads - 1, LENGTH - 9), (1, 0, 70), (1, heads - 1, LENGTH - 2)]:
            sides = {}
            for steps in (-2, -1, 1, 2):  # not tiny: norms compute in float32
                mixed.share[layer, head, position] = steps * 0.02
                sides[steps] = total()
            mixed.share.zero_()
            slope = (8 * (sides[1] - sides[-1]) - (sides[2] - sides[-2])) / 12 / 0.02
            assert float(got[layer][position, head]) == pytest.approx(slope, abs=2e-3, rel=1e-3)
        assert max(float(table.abs().max()) for table in got.values()) > 1e-4
        assert max(float(table[: REACH["sinks"] + REACH["window"]].abs().max()) for table in got.values()) < 1e-6


def test_fisher_takes_the_mean_rank_on_text_and_on_passkeys(tokenizer):
    """Far-mass is that of the scorer of this name, on the same sequences."""
    model = tiny("llama")
    got = score(model, tokenizer, "fisher", **PASSKEYS, text=WORDS)
    again = score(model, tokenizer, "fisher", **PASSKEYS, text=WORDS)
    mass = score(model, tokenizer, "far-mass", **PASSKEYS, text=WORDS).scores
    assert got == again
    assert torch.allclose(torch.tensor(got.origin["far_mass"]), torch.tensor(mass), atol=1e-6)
    pairs = zip(ranks(got.origin["lost"]), ranks(got.origin["far_mass"]), strict=True)
    assert got.scores == [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in pairs]
    assert min(x for row in got.origin["lost"] for x in row) > 0
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fisher_is_the_kl_that_small_changes_cost(tokenizer):
    """A change of one position against the KL itself, with the mean over the whole vocabulary in place of draws."""
    model, share = double(tiny("llama").eval()), 0.05
    each, heads = passkeys(WORDS, tokenizer, **PASSKEYS)[0], model.config.num_key_value_heads
    rows, position = torch.tensor([LENGTH - 1]), LENGTH - 1
    attention, probabilities, squares = fisher._BothOutputs(**REACH), [], []
    attention.rows = each.rows
    with hook_attention(model, attention) as hook:
        attention.hook, attention.mass = hook, [torch.zeros(x.heads, dtype=torch.float64) for x in hook.anatomy.layers]
        for token in range(model.config.vocab_size):

            def target(logps, token=token):
                probabilities.append(logps.detach().exp()[0, token])
                return torch.tensor([[token]])

            terms = dict(fisher.output_changes(model, attention, each.ids, rows, target))
            squares.append(torch.stack([terms[layer][position] for layer in range(2)]).square())
    estimate = (torch.stack(probabilities)[:, None, None] * torch.stack(squares)).sum(0) / 2 * share**2
    mixed = Mixed(torch.zeros(2, heads, LENGTH, dtype=torch.float64))
    with hook_attention(model, mixed) as mixed.hook, torch.no_grad():

        def logps(layer, head, change):
            mixed.share[layer, head, position] = change
            result = model(input_ids=each.ids[None], use_cache=False).logits[0, -1].log_softmax(-1)
            mixed.share.zero_()
            return result

        full = logps(0, 0, 0.0)
        for layer in range(2):
            for head in range(heads):
                both = [(full.exp() * (full - logps(layer, head, sign * share))).sum() for sign in (1, -1)]
                kl = float(sum(both)) / 2  # without terms of third order
                assert float(estimate[layer, head]) == pytest.approx(kl, rel=0.02)


def test_fisher_draws_tokens_as_often_as_the_model_says():
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    draw = fisher.sampled_tokens(torch.Generator().manual_seed(0))
    drawn = torch.cat([draw(probabilities.log()) for _ in range(2000)], dim=1)
    assert [(drawn[0] == token).double().mean().item() for token in range(3)] == pytest.approx(
        [0.1, 0.2, 0.7], abs=0.03
    )
    assert not drawn[1].any()


# --- ablation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_the_kl_of_a_patched_model(family, tokenizer):
    """Against models patched one KV head at a time, run whole, on passkeys and on plain text twice as long."""
    model = tiny(family)
    got = score(model, tokenizer, "ablation", **PASSKEYS, text=WORDS)
    heads, far = model.config.num_key_value_heads, REACH["sinks"] + REACH["window"]
    answers = [(each.ids, each.rows) for each in passkeys(WORDS, tokenizer, **PASSKEYS)]
    length = min(2 * LENGTH, model.config.max_position_embeddings)
    samples = plain_windows(WORDS, tokenizer, length, PASSKEYS["samples"], PASSKEYS["seed"])
    plain = [(ids, torch.arange(far, length, 2)) for ids in samples]

    def run(streaming, sequences):
        patched = copy.deepcopy(model)
        runtime.patch(patched, {"layers": [{"streaming": s, **REACH} for s in streaming]})
        with torch.no_grad():
            return [
                patched(input_ids=ids[None], use_cache=False).logits[0, rows].double().log_softmax(-1)
                for ids, rows in sequences
            ]

    want = torch.zeros(2, 2, heads, dtype=torch.float64)  # kind, layer, head
    for kind, sequences in enumerate((answers, plain)):
        full = run([[], []], sequences)
        for layer in range(2):
            for head in range(heads):
                other = run([[head] if index == layer else [] for index in range(2)], sequences)
                each = [(a.exp() * (a - b)).sum(-1).mean() for a, b in zip(full, other, strict=True)]
                want[kind, layer, head] = torch.stack(each).mean()
    assert want.amax((1, 2)).min() > 1e-5
    lost = torch.tensor([*got.origin["lost"].values()], dtype=torch.float64)
    assert torch.allclose(lost, want, rtol=1e-3, atol=1e-7)
    below = (lost.flatten(1)[:, None] < lost.flatten(1)[..., None]).double().sum(-1) / (2 * heads - 1)
    assert torch.allclose(torch.tensor(got.scores).double().flatten(), below.mean(0), atol=1e-6)


def test_only_the_rows_that_are_looked_at_go_through_the_head(tokenizer):
    model, (sequence, _) = tiny("llama"), passkeys(WORDS, tokenizer, **PASSKEYS)
    with torch.no_grad():
        want = model(input_ids=sequence.ids[None]).logits[0, sequence.rows]
        assert torch.allclose(answer_logits(model, sequence), want, atol=1e-5)


# --- gates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_gradient_of_a_gate_by_finite_differences(family, tokenizer, monkeypatch):
    model, (sequence, _) = tiny(family).double(), passkeys(WORDS, tokenizer, **PASSKEYS)

    def norm(self, x):  # Transformers' own computes in float32
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(type(model.model.norm), "forward", norm)
    count = 2 * model.config.num_key_value_heads
    mixed = MixedAttention(SINKS, WINDOW)
    with hook_attention(model, mixed) as mixed.hook:
        full = answer_states(model, sequence).detach()

        def distance(values):
            mixed.gates = values
            return (answer_states(model, sequence) - full).square().mean()

        values = torch.linspace(0.2, 0.9, count, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(distance(values), [values])
        step = 1e-5
        with torch.no_grad():
            for gate in range(count):
                shift = torch.zeros_like(values)
                shift[gate] = step
                want = (distance(values + shift) - distance(values - shift)) / (2 * step)
                assert float(got[gate]) == pytest.approx(float(want), rel=1e-6, abs=1e-10)
    assert got.abs().min() > 0, "every gate matters"


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_the_split_and_open_ones_the_base(family, tokenizer):
    model, (sequence, _) = tiny(family), passkeys(WORDS, tokenizer, **PASSKEYS)
    heads = model.config.num_key_value_heads
    patched = copy.deepcopy(model)
    runtime.patch(patched, {"layers": [{"streaming": list(range(heads)), **REACH}] * 2})
    mixed = MixedAttention(SINKS, WINDOW)
    with torch.no_grad():
        base, split = (answer_states(each, sequence) for each in (model, patched))
        with hook_attention(model, mixed) as mixed.hook:
            for value, want in ((1.0, base), (0.0, split)):
                mixed.gates = torch.full((2 * heads,), value)
                assert torch.allclose(answer_states(model, sequence), want, atol=1e-5)
    assert not torch.allclose(base, split, atol=1e-3)


def test_the_schedule_rises_and_falls():
    factors = [schedule(step, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[-4:] == [1.0, 0.75, 0.5, 0.25]
    assert [schedule(step, 1) for step in range(1)] == [1.0]
    assert min(schedule(step, 200) for step in range(200)) == 0.1


def test_the_loss_falls_and_the_weight_rules(tokenizer):
    model = tiny("llama")
    scores = gates(model, tokenizer, **PASSKEYS, text=WORDS, steps=25, weight=1.0)
    losses = [distance + mean for distance, mean in scores.origin["losses"]]
    assert losses[0] == pytest.approx(1.0, abs=1e-6), "all gates open: nothing is lost"
    assert losses[-1] < 0.8 * losses[0]
    assert all(0 <= gate <= 1 for row in scores.scores for gate in row)
    free = gates(model, tokenizer, **PASSKEYS, text=WORDS, steps=25, weight=100.0)
    assert {gate for row in free.scores for gate in row} == {0.0}
    assert free.origin["undecided"] == 0.0
    dear = gates(model, tokenizer, **PASSKEYS, text=WORDS, steps=3, weight=0.0)
    assert all(gate > 0.99 for row in dear.scores for gate in row), "nothing pulls, nothing falls"


def test_a_stopped_run_goes_on_to_the_same_gates(tokenizer, tmp_path):
    model, state = tiny("qwen3"), tmp_path / "scores.json.state"
    run = {**PASSKEYS, "text": WORDS, "steps": 7, "rate": 0.1}
    uninterrupted = gates(model, tokenizer, **run)

    def stop(done, total, label):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gates(model, tokenizer, **run, state=state, progress=stop)
    assert len(json.loads(state.read_text())["losses"]) == 3
    assert untouched(model), "also after an interruption"
    steps = []
    resumed = gates(model, tokenizer, **run, state=state, progress=lambda *args: steps.append(args[0]))
    assert steps == [0, 4, 5, 6, 7]  # a stage begins with a call
    assert resumed == uninterrupted
    with pytest.raises(SurgeryError, match="another seed"):
        gates(model, tokenizer, **run | {"seed": 1}, state=state)
    state.write_text("{")
    with pytest.raises(SurgeryError):
        gates(model, tokenizer, **run, state=state)


# --- all of them ------------------------------------------------------------------------------------------------


def untouched(model) -> bool:
    left = [name for module in model.modules() for name in vars(module) if "surgery" in name or name == "forward"]
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    grads = [p for p in model.parameters() if p.grad is not None]
    return not left and not hooks and not grads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_scored_model_is_as_it_was(method, family, tokenizer, monkeypatch):
    model = tiny(family).train()
    model.lm_head.eval()
    next(model.parameters()).requires_grad_(False)
    implementation = model.config._attn_implementation
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    generator = torch.get_rng_state()
    plant_answers(monkeypatch)
    got = score(model, tokenizer, method, **settings(method), seed=1)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert torch.equal(torch.get_rng_state(), generator)
    assert untouched(model)
    assert [len(row) for row in got.scores] == [model.config.num_key_value_heads] * 2
    assert (got.method, got.origin["sinks"], got.origin["window"]) == (method, SINKS, WINDOW)
    assert got.origin["model"] == model_identity(Anatomy.of(model))
    assert all(math.isfinite(x) for row in got.scores for x in row)
    assert json.loads(json.dumps(got.to_dict())) == got.to_dict()


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_alone_decides(method, tokenizer, monkeypatch):
    plant_answers(monkeypatch)
    model, options = tiny("llama"), settings(method) | {"samples": 1}
    one, same, other = (score(model, tokenizer, method, **options, seed=seed) for seed in (1, 1, 5))
    assert one == same
    if method != "retrieval":  # a random model copies next to nothing
        assert other.scores != one.scores


def test_an_error_in_the_middle_leaves_the_model_as_it_was(tokenizer, monkeypatch):
    model = tiny("llama")
    before = model.config._attn_implementation

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(gates_module, "answer_states", fails)
    with pytest.raises(MemoryError):
        gates(model, tokenizer, **PASSKEYS, text=WORDS)
    assert untouched(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, tokenizer, monkeypatch):
    plant_answers(monkeypatch)
    got = score(tiny("llama").bfloat16(), tokenizer, method, **settings(method))
    assert all(math.isfinite(x) for row in got.scores for x in row)


def test_what_cannot_be_scored(tokenizer):
    with pytest.raises(SurgeryError, match="attention interface"):
        score(TINY["bloom"](), tokenizer, "far-mass", **SHORT, text=WORDS)
    with pytest.raises(SurgeryError, match="composites"):
        score(tiny("gemma3_image_text"), tokenizer, "far-mass", **SHORT, text=WORDS)
    split = tiny("llama")
    runtime.patch(split, {"layers": [{"streaming": [0], **REACH}] * 2})
    with pytest.raises(SurgeryError, match="split already"):
        score(split, tokenizer, "ablation", **SHORT, text=WORDS)
    with pytest.raises(SurgeryError, match="far-mass, retrieval, gates, fisher, ablation"):
        score(tiny("llama"), tokenizer, "farmass", **SHORT)
    with pytest.raises(SurgeryError, match="far-mass takes no steps"):
        score(tiny("llama"), tokenizer, "far-mass", **SHORT, steps=3)
    with pytest.raises(SurgeryError, match="no far past"):
        score(tiny("llama", max_position_embeddings=64), tokenizer, "gates", **SHORT | {"window": 40}, text=WORDS)
    assert "steps" in settings_of("gates")


# --- files and choice -------------------------------------------------------------------------------------------


def test_equal_heads_get_equal_ranks():
    assert ranks([[1.0, 0.0], [0.0, 2.0, 0.0]]) == [[0.75, 0.25], [0.25, 1.0, 0.25]]
    assert ranks([[7.0]]) == [[0.0]]
    assert ranks([[3.0, 3.0]]) == [[0.5, 0.5]]


@pytest.mark.parametrize("method", ["ablation", "far-mass"])
def test_scores_that_are_no_numbers_are_refused(method, tokenizer):
    model = tiny("llama")
    weight = model.lm_head.weight if method == "ablation" else model.model.layers[0].self_attn.q_proj.weight
    weight.data[5] = float("nan")
    with pytest.raises(SurgeryError, match="no numbers"):
        score(model, tokenizer, method, **PASSKEYS, text=WORDS)


def test_the_lowest_scores_stream():
    scores = [[0.9, 0.1, 0.5], [0.2, 0.2, 0.8]]
    assert choose_streaming(scores, ratio=0.5) == [[1], [0, 1]]
    assert choose_streaming(scores, ratio=0.0) == [[], []]
    assert choose_streaming(scores, ratio=1.0) == [[0, 1, 2], [0, 1, 2]]
    assert choose_streaming(scores, threshold=0.5) == [[1], [0, 1]]
    assert choose_streaming(scores, ratio=0.5, min_retrieval=2) == [[1], [0]]
    assert choose_streaming(scores, ratio=0.5, protect=(1,)) == [[0, 1, 2], []]
    assert choose_streaming(scores, ratio=1 / 3, local=[0]) == [[], [0]], "a third of three"
    assert choose_streaming(scores, threshold=9.0, local=[0]) == [[], [0, 1, 2]]
    assert choose_streaming(scores, ratio=1 / 3) == [[1], [0]], "ties go by layer and head"


@pytest.fixture
def anatomy():
    return Anatomy.of(tiny("llama", num_key_value_heads=2, num_attention_heads=4))


def test_score_files(tmp_path, anatomy):
    scores = HeadScores("far-mass", [[0.5, 0.25], [1.0, 0.0]], {"text": "t", "model": model_identity(anatomy, "mine")})
    file = tmp_path / "scores.json"
    scores.save(file)
    assert load_scores(file, anatomy) == scores
    (tmp_path / "pattern.tsv").write_text("0.5\t0.25\n1.0\t0.0\n")  # as DuoAttention publishes its patterns
    assert load_scores(tmp_path / "pattern.tsv", anatomy).scores == scores.scores
    with pytest.raises(SurgeryError, match="another model: 2 x 2"):
        load_scores(file, Anatomy.of(tiny("llama")))
    (tmp_path / "pattern.tsv").write_text("0.5\t0.25\n1.0\n")
    with pytest.raises(SurgeryError, match=r"another model: 2 x \[2, 1\]"):
        load_scores(tmp_path / "pattern.tsv", anatomy)
    for broken in ("nan", "inf"):
        (tmp_path / "pattern.tsv").write_text(f"0.5\t{broken}\n1.0\t0.0\n")
        with pytest.raises(SurgeryError, match=r"NaN or infinity(.|\n)*measure them again"):
            load_scores(tmp_path / "pattern.tsv", anatomy)
    with pytest.raises(SurgeryError, match="no such score file"):
        load_scores(tmp_path / "none.json", anatomy)
    for text in (
        "",
        "a b\nc d\n",
        "{}",
        "[1, 2]",
        '{"format": 2, "method": "", "scores": [], "origin": {}}',
        '{"format": 1',
    ):
        file.write_text(text)
        with pytest.raises(SurgeryError, match=r"no(t a)? table of scores|another model: nothing"):
            load_scores(file, anatomy)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[0.1, 0.2], [0.3, 0.4]]", "it holds a list"),
        ('{"scores": [[0.1]]}', "it has no 'format'"),
        ('{"format": 7}', "format 7, known is 1"),
        ('{"format": 1, "method": "x", "origin": {}, "scores": [["a"]]}', "could not convert"),
        ('{"format": 1, "method": "x", "origin": {}, "scores": 5}', "not iterable"),
    ],
)
def test_json_that_is_no_score_file_is_told_what_one_is(tmp_path, anatomy, text, says):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(SurgeryError, match="JSON, but no table of scores") as raised:
        load_scores(tmp_path / "scores.json", anatomy)
    message = str(raised.value)
    assert says in message
    assert '"scores": [a list of numbers for each layer]' in message
    assert "surgery score MODEL -o FILE" in message


@pytest.mark.parametrize(
    "other",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"num_attention_heads": 8},
        {"hidden_size": 128, "head_dim": 16},
        {"head_dim": 32},
    ],
)
def test_scores_of_another_model_of_the_same_shape_are_refused(tmp_path, anatomy, other):
    identity = model_identity(anatomy, "org/mine")
    HeadScores("gates", [[0.5, 0.25], [1.0, 0.0]], {"model": identity}).save(tmp_path / "scores.json")
    model = tiny("llama", **{"num_key_value_heads": 2, "num_attention_heads": 4} | other)
    model.config._name_or_path = "org/other"
    with pytest.raises(SurgeryError) as raised:
        load_scores(tmp_path / "scores.json", Anatomy.of(model))
    message = str(raised.value)
    assert "org/mine" in message
    assert identity["hash"] in message
    assert "org/other" in message
    assert model_identity(Anatomy.of(model))["hash"] in message


def test_the_hash_is_of_the_config_and_the_same_from_disk_and_memory(tmp_path):
    for family in FAMILIES:
        model = tiny(family)
        model.save_pretrained(tmp_path / family)
        loaded = type(model).from_pretrained(tmp_path / family)
        hashes = {
            model_identity(Anatomy.of(each))["hash"] for each in (model, loaded, model.config, tmp_path / family)
        }
        assert len(hashes) == 1, family
        assert hashes == {model_identity(Anatomy.of(tiny(family, seed=5)))["hash"]}, "weights do not matter"


def test_a_word_is_a_method_a_file_or_a_slip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("1 2")
    assert names_method("gates", METHODS, "a file")
    assert not names_method("mine", METHODS, "a file")
    assert not names_method("none.json", METHODS, "a file")
    assert not names_method("folder/none", METHODS, "a file")
    with pytest.raises(SurgeryError, match="did you mean 'ablation'"):
        names_method("ablations", METHODS, "a file")
