"""Every operation in each setting that changes nothing, on every family of the attention interface (cases.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, FAMILIES, recipe
from dense import batch, chunked, difference, given
from families import (
    ONE_KV_HEAD,
    TINY,
    TOKENS,
    load_without_package,
    logits_of,
    one_thread,  # noqa: F401 (a fixture)
)

import surgery
from surgery.architecture.anatomy import Anatomy

SETTINGS = {name: (op, make) for op, case in CASES.items() for name, make in case.identity.items()}
RUNS = [
    (family, name)
    for family in FAMILIES
    for name, (op, _) in SETTINGS.items()
    if family not in CASES[op].refused_always and (family, name) != (ONE_KV_HEAD, "kv_evict, task_kv")
]
# In one checkpoint, one operation of each term; where all heads have a window, none has a prompt to read by blocks.
LEFT = (
    "duo_attention, none stream",
    "learned, identity",
    "kv_bias, identity",
    "sparse_prefill, gamma 1",
    "sparse_prefill, exact, dense rows",
    "moh, all heads on",
    # All heads stream here, so that none is left to evict keys or to read fewer (tests/runtime/test_evict.py).
    *(name for name, (op, _) in SETTINGS.items() if op in ("kv_evict", "kv_read")),
)


@pytest.fixture(scope="module")
def bases():
    return {name: TINY[name]().eval().requires_grad_(False) for name in FAMILIES}


def test_every_operation_has_a_case():
    from surgery import operations

    assert sorted(CASES) == operations.builtin_names()
    assert len(SETTINGS) == sum(len(case.identity) for case in CASES.values()), "two settings have one name"


@pytest.mark.parametrize(("family", "step"), RUNS)
@torch.no_grad()
def test_identity(bases, family, step):
    """Cached and not, rows alone and left-padded."""
    base, model, (op, make) = bases[family], copy.deepcopy(bases[family]), SETTINGS[step]
    report = surgery.apply(recipe({"op": op} | make(Anatomy.of(base).layers[0])), model)
    stays_stock = CASES[op].native or op == "prune_heads"  # where no head goes, there is nothing to say of heads
    assert report.data["tier"] == ("native" if stays_stock else "surgical")
    ids, mask = batch(base)
    for rows in (slice(0, 1), slice(None)):
        want = base(**given(base, ids[rows], mask[rows]), use_cache=False).logits
        whole = model(**given(model, ids[rows], mask[rows]), use_cache=False).logits
        assert difference(whole, want, mask[rows]) <= 1e-5
        assert difference(chunked(model, ids[rows], mask[rows], [20, 1, 24]), want, mask[rows]) <= 1e-5


def test_identity_through_both_doors_and_saved_again(bases, tmp_path):
    """All terms at once: one checkpoint of each family."""
    folders = []
    for family, base in bases.items():
        model, layer = copy.deepcopy(base), Anatomy.of(base).layers[0]
        steps = [
            {"op": op} | make(layer)
            for name, (op, make) in SETTINGS.items()
            if name not in LEFT and (family, name) in RUNS
        ]
        surgery.apply(recipe(*steps), model)
        model.save_pretrained(tmp_path / family)
        surgery.load(tmp_path / family).save_pretrained(tmp_path / f"{family}-again")
        folders += [tmp_path / family, tmp_path / f"{family}-again"]
    for folder, answer in load_without_package(folders, tmp_path, trust=True).items():
        assert "error" not in answer, f"{folder.name}: {answer}"
        want = logits_of(bases[folder.name.removesuffix("-again")])
        assert (answer["logits"] - want).abs().max() <= 1e-5 * want.std(), folder.name
        assert torch.equal(logits_of(surgery.load(folder), TOKENS), answer["logits"].double()), folder.name
