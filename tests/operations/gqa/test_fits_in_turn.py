"""Fits of queries and keys in turn: how far they move attention's output, and the fits that are dropped for it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from closed_form import SEQUENCES, recipe
from families import attention_modules, base, one_thread  # noqa: F401
from tokenizers_of_bytes import Letters
from torch.nn.functional import linear

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import with_bias
from surgery.calibration.closed_form.conjugate_gradient import Solution
from surgery.calibration.closed_form.layer import FURTHER
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.data.text import is_validation
from surgery.operations.gqa.layer import SharedLayer, Sharing
from surgery.operations.mla.layer import LatentFit

ONE_TEXT = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1)).repeat(12, 1)  # held back as well


def first_conversion(monkeypatch, kind: type, run):
    """The conversion of the model's first layer by this run, what came of it, and its record."""
    found, convert = [], kind.convert
    monkeypatch.setattr(kind, "convert", lambda work: (found.append((work, *(made := convert(work)))), made)[1])
    run.layers()
    return found[0]


def eager(name: str):
    model = copy.deepcopy(base(name)).double()
    model.set_attn_implementation("eager")
    return model


def call_of(model, ids):
    """Of the first layer: attention weights [H, T, T], its input [T, D], and the hidden states before it [T, D]."""
    inputs, module = [], attention_modules(model)[0]
    handle = module.register_forward_hook(
        lambda _, args, kwargs, out: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        out = model(input_ids=ids[None], output_attentions=True, output_hidden_states=True, use_cache=False)
    handle.remove()
    return out.attentions[0][0], inputs[0][0], out.hidden_states[0][0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_how_far_the_output_moves_is_what_transformers_moves(name, monkeypatch):
    model = base(name)
    run = Sharing(model, Anatomy.of(model).with_kv_heads(2).layers, SEQUENCES, FitSettings(refit=()))
    work, new, _ = first_conversion(monkeypatch, SharedLayer, run)
    noise = torch.Generator().manual_seed(0)
    q, k = (with_bias(new, letter) for letter in "qk")
    q, k = (tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise) for tensor in (q, k))
    old, changed = eager(name), eager(name)
    module = attention_modules(changed)[0]
    width = module.q_proj.weight.shape[1]
    with torch.no_grad():
        for projection, rows in ((module.q_proj, q), (module.k_proj, k.repeat_interleave(2, 0))):
            projection.weight.copy_(rows.flatten(0, 1)[:, :width])
            if projection.bias is not None:
                projection.bias.copy_(rows.flatten(0, 1)[:, width])
    moved = energy = 0.0
    for index, (ids, sample) in enumerate(zip(SEQUENCES, work.inputs.samples, strict=True)):
        if not is_validation(index, len(SEQUENCES)):
            continue
        before, x, states = call_of(old, ids)
        after, _, _ = call_of(changed, ids)
        module = attention_modules(old)[0]
        values = module.v_proj(x).detach().view(len(ids), -1, module.head_dim).repeat_interleave(2, 1)
        size = states.square().mean(-1)
        for weights, add in ((before, "energy"), (after - before, "moved")):
            heads = torch.einsum("hts,shd->thd", weights, values).flatten(1)
            rows = linear(heads, module.o_proj.weight.detach()).square().sum(-1) / size
            found = float(rows[sample.rows].sum())
            moved, energy = (moved + found, energy) if add == "moved" else (moved, energy + found)
    assert work.output_moved(q, k) == pytest.approx(moved / energy, rel=1e-4)
    assert moved / energy > 1e-3


def with_idle_heads(scale: float):
    """Half of the KV heads have the larger scores, and no say in the output: fits of scores serve them first."""
    model = copy.deepcopy(base("llama"))
    module, idle = attention_modules(model)[0], 2 * base("llama").config.head_dim
    with torch.no_grad():
        module.k_proj.weight[:idle] *= scale
        module.o_proj.weight[:, : 2 * idle] = 0
    return model


def test_a_fit_that_moves_the_output_away_is_dropped(monkeypatch):
    """The keys' fit helps heads without a say. Keys stay as merged, and the last fit of queries reads those."""
    model, few = with_idle_heads(8), FitSettings(steps=8)
    targets = Anatomy.of(model).with_kv_heads(1).layers
    work, new, record = first_conversion(monkeypatch, SharedLayer, Sharing(model, targets, ONE_TEXT, few))
    start, first, keys, last = record["output_moved"]
    assert record["fits_kept"] == [True, False, True]
    before, after = record["scores_lost"][1]
    assert after < 0.9 * before
    assert keys > first + FURTHER
    assert last < first < start
    assert work.output_moved(with_bias(new, "q"), with_bias(new, "k")) == pytest.approx(last, rel=1e-4)
    merged = first_conversion(monkeypatch, SharedLayer, Sharing(model, targets, ONE_TEXT, FitSettings(refit=())))[1]
    assert torch.equal(new.k, merged.k)


def test_latent_attention_drops_such_fits_too(monkeypatch, tmp_path):
    """Here without its last fit, of queries, which comes nearest in any case."""
    monkeypatch.setattr(LatentFit, "SCORE_FITS", LatentFit.SCORE_FITS[:3])
    letters = torch.randint(97, 123, (64,), generator=torch.Generator().manual_seed(4)).tolist()
    (tmp_path / "text.txt").write_text("".join(map(chr, letters)) * 6, "utf-8")
    reached, convert = [], LatentFit.convert

    def measured(work):
        new, record = convert(work)  # later its inputs are those of the converted model
        reached.append((work.output_moved(*work.queries_and_keys(new)), record["output_moved"][1:]))
        return new, record

    monkeypatch.setattr(LatentFit, "convert", measured)
    fields = {"calibration_text": str(tmp_path / "text.txt"), "calibration_samples": 6, "calibration_length": 64}
    package.apply(recipe({"op": "mla"} | fields), with_idle_heads(30), tokenizer=Letters())
    assert any(max(moved) > moved[0] + FURTHER for _, moved in reached), "no fit was dropped"
    for final, moved in reached:
        assert len(moved) == 3
        assert final == pytest.approx(min(moved), rel=1e-3)


def test_a_small_step_away_is_kept_and_the_first_fit_in_any_case(monkeypatch):
    """What is kept, by how far the output is moved after each fit: from 0.2, up to 0.25."""
    model = base("llama")
    run = Sharing(model, Anatomy.of(model).with_kv_heads(2).layers, SEQUENCES, FitSettings(refit=()))
    work, _, _ = first_conversion(monkeypatch, SharedLayer, run)
    distances = {"start": 0.1, "first": 0.2, "away": 0.249, "far": 0.251, "near": 0.15, "again": 0.201}
    monkeypatch.setattr(work, "queries_and_keys", lambda name: (name, None))
    monkeypatch.setattr(work, "output_moved", lambda name, _: distances[name])
    seen = []

    def fit(name, before, _):
        seen.append(before)
        return name, Solution(None, 1.0, 0.5, 1)

    names = [name for name in distances if name != "start"]
    record = {}
    assert work.fit_in_turn("start", [(partial(fit, name), False) for name in names], record) == "near"
    assert seen == ["start", "first", "away", "away", "near"]
    assert record["fits_kept"] == [True, True, False, True, False]
    assert record["output_moved"] == [*distances.values()]
