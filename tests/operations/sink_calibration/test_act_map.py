"""ACT's rule in each prompt (`find: map`): the paper's figures, rows of a batch, the cache, files, the operation."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
import torch
from conftest import edit_json
from dense import LENGTH, PADS, batch, chunked, dense_logits, difference, given, random_terms
from families import TINY, base, check_both_ways_to_load, double, one_thread  # noqa: F401 (a fixture)
from sink_terms import FAMILIES, SPLITS, entries, operated
from sinks import QUICK, Toy, recipe, sink
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.io.loading import load_model, read_tokenizer
from surgery.operations.sink_calibration import zero_tuning
from surgery.operations.sink_calibration.act import choose_each, leave_unchanged
from surgery.operations.sink_calibration.operation import SinkCalibration
from surgery.operations.sink_calibration.zero_tuning import Trial, gradients, objective
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_act

ALPHA = 1.3  # of tiny models, whose attention is nearly even
MAP = {"act": {"alpha": ALPHA}}


def tensors_of(name: str, seed: int = 4) -> list[dict]:
    return random_terms(base(name), "act by map", seed)


def mapped(name: str, seed: int = 4, sinks: int | None = None, alpha: float = ALPHA, plain=None):
    """A tiny model with random betas whose sinks are those of each prompt's map."""
    return operated(plain or base(name), sinks, tensors_of(name, seed), act={"alpha": alpha})


def reference(name: str, ids, mask, prompt: int | None = None, seed: int = 4, sinks: int | None = None, **more):
    """The dense float64 model of `mapped`, for a prompt that ends at `prompt`."""
    tensors = tensors_of(name, seed)
    layers = entries(base(name), sinks, tensors, False, act={"alpha": ALPHA, "prompt": prompt}, **more)
    return dense_logits(base(name), layers, ids, mask, tensors)


# --- the paper's rule -----------------------------------------------------------------------------------------------


def paper(model, ids, betas: list, alpha: float):
    """float64 logits of a stock model under ACT as released, for one prompt, written as loops; and the sinks.

    Without its two defects: the first row stays as it is, and nothing is decoded.
    """
    model, length, found = double(copy.deepcopy(model)), ids.shape[1], {}

    def attend(module, query, key, value, _mask, scaling=None, **kwargs):
        groups, out = query.shape[1] // key.shape[1], torch.zeros_like(query)
        for h in range(query.shape[1]):
            k, v = key[0, h // groups], value[0, h // groups]
            a = (query[0, h] @ k.T * scaling + torch.full((length, length), -torch.inf).triu(1)).softmax(-1)
            column = [sum(a[i, j].item() for i in range(length)) / (length - j) for j in range(length)]
            sinks = [j for j in range(1, length) if column[j] > alpha / length]
            beta = betas[module.layer_idx][h].item()
            found[module.layer_idx, h] = sinks if beta < 1 else []
            for i in range(length):
                row, freed = a[i].clone(), (1 - beta) * a[i, sinks].sum()
                others = [j for j in range(length) if j not in sinks]
                row[sinks] *= beta
                row[others] += freed * a[i, others] / a[i, others].sum()
                out[0, h, i] = row @ v
        return out.transpose(1, 2), None

    AttentionInterface.register("act_paper", attend)
    AttentionMaskInterface.register("act_paper", lambda **_: None)
    model.set_attn_implementation("act_paper")
    return model(input_ids=ids, use_cache=False).logits, found


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])  # GQA, and one KV head for each query head
@torch.no_grad()
def test_one_prompt_gives_what_the_paper_says(name, monkeypatch):
    monkeypatch.setattr(surgery_act, "MOST", 1 - 1e-12)  # the one place where the runtime departs from the paper
    alpha, length = 1.25, 31
    plain, seen = double(copy.deepcopy(base(name))), {}
    heads = plain.config.num_attention_heads
    betas = [torch.tensor([0.4, 1.0, 0.4, 0.1, 1.0, 0.7, 0.4, 0.4])[:heads].double() for _ in range(2)]
    model = copy.deepcopy(plain)
    runtime.patch(model, {"layers": [{"parameters": {"surgery_log_beta": [heads]}, "act": {"alpha": alpha}}] * 2})
    for module, beta in zip(runtime.attention_modules(model), betas, strict=True):
        module.surgery_log_beta.copy_(beta.log())

    def watched(*args):
        slots = found_by_runtime(*args)
        seen[len(seen)] = [sorted(x for x in head if x >= 0) for head in slots[0].tolist()]
        return slots

    found_by_runtime = surgery_act.sinks_of_map
    monkeypatch.setattr(surgery_act, "sinks_of_map", watched)
    ids = batch(plain, (0,), length)[0]
    want, sinks = paper(plain, ids, betas, alpha)
    got = model(input_ids=ids, use_cache=False).logits
    assert {(layer, h): own for layer, rows in seen.items() for h, own in enumerate(rows)} == sinks
    assert 10 < sum(map(len, sinks.values())) < heads * length, "the test needs sinks, and keys that are none"
    assert difference(got, want, torch.ones_like(ids)) <= 1e-8
    assert difference(plain(input_ids=ids, use_cache=False).logits, want, torch.ones_like(ids)) > 1e-3


