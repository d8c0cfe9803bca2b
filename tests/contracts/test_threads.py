"""Threads that share a model get what each would get alone: a server answers every request in a thread of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, FEW, recipe
from families import TINY, attention_modules, one_thread  # noqa: F401 (a fixture)
from tokenizers_of_bytes import Letters

import surgery
from surgery.runtime import modeling_surgery as runtime

LENGTHS = (40, 40, 57)  # of the prompts; three tokens follow
RUNS = [
    (family, op) for op, case in CASES.items() for family in FEW if family not in (*case.refused, *case.refused_always)
]


def answer(model, prompt: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt, read whole and without a cache, then of three tokens through a cache."""
    with torch.no_grad():
        logits = [model(input_ids=prompt, use_cache=False).logits]
        out = model(input_ids=prompt[:, :-3], use_cache=True)
        for token in prompt[0, -3:]:
            cache = getattr(out, runtime.CACHE, None) or out.past_key_values
            out = model(input_ids=token.view(1, 1), **{runtime.CACHE: cache})
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("family", "op"), RUNS)
def test_threads_do_not_meet(family, op, monkeypatch):
    """All of them are inside the same layer at once, between what is worked out before attention and attention."""
    model = TINY[family]().eval()
    vocabulary = model.config.get_text_config().vocab_size
    surgery.apply(recipe({"op": op} | CASES[op].acts), model, tokenizer=Letters())
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, vocabulary, (1, length), generator=draw) for length in LENGTHS]
    alone = [answer(model, prompt) for prompt in prompts]
    barrier = threading.Barrier(len(prompts), timeout=20)

    def wait(module, args) -> None:
        barrier.wait()

    for module in attention_modules(model):
        module.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: answer(model, prompt), prompts))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
