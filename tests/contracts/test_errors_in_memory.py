"""An operation that is interrupted leaves a loaded model as it was, and one that is not leaves others alone."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, recipe
from families import TINY, one_thread  # noqa: F401 (a fixture)
from tokenizers_of_bytes import Letters, byte_tokenizer
from transformers import LlamaForCausalLM

import surgery

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 300
FEW = {"calibration_samples": 4, "calibration_length": 64}
SIX = {"calibration_samples": 6, "calibration_length": 64}
MEASURED = {  # operations that measure, and so tell how far they are
    "closed form": {"op": "gqa", "kv_heads": 2, "method": "closed_form"} | SIX,
    "moh": {"op": "moh", "active_ratio": 0.5} | FEW,
    "mae": {"op": "mae"} | FEW,
    "zero_tuning": {"op": "sink_calibration", "method": "zero_tuning"} | FEW,
    "act": {"op": "sink_calibration", "method": "act", "threshold": 1.0} | FEW,
    "prune_heads": {"op": "prune_heads", "per_layer": 1, "calibration_samples": 4, "calibration_length": 64},
}  # fmt: skip


class Interrupted(Exception):
    pass


def interrupt(*_) -> None:
    raise Interrupted


def described(model) -> tuple:
    """Everything that says what a model is, but its weights' values."""
    modules = [(name, type(module).__name__, len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    own = [name for name, module in model.named_modules() for key in vars(module) if key.startswith("surgery_")]
    return type(model), type(model.config), model.config.to_dict(), modules, own


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("case", MEASURED)
def test_an_error_while_it_measures(family, case, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    step = MEASURED[case]
    name = "calibration_text" if step["op"] in ("gqa", "prune_heads") else "text"
    asked = recipe(step | {name: str(tmp_path / "text.txt")})
    model = TINY[family](vocab_size=300).eval()
    known, before = described(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for allowed in (0, 1):
        calls = []

        def progress(*_, calls=calls, allowed=allowed):
            calls.append(1)
            if len(calls) > allowed:
                raise Interrupted

        with pytest.raises(Interrupted):
            surgery.apply(asked, model, tokenizer=byte_tokenizer(), progress=progress)
        after = model.state_dict()
        assert described(model) == known
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    surgery.apply(asked, model, tokenizer=byte_tokenizer())
    model(input_ids=torch.arange(2, 20)[None])


@pytest.mark.parametrize("op", [op for op, case in CASES.items() if "llama" not in case.refused + case.refused_always])
def test_two_models_of_one_config(op):
    """What is done to one does not change the other."""
    config = TINY["llama"]().config
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    known, ids = (type(config), config.to_dict()), torch.arange(2, 20)[None]
    before = other(input_ids=ids).logits
    surgery.apply(recipe({"op": op} | CASES[op].acts), one, tokenizer=Letters())
    assert (type(config), config.to_dict()) == known
    assert torch.equal(other(input_ids=ids).logits, before)
    surgery.apply(recipe({"op": op} | CASES[op].acts), other, tokenizer=Letters())
    assert (type(config), config.to_dict()) == known


def test_an_error_of_a_later_operation(monkeypatch):
    """The surgical operations before it are undone with it."""
    from surgery.operations.sink_calibration.bias_methods import ZeroTuning

    model = TINY["llama"]().eval()
    known, ids = described(model), torch.arange(2, 20)[None]
    before = model(input_ids=ids).logits
    split, sinks = ({"op": op} | CASES[op].acts for op in ("duo_attention", "sink_calibration"))
    monkeypatch.setattr(ZeroTuning, "apply", interrupt)
    with pytest.raises(Interrupted):
        surgery.apply(recipe(split, sinks), model)
    assert described(model) == known
    assert torch.equal(model(input_ids=ids).logits, before)