@pytest.mark.parametrize("rows", [1, 7])
@torch.no_grad()
def test_few_scores_are_held_at_once(rows, monkeypatch):
    """However many queries make a block, heads and all, the sinks are the same."""
    ids, mask = batch(base("llama"), PADS)
    want = mapped("llama")(**given(base("llama"), ids, mask), use_cache=False).logits
    held, real_scores = [], surgery_act.scores

    def counted(query, keys, *args, **kwargs):
        found = real_scores(query, keys, *args, **kwargs)
        if keys.shape[1] == 1:  # the heads of one KV head, in a search; the others are scores of sinks
            held.append(found.numel())
        return found

    model = mapped("llama")
    monkeypatch.setattr(surgery_act, "HELD", rows * 2 * 4 * LENGTH)
    monkeypatch.setattr(surgery_act, "scores", counted)
    got = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(got, want, mask) <= 1e-5
    assert 0 < max(held) <= rows * 2 * 4 * LENGTH


# --- rows, chunks, beams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_random_prompts_against_explicit_maps(seed):
    """Family, split, padding and the prompt's end at random: soft-caps, learned sinks, windows; decode one by one."""
    draw = random.Random(seed)
    name, sinks = FAMILIES[seed % 4], draw.choice([*SPLITS.values()])
    ids, mask = batch(base(name), (0, draw.randrange(1, 20)))
    prompt = draw.randrange(24, LENGTH - 3)
    model, args = mapped(name, seed, sinks), (name, ids, mask)
    whole = reference(*args, seed=seed, sinks=sinks)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, whole, mask) <= 1e-4
    want = reference(*args, prompt, seed, sinks)
    assert difference(chunked(model, ids, mask, [prompt, *[1] * (LENGTH - prompt)]), want, mask) <= 1e-4
    assert difference(chunked(model, ids, mask, [prompt, 2, LENGTH - prompt - 2]), want, mask) <= 1e-4
    plain = operated(base(name), sinks, [{}, {}])(**given(model, ids, mask), use_cache=False).logits
    assert min(difference(plain, each, mask) for each in (want, whole)) > 1e-3, "nothing changes: no power"


