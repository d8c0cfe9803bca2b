"""method: closed_form on whole models: every family, planted structure, two streams, resuming, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from families import (
    CONVERTIBLE,
    TINY,
    VOCAB,
    attention_modules,
    base,
    check_both_doors,
    difference,
    kv_heads_of,
    logits_of,
    one_thread,  # noqa: F401
)
from test_families import planted

import surgery as package
from surgery.anatomy import Anatomy
from surgery.calibration.layer_files import LayerFiles
from surgery.calibration.shared_layer import Settings
from surgery.calibration.sharing import Sharing
from surgery.errors import SurgeryError

SEQUENCES = torch.randint(3, VOCAB, (12, 24), generator=torch.Generator().manual_seed(1))
FAMILIES = [
    name
    for name in CONVERTIBLE
    if not (anatomy := Anatomy.of(TINY[name]())).composite and anatomy.layers[0].layout.interface and name != "olmo2"
]


class Tokens:
    """A tokenizer whose words are numbers."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()] if text != "a" else [3]}


@pytest.fixture
def numbers(tmp_path):
    """A text of 12 x 24 tokens that `Tokens` reads."""
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, SEQUENCES.flatten().tolist())), "utf-8")
    return tmp_path / "numbers.txt"


def recipe(*steps: dict) -> dict:
    return {"version": 1, "name": "test", "operations": list(steps), "evaluate": None}


def closed(text, kv_heads, **fields) -> dict:
    small = {"calibration_samples": 12, "calibration_length": 24, "calibration_text": str(text)}
    return {"op": "gqa", "kv_heads": kv_heads, "method": "closed_form"} | small | fields


@pytest.mark.parametrize("name", FAMILIES)
def test_turned_copies_merge_without_loss(name, numbers):
    """4 KV heads of which two are turned copies of the others → 2: the same logits, where the mean is far off."""
    old = planted(name)
    found, mean = copy.deepcopy(old), copy.deepcopy(old)
    report = package.apply(recipe(closed(numbers, 2, grouping="similarity")), found, tokenizer=Tokens())
    package.apply(recipe({"op": "gqa", "kv_heads": 2, "grouping": "similarity"}), mean)
    assert report.data["tier"] == "native"
    assert kv_heads_of(found) == 2
    want = logits_of(old)
    assert difference(logits_of(found), want) <= 1e-3
    assert difference(logits_of(mean), want) >= 0.05
