"""How many KV heads each layer keeps, of so many in all: what is possible, and what loses least."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from math import inf


@lru_cache(maxsize=1024)
def _sums(numbers: frozenset[int], layers: int) -> frozenset[int]:
    if layers <= 0:
        return frozenset({0})
    return frozenset(total + number for total in _sums(numbers, layers - 1) for number in numbers)


def sums_of(numbers: Collection[int], layers: int) -> frozenset[int]:
    """The numbers of heads that so many layers can have in all, if each has one of `numbers`."""
    return _sums(frozenset(numbers), layers)  # kept, since a plan asks for them often, and `fit` makes many plans


def largest_total(numbers: Collection[int], layers: int, most: int) -> int | None:
    """The largest number of heads that so many layers can have in all, up to `most`; None: there is none."""
    return max((total for total in sums_of(numbers, layers) if total <= most), default=None)


def possible_numbers(numbers: Collection[int], layers: int, total: int) -> list[int]:
    """Those of `numbers` that a layer can have where all layers have `total` together, in order."""
    others = sums_of(numbers, layers - 1)
    return sorted(number for number in numbers if total - number in others)


def kept_first(strengths: Sequence[float], own: int, numbers: Collection[int], total: int) -> list[int]:
    """The layers that keep all their heads before others do: the strongest, as many as `total` allows.

    Args:
        strengths: of each layer; one of strength 0 is not among them.
        own: the heads of a layer that keeps all.
        numbers: what any other layer may have.
        total: heads of all layers.
    """
    kept: list[int] = []
    for layer in sorted(range(len(strengths)), key=lambda index: -strengths[index]):
        left = total - own * (len(kept) + 1)
        if strengths[layer] <= 0 or left not in sums_of(numbers, len(strengths) - len(kept) - 1):
            break
        kept.append(layer)
    return sorted(kept)


def choose_heads(losses: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """The number of KV heads of each layer: `total` in all, with the least sum of losses.

    Exact, by dynamic programming over layers from the last to the first. Of equal sums the earlier layer has more
    heads.

    Args:
        losses: for each layer, number of heads -> what the model loses by it; finite.
        total: heads of all layers.

    Raises:
        ValueError: no choice has so many heads.
    """
    least: list[dict[int, float]] = [{0: 0.0}]  # of the last 0, 1, ... layers: heads in all -> least sum
    for of_layer in reversed(losses):
        sums: dict[int, float] = {}
        for heads, loss in of_layer.items():
            for others, rest in least[-1].items():
                sums[heads + others] = min(sums.get(heads + others, inf), loss + rest)
        least.append(sums)
    if total not in least[-1]:
        raise ValueError(f"no choice of KV heads has {total} in {len(losses)} layers")
    chosen = []
    for of_layer, rest in zip(losses, reversed(least[:-1]), strict=True):
        sums = {heads: loss + rest[total - heads] for heads, loss in of_layer.items() if total - heads in rest}
        chosen.append(max(heads for heads, loss in sums.items() if loss == min(sums.values())))
        total -= chosen[-1]
    return chosen
