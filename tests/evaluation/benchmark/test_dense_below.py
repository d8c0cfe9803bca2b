"""`bench --calibrate`: the value that follows from timings, where it is written, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import edit_record
from families import one_thread  # noqa: F401 (a fixture)

import surgery as package
from surgery.evaluation.benchmark import dense_below
from surgery.evaluation.benchmark.run import machine_name
from surgery.machine import placement
from surgery.report.report import Report
from surgery.runtime.modeling_surgery import attention_modules

SCORES = {
    "status": "done",
    "text": {"title": "a text", "sha256": "ab", "tokens": 10, "windows": 1, "length": 16},
    "base": {"perplexity": 10.0},
    "out": {"perplexity": 10.5},
    "kl": {"mean": 0.1},
}


@pytest.fixture
def out(surgery, model, tmp_path):
    """A checkpoint with sparse prefill in both layers, dense below 64; the model has 1,024 positions."""
    fields = ("block=16", "every=8", "dense_below=64")
    done = surgery("apply", "sparse-prefill", model, "-o", "out", "--no-check", "--no-eval", *fields)
    assert done.code == 0, done.err
    return tmp_path / "out"


def made_up(fixed: float, asked: list | None = None):
    """Seconds of a machine on which a sparse query costs a tenth of a dense one, and something more."""

    def seconds(call, length, dense_below, repeats):
        if asked is not None:
            asked.append((length, dense_below))
        below = length if dense_below is None else dense_below
        rest = 0.05 * (length**2 - below**2) + fixed * (length - below)
        return 1e-6 * (below**2 / 2 + rest)

    return seconds


def test_the_smallest_candidate_within_the_limit(out, monkeypatch):
    """A sparse query pays from 100 keys on: at 64 a prompt of 80 takes 1.126 of dense time, at 128 one of 160 0.90."""
    asked = []
    monkeypatch.setattr(dense_below, "_seconds", made_up(90, asked))
    found = dense_below.search_dense_below(out, candidates=(512, 64, 32, 128), rounds=2)
    assert (found.dense_below, found.fits, found.before, found.layers) == (128, True, [64], [0, 1])
    tried = [(trial.dense_below, trial.length) for trial in found.trials]
    assert tried == [(32, 48), (32, 64), (64, 80), (64, 128), (128, 160), (128, 256)]
    ratios = {trial.length: trial.ratio for trial in found.trials if trial.dense_below in (64, 128)}
    assert ratios[80] == pytest.approx((64**2 / 2 + 0.05 * (80**2 - 64**2) + 90 * 16) / (80**2 / 2))
    assert ratios[80] == pytest.approx(1.126, abs=1e-3)
    assert ratios[160] == pytest.approx(0.901, abs=1e-3)
    # Per candidate and length: a round that does not count and two that do, both ways, two layers.
    assert [asked.count((160, below)) for below in (None, 128)] == [6, 6]


def test_where_none_fits_no_prompt_is_sparse(surgery, out, monkeypatch):
    monkeypatch.setattr(dense_below, "_seconds", made_up(1e6))
    found = dense_below.search_dense_below(out)
    assert [trial.dense_below for trial in found.trials[::2]] == [256, 512]  # of the default ones, in 1,024 positions
    assert (found.dense_below, found.fits) == (1024, False)
    said = surgery("bench", "out", "--calibrate").out
    assert "no candidate stays within 1.02 of dense in prompts of up to 1,024 tokens" in said


def test_real_timings_leave_the_model_as_it_was(out):
    found = dense_below.search_dense_below(out, candidates=(32,), rounds=1)
    assert [trial.length for trial in found.trials] == [48, 64]
    assert all(min(trial.dense, trial.sparse, trial.ratio) > 0 for trial in found.trials)
    model = package.load(out)
    module = attention_modules(model)[0]
    before = module.surgery_sparse
    calls = dense_below._calls(model, model.dummy_inputs["input_ids"], [1])
    assert [call[0].layer_idx for call in calls] == [1]
    with dense_below._dense_below(module, 500):
        assert [sparse.dense_below for sparse in module.surgery_sparse] == [500]
    with dense_below._dense_below(module, None):
        assert module.surgery_sparse is None
    assert module.surgery_sparse is before


def below_of(folder) -> list[int]:
    return [module.surgery_sparse[0].dense_below for module in attention_modules(package.load(folder))]


@pytest.mark.parametrize(("fixed", "value"), [(90, 128), (1, 32)])
def test_written_where_the_checkpoint_says_it(surgery, out, monkeypatch, fixed, value):
    """A larger value keeps the scores and says of what they are, a smaller one takes them out."""
    limits = {"max_kl": 1.0}
    edit_record(out, evaluation=SCORES, gate={"status": "passed", "limits": limits, "reasons": []})
    monkeypatch.setattr(dense_below, "_seconds", made_up(fixed))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    args = ("bench", "out", "--calibrate", "--lengths", "32,64,128", "--rounds", "2")
    shown = surgery(*args)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert f"dense_below: {value} (now 64): the smallest that stays within 1.02 of dense" in shown.out
    assert f"add --write; or make the checkpoint again with dense_below={value}" in shown.out
    done = surgery(*args, "--write")
    assert done.code == 0, done.err
    assert "written to out" in done.out
    assert below_of(out) == [value, value]
    report = Report.of(out).data
    assert report["recipe"]["operations"][0]["dense_below"] == value
    assert report["overrides"][-1] == f"sparse_prefill.dense_below={value}"
    assert report["calibration"]["dense_below"] == value
    assert report["plan"]["changes"][0].startswith(f"prompts beyond {value} tokens")
    card = (out / "README.md").read_text()
    assert f"Dense_below was 64 and became {value} by calibration on " in card
    changed = {path.name for path in out.iterdir() if path.read_bytes() != before.get(path.name)}
    assert changed == {"config.json", "surgery.json", "README.md"}
    if value > 64:
        assert (report["evaluation"], report["gate"]["status"]) == (SCORES, "passed")
        assert "The scores are of dense_below 64: this model reads more than that." in card
    else:
        assert report["evaluation"] is None
        assert report["gate"] == {"status": "not run", "limits": limits}
        assert "its scores were taken out" in done.out
    again = surgery(*args, "--write", "--json").json
    assert (again["before"], again["dense_below"], again["written"]) == ([value], value, True)
    later = json.loads((out / "surgery.json").read_text())
    assert later["plan"] == report["plan"]
    assert later["overrides"] == report["overrides"]


def test_a_gpu_without_room_for_the_model_is_not_taken(out, monkeypatch):
    monkeypatch.setattr(placement, "accelerators", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(placement, "free_on", lambda device: 1000)
    monkeypatch.setattr(dense_below, "_seconds", made_up(90))
    found = dense_below.search_dense_below(out, candidates=(64,), rounds=1)
    assert found.machine == machine_name(torch.device("cpu"))


def test_a_value_that_was_not_tried_is_not_written(surgery, out, monkeypatch):
    """No candidate fits, and the model has positions for longer prompts: what was measured is shown, and no more."""
    monkeypatch.setattr(dense_below, "_seconds", made_up(10_000))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = surgery("bench", "out", "--calibrate", "--lengths", "32,64", "--rounds", "2", "--write")
    assert done.code == 2
    assert "no candidate stays within 1.02 of dense in prompts of up to 128 tokens" in done.out
    assert "nothing was written" in done.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_refused(refused, surgery, out, model):
    refused("bench", "out", says=("bench compares with a base", "--base"))
    refused("bench", "out", "--base", "model", "--write", says=("--write is only for --calibrate",))
    refused("bench", "out", "--calibrate", "--synthetic", says=("--synthetic is not for --calibrate",))
    refused("bench", "out", "--calibrate", "--lengths", "8,600", says=("from a block (16) to half of 1,024 tokens",))
    refused("bench", "model", "--calibrate", says=("no layer of this checkpoint has a sparse prefill",))
    (out.parent / "short.txt").write_text("the cat sat on a mat")
    refused("bench", "out", "--calibrate", "--text", "short.txt", says=("half of 6 tokens",))