@pytest.mark.parametrize("name", ["mistral", "starcoder2", "gemma3", "gpt2", "phi3", "olmo2"])
@torch.no_grad()
def test_other_families(name):
    """Windows in every layer, norms over all heads, fused projections, no RoPE."""
    ids, mask = batch(base(name))
    tensors = [{"surgery_log_beta": torch.linspace(-2, 0, 8)}] * 2
    layers = [{"parameters": {"surgery_log_beta": [8]}, "act": {"alpha": ALPHA}}] * 2
    model = copy.deepcopy(base(name))
    runtime.patch(model, {"layers": layers})
    for module in runtime.attention_modules(model):
        module.surgery_log_beta.copy_(tensors[0]["surgery_log_beta"])
    for prompt, chunks in ((None, [LENGTH]), (30, [30, 1, 14])):
        marked = [entry | {"act": {"alpha": ALPHA, "prompt": prompt}} for entry in layers]
        want = dense_logits(base(name), marked, ids, mask, tensors)
        assert difference(chunked(model, ids, mask, chunks), want, mask) <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_row_of_a_batch_is_the_row_alone(name):
    """Padded on the left, and on the right as questions are: N is of the row's own real tokens."""
    model = mapped(name, sinks=2)
    ids, mask = batch(model)
    together = model(**given(model, ids, mask), use_cache=False).logits
    flipped = model(**given(model, ids.flip(1), mask.flip(1)), use_cache=False).logits
    for row, pad in enumerate(PADS):
        one, real = ids[row : row + 1, pad:], slice(pad, None)
        alone = model(input_ids=one, use_cache=False).logits
        assert difference(together[row : row + 1, real], alone, torch.ones_like(one)) <= 1e-4
        one = ids.flip(1)[row : row + 1, : LENGTH - pad]
        alone = model(input_ids=one, use_cache=False).logits
        assert difference(flipped[row : row + 1, : LENGTH - pad], alone, torch.ones_like(one)) <= 1e-4


@torch.no_grad()
def test_packed_rows_are_prompts_of_their_own():
    model = mapped("llama")
    ids = batch(model, (0,))[0]
    parts = ids.split((20, 1, 24), dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    want = torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], dim=1)
    assert difference(packed, want, torch.ones_like(ids)) <= 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@torch.no_grad()
def test_generation_with_beams(name):
    """Beams go on with the sinks of their prompt: each hypothesis as a forward of the dense model says."""
    model, new = mapped(name, sinks=2), 7
    ids, mask = batch(model, (0, 11))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": new}
    greedy = model.generate(input_ids=ids, attention_mask=mask, **options)
    grown = torch.cat([mask, mask.new_ones(2, new)], dim=1)
    logits = reference(name, greedy, grown, LENGTH, sinks=2)
    assert torch.equal(logits[:, LENGTH - 1 : -1].argmax(-1), greedy[:, LENGTH:])
    beams = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=3, return_dict_in_generate=True, output_scores=True, **options
    )
    logp = reference(name, beams.sequences, grown, LENGTH, sinks=2)[:, LENGTH - 1 : -1].log_softmax(-1)
    scores = logp.gather(-1, beams.sequences[:, LENGTH:, None]).sum((1, 2)) / new
    assert (scores - beams.sequences_scores.double()).abs().max() < 1e-4
    assert len({tuple(row.tolist()) for row in beams.beam_indices[:, :new]}) > 1
    one = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    for more in ({"assistant_model": base(name)}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="where a prompt ends"):
            model.generate(**one, **options, **more)
    again = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert again.shape == greedy.shape  # each step is a prompt of its own: other tokens may follow


@pytest.mark.parametrize("sinks", SPLITS.values())
@torch.no_grad()
def test_a_cropped_cache(sinks):
    """Tokens after a crop are no sinks where the prompt had some; cropped to nothing, the next call is a prompt."""
    model = mapped("llama", sinks=sinks)
    ids = batch(model, (0,))[0]
    full, cache = torch.ones_like(ids), model.make_cache()
    cache.activate_past_recording()
    model(input_ids=ids[:, :30], **{runtime.CACHE: cache})
    model(input_ids=ids[:, 5:12], **{runtime.CACHE: cache})  # taken back
    cache.crop(-7)
    got = model(input_ids=ids[:, 30:], **{runtime.CACHE: cache}).logits
    assert difference(got, reference("llama", ids, full, 30, sinks=sinks)[:, 30:], full[:, 30:]) <= 1e-4
    cache = model.make_cache()
    cache.activate_past_recording()
    model(input_ids=ids[:, :30], **{runtime.CACHE: cache})

    def noted() -> list[torch.Tensor]:
        return [slots for layer in cache.layers for store in layer.stores for slots in store.prompt_slots.values()]

    held = noted()
    assert max(int(slots.max()) for slots in held if slots.numel()) == 29, "the last keys are judged, as in the paper"
    cache.crop(-10)
    left = noted()
    assert all(torch.equal(now, was.masked_fill(was >= 20, -1)) for now, was in zip(left, held, strict=True))
    cache = model.make_cache()
    cache.activate_past_recording()
    model(input_ids=ids[:, 7:30], **{runtime.CACHE: cache})
    cache.crop(-23)
    assert cache.get_seq_length() == 0
    got = model(input_ids=ids, **{runtime.CACHE: cache}).logits
    assert difference(got, reference("llama", ids, full, sinks=sinks), full) <= 1e-4


