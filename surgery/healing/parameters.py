"""Selects what trains, from the record of the surgery and the model's anatomy; no list of names per family.

Sources: after a merge of KV heads a low-rank update of a wrong matrix is the wrong prior, so K and V train in full
beside LoRA; LoRA on all linears of attention and MLP: Hu et al. 2021, "LoRA", arXiv 2106.09685; Ma et al. 2023,
"LLM-Pruner", arXiv 2305.11627. Embeddings and the output head stay as they are under LoRA: where they are one tensor,
a merge would change both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from surgery.architecture.layer import norm_names
from surgery.errors import SettingError, SurgeryError

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.config.heal import Heal

SURGERY = "surgery_"
FIXED = "surgery_sink_probe"  # says which keys are sinks by a comparison: it has no gradient
EVERY = frozenset("qkvo")
Table = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


@dataclass(frozen=True)
class TrainableParameters:
    """The parameters of a model that train.

    Attributes:
        parameters: names of those that train themselves.
        adapted: paths of the linear modules that get low-rank updates.
        count: numbers that train, low-rank factors among them.
    """

    parameters: tuple[str, ...]
    adapted: tuple[str, ...]
    count: int


def touched(operations: Iterable[dict]) -> frozenset[str]:
    """Which of "q", "k", "v", "o" the operations of a record (and of those before it) rewrote.

    Args:
        operations: entries of recipes: {"op": name, field: value, ...}.
    """
    from surgery import operations as registry

    rewritten: set[str] = set()
    for fields in operations:
        try:
            rewritten |= set(registry.find(str(fields.get("op"))).model_validate(fields).rewritten_projections)
        except (SurgeryError, ValueError):  # not installed here, or of another version: it may have changed anything
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
    """What trains by a method.

    Where heads are mixed, method: parts leaves K and V themselves as they were merged.

    Args:
        anatomy: of the converted model.
        table: its parameters, tied ones once, mixing weights among them.
        rewritten: of `touched`.
        is_linear: whether the module at a path is one that can have a low-rank update.
        more: numbers that the surgery will add, where the table is of a plan and does not name them.

    Raises:
        SurgeryError: method: parts, and the surgery added and rewrote nothing.
    """
    added = [name for name in table if (leaf := name.rpartition(".")[2]).startswith(SURGERY) and leaf != FIXED]
    if heal.method == "full":
        names = [name for name in table if not name.endswith(FIXED)]
        return TrainableParameters(tuple(names), (), _count(names, table) + more)
    if heal.method == "parts":
        names = added + _projections(anatomy, rewritten - {"k", "v"} if heal.mixing != "none" else rewritten, table)
        if not names and not more:
            raise SettingError(
                "method: parts trains what the surgery added or rewrote, and that is nothing here",
                where="heal",
                fix="heal.method=lora, or heal.method=full",
            )
        return TrainableParameters(tuple(names), (), _count(names, table) + more)
    names = added + _projections(anatomy, rewritten & {"k", "v"}, table)
    full_paths = {name.rpartition(".")[0] for name in names}
    adapted = [path for path in _linears(anatomy, table) if path not in full_paths and is_linear(path)]
    low_rank = sum(heal.rank * sum(table[f"{path}.weight"][1]) for path in adapted)
    return TrainableParameters(tuple(names), tuple(adapted), _count(names, table) + more + low_rank)


def summed_up(names: Iterable[str]) -> list[str]:
    """Parameter names with the number of their layer as N, each once."""
    return sorted({".".join("N" if step.isdigit() else step for step in name.split(".")) for name in names})


def _count(names: Iterable[str], table: Table) -> int:
    return sum(prod(table[name][1]) for name in names)


def _projections(anatomy: Anatomy, letters: Iterable[str], table: Table) -> list[str]:
    """Parameters of these projections in every layer: weights, biases, and norms that have a row for each head."""
    names: list[str] = []
    for layer in anatomy.layers:
        for letter in sorted(letters):
            module = layer.layout.qkv if layer.layout.qkv and letter != "o" else getattr(layer.layout, letter)
            own = [f"{module}.weight", f"{module}.bias"]
            if layer.norm_per_head and letter in ("q", "k"):
                own += norm_names(layer, f"{letter}_norm", layer.heads if letter == "q" else layer.kv_heads)
            names += [f"{layer.path}.{name}" for name in own]
    return [name for name in dict.fromkeys(names) if name in table]


def _linears(anatomy: Anatomy, table: Table) -> list[str]:
    """Paths of the projections of attention and of all other matrices of each layer."""
    paths = []
    for layer in anatomy.layers:
        layout = layer.layout
        paths += [f"{layer.path}.{name}" for name in ([layout.qkv] if layout.qkv else [layout.q, layout.k, layout.v])]
        paths += [f"{layer.path}.{layout.o}"]
        block, attention = _block(layer), f"{layer.path}."
        for name, (_, shape) in table.items():
            inside = name.startswith(block) and not name.startswith(attention)
            if inside and name.endswith(".weight") and len(shape) == 2:
                paths.append(name.removesuffix(".weight"))
    return paths


def _block(layer: LayerAnatomy) -> str:
    """The path of the layer that an attention module is in, with a dot: "model.layers.0."."""
    steps = layer.path.split(".")
    last = max(index for index, step in enumerate(steps) if step.isdigit())
    return ".".join(steps[: last + 1]) + "."
