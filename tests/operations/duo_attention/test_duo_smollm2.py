"""The head split on the real SmolLM2-135M: identity, batches of unequal prompts, bytes really held."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from surgery.data.text import load_text
from surgery.io.hub import resolve
from surgery.runtime import modeling_surgery as runtime

PROMPTS, NEW, CLOSE = 8, 16, 1e-3


@pytest.fixture(scope="module")
def smollm2():
    """Model and tokenizer, or a skip where the demo package is not installed."""
    pytest.importorskip("gguf")
    try:
        folder = resolve("smollm2-135m").path
    except surgery.errors.SurgeryError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    return surgery.load(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokens(smollm2):
    text = load_text(part="held-out").text
    return smollm2[1](text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids


def half(model, sinks=16, window=48) -> list[dict]:
    """Half of the KV heads stream, chosen by chance."""
    heads = model.config.num_key_value_heads
    order = torch.randperm(heads * model.config.num_hidden_layers, generator=torch.Generator().manual_seed(0))
    chosen = set(order[: len(order) // 2].tolist())
    return [
        {"streaming": [h for h in range(heads) if layer * heads + h in chosen], "sinks": sinks, "window": window}
        for layer in range(model.config.num_hidden_layers)
    ]


@pytest.fixture(scope="module")
def split(smollm2):
    model = copy.deepcopy(smollm2[0])
    runtime.patch(model, {"layers": half(model)})
    return model


@pytest.mark.parametrize("case", ["no head streams", "a window as long as the text"])
def test_identity(smollm2, tokens, case):
    base = smollm2[0]
    model = copy.deepcopy(base)
    window = {"no head streams": 1, "a window as long as the text": 300}[case]
    layers = half(model, window=window)
    if case == "no head streams":
        layers = [{"streaming": []} for _ in layers]
    runtime.patch(model, {"layers": layers})
    ids = tokens[:, :300].clone()
    rows = torch.cat([ids, ids])
    mask = torch.ones_like(rows)
    rows[1, :37], mask[1, :37] = 2, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, {"input_ids": rows, "attention_mask": mask, "position_ids": positions}):
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            expected = base(**inputs).logits[real]
            for cached in (True, False):
                assert (model(**inputs, use_cache=cached).logits[real] - expected).abs().max() < 1e-4 * expected.std()


def test_unequal_prompts_in_one_batch_are_generated_as_one_by_one(split, smollm2, tokens):
    """Same tokens, except after a step whose two best logits are closer than `CLOSE`: those rows are counted."""
    tokenizer, generator = smollm2[1], torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 260, (PROMPTS,), generator=generator).tolist()
    starts = torch.randint(0, tokens.shape[1] - 300, (PROMPTS,), generator=generator).tolist()
    prompts = [tokens[0, start : start + length] for start, length in zip(starts, lengths, strict=True)]
    width = max(lengths)
    ids = torch.full((PROMPTS, width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    together = split.generate(ids, attention_mask=mask, **settings)[:, width:]
    close = 0
    for row, prompt in enumerate(prompts):
        single = split.generate(prompt[None], output_logits=True, return_dict_in_generate=True, **settings)
        for step, logits in enumerate(single.logits):
            best = logits[0].topk(2).values
            if best[0] - best[1] < CLOSE:
                close += 1
                break
            assert together[row, step] == single.sequences[0, len(prompt) + step], f"row {row}, step {step}"
    assert close <= 1, f"{close} rows had a near tie"


@pytest.mark.slow
def test_bytes_held_at_8k_are_measured_on_the_tensors(smollm2, tokens):
    model = copy.deepcopy(smollm2[0])
    with torch.no_grad():
        stock = model(input_ids=tokens[:, :8000], use_cache=True, logits_to_keep=1)[runtime.CACHE]
        full = sum(t.untyped_storage().nbytes() for layer in stock.layers for t in (layer.keys, layer.values))
        del stock
        runtime.patch(model, {"layers": half(model, 16, 240)})
        cache = model(input_ids=tokens[:, :8000], use_cache=True, logits_to_keep=1)[runtime.CACHE]
    cached = sum(
        t.untyped_storage().nbytes() for layer in cache.layers for s in layer.stores for t in s.tensors.values()
    )
    assert cached == cache.nbytes
    assert cached <= 0.55 * full
