"""Every operation where it acts (cases.py): left padding, the cache, later generations and both ways to load."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ACTING, CASES, FEW, recipe
from dense import PADS, batch, chunked, difference, given
from families import TINY, check_both_ways_to_load, load_without_package, logits_of
from families import one_thread as one_thread  # a fixture
from sparse import base_of
from tokenizers_of_bytes import Letters

import surgery
from surgery.errors import SurgeryError
from surgery.runtime.surgery_config import depends_on_prompt

RUNS = [
    (family, op) for family in FEW for op, case in CASES.items() if family not in case.refused + case.refused_always
]


BY_PROMPT = [(family, op) for family, op in RUNS if CASES[op].by_prompt is not None]


@pytest.fixture(scope="module")
def by_prompt():
    """(family, operation) -> the base, and the model whose results depend on where the prompt ends."""
    made = {}
    for family, op in BY_PROMPT:
        base, (fields, act) = base_of(family), CASES[op].by_prompt
        model = copy.deepcopy(base)
        surgery.apply(recipe({"op": op} | fields), model)
        act(model)
        made[family, op] = base, model
    return made


@pytest.fixture(scope="module")
def converted():
    """(family, operation) -> the base, and the model that the operation made of it."""
    made = {}
    for family, op in RUNS:
        base = base_of(family)
        model = copy.deepcopy(base)
        report = surgery.apply(recipe({"op": op} | CASES[op].acts), model, tokenizer=Letters())
        made[family, op] = base, model, report
    return made


@pytest.mark.parametrize(("family", "op"), RUNS)
@torch.no_grad()
def test_it_acts_and_names_its_tier(converted, family, op):
    base, model, report = converted[family, op]
    ids, mask = batch(base, (0,), ACTING)
    want = base(**given(base, ids, mask), use_cache=False).logits
    changed = difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask)
    if CASES[op].in_steps:
        assert changed <= 1e-5
        changed = difference(chunked(model, ids, mask, [ACTING - 40, *[1] * 40]), want, mask)
    assert changed <= 1e-5 if op == "expand" else changed > 1e-3
    assert report.data["tier"] == ("native" if CASES[op].native else "surgical")


@pytest.mark.parametrize(("family", "op"), RUNS)
@torch.no_grad()
def test_left_padding_changes_nothing(converted, family, op):
    """A padded row of a batch says what the row alone says."""
    _, model, _ = converted[family, op]
    ids, mask = batch(model, PADS, ACTING)
    together = model(**given(model, ids, mask), use_cache=False).logits
    for row, pad in enumerate(PADS):
        alone = ids[row : row + 1, pad:]
        want = model(**given(model, alone, torch.ones_like(alone)), use_cache=False).logits
        assert difference(together[row : row + 1, pad:], want, torch.ones_like(alone)) <= 1e-5


@pytest.mark.parametrize(("family", "op"), RUNS)
@torch.no_grad()
def test_cached_is_uncached(converted, family, op):
    _, model, _ = converted[family, op]
    case = CASES[op]
    assert depends_on_prompt(model.config) == case.in_steps
    ids, mask = batch(model, PADS if case.padded else (0, 0), ACTING)
    want = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(chunked(model, ids, mask, case.chunks), want, mask) <= 1e-5


@pytest.mark.parametrize(("family", "op"), BY_PROMPT)
@torch.no_grad()
def test_what_depends_on_the_prompt_depends_on_nothing_else(by_prompt, family, op):
    """Padding changes nothing, nor does the cache within the prompt, nor how the tokens after it come."""
    base, model = by_prompt[family, op]
    ids, mask = batch(base, PADS, ACTING)
    assert depends_on_prompt(model.config)
    whole = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(whole, base(**given(base, ids, mask), use_cache=False).logits, mask) > 1e-3
    assert difference(chunked(model, ids, mask, [ACTING]), whole, mask) <= 1e-5
    for row, pad in enumerate(PADS):
        alone = ids[row : row + 1, pad:]
        want = model(**given(model, alone, torch.ones_like(alone)), use_cache=False).logits
        assert difference(whole[row : row + 1, pad:], want, torch.ones_like(alone)) <= 1e-4
    first, *rest = CASES[op].chunks
    want = chunked(model, ids, mask, [first, *[1] * (ACTING - first)])
    assert difference(chunked(model, ids, mask, [first, *rest]), want, mask) <= 1e-5
    assert difference(chunked(model, ids, mask, [first, ACTING - first]), want, mask) <= 1e-5
    assert difference(whole, want, mask) > 1e-3


def test_round_trip_and_both_ways_to_load(converted, by_prompt, tmp_path):
    """Saved, loaded with the package and with trust_remote_code in a fresh process, saved and loaded again."""
    surgical = {tmp_path / f"{family}-{op}": converted[family, op][1] for family, op in RUNS if not CASES[op].native}
    surgical |= {tmp_path / f"{family}-{op}-by-prompt": model for (family, op), (_, model) in by_prompt.items()}
    check_both_ways_to_load(surgical, tmp_path)


def test_a_native_result_is_a_stock_checkpoint(converted, tmp_path):
    """Stock Transformers, without the package and without code of the folder, gives what the model in memory gives."""
    native = {tmp_path / f"{family}-{op}": converted[family, op][1] for family, op in RUNS if CASES[op].native}
    for folder, model in native.items():
        model.save_pretrained(folder)
    for folder, answer in load_without_package(list(native), tmp_path, trust=False).items():
        assert "error" not in answer, f"{folder.name}: {answer}"
        assert (answer["logits"].double() - logits_of(native[folder])).abs().max() <= 1e-4, folder.name


@pytest.mark.parametrize("op", CASES)
def test_refusals_are_one_error_each(op):
    """An unknown key, a value out of range, a family that does not fit: an error that names the operation's key."""
    case, model = CASES[op], TINY["llama"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    key, value = case.wrong
    for fields, says in (({"no_such_key": 1}, "no_such_key"), ({key: value}, key)):
        with pytest.raises(SurgeryError) as caught:
            surgery.apply(recipe({"op": op} | case.acts | fields), model)
        assert says in str(caught.value)
    for family in {*case.refused, *case.refused_always}:
        with pytest.raises(SurgeryError, match=op):
            surgery.apply(recipe({"op": op} | case.acts), TINY[family]())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