@torch.no_grad()
def test_the_cache_carries_the_sinks_with_its_rows():
    """Rows repeated, chosen, moved: each goes on as it would have alone."""
    model = mapped("llama")
    ids, mask = batch(model)
    out = model(**given(model, ids[:, :30], mask[:, :30]), use_cache=True)
    cache, order = out[runtime.CACHE], torch.tensor([2, 0, 1, 1])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(order * 2)
    later = ids[order, 30:]
    position = (mask.cumsum(1) - 1)[order, 30:]
    got = model(input_ids=later, attention_mask=mask[order], position_ids=position, **{runtime.CACHE: cache}).logits
    want = chunked(model, ids, mask, [30, LENGTH - 30])[order, 30:]
    assert difference(got, want, torch.ones_like(later)) <= 1e-5
    layer = cache.layers[0]
    bytes_of_keys = sum(t.numel() * t.element_size() for store in layer.stores for t in store.tensors.values())
    assert layer.nbytes > bytes_of_keys
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert layer.stores[0].prompt_slots == {}


@torch.no_grad()
def test_a_cache_that_cannot_hold_sinks_is_refused():
    model, ids = mapped("llama"), batch(base("llama"), (0,))[0]
    for call in (lambda **given: model(input_ids=ids, **given), lambda **given: model.generate(ids, **given)):
        with pytest.raises(ValueError, match="leave the cache out"):
            call(**{runtime.CACHE: DynamicCache()})
    with pytest.raises(ValueError, match=r"StaticCache|static"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    probed = operated(base("llama"), None, random_terms(base("llama"), "act", 4))
    assert probed(input_ids=ids, **{runtime.CACHE: DynamicCache()}).logits.isfinite().all()


@torch.no_grad()
def test_gates_leave_out_no_query_that_the_map_needs(monkeypatch):
    """A head that is off for a token still has a row in its map: the same alone as in a batch that saves work."""
    from surgery.runtime import surgery_gated_compute

    monkeypatch.setattr(surgery_gated_compute, "ROWS", 64)
    model = copy.deepcopy(base("llama"))
    gate = {"op": "moh", "active_ratio": 0.25, "shared_ratio": 0.0, "router": "random"}
    package.apply(recipe(sink("act", beta=1.0, find="map", threshold=ALPHA), gate), model)
    for module in runtime.attention_modules(model):
        module.surgery_log_beta.fill_(math.log(0.4))
    ids, mask = batch(model, (0, 0))
    together = model(**given(model, ids, mask), use_cache=False).logits
    alone = model(**given(model, ids[:1], mask[:1]), use_cache=False).logits
    assert difference(together[:1], alone, mask[:1]) <= 1e-5


@pytest.mark.parametrize("method", [{"find": "map"}, {"find": "probe"}])
@torch.no_grad()
def test_beta_1_is_the_base_to_the_bit_and_searches_nothing(method, monkeypatch):
    monkeypatch.setattr(surgery_act, "sinks_of_map", lambda *args: pytest.fail("a map was made"))
    for name in (name for name in TINY if not Anatomy.of(base(name)).runtime_problem()):
        plain, model = base(name), copy.deepcopy(base(name))
        package.apply(recipe(sink("act", beta=1.0, **method)), model)
        bare = operated(plain, None, [{}, {}])
        ids, mask = batch(model)
        for rows in (slice(0, 1), slice(None)):
            inputs = given(model, ids[rows], mask[rows])
            got = model(**inputs, use_cache=False).logits
            assert torch.equal(got, bare(**inputs, use_cache=False).logits), name
            assert difference(got, plain(**inputs, use_cache=False).logits, mask[rows]) <= 1e-5
        assert torch.equal(chunked(model, ids, mask, [20, 1, 24]), chunked(bare, ids, mask, [20, 1, 24])), name
    ids = batch(base("llama"), (0,))[0]
    model = copy.deepcopy(base("llama"))
    package.apply(recipe(sink("act", beta=1.0, **method)), model)
    assert torch.equal(model(ids, use_cache=False).logits, base("llama")(ids, use_cache=False).logits)


def test_gradients_reach_beta_through_the_cache():
    """The slope is of what is judged, a text's second half after the first as the prompt: against differences."""
    tensors = [{k: t.double() for k, t in named.items()} for named in tensors_of("llama", 2)]
    model = operated(double(base("llama")), None, tensors, **MAP)
    ids, _ = batch(model, (0,))
    modules = runtime.attention_modules(model)
    with torch.no_grad():
        for module in modules:
            module.surgery_log_beta.zero_()
    betas = [module.surgery_log_beta for module in modules]
    slopes = gradients(Trial(model, betas, ids, ids))
    for beta, slope in zip(betas, slopes, strict=True):
        values, step = [], -0.01 * torch.linspace(0.5, 1.5, 8).double()
        with torch.no_grad():
            for _ in range(3):
                values.append(objective(model, ids[0], "ce").item())
                beta += step
            beta.zero_()
        expected = (4 * values[1] - 3 * values[0] - values[2]) / 2
        assert (slope @ step).item() == pytest.approx(expected, rel=2e-2)


@torch.no_grad()
def test_what_is_judged_of_a_text_is_its_second_half():
    """After the first half as the prompt: a change of the last tokens changes no sink."""
    model = mapped("llama")
    ids, mask = batch(model, (0,))
    logits = reference("llama", ids, mask, LENGTH // 2)[0, LENGTH // 2 - 1 : -1].log_softmax(-1)
    want = -logits.gather(-1, ids[0, LENGTH // 2 :, None]).mean()
    assert objective(model, ids[0], "ce").item() == pytest.approx(want.item(), abs=1e-5)
    entropy = -(logits.exp() * logits).sum(-1).mean()
    assert objective(model, ids[0], "entropy").item() == pytest.approx(entropy.item(), abs=1e-5)
    whole = base("llama")(ids).logits[0, :-1].double().log_softmax(-1)
    want = -whole.gather(-1, ids[0, 1:, None]).mean()
    assert objective(base("llama"), ids[0], "ce").item() == pytest.approx(want.item(), abs=1e-5)


# --- heads, one at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("held", "kept"), [(-1.0, True), (0.3, False)])
def test_each_head_is_tried_alone(monkeypatch, held, kept):
    log = math.log(0.4)
    fit = [[log, 0.5, log], [0.3, log, -0.01]]
    model = Toy(fit, [[held] * 3, [held] * 3])
    monkeypatch.setattr(zero_tuning, "objective", lambda model, sample, kind: model.objective(sample, kind))
    samples = torch.tensor([[1, 0], [1, 5], [0, 1], [0, 9]])
    trial = Trial(model, list(model.logs), samples[:2], samples[2:])
    record = choose_each(trial, {3: [0, 1, 2], 7: [1, 2]}, 0.4)
    assert [(each["layer"], each["head"]) for each in record["alone"]] == [(3, 0), (3, 1), (3, 2), (7, 1), (7, 2)]

    def loss(setting) -> float:
        """Mean of the toy's objective on the two samples of the fit."""
        errors = [(x - y) ** 2 for row, goal in zip(setting, fit, strict=True) for x, y in zip(row, goal, strict=True)]
        return sum(errors) + 2.5

    for each in record["alone"]:
        setting = [[0.0] * 3, [0.0] * 3]
        setting[(3, 7).index(each["layer"])][each["head"]] = log
        assert each["fit"] == pytest.approx(loss(setting), rel=1e-5)
    together = [[log, 0.0, log], [0.0, log, 0.0]]
    assert [trial["heads"] for trial in record["tried"]] == [0, 3]
    assert record["tried"][1]["fit"] == pytest.approx(loss(together), rel=1e-5)
    assert record["kept"] is kept
    want = together if kept else [[0.0] * 3] * 2
    assert torch.allclose(torch.stack([*model.logs]), torch.tensor(want))


def test_where_no_head_gains_nothing_is_kept(monkeypatch):
    model = Toy([[0.5, 1.0]], [[-1.0, -1.0]])
    monkeypatch.setattr(zero_tuning, "objective", lambda model, sample, kind: model.objective(sample, kind))
    samples = torch.tensor([[1, 0], [1, 5], [0, 1], [0, 9]])
    record = choose_each(Trial(model, list(model.logs), samples[:2], samples[2:]), {0: [0, 1]}, 0.4)
    assert record["kept"] is False
    assert [each["heads"] for each in record["tried"]] == [0]
    assert torch.equal(model.logs[0], torch.zeros(2))


# --- the operation --------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path):
    """A file of questions."""
    lines = [
        {"prompt": f"the word {i} is", "choices": [f"a{i}", "b", "c"][: 2 + i % 2], "answer": i % 2} for i in range(10)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "q.jsonl")


@pytest.mark.parametrize("find", ["map", "probe"])
@pytest.mark.parametrize("trials", ["slope", "each"])
def test_the_operation_on_questions_and_its_record(model, asked, find, trials):
    loaded = load_model(model)
    fields = {"find": find, "trials": trials, "labelled": asked, "threshold": ALPHA, "heads": [0, 4], **QUICK}
    if find == "map":
        fields = {name: value for name, value in fields.items() if name not in QUICK}
    report = package.apply(recipe(sink("act", **fields)), loaded, tokenizer=read_tokenizer(model))
    record = report.data["operations"][0]["record"]
    assert (record["find"], record["trials"], record["objective"]) == (find, trials, "labelled")
    assert ("agreement" in record) == (find == "probe")
    assert ("alone" in record) == (trials == "each")
    if trials == "each":
        assert [(each["layer"], each["head"]) for each in record["alone"]] == [(0, 0), (0, 4), (1, 0), (1, 4)]
    own, chosen = {"surgery_log_beta"} | ({"surgery_sink_probe"} if find == "probe" else set()), {}
    for index, module in enumerate(runtime.attention_modules(loaded)):
        changed = find == "probe" or str(index) in record["heads"]
        assert {name for name, _ in module.named_parameters() if "surgery_" in name} == (own if changed else set())
        entry = {"alpha": ALPHA} if changed and find == "map" else None
        assert loaded.config.surgery["layers"][index].get("act") == entry
        if changed and (heads := (module.surgery_log_beta < 0).nonzero()[:, 0].tolist()):
            chosen[str(index)] = heads
    assert record["heads"] == chosen
    assert bool(record["heads"]) == record["kept"]


@torch.no_grad()
def test_layers_without_a_chosen_head_are_left_as_they_were(tmp_path):
    model, whole = mapped("llama"), mapped("llama")
    for each in (model, whole):
        runtime.attention_modules(each)[1].surgery_log_beta.zero_()
    ids = batch(base("llama"), (0,))[0]
    leave_unchanged(model, [1])
    first, second = model.config.surgery["layers"]
    assert first["act"] == {"alpha": ALPHA}
    assert list(first["parameters"]) == ["surgery_log_beta"]
    assert "act" not in second
    assert "parameters" not in second
    assert not hasattr(runtime.attention_modules(model)[1], "surgery_log_beta")
    logits = model(ids, use_cache=False).logits
    assert torch.equal(logits, whole(ids, use_cache=False).logits)
    assert not torch.equal(logits, base("llama")(ids, use_cache=False).logits)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits, load_model(tmp_path / "out")(ids, use_cache=False).logits)


def test_a_search_that_keeps_nothing_leaves_no_dependence_on_the_prompt(model, tmp_path):
    fields = {"find": "map", "threshold": 100.0, **QUICK}  # no token is a sink
    package.apply(recipe(sink("act", **fields)), str(model), output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no setting was kept" in card
    for untrue in ("judge this model by its answers", "It lowers perplexity"):
        assert untrue not in card
    plain, loaded = load_model(model), package.load(tmp_path / "out")
    assert not any("act" in layer or "parameters" in layer for layer in loaded.config.surgery["layers"])
    ids = batch(plain, (0,))[0]
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, plain(input_ids=ids, use_cache=False).logits)
    assert loaded(input_ids=ids, **{runtime.CACHE: DynamicCache()}).logits.isfinite().all()


def test_a_stopped_search_resumes(model, asked, tmp_path, monkeypatch):
    fields = {"find": "map", "trials": "each", "labelled": asked, "threshold": ALPHA, "heads": [0, 4]}
    judge, calls = Trial.judge, []

    def stops(self, samples):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return judge(self, samples)

    monkeypatch.setattr(Trial, "judge", stops)
    steps = {"output": tmp_path / "out", "check": False, "evaluate": False}
    with pytest.raises(KeyboardInterrupt):
        package.apply(recipe(sink("act", **fields)), str(model), **steps)
    package.apply(recipe(sink("act", **fields)), str(model), **steps, resume=True)
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())["operations"][0]["record"]
    most = 5 + len(record["tried"]) - 1 + 2 * (len(record["tried"]) - 1)
    assert len(calls) == most + 1, "what was measured before the stop is not measured again"


def test_saved_and_through_both_doors(tmp_path):
    models = {
        tmp_path / name: mapped(name, sinks=sinks) for name, sinks in zip(FAMILIES, (None, 2, 0, 2), strict=True)
    }
    check_both_ways_to_load(models, tmp_path)


def test_checked_as_a_file(surgery, model, tmp_path, monkeypatch):
    """`surgery check` runs one prompt and a generation each way, and so holds for a map as well."""
    keep = Trial.settle
    monkeypatch.setattr(Trial, "settle", lambda self, values: keep(self, values) | {"kept": self.set(values) is None})
    fields = {"find": "map", "threshold": ALPHA, **QUICK}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(sink("act", **fields))))
    done = surgery("apply", "r.yaml", model, "-o", "out", "--no-eval")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["loads with trust_remote_code"] == statuses["both ways to load agree"] == "passed"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "empties" not in card
    assert "fills the empty cache" in card
    assert f"sinks of a prompt: mean weight above {ALPHA:g} / N" in surgery("inspect", "out").out


