"""Selects the parameters that train, from the record of the surgery and the model's anatomy.

There is no list of names per family. With LoRA, the linear modules of attention and MLP get low-rank updates. After a
merge of KV heads, K and V train in full instead: a low-rank update of a wrong matrix is the wrong prior. Embeddings
and the output head do not train with LoRA: where they are one tensor, a merge would change both.

Sources: Hu et al. 2021, "LoRA", arXiv 2106.09685; Ma et al. 2023, "LLM-Pruner", arXiv 2305.11627.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from surgery.architecture.layer import norm_names
from surgery.errors import SettingError, SurgeryError

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.config.heal import Heal

SURGERY = "surgery_"
# Neither has a gradient: the first recognises sinks by a comparison, the second ranks keys in decoding.
FIXED = ("surgery_sink_probe", "surgery_read_basis")
EVERY = frozenset("qkvo")
EMBEDDINGS = "embeddings"  # in `heal.freeze`: the token embeddings and the output head, whatever a family calls them
Table = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


@dataclass(frozen=True)
class TrainableParameters:
    """The parameters of a model that train.

    Attributes:
        parameters: names of the parameters that train in full.
        adapted: paths of the linear modules that get low-rank updates.
        count: how many numbers train, including low-rank factors.
        started: names of further parameters, which only the layer-wise start fits (`heal.warm_start_of`).
    """

    parameters: tuple[str, ...]
    adapted: tuple[str, ...]
    count: int
    started: tuple[str, ...] = ()


def touched(operations: Iterable[dict]) -> frozenset[str]:
    """Which of the projections "q", "k", "v" and "o" some operations rewrote.

    Args:
        operations: operations of recipes or records: {"op": name, field: value, ...}.
    """
    from surgery import operations as registry

    rewritten: set[str] = set()
    for fields in operations:
        try:
            rewritten |= set(registry.find(str(fields.get("op"))).model_validate(fields).rewritten_projections)
        except (SurgeryError, ValueError):  # not installed, or of another version: it may have rewritten all
            rewritten |= EVERY
    return frozenset(rewritten)


def select_trainable(
    heal: Heal,
    anatomy: Anatomy,
    table: Table,
    rewritten: frozenset[str],
    is_linear: Callable[[str], bool] = lambda path: True,
    more: int = 0,
) -> TrainableParameters:
    """Select the parameters that train by `heal.method`.

    Where heads are mixed, `method: parts` does not train the merged K and V themselves, and no method does so where
    the base's heads train (`heal.mixing_heads`). What a pattern of `heal.freeze` names does not train, and gets no
    low-rank update; "embeddings" is a name for all weights with a row for each token of the vocabulary.

    Args:
        anatomy: the converted model's anatomy.
        table: the converted model's parameters, including mixing weights; tied parameters appear once.
        rewritten: the result of `touched`.
        is_linear: whether the module at a path can have a low-rank update.
        more: how many numbers the surgery will add, where the table belongs to a plan and does not name them.

    Raises:
        SurgeryError: method: parts, and the surgery added and rewrote nothing; a pattern of `heal.freeze` names
            nothing that would train; nothing is left to train.
    """
    every = _by_method(heal, anatomy, table, rewritten, is_linear, more)
    every = replace(every, started=_started(heal, anatomy, table, every.parameters))
    if heal.mixing_heads == "train":
        every = _without_own(every, heal, table, more)
    if not heal.freeze:
        return every
    could = list(dict.fromkeys([*every.parameters, *(f"{path}.weight" for path in every.adapted), *every.started]))
    rows = anatomy.config.get_text_config().vocab_size
    found = {pattern: _named(pattern, could, table, rows) for pattern in heal.freeze}
    frozen = {name for names in found.values() for name in names}
    idle = [
        pattern for pattern, names in found.items() if not names and pattern != EMBEDDINGS
    ]  # which every model has
    if idle and not more:
        raise SettingError(
            f"freeze names {', '.join(map(repr, idle))}, which matches nothing that would train",
            where="heal.freeze",
            exists=", ".join(summed_up(could)[:12]),
            fix="a pattern may hold * for any characters, such as '*surgery_router*'; "
            f"{EMBEDDINGS} stands for the token embeddings and the output head",
        )
    left = _only(every, heal, table, more, lambda name: name not in frozen)
    if not left.parameters and not left.adapted and not more:
        raise SettingError("freeze leaves nothing to train", where="heal.freeze", fix="freeze less")
    return left


def _named(pattern: str, names: Iterable[str], table: Table, vocabulary: int) -> list[str]:
    """Those of the names that a pattern of `heal.freeze` means.

    Args:
        vocabulary: rows of the token embeddings.
    """
    if pattern == EMBEDDINGS:
        outside = [name for name in names if not any(step.isdigit() for step in name.split("."))]  # of the layers
        return [name for name in outside if table[name][1][0] == vocabulary]
    return [name for name in names if fnmatchcase(name, pattern)]


def _only(
    every: TrainableParameters, heal: Heal, table: Table, more: int, keeps: Callable[[str], bool]
) -> TrainableParameters:
    """Those of the parameters whose name `keeps` accepts; a low-rank update goes by the name of its weight."""
    parameters = tuple(filter(keeps, every.parameters))
    adapted = tuple(path for path in every.adapted if keeps(f"{path}.weight"))
    low_rank = sum(heal.rank * sum(table[f"{path}.weight"][1]) for path in adapted) if adapted else 0
    started = tuple(filter(keeps, every.started))
    return TrainableParameters(parameters, adapted, count_of(parameters, table) + more + low_rank, started)


def _started(heal: Heal, anatomy: Anatomy, table: Table, parameters: tuple[str, ...]) -> tuple[str, ...]:
    """What the layer-wise start fits besides the parameters that train: what is left of attention, or nothing.

    Where K and V are mixed, their own weights change only if they train: the mixture is what is fitted.
    """
    if not heal.warm_start or heal.warm_start_of != "attention":
        return ()
    letters = "qo" if heal.mixing != "none" else "qkvo"
    names = _projections(anatomy, letters, table, every_norm=True)
    return tuple(name for name in names if name not in set(parameters))


def _without_own(every: TrainableParameters, heal: Heal, table: Table, more: int) -> TrainableParameters:
    """What trains without the weights of K and V beside which their mixtures train."""
    mixed = {name.partition(".parametrizations.")[0] for name in table if ".parametrizations." in name}
    return _only(every, heal, table, more, lambda name: name.rpartition(".")[0] not in mixed)


def _by_method(
    heal: Heal,
    anatomy: Anatomy,
    table: Table,
    rewritten: frozenset[str],
    is_linear: Callable[[str], bool],
    more: int,
) -> TrainableParameters:
    """What `heal.method` trains, before `heal.freeze`."""
    added = [name for name in table if (leaf := name.rpartition(".")[2]).startswith(SURGERY) and leaf not in FIXED]
    if heal.method == "full":
        names = [name for name in table if not name.endswith(FIXED)]
        return TrainableParameters(tuple(names), (), count_of(names, table) + more)
    if heal.method == "parts":
        names = added + _projections(anatomy, rewritten - {"k", "v"} if heal.mixing != "none" else rewritten, table)
        if not names and not more:
            raise SettingError(
                "method: parts trains what the surgery added or rewrote, and that is nothing here",
                where="heal",
                fix="heal.method=lora, or heal.method=full",
            )
        return TrainableParameters(tuple(names), (), count_of(names, table) + more)
    names = added + _projections(anatomy, rewritten & {"k", "v"}, table)
    full_paths = {name.rpartition(".")[0] for name in names}
    adapted = [path for path in _linears(anatomy, table) if path not in full_paths and is_linear(path)]
    low_rank = sum(heal.rank * sum(table[f"{path}.weight"][1]) for path in adapted)
    return TrainableParameters(tuple(names), tuple(adapted), count_of(names, table) + more + low_rank)


def summed_up(names: Iterable[str]) -> list[str]:
    """Parameter names with N in place of the layer's index, without duplicates."""
    return sorted({".".join("N" if step.isdigit() else step for step in name.split(".")) for name in names})


