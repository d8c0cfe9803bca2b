"""Which heads share a group: the best partition where all can be tried, never a worse one than neighbours."""

from __future__ import annotations

import copy
from itertools import combinations, permutations

import pytest
import torch
from families import attention_modules, base, get_head, legal_rotation, one_thread, orthogonal, set_head  # noqa: F401

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import with_bias
from surgery.calibration.closed_form.layerwise_fit import layer_of
from surgery.calibration.closed_form.low_rank import merge_keys, merge_values
from surgery.operations.gqa.grouping import (
    aligned_inner,
    head_distances,
    merge_losses,
    partition,
    phased_inner,
    plain_inner,
    similar_order,
)


def random_table(size: int, seed: int) -> torch.Tensor:
    table = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = table + table.T
    return table.fill_diagonal_(0)


def cost(table: torch.Tensor, groups) -> float:
    return sum(table[a, b].item() for group in groups for a, b in combinations(group, 2))


def neighbours(size: int, groups: int) -> list[list[int]]:
    each = size // groups
    return [list(range(i * each, (i + 1) * each)) for i in range(groups)]


@pytest.mark.parametrize(("size", "groups"), [(2, 1), (4, 2), (6, 2), (6, 3), (8, 2), (8, 4)])
def test_best_of_all_partitions(size, groups):
    """Against every ordering of the heads, cut into pieces."""
    each = size // groups
    for seed in range(3):
        table = random_table(size, seed)
        partitions = {
            frozenset(frozenset(order[i : i + each]) for i in range(0, size, each))
            for order in permutations(range(size))
        }
        best = min(cost(table, [sorted(g) for g in split]) for split in partitions)
        groups_found = partition(table, groups)
        assert sorted(h for group in groups_found for h in group) == list(range(size))
        assert {len(group) for group in groups_found} == {each}
        assert cost(table, groups_found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("size", "groups"), [(9, 3), (12, 4), (16, 2), (16, 4), (16, 8), (32, 8)])
