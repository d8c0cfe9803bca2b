"""Weights, texts and scripts that leave a calibration nothing to measure, or no gradient to measure with."""

from __future__ import annotations

import pytest
import torch
from families import TINY
from tokenizers_of_bytes import byte_tokenizer

import surgery
from surgery.calibration.gradients import with_gradients
from surgery.operations.moh import router

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 300
FEW = {"calibration_samples": 4, "calibration_length": 64}


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def apply(model, **step):
    recipe = {"version": 1, "name": "x", "operations": [step], "evaluate": None}
    return surgery.apply(recipe, model, tokenizer=byte_tokenizer()).data["operations"][0]["record"]


def finite(model) -> bool:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(2, 40)[None]).logits
    return bool(logits.isfinite().all()) and all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral"])
def test_act_where_no_sink_occurs(family, text):
    """No weight on a key is sixty times the mean: there is nothing to scale, and nothing is kept."""
    model = TINY[family](vocab_size=300).eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    record = apply(model, op="sink_calibration", method="act", threshold=60.0, text=text, **FEW)
    assert record["kept"] is False
    assert (
        not any(any(betas != 1 for betas in layer.values()) for layer in record["beta_by_head"].values())
        if ("beta_by_head" in record)
        else True
    )
    with torch.no_grad():
        assert (model(input_ids=ids).logits - before).abs().max() <= 1e-5 * before.std()


@pytest.mark.parametrize(
    "step",
    [
        {"op": "gqa", "kv_heads": 2, "method": "closed_form", "calibration_samples": 6, "calibration_length": 64},
        {"op": "gqa", "kv_heads": 2, "method": "mean", "align": "procrustes", "grouping": "similarity"},
        {"op": "prune_heads", "per_layer": 1, "calibration_samples": 4, "calibration_length": 64},
        {"op": "moh", "active_ratio": 0.5} | FEW,
        {"op": "mae"} | FEW,
        {"op": "sink_calibration", "method": "zero_tuning"} | FEW,
        {"op": "sink_calibration", "method": "act"} | FEW,
    ],
    ids=lambda step: "-".join([step["op"], step.get("method", "")]),
)
def test_weights_that_are_zero(step, text):
    """A model without a word: every operation gives one that still runs."""
    model = TINY["llama"](vocab_size=300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    name = {"gqa": "calibration_text", "prune_heads": "calibration_text"}.get(step["op"], "text")
    reads_text = step.get("method") != "mean"
    apply(model, **step, **({name: text} if reads_text else {}))
    assert finite(model)


@pytest.mark.parametrize("op", ["moh", "mae"])
def test_a_routers_fit_that_is_not_finite(op, text, monkeypatch):
    real = router.ridge

    def spoilt(train, validation):
        weights, bias, record = real(train, validation)
        weights[0, 0] = float("nan")
        return weights, bias, record

    monkeypatch.setattr(router, "ridge", spoilt)
    model = TINY["llama"](vocab_size=300)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(surgery.SurgeryError, match="fit to the calibration text is not finite in layer 0"):
        apply(model, op=op, text=text, **FEW)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "step",
    [
        {"op": "sink_calibration", "method": "act", "threshold": 1.0} | FEW,
        {"op": "sink_calibration", "method": "zero_tuning"} | FEW,
        {"op": "prune_heads", "per_layer": 1, "calibration_samples": 4, "calibration_length": 64},
        {"op": "moh", "active_ratio": 0.5} | FEW,
    ],
    ids=lambda step: "-".join([step["op"], step.get("method", "")]),
)
def test_a_script_that_has_turned_gradients_off(step, off, text):
    """The same weights as with gradients on."""
    name = "calibration_text" if step["op"] == "prune_heads" else "text"
    torch.manual_seed(0)
    first = TINY["llama"](vocab_size=300)
    torch.manual_seed(0)
    second = TINY["llama"](vocab_size=300)
    apply(first, **step, **{name: text})
    with off():
        apply(second, **step, **{name: text})
    assert torch.is_grad_enabled()
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_healing_and_learned_gates_where_gradients_are_off(off, text):
    from surgery.operations.head_scorers.learned_gates import gates

    model = TINY["llama"](vocab_size=300, max_position_embeddings=1024)
    with off():
        scores = gates(model, byte_tokenizer(), steps=2, samples=1, length=700, sinks=4, window=32, text=text)
        apply(model, op="gqa", kv_heads=2, method="mean")
        before = model.model.layers[0].self_attn.k_proj.weight.clone()
        options = {"loss": "ce", "data": text, "steps": 1, "length": 32, "batch_tokens": 32, "method": "full"}
        surgery.heal(model, tokenizer=byte_tokenizer(), **options)
    assert len(scores.scores) == 2
    assert not torch.equal(model.model.layers[0].self_attn.k_proj.weight, before)


def test_gradients_are_as_before_afterwards():
    with torch.inference_mode():
        with with_gradients():
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        with with_gradients():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