def count_of(names: Iterable[str], table: Table) -> int:
    """How many numbers the parameters of these names have."""
    return sum(prod(table[name][1]) for name in names)


def _projections(anatomy: Anatomy, letters: Iterable[str], table: Table, every_norm: bool = False) -> list[str]:
    """The parameters of these projections in every layer: weights, biases, and norms that have a row for each head.

    Args:
        every_norm: norms that all heads share too.
    """
    names: list[str] = []
    for layer in anatomy.layers:
        for letter in sorted(letters):
            module = layer.layout.qkv if layer.layout.qkv and letter != "o" else getattr(layer.layout, letter)
            own = [f"{module}.weight", f"{module}.bias"]
            if letter == "q" and layer.layout.q_down:
                own += [f"{layer.layout.q_down}.weight", f"{layer.layout.q_down}.bias"]
                own += [f"{layer.layout.q_down_norm}.weight"] if every_norm else []
            if letter in "kv" and layer.layout.kv_down:
                own.append(f"{layer.layout.kv_down}.weight")
            if letter in "qk" and (layer.norm_per_head or (every_norm and layer.qk_norm)):
                norms = norm_names(layer, f"{letter}_norm", layer.heads if letter == "q" else layer.kv_heads)
                own += norms + [f"{name.removesuffix('weight')}bias" for name in norms if every_norm]
            names += [f"{layer.path}.{name}" for name in own]
    return [name for name in dict.fromkeys(names) if name in table]


def _linears(anatomy: Anatomy, table: Table) -> list[str]:
    """The paths of attention's projections and of all other matrices in each layer."""
    paths = []
    for layer in anatomy.layers:
        layout = layer.layout
        queries = [layout.q_down, layout.q] if layout.q_down else [layout.q]
        down = [layout.kv_down] if layout.kv_down else []
        names = [layout.qkv] if layout.qkv else [*queries, *down, layout.k, layout.v]
        paths += [f"{layer.path}.{name}" for name in names]
        paths += [f"{layer.path}.{layout.o}"]
        block, attention = _block(layer), f"{layer.path}."
        for name, (_, shape) in table.items():
            inside = name.startswith(block) and not name.startswith(attention)
            if inside and name.endswith(".weight") and len(shape) == 2:
                paths.append(name.removesuffix(".weight"))
    return paths


def _block(layer: LayerAnatomy) -> str:
    """The path of the layer that contains an attention module, with a dot at its end: "model.layers.0."."""
    steps = layer.path.split(".")
    last = max(index for index, step in enumerate(steps) if step.isdigit())
    return ".".join(steps[: last + 1]) + "."