def test_many_heads_never_worse_than_neighbours(size, groups):
    for seed in range(6):
        table = random_table(size, seed)
        groups_found = partition(table, groups)
        assert sorted(h for group in groups_found for h in group) == list(range(size))
        assert {len(group) for group in groups_found} == {size // groups}
        assert cost(table, groups_found) <= cost(table, neighbours(size, groups)) + 1e-12
        assert groups_found == sorted(sorted(group) for group in groups_found)
        each = size // groups  # no swap of two heads helps
        for a, b in combinations(range(groups), 2):
            for i in range(each):
                for j in range(each):
                    other = [list(group) for group in groups_found]
                    other[a][i], other[b][j] = other[b][j], other[a][i]
                    assert cost(table, other) > cost(table, groups_found) - 1e-9


@pytest.mark.parametrize(("size", "groups", "seed"), [(9, 3, 16), (12, 4, 9), (16, 4, 1)])
def test_neighbours_win_where_greedy_does_not(size, groups, seed):
    """Neighbours a little closer than the rest: greedy agglomeration alone ends in a worse place at these seeds."""
    table, each = random_table(size, seed), size // groups
    for i in range(0, size, each):
        table[i : i + each, i : i + each] *= 0.6
    assert cost(table, partition(table, groups)) <= cost(table, neighbours(size, groups)) + 1e-12


@pytest.mark.parametrize("size", [8, 16])
def test_planted_groups_are_found(size):
    heads = torch.randn(size // 2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(size, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = [i % (size // 2) for i in range(size)]  # head i and head i + size/2 are alike
    table = head_distances(heads[order] + 0.01 * noise, plain_inner)
    assert partition(table, size // 2) == [[i, i + size // 2] for i in range(size // 2)]


def test_neighbours_stay_where_nothing_is_gained():
    for size, groups in ((4, 2), (8, 2), (8, 8), (8, 1), (16, 4)):
        assert partition(torch.ones(size, size), groups) == neighbours(size, groups)
        assert partition(torch.zeros(size, size), groups) == neighbours(size, groups)


def test_distances_are_what_merging_loses():
    """The pairwise sum is m times the squared distance to the mean, as a share of all energy."""
    heads = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = head_distances(heads, plain_inner)
    for group in ([0, 1, 2], [1, 4], [0, 2, 3, 5]):
        members = heads[group]
        lost = (members - members.mean(0)).square().sum() / heads.square().sum()
        assert cost(table, [group]) == pytest.approx(len(group) * lost.item(), rel=1e-12)
    assert torch.equal(table, table.T)
    assert not table.diagonal().any()
    assert not head_distances(torch.zeros(3, 2, 2, dtype=torch.float64), plain_inner).any()


@pytest.mark.parametrize(("rotary", "positions"), [(8, "half"), (4, "half"), (8, "interleaved"), (0, "none")])
def test_inner_products_after_the_best_turn(rotary, positions):
    """Larger than any random turn reaches, not changed by turning, at least the plain one."""

    class Layout:
        head_dim = 8

    Layout.rotary, Layout.positions = rotary, positions
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    phased = phased_inner(a, b, rotary, positions).item()
    assert plain_inner(a, b) <= phased <= aligned_inner(a, b) + 1e-12
    for _ in range(50):
        turn = legal_rotation(Layout, generator)
        assert plain_inner(a, turn @ b) <= phased + 1e-12
        assert phased_inner(a, turn @ b, rotary, positions).item() == pytest.approx(phased, rel=1e-10)
        any_turn = orthogonal(8, generator)
        assert plain_inner(a, any_turn @ b) <= aligned_inner(a, b) + 1e-12
        assert aligned_inner(a, any_turn @ b).item() == pytest.approx(aligned_inner(a, b).item(), rel=1e-10)
    if rotary == 0:
        assert phased == pytest.approx(aligned_inner(a, b).item(), rel=1e-12)
    assert phased_inner(a, legal_rotation(Layout, generator) @ a, rotary, positions).item() == pytest.approx(
        plain_inner(a, a).item(), rel=1e-10
    )


@pytest.mark.parametrize("name", ["llama_bias", "stablelm", "starcoder2", "phi"])
def test_losses_of_pairs_are_what_the_closed_form_says_of_white_inputs(name):
    """Whole and partial RoPE, biases; of keys and values each a share of what all heads say to their readers."""
    model = base(name)
    anatomy = Anatomy.of(model).layers[0]
    layer = layer_of(model, anatomy)
    keys, values, queries = (with_bias(layer, projection) for projection in "kvq")
    heads, group = len(keys), anatomy.group
    white = torch.eye(keys.shape[-1], dtype=torch.float64)
    mine = [range(g * group, (g + 1) * group) for g in range(heads)]
    out = layer.o.double()
    readers = torch.stack([sum(out[:, h].T @ out[:, h] for h in own) for own in mine])
    power = torch.stack([sum(queries[h] @ queries[h].T for h in own) for own in mine])
    rope = {"rotary": anatomy.rotary, "positions": anatomy.positions}
    energies = [merge_keys(keys, white, power, **rope).energy, merge_values(values, white, readers).energy]
    want = torch.zeros(heads, heads, dtype=torch.float64)
    for a, b in combinations(range(heads), 2):
        pair = [a, b]
        lost = [merge_keys(keys[pair], white, power[pair], **rope), merge_values(values[pair], white, readers[pair])]
        want[a, b] = want[b, a] = sum(each.lost / energy for each, energy in zip(lost, energies, strict=True))
    assert torch.allclose(merge_losses(layer), want, atol=1e-10)
    assert want.max() > 0.1


def test_the_closed_form_groups_heads_that_it_can_tell_from_one():
    """2 and 3 are multiples of 0 and 1, four times as large; 1 is 0 with noise, to which turns alone are nearer."""
    model, draw = copy.deepcopy(base("llama")), torch.Generator().manual_seed(0)
    for module, anatomy in zip(attention_modules(model), Anatomy.of(model).layers, strict=True):
        size = anatomy.head_dim
        for projection in "kv":
            first = get_head(model, module, projection, 0)
            noise = torch.randn(first.shape, generator=draw, dtype=torch.float64)
            set_head(model, module, projection, 1, first + 0.5 * first.std() * noise)
            for head, source in ((2, 0), (3, 1)):
                if projection == "v":
                    mix = torch.randn(size, size, generator=draw, dtype=torch.float64)
                else:
                    factor = torch.polar(
                        0.5 + torch.rand(size // 2, generator=draw, dtype=torch.float64),
                        6.28 * torch.rand(size // 2, generator=draw, dtype=torch.float64),
                    )
                    real, imag = factor.real.diag(), factor.imag.diag()
                    mix = torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)])
                set_head(model, module, projection, head, 4 * mix @ get_head(model, module, projection, source))
        layer = layer_of(model, anatomy)
        assert similar_order(layer, 2, aligned=False, closed_form=True) == [0, 2, 1, 3]
        assert similar_order(layer, 2, aligned=True) == [0, 1, 2, 3]
        assert float(merge_losses(layer)[[0, 1], [2, 3]].max()) < 1e-9
