"""A surgical checkpoint has the tensor names of its base, and every way to load it finds all of them.

Transformers renames some families' tensors on the way in and out, by `model_type` or by the name of the class. A
surgical class has another name: what is renamed for the stock class must be renamed for it too (gpt_neox's output
layer is `embed_out` in files and `lm_head` in memory).
"""

from __future__ import annotations

import pytest
import torch
from cases import FAMILIES, recipe
from dense import LENGTH
from families import TINY, load_without_package, logits_of
from safetensors.torch import load_file
from tokenizers_of_bytes import byte_tokenizer
from transformers import AutoModelForCausalLM

import surgery
from surgery.architecture.anatomy import Anatomy

WINDOW = {"op": "duo_attention", "streaming_ratio": 1.0, "window": LENGTH}  # nothing that a text of the tests shows
RUNS = [(family, engine) for family in FAMILIES for engine in ("streaming", "loaded")]


def steps(base, engine: str) -> dict:
    """What makes a surgical checkpoint with this engine: a window, or fewer KV heads in the first layer."""
    kv_heads = [layer.kv_heads for layer in Anatomy.of(base).layers]
    fewer = {"op": "gqa", "method": "mean", "kv_heads": [kv_heads[0] // 2 or 1, *kv_heads[1:]]}
    return recipe(WINDOW if engine == "loaded" else fewer)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(family, engine) -> the folders of base and result; a family that cannot have unequal layers has no second."""
    root, folders = tmp_path_factory.mktemp("names"), {}
    for family, engine in RUNS:
        base, out = root / family / "base", root / family / engine
        if not base.exists():
            TINY[family]().save_pretrained(base)
            byte_tokenizer().save_pretrained(base)
        if engine == "streaming" and Anatomy.of(TINY[family]()).layers[0].kv_heads == 1:
            continue  # nothing becomes fewer
        try:
            surgery.plan(steps(base, engine), str(base))
        except surgery.SurgeryError:
            assert engine == "streaming"
            continue
        report = surgery.apply(steps(base, engine), str(base), output=out, check=False, evaluate=False)
        assert (report.data["engine"], report.data["tier"]) == (engine, "surgical")
        folders[family, engine] = base, out
    assert {("gpt_neox", "loaded"), ("llama", "streaming")} <= set(folders)
    return folders


def tensors_in(folder) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize(("family", "engine"), RUNS)
def test_names_are_the_bases_and_loading_finds_all(converted, family, engine, tmp_path):
    if (family, engine) not in converted:
        pytest.skip(f"layers of {family} cannot differ")
    base, out = converted[family, engine]
    assert tensors_in(out) == tensors_in(base)
    model = surgery.load(out)  # refuses what lacks a weight
    model.save_pretrained(tmp_path / "again")
    assert tensors_in(tmp_path / "again") == tensors_in(base)
    if engine == "loaded":
        want = logits_of(AutoModelForCausalLM.from_pretrained(base))
        assert (logits_of(model) - want).abs().max() <= 1e-5 * want.std()


def test_strangers_find_all(converted, tmp_path):
    """Without the package: a tensor that is not found would be random, and no error."""
    outputs = {out: key for key, (_, out) in converted.items()}
    for out, answer in load_without_package(list(outputs), tmp_path, trust=True).items():
        assert "error" not in answer, f"{outputs[out]}: {answer}"
        assert answer["missing"] == answer["unexpected"] == [], outputs[out]
        assert torch.equal(answer["logits"].double(), logits_of(surgery.load(out))), outputs[out]
