"""Turns before merging: exact for the model they start from, checked against Transformers' own RoPE."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from families import (
    CONVERTIBLE,
    attention_modules,
    base,
    difference,
    get_head,
    kv_heads_of,
    legal_rotation,
    logits_of,
    one_thread,  # noqa: F401
    orthogonal,
    set_head,
)
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as interleaved_partial
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as chunked
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half

from surgery.architecture.anatomy import Anatomy
from surgery.operations.gqa.merge import key_rotations, orthogonal_matrices

SIZE, WIDTH, LENGTH = 8, 24, 7
IDENTITY = torch.eye(SIZE, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(kind: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scores of all pairs of positions after Transformers' RoPE; query, key [length, d]."""
    rotary = {"partial": SIZE // 2, "interleaved partial": SIZE // 2, "none": 0}.get(kind, SIZE)
    if rotary == 0:
        return query @ key.T
    angles = torch.outer(torch.arange(LENGTH, dtype=torch.float64), 0.7 ** torch.arange(rotary // 2))
    q, k = query[None, None], key[None, None]
    if kind == "chunked":
        q, k = chunked(q, k, angles.cos()[None], angles.sin()[None])
    elif kind == "interleaved":
        double = angles.repeat_interleave(2, -1)
        q, k = (x.double() for x in interleaved(q, k, double.cos()[None], double.sin()[None]))
    elif kind == "interleaved partial":
        double = torch.cat([angles, angles], -1)
        q, k = interleaved_partial(q, k, double.cos()[None], double.sin()[None])
    else:  # Phi and StableLM cut the rotary part off before they call this
        double = torch.cat([angles, angles], -1)
        a, b = half(q[..., :rotary], k[..., :rotary], double.cos()[None], double.sin()[None])
        q, k = torch.cat([a, q[..., rotary:]], -1), torch.cat([b, k[..., rotary:]], -1)
    return (q @ k.mT)[0, 0]


KINDS = {
    "half": (SIZE, "half"),
    "chunked": (SIZE, "half"),
    "partial": (SIZE // 2, "half"),
    "interleaved": (SIZE, "interleaved"),
    "interleaved partial": (SIZE // 2, "interleaved"),
    "none": (0, "none"),
}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


@ALL_KINDS
def test_turns_commute_with_rope(kind):
    """Queries and keys turned alike: the same scores at every pair of positions. An illegal turn is caught."""
    tolerance = 1e-5 if kind == "interleaved" else 1e-10  # Cohere's RoPE computes in float32
    turns = key_rotations(random(4, SIZE, WIDTH), *KINDS[kind])
    query, key = random(LENGTH, SIZE, seed=1), random(LENGTH, SIZE, seed=2)
    expected = scores(kind, query, key)
    for turn in turns:
        assert torch.allclose(turn @ turn.mT, IDENTITY, atol=1e-12)
        assert torch.allclose(scores(kind, query @ turn.T, key @ turn.T), expected, atol=tolerance)
    assert not torch.allclose(turns[1], IDENTITY, atol=0.1)
    wrong = orthogonal(SIZE, torch.Generator().manual_seed(4))
    if kind != "none":
        assert not torch.allclose(scores(kind, query @ wrong.T, key @ wrong.T), expected, atol=0.1)
        other = "half" if "interleaved" in kind else "interleaved"
        crossed = key_rotations(random(4, SIZE, WIDTH), KINDS[kind][0], other)[1]
        assert not torch.allclose(scores(kind, query @ crossed.T, key @ crossed.T), expected, atol=0.1)


@ALL_KINDS
def test_planted_turns_are_undone(kind):
    """Heads that are legal turns of one head become that head; without turning, their mean is another."""
    rotary, positions = KINDS[kind]
    facts = SimpleNamespace(head_dim=SIZE, rotary=rotary, positions=positions)
    generator, head = torch.Generator().manual_seed(5), random(SIZE, WIDTH)
    heads = torch.stack([head] + [legal_rotation(facts, generator) @ head for _ in range(3)])
    turned = key_rotations(heads, rotary, positions) @ heads
    assert torch.allclose(turned, head.expand_as(turned), atol=1e-12)
    assert torch.equal(turned[0], head)
    assert (heads.mean(0) - head).norm() > 0.3 * head.norm()
    values = torch.stack([head] + [orthogonal(SIZE, generator) @ head for _ in range(3)])
    assert torch.allclose(orthogonal_matrices(values) @ values, head.expand_as(values), atol=1e-12)


@ALL_KINDS
def test_no_legal_turn_does_better(kind):
    """The mean keeps more than without turning, and a small further turn of any head cannot add to it."""
    rotary, positions = KINDS[kind]
    heads = random(4, SIZE, WIDTH)
    facts = SimpleNamespace(head_dim=SIZE, rotary=rotary, positions=positions)

    def kept(turned):
        return turned.mean(0).square().sum().item()

    aligned = key_rotations(heads, rotary, positions) @ heads
    assert kept(aligned) > kept(heads)
    generator = torch.Generator().manual_seed(6)
    for step in range(60):
        moved = aligned.clone()
        turn = legal_rotation(facts, generator)
        if step % 2:  # a small one: a rotation near the identity by the matrix exponential of its skew part
            turn = torch.matrix_exp(1e-3 * (turn - turn.T))
        moved[step % 4] = turn @ moved[step % 4]
        assert kept(moved) <= kept(aligned) * (1 + 1e-6)


def test_degenerate_heads():
    zero, one = torch.zeros(3, SIZE, WIDTH, dtype=torch.float64), random(1, SIZE, WIDTH)
    thin = random(3, SIZE, 2)  # fewer inputs than channels
    half_zero = random(3, SIZE, WIDTH)
    half_zero[1] = 0
    for heads in (zero, one, thin, half_zero, random(1, SIZE, WIDTH).expand(3, -1, -1)):
        for turns in (
            key_rotations(heads, SIZE, "half"),
            key_rotations(heads, SIZE // 2, "half"),
            orthogonal_matrices(heads),
        ):
            assert turns.isfinite().all()
            assert torch.allclose(turns @ turns.mT, IDENTITY.expand_as(turns), atol=1e-10)
            assert torch.equal(turns[0], IDENTITY)
    same = random(1, SIZE, WIDTH).expand(3, -1, -1)
    for turns in (key_rotations(same, SIZE, "half"), orthogonal_matrices(same)):
        assert torch.allclose(turns, IDENTITY.expand_as(turns), atol=1e-10)


def test_the_same_twice():
    heads = random(4, SIZE, WIDTH)
    for turn in (
        orthogonal_matrices,
        lambda h: key_rotations(h, 4, "half"),
        lambda h: key_rotations(h, SIZE, "interleaved"),
    ):
        assert torch.equal(turn(heads), turn(heads.clone()))


@pytest.mark.parametrize("name", [name for name in CONVERTIBLE if name != "falcon_multi_query"])
def test_alignment_without_merging_leaves_the_model(name):
    """All KV heads of a layer turned towards each other, queries and output columns with them: the same logits."""
    old, model = base(name), copy.deepcopy(base(name))
    groups, size = kv_heads_of(old), Anatomy.of(old).layers[0].head_dim
    for module, facts in zip(attention_modules(model), Anatomy.of(model).layers, strict=True):
        values = torch.stack([get_head(model, module, "v", g) for g in range(groups)])
        keys = torch.stack([get_head(model, module, "k", g) for g in range(groups)])
        turns = orthogonal_matrices(values)
        output = getattr(module, facts.layout.o).weight.data
        for g in range(groups):
            set_head(model, module, "v", g, turns[g] @ values[g])
            for query in range(g * facts.group, (g + 1) * facts.group):
                columns = slice(query * size, (query + 1) * size)
                output[:, columns] = (output[:, columns].double() @ turns[g].T).float()
        if facts.qk_norm:
            continue
        turns = key_rotations(keys, facts.rotary, facts.positions)
        for g in range(groups):
            set_head(model, module, "k", g, turns[g] @ keys[g])
            for query in range(g * facts.group, (g + 1) * facts.group):
                set_head(model, module, "q", query, turns[g] @ get_head(model, module, "q", query))
        assert not torch.allclose(get_head(model, module, "k", 1), keys[1], atol=0.1)
    assert difference(logits_of(model), logits_of(old)) < 1e-4