def test_layers_by_default_and_as_given():
    def layers(count: int, **fields) -> list[int]:
        model = TINY["llama"](num_hidden_layers=count)
        return sorted(SinkCalibration(method="act", **fields).term_layers(Anatomy.of(model)))

    assert layers(6) == [2, 3, 4]
    assert layers(4) == [2]
    assert layers(3) == [0, 1, 2]
    assert layers(1) == [0]
    assert layers(6, layers="paper") == [2, 3, 4]
    assert layers(6, layers=None) == list(range(6))
    assert layers(6, layers=[5, 0]) == [0, 5]
    assert recipes.load("act").operations[0].layers is None, "its figures on the pages are of all layers"
    planned = package.plan(recipe(sink("act", find="map")), TINY["llama"](num_hidden_layers=6))
    assert any("layers 2 to 4, as in the paper" in line for line in map(str, planned.to_dict()["notes"]))


def test_a_plan_names_the_rule(surgery, model):
    said = surgery("plan", "act", model, "find=map").out
    assert "above 5 / N" in said
    assert "fills the empty cache" in " ".join(said.split())
    assert "as in the paper's code" not in said


def test_a_record_says_layers_only_if_somebody_did():
    for fields, kept in (
        ({}, {}),
        ({"layers": "paper"}, {"layers": "paper"}),
        ({"layers": None}, {"layers": None}),
        ({"layers": [1]}, {"layers": [1]}),
    ):
        loaded = recipes.load(recipe(sink("act", **fields)))
        step = loaded.identity()["operations"][0]
        assert {key: step[key] for key in ("layers", "find", "trials") if key in step} == kept
        assert recipes.load(loaded.to_dict()).to_dict() == loaded.to_dict()
    old = recipes.load(recipe(sink("act", layers=None))).operations[0]  # as every record of an earlier version says
    assert sorted(old.term_layers(Anatomy.of(TINY["llama"](num_hidden_layers=5)))) == [0, 1, 2, 3, 4]
    other = recipes.load(recipe(sink("zero_tuning"))).identity()["operations"][0]
    assert not {"find", "trials"} & set(other)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["find=ma"], ["find", "map"]),
        (["trials=each"], ["trials: each", "give labelled=FILE.jsonl", "trials: slope"]),
        (["labelled=nowhere.jsonl"], ["labelled", "nowhere.jsonl"]),
        (["labelled=builtin"], ["builtin: no such file of questions", "whose lines are"]),
        (["labelled=q.jsonl", "objective=entropy"], ["with objective: ce"]),
        (["labelled=q.jsonl", "beta=1"], ["heads that are chosen"]),
        (
            ["labelled=q.jsonl", "find=map", "calibration_samples=8"],
            ["labelled takes its place", "calibration_samples"],
        ),
        (["method=zero_tuning", "find=map"], ["find is for method: act, not zero_tuning"]),
        (["layers=[7]"], ["layers [7]", "0 to 1"]),
    ],
)
def test_bad_fields(refused, model, asked, overrides, says):
    refused("apply", "act", model, "-o", "out", *overrides, says=says)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"act": {"alpha": 5.0}}, "one of surgery_log_beta and act without the other"),
        ({"act": {"alpha": 0}, "parameters": {"surgery_log_beta": [8]}}, "a number alpha above 0"),
        ({"act": {"alpha": True}, "parameters": {"surgery_log_beta": [8]}}, "a number alpha above 0"),
        ({"act": {"alpha": math.inf}, "parameters": {"surgery_log_beta": [8]}}, "a number alpha above 0"),
        ({"act": {"alpha": 5.0, "n": 1}, "parameters": {"surgery_log_beta": [8]}}, "a number alpha above 0"),
        ({"act": [], "parameters": {"surgery_log_beta": [8]}}, "a number alpha above 0"),
        ({"parameters": {"surgery_log_beta": [8]}}, "without the other, and no act"),
        (
            {"act": {"alpha": 5.0}, "parameters": {"surgery_log_beta": [8], "surgery_sink_probe": [8, 10]}},
            "in one way",
        ),
        ({"act": {"alpha": 5.0}, "parameters": {"surgery_log_beta": [4]}}, "it is [8]"),
        ({"act": {"alpha": 5.0}, "policy": {"name": "identity"}, "parameters": {"surgery_log_beta": [8]}}, "in order"),
    ],
)
def test_a_block_that_cannot_be_is_refused(entry, says):
    with pytest.raises(ValueError, match="layer 0 of the surgery block") as caught:
        runtime.patch(copy.deepcopy(base("llama")), {"layers": [entry, {}]})
    assert says in str(caught.value)


