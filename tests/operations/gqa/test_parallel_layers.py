"""method: closed_form where threads fit two layers at a time: the same weights, errors, stops, what a plan says."""

from __future__ import annotations

import threading

import pytest
import torch
from closed_form import SEQUENCES, Stopped, same, stop, weights
from families import TINY, randomise
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.closed_form.cost import Calibration, efforts
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.io.resume import LayerFiles
from surgery.operations.gqa.layer import SharedLayer, Sharing
from surgery.operations.gqa.lost_alone import LayerLosses

LAYERS = 5


@pytest.fixture
def threads():
    """Sets how many torch has, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def deep(name: str):
    model = TINY[name](num_hidden_layers=LAYERS).eval()
    randomise(model, 3)
    return model


def sharing(model, *files, **settings) -> Sharing:
    return Sharing(model, Anatomy.of(model).with_kv_heads(1).layers, SEQUENCES, FitSettings(**settings), *files)


def near(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Up to the order in which threads add."""
    return bool((one - two).abs().max() <= 1e-4 * two.abs().max())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_any_number_of_threads_finds_the_same(name, threads):
    model, results, losses = deep(name), [], []
    before = weights(model)
    for count in (1, 2, 3, 4):
        threads(count)
        run = sharing(model, ridges=(0.01,), mlp_ridges=(1.0,))  # a rounding chooses none
        results.append((run.layers(), run.mlps))
        trial = LayerLosses(model, Anatomy.of(model).with_kv_heads(1).layers, SEQUENCES, FitSettings())
        losses.append(trial.measure())
        assert torch.get_num_threads() == count
        assert same(before, weights(model))
    (tensors, _), mlps = results[0]
    for (others, _), others_mlps in results[1:]:
        for one, two in zip([*tensors, mlps], [*others, others_mlps], strict=True):
            assert one.keys() == two.keys()
            assert all(near(tensor, two[name]) for name, tensor in one.items())
    for other_losses in losses[1:]:
        assert other_losses == pytest.approx(losses[0], rel=1e-5, abs=1e-7)


def test_two_layers_are_at_work_at_a_time(threads, monkeypatch):
    """The first two meet before their fits, which one after the other never would."""
    both, convert = threading.Barrier(2), SharedLayer.convert

    def meeting(work):
        if work.layer.anatomy.index < 2:
            both.wait(60)
        return convert(work)

    monkeypatch.setattr(SharedLayer, "convert", meeting)
    threads(2)
    sharing(deep("llama")).layers()


def test_wide_layers_are_fitted_one_at_a_time(threads, monkeypatch):
    free, convert = threading.Lock(), SharedLayer.convert

    def alone(work):
        assert free.acquire(blocking=False), "another layer is at work"
        try:
            return convert(work)
        finally:
            free.release()

    monkeypatch.setattr(SharedLayer, "convert", alone)
    monkeypatch.setattr("surgery.calibration.closed_form.cost.NARROW", 1)
    threads(2)
    sharing(deep("llama")).layers()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_an_error_in_one_layer_comes_out_and_leaves_the_model(layer, threads, monkeypatch):
    model, convert = deep("llama"), SharedLayer.convert
    before, hooks = weights(model), sum(len(module._forward_hooks) for module in model.modules())

    def failing(work):
        if work.layer.anatomy.index == layer:
            raise ValueError(f"layer {layer}")
        return convert(work)

    monkeypatch.setattr(SharedLayer, "convert", failing)
    threads(2)
    with pytest.raises(ValueError, match=f"layer {layer}"):
        sharing(model).layers()
    assert torch.get_num_threads() == 2
    assert same(before, weights(model))
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_a_stop_loses_no_layer_that_was_through(threads, tmp_path):
    model, converted = deep("llama"), []

    def run(files, progress=None):
        def save(index, *given):
            converted.append(index)
            files.save(index, *given)

        return sharing(model, files.load, save).layers(progress)

    threads(2)
    complete, records = run(LayerFiles(None, "x", 0))
    converted.clear()
    with pytest.raises(Stopped):
        run(LayerFiles(tmp_path, "x", 0), stop)
    assert 0 in converted
    again, known_records = run(LayerFiles(tmp_path, "x", 0))
    assert sorted(converted) == list(range(LAYERS)), "each once, before the stop or after it"
    assert known_records == records
    assert all(same(one, two) for one, two in zip(complete, again, strict=True))


def test_what_a_plan_says_of_them(monkeypatch):
    size = {"intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 24}

    def anatomy_of(hidden):
        with torch.device("meta"):
            return Anatomy.of(LlamaForCausalLM(LlamaConfig(hidden_size=hidden, **size)))

    anatomy, wide = anatomy_of(512), anatomy_of(2048)
    parallel, needed = Calibration(64, 512), {}
    for count in (1, 2, 16):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        needed[count] = parallel.memory(anatomy, 24)
        sequential = Calibration(64, 512, ahead=False).memory(anatomy, 24)
        assert parallel.memory(anatomy, 1) < needed[count], "a second layer that is not there"
        assert (sequential == needed[count]) == (count == 1)
    assert parallel.memory(wide, 24) == Calibration(64, 512, ahead=False).memory(wide, 24), "one at a time"
    a_second = 4 * 64 * 512 * (3 * 512 + 2 * 512 + 512 + 3 * 8 * 512 / 4 + 512)  # of its tokens, by the docstring
    assert needed[2] - needed[1] > a_second
    assert needed[16] - needed[2] < 14 * 5 * 4 * 8 * 512**2, "only the texts that are worked on at a time"


def test_a_text_takes_a_cache_of_one_batch(monkeypatch):
    """Of 7B's shape with as many keys as queries: 512 KB a token, and 64 samples of 512 at most."""
    monkeypatch.setattr("surgery.calibration.closed_form.cost.fast_in_bfloat16", lambda: False)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000)).to(torch.bfloat16)
    anatomy = Anatomy.of(model)
    written = [Calibration(2, 512, mlp=False, written=count * 512).memory(anatomy, 1) for count in (20, 46, 1000)]
    assert written[1] == written[2] == pytest.approx(64 * (512 * 2**19 + 3 * 8 * 1000))
    assert written[0] == pytest.approx(28 * (512 * 2**19 + 3 * 8 * 1000))


@pytest.mark.parametrize(("fits", "wanted"), [(0, ()), (1, (1.0,)), (3, (0.25, 0.75, 1.25)), (2, (0.25, 1.25))])
def test_fits_of_scores_take_more_and_more_steps(fits, wanted):
    assert efforts(fits) == wanted
