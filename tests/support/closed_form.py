"""The closed form on tiny models: its recipe, its tokens, and ways to stop it."""

from __future__ import annotations

import copy

import pytest
import torch
from families import VOCAB, attention_modules, base
from planted import planted

SEQUENCES = torch.randint(3, VOCAB, (12, 24), generator=torch.Generator().manual_seed(1))


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


class Stopped(Exception):
    pass


def stop(done: int, total: int = 0, label: str = "layers"):
    if done and "layers" in label:
        raise Stopped


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def copies_in(layer: int, name: str = "llama"):
    """The family's model, with KV heads that are rotated copies of others in one layer."""
    model, source = copy.deepcopy(base(name)), planted(name)
    attention_modules(model)[layer].load_state_dict(attention_modules(source)[layer].state_dict())
    return model