def test_a_file_with_another_alpha_is_the_rule_of_that_file(tmp_path):
    model = mapped("llama")
    model.save_pretrained(tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", surgery=mapped("llama", alpha=ALPHA / 2).config.surgery)
    ids = batch(model, (0,))[0]
    with torch.no_grad():
        got = package.load(tmp_path / "out")(ids, use_cache=False).logits
        assert difference(got, model(ids, use_cache=False).logits, torch.ones_like(ids)) > 1e-3


def test_heads_may_go_afterwards():
    """Pruned after ACT, the rest keep their betas and the rule; unequal groups have maps as well."""
    model = mapped("llama")
    prune = {"op": "prune_heads", "granularity": "head", "heads": [[0, 3], [2, 7]], "refit": False}
    package.apply(recipe(prune), model)
    assert [layer["act"] for layer in model.config.surgery["layers"]] == [{"alpha": ALPHA}] * 2
    ids, tensors = batch(base("llama"), (0,))[0], tensors_of("llama")
    layers = entries(base("llama"), None, tensors, False, act={"alpha": ALPHA})
    want = dense_logits(base("llama"), layers, ids, torch.ones_like(ids), tensors, silent=[[0, 3], [2, 7]])
    with torch.no_grad():
        assert difference(model(ids, use_cache=False).logits, want, torch.ones_like(ids)) <= 1e-4
    assert package.plan(recipe(prune, sink("act", find="map")), TINY["llama"]()).tier == "surgical"
