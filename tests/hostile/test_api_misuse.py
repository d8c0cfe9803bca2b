"""Arguments of the Python API that are of another kind: one sentence each, never an error of pathlib or torch."""

from __future__ import annotations

import pytest
import torch
from families import TINY
from tokenizers_of_bytes import byte_tokenizer
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import surgery

MEAN = {"version": 1, "name": "mean", "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}], "evaluate": None}
STREAM = {"version": 1, "name": "s", "operations": [{"op": "duo_attention", "streaming_ratio": 1.0}], "evaluate": None}
HEAL = {"steps": 1, "length": 16, "method": "full", "data": "builtin"}
SMALL = {"calibration_samples": 4, "calibration_length": 64}


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base)


def healable(base):
    model = loaded(base)
    surgery.apply(MEAN, model)
    return model


CALLS = {
    "plan, no recipe": (lambda base: surgery.plan(None, str(base)), "None is not a recipe"),
    "plan, a number": (lambda base: surgery.plan(5, loaded(base)), "5 is not a recipe"),
    "apply, a list": (lambda base: surgery.apply([MEAN], str(base), output="out"), "is not a recipe"),
    "plan, a number as model": (lambda base: surgery.plan(MEAN, 5), "int is not a model"),
    "apply, output": (lambda base: surgery.apply(MEAN, str(base), output=5), "output: 5 is not a path"),
    "apply, bytes": (lambda base: surgery.apply(MEAN, str(base), output=b"out"), "output: b'out' is not a path"),
    "heal, output": (lambda base: surgery.heal(str(base), output=5), "output: 5 is not a path"),
    "heal, base": (lambda base: surgery.heal(healable(base), 5, settings=HEAL), "int is not a model"),
    "load": (lambda base: surgery.load(None), "folder: None is not a path"),
    "check": (lambda base: surgery.check(5), "folder: 5 is not a path"),
    "push": (lambda base: surgery.push(None, "me/it"), "folder: None is not a path"),
    "save": (lambda base: surgery.save(loaded(base), None, None), "folder: None is not a path"),
    "evaluate": (lambda base: surgery.evaluate(5), "int is not a model"),
    "apply, tokenizer": (lambda base: surgery.apply(MEAN, loaded(base), tokenizer=str(base)), "is not a tokenizer"),
    "evaluate, tokenizer": (lambda base: surgery.evaluate(loaded(base), tokenizer=5), "5 is not a tokenizer"),
    "heal, tokenizer": (lambda base: surgery.heal(healable(base), tokenizer="x", settings=HEAL), "is not a tokenizer"),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_sentence(name, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, words = CALLS[name]
    with pytest.raises(surgery.SurgeryError, match=words):
        call(base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    "step",
    [
        {"op": "gqa", "kv_heads": 2, "method": "closed_form", "calibration_samples": 4, "calibration_length": 64},
        {"op": "moh"} | SMALL,
        {"op": "prune_heads", "per_layer": 1} | SMALL,
        {"op": "duo_attention"} | SMALL,
    ],
    ids=lambda step: step["op"],
)
def test_a_tokenizer_with_more_tokens_than_the_model(step):
    model = TINY["llama"](vocab_size=100, max_position_embeddings=1024)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    recipe = {"version": 1, "name": "x", "operations": [step], "evaluate": None}
    with pytest.raises(surgery.SurgeryError, match="the tokenizer has 258 tokens, the model knows 100"):
        surgery.apply(recipe, model, tokenizer=byte_tokenizer())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("recipe", [MEAN, STREAM], ids=["gqa", "duo_attention"])
@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
def test_weights_that_are_computed_from_others(base, recipe, projection):
    class Scaled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = loaded(base)
    owner = getattr(model.model.layers[1].self_attn, projection)
    parametrize.register_parametrization(owner, "weight", Scaled())
    with pytest.raises(surgery.SurgeryError, match=f"weights of model.layers.1.self_attn.{projection} are computed"):
        surgery.apply(recipe, model)
    parametrize.remove_parametrizations(owner, "weight")
    surgery.apply(recipe, model)


@pytest.fixture
def meta_by_default():
    """What a script that builds large models may have left on."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device("cpu")


@pytest.mark.usefixtures("meta_by_default")
def test_another_default_device(base, tmp_path):
    """What is read and measured is on the CPU, whatever a script's default is."""
    with torch.device("cpu"):
        model = loaded(base)
        surgery.apply(STREAM | {"evaluate": None}, plain := loaded(base))
        ids = torch.arange(2, 40)[None]
        expected = plain(input_ids=ids).logits
    surgery.apply(STREAM, model)
    surgery.apply(MEAN, str(base), output=tmp_path / "out", evaluate=False)
    assert torch.empty(1).is_meta, "the script's own default is as it was"
    result = surgery.evaluate(str(base), windows=1, length=64)
    assert result.status == "done"
    with torch.device("cpu"):
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_surgical_model_on_the_meta_device(base, training):
    """Its shapes can be worked out without weights, as those of a stock model."""
    model = loaded(base)
    surgery.apply(STREAM, model)
    out = model.train(training).to("meta")(input_ids=torch.zeros(1, 20, dtype=torch.long, device="meta"))
    assert out.logits.shape == (1, 20, 300)


def test_bounds_of_sinks_and_window(base, tmp_path):
    """Memory for both is taken at the first token: a block that names 10^9 is refused before that."""
    from conftest import edit_json

    from surgery.operations.duo_attention.operation import MOST_KEPT
    from surgery.operations.kv_evict import base as evicting
    from surgery.runtime import surgery_kv_evict, surgery_visibility

    assert MOST_KEPT == evicting.MOST_KEPT == surgery_visibility.MOST_KEPT
    assert (evicting.BLOCKS, evicting.PROMPT_END) == (surgery_kv_evict.BLOCKS, surgery_kv_evict.PROMPT_END)
    for field in ("sinks", "window"):
        with pytest.raises(surgery.SurgeryError, match=f"{field}.*at most 1.04858e\\+06|{field}.*1048576"):
            surgery.plan(STREAM, str(base), overrides=[f"{field}=1000000000"])
    out = tmp_path / "out"
    surgery.apply(STREAM, str(base), output=out, check=False, evaluate=False)
    import json

    layers = json.loads((out / "config.json").read_text())["surgery"]
    for layer in layers["layers"]:
        layer["sinks"] = 10**9
    edit_json(out / "config.json", surgery=layers)
    with pytest.raises(surgery.SurgeryError, match="has sinks 1000000000, which must be whole and from 0 to 1048576"):
        surgery.load(out)
